"""Which layers and heads changed most: the table `selection`, and what a study's own rules choose from it.

Light at import, so that jobs can name the stage: what is heavy is imported where it is used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mechscope.errors import SettingsError
from mechscope.studies.groups import Selecting
from mechscope.studies.job import Stage
from mechscope.studies.run import Input, JobRun, Tables

if TYPE_CHECKING:
    import pandas as pd

    from mechscope.subject import Components
    from mechscope.subject.anatomy import Anatomy


@dataclass(frozen=True)
class Chosen:
    """The most changed layers and heads."""

    layers: Components
    heads: Components


def check_selection(settings: Selecting, anatomy: Anatomy) -> None:
    """Refuse to select more than a model has.

    Raises:
        SettingsError: It has not as many layers or heads.
    """
    for kind, number, most in (
        ("layers", settings.selected_layers, len(anatomy.attending)),
        ("heads", settings.selected_heads, len(anatomy.attending) * anatomy.n_heads),
    ):
        if number is not None and number > most:
            raise SettingsError(f"setting 'selected_{kind}' is {number}: this model has {most} {kind}, choose 1 to {most}")


def selection_stage(difference: Stage) -> Stage:
    """Return the stage that ranks layers and heads by every rule, from the tables of a difference."""
    return Stage(
        name="selection",
        work=_select,
        hangs_on=("selected_layers", "selected_heads", "rows", "seed"),
        after=(difference,),
        alone=True,
    )


def _select(run: JobRun[Any]) -> Tables:
    from mechscope.difference.selection import selection_table
    from mechscope.studies.difference import RESAMPLED

    settings = run.settings
    tensors, _ = run.folder.tensors("replicates")
    table = selection_table(
        run.table("heads"),
        run.table("layers"),
        {name: tensors[f"{name}.{settings.rows}"].numpy() for name in RESAMPLED},
        n_selected_layers=settings.selected_layers,
        n_selected_heads=settings.selected_heads,
        seed=settings.seed,
        rows=settings.rows,
    )
    return {"selection": table}


def control_selection_stage(controls: Stage) -> Stage:
    """Return the stage that asks what every rule would choose if a control were the tuned model, from the tables of controls."""
    return Stage(
        name="control_selection",
        work=_select_controls,
        hangs_on=("selected_layers", "selected_heads", "rows", "seed"),
        after=(controls,),
        when=lambda settings: settings.has_controls,
        alone=True,
    )


def _select_controls(run: JobRun[Any]) -> Tables:
    import pandas as pd

    from mechscope.difference.selection import selection_table
    from mechscope.studies.control_tables import beside_columns, of_each

    settings = run.settings
    tables = [
        beside_columns(
            selection_table(
                heads,
                layers,
                n_selected_layers=settings.selected_layers,
                n_selected_heads=settings.selected_heads,
                seed=settings.seed,
                rows=settings.rows,
            ).drop(columns=["frequency", "n_resamples"]),
            named,
        )
        for named, (heads, layers) in of_each(run.tables(("control_heads", "control_layers")))
    ]
    return {"control_selection": pd.concat(tables, ignore_index=True)}


def _chosen(run: JobRun[Any]) -> Chosen:
    table = run.table("selection")
    return Chosen(chosen_by(table, run.settings.layer_rule), chosen_by(table, run.settings.head_rule))


CHOSEN: Input[Chosen] = Input("chosen", _chosen, lambda chosen: [str(chosen.layers), str(chosen.heads)])
"""What the run's own rules choose; known once its selection is done."""


def chosen_by(selection: pd.DataFrame, rule: str) -> Components:
    """Return the layers or heads that a rule chose, from the table `selection`."""
    from mechscope.subject import Components

    table = selection[(selection["rule"] == rule) & selection["chosen"]]
    if (table["kind"] == "layer").all():
        return Components.of_layers(table["layer"])
    return Components.of_heads(zip(table["layer"], table["head"], strict=True))
