"""`mechscope groundtruth`: a small GPT-2 whose circuit is written into its weights, with that circuit and with texts for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from mechscope.errors import SettingsError
from mechscope.settings import Count, Number, Settings, setting
from mechscope.studies.job import Job, Stage
from mechscope.studies.run import JobRun, Tables

if TYPE_CHECKING:
    from mechscope.groundtruth import GroundTruth


@dataclass(frozen=True, kw_only=True)
class GroundTruthSettings(Settings):
    """What is written, and among what."""

    panel: ClassVar[str] = "Ground truth"

    name: str = setting(..., "What the model does: induction, names (indirect objects), brackets or counting (modulo three).")
    sharpness: float = setting(
        60.0,
        "Attention score of what a head looks for: at 60 the model is exact, and gradients at the clean run see nothing of queries and keys.",
    )
    heads: Number = setting(4, "Heads of each layer; those that the program does not use are distractors.")
    pairs: Number = setting(100, "Prompt pairs that are written beside the model.")
    seed: Count = setting(0, "Seed of the texts, and of what distractors read.")

    def __post_init__(self) -> None:
        """Refuse a program that is not known.

        Raises:
            SettingsError: There is none of that name, or the sharpness is not above zero.
        """
        super().__post_init__()
        if self.name not in NAMES:
            raise SettingsError(f"ground truth {self.name!r} is not known: choose {', '.join(NAMES)}")
        if not self.sharpness > 0:
            raise SettingsError(f"sharpness is {self.sharpness:g}: it must be above 0")


NAMES = ("induction", "names", "brackets", "counting")
"""Programs by name, so that they can be checked before torch is loaded."""


def _truth(settings: GroundTruthSettings) -> GroundTruth:
    from mechscope.groundtruth import ground_truth

    return ground_truth(settings.name, sharpness=settings.sharpness, heads=settings.heads, seed=settings.seed)


def _written(run: JobRun[GroundTruthSettings]) -> Tables:
    import json

    import pandas as pd

    from mechscope.circuits import to_json

    truth = _truth(run.settings)
    program, pairs, tokenizer = truth.program, truth.pairs(run.settings.pairs, seed=run.settings.seed), truth.tokenizer()
    folder = run.folder.path / "model"
    model = program.model()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    run.stage.add(folder)
    told = {*program.circuit.names}
    edges = pd.DataFrame([{"edge": edge, "carries": ", ".join(carried), "told": edge in told} for edge, carried in program.edges.items()])
    edges["program"], edges["of"] = run.settings.name, len(program.graph)
    run.stage.write_text("circuit.txt", "".join(f"{edge}\n" for edge in program.circuit.names))
    run.stage.write_text("circuit.json", to_json(program.circuit, d_model=model.config.n_embd, model=f"ground truth {run.settings.name}"))
    rows = [
        {
            "id": pair.id,
            # the tokenizer sets the start token itself
            **{side: " ".join(program.words[token] for token in getattr(pair, side)[1:]) for side in ("clean", "corrupt")},
            **{side: [f" {program.words[token]}" for token in getattr(pair, side)] for side in ("answers", "wrong_answers")},
        }
        for pair in pairs
    ]
    run.stage.write_text("pairs.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    run.folder.record("notes", {"what it does": truth.what, "pairs": len(pairs), "variables": program.all_sizes})
    return {"ground_truth": edges[["program", "edge", "carries", "told", "of"]]}


def _check(run: JobRun[GroundTruthSettings]) -> None:
    _truth(run.settings)


def _title(names: Mapping[str, Any]) -> str:
    return "A model whose circuit is known"


JOB = Job(
    name="groundtruth",
    help="Write a small GPT-2 whose circuit is known, with texts for it, to judge methods of circuit discovery by.",
    panel="circuits",
    example="mechscope groundtruth induction --out runs/induction",
    settings=GroundTruthSettings,
    arguments=("name",),
    stages=(Stage(name="ground_truth", work=_written, hangs_on=("name", "sharpness", "heads", "pairs", "seed"), alone=True),),
    sections=("ground-truth",),
    title=_title,
    check=_check,
    function="write_groundtruth",
)
