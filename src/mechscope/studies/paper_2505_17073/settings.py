"""What a summarization study is told: every part of it, with the settings of the techniques it uses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Gt, Le

from mechscope.choices import DiscoveryMethod
from mechscope.errors import SettingsError
from mechscope.settings import Number, Rate, Settings, setting
from mechscope.settings.discovery import DiscoverySettings
from mechscope.settings.features import FeatureTraining
from mechscope.studies.contest import Contested
from mechscope.studies.controls import Controlled
from mechscope.studies.feature_settings import DictionaryComparison
from mechscope.studies.groups import Loading, Measuring, Selecting

# random circuits of each size in a whole study
_RANDOM_CIRCUITS = 5


@dataclass(frozen=True, kw_only=True)
class Interventions(Settings):
    """How it is tested whether what changed matters."""

    panel: ClassVar[str] = "Interventions"

    causal: bool = setting(True, "Test by interventions which layers and heads carry the gain.")
    causal_documents: Number = setting(16, "Held-out documents for the interventions.")
    ablation: Literal["mean", "resample", "zero"] = setting("mean", "What ablated heads are replaced by.")
    random_sets: Number = setting(200, "Random head sets that the ablation of the selected heads is compared with.")


@dataclass(frozen=True, kw_only=True)
class CircuitOfSummaries(Settings):
    """How the circuit of summarizing is found before and after fine-tuning."""

    panel: ClassVar[str] = "Circuit"

    circuit: bool = setting(True, "Find the circuit of summarizing in both models and compare them.")
    circuit_documents: Number = setting(32, "Held-out documents for it, each beside a version that lacks its salient sentence.")
    circuit_method: DiscoveryMethod = setting("eap-ig", "How edges are scored, as for `mechscope circuit --method`.")
    circuit_size: Annotated[float, Gt(0), Le(1)] | None = setting(
        None, "Share of all edges in the circuit; by default the smallest that is 90\u202f% faithful."
    )

    @property
    def discovery(self) -> DiscoverySettings:
        """How the circuit is found and judged: by the loss on the summary."""
        return DiscoverySettings(
            method=self.circuit_method,
            metric="loss",
            circuit_fraction=self.circuit_size,
            random_circuits=_RANDOM_CIRCUITS,
            criteria=False,
        )


@dataclass(frozen=True, kw_only=True)
class Reading(Settings):
    """What is read off the models beside the difference: the roles of their heads, and what each layer already knows of a summary."""

    panel: ClassVar[str] = "Roles and lens"

    roles: bool = setting(True, "Score the roles of all heads in both models (previous-token, induction, retrieval, …).")
    role_documents: Number = setting(32, "Held-out documents for the roles that are about documents.")
    lens: bool = setting(True, "Read both models' layers with the logit lens.")
    lens_documents: Number = setting(16, "Held-out documents for it; the first is shown token by token.")


@dataclass(frozen=True, kw_only=True)
class ByDictionaries(Settings):
    """Whether the models are compared by dictionaries too, and by how large ones."""

    panel: ClassVar[str] = "Dictionaries"

    dictionaries: bool = setting(
        False, "Also find what fine-tuning added by dictionaries, beside controls, as `mechscope features diff` does."
    )
    dictionary_latents: Number = setting(4096, "Latents of a dictionary.")
    dictionary_k: Number = setting(32, "Active latents of a token.")
    dictionary_steps: Number = setting(10_000, "Steps of their training.")
    dictionary_batch: Number = setting(2048, "Tokens of a step.")
    dictionary_rate: Rate | None = setting(None, "Their peak learning rate; by default 2e-4 / √(latents / 16,384).")

    @property
    def comparison(self) -> DictionaryComparison:
        """The comparison by dictionaries; what is not set here is as `mechscope features diff` has it."""
        training = FeatureTraining(steps=self.dictionary_steps, batch=self.dictionary_batch, learning_rate=self.dictionary_rate)
        return DictionaryComparison(latents=self.dictionary_latents, k=self.dictionary_k, training=training)


@dataclass(frozen=True, kw_only=True)
class StudySettings(Loading, Contested, Measuring, Selecting, Controlled, Interventions, CircuitOfSummaries, Reading, ByDictionaries):
    """Which models, and which parts of the study."""

    panel: ClassVar[str] = "Study"

    base: str = setting(..., "The pre-trained model: hub id, directory, or adapter.")
    tuned: str | None = setting(None, "The fine-tuned model or adapter; without, one is fine-tuned here (full and LoRA).")
    resize: Literal["refuse", "truncate"] = setting("refuse", "Vocabularies of different size: refuse, or compare the shared tokens.")
    bakeoff: bool = setting(True, "Run the bake-off of LoRA placements.")

    def __post_init__(self) -> None:
        """Refuse what would fail after hours of other stages.

        Raises:
            SettingsError: A setting is out of bounds or contradicts another, or batches cannot be shared by the ranks.
        """
        super().__post_init__()
        if self.circuit:
            _ = self.discovery  # making it raises what is wrong with it
        if self.bakeoff or self.tuned is None:
            self.training.check_ranks()
        if self.dictionaries and self.dictionary_k > self.dictionary_latents:
            raise SettingsError(
                f"dictionary_k={self.dictionary_k} of {self.dictionary_latents} latents cannot be active: give more latents"
            )
        for strategy in ("circuit", "random_circuit"):
            if self.bakeoff and strategy in self.contest.named_strategies and not self.circuit and self.contest.target_circuit is None:
                raise SettingsError(
                    f"the strategy {strategy} needs a circuit: name one with target_circuit, or leave either the strategy or --no-circuit out"
                )
