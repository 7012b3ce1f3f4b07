"""What is shown of dictionaries, wherever they come from: what they keep of the model beside controls, and what their latents stand for.

That they belong to the model was checked before the first pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from mechscope.settings import Count, Number, Settings, setting
from mechscope.studies.run import JobRun, Tables

if TYPE_CHECKING:
    import pandas as pd

    from mechscope.data.pairs import Pairs
    from mechscope.features import Dictionary, TokenSettings

# tokens of which principal components are taken
_PCA_ROWS = 8192
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


def measure_all(run: JobRun[Any], dictionaries: Mapping[str, Dictionary], texts: Pairs, tokens: TokenSettings | None) -> Tables:
    """Measure dictionaries on texts, each autoencoder beside random directions and principal components with as many active latents.

    Returns:
        The tables `dictionary_measures` and `dictionary_latents`.
    """
    import pandas as pd

    from mechscope.features import measure

    rows, latents = [], []
    for name, dictionary in dictionaries.items():
        measured = measure(run.first, dictionary, texts, tokens=tokens, other_model=True, execution=run.execution)
        rows.append(measured.table.assign(dictionary=name, control=""))
        latents.append(measured.latents.assign(dictionary=name, component=_components(dictionary, measured.latents["latent"])))
        # of few texts too, whose mean is given without an interval or not at all
        active = float(measured.latents["density"].sum())
        for control, other in _controls(run, dictionary, texts, tokens, max(1, round(active))).items():
            table = measure(run.first, other, texts, tokens=tokens, other_model=True, execution=run.execution).table
            rows.append(table.assign(dictionary=name, control=control))
    own = ["dictionary", "component", "tokens", "density", "mean"]
    measures = pd.concat(rows, ignore_index=True)
    first = ["dictionary", "control"]
    return {
        "dictionary_measures": measures[[*first, *(name for name in measures if name not in first)]],
        "dictionary_latents": pd.concat(latents, ignore_index=True)[own],
    }


def _components(dictionary: Dictionary, latents: pd.Series) -> list[str]:
    place = dictionary.layout.outputs[0].name
    return [f"{place}.f{latent}" for latent in latents]


def _controls(run: JobRun[Any], dictionary: Dictionary, texts: Pairs, tokens: TokenSettings | None, k: int) -> dict[str, Dictionary]:
    """Return what a dictionary stands beside; nothing for those that write elsewhere than they read."""
    from mechscope.features import HarvestSettings, Live, pca_control, random_control

    layout = dictionary.layout
    if layout.inputs != layout.outputs or len(layout.inputs) > 1:
        return {}
    (place,) = layout.inputs
    live = Live(
        run.first,
        texts,
        place,
        settings=HarvestSettings(rows=_PCA_ROWS)
        if tokens is None
        else HarvestSettings(rows=_PCA_ROWS, first=tokens.first, outlier=tokens.outlier),
        execution=run.execution,
    )
    return {
        "random directions": random_control(dictionary, k, seed=run.settings.seed),
        "principal components": pca_control(dictionary, live.block(0)[place].to(dictionary.device), k),
    }


def show_latents(
    run: JobRun[Any], dictionaries: Mapping[str, Dictionary], texts: Pairs, tokens: TokenSettings | None, settings: LatentSettings
) -> Tables:
    """List the latents that carry most of what each dictionary writes, with the texts in which they are active most.

    Returns:
        The tables `latents_shown` and `latent_examples`.
    """
    import pandas as pd

    from mechscope.features import promoted_tokens, top_examples
    from mechscope.features.examples import writes_residual
    from mechscope.subject.spelling import Spelling

    spelling, shown, listed = Spelling(run.first.tokenizer), [], []
    for name, dictionary in dictionaries.items():
        found = top_examples(
            run.first, dictionary, texts, count=settings.examples, tokens=tokens, other_model=True, execution=run.execution
        )
        latents = found.strongest(settings.latents_shown)
        place = dictionary.layout.outputs[0]
        read = promoted_tokens(run.first, dictionary, latents) if latents and writes_residual(place) else [([], [])] * len(latents)
        whole = found.energy.sum()
        for latent, (up, down) in zip(latents, read, strict=True):
            component = f"{place.name}.f{latent}"
            row = {"dictionary": name, "component": component, "share": found.energy[latent] / whole}
            shown.append(row | {"promotes": spelling.tokens(up), "suppresses": spelling.tokens(down)})
            own = found.table[found.table["latent"] == latent]
            for number, text, at, value in zip(own["rank"], own["text"], own["position"], own["value"], strict=True):
                ids = texts.pairs[text].clean
                listed.append(
                    {
                        "dictionary": name,
                        "component": component,
                        "place": int(number),
                        "value": float(value),
                        "text": str(texts.pairs[text].id),
                        "position": int(at),
                        "before": spelling.text(ids[max(0, at - _BEFORE) : at]),
                        "token": spelling.token(ids[at]),
                        "after": spelling.text(ids[at + 1 : at + 1 + _AFTER]),
                    }
                )
    if not shown:
        return {}
    return {"latents_shown": pd.DataFrame(shown), "latent_examples": pd.DataFrame(listed)}
