"""Candidates: latents that the tuned model alone has, by its decoders, and the nearest, with what they write and where they are active most."""

from __future__ import annotations

import pandas as pd

from mechscope.report.latents import EXAMPLES, PROMOTES, SUPPRESSES, in_words, with_examples
from mechscope.report.marks.tables import Cell, Row, Shown, Table
from mechscope.report.section import Section, Tables, number, table
from mechscope.report.statements import Caveat
from mechscope.report.theme import number as written
from mechscope.report.theme import percent

TABLES = {
    "feature_candidates": table(
        "One row per latent that is listed: those that the tuned model alone has by its decoders, then those that come nearest.",
        component="the latent",
        density=number("share of tokens in which it is active", "share"),
        share=number("its share of the energy of all latents", "share"),
        relative_norm=number("relative norm of its decoders", "share"),
        nu_error=number("its ν of the error", "ratio"),
        nu_reconstruction=number("its ν of the reconstruction", "ratio"),
        by_norm="second only, or between",
        judged="new, shrunk, decoupled or unclear; empty for those that both models have",
        again=number("largest cosine with a new latent of the other half of the documents", "cosine"),
        beyond="whether it is new beyond control; missing where the other half of the documents was left out",
        promotes=f"{PROMOTES} of the tuned model",
        suppresses=SUPPRESSES,
    ),
    "feature_examples": table(
        "One row per listed latent and text in which it is active most.",
        component="the latent",
        **EXAMPLES,
    ),
}


def _views(tables: Tables) -> list[Shown]:
    if "feature_candidates" not in tables or "feature_examples" not in tables:
        return []
    return [_candidates(tables["feature_candidates"], tables["feature_examples"], tables.get("feature_again"))]


def _candidates(listed: pd.DataFrame, examples: pd.DataFrame, again: pd.DataFrame | None) -> Shown:
    found = {} if again is None else {str(key): own for key, own in again[again["found"].astype(bool)].groupby("component")}
    controls = [", ".join(found[key]["comparison"]) if key in found else "–" for key in listed["component"]]
    listed = with_examples(listed, examples, ["component"]).assign(controls=controls)
    # missing where there was no control
    listed = listed.assign(beyond=listed["beyond"].eq(True).fillna(False).astype(bool))
    view = Table(listed).words("component", "latent", strong=lambda row: bool(row["beyond"]))
    view = view.cells("judged", "judged", lambda row: Cell("new beyond control" if row["beyond"] else str(row["judged"] or "in both")))
    view = view.numbers("relative_norm", "relative norm").cells("nu_error", "ν: error, reconstruction", _nu)
    if again is not None:
        view = view.texts("controls", "found again in")
    view = view.cells("density", "active in", lambda row: Cell(percent(row["density"], digits=2), sort=float(row["density"])))
    return Shown("Candidates, and the texts in which they are active most", in_words(view).view(), table="feature_candidates")


def _nu(row: Row) -> Cell:
    return Cell(f"{written(row['nu_error'], digits=2)}, {written(row['nu_reconstruction'], digits=2)}")


def _caveats(tables: Tables) -> list[Caveat]:
    if "feature_candidates" not in tables:
        return []
    said = "The examples are those of the largest values: a latent may mean something else where it is less active."
    return [Caveat(said, weakens="feature_candidates")]


SECTION = Section(
    id="feature-candidates",
    heading="Candidates",
    intro=(
        "Latents that the tuned model alone has by its decoders: what is new beyond control first, then what latent scaling takes back; behind them those "
        "of both models that come nearest. What a latent promotes is read off its decoder in the tuned model, which the layers behind may change."
    ),
    tables=TABLES,
    views=_views,
    caveats=_caveats,
)
