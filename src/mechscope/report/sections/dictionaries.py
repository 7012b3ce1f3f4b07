"""Dictionaries of features: what they keep of the model beside controls, how their training went, and what their latents stand for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from mechscope.report.latents import EXAMPLES, PROMOTES, SUPPRESSES, in_words, with_examples
from mechscope.report.marks.figure import Figure
from mechscope.report.marks.series import curves
from mechscope.report.marks.tables import Cell, Row, Shown, Table, View
from mechscope.report.section import Section, Tables, number, table
from mechscope.report.shared import few_texts
from mechscope.report.statements import Card, Caveat, Finding
from mechscope.report.theme import interval, percent
from mechscope.report.theme import number as written

# decimal digits of a density between two bars
_STEP = 0.25
_SILENT = -6.0
# what is asked for first
_SHARES = ("explained variance", "loss recovered, mean")
_LINEAR = "linear map"

TABLES = {
    "dictionaries": table(
        "One row per dictionary.",
        dictionary="its name",
        reads="the places it reads: resid6, m3.in",
        writes="the places it writes",
        latents="number of latents",
        rule="which latents are active: topk, batchtopk, relu, gated, jumprelu",
        k=number("active latents of a token, for topk and batchtopk"),
        steps=number("steps of its training", optional=True),
        tokens=number("tokens of its training", "tokens", optional=True),
        converged=number("whether its training converged, by one rule for all that is trained (methods.md)", optional=True),
        late_share=number("change of the loss in the last quarter of the training, of its whole change", "share", optional=True),
        unconverged=number("why the training does not count as converged; empty where it does", optional=True),
    ),
    "dictionary_training": table(
        "One row per training step and dictionary.",
        dictionary="its name",
        step="the step, from 0",
        loss=number("loss of the step's batch before the step", "squared norms"),
        reconstruction=number("its part without penalties: the fraction of variance unexplained", "share"),
        l0=number("mean active latents of a token", "latents"),
        dead=number("latents silent for as long as counts as dead", "latents"),
    ),
    "dictionary_measures": table(
        "One row per dictionary, control, measure and place, on texts that were not learned from; ratios of sums over texts (features.md).",
        dictionary="its name",
        control="empty for the dictionary itself; random directions or principal components with as many active latents, or the linear map between its places",
        measure="what was measured",
        place="where",
        n="texts",
        value=number("the measure", "share, nats or latents, by the measure", "low", "high", bare=True),
        withheld="why it is not given; empty where it is",
        note="what must be known to read it; empty where nothing",
    ),
    "dictionary_latents": table(
        "One row per latent.",
        dictionary="its dictionary",
        component="the latent: resid6.f1024",
        tokens="tokens in which it is active",
        density=number("the same as a share of all tokens that were read", "share"),
        mean=number("its mean value where it is active"),
    ),
    "latents_shown": table(
        "One row per latent that is listed: those that carry most of what their dictionary writes.",
        dictionary="its dictionary",
        component="the latent: resid6.f1024",
        share=number("its share of Σ f² over all latents", "share"),
        promotes=PROMOTES,
        suppresses=SUPPRESSES,
    ),
    "latent_examples": table(
        "One row per listed latent and text in which it is active most.",
        dictionary="its dictionary",
        component="the latent: resid6.f1024",
        **EXAMPLES,
    ),
}


def _figures(tables: Tables) -> list[Figure]:
    return [*_training(tables.get("dictionary_training")), *_densities(tables.get("dictionary_latents"))]


def _training(curve: pd.DataFrame | None) -> list[Figure]:
    if curve is None:
        return []
    # a few hundred points are all that can be told apart
    every = max(1, int(curve["step"].max() + 1) // 200)
    own = curve[curve["step"] % every == 0]
    drawn = pd.DataFrame(
        {
            "series": own["dictionary"],
            "chance": False,
            "step": own["step"] + 1,
            "value": own["reconstruction"],
            "low": np.nan,
            "high": np.nan,
        }
    )
    return curves(
        drawn,
        name="dictionary-training",
        title="Training of dictionaries",
        caption="What each batch leaves unexplained before its step; one line per dictionary.",
        x=("step", "step"),
        axis="share of the variance unexplained",
        unit=False,
    )


def _densities(latents: pd.DataFrame | None) -> list[Figure]:
    if latents is None:
        return []
    parts = []
    for name, own in latents.groupby("dictionary", sort=False):
        digits = np.log10(own["density"].clip(lower=10**_SILENT))
        bins = (digits / _STEP).round().mul(_STEP)
        counts = bins.value_counts().sort_index()
        parts.append(
            pd.DataFrame(
                {"series": name, "chance": False, "fraction": 10.0**counts.index, "value": counts.to_numpy(), "low": np.nan, "high": np.nan}
            )
        )
    return curves(
        pd.concat(parts, ignore_index=True),
        name="dictionary-densities",
        title="How often latents are active",
        caption="Latents by the share of tokens in which they are active, in steps of a quarter of a decimal; "
        "those below one in a million, silent ones too, at the left end.",
        x=("fraction", "share of tokens"),
        axis="latents",
        unit=False,
    )


def _views(tables: Tables) -> list[Shown]:
    shown = []
    measured = tables.get("dictionary_measures")
    if measured is not None:
        shown.append(Shown("What dictionaries keep, beside controls", _brief(measured), terminal=True))
        view = Table(measured).words("dictionary", "dictionary", strong=lambda row: not row["control"]).cells("control", "which is", _which)
        view = view.words("measure", "measure").words("place", "place").shares("value", "value", ends=("low", "high")).numbers("n", "texts")
        shown.append(Shown("All measures", view.texts("note", "note").view(), folded=True, table="dictionary_measures"))
    if "dictionaries" in tables:
        view = Table(tables["dictionaries"]).words("dictionary", "dictionary").words("reads", "reads").words("writes", "writes")
        view = view.numbers("latents", "latents").words("rule", "rule").numbers("k", "k").numbers("tokens", "tokens of training")
        view = view.cells(
            "converged", "converged", lambda row: Cell("yes" if row["converged"] else "no", str(row.get("unconverged") or ""))
        )
        shown.append(Shown("The dictionaries", view.view(), table="dictionaries"))
    if "latents_shown" in tables and "latent_examples" in tables:
        listed = with_examples(tables["latents_shown"], tables["latent_examples"], ["dictionary", "component"])
        view = Table(listed)
        if listed["dictionary"].nunique() > 1:
            view = view.words("dictionary", "dictionary")
        view = in_words(view.words("component", "latent").cells("share", "share of Σ f²", _of_all))
        words = "Those that carry most of what their dictionary writes. What a latent promotes is read off its decoder, which the layers behind may change."
        shown.append(Shown("Latents and the texts in which they are active most", view.view(), words, table="latents_shown"))
    return shown


def _brief(measured: pd.DataFrame) -> View:
    """Return a row per dictionary and control with the numbers that are asked for first."""
    keys, ends = ["dictionary", "control"], ("value", "low", "high")
    every = measured.drop_duplicates([*keys, "measure"])
    rows = every[keys].drop_duplicates().merge(every.groupby(keys, as_index=False)["n"].max())
    for measure in ("l0", *_SHARES, "dead"):
        own = every[every["measure"] == measure]
        rows = rows.merge(own[[*keys, *ends]].rename(columns={end: f"{measure} {end}" for end in ends}), how="left")
    # a count, not a measurement
    rows["dead value"] = pd.Series([None if pd.isna(dead) else int(dead) for dead in rows["dead value"]], dtype=object)
    view = Table(rows).words("dictionary", "dictionary", strong=lambda row: not row["control"]).cells("control", "which is", _which)
    view = view.numbers("l0 value", "L0").numbers("dead value", "silent latents")
    for measure, heading in zip(_SHARES, ("variance kept", "loss recovered, mean"), strict=True):
        view = view.numbers(f"{measure} value", heading, ends=(f"{measure} low", f"{measure} high"))
    return view.numbers("n", "texts").view()


def _which(row: Row) -> Cell:
    return Cell(str(row["control"]) or "itself")


def _of_all(row: Row) -> Cell:
    return Cell(percent(row["share"]), sort=float(row["share"]))


def _findings(tables: Tables) -> list[Finding]:
    measured, found = tables.get("dictionary_measures"), list[Finding]()
    if measured is None:
        return found
    for name, own in measured.groupby("dictionary", sort=False):
        found += [finding for finding in (_kept(str(name), own, measure) for measure in _SHARES) if finding is not None]
    return found


def _kept(name: str, own: pd.DataFrame, measure: str) -> Finding | None:
    """Say which share of the variance, or of the loss that ablation costs, a dictionary keeps, and what its controls keep."""
    rows = own[own["measure"] == measure]
    itself = rows[rows["control"] == ""]
    if itself.empty:
        return None
    row, l0 = itself.iloc[0], own[(own["measure"] == "l0") & (own["control"] == "")].iloc[0]
    what = "of the variance" if measure == "explained variance" else "of the loss that the mean in its place costs"
    said = f"of dictionary {name}, how much {what} at {row['place']} it keeps"
    if row["withheld"]:
        return Finding(said, n=row["n"], rows=(row,), withheld=str(row["withheld"]), table="dictionary_measures")
    others = [each for _, each in rows[rows["control"] != ""].iterrows() if not each["withheld"]]
    # a linear map has no latents
    beside = ", ".join(f"{each['control']} {_share(each)}" for each in others if each["control"] != _LINEAR)
    linear = "".join(f"; the {each['control']} {_share(each)}" for each in others if each["control"] == _LINEAR)
    return Finding(
        f"Dictionary {name} keeps {_share(row)} {what} at {row['place']} with {written(l0['value'])} active latents of a token"
        + (f"; with as many, {beside}" if beside else "")
        + linear,
        n=row["n"],
        rows=(row, l0, *others),
        effect=float(row["value"]),
        card=Card(percent(row["value"]), f"{what} kept", name) if measure == "explained variance" else None,
        table="dictionary_measures",
    )


def _share(row: Any) -> str:
    return f"{percent(row['value'])} {interval(100 * row['low'], 100 * row['high'])}".strip()


def _caveats(tables: Tables) -> list[Caveat]:
    made = tables.get("dictionaries")
    found = [*few_texts(tables, "dictionary_measures")]
    if made is not None and {"converged", "unconverged"} <= set(made) and not made["converged"].all():
        left = made[~made["converged"].astype(bool)]
        found.append(
            Caveat(
                f"The training of {written(len(left))} of {written(len(made))} dictionaries had not converged "
                f"(the first: {left['unconverged'].iloc[0]}): longer ones may "
                "keep more.",
                weakens="dictionary_measures",
            )
        )
    if "latents_shown" in tables:
        found.append(
            Caveat(
                "The examples are those of the largest values: a latent may mean something else where it is less active.",
                weakens="latents_shown",
            )
        )
    return found


SECTION = Section(
    id="dictionaries",
    heading="Dictionaries of features",
    intro=(
        "A dictionary writes what the model holds at a place as a few of many directions, its latents. Explained variance is 1 − Σ‖x − x̂‖² / Σ‖x − mean‖²; "
        "loss recovered is (L_ablated − L_spliced) / (L_ablated − L), where the model runs with the reconstruction in the place of what it holds there, and "
        "with zero or the mean. Beside it stand dictionaries that were not trained, with as many active latents: random directions, and the principal "
        "components of the very texts that are measured; beside a transcoder the best linear map of these texts."
    ),
    tables=TABLES,
    figures=_figures,
    views=_views,
    findings=_findings,
    caveats=_caveats,
)
