"""The ablation job: pairs of which only the clean side is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from mechscope.causal import ablate_together, mean_of
from mechscope.errors import DataError, MechscopeError, SettingsError
from mechscope.studies.jobs import ablate
from tests.studies.jobs.running import findings, refuses, run, shown, subject, write

TEXTS = ("w3 w4 w5 w6", "w7 w3 w9 w4 w8", "w5 w6 w7 w8", "w9 w8 w3 w5", "w4 w4 w6 w3", "w8 w5 w9 w7")


def rows(*, corrupt: bool, answers: bool = True) -> str:
    """Return pairs as a file has them."""
    return "\n".join(
        json.dumps(
            {"clean": text}
            | ({"corrupt": " ".join(reversed(text.split()))} if corrupt else {})
            | ({"answers": ["w10"], "wrong_answers": ["w11"]} if answers else {})
        )
        for text in TEXTS
    )


def test_a_file_without_corrupt_texts_is_ablated_as_one_with_them(tmp_path: Path) -> None:
    clean, both = (write(tmp_path / f"{corrupt}.jsonl", rows(corrupt=corrupt)) for corrupt in (False, True))
    alone, beside = (run(ablate.JOB, None, pairs=source, sites="mlp", source="zero").effects for source in (clean, both))
    pd.testing.assert_frame_equal(alone, beside)
    with pytest.raises(DataError, match="line 1: no 'corrupt'; the row has 'clean', 'answers', 'wrong_answers'"):
        run(ablate.JOB, None, pairs=clean, sites="mlp", source="corrupt")


def test_texts_alone_are_judged_by_their_loss(tmp_path: Path) -> None:
    texts = write(tmp_path / "texts.jsonl", rows(corrupt=False, answers=False))
    effects = run(ablate.JOB, None, pairs=texts, sites="mlp", source="zero", metric="loss").effects
    assert set(effects["metric"]) == {"loss"}
    assert set(effects["n"]) == {len(TEXTS)}
    with pytest.raises(DataError, match="names no"):
        run(ablate.JOB, None, pairs=texts, sites="mlp", source="zero")


def test_heads_are_taken_out_together_beside_random_ones(tmp_path: Path) -> None:
    chosen = "a1.h2,a2.h0,a2.h3"
    result = run(ablate.JOB, tmp_path / "run", pairs="repeated", limit=8, components=chosen, mode="together", metric="loss", random_sets=50)
    table = result.ablated_together
    assert "Components taken out together" in shown(result, "ablated-together")
    top, random = table.iloc[0], table[table["kind"] == "random"]
    assert (top["component"], len(random)) == (chosen, 50)
    profiles = {tuple(name.partition(".")[0] for name in row.split(",")) for row in random["component"]}
    assert profiles == {("a1", "a2", "a2")}
    texts = result_texts(8)
    means = mean_of(subject(), texts, ("z",))
    values = ablate_together(subject(), texts, list(table["component"]), source=means, metric="loss")
    np.testing.assert_allclose(table["effect"], (values.values - values.unchanged).mean(1), rtol=1e-6)
    costs = table["effect"].to_numpy()
    assert top["p_random"] == pytest.approx(np.mean(costs >= costs[0]))
    assert top["p_less"] == pytest.approx(np.mean(costs <= costs[0]))
    apart = values.values[0] - values.values[1:].mean(0)
    assert top["more"] == pytest.approx(apart.mean(), rel=1e-6)
    assert top["more_low"] < apart.mean() < top["more_high"]
    assert table["more"].notna().sum() == table["p_random"].notna().sum() == 1


def result_texts(n: int) -> Any:
    from mechscope.data.tasks import repeated

    tokenizer = subject().tokenizer
    assert tokenizer is not None
    return repeated(tokenizer, n)


@pytest.mark.parametrize(
    ("components", "controls"),
    [("a1.h2,m1", 0), ("a1.h0,a1.h1,a1.h2,a1.h3", 0), ("layers:1", 0), ("a1.h2", 4)],
    ids=["mixed", "attention", "layer", "head"],
)
def test_what_is_not_heads_alone_has_no_random_sets(components: str, controls: int) -> None:
    result = run(ablate.JOB, None, pairs="repeated", limit=6, components=components, mode="together", metric="loss", random_sets=4)
    table = result.ablated_together
    assert list(table["kind"]) == ["selected", *["random"] * controls]
    assert np.isfinite(table["effect"]).all()
    (sentence,) = findings("ablated-together", ablated_together=table)
    assert ("no random sets of heads are like it" in sentence) is not bool(controls)


def invented(effect: float, others: list[float], p_random: float, p_less: float) -> pd.DataFrame:
    """Return a table of sets as `ablation_table` makes it."""
    effects = [effect, *others]
    table = pd.DataFrame(
        {"effect": effects, "low": np.subtract(effects, 0.5), "high": np.add(effects, 0.5), "se": 0.2, "q": 0.01, "p": 0.01}
    )
    first = dict(enumerate(["selected", *["random"] * len(others)]))
    table = table.assign(component="a1.h2", metric="loss", n=12, value=table["effect"] + 3, kind=pd.Series(first), withheld="")
    table[["p_random", "p_less", "more", "more_low", "more_high"]] = np.nan
    more = effect - float(np.mean(others))
    table.loc[0, ["p_random", "p_less", "more", "more_low", "more_high"]] = [p_random, p_less, more, more - 0.1, more + 0.1]
    return table


def test_a_sentence_says_where_the_set_stands_among_random_ones() -> None:
    (above,) = findings("ablated-together", ablated_together=invented(2.0, [0.25, 0.75], 0.02, 1.0))
    assert above == (
        "Taking out a1.h2 together changes loss by +2.00 [+1.50, +2.50] to 5.00, 2 random sets with as many heads in each layer by +0.500 on average; "
        "it stands out from them: the share of sets with at least as large an effect, this one counted, is 0.0200 "
        "(selected minus their mean: +1.50 [+1.40, +1.60]; n = 12 texts)."
    )
    (below,) = findings("ablated-together", ablated_together=invented(-2.0, [0.25, 0.75], 1.0, 0.04))
    many = invented(2.0, [0.25], 0.02, 1.0).assign(component=",".join(f"a0.h{head}" for head in range(9)))
    assert findings("ablated-together", ablated_together=many)[0].startswith(
        "Taking out a0.h0, a0.h1, a0.h2 and 6 more components together"
    )
    assert "it does not stand out from them: the share of sets with at least as small an effect, this one counted, is 0.0400" in below


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({}, SettingsError, "mode 'together' takes out what components name, and they name nothing"),
        ({"components": "a1.h9"}, MechscopeError, "a1.h9"),
        ({"components": "resid1.f3"}, MechscopeError, "resid1.f3 is a latent of a dictionary, and heads, MLPs or layers are needed"),
    ],
)
def test_what_cannot_be_taken_out_together_is_said(
    tmp_path: Path, settings: dict[str, Any], error: type[MechscopeError], message: str
) -> None:
    refuses(ablate.JOB, tmp_path / "run", error, message, mode="together", **settings)
