"""Controls of a fine-tuning: other trainings of the same base, and noise as large as what fine-tuning changed; their settings, and their stage.

One training is one observation: what is true of two models need not be true of fine-tuning to summarize. A control is another training (`seed`: the same
with another seed; `shuffled`: the same budget on documents with other documents' summaries; `other`: anything else, such as another task) or, without one,
`noise`. All are measured against the same base on the same documents as the tuned model.

Light at import, so that jobs can name the stage: what is heavy is imported where it is used.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from mechscope.choices import ControlKind
from mechscope.errors import SettingsError
from mechscope.settings import Count, Number, Settings, setting
from mechscope.studies.inputs import Documents, loading
from mechscope.studies.job import Stage
from mechscope.studies.run import Input, JobRun, Tables

if TYPE_CHECKING:
    from mechscope.studies.control_tables import Control
    from mechscope.subject import Pair, Subject


@dataclass(frozen=True, kw_only=True)
class Controlled(Settings):
    """What the fine-tuning is compared with."""

    panel: ClassVar[str] = "Controls"

    controls: str | None = setting(
        None,
        "Other fine-tuned versions of the base, joined by commas; what each is (seed, shuffled, other) is read from what mechscope tune --control "
        "wrote, or said before it, as in shuffled:PATH.",
    )
    noise_draws: Count = setting(5, "Draws of the base with noise of the tuned model's size, matrix by matrix; 0 for none.")
    control_documents: Number = setting(
        48, "Documents on which the tuned model and its controls are compared: the first of those measured."
    )

    @property
    def has_controls(self) -> bool:
        """Whether there is anything to compare with."""
        return self.noise_draws > 0 or self.controls is not None


def named_controls(settings: Controlled) -> tuple[Control, ...]:
    """Return the controls that the settings name, none of them loaded.

    Raises:
        SettingsError: The list is empty, or names a source twice.
    """
    from mechscope.studies.control_tables import Control

    if settings.controls is None:
        return ()
    texts = [text.strip() for text in settings.controls.split(",") if text.strip()]
    if not texts:
        raise SettingsError(f"setting 'controls' is {settings.controls!r}: name at least one fine-tuned model, or leave it out")
    parts = [_parts(text) for text in texts]
    sources = [source for _, source in parts]
    if twice := [source for source in sources if sources.count(source) > 1]:
        raise SettingsError(f"setting 'controls' names {twice[0]!r} twice: a training counts once")
    last = [Path(source).name for source in sources]
    # the tuned model and the draws of noise stand beside them by these names
    taken = {"tuned", *(f"noise {number}" for number in range(settings.noise_draws))}
    names = [source if last.count(name) > 1 or name in taken else name for name, source in zip(last, sources, strict=True)]
    controls = []
    for name, (kind, source) in zip(names, parts, strict=True):
        recorded, seed = recorded_training(source)
        controls.append(Control(name, source, kind or recorded or "other", seed))
    return tuple(controls)


def recorded_training(source: str) -> tuple[ControlKind | None, int | None]:
    """Return what `mechscope tune` recorded of a training: which kind of control it is (None for none) and its seed."""
    from mechscope.adapt.training import RECORD
    from mechscope.store.files import read_json

    record = read_json(Path(source) / RECORD) if (Path(source) / RECORD).is_file() else {}
    control = record.get("control") or {}
    return control.get("kind"), record.get("seed")


def _parts(text: str) -> tuple[ControlKind | None, str]:
    before, colon, rest = text.partition(":")
    kinds: dict[str, ControlKind] = {"seed": "seed", "shuffled": "shuffled", "other": "other"}
    return (kinds[before], rest) if colon and before in kinds else (None, text)


def _load_control(run: JobRun[Any], base: Subject, control: Control) -> Pair:
    """Load a control beside the base; an adapter is put on a copy of the base of its own."""
    from mechscope.instrument import load
    from mechscope.subject import pair
    from mechscope.subject.load import is_adapter

    # a base in memory has no name to load it by again: the adapter's own is used
    beneath = {"base": run.settings.base} if is_adapter(control.source) and "base" not in run.given else {}
    subject = load(control.source, tokenizer=base.tokenizer, **beneath, **loading(run.settings))
    return pair(base, subject, resize=getattr(run.settings, "resize", "refuse"))


def _seen(run: JobRun[Any], both: Pair) -> dict[str, Any]:
    """Return every control's fingerprint; each is loaded once, and let go."""
    found: dict[str, Any] = {"tuned": both.tuned.fingerprint}
    seen = {both.tuned.fingerprint: "the tuned model", both.base.fingerprint: "the base"}
    for control in named_controls(run.settings):
        fingerprint = _load_control(run, both.base, control).tuned.fingerprint
        if fingerprint in seen:
            raise SettingsError(
                f"control {control.source!r} has the same weights as {seen[fingerprint]}: a training counts once, leave it out"
            )
        seen[fingerprint] = f"control {control.source!r}"
        found[control.name] = [control.kind, control.seed, fingerprint]
    return found


def controls_stage(both: Input[Any], documents: Input[Documents], *, name: str | None = None) -> Stage:
    """Return the stage that measures the tuned model and its controls on the same documents.

    Args:
        both: The base and the tuned model: a `Pair`, or pairs by name of which `name` is the one.
        documents: The documents.
        name: Which pair, where there are several.
    """

    def chosen(run: JobRun[Any]) -> Pair:
        pairs = run[both]
        return pairs if name is None else pairs[name]

    seen: Input[dict[str, Any]] = Input("controls", lambda run: _seen(run, chosen(run)), lambda found: found)

    def pairs_of(run: JobRun[Any]) -> Iterator[tuple[Control, Pair]]:
        from mechscope.studies.control_tables import Control
        from mechscope.subject.noise import noise_pairs

        settings, pair = run.settings, chosen(run)
        source = Path(pair.tuned.source)
        # a model that the run itself trained is called the same wherever the run stands
        own = source.is_relative_to(run.folder.path)
        name = source.relative_to(run.folder.path).as_posix() if own else pair.tuned.source
        yield Control("tuned", name, "tuned", recorded_training(pair.tuned.source)[1]), pair
        for control in named_controls(settings):
            yield control, _load_control(run, pair.base, control)
        for number, noisy in enumerate(noise_pairs(pair, settings.noise_draws, seed=settings.seed)):
            yield Control(f"noise {number}", noisy.tuned.source, "noise", number), noisy

    def work(run: JobRun[Any]) -> Tables:
        from mechscope.studies.control_tables import control_tables

        return control_tables(pairs_of(run), run[documents].first(run.settings.control_documents).encoded, execution=run.execution)

    return Stage(
        name="controls",
        work=work,
        hangs_on=("noise_draws", "control_documents", "seed"),
        inputs=(both, documents, seen),
        when=lambda settings: settings.has_controls,
    )
