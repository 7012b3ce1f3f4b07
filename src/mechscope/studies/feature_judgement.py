"""Latents of every comparison classified by the same thresholds on held-out texts, found again in other dictionaries, and shown with what they write."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from mechscope.studies.dictionaries import example_rows
from mechscope.studies.feature_difference import Request, Trained, compared, models_of, trained_of
from mechscope.studies.run import Tables

if TYPE_CHECKING:
    import pandas as pd

    from mechscope.data.pairs import Pairs
    from mechscope.features import Dictionary
    from mechscope.features.diffing import Comparison, Judged


# controls that compare the base with a fine-tuned model too, whose latents could be the same
_SOUGHT_IN = ("half", "seed", "shuffled", "other")


def judge_all(request: Request) -> Tables:
    """Classify the latents of every dictionary by the same thresholds, on texts that none has learned from."""
    import pandas as pd

    from mechscope.features.diffing import CROSSCODER, DIFFERENCE, classified, found_again, judge, scaled_latents

    trained, texts, settings = trained_of(request, models_of(request)), request.texts, request.settings.exclusive
    judged = judge(trained.reader, trained.dictionaries, trained.recipe, texts.judged, execution=request.run.execution)
    two = {each.name: each for each in compared(request) if len(each.views) > 1}
    latents = {name: classified(scaled_latents(trained.dictionaries[name], judged[name].sums), settings) for name in two}
    own = latents[CROSSCODER]
    again = {
        name: found_again(
            trained.dictionaries[CROSSCODER],
            own,
            trained.dictionaries[name],
            latents[name],
            recurs=settings.recurs,
            seed=request.run.settings.seed,
        )
        for name, comparison in two.items()
        if comparison.control in _SOUGHT_IN
    }
    latents[CROSSCODER] = beyond_control(own, again.get("half"), settings.recurs)
    tables = {
        "feature_comparisons": pd.DataFrame(
            [_comparison_row(each, judged[each.name], latents.get(each.name), trained) for each in compared(request)]
        ),
        "feature_latents": pd.concat(
            [
                _named(table, trained.dictionaries[name]).assign(comparison=name, control=two[name].control)
                for name, table in latents.items()
            ],
            ignore_index=True,
        )[list(_LATENT_COLUMNS)].astype({"beyond": "boolean"}),
    }
    if DIFFERENCE in judged:
        sums, dictionary = judged[DIFFERENCE].sums, trained.dictionaries[DIFFERENCE]
        columns = {"tokens": sums.active, **sums.per_token}
        names = [_component(dictionary, latent) for latent in range(dictionary.latents)]
        tables["feature_differences"] = pd.DataFrame({"component": names, **{name: each.numpy() for name, each in columns.items()}})
    if again:
        tables["feature_again"] = pd.concat([_again(table, two[name], trained) for name, table in again.items()], ignore_index=True)
    if "planted" in latents:
        tables["feature_planted"] = _planted(request, trained, texts.judged, latents["planted"])
    return tables


def beyond_control(own: pd.DataFrame, half: pd.DataFrame | None, recurs: float) -> pd.DataFrame:
    """Say of latents which are new beyond control: judged new, and found again in the other half of the documents.

    Args:
        own: The latents, `classified`.
        half: Of those that are new, what `found_again` says of the other half; None where it was left out.
        recurs: Cosine from which one counts as found again.

    Returns:
        The latents with `beyond` (None without the other half: there is no control that a latent could be beyond) and `again` (the cosine; NaN where it was
        not looked for).
    """
    if half is None:
        return own.assign(beyond=None, again=np.nan)
    again = own["latent"].map(half.set_index("latent")["cosine"])
    return own.assign(beyond=own["judged"].eq("new") & again.ge(recurs), again=again)


_LATENT_COLUMNS = (
    *("comparison", "control", "component", "tokens", "density", "squares", "energy", "norm_first", "norm_second", "relative_norm"),
    *("nu_error", "nu_reconstruction", "by_norm", "judged", "again", "beyond"),
)


def _component(dictionary: Dictionary, latent: int) -> str:
    from mechscope.features import Latent

    return Latent(dictionary.layout.outputs[0], latent).name


def _named(table: pd.DataFrame, dictionary: Dictionary) -> pd.DataFrame:
    found = table.assign(component=[_component(dictionary, latent) for latent in table["latent"]])
    return found if "beyond" in found else found.assign(beyond=None, again=np.nan)


def _comparison_row(comparison: Comparison, judged: Judged, latents: pd.DataFrame | None, trained: Trained) -> dict[str, Any]:
    from mechscope.features.diffing import BY_NORM, DIFFERENCE, JUDGED
    from mechscope.stats.shares import share_of

    row: dict[str, Any] = {
        "comparison": comparison.name,
        "control": comparison.control,
        "first": comparison.views[0] if len(comparison.views) > 1 else "",
        "second": comparison.views[-1],
        "n": int((judged.tokens > 0).sum()),
        "tokens": judged.sums.tokens,
        "l0": float(judged.active.sum() / judged.tokens.sum()),
    }
    kept = [
        share_of(missed, squares, absent="the activations do not vary")
        for missed, squares in zip(judged.missed, judged.squares, strict=True)
    ]
    for side, share in zip(("first", "second")[-len(kept) :], kept, strict=True):
        row |= {f"kept_{side}": 1 - share.value, f"kept_{side}_low": 1 - share.high, f"kept_{side}_high": 1 - share.low}
    for name in BY_NORM:
        row[name.replace(" ", "_")] = np.nan if latents is None else int((latents["by_norm"] == name).sum())
    for name in JUDGED:
        row[name] = np.nan if latents is None else int((latents["judged"] == name).sum())
    row["beyond"] = (
        int(latents["beyond"].sum()) if latents is not None and "beyond" in latents and latents["beyond"].notna().any() else np.nan
    )
    if comparison.name == DIFFERENCE:
        row["moved"] = trained.recipe.moved(trained.dictionaries[DIFFERENCE].output_maps)
    return row


def _again(table: pd.DataFrame, comparison: Comparison, trained: Trained) -> pd.DataFrame:
    import pandas as pd

    from mechscope.features.diffing import CROSSCODER

    one, two = trained.dictionaries[CROSSCODER], trained.dictionaries[comparison.name]
    return pd.DataFrame(
        {
            "component": [_component(one, latent) for latent in table["latent"]],
            "comparison": comparison.name,
            "control": comparison.control,
            "cosine": table["cosine"].astype(float),
            "match": [_component(two, latent) if latent >= 0 else "" for latent in table["match"]],
            **{name: table[name] for name in ("found", "chance", "chance_found")},
        }
    )


def _planted(request: Request, trained: Trained, texts: Pairs, latents: pd.DataFrame) -> pd.DataFrame:
    """Look for every planted direction among the latents that were judged new, and for the nearest of all."""
    import pandas as pd
    import torch

    from mechscope.features.diffing import Decoders, nearest_by_chance
    from mechscope.subject.spelling import Spelling

    plant, dictionary, spelling = trained.recipe.plant, trained.dictionaries["planted"], Spelling(request.pair.tokenizer)
    if plant is None:
        raise RuntimeError("a planted comparison without a planted effect")
    where, widths = trained.recipe.places, dictionary.layout.output_widths
    true = torch.nn.functional.normalize(
        torch.cat([plant.directions(place, width) for place, width in zip(where, widths, strict=False)], dim=1), dim=1
    )
    second = torch.nn.functional.normalize(Decoders.of(dictionary).second.double().cpu(), dim=1)
    cosine, recurs = true @ second.T, request.settings.exclusive.recurs
    # the nearest was sought among all latents
    chance, by_chance = nearest_by_chance(true, second, len(second), recurs=recurs, seed=request.run.settings.seed)
    tokens = [token for pair in texts for token in pair.clean[1:]]
    rows = []
    for number, (kinds, own) in enumerate(zip(plant.kinds, cosine, strict=True), start=1):
        best = int(own.argmax())
        row = latents.iloc[best]
        rows.append(
            {
                "direction": number,
                "kinds": len(kinds),
                "tokens": spelling.tokens(list(kinds[:8])),
                "share": float(np.isin(tokens, kinds).mean()),
                "strength": plant.strength,
                "component": _component(dictionary, best),
                "cosine": float(own[best]),
                "nu_error": row["nu_error"],
                "nu_reconstruction": row["nu_reconstruction"],
                "by_norm": row["by_norm"],
                "judged": row["judged"],
                "found": bool(own[best] >= recurs and row["judged"] == "new"),
                "chance": chance[number - 1],
                "chance_found": by_chance[number - 1],
            }
        )
    return pd.DataFrame(rows)


def candidates(own: pd.DataFrame, most: int) -> pd.DataFrame:
    """Return the latents that the tuned model alone has by its decoders, and those that come nearest: what says most first.

    Args:
        own: The latents of the models' own crosscoder, with `beyond`.
        most: How many are returned.

    Returns:
        Those rows with their `share` of the energy of all: what is new beyond control first, then what is new, what scaling takes back, what is unclear (each
        by energy), and behind them the latents of both models that are nearer to the tuned model's (by their relative norm).
    """
    own = own.assign(share=own["energy"] / own["energy"].sum())
    alone = own["by_norm"] == "second only"
    nearly = (own["by_norm"] == "between") & (own["relative_norm"] > 0.5)
    rank = own["judged"].map({"new": 1, "unclear": 3}).fillna(2).where(alone, 4) - own["beyond"].eq(True).fillna(False).astype(bool)
    within = own["energy"].where(alone, own["relative_norm"])
    own = own.assign(rank=rank, within=within)[alone | nearly]
    return own.sort_values(["rank", "within"], ascending=[True, False], kind="stable").head(most)


def show_candidates(request: Request) -> Tables:
    """List the latents that the tuned model alone has by its decoders, and those that come nearest, with what they write and where they are active."""
    import pandas as pd

    from mechscope.features import promoted_tokens, top_examples
    from mechscope.features.diffing import CROSSCODER
    from mechscope.features.examples import writes_residual
    from mechscope.subject.spelling import Spelling

    settings, both, texts = request.settings.latent, request.pair, request.texts.judged
    trained = trained_of(request, {"base": both.base, "tuned": both.tuned})
    table, dictionary = request.run.table("feature_latents"), trained.dictionaries[CROSSCODER]
    own = table[table["comparison"] == CROSSCODER].reset_index(drop=True)
    own = candidates(own, settings.latents_shown)
    if own.empty:
        return {}
    chosen, place = [int(latent) for latent in own.index], dictionary.layout.outputs[-1]
    read = promoted_tokens(both.tuned, dictionary, chosen, place=place) if writes_residual(place) else [([], [])] * len(chosen)
    spelling = Spelling(both.tokenizer)
    columns = ["component", "density", "share", "relative_norm", "nu_error", "nu_reconstruction", "by_norm", "judged", "again", "beyond"]
    up, down = ([spelling.tokens(side[at]) for side in read] for at in (0, 1))
    shown = own[columns].assign(promotes=pd.Series(up, index=own.index), suppresses=pd.Series(down, index=own.index))
    found = top_examples(
        {"base": both.base, "tuned": both.tuned},
        dictionary,
        texts,
        count=settings.examples,
        other_model=True,
        execution=request.run.execution,
    )
    examples = [
        {"component": name, **row}
        for name, latent in zip(shown["component"], chosen, strict=True)
        for row in example_rows(found, latent, texts, spelling)
    ]
    return {"feature_candidates": shown.reset_index(drop=True), "feature_examples": pd.DataFrame(examples)}
