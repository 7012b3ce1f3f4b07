"""`mechscope patch`: activation patching, place by place, or its estimate from one backward pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from mechscope.choices import MetricName, PatchSite
from mechscope.settings import Count, Number, setting
from mechscope.studies.dictionary_files import DICTIONARIES, MaybeDictionaries, autoencoders
from mechscope.studies.groups import OneModel, PromptPairs
from mechscope.studies.inputs import MODELS, PAIRS
from mechscope.studies.job import Job, Stage
from mechscope.studies.pairs import parse_positions
from mechscope.studies.run import JobRun, Tables


@dataclass(frozen=True, kw_only=True)
class PatchSettings(OneModel, MaybeDictionaries, PromptPairs):
    """What is patched and how it is judged."""

    panel: ClassVar[str] = "Patching"

    site: PatchSite = setting("head", "What is patched; latent: the latents of --dictionary.")
    components: str | None = setting(
        None,
        'Only these, e.g. "a3.h5,m3", "layers:2,3", experts ("m3.e5") or, with --dictionary, latents such as "resid6.f1024"; by default all.',
    )
    metric: MetricName = setting("logit-diff", "What is measured; loss is of a target span, kl compares with the clean run.")
    direction: Literal["denoise", "noise"] = setting("denoise", "Clean values into the corrupt run (denoise) or the reverse (noise).")
    positions: str = setting("all", "Tokens: all, last, changed, each, a segment, or several segments or numbers joined by commas.")
    method: Literal["exact", "attribution"] = setting("exact", "Patch every place, or estimate all from one backward pass.")
    check: Count = setting(0, "With attribution: places that are also patched exactly, to report the estimate's error.")
    tokens_per_batch: Number | None = setting(1024, "Most tokens of a batch of texts, padding included; decides the memory.")


def _site(settings: PatchSettings) -> str:
    """Return the site: that of experts or of latents where only such are named."""
    from mechscope.subject import Components

    chosen = Components.parse(settings.components or "")
    if chosen.experts and not chosen.without_experts:
        return "expert"
    return "latent" if chosen.latents and not chosen.without_latents else settings.site


def _check(run: JobRun[PatchSettings]) -> None:
    from mechscope.causal.places import chosen_places

    parse_positions(run.settings.positions)
    chosen_places(run.first.anatomy, _site(run.settings), run.settings.components, autoencoders(run))


def _effects(run: JobRun[PatchSettings]) -> Tables:
    from mechscope.causal import attribution_patch, patch

    settings = run.settings
    options: dict[str, Any] = {
        "site": _site(settings),
        "standing": autoencoders(run),
        "metric": settings.metric,
        "direction": settings.direction,
        "components": settings.components,
        "positions": parse_positions(settings.positions),
        "execution": run.execution,
    }
    subject, pairs = run.first, run[PAIRS]
    if settings.method == "exact":
        effects = patch(subject, pairs, **options)
    else:
        effects = attribution_patch(subject, pairs, **options, check=settings.check)
    run.folder.record("notes", effects.notes)
    return {"effects": effects.table}


EFFECTS = Stage(
    name="effects",
    work=_effects,
    hangs_on=("site", "components", "metric", "direction", "positions", "method", "check", "seed"),
    inputs=(MODELS, PAIRS, DICTIONARIES),
)


def _title(names: Mapping[str, str]) -> str:
    return f"Patching {names['model']}"


JOB = Job(
    name="patch",
    help="Activation patching: put one run's values into another, place by place, and see what it does.",
    panel="intervene",
    example="mechscope patch gpt2 --pairs ioi --site head --out runs/patch-ioi",
    settings=PatchSettings,
    arguments=("model",),
    inputs=(MODELS, PAIRS, DICTIONARIES),
    stages=(EFFECTS,),
    sections=("effects",),
    title=_title,
    check=_check,
)
