"""Claims about attention: which layers changed most, whether heads became more focused, whether the change is concentrated."""

from __future__ import annotations

import numpy as np
import pandas as pd

from mechscope.difference.selection import default_number
from mechscope.stats.inference import share_interval
from mechscope.studies.paper_2505_17073.judgement import SIGNIFICANT, Judgement, Scope, Tables, percent, verdict

# mean attention KL per layer of GPT-2 small before and after fine-tuning, read off the paper's chart (±0.0002)
PAPER_KL = (0.0010, 0.0118, 0.0236, 0.0179, 0.0103, 0.0136, 0.0061, 0.0044, 0.0064, 0.0063, 0.0062, 0.0098)
PAPER_LAYERS = (2, 3, 5)
# a change is called concentrated where the top quarter of layers has over 1.5 times its even share; the paper's chart has 1.9 times
CONCENTRATED = 1.5
# share of resamples beyond which a layer counts as surely chosen
SURE = 0.95


def _measured(tables: Tables, scope: Scope) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Return heads and layers of the query rows that count, and the selection by the rule that counts."""
    heads, layers, selection = tables["heads"], tables["layers"], tables["selection"]
    layers = layers[layers["rows"] == scope.rows].sort_values("layer")
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
        "Attention changes most in layers 2, 3 and 5 of GPT-2 small's 12.",
        f"Layers {_names(PAPER_LAYERS)} have the largest mean attention KL (read off the chart).",
        f"Layers {_names(top)} of {len(kl)} have the largest mean attention KL{often}.",
    )
    per_layer = len(heads) // len(kl)
    if (len(kl), per_layer) != (12, 12):
        depths = ", ".join(percent(layer / (len(kl) - 1)) for layer in top) if len(kl) > 1 else "0 %"
        return judgement.replaced(
            note=f"The claim is about GPT-2 small (12 layers of 12 heads); this model has {len(kl)} of {per_layer}. "
            f"Its most changed layers lie at {depths} of its depth, the paper's at 18 %, 27 %, 45 %."
        )
    judgement = judgement.replaced(value=len(set(top) & set(PAPER_LAYERS)) / 3)
    note = "Value: share of the paper's three layers among the measured top three. The tables do not say whether the model is GPT-2 small."
    if not len(frequency):
        return judgement.replaced(note=note + " Undecided without resampling of a choice of three layers by KL.")
    # P(all three chosen) is at least 1 − Σ P(one not chosen) and at most the least frequent one's share
    paper = frequency[list(PAPER_LAYERS)]
    low, high = max(0.0, 1.0 - float((1 - paper).sum())), float(paper.min())
    note += f" All three are chosen in {percent(low)} to {percent(high)} of resamples."
    decided = "supported" if low >= SURE else "contradicted" if high <= 1 - SURE else "undecided"
    return judgement.replaced(verdict=decided, note=note)


def heads_focused(tables: Tables, scope: Scope) -> Judgement:
    """Count the heads whose entropy fell; "62 %" is ambiguous in the paper, so it is counted of all heads and of the selected layers'."""
    return _focused(_measured(tables, scope)[0], "heads")


def selected_heads_focused(tables: Tables, scope: Scope) -> Judgement:
    """Count the heads of the selected layers whose entropy fell."""
    heads, _, chosen = _measured(tables, scope)
    selected = sorted(chosen.loc[chosen["chosen"], "layer"])
    return _focused(heads[heads["layer"].isin(selected)], f"heads of the selected layers ({_names(selected)})")


def _focused(heads: pd.DataFrame, which: str) -> Judgement:
    change, q = heads["entropy_change"].to_numpy(), heads["entropy_change_q"].to_numpy()
    n, focused = len(heads), int((change < 0).sum())
    surely_focused, surely_broadened = (int(((q < SIGNIFICANT) & side).sum()) for side in (change < 0, change > 0))
    low, high = share_interval(focused, n)
    decided = verdict(low, high, 0.5)
    # a majority of signs is no evidence where single heads do not back it
    if (decided == "supported" and surely_focused <= surely_broadened) or (
        decided == "contradicted" and surely_broadened <= surely_focused
    ):
        decided = "undecided"
    return Judgement(
        f"Most {which} became more focused: more than half have lower attention entropy after fine-tuning.",
        "62 % of heads became more focused (the paper does not say of which heads).",
        f"{focused} of {n} heads ({percent(focused / n)}) became more focused; of single heads, {surely_focused} did so significantly and "
        f"{surely_broadened} became broader (q < {SIGNIFICANT:g}).",
        value=focused / n,
        low=low,
        high=high,
        verdict=decided,
        note=f"Wilson interval over heads; 62 % lies {'inside' if low <= 0.62 <= high else 'outside'} it. "
        "Decided only where the significant heads lean the same way. Heads share their documents and are not independent, so the interval "
        "is a lower bound on the doubt.",
    )


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
    total, drawn_total = kl.sum(), drawn.sum(axis=1)
    value = float(kl[top].sum() / total) if total > 0 else float("nan")
    shares = np.divide(drawn[:, top].sum(axis=1), drawn_total, out=np.full(len(drawn), np.nan), where=drawn_total > 0)
    low, high = (float(x) for x in np.quantile(shares, [0.025, 0.975]))
    paper = sum(sorted(PAPER_KL)[-3:]) / sum(PAPER_KL)
    return Judgement(
        "The attention change is concentrated: the quarter of the layers that changed most holds more than "
        f"{CONCENTRATED:g} times its even share.",
        f"Three of twelve layers hold {percent(paper)} of the KL (computed from the chart; an even share is 25 %).",
        f"The top {number} of {len(kl)} layers hold {percent(value)} of the KL; an even share is {percent(even)}.",
        value=value,
        low=low,
        high=high,
        # a quarter that is more than two thirds of the model cannot hold 1.5 times its share
        verdict=verdict(low, high, bar) if bar < 1 else "undecided",
        note=f"Threshold {percent(bar)}. Any top quarter exceeds its even share, so that alone would be no evidence. "
        "Interval from the heads' standard errors, the set of layers held fixed.",
    )


def _names(layers: tuple[int, ...] | list[int]) -> str:
    return ", ".join(str(layer) for layer in layers) or "none"
