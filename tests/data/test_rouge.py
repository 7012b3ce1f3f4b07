"""ROUGE on texts whose scores can be counted by hand."""

from __future__ import annotations

import pytest
from rouge_score import rouge_scorer

from mechscope.data.rouge import METRICS, UnicodeTokenizer, rouge
from mechscope.errors import DataError


def test_the_same_text_scores_one_and_an_empty_or_foreign_one_zero() -> None:
    scores = rouge(["A dog ran home.", "", "Cats sleep."], ["A dog ran home."] * 3)
    assert scores[list(METRICS)].to_numpy().tolist() == [[1.0] * 4, [0.0] * 4, [0.0] * 4]


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
    assert rouge([], []).columns.tolist() == [*METRICS, "tokenizer"]


@pytest.mark.parametrize(
    "text",
    ["ประเทศไทยมีประชากรหลายล้านคน", "東京は日本の首都です。", "Москва — столица России.", "القاهرة عاصمة مصر", "서울은 대한민국의 수도이다"],
)
def test_equal_texts_of_any_script_score_one(text: str) -> None:
    row = rouge([text], [text]).iloc[0]
    assert row["tokenizer"] == "unicode"
    assert row["rouge1"] == row["rougeL"] == 1.0


def test_german_words_are_whole() -> None:
    # 2 of 3 words are shared; cut at the umlaut it would be 4 of 5
    row = rouge(["Die Tür öffnet"], ["Die Tür schließt"]).iloc[0]
    assert row["rouge1"] == pytest.approx(2 / 3)
    # the composed and the decomposed umlaut are one
    assert rouge(["Die T\u0075\u0308r"], ["Die Tür"]).iloc[0]["rouge1"] == 1.0


def test_letters_of_scripts_without_spaces_are_words_with_their_marks() -> None:
    assert UnicodeTokenizer().tokenize("กี่ B2 日本x") == ["กี่", "b2", "日", "本", "x"]


def test_english_with_a_borrowed_word_keeps_the_published_tokenizer() -> None:
    reference = "The café owner said that prices would rise again next year. " * 4
    own = rouge_scorer.RougeScorer(["rouge1"], use_stemmer=True).score(reference, "The caf owner's prices rise.")["rouge1"].fmeasure
    row = rouge(["The caf owner's prices rise."], [reference]).iloc[0]
    assert row["tokenizer"] == "unicode"  # 4 of 192 letters
    row = rouge(["The caf owner's prices rise."] * 5, [reference, *[reference.replace("é", "e")] * 4]).iloc[0]
    assert row["tokenizer"] == "english"
    assert row["rouge1"] == own
