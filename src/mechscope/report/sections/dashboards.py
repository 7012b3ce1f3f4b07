"""Dashboards: what a person looks at of each latent; the page of a dictionary stands beside the report."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from mechscope.report.dashboards import DashboardPage, file_name
from mechscope.report.marks.figure import Figure
from mechscope.report.marks.series import curves
from mechscope.report.marks.tables import Cell, Row, Shown, Table
from mechscope.report.section import Panel, Section, Sheet, Tables, number, optional, table
from mechscope.report.shared import few_texts
from mechscope.report.statements import Caveat, Derived, Finding
from mechscope.report.theme import percent

# latents in the table of the report; the pages have all
_LISTED = 30

TABLES = {
    "dashboard_latents": table(
        "One row per latent that is shown: those that carry most of what their dictionary writes, the strongest first.",
        dictionary="its dictionary",
        component="the latent: resid6.f1024",
        n="texts that were read",
        tokens=number("tokens that were read", "tokens"),
        active=number("tokens in which it is active", "tokens"),
        density=number("the same as a share of all", "share"),
        share=number("its share of Σ f² over all latents", "share"),
        largest=number("its largest activation"),
        bar="the first bar of its histogram: from 2 to the power of bar / 4 − 16 on",
        counts="tokens by the activation, a list: four bars for each doubling",
        promotes="tokens whose logits it raises most, by its decoder (where it is longest) through the final norm and the unembedding",
        suppresses="tokens whose logits it lowers most",
        sampled=number("tokens of the random sample in which it is active", "tokens"),
        sample=number("tokens of that sample, on which it is correlated with others", "tokens"),
        effect=optional("its effect, from the run that was named beside", "of that run's metric"),
        explanation=optional("what it stands for, from the run that was named beside"),
        **{"class": optional("its class, from the run that was named beside: what fine-tuning did to it")},
    ),
    "dashboard_examples": table(
        "One row per latent and example.",
        dictionary="its dictionary",
        component="the latent",
        decile="0 for the largest activations, each of another text; of random ones the tenth in which it lies, 1 the strongest",
        place="its place within these, from 1",
        value=number("its activation"),
        text="the text's id",
        position="the token's place in the text, from 0",
        start="the place of the first token shown",
        ids="the tokens shown, a list of numbers (dashboard_tokens)",
        values="the latent's activation in each of them, a list, to three digits; 0 where it is silent",
    ),
    "dashboard_tokens": table("One row per token that is shown.", token="its number", text="as its tokenizer writes it"),
    "dashboard_correlations": table(
        "One row per latent and what goes with it, over a random sample of tokens; none of a latent that is active in fewer than ten of these.",
        dictionary="its dictionary",
        component="the latent",
        kind="latent (by its activation), or head (by the norm of what it writes, of the blocks up to where the latent is read)",
        other="the latent or head",
        correlation=number("Pearson's correlation over tokens, those in which the latent is silent too"),
    ),
    "dashboard_chance": table(
        "One row per latent and kind of what goes with it: what as many candidates give by chance.",
        dictionary="its dictionary",
        component="the latent",
        kind="latent or head",
        largest=number("the largest correlation, of heads whatever its sign"),
        shuffled=number("the same with the tokens shuffled between the latent and the others"),
    ),
}


def _figures(tables: Tables) -> list[Figure]:
    latents = tables.get("dashboard_latents")
    if latents is None:
        return []
    parts = []
    for name, own in latents.groupby("dictionary", sort=False):
        shares = np.sort(own["share"].to_numpy(dtype=float))[::-1].cumsum()
        # some hundred points are all that can be told apart
        at = np.unique(np.geomspace(1, len(shares), 150).astype(int))
        parts.append(pd.DataFrame({"series": name, "chance": False, "latents": at, "value": shares[at - 1], "low": np.nan, "high": np.nan}))
    return curves(
        pd.concat(parts, ignore_index=True),
        name="dashboard-shares",
        title="How much the strongest latents carry",
        caption=f"The share of Σ f² that so many latents carry together, the strongest first. n = {int(latents['n'].max()):,} texts.",
        x=("latents", "latents, the strongest first"),
        axis="share of Σ f²",
        unit=False,
    )


def _names(tables: Tables) -> list[str]:
    latents = tables.get("dashboard_latents")
    return [] if latents is None else list(dict.fromkeys(latents["dictionary"]))


def _pages(tables: Tables) -> list[Sheet]:
    return [DashboardPage(name, tables) for name in _names(tables)]


def _panels(tables: Tables) -> list[Panel]:
    latents = tables.get("dashboard_latents")
    if latents is None:
        return []
    counts = latents.groupby("dictionary", sort=False).size()
    return [
        Panel("dashboards", {"name": "dashboard-pages", "pages": [(name, file_name(name), int(counts[name])) for name in counts.index]})
    ]


def _views(tables: Tables) -> list[Shown]:
    latents, related = tables.get("dashboard_latents"), tables.get("dashboard_correlations")
    if latents is None:
        return []
    listed = latents.groupby("dictionary", sort=False).head(_LISTED)
    if related is not None:
        best = related.groupby(["dictionary", "component", "kind"], sort=False).first()
        for kind in ("latent", "head"):
            listed = listed.assign(**{f"with {kind}": [_best(best, (row.dictionary, row.component, kind)) for row in listed.itertuples()]})
    view = Table(listed)
    if listed["dictionary"].nunique() > 1:
        view = view.words("dictionary", "dictionary")
    view = (
        view.words("component", "latent")
        .cells("share", "share of Σ f²", _of_all)
        .numbers("density", "density")
        .numbers("largest", "largest")
    )
    view = view.texts("explanation", "stands for").mapped("class", "class").numbers("effect", "effect", sign=True)
    view = view.token_lists("promotes", "promotes", most=6).words("with latent", "goes with latent").words("with head", "goes with head")
    words = "Those that carry most of what their dictionary writes; the page of a dictionary has them all, with examples."
    return [Shown("The strongest latents", view.view(), words, table="dashboard_latents", terminal=True)]


def _best(best: pd.DataFrame, key: tuple[Any, ...]) -> str:
    return f"{best.loc[key, 'other']} ({best.loc[key, 'correlation']:+.2f})".replace("-", "−") if key in best.index else "–"


def _of_all(row: Row) -> Cell:
    return Cell(percent(row["share"], digits=1), sort=float(row["share"]))


def _findings(tables: Tables) -> list[Finding]:
    found = []
    latents, chance = tables.get("dashboard_latents"), tables.get("dashboard_chance")
    for name in _names(tables):
        assert latents is not None
        own = latents[latents["dictionary"] == name]
        first, shown = own.iloc[0], Derived("dashboard_latents", (("dictionary", "==", name),))
        found.append(
            Finding(
                f"Of dictionary {name} {shown.written(tables)} latents are shown; the strongest, {first['component']}, carries "
                f"{percent(first['share'], digits=1)} of Σ f² and is active in {percent(first['density'], digits=1)} of the tokens",
                n=first["n"],
                rows=(first,),
                derived=(shown,),
                table="dashboard_latents",
            )
        )
    if chance is None:
        return found
    for name in dict.fromkeys(chance["dictionary"]):
        where = (("dictionary", "==", name), ("kind", "==", "head"))
        largest, shuffled = (Derived("dashboard_chance", where, column, "median") for column in ("largest", "shuffled"))
        count = len(largest.rows(tables))
        if not count:
            continue
        found.append(
            Finding(
                f"The largest correlation of a latent of {name} with the norm of what a head writes is {largest.written(tables)} in the median over latents; "
                f"with the tokens shuffled it is {shuffled.written(tables)}",
                n=count,
                unit="latents",
                derived=(largest, shuffled),
                effect=largest.of(tables),
                table="dashboard_chance",
            )
        )
    return found


def _caveats(tables: Tables) -> list[Caveat]:
    if "dashboard_latents" not in tables:
        return []
    return [
        *few_texts(tables, "dashboard_latents"),
        Caveat("What goes with a latent need not cause it: correlations over tokens see what occurs together.", weakens="dashboard_chance"),
    ]


SECTION = Section(
    id="dashboards",
    heading="Dashboards",
    intro=(
        "What a person looks at to say what a latent stands for: its largest activations and random ones of every tenth of its activations, each with the "
        "tokens around it; how often and how strongly it is active; which tokens its decoder promotes; and which latents and heads go with it. The page of a "
        "dictionary has an index of its latents, to be searched by token and sorted."
    ),
    tables=TABLES,
    figures=_figures,
    panels=_panels,
    views=_views,
    pages=_pages,
    findings=_findings,
    caveats=_caveats,
)
