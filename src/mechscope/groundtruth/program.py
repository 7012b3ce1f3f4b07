"""Programs that are written into the weights of a GPT-2, so that its circuit is known.

A program names variables of the residual stream, each with coordinates of its own, and says which of them every head and MLP reads and writes. What
stands in the weights is exactly that: the circuit's edges are the reads and writes that are not zero. Two things make it exact. LayerNorm becomes the identity:
every coordinate x is kept beside its mirror −x, so the mean is zero, and with `layer_norm_epsilon` E and gains √E the variance hardly counts (E = 1e8: logits
within 1e-6 of the program's). Attention scores of `sharpness` make softmax choose one key.

Sources: Lindner et al. 2023, "Tracr: Compiled Transformers as a Laboratory for Interpretability", for programs with known circuits; Gupta et al. 2024,
"InterpBench", for their use as ground truth of circuit discovery.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from mechscope.circuits.graph import Circuit, Graph
from mechscope.errors import SettingsError

Reads = Mapping[str, Float[np.ndarray, "size width"]]
"""Variables that are read, each with the map that it is read by; what several give is summed."""

# LayerNorm's epsilon, and the square of its gains
_EPSILON = 1e8
TOKEN, POSITION, ONE = "token", "position", "one"
"""Variables that the embedding writes: which token, which position (both one-hot), and the number one."""
JUNK = "junk"
"""What distractors write, and nothing that leads to the logits reads."""
_JUNK_SIZE = 4


@dataclass(frozen=True, eq=False)
class Head:
    """A head: queries and keys of equal width, whose products are the scores, and what is read of the keys' tokens.

    Attributes:
        layer: Its layer.
        value: What is read of the tokens attended to, as wide as the variable that is written.
        write: The variable that is written.
        query: What asks; nothing for a head that attends to all keys alike.
        key: What answers.
    """

    layer: int
    value: Reads
    write: str
    query: Reads = field(default_factory=dict)
    key: Reads = field(default_factory=dict)

    @property
    def width(self) -> int:
        """The widest of its reads."""
        return max(matrix.shape[1] for reads in (self.query, self.key, self.value) for matrix in reads.values())


@dataclass(frozen=True, eq=False)
class Mlp:
    """An MLP of ReLU neurons.

    Attributes:
        layer: Its layer.
        reads: What the neurons read.
        bias: ``(neuron)``.
        writes: By variable ``(neuron, size)``: what they write.
    """

    layer: int
    reads: Reads
    bias: Float[np.ndarray, " neuron"]
    writes: Mapping[str, Float[np.ndarray, "neuron size"]]


@dataclass(frozen=True, eq=False)
class Program:
    """A program: what is in the residual stream, and what each part reads and writes.

    Attributes:
        words: The vocabulary; the first begins every text.
        positions: The longest text, in tokens.
        sizes: Coordinates of the variables that heads and MLPs write.
        heads: Of each layer in order.
        mlps: At most one of each layer.
        logits: What the unembedding reads, into the vocabulary.
        heads_per_layer: Heads of a layer, those that do nothing included.
    """

    words: tuple[str, ...]
    positions: int
    sizes: Mapping[str, int]
    heads: tuple[Head, ...]
    mlps: tuple[Mlp, ...]
    logits: Reads
    heads_per_layer: int = 1

    @property
    def layers(self) -> int:
        """Blocks that it takes."""
        return 1 + max([head.layer for head in self.heads] + [mlp.layer for mlp in self.mlps])

    @cached_property
    def all_sizes(self) -> dict[str, int]:
        """Coordinates of every variable, the embedding's first."""
        return {TOKEN: len(self.words), POSITION: self.positions, ONE: 1, **self.sizes}

    def heads_of(self, layer: int) -> list[Head]:
        """Return the heads of a layer, by number."""
        return [head for head in self.heads if head.layer == layer]

    def mlp_of(self, layer: int) -> Mlp | None:
        """Return the MLP of a layer; None where it does nothing."""
        return next((mlp for mlp in self.mlps if mlp.layer == layer), None)

    @cached_property
    def graph(self) -> Graph:
        """The edges of the model that it is written into."""
        return Graph(self.layers, self.heads_per_layer)

    @cached_property
    def _written(self) -> dict[str, tuple[str, ...]]:
        """Variables by sender."""
        written: dict[str, tuple[str, ...]] = {"embed": (TOKEN, POSITION, ONE)}
        for layer in range(self.layers):
            written |= {f"a{layer}.h{number}": (head.write,) for number, head in enumerate(self.heads_of(layer))}
            mlp = self.mlp_of(layer)
            written[f"m{layer}"] = tuple(name for name, matrix in mlp.writes.items() if matrix.any()) if mlp is not None else ()
        return written

    @cached_property
    def _read(self) -> dict[str, tuple[str, ...]]:
        """Variables by receiver."""
        read = {"logits": _named(self.logits)}
        for layer in range(self.layers):
            for number, head in enumerate(self.heads_of(layer)):
                for part, reads in (("q", head.query), ("k", head.key), ("v", head.value)):
                    read[f"a{layer}.h{number}<{part}>"] = _named(reads)
            mlp = self.mlp_of(layer)
            read[f"m{layer}"] = _named(mlp.reads) if mlp is not None else ()
        return read

    @cached_property
    def edges(self) -> dict[str, tuple[str, ...]]:
        """What each edge that is written carries, by its name, such as `embed->a0.h0<v>`: the edges between embedding and logits, without distractors'."""
        senders, receivers = self.graph.senders, self.graph.receivers
        carried = {}
        for sender, receiver in self.graph.edges:
            name, reads = senders[sender], self._read.get(receivers[receiver], ())
            if both := tuple(variable for variable in self._written.get(name, ()) if variable in reads):
                carried[f"{name}->{receivers[receiver]}"] = both
        kept = Circuit.of(self.graph, list(carried)).pruned()
        return {name: carried[name] for name in kept.names}

    @cached_property
    def circuit(self) -> Circuit:
        """The edges that carry what differs between texts of equal length: those written but for what carries positions and constants alone."""
        varying, changing = {TOKEN}, {"embed"}
        for layer in range(self.layers):
            for number, head in enumerate(self.heads_of(layer)):
                if varying & {*_named(head.query), *_named(head.key), *_named(head.value)}:
                    changing.add(f"a{layer}.h{number}")
                    varying.add(head.write)
            mlp = self.mlp_of(layer)
            if mlp is not None and varying & {*_named(mlp.reads)}:
                changing.add(f"m{layer}")
                varying |= {*self._written[f"m{layer}"]}
        told = [name for name, carried in self.edges.items() if name.partition("->")[0] in changing and varying & {*carried}]
        return Circuit.of(self.graph, told).pruned()

    def distracted(self, heads: int, *, seed: int = 0) -> Program:
        """Return the same program among parts that compute and write something that never reaches the logits.

        Args:
            heads: Heads of each layer, those of the program included; each layer without an MLP gets one.
            seed: Of what they read, and how.

        Raises:
            SettingsError: A layer of the program has more heads.
        """
        own = max(len(self.heads_of(layer)) for layer in range(self.layers))
        if heads < own:
            raise SettingsError(f"heads is {heads}: the program has {own} in a layer, so at least as many are needed")
        rng = np.random.default_rng(seed)
        known, added, mlps = {TOKEN: len(self.words), POSITION: self.positions}, list(self.heads), list(self.mlps)
        for layer in range(self.layers):
            for _ in range(heads - len(self.heads_of(layer))):
                query, key, value = (_drawn(rng, known) for _ in range(3))
                added.append(Head(layer, value, JUNK, query, key))
            known |= {head.write: self.sizes[head.write] for head in self.heads_of(layer)}
            mlp = self.mlp_of(layer)
            if mlp is None:
                mlps.append(Mlp(layer, _drawn(rng, known, 6), rng.normal(size=6), {JUNK: rng.normal(size=(6, _JUNK_SIZE))}))
            else:
                known |= {name: self.sizes[name] for name in mlp.writes}
        return replace(self, sizes={**self.sizes, JUNK: _JUNK_SIZE}, heads=tuple(added), mlps=tuple(mlps), heads_per_layer=heads)

    def model(self) -> GPT2LMHeadModel:
        """Write the program into a GPT-2 in float32, in evaluation mode."""
        per_layer, neurons = self.heads_per_layer, max((len(mlp.bias) for mlp in self.mlps), default=1)
        coordinates = sum(self.all_sizes.values())
        d_head = max(-(-2 * coordinates // per_layer), *(head.width for head in self.heads))
        config = GPT2Config(
            vocab_size=len(self.words),
            n_positions=self.positions,
            n_embd=per_layer * d_head,
            n_layer=self.layers,
            n_head=per_layer,
            n_inner=neurons,
            activation_function="relu",
            layer_norm_epsilon=_EPSILON,
            scale_attn_weights=False,
            tie_word_embeddings=False,
            bos_token_id=0,
            eos_token_id=0,
            **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
        )
        model = GPT2LMHeadModel(config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.fill_(_EPSILON**0.5 if ".ln_" in name and name.endswith("weight") else 0.0)
            self._write(model, d_head)
        return model

    def _write(self, model: GPT2LMHeadModel, d_head: int) -> None:
        width, body = model.config.n_embd, model.transformer
        body.wte.weight[:, self._at(TOKEN)] = torch.eye(len(self.words))
        body.wpe.weight[:, self._at(POSITION)] = torch.eye(self.positions)
        body.wpe.weight[:, self._at(ONE)] = 1.0
        for table in (body.wte.weight, body.wpe.weight):
            table[:, self._half : 2 * self._half] = -table[:, : self._half]
        for layer, block in enumerate(body.h):
            for number, head in enumerate(self.heads_of(layer)):
                for part, reads in enumerate((head.query, head.key, head.value)):
                    for column, matrix in self._reading(reads, width):
                        start = part * width + number * d_head
                        block.attn.c_attn.weight[:, start : start + column] += matrix
                size = self.all_sizes[head.write]
                rows = slice(number * d_head, number * d_head + size)
                block.attn.c_proj.weight[rows] = self._writing(head.write, torch.eye(size), width)
            if (mlp := self.mlp_of(layer)) is not None:
                for column, matrix in self._reading(mlp.reads, width):
                    block.mlp.c_fc.weight[:, :column] += matrix
                block.mlp.c_fc.bias[: len(mlp.bias)] = torch.tensor(mlp.bias, dtype=torch.float32)
                for variable, writes in mlp.writes.items():
                    block.mlp.c_proj.weight[: len(writes)] += self._writing(variable, torch.tensor(writes, dtype=torch.float32), width)
        for column, matrix in self._reading(self.logits, width):
            model.lm_head.weight[:column] += matrix.T

    @property
    def _half(self) -> int:
        return sum(self.all_sizes.values())

    def _at(self, variable: str) -> slice:
        names = list(self.all_sizes)
        start = sum(self.all_sizes[name] for name in names[: names.index(variable)])
        return slice(start, start + self.all_sizes[variable])

    def _reading(self, reads: Reads, width: int) -> Iterator[tuple[int, Float[Tensor, "width column"]]]:
        """Yield for every variable how many columns its map fills, and the map from the mirrored residual stream."""
        for variable, matrix in reads.items():
            laid, at = torch.zeros(width, matrix.shape[1]), self._at(variable)
            laid[at] = torch.tensor(matrix, dtype=torch.float32) / 2
            laid[self._half : 2 * self._half] = -laid[: self._half]
            yield matrix.shape[1], laid

    def _writing(self, variable: str, rows: Float[Tensor, "row size"], width: int) -> Float[Tensor, "row width"]:
        laid = torch.zeros(len(rows), width)
        laid[:, self._at(variable)] = rows
        laid[:, self._half : 2 * self._half] = -laid[:, : self._half]
        return laid


def _named(reads: Reads) -> tuple[str, ...]:
    return tuple(name for name, matrix in reads.items() if matrix.any())


def _drawn(rng: np.random.Generator, known: Mapping[str, int], width: int = _JUNK_SIZE) -> Reads:
    """Draw what a distractor reads: half of the variables that are there, at least one."""
    names = rng.permutation(sorted(known))[: max(1, len(known) // 2)]
    return {str(name): rng.normal(size=(known[str(name)], width)) for name in names}
