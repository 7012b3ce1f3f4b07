"""How many latents only the tuned model has, beside base against base, and what they carry of the gain: the sentence that answers what fine-tuning added."""

from __future__ import annotations

from typing import Any

import pandas as pd

from mechscope.report.gains import beside_said, sets_of, share_said
from mechscope.report.section import Tables
from mechscope.report.statements import Card, Finding
from mechscope.report.theme import number as written

_TOO_SMALL = "none is new beyond control, but of the planted directions none was found either: the dictionary is too small, or its training too short"


def new_latents(tables: Tables, main: Any, same: Any) -> Finding:
    """Say how many latents are new beyond control (or by thresholds, without one), and what they carry of the gain, beside as many others.

    Args:
        tables: The tables of a comparison of two models by dictionaries.
        main: The row of `feature_comparisons` of the two models.
        same: That of base against base; None where it was left out.
    """
    alone, planted = pd.isna(main["beyond"]), tables.get("feature_planted")
    beyond = int(main["new"] if alone else main["beyond"])
    kind = "new by thresholds, without a control of other documents" if alone else "new beyond control"
    beside = "" if same is None else f"; base against base has {_count(same, 'new')} ({_count(same, 'second_only')} by decoders alone)"
    quoted = (main,) if same is None else (main, same)
    # the answer to the section's question comes first, whatever else is larger
    options: dict[str, Any] = {"n": main["n"], "table": "feature_comparisons", "effect": float("inf")}
    if not beyond or (same is not None and int(same["new"]) >= beyond):
        if planted is not None and not planted["found"].any():
            return Finding("whether fine-tuning added latents", rows=quoted, withheld=_TOO_SMALL, **options)
        if beyond:
            how = "by thresholds alone" if alone else "by thresholds and found again in the other half of the documents"
            said = f"No latent can be said to be new: {written(beyond)} {'is' if beyond == 1 else 'are'}, {how}{beside}"
            return Finding(said, rows=quoted, **options)
        of = f", of {_count(main, 'second_only')} that the tuned model alone has by its decoders and {_count(main, 'new')} by latent scaling too"
        return Finding(f"No latent is {kind}{of}{beside}", rows=quoted, card=Card("0", f"latents are {kind}"), **options)
    plural = "latent is" if beyond == 1 else "latents are"
    card = Card(written(beyond), f"{plural} {kind}")
    said = f"{written(beyond)} {plural} {kind}{beside}"
    own = dict(sets_of(tables["feature_carried"], "put into base")) if "feature_carried" in tables else {}
    if (new := own.get("new by thresholds" if alone else "new")) is None:
        return Finding(said, rows=quoted, card=card, **options)
    if new["withheld"]:
        return Finding(f"{said}; what they carry of the gain is withheld: {new['withheld']}", rows=(*quoted, new), card=card, **options)
    whole = own.get("whole difference")
    most = "" if whole is None else f"; all of the difference there carries {share_said(whole)}"
    # fewer texts than latents are judged on
    on = f"{written(int(new['n']))} {'summary' if int(new['n']) == 1 else 'summaries'}"
    return Finding(
        f"{said}; put into the base they carry {share_said(new)} of the gain on {on}{beside_said(own, 'for')}{most}",
        rows=(*quoted, *own.values()),
        card=card,
        **{**options, "table": "feature_carried"},
    )


def _count(row: Any, column: str) -> str:
    return written(int(row[column]))
