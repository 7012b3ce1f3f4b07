"""`mechscope study superposition`: toy models with more features than dimensions, their known answers, and a dictionary that looks for the features."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from mechscope.errors import SettingsError
from mechscope.settings import Count, Number, Settings, setting
from mechscope.studies.job import Job, Stage
from mechscope.studies.pairs import split_names
from mechscope.studies.run import JobRun, Tables

# representation from which a feature counts as held
_HELD = 0.5
# of the phase diagram: sparsities and importances of the second of two features, and trainings of each of which the best counts
_SPARSITIES = (0.0, 0.2, 0.4, 0.6, 0.75, 0.85, 0.9, 0.95, 0.98)
_IMPORTANCES = (0.1, 0.2, 0.4, 0.7, 1.0, 1.5, 2.5, 5.0, 10.0)
_TRIES = 3


@dataclass(frozen=True, kw_only=True)
class SuperpositionSettings(Settings):
    """Which toy models."""

    panel: ClassVar[str] = "Superposition"

    features: Number = setting(20, "Features.")
    dimensions: Number = setting(5, "Dimensions that they share.")
    decay: float = setting(0.9, "Importance of feature i is this to the power of i.")
    sparsities: str = setting("0,0.5,0.7,0.9,0.97,0.99", "Probabilities that a feature is zero, joined by commas.")
    seeds: Number = setting(3, "Trainings of each.")
    steps: Number = setting(4000, "Steps of each training.")
    dictionary_steps: Number = setting(2000, "Steps of the dictionary that is trained on what a toy model holds.")
    seed: Count = setting(0, "First seed.")

    def __post_init__(self) -> None:
        """Refuse what is no toy model.

        Raises:
            SettingsError: Sparsities are not probabilities below one, the decay is not above zero and at most one, or there are too many dimensions.
        """
        super().__post_init__()
        if not self.levels:
            raise SettingsError(f"setting 'sparsities' is {self.sparsities!r}: give numbers of 0 or more and below 1, joined by commas")
        if not 0 < self.decay <= 1:
            raise SettingsError(f"setting 'decay' is {self.decay:g}: it must be above 0 and at most 1")
        if self.dimensions >= self.features:
            raise SettingsError(f"{self.features} features in {self.dimensions} dimensions: give more features than dimensions")

    @property
    def levels(self) -> tuple[float, ...]:
        """The sparsities; empty where they are none."""
        try:
            found = tuple(sorted({float(part) for part in split_names(self.sparsities)}))
        except ValueError:
            return ()
        return found if all(0 <= one < 1 for one in found) else ()


def _toys(run: JobRun[SuperpositionSettings]) -> Tables:
    import pandas as pd
    import torch

    from mechscope.groundtruth.superposition import importances, recovered, train_toys
    from mechscope.instrument import Execution

    settings = run.settings
    sparsity = torch.tensor([level for level in settings.levels for _ in range(settings.seeds)])
    toys = train_toys(
        sparsity,
        importances(settings.features, settings.decay, sparsity),
        settings.dimensions,
        steps=settings.steps,
        execution=Execution(seed=settings.seed, progress=run.execution.progress),
    )
    held = toys.norms > _HELD
    models = pd.DataFrame(
        {
            "sparsity": [level for level in settings.levels for _ in range(settings.seeds)],
            "training": [*range(settings.seeds)] * len(settings.levels),
            "features": settings.features,
            "dimensions": settings.dimensions,
            "held": held.sum(1).numpy(),
            "loss": toys.loss.numpy(),
            "linear_loss": toys.linear_loss.numpy(),
            "dimensions_each": (settings.dimensions / toys.norms.square().sum(1)).numpy(),
        }
    )
    rows = []
    for at, (level, own) in enumerate(models.groupby("sparsity", sort=False)):
        run.tell("training dictionaries", at, len(settings.levels))
        best = int(own["loss"].to_numpy().argmin()) + at * settings.seeds
        cosine, by_chance = recovered(
            toys.weights[best], float(str(level)), steps=settings.dictionary_steps, execution=Execution(seed=settings.seed)
        )
        rows.append(
            pd.DataFrame(
                {
                    "sparsity": float(str(level)),
                    "feature": range(settings.features),
                    "importance": toys.importance[best].numpy(),
                    "norm": toys.norms[best].numpy(),
                    "held": held[best].numpy(),
                    "dimensionality": toys.dimensionality[best].numpy(),
                    "cosine": cosine,
                    "cosine_random": by_chance,
                }
            )
        )
    return {"superposition": models, "superposition_features": pd.concat(rows, ignore_index=True)}


def _phases(run: JobRun[SuperpositionSettings]) -> Tables:
    import pandas as pd
    import torch

    from mechscope.groundtruth.superposition import train_toys
    from mechscope.instrument import Execution

    settings = run.settings
    cells = [(level, weight) for level in _SPARSITIES for weight in _IMPORTANCES for _ in range(_TRIES)]
    sparsity, second = (torch.tensor(each) for each in zip(*cells, strict=True))
    toys = train_toys(
        sparsity,
        torch.stack([torch.ones_like(second), second], dim=1),
        1,
        steps=settings.steps // 2 or 1,
        batch=512,
        execution=Execution(seed=settings.seed, progress=run.execution.progress),
    )
    found = pd.DataFrame(cells, columns=["sparsity", "importance"])
    found[["first", "second"]] = toys.norms.numpy()
    # two features that share the dimension stand against each other
    both = (toys.norms > _HELD).all(1).numpy()
    found["state"] = [
        "antipodal pair" if pair else "the second alone" if two > one else "the first alone"
        for pair, one, two in zip(both, found["first"], found["second"], strict=True)
    ]
    found["loss"] = toys.loss.numpy()
    best = found.loc[found.groupby(["sparsity", "importance"], sort=False)["loss"].idxmin()]
    return {"superposition_phases": best.assign(n=_TRIES).reset_index(drop=True)}


def _title(names: Mapping[str, Any]) -> str:
    return "Superposition in toy models"


JOB = Job(
    name="superposition",
    help="Train toy models with more features than dimensions, beside their known answers, and a dictionary that looks for the features.",
    panel="studies",
    group="study",
    example="mechscope study superposition --out runs/superposition",
    settings=SuperpositionSettings,
    stages=(
        Stage(
            name="superposition",
            work=_toys,
            hangs_on=("features", "dimensions", "decay", "sparsities", "seeds", "steps", "dictionary_steps", "seed"),
            alone=True,
        ),
        Stage(name="superposition_phases", work=_phases, hangs_on=("steps", "seed"), alone=True),
    ),
    sections=("superposition",),
    title=_title,
    function="study_superposition",
)
