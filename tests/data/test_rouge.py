"""ROUGE on texts whose scores can be counted by hand."""

from __future__ import annotations

import pytest

from mechscope.data.rouge import rouge
from mechscope.errors import DataError


def test_the_same_text_scores_one_and_an_empty_or_foreign_one_zero() -> None:
    scores = rouge(["A dog ran home.", "", "Cats sleep."], ["A dog ran home."] * 3)
    assert scores.to_numpy().tolist() == [[1.0] * 4, [0.0] * 4, [0.0] * 4]


def test_scores_are_f_measures_of_shared_words_pairs_and_subsequences() -> None:
    # prediction 4 words, reference 5: 3 shared words, 1 shared pair ("the dog"), longest common subsequence "the dog"
    row = rouge(["the dog saw red"], ["red the dog was home"]).iloc[0]
    assert row["rouge1"] == pytest.approx(2 * (3 / 4) * (3 / 5) / (3 / 4 + 3 / 5))
    assert row["rouge2"] == pytest.approx(2 * (1 / 3) * (1 / 4) / (1 / 3 + 1 / 4))
    assert row["rougeL"] == pytest.approx(2 * (2 / 4) * (2 / 5) / (2 / 4 + 2 / 5))


def test_words_are_stemmed() -> None:
    assert rouge(["dogs running"], ["dog runs"]).iloc[0]["rouge1"] == 1.0


def test_lsum_compares_sentence_by_sentence_without_line_breaks() -> None:
    row = rouge(["Dogs bark. Cats sleep."], ["Cats sleep. Dogs bark."]).iloc[0]
    assert row["rougeL"] == pytest.approx(0.5)
    assert row["rougeLsum"] == 1.0


def test_a_full_stop_inside_a_number_ends_no_sentence() -> None:
    swapped = rouge(["pay rose 3.5 percent and prices fell"], ["prices fell and pay rose 3.5 percent"]).iloc[0]
    assert swapped["rougeLsum"] == swapped["rougeL"] < 1.0


def test_the_two_are_prediction_and_reference_in_pairs() -> None:
    with pytest.raises(DataError, match="there are 2 predictions and 1 references"):
        rouge(["a", "b"], ["a"])
    assert rouge([], []).columns.tolist() == ["rouge1", "rouge2", "rougeL", "rougeLsum"]
