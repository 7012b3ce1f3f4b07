"""`mechscope benchmark circuits`: methods of circuit discovery on models whose circuit is written into their weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from mechscope.errors import SettingsError
from mechscope.settings import Count, Number, Settings, setting
from mechscope.studies.job import Job, Stage
from mechscope.studies.jobs.groundtruth import NAMES
from mechscope.studies.pairs import split_names
from mechscope.studies.run import JobRun, Tables

if TYPE_CHECKING:
    from mechscope.groundtruth import GroundTruth


@dataclass(frozen=True, kw_only=True)
class BenchmarkSettings(Settings):
    """Which methods, on which models."""

    panel: ClassVar[str] = "Benchmark"

    programs: str = setting("all", f"Programs, joined by commas: {', '.join(NAMES)}; or all.")
    methods: str = setting("all", "Methods of discovery, as for mechscope circuit, joined by commas; or all.")
    sharpness: str = setting("60,8", "Attention scores of what heads look for, joined by commas; each program is written with every one.")
    heads: Number = setting(4, "Heads of each layer; those that a program does not use are distractors.")
    pairs: Number = setting(40, "Prompt pairs that edges are scored on; as many others judge how faithful the circuits are.")
    steps: Number = setting(5, "Points of integrated gradients.")
    pruning_steps: Number = setting(200, "Steps of edge pruning.")
    draws: Number = setting(1000, "Random orders of the edges, for the AUROC that chance reaches.")
    tokens_per_batch: Number | None = setting(None, "Most tokens of a batch, padding included; decides the memory.")
    seed: Count = setting(0, "Seed of texts, distractors, random orders, and of methods that draw.")

    def __post_init__(self) -> None:
        """Refuse what is not known.

        Raises:
            SettingsError: A program, a method or a sharpness is not known, or none is named.
        """
        super().__post_init__()
        for name in ("programs", "methods"):
            known = _known(name)
            if strange := [one for one in self.chosen(name) if one not in known]:
                raise SettingsError(f"setting {name!r} names {', '.join(strange)}: known are {', '.join(known)}")
        if not self.softness:
            raise SettingsError(f"setting 'sharpness' is {self.sharpness!r}: give numbers above 0, joined by commas, such as 60,8")

    def chosen(self, name: str) -> tuple[str, ...]:
        """Return the programs or the methods.

        Raises:
            SettingsError: None is named.
        """
        if getattr(self, name) == "all":
            return _known(name)
        if not (found := tuple(dict.fromkeys(split_names(getattr(self, name))))):
            raise SettingsError(f"setting {name!r} names none: choose among {', '.join(_known(name))}, or all")
        return found

    @property
    def softness(self) -> tuple[float, ...]:
        """The attention scores; empty where they are not numbers above zero."""
        try:
            found = tuple(dict.fromkeys(float(part) for part in split_names(self.sharpness)))
        except ValueError:
            return ()
        return found if all(0 < one < float("inf") for one in found) else ()


def _known(name: str) -> tuple[str, ...]:
    from typing import get_args

    from mechscope.choices import DiscoveryMethod

    # a union of literals is flat
    return NAMES if name == "programs" else tuple(get_args(DiscoveryMethod))


def _models(settings: BenchmarkSettings) -> dict[str, GroundTruth]:
    """Return the programs by name and sharpness; once where nothing hangs on it."""
    from mechscope.groundtruth import ground_truth

    found = {}
    for name in settings.chosen("programs"):
        for sharpness in settings.softness[: None if name != "counting" else 1]:
            truth = ground_truth(name, sharpness=sharpness, heads=settings.heads, seed=settings.seed)
            found[f"{name}, sharpness {sharpness:g}" if name != "counting" else name] = truth
    return found


def _check(run: JobRun[BenchmarkSettings]) -> None:
    for truth in _models(run.settings).values():
        truth.pairs(2 * run.settings.pairs, seed=run.settings.seed)


def _scored(run: JobRun[BenchmarkSettings]) -> Tables:
    from mechscope.groundtruth.benchmark import benchmark_methods

    settings = run.settings
    return {
        "circuit_benchmark": benchmark_methods(
            _models(settings),
            settings.chosen("methods"),
            pairs=settings.pairs,
            steps=settings.steps,
            pruning_steps=settings.pruning_steps,
            draws=settings.draws,
            execution=run.execution,
        )
    }


def _title(names: Any) -> str:
    return "Methods of circuit discovery where the circuit is known"


JOB = Job(
    name="benchmark-circuits",
    help="Judge every method of circuit discovery on models whose circuit is known.",
    panel="circuits",
    group="benchmark",
    example="mechscope benchmark circuits --programs induction,names --methods eap,eap-ig --out runs/methods",
    settings=BenchmarkSettings,
    stages=(
        Stage(
            name="circuit_benchmark",
            work=_scored,
            hangs_on=("programs", "methods", "sharpness", "heads", "pairs", "steps", "pruning_steps", "draws", "seed"),
            alone=True,
        ),
    ),
    sections=("circuit-benchmark",),
    title=_title,
    check=_check,
)
