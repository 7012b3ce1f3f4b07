"""Concepts are scored on means and tokens as they stand in the model; of the newsroom it is known which tokens are facts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from mechscope.data.labels import Labelled, first_letters, read_labelled
from mechscope.data.newsroom import newsroom_model_path, newsroom_tokenizer, split_articles
from mechscope.data.pairs import PairBatch
from mechscope.errors import DataError, SettingsError
from mechscope.features import Place, Rule, autoencoder, concept_scores, concept_scores_of_sets, random_control, transcoder
from mechscope.features import concepts as scoring
from mechscope.features.dictionary import Dictionary
from mechscope.features.gathered import gather
from mechscope.features.probes import Probe, balanced_of, sparse_probing
from mechscope.features.rows import Reader, reader_of
from mechscope.instrument import Execution
from mechscope.instrument.texts import over_texts
from mechscope.settings.features import ConceptSettings, TokenSettings
from mechscope.subject.load import load
from tests import families
from tests.features import oracle
from tests.features.test_harvest import texts
from tests.features.test_measures import W, every_family, kept_rows
from tests.features.test_splice import made

ALL = TokenSettings(outlier=None)
COUNT = 48


def labelled(count: int = COUNT) -> Labelled:
    """Return random texts whose first class is told by a token that all of its texts hold, and whose tokens above a number are a concept."""
    given = texts(tuple(8 + number % 5 for number in range(count)))
    attributes = {
        "half": tuple("first" if pair.clean[1] % 2 else "second" for pair in given),
        "third": tuple("abc"[pair.clean[2] % 3] for pair in given),
    }
    tokens = {"large": tuple(tuple(at for at, token in enumerate(pair.clean) if token % 2) for pair in given)}
    return Labelled(given, attributes, tokens)


@every_family
@pytest.mark.parametrize("tokens_per_batch", [40, 10_000])
def test_what_is_gathered_are_means_and_tokens_of_the_model(family: str, tokens_per_batch: int) -> None:
    subject, given = families.subject(family, torch.float64), labelled()
    dictionary = made(transcoder(1, W, 50, Rule("topk", 8)))
    reader = reader_of(subject, dictionary, given.texts, ALL, other_model=False, execution=Execution())
    execution = Execution(tokens_per_batch=tokens_per_batch)
    (pooled, held) = gather({"": reader}, {"": {"": dictionary}}, given.texts, held=3 * COUNT, execution=execution)[""][""]
    inside, outside = kept_rows(subject, dictionary, given.texts)
    longest = max(len(pair.clean) for pair in given.texts)
    for number, (x, y) in enumerate(zip(inside, outside, strict=True)):
        f = oracle.encode(dictionary, [x])
        np.testing.assert_allclose(pooled.x[number], y.mean(0), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(pooled.codes[number].toarray()[0], f.mean(0), rtol=1e-4, atol=1e-6)
        own = np.flatnonzero(held.text // longest == number)
        assert len(own) == 3
        # the first token of each text is left out
        at = held.text[own] % longest - 1
        np.testing.assert_allclose(held.x[own], y[at], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(held.codes[own].toarray(), f[at], rtol=1e-4, atol=1e-6)


def test_rows_say_what_they_are_and_are_those_of_the_functions() -> None:
    subject, given = families.subject("llama", torch.float64), labelled(120)
    dictionary = made(autoencoder("resid1", W, 50, Rule("topk", 8)))
    both = {"": dictionary, "random": random_control(dictionary, 8)}
    found = concept_scores(subject, both, given, settings=ConceptSettings(judged_share=0.5), tokens=ALL)
    assert list(found) == ["", "random"]
    table = found[""]
    assert list(table.columns) == list(scoring.COLUMNS)
    assert set(table["score"]) == {
        "sparse probing",
        "probe of the activations",
        "TPP",
        "SCR",
        "absorption, full",
        "absorption, fraction",
    }
    assert set(table[table["score"] == "TPP"]["concept"]) == {"third"}
    assert set(table[table["score"] == "SCR"]["concept"]) <= {"half despite third", "third despite half"}
    split = scoring._Split.of(given, ConceptSettings(judged_share=0.5), 0)
    reader = reader_of(subject, dictionary, given.texts, ALL, other_model=False, execution=Execution())
    pooled, _ = gather({"": reader}, {"": both}, given.texts, held=20_000, execution=Execution())[""][""]
    is_first = np.array(given.attributes["half"]) == "first"
    most = str(table[table["concept"].str.startswith("half=")]["concept"].iloc[0]) == "half=first"
    y = is_first if most else ~is_first
    expected = balanced_of(
        sparse_probing(pooled.rows(split.learned), pooled.rows(split.judged), y[split.learned], y[split.judged], 2), y[split.judged]
    )
    row = table[(table["score"] == "sparse probing") & table["concept"].str.startswith("half=") & (table["count"] == 2)].iloc[0]
    assert (row["value"], row["low"], row["n"]) == pytest.approx((expected.value, expected.low, len(split.judged)))
    # the probe of all activations does not depend on the dictionary
    whole = [each[each["score"] == "probe of the activations"]["value"].tolist() for each in found.values()]
    assert whole[0] == whole[1]
    with pytest.raises(SettingsError, match="must read and write the same places"):
        concept_scores(subject, {"": dictionary, "far": made(autoencoder("resid0", W, 50, Rule("topk", 8)))}, given)
    none = Labelled(given.texts, {"all": ("one",) * 120}, {})
    with pytest.raises(DataError, match="120 texts of made for tests do not suffice for any score"):
        concept_scores(subject, {"": dictionary}, none)


def test_texts_that_come_twice_are_on_one_side() -> None:
    given = labelled()
    doubled = Labelled(
        replace(given.texts, pairs=given.texts.pairs * 2), {name: values * 2 for name, values in given.attributes.items()}, {}
    )
    split = scoring._Split.of(doubled, ConceptSettings(judged_share=0.25), 0)
    learned, judged = ({doubled.texts.pairs[at].clean for at in side.tolist()} for side in (split.learned, split.judged))
    assert not learned & judged
    assert (len(split.learned), len(split.judged)) == (1.5 * COUNT, 0.5 * COUNT)


def test_sets_are_scored_together_as_each_alone_by_one_pass_and_each_probe_once(monkeypatch: pytest.MonkeyPatch) -> None:
    subject, given = families.subject("llama", torch.float64), labelled(120)
    # two sets of one place, of which one leaves out more tokens, and one of others
    near, far = made(autoencoder("resid1", W, 50, Rule("topk", 8))), made(transcoder(0, W, 40, Rule("topk", 5)))
    trained = replace(near, about={"source": {"settings": {"first": 3, "outlier": None}}})
    sets = {"near": {"": near, "random": random_control(near, 8)}, "far": {"": far}, "again": {"": near}, "trained": {"": trained}}
    told: dict[str, Any] = {"settings": ConceptSettings(judged_share=0.5), "execution": Execution(tokens_per_batch=400)}
    alone = {name: concept_scores(subject, own, given, **told) for name, own in sets.items()}
    passes, fits = [0], list[bytes]()
    streams, fit = Reader.streams, Probe.__init__

    def counted(self: Reader, batch: PairBatch) -> dict[Place, torch.Tensor]:
        passes[0] += 1
        return streams(self, batch)

    def noted(self: Probe, x: np.ndarray, y: np.ndarray, *, each: bool = False) -> None:
        if not each:
            fits.append(x.tobytes() + y.tobytes())
        fit(self, x, y, each=each)

    monkeypatch.setattr(Reader, "streams", counted)
    monkeypatch.setattr(Probe, "__init__", noted)
    readers = {name: reader_of(subject, own[""], given.texts, None, other_model=False, execution=Execution()) for name, own in sets.items()}
    passes[0] = 0
    gather(readers, sets, given.texts, held=500, execution=Execution(tokens_per_batch=400))
    assert passes[0] == len([*over_texts(given.texts, lambda batch: None, Execution(tokens_per_batch=400), tokens=1, label="")]) > 1
    together = concept_scores_of_sets(subject, sets, given, **told)
    assert len(fits) == len(set(fits)) > 0
    assert {name: list(own) for name, own in together.items()} == {name: list(own) for name, own in sets.items()}
    for name, own in alone.items():
        for each, table in own.items():
            pd.testing.assert_frame_equal(together[name][each], table, check_exact=True)
    # what is left out is each set's own
    assert not together["trained"][""].equals(together["near"][""])


def test_of_the_newsroom_facts_and_classes_are_known() -> None:
    tokenizer = newsroom_tokenizer()
    found = read_labelled("newsroom", tokenizer, limit=12, max_tokens=512)
    articles = split_articles("test", limit=12, seed=0)
    for number, article in enumerate(articles):
        assert found.attributes["kind"][number] == article.kind
        fact = article.fact("where")
        said = tokenizer.decode([found.texts.pairs[number].clean[at] for at in found.tokens["fact where"][number]])
        assert said.replace(" ", "") == fact.text * len(fact.document_spans)
    assert set(found.attributes["day"]) == {"weekday", "date"}
    letters = first_letters(found.texts, tokenizer)
    at = letters["first letter m"][0][0]
    assert tokenizer.decode([found.texts.pairs[0].clean[at]]).strip().lower().startswith("m")
    assert found.hash != read_labelled("newsroom", tokenizer, limit=12, max_tokens=512, seed=1).hash


def test_files_tell_classes_by_columns_of_few_values_and_by_which_file_it_is(tmp_path: Path) -> None:
    rows = [{"text": f"The mayor said number {at}", "topic": "ab"[at % 2], "id": f"row {at}", "length": at} for at in range(60)]
    (tmp_path / "one.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = read_labelled(str(tmp_path / "one.jsonl"), newsroom_tokenizer(), limit=60, max_tokens=32)
    assert set(found.attributes) == {"topic"}
    documents = [{"document": f"The harbour at {at} was closed", "topic": "c"} for at in range(40)]
    (tmp_path / "two.jsonl").write_text("\n".join(map(json.dumps, documents)))
    both = f"{tmp_path / 'one.jsonl'},{tmp_path / 'two.jsonl'}"
    found = read_labelled(both, newsroom_tokenizer(), limit=60, max_tokens=32)
    assert found.attributes["source"] == ("one",) * 30 + ("two",) * 30
    assert found.attributes["topic"] == ("a", "b") * 15 + ("c",) * 30
    with pytest.raises(DataError, match="nothing is known of the texts"):
        read_labelled(str(tmp_path / "two.jsonl"), newsroom_tokenizer(), limit=60, max_tokens=32)
    (tmp_path / "three.jsonl").write_text('{"words": "x"}\n')
    with pytest.raises(DataError, match=r"three\.jsonl.* has no text: labelled texts have a column text or document"):
        read_labelled(str(tmp_path / "three.jsonl"), newsroom_tokenizer(), limit=60, max_tokens=32)


@pytest.mark.parametrize(
    ("rows", "has"), [([{}], "text, id"), ([{"topic": None}], "text, id, topic"), ([{"topic": ""}], "text, id, topic")]
)
def test_a_class_that_is_known_of_some_texts_alone_is_refused_by_name(tmp_path: Path, rows: list[dict[str, object]], has: str) -> None:
    """What is missing is no class of its own."""
    known: list[dict[str, object]] = [{"text": f"The mayor said number {at}", "id": f"row {at}", "topic": "ab"[at % 2]} for at in range(20)]
    unknown = [{"text": f"The harbour at {at} was closed", "id": f"line {at}", **row} for at, row in enumerate(rows * 2)]
    file = tmp_path / "known.jsonl"
    file.write_text("\n".join(map(json.dumps, known + unknown)))
    with pytest.raises(DataError, match=rf"known\.jsonl, line 21 has no 'topic', by which texts are told apart: it has {has}; write one"):
        read_labelled(str(file), newsroom_tokenizer(), limit=60, max_tokens=32)
    # columns that are named are all that is read
    found = read_labelled(str(file), newsroom_tokenizer(), limit=60, max_tokens=32, columns=["id"])
    assert found.attributes == {"id": tuple(str(row["id"]) for row in known + unknown)}
    other = tmp_path / "other" / "known.jsonl"
    other.parent.mkdir()
    other.write_text("\n".join(map(json.dumps, known)))
    with pytest.raises(DataError, match="two files are called known, by which their texts are told apart"):
        read_labelled(f"{file},{other}", newsroom_tokenizer(), limit=60, max_tokens=32)


@pytest.mark.slow
def test_summaries_of_different_sources_are_told_apart(shared: Path) -> None:
    """SAMSum, CNN/DailyMail and XSum, by the activations of a model better than by one random latent."""
    subject = load(newsroom_model_path())
    files = ",".join(str(shared / "data" / "summarization" / f"{name}.test.jsonl") for name in ("samsum", "cnn_dailymail", "xsum"))
    found = read_labelled(files, subject.tokenizer, limit=150, max_tokens=64)
    layout = autoencoder("resid2", subject.anatomy.d_model, 64, Rule("topk", 4))
    table = concept_scores(subject, {"": Dictionary.plain(layout, layout.tensors())}, found)[""].query("concept == 'source'")
    whole = float(table[table["score"] == "probe of the activations"]["value"].iloc[0])
    one = float(table[(table["score"] == "sparse probing") & (table["count"] == 1)]["value"].iloc[0])
    assert whole > 0.8
    assert whole > one
