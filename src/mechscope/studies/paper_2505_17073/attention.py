"""Claims about attention: which layers changed most, whether heads became more focused, whether the change is concentrated.

What two models show is said of these two models, with an interval over documents. The claims are about fine-tuning to summarize: their verdicts come from
comparing trainings (`trainings`), and without control trainings they are undecided. The rows `….noise` say whether the same number tells the tuned model
from noise of the same size, and nothing more.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from mechscope.difference.selection import default_number
from mechscope.studies.paper_2505_17073.judgement import NAN, Judgement, Scope, Tables, percent
from mechscope.studies.paper_2505_17073.trainings import Statistic, about_fine_tuning, about_noise, trainings

# mean attention KL per layer of GPT-2 small before and after fine-tuning, read off the paper's chart (±0.0002)
PAPER_KL = (0.0010, 0.0118, 0.0236, 0.0179, 0.0103, 0.0136, 0.0061, 0.0044, 0.0064, 0.0063, 0.0062, 0.0098)
PAPER_LAYERS = (2, 3, 5)
# a change is called concentrated where the top quarter of layers has over 1.5 times its even share; the paper's chart has 1.9 times
CONCENTRATED = 1.5
# share of resamples beyond which a layer counts as surely chosen
SURE = 0.95
# chance that one side of an interval over heads is wrong
_ONE_SIDE = 0.025

_FOCUSED = "62\u202f% of heads became more focused (the paper does not say of which heads)."


def _measured(tables: Tables, scope: Scope) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Return heads and layers (those that attend) of the query rows that count, and the selection by the rule that counts."""
    heads, layers, selection = tables["heads"], tables["layers"], tables["selection"]
    layers = layers[(layers["rows"] == scope.rows) & layers["layer"].isin(heads["layer"])].sort_values("layer")
    return heads[heads["rows"] == scope.rows], layers, selection[selection["rule"] == scope.rule]


def most_changed_layers(tables: Tables, scope: Scope) -> Judgement:
    """Compare the top three layers by mean KL with the paper's, where the model has the paper's shape."""
    heads, layers, chosen = _measured(tables, scope)
    kl = layers.set_index("layer")["kl_base_tuned"]
    number = default_number(len(kl))
    top = sorted(int(layer) for layer in kl.sort_values(ascending=False, kind="stable").index[:number])
    by_kl = chosen[(chosen["rule"] == "layers_by_kl") & (chosen["n_resamples"] > 0)]
    frequency = by_kl.set_index("layer")["frequency"] if int(by_kl["chosen"].sum()) == number else pd.Series(dtype=float)
    often = f", chosen in {', '.join(percent(frequency[layer]) for layer in top)} of resamples" if len(frequency) else ""
    judgement = Judgement(
        "Fine-tuning to summarize changes attention most in layers 2, 3 and 5 of GPT-2 small's 12, and there more than control trainings do.",
        f"Layers {_names(PAPER_LAYERS)} have the largest mean attention KL (read off the chart).",
        f"Of these two models, layers {_names(top)} of {len(kl)} have the largest mean attention KL{often}.",
        unit="document",
    )
    per_layer = len(heads) // len(kl)
    if (len(kl), per_layer) != (12, 12):
        depths = ", ".join(percent(layer / (len(kl) - 1)) for layer in top) if len(kl) > 1 else "0\u202f%"
        return judgement.replaced(
            note=f"The claim is about GPT-2 small (12 layers of 12 heads); this model has {len(kl)} of {per_layer}. "
            f"Its most changed layers lie at {depths} of its depth, the paper's at 18\u202f%, 27\u202f%, 45\u202f%.",
            overturn="A study of GPT-2 small.",
        )
    # P(all three chosen) is at least 1 − Σ P(one not chosen) and at most the least frequent one's share
    paper = frequency[list(PAPER_LAYERS)] if len(frequency) else pd.Series([0.0, 1.0])
    low, high = max(0.0, 1.0 - float((1 - paper).sum())), float(paper.min())
    surely = (
        f" All three are chosen in {percent(low)} to {percent(high)} of resamples." if len(frequency) else " The choice was not resampled."
    )
    judgement = judgement.replaced(
        value=len(set(top) & set(PAPER_LAYERS)) / 3,
        note="Value: share of the paper's three layers among the measured top three. The tables do not say whether the model is GPT-2 small."
        + surely,
    )
    return about_fine_tuning(
        judgement,
        trainings(_held_by(PAPER_LAYERS), tables, scope),
        lambda share: f"{percent(share)} of the KL in layers {_names(PAPER_LAYERS)}",
        holds=lambda share: bool(len(frequency)) and low >= SURE,
    )


def heads_focused(tables: Tables, scope: Scope) -> Judgement:
    """Count the heads whose entropy fell; "62 %" is ambiguous in the paper, so it is counted of all heads and of the selected layers'."""
    heads = _measured(tables, scope)[0]
    return about_fine_tuning(
        _focused(heads, "heads"), trainings(_share_focused, tables, scope), percent, grain=1 / len(heads), holds=lambda share: share > 0.5
    )


def selected_heads_focused(tables: Tables, scope: Scope) -> Judgement:
    """Count the heads of the selected layers whose entropy fell; every training is judged by the layers that itself changed most."""
    heads, _, chosen = _measured(tables, scope)
    selected = sorted(chosen.loc[chosen["chosen"], "layer"])
    own = heads[heads["layer"].isin(selected)]
    judgement = _focused(own, f"heads of the most changed layers ({_names(selected)})", "heads of the most changed layers")
    return about_fine_tuning(
        judgement,
        trainings(_share_focused_on_top(len(selected)), tables, scope),
        percent,
        grain=1 / max(1, len(own)),
        holds=lambda share: share > 0.5,
    )


def heads_focused_beyond_noise(tables: Tables, scope: Scope) -> Judgement | None:
    """Compare the share of heads whose entropy fell with what noise of the same size does."""
    judgement = Judgement(
        "The share of heads that became more focused is not what noise of the same size does to the base.", "Not tested in the paper."
    )
    return about_noise(judgement, trainings(_share_focused, tables, scope), percent, grain=1 / len(_measured(tables, scope)[0]))


def concentrated_beyond_noise(tables: Tables, scope: Scope) -> Judgement | None:
    """Compare the share of the change in the top quarter of layers with what noise of the same size does."""
    judgement = Judgement(
        "The share of the attention change in the quarter of the layers that changed most is not what noise of the same size gives.",
        "Not tested in the paper.",
    )
    return about_noise(judgement, trainings(_concentration, tables, scope), percent)


def _focused(heads: pd.DataFrame, which: str, whose: str | None = None) -> Judgement:
    """Say how many heads of these two models have lower entropy, and how many surely do, whatever the dependence between heads."""
    change, p = heads["entropy_change"].to_numpy(), heads["entropy_change_p"].to_numpy()
    n, focused = len(heads), int((change < 0).sum())
    fewest, broadened = (_surely(np.where(side, p / 2, 1 - p / 2)) for side in (change < 0, change > 0))
    documents = int(heads["n"].max()) if n and "n" in heads else 0
    return Judgement(
        f"Fine-tuning to summarize makes most {whose or which} more focused: more than half have lower attention entropy, and more than in control "
        "trainings.",
        _FOCUSED,
        f"Of these two models, {focused} of {n} {which} ({percent(focused / n if n else NAN)}) have lower entropy after fine-tuning; surely at least "
        f"{fewest} and at most {n - broadened}{f' ({documents} documents)' if documents else ''}.",
        value=focused / n if n else NAN,
        low=fewest / n if n else NAN,
        high=(n - broadened) / n if n else NAN,
        unit="document",
        note="The interval counts heads whose change has a sure sign (Holm's correction over all heads, which allows any dependence between them).",
    )


def _surely(p: np.ndarray) -> int:
    """Return the number of hypotheses that Holm (1979) rejects: with probability 97.5 % at least so many are false."""
    rejected = np.sort(np.nan_to_num(p, nan=1.0)) * np.arange(len(p), 0, -1) <= _ONE_SIDE
    return int(np.cumprod(rejected).sum())


def change_concentrated(tables: Tables, scope: Scope) -> Judgement:
    """Measure how much of the attention change the top quarter of layers holds, with an interval from the heads' standard errors."""
    heads, layers, _ = _measured(tables, scope)
    kl = layers["kl_base_tuned"].to_numpy(dtype=np.float64)
    number = default_number(len(kl))
    even, bar = number / len(kl), CONCENTRATED * number / len(kl)
    top = np.argsort(-kl, kind="stable")[:number]
    # heads of a layer saw the same documents; taking their errors as fully dependent bounds the error of their mean from above
    error = heads.groupby("layer")["kl_base_tuned_se"].mean().reindex(layers["layer"]).to_numpy(dtype=np.float64)
    drawn = np.clip(kl + error * np.random.default_rng(0).standard_normal((4000, len(kl))), 0.0, None)
    drawn_total = drawn.sum(axis=1)
    value = _concentration(heads, layers)
    shares = np.divide(drawn[:, top].sum(axis=1), drawn_total, out=np.full(len(drawn), np.nan), where=drawn_total > 0)
    low, high = (float(x) for x in np.quantile(shares, [0.025, 0.975]))
    paper = sum(sorted(PAPER_KL)[-3:]) / sum(PAPER_KL)
    judgement = Judgement(
        f"Fine-tuning to summarize concentrates its change of attention: the quarter of the layers that changed most holds more than {CONCENTRATED:g} "
        "times its even share, and more than in control trainings.",
        f"Three of twelve layers hold {percent(paper)} of the KL (computed from the chart; an even share is 25\u202f%).",
        f"Of these two models, the top {number} of {len(kl)} layers hold {percent(value)} of the KL; an even share is {percent(even)}.",
        value=value,
        low=low,
        high=high,
        unit="document",
        note=f"Threshold {percent(bar)}. Any top quarter exceeds its even share, and layers differ under noise too, so that alone is no evidence. "
        "The interval is from the heads' standard errors, the set of layers held fixed.",
    )
    # a quarter that is more than two thirds of the model cannot hold 1.5 times its share
    return about_fine_tuning(judgement, trainings(_concentration, tables, scope), percent, holds=lambda share: bar < 1 and share > bar)


def _concentration(heads: pd.DataFrame, layers: pd.DataFrame) -> float:
    """Return the share of the KL in the quarter of the layers with most; NaN where there is no KL."""
    kl = np.sort(layers.loc[layers["layer"].isin(heads["layer"]), "kl_base_tuned"].to_numpy(dtype=np.float64))
    return float(kl[-default_number(len(kl)) :].sum() / kl.sum()) if kl.sum() > 0 else NAN


def _share_focused(heads: pd.DataFrame, layers: pd.DataFrame) -> float:
    """Return the share of heads whose entropy fell."""
    return float((heads["entropy_change"].dropna() < 0).mean())


def _share_focused_on_top(number: int) -> Statistic:
    """Return the statistic that counts the heads of a training's own most changed layers."""

    def share(heads: pd.DataFrame, layers: pd.DataFrame) -> float:
        top = layers.sort_values("kl_base_tuned", ascending=False, kind="stable")["layer"].iloc[:number]
        return _share_focused(heads[heads["layer"].isin(top)], layers)

    return share


def _held_by(chosen: Sequence[int]) -> Statistic:
    """Return the statistic that sums the share of the KL in some layers."""

    def share(heads: pd.DataFrame, layers: pd.DataFrame) -> float:
        kl = layers.set_index("layer")["kl_base_tuned"]
        return float(kl[list(chosen)].sum() / kl.sum()) if kl.sum() > 0 else NAN

    return share


def _names(layers: Sequence[int]) -> str:
    return ", ".join(str(layer) for layer in layers) or "none"
