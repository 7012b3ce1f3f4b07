"""The claims of paper 1 (arXiv 2505.17073) beside what was measured, with a verdict each, from tables alone.

A verdict is `supported` or `contradicted` only where a 95 % interval lies wholly on one side of a threshold stated in the claim's own
words; otherwise `undecided`, also where nothing was measured. A pair of models that does not differ has the verdict `no change`. This
module holds the claims about attention; those about training are in `mechscope.studies.training_claims`.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from mechscope.errors import SettingsError
from mechscope.selection import default_number
from mechscope.stats.inference import share_interval
from mechscope.studies.causal_claims import causal_claims
from mechscope.studies.circuit_claims import circuit_claims
from mechscope.studies.training_claims import Claim, percent, training_claims, verdict

# mean attention KL per layer of GPT-2 small before and after fine-tuning, read off the paper's chart (±0.0002)
PAPER_KL = (0.0010, 0.0118, 0.0236, 0.0179, 0.0103, 0.0136, 0.0061, 0.0044, 0.0064, 0.0063, 0.0062, 0.0098)
PAPER_LAYERS = (2, 3, 5)
# below these (nats) two models attend alike: the rounding of one float32 forward pass
SAME_KL, SAME_ENTROPY = 1e-6, 1e-5
# a change is called concentrated where the top quarter of layers has over 1.5 times its even share; the paper's chart has 1.9 times
CONCENTRATED = 1.5
# share of resamples beyond which a layer counts as surely chosen
SURE = 0.95
SIGNIFICANT = 0.05


def claims_table(
    heads: pd.DataFrame,
    layers: pd.DataFrame,
    selection: pd.DataFrame,
    bakeoff: pd.DataFrame | None = None,
    bakeoff_summary: pd.DataFrame | None = None,
    learning_curves: pd.DataFrame | None = None,
    layer_sets: pd.DataFrame | None = None,
    ablation: pd.DataFrame | None = None,
    importance: pd.DataFrame | None = None,
    circuit_overlap: pd.DataFrame | None = None,
    circuit_gain: pd.DataFrame | None = None,
    circuit_summary: pd.DataFrame | None = None,
    *,
    rows: str = "all",
    rule: str = "layers_by_kl",
    metric: str = "rougeL",
    margin: float = 0.005,
) -> pd.DataFrame:
    """Build the table `claims`.

    Args:
        heads: The heads table.
        layers: The layers table.
        selection: The selection table.
        bakeoff: The bake-off's runs; without, the claims about training are not measured.
        bakeoff_summary: The bake-off's intervals.
        learning_curves: The bake-off's validation losses, from which the distance between evaluations is read.
        layer_sets: What sets of layers carry of the gain; without, the claims about interventions are not measured.
        ablation: What ablating the selected heads and random ones costs.
        importance: Rank correlations of change and gain carried.
        circuit_overlap: What the base's and the tuned model's circuits share; without, there is no claim about it.
        circuit_gain: What tuned edges carry in the base model; likewise.
        circuit_summary: How faithful the circuits are.
        rows: Which query rows' statistics to use.
        rule: The rule of layers that "selected layers" means.
        metric: The ROUGE score that decides.
        margin: By how much of that score (a fraction; 0.005 is half a point) targeted LoRA may fall behind standard LoRA and still count as
            equal.

    Returns:
        One row per claim: `claim`, `statement`, `paper`, `measured`, `value`, `low`, `high`, `verdict`, `note`.

    Raises:
        SettingsError: A table lacks the rows or the rule.
    """
    for name, table in (("heads", heads), ("layers", layers)):
        if not (table["rows"] == rows).any():
            raise SettingsError(f"the {name} table has no rows={rows!r}: use one of {', '.join(sorted(table['rows'].unique()))}")
    chosen = selection[selection["rule"] == rule]
    if not chosen["chosen"].any() or (chosen["kind"] != "layer").any():
        raise SettingsError(
            f"the selection table has no layers chosen by {rule!r}: name a rule of layers that it has "
            f"({', '.join(sorted(selection['rule'].unique()))})"
        )
    heads, layers = heads[heads["rows"] == rows], layers[layers["rows"] == rows].sort_values("layer")
    changed = bool((heads["kl_base_tuned"].abs() >= SAME_KL).any() or (heads["entropy_change"].abs() >= SAME_ENTROPY).any())
    selected = sorted(chosen.loc[chosen["chosen"], "layer"])
    of_selected = heads[heads["layer"].isin(selected)]
    claims = [
        _most_changed_layers(heads, layers, chosen),
        _focused(heads, "heads_focused_all", "heads"),
        _focused(of_selected, "heads_focused_selected", f"heads of the selected layers ({_names(selected)})"),
        _concentrated(heads, layers),
    ]
    if not changed:
        note = f"The two models attend alike (every head's KL below {SAME_KL:g} nats): there is nothing to rank or to count."
        claims = [claim.replaced(verdict="no change", note=note) for claim in claims]
    trained = causal_claims(layer_sets, ablation, importance)
    trained += training_claims(bakeoff, bakeoff_summary, learning_curves, metric=metric, margin=margin)
    if not changed:
        note = "The layers and heads were picked from models that do not differ, so the choice means nothing."
        trained = [claim.replaced(verdict="undecided", note=note) for claim in trained]
    found = circuit_claims(circuit_overlap, circuit_gain, circuit_summary)
    return pd.DataFrame([claim.row() for claim in claims + trained + found])


def _most_changed_layers(heads: pd.DataFrame, layers: pd.DataFrame, chosen: pd.DataFrame) -> Claim:
    """Compare the top three layers by mean KL with the paper's, where the model has the paper's shape."""
    kl = layers.set_index("layer")["kl_base_tuned"]
    number = default_number(len(kl))
    top = sorted(int(layer) for layer in kl.sort_values(ascending=False, kind="stable").index[:number])
    by_kl = chosen[(chosen["rule"] == "layers_by_kl") & (chosen["n_resamples"] > 0)]
    frequency = by_kl.set_index("layer")["frequency"] if int(by_kl["chosen"].sum()) == number else pd.Series(dtype=float)
    often = f", chosen in {', '.join(percent(frequency[layer]) for layer in top)} of resamples" if len(frequency) else ""
    claim = Claim(
        "most_changed_layers",
        "Attention changes most in layers 2, 3 and 5 of GPT-2 small's 12.",
        f"Layers {_names(PAPER_LAYERS)} have the largest mean attention KL (read off the chart).",
        f"Layers {_names(top)} of {len(kl)} have the largest mean attention KL{often}.",
    )
    per_layer = len(heads) // len(kl)
    if (len(kl), per_layer) != (12, 12):
        depths = ", ".join(percent(layer / (len(kl) - 1)) for layer in top) if len(kl) > 1 else "0 %"
        return claim.replaced(
            note=f"The claim is about GPT-2 small (12 layers of 12 heads); this model has {len(kl)} of {per_layer}. "
            f"Its most changed layers lie at {depths} of its depth, the paper's at 18 %, 27 %, 45 %."
        )
    claim = claim.replaced(value=len(set(top) & set(PAPER_LAYERS)) / 3)
    note = "Value: share of the paper's three layers among the measured top three. The tables do not say whether the model is GPT-2 small."
    if not len(frequency):
        return claim.replaced(note=note + " Undecided without resampling of a choice of three layers by KL.")
    # P(all three chosen) is at least 1 − Σ P(one not chosen) and at most the least frequent one's share
    paper = frequency[list(PAPER_LAYERS)]
    low, high = max(0.0, 1.0 - float((1 - paper).sum())), float(paper.min())
    note += f" All three are chosen in {percent(low)} to {percent(high)} of resamples."
    decided = "supported" if low >= SURE else "contradicted" if high <= 1 - SURE else "undecided"
    return claim.replaced(verdict=decided, note=note)


def _focused(heads: pd.DataFrame, name: str, which: str) -> Claim:
    """Count the heads whose entropy fell; "62 %" is ambiguous in the paper, so it is asked of all heads and of the selected layers'."""
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
    return Claim(
        name,
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


def _concentrated(heads: pd.DataFrame, layers: pd.DataFrame) -> Claim:
    """Ask how much of the attention change the top quarter of layers holds, with an interval from the heads' standard errors."""
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
    return Claim(
        "change_concentrated",
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
