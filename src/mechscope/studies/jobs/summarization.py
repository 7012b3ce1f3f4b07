"""`mechscope study summarization`: what fine-tuning to summarize changed in a model, which parts it changed most, and whether LoRA belongs there (paper 1).

1. documents: load, divide, encode
2. tuned model: the one given, or fine-tuned here (full, and LoRA beside it)
3. difference: base against tuned over held-out documents; with a LoRA trained here, the two further pairs of the paper
4. selection: which layers and heads changed most, and how stable that is; controls: other trainings, and noise of the same size, measured beside it
5. reading: the roles of heads before and after, cards of the selected heads, what each layer already says of a summary
6. interventions: do these layers and heads carry what fine-tuning brought?
7. circuits: which edges bring salient content into the summary, before and after, and what changed
8. dictionaries, if wanted: what fine-tuning added, and what that carries
9. bake-off: LoRA there, in the circuit, everywhere, at random places, …, over seeds and at matched budgets
10. summaries of held-out documents, side by side
11. claims: the paper's, each with what was measured and a verdict
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from mechscope.studies.contest import bakeoff_stage, summaries_stage
from mechscope.studies.controls import controls_input, controls_stage
from mechscope.studies.feature_stages import stages as dictionary_stages
from mechscope.studies.groups import MEASURED_BY
from mechscope.studies.inputs import HELD_OUT, SPLITS, TRAINING
from mechscope.studies.job import Job, Stage
from mechscope.studies.jobs.circuit import circuit_stages
from mechscope.studies.paper_2505_17073 import claims_stage
from mechscope.studies.paper_2505_17073.inputs import (
    BASE,
    BOTH,
    GIVEN,
    PAIRS_OF_MODELS,
    PLACES,
    PLAIN_BASE,
    REQUEST,
    STUDY_MODELS,
    check_study,
)
from mechscope.studies.paper_2505_17073.settings import StudySettings
from mechscope.studies.run import JobRun, Tables
from mechscope.studies.selection import CHOSEN, control_selection_stage, selection_stage

if TYPE_CHECKING:
    from mechscope.studies.feature_difference import Request

# generated texts per role: the roles of a study are one section of many
_PROBES = 16
# tokens of a batch in which the circuit is found, where no number is given
_CIRCUIT_TOKENS = 1024


def _tune_stage(name: str, method: str, hangs_on: tuple[str, ...]) -> Stage:
    """Return the stage that fine-tunes the base into `models/<name>` of the run: fully, or by LoRA in every layer."""

    def work(run: JobRun[StudySettings]) -> None:
        from mechscope.adapt.targets import place
        from mechscope.adapt.training import tune
        from mechscope.subject import Components

        settings, subject, splits = run.settings, run[BASE], run[TRAINING]
        lora, folder = settings.lora, run.folder.path / "models" / name
        everywhere = Components.of_layers(range(subject.anatomy.n_layers))
        tune(
            subject,
            splits.encoded["train"].examples,
            splits.encoded["validation"].examples,
            folder,
            method="full" if method == "full" else "lora",
            placed=None if method == "full" else place(subject, everywhere, rank=lora.rank, modules=lora.lora_modules),
            scaling=lora.lora_scaling,
            dropout=lora.lora_dropout,
            settings=settings.training,
            replace=True,
            execution=run.execution,
        )
        run.stage.add(folder)

    return Stage(
        name=f"tune_{name}",
        work=work,
        hangs_on=("training", "seed", *hangs_on),
        inputs=(BASE, TRAINING),
        when=lambda settings: settings.tuned is None,
    )


def _difference(run: JobRun[StudySettings]) -> Tables:
    from mechscope.studies.difference import measure_difference

    pairs = run[PAIRS_OF_MODELS]
    further = {name: pair for name, pair in pairs.items() if name}
    encoded = run[HELD_OUT].encoded
    return measure_difference(pairs[""], encoded, settings=run.settings, stage=run.stage, further=further, execution=run.execution)


def _roles(run: JobRun[StudySettings]) -> Tables:
    from mechscope.studies.roles import role_tables

    return role_tables(run[BOTH], run[HELD_OUT].first(run.settings.role_documents), probes=_PROBES, execution=run.execution)


def _cards(run: JobRun[StudySettings]) -> Tables:
    from mechscope.studies.roles import head_cards

    return head_cards(run[BOTH], run[HELD_OUT].pairs, run[CHOSEN].heads, roles=run.table("head_roles"), execution=run.execution)


def _attention(run: JobRun[StudySettings]) -> Tables:
    from mechscope.studies.roles import attention_tables

    return attention_tables(run[BOTH], run[HELD_OUT].encoded.examples[:1], run[CHOSEN].heads, execution=run.execution)


def _lens(run: JobRun[StudySettings]) -> Tables:
    from mechscope.studies.lens import LensRequest, lens_tables

    texts = run[HELD_OUT].first(run.settings.lens_documents).pairs
    return lens_tables(run[BOTH], LensRequest(texts, attribution="target-logit"), execution=run.execution)


def _causal(run: JobRun[StudySettings]) -> Tables:
    from mechscope.studies.causal import measure_importance

    settings = run.settings
    return measure_importance(
        run[PAIRS_OF_MODELS][""],
        run[HELD_OUT].pairs.first(settings.causal_documents),
        run[CHOSEN],
        run.tables(("heads", "layers")),
        rows=settings.rows,
        source=settings.ablation,
        random_sets=settings.random_sets,
        execution=run.execution,
    )


def _circuit_change(run: JobRun[StudySettings]) -> Tables:
    from mechscope.studies.circuit_change import compare_circuits
    from mechscope.studies.circuits import read_circuits

    request = run[REQUEST]
    if request is None:
        return {}
    execution = replace(run.execution, tokens_per_batch=run.execution.tokens(_CIRCUIT_TOKENS))
    return compare_circuits(run[PAIRS_OF_MODELS][""], read_circuits(run.folder, ["base", "tuned"]), request, execution=execution)


def _comparison(run: JobRun[StudySettings]) -> Request:
    from mechscope.data.pairs import from_examples
    from mechscope.studies.feature_difference import Request

    learned = from_examples(run[TRAINING].encoded["train"], run[TRAINING].corpora["train"].source)
    return Request(run, run.settings.comparison, run[PAIRS_OF_MODELS][""], learned, run[HELD_OUT].pairs)


def _causal_hangs_on(settings: StudySettings) -> tuple[str, ...]:
    # values are resampled among the texts of a batch
    batch = ("tokens_per_batch",) if settings.ablation == "resample" else ()
    return ("causal_documents", "ablation", "random_sets", "rows", "seed", *batch)


def _reads_roles(settings: StudySettings) -> bool:
    return settings.roles


def _by_dictionaries(settings: StudySettings) -> bool:
    return settings.dictionaries


def _finds_circuit(settings: StudySettings) -> bool:
    return settings.circuit


TUNED = _tune_stage("tuned", "full", ())
LORA = _tune_stage("lora", "lora", ("lora",))
DIFFERENCE = Stage(
    name="difference",
    work=_difference,
    hangs_on=MEASURED_BY,
    inputs=(PAIRS_OF_MODELS, HELD_OUT),
)
SELECTION = selection_stage(DIFFERENCE)
CONTROLS = controls_stage(PAIRS_OF_MODELS, HELD_OUT, controls_input(PAIRS_OF_MODELS, name=""), DIFFERENCE, name="")
CONTROL_SELECTION = control_selection_stage(CONTROLS)
ROLES = Stage(name="roles", work=_roles, hangs_on=("role_documents", "seed"), inputs=(BOTH, HELD_OUT), when=_reads_roles)
CARDS = Stage(name="cards", work=_cards, inputs=(BOTH, HELD_OUT, CHOSEN), after=(ROLES,), when=_reads_roles)
ATTENTION = Stage(name="attention", work=_attention, inputs=(BOTH, HELD_OUT, CHOSEN), when=_reads_roles)
LENS = Stage(name="lens", work=_lens, hangs_on=("lens_documents",), inputs=(BOTH, HELD_OUT), when=lambda settings: settings.lens)
CAUSAL = Stage(
    name="causal",
    work=_causal,
    hangs_on=_causal_hangs_on,
    inputs=(PAIRS_OF_MODELS, HELD_OUT, CHOSEN),
    after=(DIFFERENCE,),
    when=lambda settings: settings.causal,
)
_CIRCUIT = ("circuit_method", "circuit_size", "seed")
SCORES, OTHER_SEED, CIRCUIT = circuit_stages(BOTH, REQUEST, hangs_on=_CIRCUIT, after=(ROLES,), when=_finds_circuit, tokens=_CIRCUIT_TOKENS)
CHANGE = Stage(
    name="circuit-change",
    work=_circuit_change,
    hangs_on=_CIRCUIT,
    inputs=(PAIRS_OF_MODELS, REQUEST),
    after=(SCORES, CIRCUIT),
    when=_finds_circuit,
)
DICTIONARIES = dictionary_stages(
    _comparison,
    inputs=(PAIRS_OF_MODELS, HELD_OUT, TRAINING),
    settings=("dictionary_latents", "dictionary_k", "dictionary_steps", "dictionary_batch", "dictionary_rate"),
    name="dictionaries",
    when=_by_dictionaries,
)
BAKEOFF = bakeoff_stage(PLAIN_BASE, PLACES, when=lambda settings: settings.bakeoff)
SUMMARIES = summaries_stage(STUDY_MODELS, BAKEOFF)
CLAIMS = claims_stage(DIFFERENCE, SELECTION, CONTROLS, CAUSAL, CIRCUIT, CHANGE, BAKEOFF)


JOB = Job(
    name="summarization",
    help="What fine-tuning to summarize changed, which parts it changed most, and whether LoRA belongs there.",
    panel="studies",
    example="mechscope study summarization --base gpt2 --data cnn_dailymail:3.0.0 --out runs/study",
    settings=StudySettings,
    inputs=(GIVEN, SPLITS),
    stages=(
        TUNED,
        LORA,
        DIFFERENCE,
        SELECTION,
        CONTROLS,
        CONTROL_SELECTION,
        ROLES,
        CARDS,
        ATTENTION,
        LENS,
        CAUSAL,
        SCORES,
        OTHER_SEED,
        CIRCUIT,
        CHANGE,
        *DICTIONARIES,
        BAKEOFF,
        SUMMARIES,
        CLAIMS,
    ),
    sections=(
        *("claims", "controls", "heads", "layers", "weights", "outputs", "selection", "matters"),
        *("circuit", "circuit-components", "circuit-change", "lens", "attribution", "roles", "token-attention"),
        *("feature-difference", "feature-carried", "feature-candidates", "dictionaries"),
        *("bakeoff", "samples"),
    ),
    title=lambda names: f"What fine-tuning changed in {names['base']}",
    check=check_study,
    first=lambda run: run[GIVEN]["base"],
    group="study",
    function="study",
)
