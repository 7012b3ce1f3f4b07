"""Where a changed component takes its value from.

    clean, corrupt   the same component's value when the model reads the clean or the corrupt text of the pair
    zero             nothing
    resample         its value on another text of the same batch (Chan et al. 2022: stays in distribution, unlike zero and mean)
    Text(model=…)    its value in another model, for example the fine-tuned one (Prakash et al. 2024)
    Mean(…)          its mean over a reference set, over all tokens or per position (Wang et al. 2022)
    Vector(…)        a given value

A source is bound to a batch once; it then gives the value of any site of any layer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal, cast

import torch
from jaxtyping import Bool
from torch import Tensor

from mechscope.data.pairs import PairBatch, Pairs
from mechscope.errors import SettingsError
from mechscope.features import Standing
from mechscope.instrument import CachedRun, record
from mechscope.instrument.edits import Value
from mechscope.instrument.execution import Execution
from mechscope.instrument.experts import ExpertOutputs
from mechscope.instrument.record import Site
from mechscope.instrument.texts import over_texts
from mechscope.instrument.walk import run_backbone
from mechscope.shapes import by_shape
from mechscope.subject import Subject
from mechscope.subject.placement import sent

Which = Literal["clean", "corrupt"]


class Bound:
    """What a source gives for one batch: the value of any site of any layer, of experts, and of latents of a dictionary that stands there."""

    def __init__(
        self,
        value: Callable[[str, int], Tensor | float],
        reads: Callable[[Standing], Tensor],
        latents: Callable[[Standing, Sequence[int]], Tensor | float] | None = None,
        experts: Callable[[int], ExpertOutputs] | None = None,
    ) -> None:
        """Take a function of site and layer, one of dictionaries (`reads`), one of latents where theirs do not follow from what it gives, and one of layers
        for what experts add there, which is kept by slot.
        """
        self._value = value
        self._reads = reads
        self._latents = latents
        self._experts = experts

    def __call__(self, site: str, layer: int) -> Tensor | float:
        """Return the value of a site of a layer."""
        return self._value(site, layer)

    def reads(self, standing: Standing) -> Bool[Tensor, "batch token"]:
        """Return the tokens of the batch that a dictionary is meant to read, by their place in the text and where the value is taken from."""
        return self._reads(standing)

    def latents(self, standing: Standing, latents: Sequence[int]) -> Tensor | float:
        """Return what some latents become: those of the value at their place, ``(batch, token, chosen)``, or what broadcasts to it."""
        if self._latents is not None:
            return self._latents(standing, latents)
        given = self(standing.place.site, standing.place.layer)
        if not isinstance(given, Tensor):
            return given
        return standing.values(standing.place.flat(given), latents)

    def experts(self, layer: int, experts: Sequence[int]) -> Value:
        """Return what some experts of a layer become: a function, so that whole values of many are not held at once, or what broadcasts to them."""
        if self._experts is not None:
            outputs = self._experts(layer)
            return lambda _: outputs.of(experts)
        given = self("expert_output", layer)
        # a mean has a row for every expert, a vector is the same for all
        return given[..., list(experts), :] if isinstance(given, Tensor) and given.ndim > 1 else given

    def outputs(self, layer: int) -> ExpertOutputs:
        """Return what all experts of a layer add, of a source that is a run."""
        if self._experts is None:
            raise SettingsError("experts can be resampled from runs only")
        return self._experts(layer)


class Source(ABC):
    """Where values come from."""

    @abstractmethod
    def bind(self, subject: Subject, batch: PairBatch, sites: Collection[str], runs: dict[str, CachedRun]) -> Bound:
        """Return a function of (site, layer) for one batch.

        Args:
            subject: The model that is changed.
            batch: The pairs.
            sites: Sites whose values will be read.
            runs: Runs of that model over the batch that are there already, by `clean` or `corrupt`; what is run here is added.
        """


@dataclass(frozen=True)
class Text(Source):
    """The value when a model reads one of the pair's texts.

    Attributes:
        which: Which text.
        model: Another model; None for the one that is changed.
    """

    which: Which
    model: Subject | None = None

    def bind(self, subject: Subject, batch: PairBatch, sites: Collection[str], runs: dict[str, CachedRun]) -> Bound:
        """Run the text, unless it was."""
        if self.model is not None:
            run = CachedRun(self.model, getattr(batch, self.which), batch.real, sites=sites)
        else:
            if self.which not in runs:
                runs[self.which] = CachedRun(subject, getattr(batch, self.which), batch.real, sites=sites)
            run = runs[self.which]
        return Bound(
            lambda site, layer: run.recording[site, layer],
            lambda each: each.reads(batch.real, each.read(run.recording)),
            experts=lambda layer: run.recording.experts[layer],
        )


@dataclass(frozen=True)
class Vector(Source):
    """A given value, broadcast over texts and tokens."""

    value: Tensor | float

    __repr__ = by_shape

    def bind(self, subject: Subject, batch: PairBatch, sites: Collection[str], runs: dict[str, CachedRun]) -> Bound:
        """Return the same value for every site and layer."""
        return Bound(lambda site, layer: self.value, lambda each: each.reads(batch.real), lambda standing, latents: self.value)


@dataclass(frozen=True)
class Resample(Source):
    """The value on another text of the batch, chosen at random; a shorter text is read again from its beginning.

    Attributes:
        seed: Seed of the choice.
        which: Which of the pair's texts is read.
    """

    seed: int = 0
    which: Which = "clean"

    def bind(self, subject: Subject, batch: PairBatch, sites: Collection[str], runs: dict[str, CachedRun]) -> Bound:
        """Choose for every text another one."""
        size, length = batch.real.shape
        if size < 2:
            raise SettingsError(
                "resampling takes values from another text of the batch, and there is only one: give more pairs or larger batches; or shorter texts, "
                "if memory ran out and the batch was halved"
            )
        values = Text(self.which).bind(subject, batch, sites, runs)
        generator = torch.Generator().manual_seed(self.seed)
        # a random cycle: no text is given its own value, and each value is used once
        order = torch.randperm(size, generator=generator)
        other = torch.empty_like(order)
        other[order] = order.roll(1)
        first = batch.real.to(torch.uint8).argmax(1)
        lengths = batch.real.sum(1)
        own = (torch.arange(length) - first[:, None]).clamp(min=0)
        token = first[other][:, None] + own % lengths[other][:, None]

        def value(site: str, layer: int) -> Tensor | float:
            given = values(site, layer)
            if not isinstance(given, Tensor) or site == "pattern":
                raise SettingsError("attention patterns cannot be resampled: texts differ in their tokens; resample 'z' instead")
            return given[sent(other, given.device)[:, None], sent(token, given.device)]

        def reads(each: Standing) -> Tensor:
            given = values.reads(each)
            return each.reads(batch.real) & given[sent(other, given.device)[:, None], sent(token, given.device)]

        return Bound(value, reads, experts=lambda layer: values.outputs(layer).at(other[:, None].expand_as(token), token))


@dataclass(frozen=True)
class Mean(Source):
    """Means over a reference set; see `mean_of`.

    Attributes:
        values: By site and layer: ``(features)``, ``(head, d_head)`` or ``(expert, d_model)``, with a token axis in front if per position.
        tokens: Length of the reference texts, if per position.
        latents: By place of a dictionary: ``(latent)``, the mean of every latent.
    """

    values: dict[tuple[str, int], Tensor]
    tokens: int | None = None
    latents: dict[str, Tensor] = field(default_factory=dict)

    __repr__ = by_shape

    def bind(self, subject: Subject, batch: PairBatch, sites: Collection[str], runs: dict[str, CachedRun]) -> Bound:
        """Check that the reference fits the batch."""
        if self.tokens is not None:
            unfit = [pair for pair in batch.pairs if len(pair.clean) != self.tokens]
            if unfit:
                raise SettingsError(
                    f"the mean reference has a value per position for texts of {self.tokens} tokens, pair {unfit[0].id!r} has {len(unfit[0].clean)}: "
                    "take the mean over all positions (per_position=False), or a reference of that length"
                )

        def value(site: str, layer: int) -> Tensor | float:
            try:
                return self.values[site, layer]
            except KeyError:
                held = ", ".join(sorted({name for name, _ in self.values}))
                raise SettingsError(
                    f"the mean reference holds {held}, not {site!r} of layer {layer}: compute it with mean_of(…, sites=…)"
                ) from None

        return Bound(value, lambda each: each.reads(batch.real), self._of_latents)

    def _of_latents(self, standing: Standing, latents: Sequence[int]) -> Tensor:
        if standing.place.name not in self.latents:
            raise SettingsError(f"the mean reference holds no latents of {standing.place}: compute it with mean_of(…, standing=…)")
        return self.latents[standing.place.name][list(latents)]


@torch.no_grad()
def mean_of(
    subject: Subject,
    reference: Pairs,
    sites: Collection[str],
    *,
    per_position: bool = False,
    standing: Sequence[Standing] = (),
    execution: Execution = Execution(),
) -> Mean:
    """Average sites, and latents of dictionaries, over a reference set's clean texts.

    Args:
        subject: The model.
        reference: The texts.
        sites: What to average.
        per_position: Keep a mean per position; the texts must then be equally long. Of latents there is one mean.
        standing: Dictionaries whose latents are averaged too, each over the tokens that it is meant to read.
        execution: Tokens of a batch (4,096 by default).

    Raises:
        SettingsError: Per position, and the texts differ in length; a site that has no mean; or no token that a dictionary is meant to read.
    """
    lengths = {len(pair.clean) for pair in reference}
    if per_position and len(lengths) > 1:
        raise SettingsError(
            f"a mean per position needs texts of one length, these have {min(lengths)} to {max(lengths)} tokens: use per_position=False"
        )
    if "pattern" in sites:
        raise SettingsError("attention patterns have no mean over texts of different tokens: take the mean of 'z'")
    sums: dict[tuple[str, int], Tensor] = {}
    codes_of: dict[str, Tensor] = {}
    count, read = 0, Counter[str]()
    wanted = cast("Collection[Site]", sites)  # `record` refuses others
    needed = [site for site in dict.fromkeys(each.place.site for each in standing) if site not in sites]

    def summed(batch: PairBatch) -> tuple[int, dict[tuple[str, int], Tensor], dict[str, tuple[int, Tensor]]]:
        with record(subject, *wanted, *needed) as recording:
            run_backbone(subject, batch.clean, batch.real)
        totals: dict[tuple[str, int], Tensor] = {}
        for key, value in recording.values.items():
            if key[0] not in wanted:
                continue
            real = value.double()[batch.real.to(value.device)]
            totals[key] = real.unflatten(0, (len(batch), -1)).sum(0) if per_position else real.sum(0)
        for layer, outputs in recording.experts.items():
            whole = outputs.of().double()[sent(batch.real, outputs.slots.device)] if per_position else None
            totals["expert_output", layer] = outputs.total(batch.real) if whole is None else whole.unflatten(0, (len(batch), -1)).sum(0)
        active: dict[str, tuple[int, Tensor]] = {}
        for each in standing:
            x = each.read(recording)
            codes = each.dictionary.encode([x[each.reads(batch.real, x)]])
            active[each.place.name] = codes.tokens, codes.total(codes.values.double())
        return len(batch) if per_position else int(batch.real.sum()), totals, active

    for _, (number, totals, active) in over_texts(reference, summed, execution, tokens=4096):
        count += number
        for key, total in totals.items():
            sums[key] = sums[key] + total if key in sums else total
        for name, (tokens, total) in active.items():
            read[name] += tokens
            codes_of[name] = codes_of[name] + total if name in codes_of else total
    if unread := [name for name, tokens in read.items() if not tokens]:
        raise SettingsError(f"the reference texts hold no token that the dictionary at {unread[0]} is meant to read: give longer ones")
    latents = {each.place.name: (codes_of[each.place.name] / read[each.place.name]).to(each.decoders) for each in standing}
    means = {key: (total / count).to(subject.dtype) for key, total in sums.items()}
    return Mean(means, lengths.pop() if per_position else None, latents)


NAMED: dict[str, Source] = {"clean": Text("clean"), "corrupt": Text("corrupt"), "zero": Vector(0.0), "resample": Resample()}


def source_named(source: str | Source) -> Source:
    """Return the source a person means.

    Raises:
        SettingsError: There is none of that name.
    """
    if isinstance(source, Source):
        return source
    if source not in NAMED:
        raise SettingsError(f"source {source!r} is not known: use one of {', '.join(NAMED)}, or a mean, a vector or another model's values")
    return NAMED[source]
