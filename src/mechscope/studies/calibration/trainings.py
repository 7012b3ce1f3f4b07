"""Claims about attention under known truths: what is said of fine-tuning where tuned and control trainings are exchangeable, and where they are not.

Most worlds are made at the level of tables: every head of a training has an effect of the recipe (the same in all trainings, controls included), one that
all heads of the training share, one of its own, and the noise of documents that all trainings saw. One world is made of real models: the embedded newsroom
model and noise of 5 % of its weights, measured by the product's own control stage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy import stats

from mechscope.studies.calibration.truth import Truth
from mechscope.studies.paper_2505_17073.claims import CLAIMS
from mechscope.studies.paper_2505_17073.judgement import Judgement, Scope

if TYPE_CHECKING:
    from mechscope.data.prompt import Encoded
    from mechscope.subject import Pair, Subject

_DECIDED = ("supported", "contradicted")
_FOCUSED, _SELECTED, _CONCENTRATED = "heads_focused_all", "heads_focused_selected", "change_concentrated"
_BY_TRAINING = (_FOCUSED, _SELECTED, _CONCENTRATED)
# documents of the simulated measurement; of the tuned model, all heads' effects are known with the noise of so many
_DOCUMENTS = 24


@dataclass(frozen=True, kw_only=True)
class World:
    """How trainings are drawn.

    Attributes:
        tuned: Tuned trainings: the tuned model and the same with other seeds.
        controls: Control trainings on shuffled summaries.
        noise: Draws of noise.
        common: Standard deviation of what all heads of a training share; that of a head's own part is 1.
        common_of_controls: The same of the controls, where it differs.
        clusters: Share of the draws that lie on one side, where what all heads share has two values only.
        effect: By how much every head of the tuned trainings gets more focused than in controls.
        concentration: Factor of the KL of the first quarter of layers in tuned trainings.
        tail: Degrees of freedom of all random parts: 3 is heavy-tailed, infinity is normal.
        swapped: Whether base and tuned model have changed roles.
        layers: Layers.
        heads: Heads of a layer.
    """

    tuned: int = 1
    controls: int = 0
    noise: int = 0
    common: float = 1.0
    common_of_controls: float | None = None
    clusters: float | None = None
    effect: float = 0.0
    concentration: float = 1.0
    tail: float = np.inf
    swapped: bool = False
    layers: int = 6
    heads: int = 8


def tables_of(world: World, seed: int) -> dict[str, pd.DataFrame]:
    """Draw the tables that claims about attention are judged by."""
    random = np.random.default_rng(seed)
    shape = (world.layers, world.heads)

    def drawn(*size: int) -> np.ndarray:
        return random.standard_t(world.tail, size) if np.isfinite(world.tail) else random.standard_normal(size)

    models = [("tuned", "tuned"), *((f"seed {i}", "seed") for i in range(1, world.tuned))]
    models += [*((f"shuffled {i}", "shuffled") for i in range(world.controls)), *((f"noise {i}", "noise") for i in range(world.noise))]
    # each document's deviation from a head's mean is the same whatever the training
    recipe, documents = 0.5 * drawn(*shape), 0.2 * drawn(*shape)
    profile = np.exp(0.5 * random.standard_normal(world.layers))
    change, kl = {}, {}
    for name, kind in models:
        ours = kind in ("tuned", "seed")
        spread = world.common if ours or world.common_of_controls is None else world.common_of_controls
        shared = float(drawn(1)[0]) if world.clusters is None else (1.0 if random.random() < world.clusters else -1.0)
        change[name] = recipe + documents + spread * shared + drawn(*shape) - world.effect * ours
        stronger = np.where(np.arange(world.layers) < world.layers // 4 + (world.layers % 4 > 0), world.concentration if ours else 1.0, 1.0)
        kl[name] = (profile * stronger * np.exp(0.3 * drawn(world.layers)))[:, None] * np.exp(0.5 * drawn(*shape))
    sign = -1.0 if world.swapped else 1.0
    names, kinds = zip(*models, strict=True)
    changes, divergences = sign * np.stack([change[name] for name in names]), np.stack([kl[name] for name in names])
    control_heads = _frame(names, kinds, {"layer": world.layers, "head": world.heads}, changes, divergences)
    control_layers = _frame(names, kinds, {"layer": world.layers}, changes.mean(-1), divergences.mean(-1))
    layers = control_layers[control_layers["kind"] == "tuned"]
    return {
        "heads": _heads(changes[0], divergences[0]),
        "layers": layers,
        "selection": _selection(layers),
        "controls": pd.DataFrame({"control": names, "kind": kinds, "n": _DOCUMENTS}),
        "control_heads": control_heads,
        "control_layers": control_layers,
    }


def _frame(names: Sequence[str], kinds: Sequence[str], places: Mapping[str, int], change: np.ndarray, kl: np.ndarray) -> pd.DataFrame:
    """Return a table of controls from arrays ``(model, layer)`` or ``(model, layer, head)``."""
    model, *where = (index.ravel() for index in np.indices(change.shape))
    named = {"control": np.array(names, dtype=object)[model], "kind": np.array(kinds, dtype=object)[model], "rows": "all"}
    return pd.DataFrame({**named, **dict(zip(places, where, strict=True)), "entropy_change": change.ravel(), "kl_base_tuned": kl.ravel()})


def _heads(change: np.ndarray, kl: np.ndarray, error: float = 0.2) -> pd.DataFrame:
    layer, head = (index.ravel() for index in np.indices(change.shape))
    p = 2 * stats.t.sf(np.abs(change.ravel()) / error, _DOCUMENTS - 1)
    return pd.DataFrame(
        {
            "rows": "all",
            "layer": layer,
            "head": head,
            "n": _DOCUMENTS,
            "entropy_change": change.ravel(),
            "entropy_change_p": p,
            "kl_base_tuned": kl.ravel(),
            "kl_base_tuned_se": 0.1 * kl.ravel(),
        }
    )


def _selection(layers: pd.DataFrame) -> pd.DataFrame:
    number = -(-len(layers) // 4)
    top = layers["kl_base_tuned"].rank(ascending=False, method="first") <= number
    return pd.DataFrame(
        {
            "rule": "layers_by_kl",
            "kind": "layer",
            "layer": layers["layer"].to_numpy(),
            "chosen": top.to_numpy(),
            "frequency": top.astype(float).to_numpy(),
            "n_resamples": 200,
        }
    )


def verdict_of(claim: str, world: World, seed: int) -> str:
    """Draw a world and return the verdict on a claim."""
    return _judged(claim, tables_of(world, seed)).verdict


def _judged(claim: str, tables: Mapping[str, pd.DataFrame]) -> Judgement:
    """Judge one claim as the table of claims does."""
    found = next(each for each in CLAIMS if each.name == claim)
    judgement = found.judge({name: tables[name] for name in found.needs if name in tables}, Scope())
    assert judgement is not None
    return judgement


def count_is_inside(n: int, seed: int) -> str:
    """Say whether the interval of the number of heads with lower entropy holds the true number, over documents that all heads share."""
    random = np.random.default_rng(seed)
    true = random.standard_normal(48) * random.choice([0.05, 0.3, 1.0])
    values = true + random.standard_normal((n, 1)) + random.standard_normal((n, 48))
    p = stats.ttest_1samp(values, 0.0).pvalue
    heads = _heads(values.mean(0).reshape(6, 8), np.ones((6, 8))).assign(entropy_change_p=p, n=n)
    layers = heads.groupby(["rows", "layer"], as_index=False)[["kl_base_tuned", "entropy_change"]].mean()
    found = _judged(_FOCUSED, {"heads": heads, "layers": layers, "selection": _selection(layers)})
    return "inside" if found.low - 1e-9 <= (true < 0).mean() <= found.high + 1e-9 else "outside"


@cache
def _newsroom() -> tuple[Subject, Encoded]:
    from mechscope.data.documents import load_documents
    from mechscope.data.newsroom import newsroom_model_path
    from mechscope.data.prompt import encode
    from mechscope.instrument import load

    base = load(newsroom_model_path(), device="cpu", check=False)
    return base, encode(load_documents("newsroom:test", limit=6), base.tokenizer, max_tokens=128)


def verdict_on_noise(claim: str, seed: int) -> str:
    """Make the newsroom model a tuned one by noise of 5 % of every matrix, measure it beside eight draws of noise, and return the verdict on a claim."""
    return _judged(claim, _noise_tables(seed)).verdict


@lru_cache(maxsize=64)
def _noise_tables(seed: int) -> dict[str, pd.DataFrame]:
    from mechscope.studies.control_tables import Control, control_tables
    from mechscope.subject.noise import noise_pairs

    base, documents = _newsroom()
    pair = with_noise(base, 0.05, seed)
    noise = ((Control(f"noise {number}", "noise", "noise", number), noisy) for number, noisy in enumerate(noise_pairs(pair, 8, seed=seed)))
    models = chain([(Control("tuned", "tuned", "tuned", None), pair)], noise)
    # what the claims read takes neither passes on the same input nor pooled states: as few as can be
    tables = control_tables(models, documents, same_input_documents=1, geometry_documents=1)
    heads, layers = (tables[name][tables[name]["kind"] == "tuned"] for name in ("control_heads", "control_layers"))
    p = 2 * stats.t.sf((heads["entropy_change"] / heads["entropy_change_se"]).abs(), heads["n"] - 1)
    selection = _selection(layers[layers["rows"] == "all"])
    return {"heads": heads.assign(entropy_change_p=p), "layers": layers, "selection": selection, **tables}


def with_noise(base: Subject, share: float, seed: int) -> Pair:
    """Return a model beside a copy with Gaussian noise of a share of every parameter's norm."""
    import torch

    from mechscope.subject import Pair, Subject
    from mechscope.subject.discovery import discover
    from mechscope.subject.noise import plain_copy

    model = plain_copy(base)
    generator = torch.Generator().manual_seed(seed + 10**6)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise, alpha=float(share * parameter.norm() / noise.norm()))
    return Pair(base, Subject(model, base.tokenizer, discover(model), "base + 5 %"), base.anatomy.vocab_size)


def _null(claim: str, world: str, made: World, *, unit: str = "training") -> Truth:
    return Truth(
        claim=claim, world=world, kind="null", unit=unit, draw=partial(verdict_of, claim, made), wrong=_DECIDED, small=12, full=600
    )


def _planted(claim: str, made: World, size: float, small: int = 12) -> Truth:
    world = f"{made.tuned} tuned against {made.controls} control trainings"
    draw = partial(verdict_of, claim, made)
    return Truth(
        claim=claim,
        world=world,
        kind="planted",
        unit="training",
        size=size,
        draw=draw,
        right=("supported",),
        wrong=("contradicted",),
        small=small,
        full=300,
    )


TRUTHS: tuple[Truth, ...] = (
    *(_null(claim, "two seeds of one training, no controls", World()) for claim in _BY_TRAINING),
    *(_null(claim, "base and tuned swapped, no controls", World(swapped=True)) for claim in _BY_TRAINING),
    _null("most_changed_layers", "two seeds of one training, no controls, GPT-2 small's shape", World(layers=12, heads=12)),
    _null(
        "most_changed_layers",
        "3 tuned against 3 control trainings, exchangeable, GPT-2 small's shape",
        World(tuned=3, controls=3, layers=12, heads=12),
    ),
    *(
        _null(
            claim,
            f"{tuned} tuned against {controls} control trainings, exchangeable{words}",
            World(tuned=tuned, controls=controls, common=common),
        )
        for claim in _BY_TRAINING
        for tuned, controls in ((1, 8), (2, 8), (3, 3), (3, 8), (5, 5))
        for common, words in ((0.5, ""), (3.0, ", heads move together"))
    ),
    *(
        _null(claim, "3 tuned against 5 control trainings, exchangeable, heavy tails", World(tuned=3, controls=5, tail=3.0))
        for claim in _BY_TRAINING
    ),
    *(
        _null(
            claim,
            f"{tuned} tuned against {controls} control trainings of equal mean that vary less",
            World(tuned=tuned, controls=controls, common=1.0, common_of_controls=0.2),
        )
        for claim in (_FOCUSED, _SELECTED)
        for tuned, controls in ((3, 5), (5, 5))
    ),
    *(
        _null(
            _FOCUSED,
            f"{tuned} tuned against {controls} control trainings of equal mean, {words}",
            World(tuned=tuned, controls=controls, common=common, common_of_controls=other),
        )
        for tuned, controls in ((3, 3), (3, 8), (5, 3), (5, 5))
        for common, other, words in (
            (2.0, 0.2, "tuned ones vary ten times as much"),
            (10.0, 1.0, "tuned ones vary ten times as much and far"),
            (0.5, 5.0, "control ones vary ten times as much"),
        )
    ),
    *(
        _null(f"{claim}.noise", f"tuned is noise, {noise} draws{words}", World(noise=noise, common=common), unit="noise draw")
        for claim in (_FOCUSED, _CONCENTRATED)
        for noise in (8, 12)
        for common, words in ((0.5, ""), (3.0, ", heads move together"))
    ),
    *(
        _null(
            f"{_FOCUSED}.noise",
            f"tuned is noise in two clusters, {100 * clusters:g} % in one, 8 draws",
            World(noise=8, common=1.0, clusters=clusters),
            unit="noise draw",
        )
        for clusters in (0.5, 0.75, 0.88, 0.92)
    ),
    *(
        Truth(
            claim=f"{claim}.noise",
            world="newsroom model and 5 % noise, 8 draws (real forward passes)",
            kind="null",
            unit="noise draw",
            draw=partial(verdict_on_noise, f"{claim}.noise"),
            wrong=_DECIDED,
            small=3,
            full=40,
        )
        for claim in (_FOCUSED, _CONCENTRATED)
    ),
    *(
        Truth(
            claim="heads with lower entropy (of these two models)",
            world=f"48 heads that share {n} documents",
            kind="null",
            unit="document",
            draw=partial(count_is_inside, n),
            wrong=("outside",),
            small=12,
            full=600,
        )
        for n in (6, 24, 96)
    ),
    *(
        _planted(claim, World(tuned=n, controls=n, effect=size, common=0.5), size)
        for claim in (_FOCUSED, _SELECTED)
        for n in (3, 5)
        for size in (0.5, 1.0, 2.0)
    ),
    *(_planted(_CONCENTRATED, World(tuned=n, controls=n, concentration=size, layers=12), size) for n in (3, 5) for size in (2.0, 4.0)),
)
