"""SHIFT: take out of a model the latents that a classifier should not use (Marks et al. 2024, §4).

A linear probe on the mean activation of a text is trained where an unintended label always agrees with the intended one. Latents are ranked by what setting
them to zero does to the probe's margin; those judged unintended are ablated in the model, with errors kept, and the probe is trained again on the same biased
texts. Judged by hand, or by known labels: a latent is unintended where its share of the effects on a probe of the unintended label is larger than its share of
those on a probe of the intended one, both probes of balanced texts. Beside it stand the probe as it was, random latents, two erasures of the unintended label
from the activations (difference of means, LEACE), and a probe of balanced texts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechscope.choices import Filling
from mechscope.data.pairs import PairBatch, Pairs
from mechscope.data.scoring import PerText, check_fits, per_text
from mechscope.data.two_labels import GROUPS, BiasedSplit, TwoLabels
from mechscope.errors import SettingsError
from mechscope.features.cut import Cut, counted, cuts
from mechscope.features.node_effects import TOKENS_PER_BATCH
from mechscope.features.node_patching import Chosen, Fillings, Means, node_means, without
from mechscope.features.places import Place
from mechscope.features.probes import Probe
from mechscope.features.standing import Node, Standing, require
from mechscope.instrument import Edit, Execution, Walk, intervene, record
from mechscope.instrument.attention import observed
from mechscope.probing import Eraser, erase_means, leace
from mechscope.shapes import by_shape
from mechscope.stats.co_moments import CoMoments
from mechscope.stats.inference import paired_difference, share_interval
from mechscope.subject import Subject

ORIGINAL, SHIFT, RETRAINED = "original", "latents ablated", "latents ablated, retrained"
RANDOM, DIFFERENCE, LEACE, BALANCED = "random latents, retrained", "mean difference erased", "LEACE", "trained on balanced texts"


@dataclass(frozen=True)
class Shift:
    """What SHIFT did.

    Attributes:
        latents: One row per latent that was looked at: `component`, `effect` (on the biased probe's margin, mean over its training texts), `intended` and
            `unintended` (shares of all effects on the probes of balanced texts), `judged` (whether it is unintended).
        groups: One row per method, draw and group: `method`, `draw` (−1 but for random latents), `intended`, `unintended` (labels), `n`, `accuracy`, `low`,
            `high` (Wilson's interval).
        methods: One row per method: `method`, `draws`, `n` (texts), `accuracy` (mean over groups), `worst` (accuracy of the worst group) with `worst_low`,
            `worst_high` (Wilson's interval of that group; of several draws means of worst accuracies and of ends),
            `gain` (over the original in the group that the original tells worst) with `gain_low`, `gain_high`
            (over its texts).
    """

    latents: pd.DataFrame
    groups: pd.DataFrame
    methods: pd.DataFrame

    __repr__ = by_shape


def shift(
    subject: Subject,
    standing: Sequence[Standing],
    split: BiasedSplit,
    place: Place,
    *,
    unintended: Sequence[Node] | None = None,
    most: int = 50,
    filling: Filling = "mean",
    draws: int = 5,
    execution: Execution = Execution(),
) -> Shift:
    """Rank latents by their effect on a biased probe, ablate those judged unintended, and see what the probe then tells.

    Args:
        subject: The model.
        standing: Autoencoders at the probe's place or before it, in the order of the run.
        split: Biased texts to train on, balanced ones to judge latents and to test.
        place: What the probe reads the mean of, over the tokens that count.
        unintended: Latents judged unintended by hand; None to judge by the labels.
        most: Latents that are judged: those with the largest effects on the biased probe.
        filling: What ablated latents become: `mean` (over the training texts) or `zero`.
        draws: Sets of random latents, as many at each place, drawn among those that are active on the training texts; judged ones only where too few
            others are active.
        execution: Tokens of a batch (1,024 by default), seed of the draws, progress.

    Raises:
        MechscopeError: A dictionary stands behind the probe, or texts do not fit the model.
    """
    check_shift(subject, standing, place, filling)
    check_fits(subject, split.test.texts)
    check_judged(standing, unintended or ())
    pooled = _Pooled(subject, standing, place, execution)
    plain = {name: pooled(getattr(split, name).texts) for name in ("train", "development", "test")}
    train, develop, test = split.train, split.development, split.test
    biased = Probe(plain["train"], train.intended)
    (effects,) = pooled.effects(train, (train.intended, biased))
    judges = {"intended": develop.intended, "unintended": develop.unintended}
    probed = pooled.effects(develop, *((labels, Probe(plain["development"], labels)) for labels in judges.values()))
    probes = dict(zip(judges, probed, strict=True))
    table = _ranked(standing, effects, probes, most, unintended)
    judged = [Node.parse(name) for name in table.loc[table["judged"], "component"]]
    active = {each.place: np.flatnonzero(effects[each.place]) for each in standing}
    sets = {(RETRAINED, -1): judged} | {
        (RANDOM, draw): nodes for draw, nodes in enumerate(_random(standing, judged, active, draws, execution.seed))
    }
    means = node_means(subject, standing, train.texts, execution=execution) if filling == "mean" else None
    said: dict[tuple[str, int], np.ndarray] = {(ORIGINAL, -1): biased.says(plain["test"])}
    for (method, draw), nodes in sets.items():
        x = {name: pooled(part.texts, nodes, filling, means) if nodes else plain[name] for name, part in (("train", train), ("test", test))}
        if method == RETRAINED:
            said[SHIFT, -1] = biased.says(x["test"])
        said[method, draw] = Probe(x["train"], train.intended).says(x["test"])
    told = torch.from_numpy(develop.unintended)[:, None].long()
    balanced = CoMoments.of(torch.from_numpy(plain["development"])[None], told, (2,))
    for method, eraser in ((DIFFERENCE, erase_means(balanced)), (LEACE, leace(balanced))):
        said[method, -1] = Probe(_erased(eraser, plain["train"]), train.intended).says(_erased(eraser, plain["test"]))
    said[BALANCED, -1] = Probe(plain["development"], develop.intended).says(plain["test"])
    right = {key: answer == test.intended for key, answer in said.items()}
    return Shift(table, _groups(test, right), _methods(test, right))


def _erased(eraser: Eraser, x: Float[np.ndarray, "text width"]) -> Float[np.ndarray, "text width"]:
    return eraser(torch.from_numpy(x)[None])[0].numpy()


def check_shift(subject: Subject, standing: Sequence[Standing], place: Place, filling: str) -> None:
    """Refuse dictionaries behind the probe, and fillings that single texts do not have; `SettingsError`."""
    place.check(subject)
    if place.site != "residual":
        raise SettingsError(f"the probe reads the residual stream, not {place}: write resid{place.layer}")
    for each in standing:
        if each.place.layer > place.layer:
            raise SettingsError(f"a dictionary stands at {each.place}, behind the probe at {place}: what it holds does not reach the probe")
    if filling == "corrupt":
        raise SettingsError("filling 'corrupt' needs pairs of texts, and these are single ones: use mean or zero")


def check_judged(standing: Sequence[Standing], unintended: Sequence[Node]) -> None:
    """Refuse nodes that are no latents of the dictionaries, so that no one can have judged them; `SettingsError`."""
    for node in unintended:
        if node.latent is None:
            raise SettingsError(f"{node.name} is an error, and errors are no latents that can be judged: name latents such as resid6.f10")
    require(standing, unintended)


class _Pooled:
    """The mean of a place over the tokens that count, with latents ablated or not, and what latents do to a probe of it."""

    def __init__(self, subject: Subject, standing: Sequence[Standing], place: Place, execution: Execution) -> None:
        self.subject, self.standing, self.place, self.execution = subject, tuple(standing), place, execution

    def __call__(
        self, texts: Pairs, nodes: Sequence[Node] = (), filling: Filling = "zero", means: Mapping[Place, Means] | None = None
    ) -> Float[np.ndarray, "text width"]:
        """Return the means of texts."""
        gathered = PerText(texts)
        chosen = {
            each.place: Chosen(tuple(node.latent for node in nodes if node.place == each.place and node.latent is not None), False)
            for each in self.standing
        }

        @torch.no_grad()
        def pooled(batch: PairBatch) -> dict[str, np.ndarray]:
            x, real = self._as_is(batch)
            if nodes:
                x = self._run(batch, without(self.standing, chosen, Fillings(self.subject, self.standing, batch, filling, means), real))
            weights = _weights(real).to(x.device)
            return {"x": torch.einsum("bt,btd->db", weights, torch.where(weights[..., None] > 0, x.double(), 0.0)).cpu().numpy()}

        gathered.run(pooled, self.execution, tokens=TOKENS_PER_BATCH, label="mean activations")
        return gathered["x"].T

    @torch.no_grad()
    def _as_is(self, batch: PairBatch) -> tuple[Float[Tensor, "batch token width"], Bool[Tensor, "batch token"]]:
        """Return what stands at the place, and the tokens that count."""
        sites, layers = {each.place.site for each in self.standing}, {each.place.layer for each in self.standing}
        with record(self.subject, *sites, layers=layers) as recording:
            x = self._run(batch, ())
        return x, counted(batch.real, self.standing, {each.place: each.read(recording) for each in self.standing})

    def _run(self, batch: PairBatch, edits: Sequence[Edit]) -> Tensor:
        """Run a batch up to the place, and return what stands there."""
        real = None if bool(batch.real.all()) else batch.real
        with (
            observed(self.subject),
            intervene(self.subject, *edits),
            record(self.subject, "residual", layers=[self.place.layer], detach=False) as recording,
        ):
            walk = Walk(self.subject, batch.clean.to(self.subject.device), real)
            hidden = walk.hidden
            for layer in range(self.place.layer + 1):
                hidden = walk.step(layer, hidden)
        return self.place.of(recording)

    def effects(self, labelled: TwoLabels, *probes: tuple[np.ndarray, Probe]) -> list[dict[Place, Float[np.ndarray, " latent"]]]:
        """Return of every latent what setting it to zero does to a probe's margin of the right label, to first order; the mean over texts.

        Args:
            labelled: The texts.
            probes: Labels with the probe that tells them; each has its own effects.
        """
        directions = [torch.from_numpy(probe.direction) for _, probe in probes]

        def scored(batch: PairBatch) -> list[list[list[tuple[np.ndarray, np.ndarray]]]]:
            made, real = self._cuts(batch, directions)
            by_place = [
                [self._by_text(each, cut.leaves[each.place], total[each.place], real) for each in self.standing] for cut, total in made
            ]
            return [[[rows[text] for rows in own] for own in by_place] for text in range(len(batch))]

        found = [{each.place: np.zeros(each.dictionary.latents) for each in self.standing} for _ in probes]
        texts = per_text(labelled.texts, scored, self.execution, tokens=TOKENS_PER_BATCH, label="effects on the probe")
        for number, by_probe in enumerate(texts):
            for (labels, _), effects, rows in zip(probes, found, by_probe, strict=True):
                for each, (latents, values) in zip(self.standing, rows, strict=True):
                    effects[each.place][latents] += (1.0 if labels[number] else -1.0) * values / len(labelled)
        return found

    def _cuts(
        self, batch: PairBatch, directions: Sequence[Float[Tensor, " width"]]
    ) -> tuple[list[tuple[Cut, dict[Place, Tensor]]], Bool[Tensor, "batch token"]]:
        """Return one pass as seen by each probe, with the whole derivative of what the probe says, and the tokens that count."""
        edits, leaves, arrivals = cuts(self.standing)
        with torch.enable_grad():
            x = self._run(batch, edits)
            real = counted(batch.real, self.standing, leaves)
            weights = _weights(real).to(x)
            mean = torch.einsum("bt,btd->bd", weights, torch.where(weights[..., None] > 0, x, 0.0))
            seen = [Cut(mean @ direction.to(x), leaves, arrivals) for direction in directions]
        return [(cut, cut.total()) for cut in seen], real

    @staticmethod
    def _by_text(each: Standing, x: Tensor, gradient: Tensor, real: Tensor) -> list[tuple[np.ndarray, np.ndarray]]:
        x, gradient = (torch.where(real[..., None], value.detach().to(each.decoders), 0.0) for value in (x, gradient))
        return each.attributions([(-1.0, each.codes(x).at(real.flatten()))], gradient).by_text()


def _weights(real: Bool[Tensor, "batch token"]) -> Float[Tensor, "batch token"]:
    """Return what each token counts in its text's mean."""
    return real.double() / real.sum(1, keepdim=True).clamp(min=1)


def _ranked(
    standing: Sequence[Standing],
    effects: Mapping[Place, np.ndarray],
    probes: Mapping[str, Mapping[Place, np.ndarray]],
    most: int,
    unintended: Sequence[Node] | None,
) -> pd.DataFrame:
    places = [each.place for each in standing]
    names = [Node(place, latent) for place in places for latent in range(len(effects[place]))]
    whole = np.concatenate([effects[place] for place in places])
    shares = {}
    for name, by_place in probes.items():
        sizes = np.abs(np.concatenate([by_place[place] for place in places]))
        shares[name] = sizes / max(sizes.sum(), 1e-30)
    order = np.argsort(-np.abs(whole), kind="stable")[:most]
    order = order[np.abs(whole[order]) > 0]
    by_hand = None if unintended is None else set(unintended)
    if by_hand is not None:
        at = {node: number for number, node in enumerate(names)}
        order = np.array(list(dict.fromkeys([*(at[node] for node in unintended or ()), *order.tolist()])), dtype=int)
    judged = [bool(shares["unintended"][at] > shares["intended"][at]) if by_hand is None else names[at] in by_hand for at in order]
    return pd.DataFrame(
        {
            "component": [names[at].name for at in order],
            "effect": whole[order],
            "intended": shares["intended"][order],
            "unintended": shares["unintended"][order],
            "judged": judged,
        }
    )


def _random(
    standing: Sequence[Standing], judged: Sequence[Node], active: Mapping[Place, np.ndarray], draws: int, seed: int
) -> list[list[Node]]:
    random = np.random.default_rng(seed)
    sets = []
    for _ in range(draws if judged else 0):
        nodes: list[Node] = []
        for each in standing:
            own = [node.latent for node in judged if node.place == each.place and node.latent is not None]
            order = random.permutation(active[each.place])
            # the judged ones last
            order = order[np.argsort(np.isin(order, own), kind="stable")]
            nodes += [Node(each.place, int(latent)) for latent in order[: len(own)]]
        sets.append(nodes)
    return sets


Right = Mapping[tuple[str, int], np.ndarray]


def _groups(test: TwoLabels, right: Right) -> pd.DataFrame:
    rows = []
    for (method, draw), answers in right.items():
        for number, (one, two) in enumerate(GROUPS):
            own = answers[test.group(number)]
            low, high = share_interval(int(own.sum()), len(own))
            about = {"method": method, "draw": draw, "intended": one, "unintended": two, "n": len(own)}
            rows.append({**about, "accuracy": float(own.mean()), "low": low, "high": high})
    return pd.DataFrame(rows)


def _methods(test: TwoLabels, right: Right) -> pd.DataFrame:
    """Compare methods: the worst of their groups, and how much better they are than the original where that is worst."""
    members = [test.group(number) for number in range(len(GROUPS))]
    hardest = members[int(np.argmin([right[ORIGINAL, -1][own].mean() for own in members]))]
    rows = []
    for method in dict.fromkeys(method for method, _ in right):
        answers = [answer for (name, _), answer in right.items() if name == method]
        accuracies = np.array([[answer[own].mean() for own in members] for answer in answers])
        worst = accuracies.min(1).mean()
        # draws share their texts: more of them make no interval narrower, so that its ends are means over draws, each in its own worst group
        hardest_of = [members[int(own.argmin())] for own in accuracies]
        ends_of = [share_interval(int(answer[own].sum()), int(own.sum())) for answer, own in zip(answers, hardest_of, strict=True)]
        low, high = (float(end) for end in np.mean(ends_of, axis=0))
        gain = paired_difference(np.mean(answers, axis=0)[hardest], right[ORIGINAL, -1][hardest].astype(float))
        about: dict[str, object] = {"method": method, "draws": len(answers), "n": len(test), "accuracy": float(accuracies.mean())}
        ends = {"gain": float(gain.mean), "gain_low": float(gain.low), "gain_high": float(gain.high)}
        rows.append(about | {"worst": float(worst), "worst_low": low, "worst_high": high} | ends)
    return pd.DataFrame(rows)
