"""The claims of paper 1 (arXiv 2505.17073) beside what was measured, with a verdict each, from tables alone.

A verdict is `supported` or `contradicted` only where a 95 % interval lies wholly on one side of a threshold stated in the claim's own
words; otherwise `undecided`, also where nothing was measured. A pair of models that does not differ has the verdict `no change`. Every row names its
unit: what was observed several times independently. A claim about fine-tuning is decided by trainings, never by documents alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pandas as pd

from mechscope.errors import SettingsError
from mechscope.studies.paper_2505_17073 import attention, circuits, interventions, training
from mechscope.studies.paper_2505_17073.judgement import Judgement, Scope, Tables, Verdict

# below these (nats) two models attend alike: the rounding of one float32 forward pass
SAME_KL, SAME_ENTROPY = 1e-6, 1e-5

_ALIKE = f"The two models attend alike (every head's KL below {SAME_KL:g} nats): there is nothing to rank or to count."
_PICKED = "The layers and heads were picked from models that do not differ, so the choice means nothing."


@dataclass(frozen=True)
class Claim:
    """A claim, and how it is judged.

    Attributes:
        name: Its name in the table.
        needs: Tables it is judged by. What `judge` makes of it where some are missing is its own affair.
        judge: Judges it by those of its tables that there are; None where there is nothing to say.
        where_alike: Verdict and note where the two models attend alike; None for claims that do not depend on it.
    """

    name: str
    needs: tuple[str, ...]
    judge: Callable[[Tables, Scope], Judgement | None]
    where_alike: tuple[Verdict, str] | None = None


def _of_attention(name: str, judge: Callable[[Tables, Scope], Judgement | None]) -> Claim:
    needs = ("heads", "layers", "selection", "controls", "control_heads", "control_layers")
    return Claim(name, needs, judge, ("no change", _ALIKE))


def _of_training(name: str, judge: Callable[[Tables, Scope], Judgement | None]) -> Claim:
    return Claim(name, ("bakeoff", "bakeoff_summary", "learning_curves"), judge, ("undecided", _PICKED))


CLAIMS = (
    _of_attention("most_changed_layers", attention.most_changed_layers),
    _of_attention("heads_focused_all", attention.heads_focused),
    _of_attention("heads_focused_selected", attention.selected_heads_focused),
    _of_attention("change_concentrated", attention.change_concentrated),
    _of_attention("heads_focused_all.noise", attention.heads_focused_beyond_noise),
    _of_attention("change_concentrated.noise", attention.concentrated_beyond_noise),
    Claim("layers_carry_improvement", ("layer_sets", "importance"), interventions.layers_carry, ("undecided", _PICKED)),
    Claim("selected_heads_matter", ("ablation",), interventions.heads_matter, ("undecided", _PICKED)),
    *(
        _of_training(f"{name}.{protocol}", partial(judge, protocol=protocol))
        for protocol in training.PROTOCOLS
        for name, judge in (
            ("targeted_vs_standard", training.versus_standard),
            ("targeted_vs_random", training.versus_random),
            ("fewer_steps", training.fewer_steps),
        )
    ),
    _of_training("fewer_parameters", training.fewer_parameters),
    _of_training("circuit_vs_standard.equal_parameters", training.circuit_versus_standard),
    _of_training("circuit_vs_random.equal_parameters", training.circuit_versus_random),
    Claim("circuit_changed", ("circuit_overlap", "circuit_summary"), circuits.circuit_changed),
    Claim("few_edges_carry_gain", ("circuit_gain",), circuits.few_edges_carry_gain),
)
"""Every claim, in the order of the table."""

NEEDED = tuple(dict.fromkeys(name for claim in CLAIMS for name in claim.needs))
"""The tables that claims are judged by."""


def claims_table(
    tables: Tables, *, rows: str = "all", rule: str = "layers_by_kl", metric: str = "rougeL", margin: float = 0.005
) -> pd.DataFrame:
    """Build the table `claims`.

    Args:
        tables: Tables by name: `heads`, `layers` and `selection`; others as far as they were measured.
        rows: Which query rows' statistics to use.
        rule: The rule of layers that "selected layers" means.
        metric: The ROUGE score that decides.
        margin: By how much of that score (a fraction) targeted LoRA may fall behind standard LoRA and still count as equal.

    Returns:
        One row per claim: `claim`, `statement`, `paper`, `measured`, `value`, `low`, `high`, `verdict`, `note`, `unit`, `overturn`.

    Raises:
        SettingsError: A table lacks the rows or the rule.
    """
    scope = Scope(rows, rule, metric, margin)
    alike = _attend_alike(tables, scope)
    judged = []
    for claim in CLAIMS:
        judgement = claim.judge({name: tables[name] for name in claim.needs if name in tables}, scope)
        if judgement is not None and claim.where_alike is not None and alike:
            verdict, note = claim.where_alike
            judgement = judgement.replaced(verdict=verdict, note=note, overturn="Two models that differ.")
        if judgement is not None:
            judged.append(judgement.row(claim.name))
    return pd.DataFrame(judged)


def _attend_alike(tables: Tables, scope: Scope) -> bool:
    """Tell whether no head attends otherwise after fine-tuning, having checked that the tables can be judged by."""
    for name in ("heads", "layers"):
        if not (tables[name]["rows"] == scope.rows).any():
            known = ", ".join(sorted(tables[name]["rows"].unique()))
            raise SettingsError(f"the {name} table has no rows={scope.rows!r}: use one of {known}")
    selection = tables["selection"]
    chosen = selection[selection["rule"] == scope.rule]
    if not chosen["chosen"].any() or (chosen["kind"] != "layer").any():
        raise SettingsError(
            f"the selection table has no layers chosen by {scope.rule!r}: name a rule of layers that it has "
            f"({', '.join(sorted(selection['rule'].unique()))})"
        )
    heads = tables["heads"][tables["heads"]["rows"] == scope.rows]
    kl, entropy = (heads[name].abs() for name in ("kl_base_tuned", "entropy_change"))
    # what was not measured is not alike
    return bool((kl < SAME_KL).any() and not ((kl >= SAME_KL).any() or (entropy >= SAME_ENTROPY).any()))
