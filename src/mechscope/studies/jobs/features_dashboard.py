"""`mechscope features dashboard`: a page per dictionary on which a person can look at its latents."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from mechscope.errors import SettingsError
from mechscope.settings import nested, setting
from mechscope.settings.features import DashboardSettings
from mechscope.studies.dictionary_files import DICTIONARIES, DictionaryFiles, LeftOutTokens, left_out
from mechscope.studies.groups import ModelAndTuned
from mechscope.studies.inputs import MODELS
from mechscope.studies.job import Job, Stage
from mechscope.studies.pairs import split_names
from mechscope.studies.run import Input, JobRun, Tables
from mechscope.studies.texts import TEXTS, Texts

if TYPE_CHECKING:
    from mechscope.features import Dictionary
    from mechscope.features.rows import Models

logger = logging.getLogger(__name__)

# columns that another run may have for latents
_BESIDE = ("class", "effect", "explanation")


@dataclass(frozen=True, kw_only=True)
class FeaturesDashboardSettings(ModelAndTuned, DictionaryFiles, LeftOutTokens, Texts):
    """On which texts, and what is shown."""

    panel: ClassVar[str] = "Dictionaries"

    tuned: str | None = setting(None, "A fine-tuned version of the model, for dictionaries of both (base:resid6, tuned:resid6).")
    beside: str | None = setting(
        None,
        "Run folder with a table that gives latents (column component) a class, as `features diff` does, an effect, as `ablate` does, or an explanation, as "
        "`features explain` does; several joined by commas.",
    )
    dashboard: DashboardSettings = nested(DashboardSettings)


def _beside(run: JobRun[FeaturesDashboardSettings]) -> dict[str, dict[str, Any]]:
    """Return what another run says of latents: column by column, by dictionary (empty where its table names none) and latent."""
    import pandas as pd

    from mechscope.store.paths import absent
    from mechscope.store.tables import read_table

    found: dict[str, dict[str, Any]] = {}
    by: dict[tuple[str, str], Path] = {}
    files = []
    for folder in map(Path, split_names(run.settings.beside or "")):
        if not folder.is_dir():
            raise SettingsError(f"setting 'beside' names {str(folder)!r}: {absent(str(folder)) or 'no such folder'}")
        files += sorted((folder / "tables").glob("*.parquet"))
    for file in files:
        table = read_table(file)
        if "component" not in table:
            continue
        if "control" in table:
            # a control's latents are none of those that are shown
            table = table[table["control"].fillna("") == ""]
        if {"comparison", "by_norm", "judged"} <= set(table):
            # what `features diff` says of a latent: how it was judged, and of those that were not by which model has it
            said = table["judged"].where(table["judged"].fillna("") != "", table["by_norm"])
            # whether it is new beyond control is not said where there was no control
            if "beyond" in table:
                said = said.where(~table["beyond"].eq(True).fillna(False).astype(bool), "new beyond control")
            table = table.assign(**{"class": said})
        named = next((table[name] for name in ("dictionary", "comparison") if name in table), [""] * len(table))
        for column in _BESIDE:
            if column in table:
                known = found.setdefault(column, {})
                for dictionary, component, value in zip(named, table["component"], table[column], strict=True):
                    latent = f"{dictionary} {component}"
                    other, first = known.setdefault(latent, value), by.setdefault((column, latent), file)
                    if other != value and not (pd.isna(other) and pd.isna(value)):
                        raise SettingsError(
                            f"setting 'beside' names two values of column {column} of {latent.strip()}: {other!r} of {first}, {value!r} of {file}; name runs "
                            "of which one table gives each latent one value, and names its dictionary where there are several"
                        )
    if run.settings.beside is not None and not found:
        raise SettingsError(
            f"setting 'beside' is {run.settings.beside!r}: there is no table with a column component and one of {', '.join(_BESIDE)}"
        )
    return found


BESIDE: Input[dict[str, dict[str, Any]]] = Input(
    "beside", _beside, lambda found: {name: sorted(map(str, each.items())) for name, each in found.items()}
)


def _models(run: JobRun[FeaturesDashboardSettings]) -> Models:
    return run.first if run.settings.tuned is None else run[MODELS]


def _check(run: JobRun[FeaturesDashboardSettings]) -> None:
    from mechscope.data.scoring import check_fits

    check_fits(run.first, run[TEXTS])
    for dictionary in run[DICTIONARIES].values():
        dictionary.check(_models(run), other_model=run.settings.other_model)
    _require_files_apart(run[DICTIONARIES])
    _require_matches(run)


def _require_files_apart(dictionaries: dict[str, Dictionary]) -> None:
    """Refuse names of dictionaries whose pages would be one file, also where case is not told apart; `SettingsError`."""
    from mechscope.report.dashboards import file_name

    known: dict[str, str] = {}
    for name in dictionaries:
        if (other := known.setdefault(file_name(name).lower(), name)) != name:
            raise SettingsError(
                f"dictionaries {other!r} and {name!r} would share the page {file_name(name)}.html: name their files differently"
            )


def _require_matches(run: JobRun[FeaturesDashboardSettings]) -> None:
    """Refuse tables that say nothing of these dictionaries' latents, and warn of a column that does not."""
    from mechscope.features import Latent

    dictionaries = run[DICTIONARIES]
    own = {
        f"{named} {Latent(each.layout.outputs[0], latent).name}"
        for name, each in dictionaries.items()
        for named in (name, "")
        for latent in range(each.latents)
    }
    missed = {column: next(iter(known), "").strip() for column, known in run[BESIDE].items() if own.isdisjoint(known)}
    said = "; ".join(f"{column} is of others (the first: {first})" for column, first in missed.items())
    ours = ", ".join(dictionaries)
    if missed and len(missed) == len(run[BESIDE]):
        raise SettingsError(
            f"setting 'beside' is {run.settings.beside!r}, which says nothing of latents of {ours}: {said}; name dictionaries as that run did"
        )
    if missed:
        logger.warning("what 'beside' names says nothing of latents of %s by a column: %s", ours, said)


def _gather(run: JobRun[FeaturesDashboardSettings]) -> Tables:
    import pandas as pd

    from mechscope.features import dashboard
    from mechscope.subject.spelling import Spelling

    texts, spelling = run[TEXTS], Spelling(run.first.tokenizer)
    parts: dict[str, list[pd.DataFrame]] = {name: [] for name in ("latents", "examples", "correlations", "chance")}
    for name, dictionary in run[DICTIONARIES].items():
        found = dashboard(
            _models(run),
            dictionary.to(run.first.device),
            texts,
            settings=run.settings.dashboard,
            tokens=left_out(run.settings),
            other_model=True,
            execution=run.execution,
        )
        spelled = {column: found.latents[column].map(spelling.tokens) for column in ("promotes", "suppresses")}
        latents = found.latents.assign(n=len(texts), tokens=found.tokens, sample=found.sample, **spelled)
        for column, known in run[BESIDE].items():
            values = [known.get(f"{name} {latent}", known.get(f" {latent}")) for latent in latents["component"]]
            if any(value is not None for value in values):
                latents[column] = values
        examples = found.examples.assign(text=[str(texts.pairs[text].id) for text in found.examples["text"]])
        for part, table in (("latents", latents), ("examples", examples), ("correlations", found.correlations), ("chance", found.chance)):
            table.insert(0, "dictionary", name)
            parts[part].append(table)
    tables = {f"dashboard_{part}": pd.concat(made, ignore_index=True) for part, made in parts.items()}
    ids = sorted({token for shown in tables["dashboard_examples"]["ids"] for token in shown})
    return {**tables, "dashboard_tokens": pd.DataFrame({"token": ids, "text": spelling.tokens(ids)})}


DASHBOARDS = Stage(
    name="dashboards",
    work=_gather,
    hangs_on=("dashboard", "first", "outlier", "seed"),
    inputs=(MODELS, TEXTS, DICTIONARIES, BESIDE),
    alone=True,
)


def _title(names: Mapping[str, str]) -> str:
    return f"Latents of {names.get('model') or ' and '.join(names.values())}"


JOB = Job(
    name="features-dashboard",
    help="Write a page per dictionary on which its latents can be looked at: examples of all strengths, histograms, tokens, what goes with them.",
    panel="features",
    group="features",
    example="mechscope features dashboard gpt2 --dictionary runs/features/dictionaries/resid6-4096.safetensors --data articles.jsonl",
    settings=FeaturesDashboardSettings,
    arguments=("model",),
    inputs=(MODELS, TEXTS, DICTIONARIES, BESIDE),
    stages=(DASHBOARDS,),
    sections=("dashboards",),
    title=_title,
    check=_check,
)
