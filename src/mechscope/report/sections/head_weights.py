"""What heads' weights say, without any text: heads that copy, tokens that heads pair, singular directions, composition.

Base, tuned and the change between them stand beside each other: the change of W_OV or W_QK is a matrix of its own, read in the same way.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from mechscope.report.marks.figure import Figure
from mechscope.report.marks.heatmaps import head_heatmap
from mechscope.report.marks.tables import Cell, Shown, Table, View, strongest, token, words
from mechscope.report.section import Column, Section, Tables, number, table
from mechscope.report.shared import by_model, each_model
from mechscope.report.statements import Card, Caveat, Derived, Finding
from mechscope.report.theme import label, name_of, percent
from mechscope.report.theme import number as written

TOP_HEADS = 30
"""Heads whose tokens are shown, those with the largest values first."""
TOP_ROWS = 60
"""Singular vectors and compositions shown per model."""

_PAIRS = 5
# a head copies from this score on
_COPIES = 0.5
_MATRICES = {"ov": "OV: attended → written", "qk": "QK: query → key"}
_NUMBERS = {
    "copying": "copying (−1 to 1)",
    "positive": "positive eigenvalues",
    "copied": "copied",
    "suppressed": "suppressed",
    "ov_norm": "norm of W_OV",
    "qk_norm": "norm of W_QK",
}
_RELATIVE = {"ov_relative": "change of W_OV, relative", "qk_relative": "change of W_QK, relative"}

_MODEL, _MODELS = "base, tuned or model", "base, tuned or model; change for W_tuned − W_base"
_HEAD = {"layer": "its layer", "head": "its head", "component": "the head, such as a3.h5"}
_MATRIX = "ov (what is attended to, onto what is written) or qk (query, onto key)"


def _moved_columns(matrix: str) -> dict[str, Column | str]:
    name = f"W_{matrix.upper()}"
    return {
        f"{matrix}_norm": number(f"Frobenius norm of {name} in the base model, the norm's gain folded in"),
        f"{matrix}_change": number(f"Frobenius norm of the change of {name}"),
        f"{matrix}_relative": number("that change over the norm in the base model", "share"),
        f"{matrix}_place": "rank by that, 1 for the head that moved most",
    }


TABLES = {
    "weight_heads": table(
        "One row per model and head. What is of W_QK is missing where queries and keys have norms of their own.",
        model=_MODEL,
        **_HEAD,
        ov_norm=number("Frobenius norm of W_OV, the norm's gain folded in"),
        qk_norm=number("Frobenius norm of W_QK, scaling included, at offset 0 between query and key"),
        copying=number("eigenvalue copying score Σλ / Σ|λ| of the full OV circuit, −1 to 1"),
        positive=number("part of Σ|λ| with a positive real part", "share"),
        copied=number("sampled tokens that are among the five whose logits attending to them raises most", "share"),
        suppressed=number("sampled tokens that are among the five whose logits attending to them lowers most", "share"),
    ),
    "weight_changes": table("One row per head; of a base and a tuned model.", **_HEAD, **_moved_columns("ov"), **_moved_columns("qk")),
    "weight_tokens": table(
        "One row per model, matrix, head, sign and place: the extreme entries of the vocabulary × vocabulary matrix.",
        model=_MODELS,
        matrix=_MATRIX,
        **_HEAD,
        sign="promoted or suppressed (ov), attended or avoided (qk)",
        place="1 for the most extreme",
        source="token that is attended to (ov), or the query (qk)",
        target="token whose logit changes (ov), or the key (qk)",
        value=number("the entry: logits at a final norm of scale one (ov), attention scores before the softmax (qk)"),
    ),
    "weight_singular": table(
        "One row per model, matrix, head, singular vector, side and sign.",
        model=_MODELS,
        matrix=_MATRIX,
        **_HEAD,
        index="which vector, 1 for the largest singular value",
        value=number("its singular value"),
        side="in (read) or out (written) of ov; query or key of qk",
        sign="positive or negative end: ends of equal sign belong together",
        tokens="tokens at that end, quoted, most extreme first",
    ),
    "composition": table(
        "One row per model, kind and pair of heads, the first of an earlier layer.",
        model=_MODEL,
        kind="how the later head reads: by its query (q), key (k) or value (v)",
        source="head that writes",
        target="head that reads",
        from_layer="layer of the head that writes",
        from_head="its head",
        to_layer="layer of the head that reads",
        to_head="its head",
        score=number("Frobenius norm of the product of the two circuits over the product of their norms, 0 to 1"),
        random=number("its mean under a random rotation of what is written"),
        sd=number("its standard deviation under such rotations"),
        z=number("(score − random) / sd", "standard deviations"),
    ),
}


def _figures(tables: Tables) -> list[Figure]:
    """Draw a map of the heads' copying scores per model, and maps of how far their circuits moved."""
    heads, changes, drawn = tables.get("weight_heads"), tables.get("weight_changes"), list[Figure]()
    for end, whose, own in [] if heads is None or heads["copying"].isna().all() else each_model(heads, ": "):
        drawn.append(
            head_heatmap(
                own, "copying", name=f"copying{end}", title=f"Which heads copy{whose}", legend="eigenvalue copying score (orange: copies)",
                caption="Sum of the eigenvalues of W_OV, seen from the vocabulary, over the sum of their sizes.", scale="change", tooltip=_NUMBERS,
            )
        )  # fmt: skip
    for column, what in (("ov_relative", "what heads write (W_OV)"), ("qk_relative", "what heads look for (W_QK)")):
        if changes is not None and changes[column].notna().any():
            drawn.append(
                head_heatmap(
                    changes, column, name=column.replace("_", "-"), title=f"How far fine-tuning moved {what}", legend="relative norm, √ scale",
                    caption="Frobenius norm of the change relative to the matrix before fine-tuning.",
                    tooltip={name: _NUMBERS[name] for name in ("ov_norm", "qk_norm")} | _RELATIVE,
                )
            )  # fmt: skip
    return drawn


def _views(tables: Tables) -> list[Shown]:
    """Show heads that moved or copy most, tokens, composition, singular vectors and all heads."""
    shown = []
    if "weight_tokens" in tables:
        shown += _tokens(tables["weight_tokens"])
    for _, whose, own in each_model(tables["composition"]) if "composition" in tables else []:
        rows = Table(strongest(own, "z", TOP_ROWS)).words("source", "writes").words("target", "reads")
        rows = rows.mapped("kind", "as", lambda kind: str(kind).upper()).numbers("score", "score").numbers("random", "random")
        rows = rows.numbers("sd", "its SD", digits=2).numbers("z", "z", sign=True)
        said = "How much of what one head writes another reads by its query, key or value, beside random matrices; the farthest from random first."
        shown.append(Shown(f"Heads that compose{whose}", rows.view(), said))
    if "weight_singular" in tables:
        shown += _singular(tables["weight_singular"])
    if "weight_changes" in tables:
        shown.append(_changed(tables["weight_changes"]))
    for _, whose, own in each_model(tables["weight_heads"]) if "weight_heads" in tables else []:
        rows = Table(own.sort_values("copying", ascending=False, kind="stable")).words("component", "head")
        for column, words_ in _NUMBERS.items():
            rows = rows.numbers(column, words_)
        shown.append(Shown(f"All heads{whose}", rows.view(), folded=True, terminal="weight_changes" not in tables))
    return shown


def _changed(changes: pd.DataFrame) -> Shown:
    rows = Table(changes.sort_values("ov_place", kind="stable").head(TOP_ROWS)).words("component", "head")
    for matrix in ("ov", "qk"):
        rows = rows.numbers(f"{matrix}_relative", _RELATIVE[f"{matrix}_relative"]).numbers(f"{matrix}_place", "place")
    return Shown(
        "Heads whose weights moved most", rows.view(), "Relative to the matrix's norm in the base model.", folded=True, terminal=True
    )


def _tokens(entries: pd.DataFrame) -> list[Shown]:
    """Return a table per matrix: a line per head and sign, the first pairs of every model and of the change beside one another."""
    models = list(dict.fromkeys(entries["model"]))
    shown = []
    for matrix, own in entries.groupby("matrix", sort=False):
        ranking = own.assign(size=own["value"].astype(float).abs()).groupby("component", sort=False)["size"].max()
        ranking = ranking.sort_values(ascending=False, kind="stable")
        rows = []
        for component in ranking.head(TOP_HEADS).index:
            for sign, part in own[own["component"] == component].groupby("sign", sort=False):
                cells = [_pairs(part[part["model"] == model]) for model in models]
                rows.append((words(component, note=name_of(sign), sort=float(ranking[component])), *cells))
        view = View(("head", *(name_of(model) for model in models)), tuple(rows))
        more = f" The {TOP_HEADS} of {len(ranking)} heads with the largest values." if len(ranking) > TOP_HEADS else ""
        said = f"The first {_PAIRS} pairs of tokens with their values.{more}"
        shown.append(Shown(f"Tokens that heads pair, {_MATRICES.get(str(matrix), name_of(matrix))}", view, said))
    return shown


def _pairs(part: pd.DataFrame) -> Cell:
    first = part.sort_values("place", kind="stable").head(_PAIRS).to_dict("records")
    return Cell("\n".join(f"{token(row['source'])} → {token(row['target'])} ({written(row['value'])})" for row in first) or "–")


def _singular(vectors: pd.DataFrame) -> list[Shown]:
    """Return a table per model and matrix: a line per direction and end, with the tokens on both sides."""
    shown, several, keys = [], vectors["model"].nunique() > 1, ["component", "index", "sign"]
    for (model, matrix), own in vectors.groupby(["model", "matrix"], sort=False):
        wide = own.drop_duplicates([*keys, "side"]).pivot(index=keys, columns="side", values="tokens")
        top = own.drop_duplicates(keys).set_index(keys)[["value"]].join(wide).reset_index()
        rows = Table(strongest(top, "value", TOP_ROWS)).words("component", "head").numbers("index", "direction").mapped("sign", "end")
        rows = (
            rows.numbers("value", "singular value").texts("in", "read").texts("out", "written").texts("query", "query").texts("key", "key")
        )
        heading = f"Singular directions of W_{str(matrix).upper()}{f', {name_of(model)}' if several else ''}"
        shown.append(Shown(heading, rows.view(), "Tokens at both ends of each direction, on its two sides.", folded=True))
    return shown


def _copying(tables: Tables) -> list[tuple[str, pd.DataFrame]]:
    """Return of every model the heads with a copying score."""
    heads = tables.get("weight_heads")
    return [] if heads is None else by_model(heads[heads["copying"].notna()])


def _findings(tables: Tables) -> list[Finding]:
    """Say what heads' weights do; weights are no sample, so there is no n."""
    copying, composition, found = _copying(tables), tables.get("composition"), list[Finding]()
    for whose, own in copying:
        top, here = _highest(own, "copying"), (("model", "==", own["model"].iloc[0]), ("copying", ">=", -1))
        every, above = Derived("weight_heads", here), Derived("weight_heads", (*here, ("copying", ">", _COPIES)))
        share = f"{above.written(tables)} of {every.written(tables)}"
        found.append(
            Finding(
                f"In {whose} {share} heads have a copying score above {_COPIES:g}; the highest is {label(top['component'])}'s, {written(top['copying'])}",
                rows=(top,),
                derived=(above, every),
                effect=above.of(tables) / max(every.of(tables), 1),
                card=Card(share, f"heads of {whose} copy", f"copying score above {_COPIES:g}") if whose == copying[-1][0] else None,
                table="weight_heads",
            )
        )
    changes = tables.get("weight_changes")
    if changes is not None and changes["ov_relative"].notna().any():
        found.append(_moved_finding(tables, changes))
    # the last model is the tuned one, where there are two
    for whose, own in [] if composition is None else by_model(composition[composition["z"].notna()])[-1:]:
        top, every = _highest(own, "z"), Derived("composition", (("model", "==", own["model"].iloc[0]), ("z", ">", float("-inf"))))
        found.append(
            Finding(
                f"In {whose} the strongest composition beyond chance is {label(top['source'])} into {label(top['target'])} ({str(top['kind']).upper()}, score "
                f"{written(top['score'])}, {written(top['z'])} standard deviations above random; {every.written(tables)} pairs)",
                rows=(top,),
                derived=(every,),
                effect=float(top["score"]),
                table="composition",
            )
        )
    return found


def _highest(rows: pd.DataFrame, column: str) -> pd.Series:
    return rows.iloc[int(np.nanargmax(rows[column].to_numpy(dtype=float)))]


def _caveats(tables: Tables) -> list[Caveat]:
    return [
        Caveat(
            "Weights seen through the vocabulary leave out norms, attention patterns and the layers between: they say what a head could do, not what it does."
        )
    ]


def _moved_finding(tables: Tables, changes: pd.DataFrame) -> Finding:
    ov, every = _highest(changes, "ov_relative"), Derived("weight_changes")
    text = f"Fine-tuning moved what {label(ov['component'])} writes most, of {every.written(tables)} heads (W_OV, relative change {written(ov['ov_relative'])})"
    rows = [ov]
    if changes["qk_relative"].notna().any():
        rows.append(_highest(changes, "qk_relative"))
        text += f", and what {label(rows[1]['component'])} looks for (W_QK, {written(rows[1]['qk_relative'])})"
    note = f"W_OV by {percent(ov['ov_relative'], digits=1)} of its norm"
    return Finding(
        text,
        rows=tuple(rows),
        derived=(every,),
        effect=float(ov["ov_relative"]),
        card=Card(label(ov["component"]), "moved most in what it writes", note),
        table="weight_changes",
    )


SECTION = Section(
    id="head-weights",
    heading="Heads in vocabulary space",
    intro=(
        "What weights say without any text. W_OV maps the token a head attends to onto what it writes; W_QK says which tokens its queries look for. The "
        "eigenvalue copying score runs from −1 (suppresses what it reads) to 1 (copies it)."
    ),
    unit="",
    tables=TABLES,
    figures=_figures,
    views=_views,
    findings=_findings,
    caveats=_caveats,
    question="parts",
)
