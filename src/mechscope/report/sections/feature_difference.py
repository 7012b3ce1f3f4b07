"""What fine-tuning added: latents of a crosscoder that only the tuned model has, beside controls of the same budget, and what they carry of its gain."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd

from mechscope.report.gains import MAIN
from mechscope.report.marks.figure import Figure
from mechscope.report.marks.histograms import histogram_lines
from mechscope.report.marks.tables import Cell, Row, Shown, Table, value
from mechscope.report.new_latents import new_latents
from mechscope.report.section import Column, Section, Tables, number, table
from mechscope.report.shared import THIS_PAIR, few_texts
from mechscope.report.statements import Caveat, Derived, Finding
from mechscope.report.theme import number as written
from mechscope.report.theme import percent

_BINS = 25
# what each comparison compares, for a reader
_SAID = {
    "crosscoder": "base and tuned model",
    "difference": "tuned − base, as one",
    "same": "base and base",
    "half": "base and tuned model, other half of the documents",
    "planted": "base, and base with a planted effect",
    "shuffled pairs": "base, and tuned model's tokens in another order",
    "seed": "base, and tuned with another seed",
    "shuffled": "base, and tuned on shuffled summaries",
    "other": "base, and another training",
}
_CLASSES = (
    *(("new", "new"), ("beyond", "new beyond control"), ("lost", "lost"), ("shrunk", "shrunk"), ("decoupled", "decoupled")),
    *(("unclear", "unclear"), ("between", "between"), ("shared", "shared"), ("silent", "silent")),
)


def _by_chance(among: str) -> dict[str, Column]:
    return {
        "chance": number(f"largest cosine with one of {among}, mean over draws; missing where there are none", "cosine", optional=True),
        "chance_found": number("share of the draws in which that would be near enough", "share", optional=True),
    }


TABLES = {
    "feature_comparisons": table(
        "One row per dictionary that was trained, on texts that none has learned from.",
        comparison="its name: crosscoder (base and tuned), difference, or a control",
        control="which control it is; empty for the two models' own",
        first="the first model, or what stands for it: base, halfbase; empty for the dictionary of differences",
        second="the second: tuned, same, halftuned, planted, shuffled, other0, difference",
        n="texts",
        tokens=number("tokens that were read", "tokens"),
        l0=number("active latents of a token", "latents"),
        kept_first=number(
            "1 − Σ‖x − x̂‖² / Σ‖x − mean‖² of the first model, around the mean of what was learned from", "share", "low", "high"
        ),
        kept_second=number("the same of the second model, or of the difference", "share", "low", "high"),
        first_only=number("latents of the first model alone by the relative norm of their decoders", "latents"),
        second_only=number("latents of the second model alone by it", "latents"),
        shared=number("latents of both", "latents"),
        between=number("latents that are neither one model's nor shared", "latents"),
        silent=number("latents active in too few tokens to be judged", "latents"),
        new=number("of those of the second model alone: what latent scaling does not take back", "latents"),
        lost=number("the same of the first model", "latents"),
        shrunk=number("of those of one model: the other has them too (ν of the error)", "latents"),
        decoupled=number("of those of one model: other latents say the same in the other (ν of the reconstruction)", "latents"),
        unclear=number("of those of one model: not to be found in that model either", "latents"),
        beyond=number("new latents that are found again in the other half of the documents; missing where it was left out", "latents"),
        moved=number(
            "root mean square of tuned − base over all places, its mean included, as a share of the base's around its mean: how far fine-tuning moved them",
            "share",
            optional=True,
        ),
    ),
    "feature_latents": table(
        "One row per comparison of two models and latent.",
        comparison="its dictionary",
        control="which control that is; empty for the two models' own",
        component="the latent, by the first place that it writes: base:resid6.f1024",
        tokens="tokens in which it is active",
        density=number("the same as a share of all tokens that were read", "share"),
        squares=number("mean f² per token", "squares"),
        energy=number("mean of f² times both decoders' squared norms, per token", "squared norms"),
        norm_first=number("norm of its decoder in the first model, activations having mean squared norm one"),
        norm_second=number("norm of its decoder in the second model"),
        relative_norm=number("½ ((second − first) / larger + 1): 0 the first model's alone, 1 the second's alone", "share"),
        nu_error=number("ν of the error: β in the model with the shorter decoder over β in the other", "ratio"),
        nu_reconstruction=number("ν of the reconstruction", "ratio"),
        by_norm="silent, first only, second only, shared or between, by the relative norm",
        judged="of those of one model: new, lost, shrunk, decoupled or unclear; empty for others",
        again=number("largest cosine with a new latent of the other half of the documents; of the models' own crosscoder", "cosine"),
        beyond="whether it is new beyond control; missing for controls, and where the other half of the documents was left out",
    ),
    "feature_again": table(
        "One row per new latent and dictionary of other documents or of another training.",
        component="the latent",
        comparison="the other dictionary",
        control="which control that is: half, seed, shuffled, other",
        cosine=number("largest cosine of its decoder with that of a latent that is new there; missing where none is", "cosine"),
        match="that latent; empty for none",
        found="whether that is enough to count as found again",
        **_by_chance("as many random mixtures of that dictionary's decoders as it has new latents"),
    ),
    "feature_planted": table(
        "One row per planted direction.",
        direction="its number",
        kinds=number("kinds of tokens on which it is written", "kinds"),
        tokens="the first of them",
        share=number("share of the judged tokens on which it is written", "share"),
        strength=number("its length as a share of the root mean square norm of the base's activations", "share"),
        component="the latent of the control's dictionary with the nearest decoder",
        cosine=number("cosine of that decoder with the direction", "cosine"),
        nu_error=number("its ν of the error", "ratio"),
        nu_reconstruction=number("its ν of the reconstruction", "ratio"),
        by_norm="its class by the relative norm",
        judged="how it was judged",
        found="whether the direction counts as found: near enough, and judged new",
        **_by_chance("as many random mixtures of that dictionary's decoders as it has latents"),
    ),
}


def _figures(tables: Tables) -> list[Figure]:
    found = []
    if "feature_latents" in tables:
        active = tables["feature_latents"]
        active = active[active["by_norm"] != "silent"]
        edges = np.linspace(0, 1, _BINS + 1)
        parts = [
            pd.DataFrame(
                {
                    "series": name,
                    "control": bool(own["control"].iloc[0]),
                    "relative_norm": (edges[:-1] + edges[1:]) / 2,
                    "count": np.histogram(own["relative_norm"].clip(0, 1), edges)[0],
                }
            )
            for name, own in active.groupby("comparison", sort=False)
        ]
        if parts:
            found.append(
                histogram_lines(
                    pd.concat(parts, ignore_index=True),
                    name="feature-norms",
                    title="Relative norm of latents' decoders",
                    caption="Latents by the relative norm of their two decoders: 0 where only the first model has them, 1 where only the second has. "
                    "Controls are dashed. One latent and a thousand are both to be seen: the vertical axis is logarithmic above one.",
                    x=("relative_norm", "relative norm"),
                    axis="latents",
                )
            )
    return found


def _views(tables: Tables) -> list[Shown]:
    shown = []
    if "feature_comparisons" in tables:
        view = Table(tables["feature_comparisons"]).cells("comparison", "dictionary", _compares)
        for column, heading in _CLASSES:
            view = view.cells(column, heading, _counted(column))
        view = view.numbers("kept_first", "variance kept, first", ends=("kept_first_low", "kept_first_high"))
        view = view.numbers("kept_second", "second", ends=("kept_second_low", "kept_second_high")).numbers("l0", "L0").numbers("n", "texts")
        brief = Table(tables["feature_comparisons"]).words("comparison", "dictionary", strong=lambda row: not row["control"])
        for column, heading in (
            ("new", "new"),
            ("beyond", "beyond control"),
            ("shrunk", "shrunk"),
            ("decoupled", "decoupled"),
            ("shared", "shared"),
        ):
            brief = brief.cells(column, heading, _counted(column))
        words = "Latents by class, the same thresholds for all. New: the second model's alone by its decoders, and not taken back by latent scaling."
        shown.append(
            Shown(
                "Latents of the two models, beside controls",
                view.view(),
                words,
                terminal=True,
                brief=brief.view(),
                table="feature_comparisons",
            )
        )
    if "feature_planted" in tables:
        view = Table(tables["feature_planted"]).words("direction", "direction").token_lists("tokens", "written on", most=5)
        view = view.cells("share", "share of tokens", lambda row: Cell(percent(row["share"], digits=1), sort=float(row["share"])))
        view = (
            view.numbers("strength", "length")
            .words("component", "nearest latent")
            .numbers("cosine", "cosine")
            .cells("chance", "by chance", _chance)
            .numbers("nu_error", "ν error")
        )
        view = view.numbers("nu_reconstruction", "ν reconstruction").words("judged", "judged").cells("found", "found", _yes)
        shown.append(Shown("The planted effect", view.view(), folded=True, table="feature_planted"))
    if "feature_again" in tables and len(tables["feature_again"]):
        view = (
            Table(tables["feature_again"]).words("component", "latent").words("comparison", "other dictionary").numbers("cosine", "cosine")
        )
        view = view.cells("chance", "by chance", _chance).words("match", "nearest there").cells("found", "found again", _yes)
        shown.append(Shown("New latents in other dictionaries", view.view(), folded=True, table="feature_again"))
    return shown


def _compares(row: Row) -> Cell:
    said = _SAID.get(str(row["control"] or row["comparison"]), "")
    return Cell(str(row["comparison"]), said, strong=not row["control"])


def _counted(column: str) -> Callable[[Row], Cell]:
    return lambda row: _count(row[column])


def _count(value: Any) -> Cell:
    missing = value is None or value is pd.NA or np.isnan(float(value))
    return Cell("–") if missing else Cell(written(int(value)), sort=float(value))


def _chance(row: Row) -> Cell:
    return value(row.get("chance", np.nan))


def _yes(row: Row) -> Cell:
    return Cell("yes" if row["found"] else "no")


def _findings(tables: Tables) -> list[Finding]:
    compared = tables.get("feature_comparisons")
    if compared is None:
        return []
    rows = {row["comparison"]: row for _, row in compared.iterrows()}
    main, same = rows[MAIN], rows.get("same")
    found = [new_latents(tables, main, same)]
    if (planted := tables.get("feature_planted")) is not None:
        number_found = Derived("feature_planted", (("found", "==", True),))
        every = Derived("feature_planted")
        said, chance = _beside_chance("feature_planted", tables, "the control's latents")
        found.append(
            Finding(
                f"Of {every.written(tables)} directions that were planted, {percent(planted['strength'].iloc[0])} as long as the base's activations, "
                f"{number_found.written(tables)} are found and judged new" + said + _how_far(rows.get("difference")),
                n=main["n"],
                rows=(planted.iloc[0], *([rows["difference"]] if "difference" in rows else [])),
                derived=(every, number_found, *chance),
                table="feature_planted",
            )
        )
    found += _others(tables)
    if "shuffled pairs" in rows:
        row = rows["shuffled pairs"]
        found.append(
            Finding(
                f"Of pairs that do not belong together the dictionary calls {written(int(row['shared']))} latents shared and "
                f"{written(int(row['new']))} new; of those that do, {written(int(main['shared']))} and {written(int(main['new']))}",
                n=row["n"],
                rows=(row, main),
                folded=True,
                table="feature_comparisons",
            )
        )
    return found


def _how_far(difference: Any) -> str:
    if difference is None or pd.isna(difference.get("moved")):
        return ""
    return f"; fine-tuning moves them by {percent(difference['moved'])} of it on average"


def _beside_chance(name: str, tables: Tables, mixed: str, *where: tuple[str, str, Any]) -> tuple[str, tuple[Derived, ...]]:
    """Say how often chance alone would find as much; nothing of runs in which that was not drawn."""
    share = Derived(name, where, "chance_found", "mean")
    if "chance_found" not in tables[name] or np.isnan(share.of(tables)):
        return "", ()
    return f"; random mixtures of {mixed} are near enough in {percent(share.of(tables))} of the draws", (share,)


_TRAININGS = {
    "half": "the other half of the documents",
    "seed": "the same training with another seed",
    "shuffled": "a training on shuffled summaries",
}


def _others(tables: Tables) -> list[Finding]:
    """Say how many of the new latents are there again in each other training, and how many chance would find."""
    again, found = tables.get("feature_again"), list[Finding]()
    if again is None:
        return []
    for name, own in again.groupby("comparison", sort=False):
        every = Derived("feature_again", (("comparison", "==", name),))
        hits = Derived("feature_again", (("comparison", "==", name), ("found", "==", True)))
        kind = str(own["control"].iloc[0])
        beside, chance = _beside_chance("feature_again", tables, "the latents there", ("comparison", "==", name))
        where = _TRAININGS.get(kind, "another training") + ("" if kind == name else f" ({name})")
        found.append(
            Finding(
                f"In {where} {hits.written(tables)} of {every.written(tables)} new latents {'is' if hits.of(tables) == 1 else 'are'} found again{beside}",
                n=1,
                unit="trainings",
                rows=(own.iloc[0],),
                derived=(every, hits, *chance),
                # of the other half the first sentence says it
                folded=kind == "half",
                table="feature_again",
            )
        )
    return found


def _caveats(tables: Tables) -> list[Caveat]:
    compared, found = tables.get("feature_comparisons"), [*few_texts(tables, "feature_comparisons")]
    if compared is None:
        return found
    controls = set(compared["control"])
    for name, said in (
        ("same", "Base against base was left out: how many latents two equal models are said not to share is not known."),
        ("half", "The other half of the documents was left out: what is new may hang on the documents."),
        ("planted", "The planted effect was left out: whether an effect would have been found is not known."),
    ):
        if name not in controls:
            found.append(Caveat(said, weakens="feature_comparisons"))
    if not {"seed", "shuffled", "other"} & controls:
        found.append(THIS_PAIR)
    return found


SECTION = Section(
    id="feature-difference",
    heading="What fine-tuning added",
    intro=(
        "A crosscoder writes what both models hold at a place, on the same tokens, with one set of latents, each with a decoder of its own for either model. "
        "A latent is the tuned model's alone where its decoder for the base is next to nothing. A sparsity penalty can bring that about though the base has it "
        "too, so latent scaling asks what the base holds where the latent is active: ν of the error is high where the base's decoder was shrunk, ν of the "
        "reconstruction where other latents say the same there. New beyond control is what passes both and is found again in the other half of the documents; "
        "controls of the same budget and thresholds stand beside it."
    ),
    tables=TABLES,
    figures=_figures,
    views=_views,
    findings=_findings,
    caveats=_caveats,
)
