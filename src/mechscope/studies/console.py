"""What a person sees in the terminal: progress while a study runs, a short summary when it ends."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from mechscope import ranks
from mechscope.progress import Progress as Report

if TYPE_CHECKING:
    from mechscope.adapt.training import Tuned
    from mechscope.instrument import Check
    from mechscope.studies.summarization import Study
    from mechscope.subject import Subject

_VERDICTS = {"supported": "green", "contradicted": "red", "undecided": "yellow", "no change": "cyan"}
_CIRCUIT_MEASURES = ("edges", "nodes", "metric of the model", "metric without edges", "faithfulness", "CPR", "CMD")

out = Console()
err = Console(stderr=True)


def quiet_libraries() -> None:
    """Silence the progress bars and notices of the libraries underneath: they would break ours."""
    import datasets
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    datasets.utils.logging.disable_progress_bar()
    # deprecations inside other libraries are nothing the user can mend
    warnings.filterwarnings("ignore", category=FutureWarning)


class _Warnings(logging.Handler):
    """Shows mechscope's own warnings as yellow lines; the rest goes to the run's log only.

    Ranks warn of the same things: of those after the first only what concerns them alone is shown.
    """

    def __init__(self) -> None:
        super().__init__(logging.WARNING)

    def emit(self, record: logging.LogRecord) -> None:
        if ranks.is_first() or getattr(record, "own", False):
            err.print(f"[yellow]warning{ranks.label()}:[/yellow] {escape(record.getMessage())}", highlight=False)


@contextlib.contextmanager
def progress() -> Iterator[Report]:
    """Show progress: bars on a terminal, elsewhere one line when something begins."""
    quiet_libraries()
    ours, handler = logging.getLogger("mechscope"), _Warnings()
    # libraries put a handler on the root logger, which would print every line that is meant for the run's log
    before, ours.propagate = ours.propagate, False
    ours.addHandler(handler)
    try:
        with _reporting() as report:
            yield report
    finally:
        ours.removeHandler(handler)
        ours.propagate = before


@contextlib.contextmanager
def _reporting() -> Iterator[Report]:
    if not ranks.is_first():
        yield lambda label, done, total: None
        return
    if not err.is_terminal:
        seen: set[str] = set()

        def line(label: str, done: int, total: int) -> None:
            if label not in seen:
                seen.add(label)
                err.print(f"{label} …", highlight=False)

        yield line
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err) as bars:
        tasks: dict[str, TaskID] = {}

        def bar(label: str, done: int, total: int) -> None:
            if label not in tasks:
                tasks[label] = bars.add_task(label, total=total)
            elif done < bars.tasks[tasks[label]].completed:  # the same kind of work again, for the next arm
                bars.reset(tasks[label], total=total)
            bars.update(tasks[label], completed=done, total=total)

        yield bar


def show_study(study: Study) -> None:
    """Print the claims and where the report is."""
    claims = study.tables.get("claims")
    if claims is not None:
        table = Table(title="Claims of the paper, measured", show_lines=False)
        for name in ("verdict", "statement", "measured"):
            table.add_column(name, overflow="fold")
        for claim in claims.itertuples():
            style = _VERDICTS[str(claim.verdict)]
            table.add_row(f"[{style}]{claim.verdict}[/{style}]", escape(str(claim.statement)), escape(str(claim.measured)))
        out.print(table)
    _show_run(study)


def show_effects(study: Study) -> None:
    """Print the largest effects of a sweep and where the report is."""
    effects = study.tables["effects"]
    top = effects.reindex(effects["effect"].abs().sort_values(ascending=False, kind="stable").index).head(10)
    table = Table(title=f"Largest effects on {effects['metric'].iloc[0]}")
    for name in ("component", "positions", "effect", "95 % interval", "q"):
        table.add_column(name, justify="left" if name in ("component", "positions") else "right")
    for row in top.itertuples():
        table.add_row(
            str(row.component), escape(str(row.positions)), f"{row.effect:+.4f}", f"{row.low:+.4f} to {row.high:+.4f}", f"{row.q:.2g}"
        )
    out.print(table)
    _show_run(study)


def show_circuits(study: Study) -> None:
    """Print how good the circuits are, how much two of them share, and where the report is."""
    summary = study.tables["circuit_summary"]
    table = Table(title="Circuits")
    for name in ("model", "measure", "value", "95 % interval", "random"):
        table.add_column(name, justify="left" if name in ("model", "measure") else "right")
    for row in summary[summary["measure"].isin(_CIRCUIT_MEASURES)].to_dict("records"):
        between = "" if pd.isna(row["low"]) else f"{row['low']:.3g} to {row['high']:.3g}"
        by_chance = "" if pd.isna(row["random"]) else f"{row['random']:.3g}"
        table.add_row(escape(row["model"]), row["measure"], f"{row['value']:.4g}", between, by_chance)
    out.print(table)
    shared = study.tables.get("circuit_overlap")
    if shared is not None:
        table = Table(title="Base and tuned circuit: Jaccard index")
        for name in ("of", "edges kept", "same texts", "random", "other texts", "base itself", "tuned itself"):
            table.add_column(name, justify="left" if name == "of" else "right")
        for row in shared.to_dict("records"):
            numbers = (row[name] for name in ("jaccard", "null", "across", "self_base", "self_tuned"))
            table.add_row(row["what"], f"{row['fraction']:.3%}", *(f"{number:.3f}" for number in numbers))
        out.print(table)
    _show_run(study)


def show_roles(study: Study) -> None:
    """Print the heads that stand out in every role, what fine-tuning changed, and where the report is."""
    roles = study.tables["head_roles"]
    table = Table(title="Heads with a role (the strongest, their score, what chance gives)")
    for name in ("model", "role", "heads", "chance"):
        table.add_column(name, justify="right" if name == "chance" else "left", overflow="fold")
    for (model, role), group in roles[roles["has_role"]].groupby(["model", "role"], sort=False):
        top = group.sort_values("score", ascending=False, kind="stable")
        heads = ", ".join(f"{row.component} {row.score:.2f}" for row in top.head(5).itertuples())
        more = f" and {len(top) - 5} more" if len(top) > 5 else ""
        table.add_row(escape(str(model)), str(role), heads + more, f"{top['null'].mean():.2f}")
    out.print(table)
    changes = study.tables.get("head_role_changes")
    if changes is not None:
        whole = changes[changes["component"] == "all"]
        table = Table(title="Change of the mean over heads")
        for name in ("role", "base", "tuned", "change", "95 % interval", "p"):
            table.add_column(name, justify="left" if name == "role" else "right")
        for row in whole.to_dict("records"):
            ends = f"{row['low']:+.4f} to {row['high']:+.4f}"
            table.add_row(row["role"], f"{row['base']:.3f}", f"{row['tuned']:.3f}", f"{row['change']:+.4f}", ends, f"{row['p']:.2g}")
        out.print(table)
    _show_run(study)


def show_lens(study: Study) -> None:
    """Print what each layer says of the next token, and where the report is."""
    summary = study.tables["lens_summary"]
    residual = summary[summary["site"] == "residual"]
    table = Table(title="What each layer says: mean over texts")
    for name in ("model", "lens", "place", "log-probability of the target", "agrees with the model", "KL to the model, nats"):
        table.add_column(name, justify="left" if name in ("model", "lens", "place") else "right")
    for row in residual.to_dict("records"):
        numbers = (f"{row['log_probability']:.3f}", f"{row['agreement']:.0%}", f"{row['kl']:.3f}")
        table.add_row(escape(row["model"]), row["lens"], row["component"], *numbers)
    out.print(table)
    _show_run(study)


def show_weights(study: Study) -> None:
    """Print the heads that copy most, and those that fine-tuning changed most, and where the report is."""
    table = Table(title="Heads by what they copy")
    for name in ("model", "head", "eigenvalue score", "copied", "suppressed"):
        table.add_column(name, justify="left" if name in ("model", "head") else "right")
    for model, group in study.tables["weight_heads"].groupby("model", sort=False):
        for row in group.nlargest(5, "copied").itertuples():
            table.add_row(escape(str(model)), str(row.component), f"{row.copying:+.2f}", f"{row.copied:.0%}", f"{row.suppressed:.0%}")
    out.print(table)
    changes = study.tables.get("weight_changes")
    if changes is not None:
        table = Table(title="Heads whose weights changed most, relative to their norm")
        for name in ("head", "W_OV", "W_QK"):
            table.add_column(name, justify="left" if name == "head" else "right")
        for change in changes.nlargest(5, "ov_relative").to_dict("records"):
            looks = "–" if pd.isna(change["qk_relative"]) else f"{change['qk_relative']:.2%}"
            table.add_row(change["component"], f"{change['ov_relative']:.2%}", looks)
        out.print(table)
    _show_run(study)


def _show_run(study: Study) -> None:
    out.print(f"run     {escape(str(study.path))}", highlight=False)
    show_report(study.report)


def show_report(page: Path) -> None:
    """Print where the report is."""
    out.print(f"report  [bold]{escape(str(page))}[/bold]", highlight=False, soft_wrap=True)


def show_tuned(tuned: Tuned) -> None:
    """Print what a fine-tuning reached and where it is."""
    share = tuned.trainable_parameters / tuned.total_parameters
    out.print(
        f"best validation loss {tuned.best_loss:.4f} nats per token at step {tuned.best_step:,} of {tuned.steps:,}; "
        f"{tuned.trainable_parameters:,} trainable parameters ({share:.2%})",
        highlight=False,
    )
    out.print(f"model   [bold]{escape(str(tuned.path))}[/bold]", highlight=False, soft_wrap=True)


def show_verified(path: Path, files: pd.DataFrame) -> bool:
    """Print what verification found; return whether every recorded file is as it was."""
    wrong = files[files["status"].isin(["changed", "missing"])]
    for row in wrong.itertuples():
        out.print(f"[red]{row.status}[/red]  {escape(str(row.file))}", highlight=False)
    unrecorded = int((files["status"] == "unrecorded").sum())
    note = f", {unrecorded} not recorded by any finished stage" if unrecorded else ""
    verdict = "[red]not as recorded[/red]" if len(wrong) else "[green]as recorded[/green]"
    out.print(f"{escape(str(path))}: {int((files['status'] == 'ok').sum())} files ok, {len(wrong)} wrong{note}: {verdict}", highlight=False)
    return not len(wrong)


def show_model(subject: Subject, checks: tuple[Check, ...]) -> bool:
    """Print a model's parts and the load-time checks; return whether all passed."""
    anatomy = subject.anatomy
    first = anatomy.blocks[0]
    facts = {
        "family": subject.family,
        "layers": anatomy.n_layers,
        "heads": f"{anatomy.n_heads} query, {anatomy.n_kv_heads} key/value, width {anatomy.d_head}",
        "residual stream": anatomy.d_model,
        "vocabulary": f"{anatomy.vocab_size:,}",
        "positions": f"{anatomy.max_positions:,}" if anatomy.max_positions < 2**31 else "unbounded",
        "parameters": f"{sum(p.numel() for p in subject.plain.parameters()):,}",
        "type, device": f"{subject.dtype}, {subject.device}".removeprefix("torch."),
        "adapter": "yes" if subject.is_adapter else "no",
        "first block": first.name,
        "query, key, value": ", ".join(dict.fromkeys(part.name for part in (first.query, first.key, first.value))),
        "output projection": first.output.name,
        "MLP": ", ".join(first.mlp_linears),
    }
    table = Table(title=escape(subject.source), show_header=False)
    for name, value in facts.items():
        table.add_row(name, escape(str(value)))
    out.print(table)
    for check in checks:
        mark = "[green]ok[/green]    " if check.passed else "[red]FAILED[/red]"
        note = "" if check.passed else f"; needed for {check.needed_for}"
        out.print(f"{mark} {check.name} (off by {check.error:.1e}, allowed {check.tolerance:.1e}){note}", highlight=False)
    return all(check.passed for check in checks)
