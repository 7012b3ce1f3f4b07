"""Models compared by what they share: a copy shares everything, another seed no more than the untrained one, and settings are checked first."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest

from mechscope.data.documents import Document
from mechscope.errors import MechscopeError, SettingsError
from mechscope.instrument import load
from mechscope.studies.job import Result
from mechscope.studies.jobs import universality
from mechscope.studies.runner import run_job
from tests import families
from tests.studies.jobs.running import findings, shown, subject
from tests.universality.test_universality import TEXTS

DOCUMENTS = tuple(Document(str(at), text, "w3") for at, text in enumerate(TEXTS))


@cache
def other() -> Any:
    return load(families.build("llama", seed=5), tokenizer=families.tokenizer())


def run(out: Path | None, documents: tuple[Document, ...] = DOCUMENTS, **settings: Any) -> Result:
    named = dict.fromkeys(("model", "others", "data"), "given in memory")
    given = {"model": subject(), "others": {"copy": subject(), "other": other()}, "data": documents}
    job = universality.JOB
    return run_job(job, job.resolve(**named, template="{document} w3 {summary}", probes=8, draws=40, **settings), out, given=given)


def test_a_copy_shares_everything_and_an_untrained_model_is_beside_it(tmp_path: Path) -> None:
    result = run(tmp_path / "run")
    neurons, layers = result.universal_neurons, result.universal_layers
    copy = neurons[neurons["other"] == "copy"]
    assert (copy["partner"] == copy["component"]).all()
    assert copy["correlation"].min() > 0.999
    assert layers.loc[layers["other"] == "copy", ["cka", "procrustes"]].to_numpy().min() > 0.999
    assert set(neurons.loc[neurons["control"], "other"]) == {universality.UNTRAINED}
    assert neurons.loc[neurons["other"] != "copy", "correlation"].mean() < 0.5
    page = shown(result, "universality")
    assert "Neurons that another model has too" in page
    (first, *_) = [sentence for sentence in findings("universality", universal_neurons=neurons) if "copy" in sentence]
    many, every = int((copy["excess"] > 0.5).sum()), len(copy)
    assert first.startswith(f"{many} of {every} neurons have a partner in copy")


def test_what_is_not_asked_for_is_not_compared() -> None:
    result = run(None, measures="heads")
    assert {name for name in result.tables if name.startswith("universal")} == {"universal_heads", "universal_matches"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"measures": "souls"}, "setting 'measures' names souls: known are neurons, representations, heads"),
        ({"measures": ","}, "setting 'measures' names none: give at least one"),
        ({"documents": 3}, "neurons are compared on half of the documents and told of the other half: 3 are too few"),
    ],
)
def test_what_cannot_be_compared_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(MechscopeError, match=message):
        run(None, DOCUMENTS[: settings.pop("documents", len(DOCUMENTS))], **settings)
    with pytest.raises(SettingsError, match="setting 'others' names none"):
        universality.JOB.resolve(model="a", others=",", data="b")
