"""What a dictionary is trained for: reconstruction, sparsity, and the revival of latents that fell silent.

    reconstruction   mean over tokens of Σ_d (v − v̂)²; with `prefixes` the mean of that over nested dictionaries (Matryoshka, Bussmann et al. 2025)
    sparsity         λ times a mean over tokens, by `penalty`:
                     l1       Σ_j f_j ‖D_j‖ (of a gate's pre-activations for `gated`)
                     l0       number of active latents                                  step with straight-through gradients (JumpReLU)
                     tanh     Σ_j tanh(c f_j ‖D_j‖)                                     Anthropic 2025
                     target   (L0 / target − 1)²                                        the same step; says what L0 shall be, not what it costs
    revival          AuxK (Gao et al. 2024): latents that were silent for `dead_after` tokens reconstruct, the `aux_k` largest of each token, what is left
                     over, as a share of its variance; nothing of it moves living latents or the bias

    end to end       KL of the model with v̂ in the place of v from its own run (`kl`), or its loss of the next tokens (`loss`), in nats per token (Braun et al.
                     2024); `reconstruction` is then the weight of the squared error, 0 for predictions alone

All in units in which activations have mean squared norm one.
"""

from __future__ import annotations

from mechscope.choices import Penalty
from mechscope.errors import SettingsError
from mechscope.features.layout import Layout
from mechscope.settings.features import Objective

_PENALTIES: dict[str, tuple[Penalty, ...]] = {"relu": ("l1", "tanh"), "gated": ("l1",), "jumprelu": ("target", "l0", "tanh")}


def checked(objective: Objective, layout: Layout) -> Objective:
    """Return an objective, with the penalty filled in, if it suits a dictionary.

    Raises:
        SettingsError: The penalty is not one of the rule's or has no weight, or the prefixes are not those of the dictionary.
    """
    rule = layout.rule
    allowed = _PENALTIES.get(rule.name, ())
    if objective.sparsity and not allowed:
        raise SettingsError(f"rule {rule.name} has its sparsity by k={rule.k}: leave sparsity at 0")
    if allowed and not objective.sparsity:
        raise SettingsError(
            f"rule {rule.name} is sparse by a penalty ({' or '.join(allowed)}), and its weight is 0: give sparsity, such as 0.1"
        )
    if objective.penalty is not None and objective.penalty not in allowed:
        raise SettingsError(f"penalty {objective.penalty!r} does not suit rule {rule.name}: use {' or '.join(allowed) or 'none'}")
    if rule.by_norm and objective.norms == "unit":
        raise SettingsError("comparing latents by norm has no meaning where all norms are one: set norms='free', or leave by_norm out")
    rising = all(one < two for one, two in zip((0, *objective.prefixes), objective.prefixes, strict=False))
    if objective.prefixes and (not rising or objective.prefixes[-1] != layout.latents or len(layout.groups) > 1):
        raise SettingsError(
            f"prefixes {objective.prefixes} must rise to all {layout.latents} latents of a dictionary whose latents read and write the same places"
        )
    if objective.end != "none" and (
        len(layout.outputs) > 1 or layout.outputs[0].model or any(place.layer > layout.outputs[0].layer for place in layout.inputs)
    ):
        raise SettingsError(
            f"end {objective.end!r} needs a dictionary of one place of one model: this one writes {', '.join(map(str, layout.outputs))}"
        )
    if objective.end == "none" and not objective.reconstruction:
        raise SettingsError("reconstruction=0 leaves nothing to learn: set end to kl or loss too")
    penalty = objective.penalty or (allowed[0] if allowed else None)
    return objective if penalty == objective.penalty else Objective(**{**vars(objective), "penalty": penalty})


def aux_latents(objective: Objective, layout: Layout, dead: int) -> int:
    """Return how many of the dead latents take part in AuxK for each token.

    Half of the width, as in Gao et al., is meant for thousands of dead latents. Of a few, all would take part everywhere, none would become particular
    about anything, and none would come back (planted directions: 83 % recovered with all taking part, all of them with an eighth).
    """
    return min(dead, objective.aux_k or max(1, min(sum(layout.output_widths) // 2, dead // 8)))
