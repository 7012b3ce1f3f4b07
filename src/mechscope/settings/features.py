"""How dictionaries are trained: which tokens, what for, how long."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Lt

from mechscope.choices import End, Norms, Penalty
from mechscope.settings import Count, Number, Rate, Settings, ShareBelowOne, setting

# the rate that suits 2^14 latents; wider dictionaries want lower ones (Gao et al. 2024, figure 3)
_RATE, _RATE_LATENTS = 2e-4, 2**14
# a silent latent is dead after so many tokens, or this share of all where that is fewer
_DEAD_AFTER, _DEAD_SHARE = 10_000_000, 0.1


@dataclass(frozen=True, kw_only=True)
class TokenSettings(Settings):
    """Which tokens are left out."""

    panel: ClassVar[str] = "Activations"

    first: Count = setting(1, "Tokens at the beginning of each text that are left out: the first holds an attention sink.")
    outlier: Rate | None = setting(10.0, "Norm, in medians, above which a token is left out; none to keep all.")


@dataclass(frozen=True, kw_only=True)
class HarvestSettings(TokenSettings):
    """Which tokens, and how they are kept."""

    panel: ClassVar[str] = "Activations"

    rows: Number = setting(65_536, "Tokens of a block of activations, about.")
    precision: Literal["float16", "bfloat16", "float32"] = setting("float16", "Type of the activations on disk.")


@dataclass(frozen=True, kw_only=True)
class FeatureTraining(Settings):
    """How long and how fast."""

    panel: ClassVar[str] = "Training of dictionaries"

    steps: Number = setting(10_000, "Steps of training.")
    batch: Number = setting(2048, "Tokens of a step.")
    learning_rate: Rate | None = setting(None, "Peak learning rate; by default 2e-4 / √(latents / 16,384).")
    warm_up: ShareBelowOne = setting(0.05, "Share of the steps in which the learning rate rises.")
    decay: ShareBelowOne = setting(0.2, "Share of the steps, the last, in which it falls to zero.")
    clip: Rate = setting(1.0, "Norm at which the gradient is clipped.")
    momentum: Annotated[float, Ge(0), Lt(1)] = setting(0.9, "Adam's first decay.")

    def rate(self, latents: int) -> float:
        """Return the peak learning rate of a dictionary."""
        return self.learning_rate or _RATE / math.sqrt(latents / _RATE_LATENTS)

    def pace(self, at: int) -> float:
        """Return the learning rate of a step as a share of the peak."""
        rise, fall = self.warm_up * self.steps, self.decay * self.steps
        up = min(1.0, (at + 1) / rise) if rise else 1.0
        return min(up, (self.steps - at) / fall) if fall else up


@dataclass(frozen=True, kw_only=True)
class Objective(Settings):
    """The terms of the loss (`mechscope.features.objective`)."""

    panel: ClassVar[str] = "Objective"

    sparsity: Annotated[float, Ge(0)] = setting(
        0.0, "Weight λ of the sparsity penalty: above 0 for relu, gated and jumprelu; rules with k have none."
    )
    penalty: Penalty | None = setting(None, "Which penalty; by default l1 for relu and gated, target for jumprelu.")
    target: Rate = setting(20.0, "Active latents per token that the penalty `target` aims at.")
    steepness: Rate = setting(4.0, "How steep the penalty `tanh` is: its c.")
    bandwidth: Rate = setting(0.001, "Width ε of the window in which JumpReLU's thresholds feel a gradient.")
    # sizes of the nested dictionaries, the last of them all latents; none for one dictionary: no flag, as they are of one width
    prefixes: tuple[int, ...] = field(default=())
    aux_weight: Annotated[float, Ge(0)] = setting(1 / 32, "Weight of AuxK; 0 for no revival.")
    aux_k: Number | None = setting(
        None, "Dead latents that take part for each token; by default an eighth of them, half of the width at most."
    )
    dead_after: Number | None = setting(
        None, "Tokens after which a silent latent counts as dead; by default 10 million, or a tenth of the training's where that is fewer."
    )
    reconstruction: Annotated[float, Ge(0)] = setting(1.0, "Weight of the squared error of the reconstruction.")
    end: End = setting(
        "none",
        "What is kept of the model's predictions, with the reconstruction in the place of what it holds: nothing, kl (from its own), or loss (of next tokens).",
    )
    end_weight: Rate = setting(1.0, "Weight of that, per nat.")
    norms: Norms = setting("unit", "Decoders of norm one, or free ones whose norm stands in penalties and comparisons.")

    def patience(self, training: FeatureTraining) -> int:
        """Return after how many tokens a silent latent counts as dead."""
        return self.dead_after or max(1, min(_DEAD_AFTER, round(_DEAD_SHARE * training.steps * training.batch)))


@dataclass(frozen=True, kw_only=True)
class DashboardSettings(Settings):
    """What a dashboard shows of each latent."""

    panel: ClassVar[str] = "Dashboard"

    latents: Number = setting(2000, "Latents that are shown: those that carry most of what the dictionary writes.")
    examples: Number = setting(8, "Examples of a latent with the largest activations, each from another text.")
    of_decile: Count = setting(2, "Random examples of each tenth of a latent's activations; 0 for none.")
    drawn: Number = setting(60, "Random activations of a latent of which its tenths are made.")
    before: Count = setting(16, "Tokens shown before an example's own.")
    after: Count = setting(8, "Tokens shown behind it.")
    sample: Count = setting(16_384, "Random tokens on which latents are correlated with one another and with heads; 0 for no correlations.")
    related: Number = setting(5, "Latents, and heads, listed as going with a latent.")


@dataclass(frozen=True, kw_only=True)
class ConceptSettings(Settings):
    """How it is measured what latents stand for, on texts of which something is known."""

    panel: ClassVar[str] = "Concepts"

    # latents that a sparse probe reads, and that are taken out for SCR and TPP: no flags
    probe_latents: tuple[int, ...] = field(default=(1, 2, 5))
    removed_latents: tuple[int, ...] = field(default=(2, 5, 20))
    judged_share: ShareBelowOne = setting(0.4, "Share of the labelled texts that concepts are judged on and not learned from.")
    tokens_held: Number = setting(20_000, "Tokens of the labelled texts that absorption is measured on.")


@dataclass(frozen=True, kw_only=True)
class ExplainSettings(Settings):
    """What units are explained from and judged on."""

    panel: ClassVar[str] = "Explaining"

    examples: Number = setting(
        20, "Windows in which a unit is active that it is explained from: half of them its largest, the others random."
    )
    windows: Number = setting(
        20, "Held-out windows in which it is active, and as many in which it is silent, that an explanation is judged on."
    )
    window: Number = setting(32, "Tokens of a window.")
    longest: Number = setting(2, "Tokens of an n-gram of the baseline at most.")
    active_share: ShareBelowOne = setting(0.01, "Share of the tokens, its largest, in which a neuron or a head counts as active.")
