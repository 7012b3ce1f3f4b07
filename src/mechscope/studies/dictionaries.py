"""What is measured and shown of dictionaries, wherever they come from: what they keep of the model beside controls, and what their latents stand for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from mechscope.settings import Count, Number, Settings, setting
from mechscope.studies.inputs import MODELS
from mechscope.studies.job import Stage
from mechscope.studies.run import Input, JobRun, Tables
from mechscope.studies.texts import TEXTS

if TYPE_CHECKING:
    from torch import Tensor

    from mechscope.data.pairs import Pairs
    from mechscope.features import Dictionary, Examples, Place, TokenSettings
    from mechscope.subject.spelling import Spelling

# tokens from which controls are made: principal components, linear maps, and how many latents are active
_CONTROL_ROWS = 8192
# tokens written on each side of an example's own
_BEFORE, _AFTER = 12, 4


@dataclass(frozen=True, kw_only=True)
class LatentSettings(Settings):
    """Which latents are listed, and with how many examples."""

    panel: ClassVar[str] = "Latents"

    latents_shown: Count = setting(
        30, "Latents of each dictionary that are listed with examples: those that carry most of what it writes; 0 for none."
    )
    examples: Number = setting(5, "Examples of a latent, each from another text.")


class Judged(NamedTuple):
    """What is measured.

    Attributes:
        dictionaries: On the model's device, checked to fit it.
        texts: What they are measured on.
        tokens: Which tokens are left out; None as in training.
        against: Which of the dictionaries the others are compared with.
    """

    dictionaries: Mapping[str, Dictionary]
    texts: Pairs
    tokens: TokenSettings | None
    against: tuple[str, ...] = ()


def stages(
    judged: Callable[[JobRun[Any]], Judged],
    *,
    hangs_on: tuple[str, ...],
    inputs: tuple[Input[Any], ...] = (),
    after: tuple[Stage, ...] = (),
) -> tuple[Stage, Stage]:
    """Return the stages that measure dictionaries and list their latents, for a job whose settings nest `LatentSettings` as `latent`.

    Args:
        judged: Returns the job's dictionaries.
        hangs_on: Settings that decide which they are and what is read.
        inputs: What is loaded beside model and texts and decides the result.
        after: Stages that make the dictionaries.
    """
    own: tuple[Input[Any], ...] = (MODELS, TEXTS, *inputs)
    measures = Stage(name="measures", work=lambda run: _measure(run, judged(run)), hangs_on=(*hangs_on, "seed"), inputs=own, after=after)
    latents = Stage(
        name="latents",
        work=lambda run: _show(run, judged(run)),
        hangs_on=(*hangs_on, "latent"),
        inputs=own,
        after=after,
        when=lambda settings: settings.latent.latents_shown > 0,
        alone=True,
    )
    return measures, latents


def described(name: str, dictionary: Dictionary) -> dict[str, Any]:
    """Return a dictionary's row of the table `dictionaries`."""
    layout = dictionary.layout
    return {
        "dictionary": name,
        "reads": ",".join(map(str, layout.inputs)),
        "writes": ",".join(map(str, layout.outputs)),
        "latents": layout.latents,
        "rule": layout.rule.name,
        "k": float("nan") if layout.rule.k is None else float(layout.rule.k),
    }


def _measure(run: JobRun[Any], judged: Judged) -> Tables:
    """Measure dictionaries, each beside controls with as many active latents, of which the model's own and ablated runs are made once."""
    import pandas as pd

    from mechscope.features.measures import difference_of, measure_together

    rows, latents, differences = [], [], []
    made_of = control_rows(run, judged)
    for name, dictionary in judged.dictionaries.items():
        controls = controls_of(dictionary, made_of.pop(name), seed=run.settings.seed)
        # once more, on the tokens of this dictionary: what is subtracted was measured on the same
        others = {other: judged.dictionaries[other] for other in judged.against if name not in judged.against}
        others = {other: each for other, each in others.items() if same_places(each, dictionary)}
        together = {"": dictionary, **controls, **{f"against {other}": each for other, each in others.items()}}
        measured = measure_together(run.first, together, judged.texts, tokens=judged.tokens, other_model=True, execution=run.execution)
        rows += [measured[control].table.assign(dictionary=name, control=control) for control in ("", *controls)]
        latents.append(measured[""].latents.rename(columns={"latent": "component"}).assign(dictionary=name))
        for other in others:
            found = difference_of(measured[""], measured[f"against {other}"])
            differences.append(found.assign(dictionary=name, against=other)[["dictionary", "against", *found]])
    measures = pd.concat(rows, ignore_index=True)
    first = ["dictionary", "control"]
    tables = {
        "dictionary_measures": measures[[*first, *(name for name in measures if name not in first)]],
        "dictionary_latents": pd.concat(latents, ignore_index=True)[["dictionary", "component", "tokens", "density", "mean"]],
    }
    return {**tables, **({"dictionary_differences": pd.concat(differences, ignore_index=True)} if differences else {})}


def same_places(one: Dictionary, other: Dictionary) -> bool:
    """Tell whether dictionaries read and write the same places."""
    return (one.layout.inputs, one.layout.outputs) == (other.layout.inputs, other.layout.outputs)


def control_rows(run: JobRun[Any], judged: Judged) -> dict[str, Mapping[Place, Tensor]]:
    """Return, by dictionary, the activations that its controls are made of; the model is run once for all that leave out as many first tokens."""
    from mechscope.features.rows import blocks, reader_of, run_together

    texts, found = judged.texts, dict[str, Any]()
    readers = {
        name: reader_of(run.first, dictionary, texts, judged.tokens, other_model=True, execution=run.execution)
        for name, dictionary in judged.dictionaries.items()
    }
    for first in dict.fromkeys(reader.tokens.first for reader in readers.values()):
        own = {name: reader for name, reader in readers.items() if reader.tokens.first == first}
        chosen = next(blocks(texts, range(len(texts)), _CONTROL_ROWS, first))
        rows = run_together(list(own.values()), texts, chosen, run.execution, label="controls")
        found |= {name: each.values for name, each in zip(own, rows, strict=True)}
    return found


def controls_of(dictionary: Dictionary, rows: Mapping[Place, Tensor], *, seed: int) -> dict[str, Dictionary]:
    """Return what a dictionary stands beside, made of its `control_rows`."""
    from mechscope.features import controls

    layout = dictionary.layout
    inputs, outputs = ([rows[place].to(dictionary.device) for place in where] for where in (layout.inputs, layout.outputs))
    return controls.controls_of(dictionary, inputs, outputs, seed=seed)


def _show(run: JobRun[Any], judged: Judged) -> Tables:
    """List the latents that carry most of what each dictionary writes, with the texts in which they are active most."""
    import pandas as pd

    from mechscope.features import Latent, promoted_tokens, top_examples
    from mechscope.features.examples import writes_residual
    from mechscope.subject.spelling import Spelling

    settings, texts, spelling = run.settings.latent, judged.texts, Spelling(run.first.tokenizer)
    shown, listed = [], []
    for name, dictionary in judged.dictionaries.items():
        found = top_examples(
            run.first, dictionary, texts, count=settings.examples, tokens=judged.tokens, other_model=True, execution=run.execution
        )
        latents, place = found.strongest(settings.latents_shown), dictionary.layout.outputs[0]
        # where decoder rows are no part of the residual stream there are no tokens to be read off them
        read = promoted_tokens(run.first, dictionary, latents) if latents and writes_residual(place) else [([], [])] * len(latents)
        for latent, (up, down) in zip(latents, read, strict=True):
            about = {"dictionary": name, "component": Latent(place, latent).name}
            share = found.energy[latent] / found.energy.sum()
            shown.append({**about, "share": share, "promotes": spelling.tokens(up), "suppresses": spelling.tokens(down)})
            listed += [{**about, **row} for row in example_rows(found, latent, texts, spelling)]
    return {"latents_shown": pd.DataFrame(shown), "latent_examples": pd.DataFrame(listed)} if shown else {}


def example_rows(found: Examples, latent: int, texts: Pairs, spelling: Spelling) -> Iterator[dict[str, Any]]:
    """Yield where a latent is active most, the largest first: `place`, `value`, `text`, `position`, and the token with what stands around it."""
    own = found.table[found.table["latent"] == latent]
    for number, text, at, value in zip(own["rank"], own["text"], own["position"], own["value"], strict=True):
        ids = texts.pairs[text].clean
        yield {
            "place": int(number),
            "value": value,
            "text": str(texts.pairs[text].id),
            "position": int(at),
            "before": spelling.text(ids[max(0, at - _BEFORE) : at]),
            "token": spelling.token(ids[at]),
            "after": spelling.text(ids[at + 1 : at + 1 + _AFTER]),
        }
