"""Logit spectrum: how much of what stands in the model lies in directions that the unembedding amplifies, and in those that it hardly sees."""

from __future__ import annotations

import numpy as np
import pandas as pd

from mechscope.report.marks.figure import Figure
from mechscope.report.marks.heatmaps import grid_heatmap, head_heatmap
from mechscope.report.marks.place_curves import place_curves
from mechscope.report.marks.tables import Shown, Table
from mechscope.report.section import Section, Tables, number, table
from mechscope.report.shared import estimated, few_texts
from mechscope.report.statements import Card, Caveat, Derived, Finding
from mechscope.report.theme import label, percent

_SITES = {
    "residual": "the residual stream",
    "attention_output": "attention output",
    "mixer_output": "mixer output",
    "mlp_output": "MLP output",
    "head_output": "heads' output",
}

SPECTRUM = table(
    "One row per place and band.",
    site="residual, attention_output, mixer_output (of layers that do not attend), mlp_output or head_output",
    layer="its layer, −1 for the embedding",
    head="its head, −1 where there is none",
    component="its name: embed, resid3 (after block 3), a3, a3.h5, m3",
    band="the band of directions, 0 the one that the unembedding amplifies most",
    singular_high=number("its largest singular value of the unembedding", "logits per activation"),
    singular_low=number("its smallest", "logits per activation"),
    share_of_directions=number("its share of all directions: what a vector in a random direction has in it", "share"),
    n="texts",
    share_of_norm=number("its share of the squared norm; mean over tokens, then over texts", "share", "se", "low", "high"),
)


def _figures(tables: Tables) -> list[Figure]:
    drawn = []
    for site, own in tables["spectrum"].groupby("site", sort=False):
        if site == "head_output":
            drawn.append(_heads(own))
        else:
            drawn += [_ends(str(site), own), _bands(str(site), own)]
    return drawn


def _ends(site: str, own: pd.DataFrame) -> Figure:
    """Draw the brightest and the darkest band by layer, beside what a random direction has in a band."""
    parts = []
    for words, band in (("brightest band", own["band"].min()), ("darkest band", own["band"].max())):
        rows = own[own["band"] == band]
        ends = {"value": rows["share_of_norm"], "low": rows["share_of_norm_low"], "high": rows["share_of_norm_high"]}
        parts.append(rows[["layer", "n"]].assign(series=words, dash="measured", **ends))
    chance = own[own["band"] == own["band"].max()]
    parts.append(
        chance[["layer", "n"]].assign(
            series="random direction", dash="chance", value=chance["share_of_directions"], low=np.nan, high=np.nan
        )
    )
    points = pd.concat(parts, ignore_index=True)
    points = points.assign(place=["embed" if layer < 0 else str(layer) for layer in points["layer"]]).drop(columns="layer")
    return place_curves(
        points,
        name=f"spectrum-{site.replace('_', '-')}",
        title=f"Bright and dark bands of {_SITES.get(site, site)}",
        axis="share of the squared norm",
        caption="Band: 95\u202f% over texts. A band of directions that the unembedding hardly sees is dark.",
        words={"series": "band", "dash": ""},
        share=True,
    )


def _bands(site: str, own: pd.DataFrame) -> Figure:
    """Draw every band of every layer against a random direction."""
    ratio = np.log2((own["share_of_norm"] / own["share_of_directions"]).clip(lower=2.0**-10))
    cells = own.assign(ratio=ratio, column=[str(band) for band in own["band"]])
    # layers upwards, as the stream flows
    cells = cells.sort_values(["layer", "band"], ascending=[False, True], kind="stable")
    return grid_heatmap(
        cells,
        "ratio",
        across=("column", "band, brightest first"),
        down=("component", ""),
        name=f"spectrum-bands-{site.replace('_', '-')}",
        title=f"All bands of {_SITES.get(site, site)}",
        legend="log₂ of share / share of a random direction",
        caption="0: as much as a vector in a random direction has there; 1: twice as much.",
        tooltip={
            "share_of_norm": "share",
            "share_of_norm_low": "95\u202f% from",
            "share_of_norm_high": "to",
            "share_of_directions": "random",
            "n": "texts",
        },
    )


def _heads(own: pd.DataFrame) -> Figure:
    dark = own[own["band"] == own["band"].max()]
    return head_heatmap(
        dark,
        "share_of_norm",
        name="spectrum-heads",
        title="What heads write into the darkest band",
        legend="share of the squared norm, √ scale",
        caption="Of what each head writes, the share that the unembedding sees least.",
        tooltip={"share_of_norm": "share", "share_of_norm_low": "95\u202f% from", "share_of_norm_high": "to", "n": "texts"},
    )


def _views(tables: Tables) -> list[Shown]:
    spectrum = tables["spectrum"]
    ends = spectrum[spectrum["band"].isin([spectrum["band"].min(), spectrum["band"].max()])]
    ratio = (ends["share_of_norm"] / ends["share_of_directions"]).rename("ratio")
    view = Table(ends.assign(ratio=ratio).sort_values("ratio", ascending=False, kind="stable")).words("component", "place")
    view = view.numbers("band", "band").numbers("share_of_norm", "share", ends=("share_of_norm_low", "share_of_norm_high"))
    view = view.numbers("share_of_directions", "random direction").numbers("ratio", "times as much").numbers("n", "texts")
    return [Shown("Brightest and darkest band", view.view(), terminal=True)]


def _darkest(spectrum: pd.DataFrame) -> pd.Series:
    dark = spectrum[spectrum["band"] == spectrum["band"].max()]
    return dark.nlargest(1, "share_of_norm").iloc[0]


def _findings(tables: Tables) -> list[Finding]:
    found = list[Finding]()
    for site, own in tables["spectrum"].groupby("site", sort=False):
        top, last = _darkest(own), Derived("spectrum", (("site", "==", site),), "band", "distinct")
        low, chance = float(top["share_of_norm_low"]), float(top["share_of_directions"])
        against = "above" if low > chance else "not above" if low <= chance else "beside"
        share = percent(top["share_of_norm"])
        found.append(
            Finding(
                f"The darkest of {last.written(tables)} bands of {_SITES.get(str(site), str(site))} holds most at {label(top['component'])}: "
                f"{estimated(top, 'share_of_norm', share=True)} of the squared norm, {against} the {percent(chance)} of a random direction",
                n=top["n"],
                rows=(top,),
                derived=(last,),
                effect=float(top["share_of_norm"]),
                card=None if found else Card(share, "in the band that the unembedding sees least", f"at {label(top['component'])}"),
                table="spectrum",
            )
        )
    return found


def _caveats(tables: Tables) -> list[Caveat]:
    return [
        Caveat(
            "What lies in dark directions moves no logit directly; later blocks may read it, attention sinks above all. mechscope suppress tells if it matters."
        ),
        Caveat(
            "Where a band holds most was chosen on these texts; a few tokens of very large norm, such as the first, can decide a place."
        ),
        *few_texts(tables, "spectrum"),
    ]


SECTION = Section(
    id="spectrum",
    heading="Logit spectrum",
    intro=(
        "The directions of the residual stream are ordered by how strongly the unembedding (with the final norm's gain) answers to them, and cut into bands of "
        "equal width, the brightest first (Cancedda 2024, “Spectral Filters, Dark Signals, and Attention Sinks”). What stands at a place is split over the "
        "bands. A vector in a random direction, which has in a band that band's share of all directions, is the control."
    ),
    tables={"spectrum": SPECTRUM},
    figures=_figures,
    views=_views,
    findings=_findings,
    caveats=_caveats,
)
