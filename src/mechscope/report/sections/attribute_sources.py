"""Attribution by source: from which tokens heads bring what they add to an answer."""

from __future__ import annotations

import pandas as pd

from mechscope.report.marks.figure import Figure
from mechscope.report.marks.heatmaps import grid_heatmap
from mechscope.report.marks.intervals import interval_plot
from mechscope.report.marks.tables import Shown, Table, strongest, token
from mechscope.report.section import Section, Tables, number, table
from mechscope.report.shared import estimated, few_texts
from mechscope.report.statements import Card, Caveat, Derived, Finding
from mechscope.report.theme import label, percent
from mechscope.report.theme import number as written

# heads, source tokens and texts that are drawn, and rows of a table
_HEADS, _SOURCES, _TEXTS, _TOP = 12, 60, 3, 40

_HEAD = {"component": "the head, a3.h5", "layer": "its layer", "head": "its number"}
TABLES = {
    "attribute_sources": table(
        "One row per text, head, position that is read and token it attends to.",
        text="id of the text",
        **_HEAD,
        query="position that is read, from 0",
        source="position attended to, up to the query",
        token="what stands there",
        attention=number("attention from the query to it", "share"),
        effect=number("what the head brings from there; a text's rows of a head sum to the head's effect", "logits"),
    ),
    "attribute_sources_summary": table(
        "One row per head: means over texts.",
        **_HEAD,
        n="texts",
        effect=number("its whole direct effect", "logits", "low", "high"),
        attended_effect=number("the part of it from the token that each query attends to most", "logits", "low", "high"),
        attended=number("attention to that token", "share", "low", "high"),
        metric="logit-diff or target-logit",
    ),
}


def _figures(tables: Tables) -> list[Figure]:
    drawn = []
    if (summary := tables.get("attribute_sources_summary")) is not None:
        top = strongest(summary, "effect", _HEADS).reset_index(drop=True)
        rows = pd.concat(
            [
                pd.DataFrame(
                    {
                        "row": top["component"] + words,
                        "value": top[column],
                        "low": top[f"{column}_low"],
                        "high": top[f"{column}_high"],
                        "n": top["n"],
                    }
                )
                for column, words in (("effect", ", all tokens"), ("attended_effect", ", most attended"))
            ]
        ).sort_index(kind="stable")
        drawn.append(
            interval_plot(
                rows,
                name="attribute-sources",
                title="What heads bring, and what of it from the token they attend to most",
                caption="Mean over texts; rule: 95\u202f%.",
                axis="direct effect, logits",
            )
        )
    return drawn + _grids(tables.get("attribute_sources"))


def _grids(effects: pd.DataFrame | None) -> list[Figure]:
    """Draw the heads by the tokens of the first texts, effects of several queries added up."""
    drawn: list[Figure] = []
    for number_of, (text, own) in enumerate([] if effects is None else effects.groupby("text", sort=False)):
        if number_of == _TEXTS:
            break
        summed = own.groupby(["component", "source", "token"], sort=False, as_index=False).agg(
            effect=("effect", "sum"), attention=("attention", "mean")
        )
        heads = summed.assign(size=summed["effect"].abs()).groupby("component", sort=False)["size"].sum().nlargest(_HEADS).index
        sources = sorted(summed["source"].unique())[-_SOURCES:]
        cells = summed[summed["component"].isin(heads) & summed["source"].isin(sources)].sort_values("source", kind="stable")
        cells = cells.assign(at=[f"{at} {token(what)}" for at, what in zip(cells["source"], cells["token"], strict=True)])
        drawn.append(
            grid_heatmap(
                cells,
                "effect",
                across=("at", "token attended to"),
                down=("component", "head"),
                name=f"attribute-sources-{number_of + 1}",
                title=f"From where heads bring the answer of “{label(text)}”",
                legend="direct effect, logits",
                caption="One text; effects on all positions that are read, added up; attention is their mean.",
                tooltip={"effect": "logits", "attention": "attention"},
            )
        )
    return drawn


def _views(tables: Tables) -> list[Shown]:
    shown = []
    if (summary := tables.get("attribute_sources_summary")) is not None:
        view = Table(strongest(summary, "effect", _TOP)).words("component", "head")
        view = view.numbers("effect", "effect, logits", ends=("effect_low", "effect_high"), sign=True)
        view = view.numbers(
            "attended_effect", "from the token most attended", ends=("attended_effect_low", "attended_effect_high"), sign=True
        )
        view = view.numbers("attended", "attention to it", ends=("attended_low", "attended_high")).numbers("n", "texts")
        shown.append(Shown("Heads and what they bring", view.view(), terminal=True))
    if (effects := tables.get("attribute_sources")) is not None:
        view = Table(strongest(effects, "effect", _TOP)).words("text", "text").words("component", "head").numbers("query", "query")
        view = view.numbers("source", "source").tokens("token", "token").numbers("attention", "attention")
        shown.append(Shown("The largest single contributions", view.numbers("effect", "effect, logits", sign=True).view(), folded=True))
    return shown


def _findings(tables: Tables) -> list[Finding]:
    summary = tables.get("attribute_sources_summary")
    if summary is None:
        return []
    top, every = strongest(summary, "effect", 1).iloc[0], Derived("attribute_sources_summary")
    of = f", the largest of {every.written(tables)} heads" if every.of(tables) > 1 else ""
    note = f"{written(top['attended_effect'], sign=True)} of {written(top['effect'], sign=True)} logits"
    return [
        Finding(
            f"{label(top['component'])} adds {estimated(top, 'effect', sign=True)} logits to the metric ({label(top['metric'])}{of}), of which "
            f"{estimated(top, 'attended_effect', sign=True)} from the token that it attends to most, with {percent(top['attended'])} of its attention",
            n=top["n"],
            rows=(top,),
            derived=(every,),
            effect=abs(float(top["effect"])),
            card=Card(label(top["component"]), "brings most; from the token it attends to most", note),
            table="attribute_sources_summary",
        )
    ]


def _caveats(tables: Tables) -> list[Caveat]:
    return [
        Caveat(
            "What stands at a token has passed through earlier layers and may come from others: a source is where a head reads, not where a fact was written."
        ),
        Caveat("Direct effects only, with the final norm's scale held fixed; the head with the largest was chosen on these texts."),
        *few_texts(tables, "attribute_sources_summary"),
    ]


SECTION = Section(
    id="attribute-sources",
    heading="Attribution by source",
    intro=(
        "What a head writes is a sum over the tokens it attends to, so its direct effect on the metric splits by source token without rest (Elhage et al. "
        "2021, “A Mathematical Framework for Transformer Circuits”). Attention alone says where a head looks, not what it brings; the token attended to "
        "most, chosen without its effect, is what the whole effect is compared with."
    ),
    tables=TABLES,
    figures=_figures,
    views=_views,
    findings=_findings,
    caveats=_caveats,
)
