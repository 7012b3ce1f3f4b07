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
from mechscope.errors import MechscopeError, SettingsError
from mechscope.settings import Count, Number, Settings, setting
from mechscope.studies.inputs import Documents, loading
from mechscope.studies.job import Stage
from mechscope.studies.run import Input, JobRun, Tables

if TYPE_CHECKING:
    from mechscope.studies.control_tables import Control
    from mechscope.subject import Pair, Subject


@dataclass(frozen=True, kw_only=True)
class NamedControls(Settings):
    """Other trainings that the fine-tuning is compared with."""

    panel: ClassVar[str] = "Controls"

    controls: str | None = setting(
        None,
        "Other fine-tuned versions of the base, joined by commas; what each is (seed, shuffled, other) is read from what mechscope tune --control "
        "wrote, or said before it, as in shuffled:PATH.",
    )


@dataclass(frozen=True, kw_only=True)
class Controlled(NamedControls):
    """What the fine-tuning is compared with."""

    panel: ClassVar[str] = "Controls"

    noise_draws: Count = setting(8, "Draws of the base with noise of the tuned model's size, matrix by matrix; 0 for none.")
    control_documents: Number = setting(
        48, "Documents on which the tuned model and its controls are compared: the first of those measured."
    )

    @property
    def has_controls(self) -> bool:
        """Whether there is anything to compare with."""
        return self.noise_draws > 0 or self.controls is not None


def named_controls(settings: NamedControls) -> tuple[Control, ...]:
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
    draws = settings.noise_draws if isinstance(settings, Controlled) else 0
    taken = {"tuned", *(f"noise {number}" for number in range(draws))}
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


def load_control(run: JobRun[Any], base: Subject, control: Control) -> Pair:
    """Load a control beside the base; an adapter is put on a copy of the base of its own.

    Raises:
        SettingsError: It cannot be loaded, or is not a fine-tuned version of the base.
    """
    from mechscope.instrument import load
    from mechscope.subject import pair
    from mechscope.subject.load import is_adapter

    # a base in memory has no name to load it by again: the adapter's own is used
    beneath = {"base": run.settings.base} if is_adapter(control.source) and "base" not in run.given else {}
    try:
        subject = load(control.source, tokenizer=base.tokenizer, **beneath, **loading(run.settings))
        return pair(base, subject, resize=getattr(run.settings, "resize", "refuse"))
    except MechscopeError as error:
        raise SettingsError(f"setting 'controls' names {control.source!r}: {error}") from error


def check_controls(run: JobRun[Any], base: Subject, tuned: Subject | None = None) -> dict[str, Any]:
    """Refuse controls that cannot be loaded, are no versions of the base, or are a model that is there already; return their fingerprints by name.

    Every control is loaded, and let go.

    Args:
        run: The run, whose settings name the controls.
        base: The base.
        tuned: The tuned model; None where it is not trained yet.

    Raises:
        SettingsError: One cannot be used.
    """
    found: dict[str, Any] = {}
    seen = {base.fingerprint: "the base"} | ({} if tuned is None else {tuned.fingerprint: "the tuned model"})
    for control in named_controls(run.settings):
        fingerprint = load_control(run, base, control).tuned.fingerprint
        if fingerprint in seen:
            raise SettingsError(
                f"setting 'controls' names {control.source!r}, which has the same weights as {seen[fingerprint]}: a training counts once, leave it out"
            )
        seen[fingerprint] = f"control {control.source!r}"
        found[control.name] = [control.kind, control.seed, fingerprint]
    return found


def controls_input(both: Input[Any], *, name: str | None = None) -> Input[dict[str, Any]]:
    """Return what of the controls decides a result; a job that has both models from the start names it among its own inputs, so that it fails early.

    Args:
        both: The base and the tuned model: a `Pair`, or pairs by name of which `name` is the one.
        name: Which pair, where there are several.
    """

    def seen(run: JobRun[Any]) -> dict[str, Any]:
        pair = _chosen(run, both, name)
        return {"tuned": pair.tuned.fingerprint, **check_controls(run, pair.base, pair.tuned)}

    return Input("controls", seen, lambda found: found)


def _chosen(run: JobRun[Any], both: Input[Any], name: str | None) -> Pair:
    pairs = run[both]
    chosen: Pair = pairs if name is None else pairs[name]
    return chosen


def controls_stage(
    both: Input[Any], documents: Input[Documents], seen: Input[dict[str, Any]], difference: Stage, *, name: str | None = None
) -> Stage:
    """Return the stage that measures the tuned model and its controls on the same documents.

    Args:
        both: The base and the tuned model: a `Pair`, or pairs by name of which `name` is the one.
        documents: The documents.
        seen: The controls, by `controls_input`.
        difference: The stage that measured the tuned model: its smallest effects hold for controls too, and where it read no more documents than controls
            are to, its tables are the tuned model's here.
        name: Which pair, where there are several.
    """

    def pairs_of(run: JobRun[Any]) -> Iterator[tuple[Control, Pair]]:
        from mechscope.studies.control_tables import Control
        from mechscope.subject.noise import noise_pairs

        settings, pair = run.settings, _chosen(run, both, name)
        source = Path(pair.tuned.source)
        # a model that the run itself trained is called the same wherever the run stands
        own = source.is_relative_to(run.folder.path)
        called = source.relative_to(run.folder.path).as_posix() if own else pair.tuned.source
        yield Control("tuned", called, "tuned", recorded_training(pair.tuned.source)[1]), pair
        for control in named_controls(settings):
            yield control, load_control(run, pair.base, control)
        for number, noisy in enumerate(noise_pairs(pair, settings.noise_draws, seed=settings.seed)):
            yield Control(f"noise {number}", noisy.tuned.source, "noise", number), noisy

    def work(run: JobRun[Any]) -> Tables:
        from mechscope.difference import SmallestEffects
        from mechscope.studies.control_tables import MEASURED, control_tables

        settings, all_documents = run.settings, run[documents].encoded
        encoded = run[documents].first(settings.control_documents).encoded
        known = {"tuned": run.tables(MEASURED)} if len(encoded) == len(all_documents) else {}
        return control_tables(
            pairs_of(run),
            encoded,
            known=known,
            gini=settings.gini,
            geometry_documents=settings.geometry_documents,
            same_input_documents=settings.same_input_documents,
            smallest=SmallestEffects(run.table("smallest_effects")),
            execution=run.execution,
        )

    return Stage(
        name="controls",
        work=work,
        hangs_on=("noise_draws", "control_documents", "gini", "geometry_documents", "same_input_documents", "seed"),
        inputs=(both, documents, seen),
        after=(difference,),
        when=lambda settings: settings.has_controls,
    )
