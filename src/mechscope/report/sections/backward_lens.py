"""Backward lens: what a step of training on a text would write into weights, token by token."""

from __future__ import annotations

import pandas as pd

from mechscope.report.marks.curves import layer_curves
from mechscope.report.marks.figure import Figure
from mechscope.report.marks.heatmaps import grid_heatmap
from mechscope.report.marks.tables import Shown, Table, strongest, token, tokens
from mechscope.report.section import Section, Tables, number, table
from mechscope.report.shared import estimated, few_texts
from mechscope.report.statements import Card, Caveat, Derived, Finding
from mechscope.report.theme import label, name_of, percent

_TOP, _COLUMNS = 40, 60
# as the lens: a layer says something where it does in so many positions
_HALF = 0.5

_MATRIX = "its kind: query_key_value, attention_output, mlp_up or mlp_down"
_SIDE = "what is read: gradient (−δ, what a step writes there) or input (what the matrix read)"
TABLES = {
    "backward_lens": table(
        "One row per text, matrix and token that the loss reaches.",
        text="id of the text",
        layer="the matrix's layer",
        matrix=_MATRIX,
        module="its module",
        position="the token's position, from 0",
        token="what stands there",
        side=_SIDE,
        norm=number("length of that vector", "of the gradient, or of activations"),
        update_norm=number("size of the token's share of the weight's gradient, ‖x‖·‖δ‖", "of the gradient"),
        top_ids="tokens that the vector raises most, as a step would: ids",
        top_tokens="the same as text",
        bottom_ids="tokens that it lowers most: ids",
        bottom_tokens="the same as text",
        target="the token that the loss wants next there; empty where it wants none",
        promoted="whether that token is among the top tokens",
    ),
    "backward_lens_summary": table(
        "One row per layer and kind of matrix: means over a text's tokens first, over texts then.",
        layer="the layer",
        matrix=_MATRIX,
        side=_SIDE,
        n="texts",
        update_norm=number("size of a token's share of the weight's gradient", "of the gradient", "low", "high"),
        promoted=number("positions whose wanted token is among the top tokens", "share", "low", "high"),
        chance=number("what random top tokens would give: tokens listed / vocabulary", "share"),
    ),
}


def _figures(tables: Tables) -> list[Figure]:
    drawn = []
    if (summary := tables.get("backward_lens_summary")) is not None:
        written_to = summary[summary["side"] == "gradient"]
        if len(written_to):
            wide, series = _wide(written_to, "promoted")
            wide["chance"] = float(summary["chance"].iloc[0])
            title, axis = "Tokens that the loss wants, among those a step writes", "share of positions"
            caption = "Where the loss wants a token next: how often it is among the top tokens of −δ. Band: 95\u202f% over texts."
            drawn.append(
                layer_curves(
                    wide,
                    {**series, "chance": "chance"},
                    name="backward-promoted",
                    title=title,
                    axis=axis,
                    caption=caption,
                    share=True,
                    counted_in="texts",
                )
            )
        wide, series = _wide(summary, "update_norm")
        title, caption = (
            "Where the gradient is largest",
            "Mean size ‖x‖·‖δ‖ of a token's share of a weight's gradient. Band: 95\u202f% over texts.",
        )
        drawn.append(
            layer_curves(wide, series, name="backward-size", title=title, axis="size of the gradient", caption=caption, counted_in="texts")
        )
    return drawn + _grid(tables.get("backward_lens"))


def _wide(summary: pd.DataFrame, column: str) -> tuple[pd.DataFrame, dict[str, str]]:
    """Return a row per layer with a column per kind of matrix and its interval, and the names of these series."""
    layers = summary[["layer", "n"]].drop_duplicates("layer").sort_values("layer", kind="stable")
    for matrix, own in summary.groupby("matrix", sort=False):
        by_layer = own.set_index("layer")
        for end in ("", "_low", "_high"):
            layers[f"{matrix}{end}"] = layers["layer"].map(by_layer[f"{column}{end}"])
    return layers, {str(matrix): name_of(matrix) for matrix in summary["matrix"].unique()}


def _grid(rows: pd.DataFrame | None) -> list[Figure]:
    """Draw, of the first text, what every token would write into every layer."""
    if rows is None or rows.empty:
        return []
    first = rows[(rows["text"] == rows["text"].iloc[0]) & (rows["matrix"] == rows["matrix"].iloc[0])]
    first = first.loc[first.groupby(["layer", "position"])["update_norm"].idxmax()]
    kept = sorted(first["position"].unique())[-_COLUMNS:]
    first = first[first["position"].isin(kept)].sort_values(["position", "layer"], ascending=[True, False], kind="stable")
    cells = first.assign(
        at=[f"{at} {token(text)}" for at, text in zip(first["position"], first["token"], strict=True)],
        row=[f"layer {layer}" for layer in first["layer"]],
        raised=[tokens(top, most=5) for top in first["top_tokens"]],
    )
    cells = cells.sort_values("layer", ascending=False, kind="stable").sort_values("position", kind="stable")
    return [
        grid_heatmap(
            cells,
            "update_norm",
            across=("at", "token"),
            down=("row", str(name_of(first["matrix"].iloc[0]))),
            name="backward-grid",
            title=f"What a step on “{label(first['text'].iloc[0])}” would write",
            legend="size of the token's share, √ scale",
            caption="One text; hover for the tokens that are raised most.",
            scale="magnitude",
            tooltip={"update_norm": "size", "raised": "raises", "target": "wanted next"},
        )
    ]


def _views(tables: Tables) -> list[Shown]:
    rows = tables.get("backward_lens")
    if rows is None:
        return []
    view = Table(strongest(rows, "update_norm", _TOP)).words("text", "text").numbers("layer", "layer").mapped("matrix", "matrix")
    view = view.numbers("position", "position").tokens("token", "token").tokens("target", "wanted next")
    view = view.token_lists("top_tokens", "raised", most=5).token_lists("bottom_tokens", "lowered", most=5).numbers("update_norm", "size")
    return [Shown("The largest shares of the gradient", view.view(), terminal=True)]


def _best(tables: Tables) -> pd.Series | None:
    summary = tables.get("backward_lens_summary")
    known = None if summary is None else summary[(summary["side"] == "gradient") & summary["promoted"].notna()]
    return None if known is None or known.empty else known.nlargest(1, "promoted").iloc[0]


def _findings(tables: Tables) -> list[Finding]:
    summary, row, found = tables.get("backward_lens_summary"), _best(tables), list[Finding]()
    if row is not None:
        here = (("matrix", "==", row["matrix"]),)
        every, half = Derived("backward_lens_summary", here), Derived("backward_lens_summary", (*here, ("promoted", ">=", _HALF)))
        place = f"{name_of(row['matrix'])} of layer {int(row['layer'])}"
        found.append(
            Finding(
                f"What a step would write into {name_of(row['matrix'])} raises the token that the loss wants, among the top tokens, most often in layer "
                f"{int(row['layer'])}: at {estimated(row, 'promoted', share=True)} of the positions where it wants one; in {half.written(tables)} of "
                f"{every.written(tables)} layers it does at half of them or more. A list of as many tokens drawn by chance has it at "
                f"{percent(row['chance'], digits=2)}",
                n=row["n"],
                rows=(row,),
                derived=(half, every),
                effect=float(row["promoted"]),
                card=Card(percent(row["promoted"]), "of wanted tokens are among those a step raises", place),
                table="backward_lens_summary",
            )
        )
    if summary is not None:
        top = summary.nlargest(1, "update_norm").iloc[0]
        found.append(
            Finding(
                f"The gradient is largest in {name_of(top['matrix'])} of layer {int(top['layer'])}: {estimated(top, 'update_norm')} per token",
                n=top["n"],
                rows=(top,),
                table="backward_lens_summary",
            )
        )
    return found


def _caveats(tables: Tables) -> list[Caveat]:
    return [
        Caveat(
            "A gradient says where a small step would go, not what training ends with; optimizers scale it, and early layers may mean other things by a vector."
        ),
        Caveat("The layer with the largest share was chosen on these texts."),
        *few_texts(tables, "backward_lens_summary"),
    ]


SECTION = Section(
    id="backward-lens",
    heading="Backward lens",
    intro=(
        "A weight's gradient over a text is a sum of one product per token, of what the matrix read and of the loss's gradient δ at what it gave. A step of "
        "training adds −δ where it next reads the like. The side that lives in the residual stream is read through the unembedding (Katz et al. 2024, "
        "“Backward Lens: Projecting Language Model Gradients into the Vocabulary Space”). Chance, the share of the vocabulary that a list of top tokens "
        "holds, is what the shares are compared with."
    ),
    tables=TABLES,
    figures=_figures,
    views=_views,
    findings=_findings,
    caveats=_caveats,
)
