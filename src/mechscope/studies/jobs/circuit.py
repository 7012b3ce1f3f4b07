"""`mechscope circuit`: the circuit that does a task: every edge scored, a circuit chosen, and judged beside random circuits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from mechscope.settings import Number, nested, setting
from mechscope.settings.discovery import DiscoverySettings
from mechscope.studies.groups import OneModel, PromptPairs
from mechscope.studies.inputs import MODELS, prompt_pairs
from mechscope.studies.job import Job, Stage
from mechscope.studies.pairs import check_pairs
from mechscope.studies.run import Input, JobRun, Tables

if TYPE_CHECKING:
    from mechscope.instrument import Execution
    from mechscope.studies.circuit_request import CircuitRequest


@dataclass(frozen=True, kw_only=True)
class CircuitSettings(OneModel, PromptPairs):
    """Which model, pairs and method."""

    panel: ClassVar[str] = "Circuit"

    discovery: DiscoverySettings = nested(DiscoverySettings)
    tokens_per_batch: Number | None = setting(256, "Most tokens of a batch of texts, padding included; decides the memory.")


def _request(run: JobRun[Any]) -> CircuitRequest:
    from mechscope.studies.circuit_request import CircuitRequest

    return CircuitRequest.of(prompt_pairs(run), run.settings.discovery, seed=run.settings.seed)


REQUEST: Input[CircuitRequest] = Input(
    "pairs", _request, fingerprint=lambda request: request.fingerprint, record=lambda request: request.record
)
"""Prompt pairs, divided into those that edges are scored on and those that judge."""


def check_request(run: JobRun[Any], models: Input[Any]) -> None:
    """Refuse pairs and sizes that do not fit the models."""
    from mechscope.circuits.graph import Graph
    from mechscope.studies.circuits import check_size

    request = run[REQUEST]
    for subject in run[models].values():
        check_size(request.settings, Graph.of(subject))
        for pairs in (request.scored_on, request.judged_on):
            check_pairs(subject, pairs, metric=request.settings.metric)


def circuit_stages(
    models: Input[Any],
    request: Input[Any] = REQUEST,
    *,
    hangs_on: tuple[str, ...] | None = None,
    after: tuple[Stage, ...] = (),
    when: Callable[[Any], bool] = lambda settings: True,
    tokens: int = 256,
) -> tuple[Stage, Stage, Stage]:
    """Return the stages that score every model's edges, once more with another seed where the method draws, and judge the circuits.

    Args:
        models: Models by label.
        request: Pairs and settings; None where a run has no pairs for a circuit, which is then left out.
        hangs_on: Settings that decide all of it, where they are not `discovery` and `seed`.
        after: Stages that name the roles of heads, for the cards.
        when: Whether there is a circuit at all, by the settings, which have `discovery`.
        tokens: Tokens of a batch where the settings leave them open.
    """

    def execution(run: JobRun[Any], seed: int) -> Execution:
        from mechscope.instrument import Execution

        own = run.execution
        return Execution(tokens_per_batch=own.tokens(tokens), seed=seed, progress=own.progress)

    def score(run: JobRun[Any]) -> None:
        from mechscope.studies.circuits import score_edges, write_scores

        if run[request] is not None:
            write_scores(
                run.stage, run.label, score_edges(run[models][run.label], run[request], execution=execution(run, run.settings.seed))
            )

    def score_again(run: JobRun[Any]) -> None:
        from mechscope.studies.circuits import score_edges, write_scores

        if run[request] is not None:
            other = execution(run, run.settings.seed + 1)
            write_scores(run.stage, _again(run.label), score_edges(run[models][run.label], run[request], execution=other))

    def judge(run: JobRun[Any]) -> Tables:
        from mechscope.studies.circuits import circuit_file, circuit_tables, judge_circuit, read_scores
        from mechscope.studies.runner import plain

        if run[request] is None:
            return {}
        reports, options = {}, execution(run, run.settings.seed)
        for label, subject in run[models].items():
            other = read_scores(run.folder, _again(label)) if _draws(run.settings) else None
            scores = read_scores(run.folder, label)
            reports[label] = judge_circuit(subject, scores, run[request], other_seed=other, execution=options)
            run.stage.write_text(f"circuits/{plain(label)}.json", circuit_file(subject, reports[label]))
        named = any(stage.when(run.settings) for stage in after)
        return circuit_tables(reports, roles=run.table("head_roles") if named else None)

    def draws(settings: Any) -> bool:
        return when(settings) and _draws(settings)

    score_on = hangs_on or _scores_hang_on
    scores = Stage(name="circuit_scores", work=score, hangs_on=score_on, inputs=(request,), each=models, when=when)
    again = Stage(name="circuit_scores_other_seed", work=score_again, hangs_on=score_on, inputs=(request,), each=models, when=draws)
    circuit = Stage(
        name="circuit",
        work=judge,
        hangs_on=hangs_on or ("discovery", "seed"),
        inputs=(models, request),
        after=(scores, again, *after),
        when=when,
    )
    return scores, again, circuit


def _again(label: str) -> str:
    return f"{label} other seed"


def _draws(settings: Any) -> bool:
    """Tell whether the method's scores depend on the seed."""
    from mechscope.circuits.discovery import SEEDED

    return settings.discovery.method in SEEDED


def _scores_hang_on(settings: Any) -> tuple[str, ...]:
    names = ("method", "metric", "steps", "points", "source")
    # a method that draws learns as many edges as the circuit is to have
    return (*names, "circuit_edges", "circuit_fraction", "pruning_steps", "seed") if _draws(settings) else names


def _title(names: Mapping[str, str]) -> str:
    return f"The circuit of {names['model']}"


JOB = Job(
    name="circuit",
    help="Find the circuit that does a task: score every edge, choose, and judge it beside random circuits.",
    panel="circuits",
    example="mechscope circuit gpt2 --pairs ioi --method eap-ig --out runs/circuit-ioi",
    settings=CircuitSettings,
    arguments=("model",),
    inputs=(MODELS, REQUEST),
    stages=circuit_stages(MODELS),
    sections=("circuit", "circuit-components"),
    title=_title,
    check=lambda run: check_request(run, MODELS),
)
