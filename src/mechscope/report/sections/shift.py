"""SHIFT: what a biased classifier tells once the latents that it should not use are ablated, beside erasure and random latents."""

from __future__ import annotations

import pandas as pd

from mechscope.report.marks.figure import Figure
from mechscope.report.marks.intervals import interval_plot
from mechscope.report.marks.tables import Cell, Shown, Table
from mechscope.report.section import Section, Tables, number, table
from mechscope.report.statements import Card, Caveat, Derived, Finding
from mechscope.report.theme import interval, percent
from mechscope.report.theme import number as written

_RETRAINED, _ORIGINAL = "latents ablated, retrained", "original"

TABLES = {
    "shift_methods": table(
        "One row per method.",
        method="what was done before the classifier was tested; the classifiers learn from biased texts unless it says otherwise",
        draws="sets of random latents; 1 for the others",
        n="texts that were tested",
        accuracy=number("accuracy on the intended label, mean over the four groups of labels", "share"),
        worst=number(
            "accuracy in the worst of the four groups; Wilson's interval of that group; the mean over draws of both", "share", "low", "high"
        ),
        gain=number("accuracy over that of the original, in the group that the original tells worst", "share", "low", "high"),
        probe="the residual stream that the classifier reads",
    ),
    "shift_groups": table(
        "One row per method, draw and group of labels.",
        method="what was done",
        draw="which set of random latents, −1 for the others",
        intended="the intended label",
        unintended="the unintended label",
        n="texts",
        accuracy=number("accuracy on the intended label", "share", "low", "high", bare=True),
    ),
    "shift_latents": table(
        "One row per latent that was judged: those with the largest effects on the biased classifier.",
        component="the latent: resid6.f1024",
        effect=number("what setting it to zero does to the classifier's margin on its training texts, to first order; mean", "margin"),
        intended=number("its share of all effects on a probe of the intended label, of balanced texts", "share"),
        unintended=number("the same of the unintended label", "share"),
        judged="whether it counts as unintended, and was ablated",
        by="who judged: labels, or hand",
    ),
}


def _figures(tables: Tables) -> list[Figure]:
    methods = tables.get("shift_methods")
    if methods is None:
        return []
    rows = methods.rename(columns={"method": "row", "worst_low": "low", "worst_high": "high"}).assign(value=methods["worst"])
    return [
        interval_plot(
            rows[["row", "value", "low", "high", "n"]],
            name="shift",
            title="Accuracy in the worst group",
            caption="Of the four combinations of intended and unintended label the one that is told worst, with Wilson's 95\u202f% interval of its texts.",
            axis="accuracy in the worst group",
        )
    ]


def _views(tables: Tables) -> list[Shown]:
    shown = []
    if "shift_methods" in tables:
        view = Table(tables["shift_methods"]).words("method", "method").numbers("worst", "worst group", ends=("worst_low", "worst_high"))
        view = view.numbers("accuracy", "mean of groups").numbers(
            "gain", "gain where the original is worst", ends=("gain_low", "gain_high"), sign=True
        )
        shown.append(Shown("What the classifier tells", view.numbers("n", "texts").view(), table="shift_methods", terminal=True))
    if "shift_latents" in tables:
        view = Table(tables["shift_latents"]).words("component", "latent", strong=lambda row: bool(row["judged"]))
        view = view.numbers("effect", "effect on the classifier", sign=True)
        view = view.cells(
            "unintended", "of the unintended label", lambda row: Cell(percent(row["unintended"], digits=1), sort=float(row["unintended"]))
        )
        view = view.cells(
            "intended", "of the intended label", lambda row: Cell(percent(row["intended"], digits=1), sort=float(row["intended"]))
        )
        view = view.cells("judged", "judged", lambda row: Cell("unintended, ablated" if row["judged"] else "kept"))
        shown.append(Shown("Latents that were judged", view.view(), table="shift_latents"))
    return shown


def _findings(tables: Tables) -> list[Finding]:
    methods = tables.get("shift_methods")
    if methods is None:
        return []
    rows = {str(row["method"]): row for _, row in methods.iterrows()}
    own, before = rows[_RETRAINED], rows[_ORIGINAL]
    others = [row for method, row in rows.items() if method not in (_RETRAINED, _ORIGINAL, "latents ablated")]
    latents = tables.get("shift_latents")
    derived = () if latents is None else (Derived("shift_latents", (("judged", "==", True),)),)
    which = f"the {derived[0].written(tables)} latents judged unintended" if derived else "the latents judged unintended"

    def told(row: pd.Series) -> str:
        return f"{percent(row['worst'])} {interval(100 * row['worst_low'], 100 * row['worst_high'])}".strip()

    beside = ", ".join(f"{row['method']} {told(row)}" for row in others)
    text = (
        f"With {which} ablated, the classifier trained on biased texts tells {told(own)} of the worst group right, as it was "
        f"{told(before)}; beside it {beside}"
    )
    return [
        Finding(
            text,
            n=own["n"],
            rows=(own, before, *others),
            derived=derived,
            effect=abs(float(own["worst"]) - float(before["worst"])),
            card=Card(percent(own["worst"]), "of the worst group told right", f"{percent(before['worst'])} before"),
            table="shift_methods",
        )
    ]


def _caveats(tables: Tables) -> list[Caveat]:
    found = [
        Caveat(
            "Which group is worst is seen on the texts that are tested, so the accuracy of the worst group lies a little lower than that of a fixed one.",
            "shift_methods",
        )
    ]
    latents, groups = tables.get("shift_latents"), tables.get("shift_groups")
    if latents is not None:
        if not latents["judged"].astype(bool).any():
            found.append(Caveat("No latent was judged unintended: nothing was ablated.", "shift_methods"))
        elif set(latents["by"]) == {"labels"}:
            found.append(
                Caveat(
                    "Latents were judged by labels of balanced texts, which a person who only has biased texts does not have.",
                    "shift_methods",
                )
            )
    if groups is not None and len(groups) and int(groups["n"].min()) < _FEW:
        found.append(Caveat(f"The smallest group has {written(int(groups['n'].min()))} texts.", "shift_methods"))
    return found


# texts of a group below which its accuracy is rough
_FEW = 30

SECTION = Section(
    id="shift",
    heading="SHIFT",
    intro=(
        "A linear classifier on the mean activation of a text learns where an unintended label always agrees with the intended one, and is tested where all "
        "four combinations (groups) are equally frequent. Latents are ranked by what setting them to zero does to it; those judged unintended are ablated in "
        "the model, and it learns again from the same biased texts (Marks et al. 2024). Beside it: random latents, as many at each place, not the judged ones "
        "where enough others are active; the unintended label "
        "erased from the activations, by the difference of means and by LEACE (Belrose et al. 2023), which need labels of balanced texts; and a classifier "
        "of balanced texts."
    ),
    tables=TABLES,
    figures=_figures,
    views=_views,
    findings=_findings,
    caveats=_caveats,
)
