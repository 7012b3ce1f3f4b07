"""`mechscope calibrate`: how often verdicts and intervals are right where the truth is known."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from mechscope.errors import SettingsError
from mechscope.settings import Number, Settings, setting
from mechscope.studies.job import Job, Stage
from mechscope.studies.run import Input, JobRun, Tables

# draws between two checkpoints of a pool
_CHUNK = 50


@dataclass(frozen=True, kw_only=True)
class CalibrateSettings(Settings):
    """How much is drawn, and of what."""

    panel: ClassVar[str] = "Calibration"

    form: Literal["small", "full"] = setting("small", "Draws of each truth: small ends in minutes, full in hours.")
    claims: str | None = setting(None, "Claims and quantities to look at, joined by commas; by default all.")
    processes: Number = setting(1, "Processes that draw, each with one thread.")
    seed: int = setting(0, "Seed of the first draw; draw i has seed + i.")


def _chosen(settings: CalibrateSettings) -> list[int]:
    """Return the places, among all truths, of those that are drawn."""
    from mechscope.studies.calibration.truth import all_truths

    truths = all_truths()
    known = sorted({truth.claim for truth in truths})
    wanted = known if settings.claims is None else [name.strip() for name in settings.claims.split(",")]
    if strange := [name for name in wanted if name not in known]:
        raise SettingsError(f"setting 'claims' names {', '.join(strange)}: known are {', '.join(known)}")
    return [index for index, truth in enumerate(truths) if truth.claim in wanted]


def _check(run: JobRun[CalibrateSettings]) -> None:
    _chosen(run.settings)


def _calibrate(run: JobRun[CalibrateSettings]) -> Tables:
    from collections import Counter
    from concurrent.futures import Executor, ProcessPoolExecutor
    from contextlib import ExitStack
    from multiprocessing import get_context

    import torch

    from mechscope.studies.calibration.rates import draw_many, rates_table
    from mechscope.studies.calibration.truth import all_truths

    settings = run.settings
    truths, places = all_truths(), _chosen(settings)
    kept = run.stage.resume()
    counts: list[dict[str, int]] = kept[1]["counts"] if kept is not None else []
    with ExitStack() as stack:
        pool: Executor | None = None
        if settings.processes > 1:
            pool = stack.enter_context(
                ProcessPoolExecutor(settings.processes, mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,))
            )
        for done, index in enumerate(places):
            if done < len(counts):
                continue
            run.tell("truths", done, len(places))
            draws = truths[index].small if settings.form == "small" else truths[index].full
            seeds = range(settings.seed, settings.seed + draws)
            parts = [seeds[start : start + _CHUNK] for start in range(0, draws, _CHUNK)]
            said: Counter[str] = Counter()
            for part in (pool.map if pool is not None else map)(draw_many, [index] * len(parts), parts):
                said += part
            counts.append(dict(said))
            run.stage.checkpoint({}, {"counts": counts})
    return {"calibration": rates_table([truths[index] for index in places], counts)}


def _code(run: JobRun[Any]) -> str:
    return run.folder.ledger.code


# a verdict may come out otherwise with any change of the code, so another version draws anew
CODE: Input[str] = Input("code", _code, lambda code: code)

JOB = Job(
    name="calibrate",
    help="Draw worlds whose truth is known, and count how often verdicts and intervals are right there.",
    panel="studies",
    example="mechscope calibrate --form full --processes 2 --out runs/calibration",
    settings=CalibrateSettings,
    inputs=(CODE,),
    stages=(Stage(name="calibration", work=_calibrate, hangs_on=("form", "claims", "seed"), inputs=(CODE,), alone=True),),
    sections=("calibration",),
    title=lambda names: "How often mechscope's verdicts are right",
    check=_check,
)
