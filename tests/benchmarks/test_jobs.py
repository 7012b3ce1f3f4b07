"""Every job runs at a tiny shape and does the work it claims; its ratios and targets are in its record."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from benchmarks.harness import measure
from benchmarks.jobs import JOBS, TOPICS, attention, circuits, documents, heads, lenses, probes, walks, weights
from benchmarks.jobs.cases import build, build_two
from benchmarks.models import make_model
from benchmarks.settings import Settings
from benchmarks.shapes import SHAPES, Shape, Size

from benchmarks import watch
from mechscope.circuits.graph import Graph
from mechscope.data.prompt import Batch, Encoded
from mechscope.difference.lockstep import HEAD_MEASURES, models_of
from mechscope.heads.pattern_roles import repeated_texts
from mechscope.subject.load import Subject

# what the issues allow: time relative to what the job is compared with, GiB above the models, memory relative to that
TARGETS = {
    "entropy": (1.4, None, 1.3),
    "entropy_backbone": (1.4, None, 1.3),
    "both": (1.8, None, None),
    "both_with_logits": (1.8, None, None),
    "recording": (1.15, None, None),
    "patch_heads": (42, None, None),
    "ablation": (105, None, None),
    "attribution": (3, None, None),
    "eap": (4.5, None, None),
    "eap_ig": (14, None, None),
    "eap_ig_texts": (None, 1.2, None),
    "evaluate": (3, None, None),
    "lens": (1.3, 0.5, None),
    "lens_all": (None, 0.5, None),
    "role_table": (12, None, None),
    **{f"weights_{name}": (None, 3, None) for name in ("ov", "qk", "ov_sources", "ov_change")},
    "probes_logistic": (0.5, None, None),
    "difference": (2.2, None, None),
    "features_step": (2.5, 0.23, None),
    "features_dashboard": (1.3, None, None),
    "features_scaling": (1.3, None, None),
    "features_loader": (0.02, None, None),
    "harvest": (1.1, None, None),
    "harvest_half": (0.55, None, None),
}


@pytest.mark.parametrize("name", JOBS)
def test_a_job_runs_and_its_record_has_its_ratios_and_targets(name: str, tiny: Settings) -> None:
    job = JOBS[name]
    found, numbers = measure(job, tiny)
    assert (found["job"], found["by"]) == (name, "mechscope")
    assert found["seconds"] > 0
    assert found["memory_gib"] >= 0
    assert found["ratio"] == pytest.approx(found["seconds"] / found["beside"]["count"] / found["beside"]["seconds"])
    if job.forward is None:
        assert found["passes"] is None
    else:
        assert found["passes"] == pytest.approx(found["seconds"] / found["forward"]["seconds"])
    assert tuple(found["targets"].values()) == TARGETS.get(name, (None, None, None))
    assert (numbers is None) is (job.numbers is None)


def test_the_issue_s_hot_paths_all_have_a_job() -> None:
    assert set(TARGETS) <= set(JOBS)
    assert {"lora_step", "lora_heads_step", "full_step"} <= set(JOBS)
    assert sum(len(jobs) for jobs in TOPICS.values()) == len(JOBS), "no two jobs share a name"
    assert not set(TOPICS) & set(JOBS), "a name means a job or a topic"


def test_logistic_probes_tell_the_rows_that_scikit_learns_tell(tiny: Settings) -> None:
    case = probes.build(tiny, Size(1, 1))
    told = torch.cat([probe.says(case.x.double()) for probe in probes.fit(case)])
    loop = probes.loop(case)
    sites, labelings = len(case.x), case.labels.shape[1]
    for at, model in enumerate(loop):
        site, labeling = divmod(at, labelings)
        accuracy, other = (
            (told[labeling * sites + site].numpy() == case.labels[:, labeling].numpy()).mean(),
            model.score(case.x[site], case.labels[:, labeling]),
        )
        assert abs(accuracy - other) < 0.003


def test_models_have_the_same_weights_every_time_and_the_tuned_one_others_near_by() -> None:
    shape = Shape(1, 1, 20, 8)
    first, second, tuned = (make_model(shape, noise=noise).state_dict() for noise in (0.0, 0.0, 0.002))
    assert all(torch.equal(first[name], second[name]) for name in first)
    for name, value in tuned.items():
        assert 0.001 < (value - first[name]).abs().max() < 0.02
    assert SHAPES["small"].width == 768


def test_both_models_are_walked_to_their_own_last_residual_stream(tiny: Settings) -> None:
    case = build_two(tiny, Size(2, 16))

    def last(subject: Subject) -> torch.Tensor:
        return subject.anatomy.backbone(case.ids, use_cache=False).last_hidden_state

    with torch.no_grad():
        for (walk, stream), subject in zip(attention.both(case), (case.subject, case.tuned), strict=True):
            norm = walk.subject.anatomy.final_norm
            assert norm is not None
            torch.testing.assert_close(norm(stream), last(subject), rtol=1e-4, atol=1e-5)
        assert not torch.equal(last(case.subject), last(case.tuned))


def test_what_is_run_to_warm_up_is_the_same_model_on_less_text(tiny: Settings) -> None:
    case = build(tiny, Size(4, 16))
    small = case.small()
    assert small.subject is case.subject
    assert [pair.clean for pair in small.pairs] == [pair.clean[:8] for pair in list(case.pairs)[:2]]
    assert all(pair.answers == (1,) and pair.wrong_answers == (2,) for pair in small.pairs)


def test_half_of_all_edges_are_open_and_that_changes_the_run(tiny: Settings) -> None:
    case = build(tiny, Size(2, 8))
    edges = circuits._half(case)
    assert edges.shape == (1, len(Graph(2, 2)))
    assert 0.3 < edges.float().mean() < 0.7
    assert not torch.equal(circuits.evaluate(case)[0], circuits._prepared(case).clean)
    torch.testing.assert_close(circuits.evaluate(case), circuits.prepare_and_evaluate(case))


def test_the_lens_is_compared_with_the_unembedding_of_every_token_of_every_layer(monkeypatch: pytest.MonkeyPatch, tiny: Settings) -> None:
    case = build(replace(tiny, shape=Shape(3, 2, 70, 16)), Size(2, 8))
    calls: list[tuple[torch.Size, torch.Size]] = []
    plain = torch.nn.functional.linear

    def seen(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        calls.append((rows.shape, weight.shape))
        return plain(rows, weight)

    monkeypatch.setattr(torch.nn.functional, "linear", seen)
    lenses.unembeddings(case)
    assert calls == [(torch.Size([16, 128]), torch.Size([70, 128]))] * 3


def test_the_search_is_compared_with_a_whole_matrix_per_head(monkeypatch: pytest.MonkeyPatch, tiny: Settings) -> None:
    monkeypatch.setattr(weights, "_ROWS", 30)
    monkeypatch.setattr(weights, "_COLUMNS", 40)
    case = weights.build(tiny, Size(1, 1))
    made: list[int] = []
    product = torch.Tensor.__matmul__

    def counted(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        found = product(a, b)
        made.append(found.numel())
        return found

    monkeypatch.setattr(torch.Tensor, "__matmul__", counted)
    weights.whole(case)
    assert sum(made) == 70 * 70
    assert case.n_heads == 2
    assert weights.build(replace(tiny, components="all"), Size(1, 1)).n_heads == 4
    assert weights.build(replace(tiny, components="a1.h0"), Size(1, 1)).n_heads == 1


def test_roles_are_compared_with_one_pass_over_every_probe_and_its_control(tiny: Settings) -> None:
    case = heads.build(replace(tiny, probes=5), Size(1, 1))
    read: list[tuple[int, ...]] = []

    def noted(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        read.extend(map(tuple, args[0].tolist()))

    handle = case.subject.plain.register_forward_pre_hook(noted)
    heads.forward(case)
    handle.remove()
    texts = repeated_texts(case.subject, 5)
    longest = max(len(pair.clean) for pair in texts)
    expected = [ids + (0,) * (longest - len(ids)) for pair in texts for ids in (pair.clean, pair.corrupt)]
    assert sorted(read) == sorted(expected)
    assert case.texts == 10


def test_the_difference_takes_turns_with_the_plain_passes_of_its_own_batches(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tiny: Settings
) -> None:
    case = documents.build(replace(tiny, documents=7, tokens_per_batch=400), Size(1, 1))
    read: list[int] = []
    printed: list[int] = []

    def plain(_: documents.DocumentsCase, batch: Batch) -> None:
        printed.append(capsys.readouterr().out.count("documents"))
        read.append(len(batch.examples))

    monkeypatch.setattr(documents, "plain", plain)
    taken = documents.take_turns(case)
    expected = [len(batch.examples) for batch in documents.batched(case, case.encoded)]
    assert len(expected) > 2
    assert read == [expected[0], *expected], "one for the memory, then every batch once"
    assert set(printed[2:]) == {1}, "the difference went on between two plain passes"
    assert taken["job"].result.outputs["n"].max() == 7


def test_neither_clock_runs_while_the_other_works(monkeypatch: pytest.MonkeyPatch, tiny: Settings) -> None:
    class Clock:
        now = 0.0

        def perf_counter(self) -> float:
            return self.now

        process_time = perf_counter

    def plain(_: documents.DocumentsCase, batch: Batch) -> None:
        clock.now += 100

    def walked(case: documents.DocumentsCase) -> Encoded:
        clock.now += 7
        return tokenize(case)

    clock, tokenize = Clock(), documents.tokenize
    monkeypatch.setattr(watch, "time", clock)
    monkeypatch.setattr(documents, "plain", plain)
    monkeypatch.setattr(documents, "tokenize", walked)
    case = documents.build(replace(tiny, documents=7, tokens_per_batch=400), Size(1, 1))
    batches = len(list(documents.batched(case, case.encoded)))
    taken = documents.take_turns(case)
    assert taken["job"].seconds == [7], "tokenization, once, and none of the plain passes"
    assert taken["beside"].seconds == [7 + 100 * batches]


def test_documents_of_a_file_are_read_and_cut(tmp_path: Path, tiny: Settings) -> None:
    file = tmp_path / "news.jsonl"
    rows = (f'{{"document": "{"The mayor spoke. " * (30 + n)}", "summary": "A mayor spoke {n} times."}}' for n in range(3))
    file.write_text("\n".join(rows), encoding="utf-8")
    case = documents.build(replace(tiny, data=str(file), max_tokens=60), Size(1, 1))
    assert (case.texts, max(map(len, case.encoded.examples))) == (3, 60)
    assert case.pair.base.anatomy.vocab_size >= len(case.pair.tokenizer)


def test_three_pairs_have_three_models(tiny: Settings) -> None:
    case = walks.build_of(3)(tiny, Size(2, 9))
    found = walks.measure(case)
    assert (len(found), len(models_of(case.pairs)), case.texts, case.tokens, case.small().tokens) == (3, 3, 2, 18, 16)
    assert [each.heads[..., HEAD_MEASURES.index("kl_base_tuned"), :, :].min() > 0 for each in found] == [True] * 3
