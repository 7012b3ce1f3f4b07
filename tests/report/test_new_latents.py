"""The sentence that says how many latents are new gives their share of the gain and the controls, and says nothing where nothing would be found."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from tests.studies.jobs.running import findings


def comparisons_table(**rows: dict[str, Any]) -> pd.DataFrame:
    """Return a table of comparisons with some counts."""
    usual = {
        "control": "",
        "first": "base",
        "second": "tuned",
        "n": 40,
        "tokens": 9000,
        "l0": 16.0,
        "second_only": 9,
        "shared": 300,
        "new": 0,
    }
    return pd.DataFrame([{"comparison": name.replace("_", " "), **usual, "beyond": np.nan, **row} for name, row in rows.items()])


def carried_table(share: float, withheld: str = "") -> pd.DataFrame:
    values = {"new": share, "other latents": 0.04, "random vectors": 0.01, "whole difference": 0.8}
    return pd.DataFrame(
        {
            "comparison": "crosscoder",
            "set": name,
            "change": "put into base",
            "latents": 7,
            "draws": 5,
            "energy": 1.0,
            "n": 24,
            "share": value,
            "share_low": value - 0.01,
            "share_high": value + 0.01,
            "withheld": withheld,
        }
        for name, value in values.items()
    )


PLANTED = pd.DataFrame({"direction": [1, 2], "strength": 0.5, "found": [True, True]})


def test_the_sentence_gives_the_latents_their_share_and_the_controls() -> None:
    table = comparisons_table(crosscoder={"new": 8, "beyond": 7}, same={"control": "same", "second_only": 3})
    sentence = findings("feature-difference", feature_comparisons=table, feature_planted=PLANTED, feature_carried=carried_table(0.23))[0]
    assert sentence.startswith(
        "7 latents are new beyond control; base against base has 0 (3 by decoders alone); put into the base they carry 23\u202f% [22.0, 24.0] "
        "of the gain on 24 summaries, beside "
        "4\u202f% [3.00, 5.00] for as many other latents and 1\u202f% [0.00, 2.00] for random vectors of their length; all of the difference there carries "
    )
    # what is new was judged on more texts
    assert sentence.endswith("(n = 40 texts).")
    weak = carried_table(0.23)
    weak.loc[weak["set"] == "other latents", "energy"] = 0.4
    sentence = findings("feature-difference", feature_comparisons=table, feature_planted=PLANTED, feature_carried=weak)[0]
    assert "for as many other latents (which write less than half as much) and 1" in sentence
    none = carried_table(np.nan, "fine-tuning did not lower the loss on these summaries: 0 (−1 to 1)")
    sentence = findings("feature-difference", feature_comparisons=table, feature_planted=PLANTED, feature_carried=none)[0]
    assert "what they carry of the gain is withheld: fine-tuning did not lower the loss" in sentence


def test_nothing_is_said_to_be_new_where_equal_models_have_as_many_and_nothing_is_said_where_nothing_would_be_found() -> None:
    none = comparisons_table(crosscoder={"new": 2, "beyond": 0}, same={"control": "same"})
    found = findings("feature-difference", feature_comparisons=none, feature_planted=PLANTED)[0]
    assert found.startswith(
        "No latent is new beyond control, of 9 that the tuned model alone has by its decoders and 2 by latent scaling too; base against base"
    )
    equal = comparisons_table(crosscoder={"new": 5, "beyond": 3}, same={"control": "same", "new": 3})
    assert findings("feature-difference", feature_comparisons=equal, feature_planted=PLANTED)[0].startswith(
        "No latent can be said to be new: 3 are, by thresholds and found again in the other half of the documents; base against base has 3 (9 by decoders"
    )
    alone = comparisons_table(crosscoder={"new": 1}, same={"control": "same", "new": 2})
    assert findings("feature-difference", feature_comparisons=alone, feature_planted=PLANTED)[0].startswith(
        "No latent can be said to be new: 1 is, by thresholds alone; base against base has 2 "
    )
    blind = findings("feature-difference", feature_comparisons=none, feature_planted=PLANTED.assign(found=False))[0]
    assert "withheld, as none is new beyond control, but of the planted directions none was found either" in blind


def test_what_is_found_stands_beside_what_random_mixtures_would_find() -> None:
    table = comparisons_table(crosscoder={"new": 4, "beyond": 3}, half={"control": "half"}, other0={"control": "seed"})
    again = pd.DataFrame(
        {
            "component": [f"base:resid1.f{latent}" for latent in (0, 1, 2, 3)] * 2,
            "comparison": ["half"] * 4 + ["other0"] * 4,
            "control": ["half"] * 4 + ["seed"] * 4,
            "cosine": 0.8,
            "match": "base:resid1.f9",
            "found": [True, True, True, False, True, False, False, False],
            "chance": 0.3,
            "chance_found": [0.0, 0.0, 0.0, 0.0, 0.1, 0.2, 0.3, 0.4],
        }
    )
    planted = PLANTED.assign(found=[True, False], chance=0.2, chance_found=[0.0, 0.1])
    said = "\n".join(findings("feature-difference", feature_comparisons=table, feature_again=again, feature_planted=planted))
    assert (
        "In the other half of the documents 3 of 4 new latents are found again; random mixtures of the latents there are near enough in 0\u202f%"
        in said
    )
    assert (
        "In the same training with another seed (other0) 1 of 4 new latents is found again; random mixtures of the latents there are near enough in 25"
        in said
    )
    assert "1 are found and judged new; random mixtures of the control's latents are near enough in 5\u202f% of the draws" in said
    # runs in which chance was not drawn say nothing of it
    older = again.drop(columns=["chance", "chance_found"])
    assert "1 of 4 new latents is found again (n = 1 training)." in "\n".join(
        findings("feature-difference", feature_comparisons=table, feature_again=older)
    )
