"""`mechscope patchscope`: let a model say in its own words what a hidden state holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from mechscope.errors import DataError
from mechscope.settings import Count, Number, setting
from mechscope.studies.groups import OneModel
from mechscope.studies.inputs import fingerprints, load_subject, record_models
from mechscope.studies.job import Job, Stage
from mechscope.studies.pairs import layers_of
from mechscope.studies.run import Input, JobRun, Tables
from mechscope.studies.texts import TEXTS, Texts

if TYPE_CHECKING:
    import pandas as pd
    import torch

    from mechscope.data.pairs import PromptPair
    from mechscope.subject import Subject


@dataclass(frozen=True, kw_only=True)
class PatchscopeSettings(OneModel, Texts):
    """Whose states of which tokens are put where, and how much is then read."""

    panel: ClassVar[str] = "Patchscope"

    inspection: str | None = setting(
        None, "Another model that goes on from the patched prompt, of the same width; by default the same one."
    )
    position: int = setting(-1, "Token of each text whose state is taken, from 0; negative ones count from the end.")
    layers: str | None = setting(None, 'Layers behind which it is taken, such as "0-5,11"; by default all.')
    prompt: str | None = setting(
        None, "The inspection prompt; by default the paper's token identity prompt: cat -> cat; 1135 -> 1135; hello -> hello; ?"
    )
    target_position: int = setting(-1, "Token of the prompt whose state is replaced; negative ones count from the end.")
    target_layer: Count | None = setting(None, "Behind which layer it is replaced; by default the layer of the same number.")
    top: Number = setting(5, "Likeliest next tokens that are kept.")
    new_tokens: Count = setting(5, "Tokens that are generated from the patched prompt, greedily.")
    control: bool = setting(True, "Also patch in a random vector of the same length, per text and layer.")
    documents: Number = setting(16, "Documents or prompts to read.")


def _both(run: JobRun[PatchscopeSettings]) -> dict[str, Subject]:
    models = {"model": load_subject(run, "model")}
    if run.source("inspection") is not None:
        models["inspection"] = load_subject(run, "inspection")
    return models


BOTH: Input[Mapping[str, Subject]] = Input("models", _both, fingerprints, record_models)
"""The model whose states are inspected, and the one that inspects them where it is another."""


def _options(run: JobRun[PatchscopeSettings]) -> dict[str, Any]:
    """Return the inspecting model, its prompt and the places, as arguments of `patchscope`."""
    settings = run.settings
    inspection, prompt = run[BOTH].get("inspection", run.first), None
    if settings.prompt is not None:
        if inspection.tokenizer is None:
            raise DataError(f"model {inspection.source!r} has no tokenizer, which --prompt needs: load it with one")
        prompt = tuple(inspection.tokenizer(settings.prompt)["input_ids"])
    return {
        "inspection": inspection,
        "inspection_ids": prompt,
        "layers": layers_of(settings.layers, run.first.anatomy),
        "position": settings.position,
        "target_position": settings.target_position,
        "target_layer": settings.target_layer,
        "k": settings.top,
        "generate": settings.new_tokens,
    }


def _check(run: JobRun[PatchscopeSettings]) -> None:
    from mechscope.data.scoring import check_fits
    from mechscope.lens import check_patchscope

    check_fits(run.first, run[TEXTS])
    options = _options(run)
    for pair in run[TEXTS]:
        check_patchscope(run.first, pair.clean, **options)


def _inspected(run: JobRun[PatchscopeSettings]) -> Tables:
    import pandas as pd
    import torch

    from mechscope.lens import patchscope

    options, texts, subject = _options(run), run[TEXTS], run.first
    generator = torch.Generator().manual_seed(run.settings.seed)

    def random(_: int, state: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(state.shape, generator=generator).to(state)
        return noise * (state.norm() / noise.norm())

    mappings = {"text": None, **({"random": random} if run.settings.control else {})}
    parts = []
    for done, pair in enumerate(texts):
        run.tell("patchscope", done, len(texts))
        own = _of_text(subject, pair, run.settings.position)
        for state, mapping in mappings.items():
            scoped = patchscope(subject, pair.clean, **options, mapping=mapping)
            parts.append(_judged(scoped.assign(state=state, **own), options["inspection"]))
    run.tell("patchscope", len(texts), len(texts))
    first = ["text", "position", "token", "predicted", "state"]
    table = pd.concat(parts, ignore_index=True)
    table = table[[*first, *(column for column in table if column not in first)]]
    return {"patchscope": table, "patchscope_summary": _summary(table)}


def _of_text(subject: Subject, pair: PromptPair, position: int) -> dict[str, Any]:
    """Return what stands at the token that is inspected, and what the model itself predicts there."""
    import torch

    from mechscope.instrument import Walk, unembed

    at = position % len(pair.clean)
    with torch.no_grad():
        hidden = Walk(subject, torch.tensor([pair.clean[: at + 1]])).run()[:, -1]
        predicted = int(unembed(subject, hidden).argmax(-1))
    return {
        "text": pair.id,
        "position": at,
        "token": subject.spelling.token(pair.clean[at]),
        "predicted": subject.spelling.token(predicted),
    }


def _judged(scoped: pd.DataFrame, inspection: Subject) -> pd.DataFrame:
    """Add whether the likeliest continuation is the model's own prediction, and whether what is generated repeats the inspected token."""
    spelled = [inspection.spelling.tokens(ids) for ids in scoped["generated_ids"]]
    return scoped.assign(
        predicts=[tokens[0] == own for tokens, own in zip(scoped["top_tokens"], scoped["predicted"], strict=True)],
        repeats=[own.strip() in [token.strip() for token in tokens] for tokens, own in zip(spelled, scoped["token"], strict=True)],
    )


def _summary(table: pd.DataFrame) -> pd.DataFrame:
    """Return the shares of texts by state and layer, with the share in which a text is followed by the prediction of another."""
    import pandas as pd

    from mechscope.stats.inference import share_interval

    rows = []
    for (state, layer, target), own in table.groupby(["state", "source_layer", "target_layer"], sort=False):
        row = {"state": state, "layer": layer, "target_layer": target, "n": len(own)}
        for share in ("predicts", "repeats"):
            low, high = share_interval(int(own[share].sum()), len(own))
            row |= {share: own[share].mean(), f"{share}_low": low, f"{share}_high": high}
        row["predicts_other"] = _of_others([tokens[0] for tokens in own["top_tokens"]], list(own["predicted"]))
        rows.append(row)
    return pd.DataFrame(rows)


def _of_others(likeliest: list[str], predicted: list[str]) -> float:
    """Return how often what follows one text's state is another text's prediction, over all pairs of texts; missing where there is one text."""
    pairs = len(likeliest) * (len(likeliest) - 1)
    same = sum(one == other for at, one in enumerate(likeliest) for of, other in enumerate(predicted) if at != of)
    return same / pairs if pairs else float("nan")


def _title(names: Mapping[str, str]) -> str:
    if "inspection" in names:
        return f"What {names['inspection']} reads in hidden states of {names['model']}"
    return f"What hidden states of {names['model']} hold, in its own words"


JOB = Job(
    name="patchscope",
    help="Patchscopes: put a text's hidden state into another prompt and let a model say what it holds (Ghandeharioun et al. 2024).",
    panel="read",
    example='mechscope patchscope gpt2 --text "Alexander the Great" --new-tokens 10 --out runs/patchscope',
    settings=PatchscopeSettings,
    arguments=("model", "inspection"),
    inputs=(BOTH, TEXTS),
    stages=(
        Stage(
            name="patchscope",
            work=_inspected,
            hangs_on=("position", "layers", "prompt", "target_position", "target_layer", "top", "new_tokens", "control", "seed"),
            inputs=(BOTH, TEXTS),
        ),
    ),
    sections=("patchscope",),
    title=_title,
    check=_check,
    first=lambda run: run[BOTH]["model"],
)
