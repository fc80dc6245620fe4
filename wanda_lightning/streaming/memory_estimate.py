"""Estimate the memory that a model needs while it is read from disk, from its configuration alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import nn

from wanda_lightning.calibration.gradients import PREDICTIONS_AT_ONCE, SAMPLES_AT_ONCE
from wanda_lightning.config import PruningConfig
from wanda_lightning.models import Inventory, Layer, find_layers
from wanda_lightning.report.records import grouped
from wanda_lightning.streaming.measure_perplexity import AT_ONCE
from wanda_lightning.streaming.parts import RESIDENT, block_names, bytes_by_part

_FLOAT32, _FLOAT64 = 4, 8  # bytes


@dataclass(frozen=True)
class Memory:
    """Peak memory in bytes, without the Python process and its libraries."""

    outside: int  # weights outside of all blocks
    blocks: int  # the largest pair of consecutive blocks
    activations: int  # of all batches that wait at a unit, or of one batch if the others are on disk
    work: int  # statistics and workspace of the most expensive unit, or the logits of a batch

    @property
    def total(self) -> int:
        """The sum of all."""
        return self.outside + self.blocks + self.activations + self.work


@dataclass(frozen=True)
class Samples:
    """Windows of text that pass through the model."""

    count: int
    length: int  # in tokens
    batch_size: int

    def __str__(self) -> str:
        """Describe them in words."""
        return f"{self.count} windows of {self.length} tokens in batches of {self.batch_size}"

    @property
    def batch_tokens(self) -> int:
        """Number of tokens in a batch."""
        return min(self.count, self.batch_size) * self.length

    def parked_tokens(self, park: str) -> int:
        """Number of tokens whose activations are in memory, on the CPU and on the device together."""
        return self.batch_tokens if park == "disk" else self.count * self.length


def memory_to_prune(model: nn.Module, config: PruningConfig, samples: Samples, park: str = "memory") -> Memory:
    """Estimate the memory of `prune_from_disk` for a model on the meta device, in the dtype of pruning.

    The choices must be those for the model (`config_for`). With `park="cpu"`, memory of the CPU and of the device are
    added.
    """
    inventory = find_layers(model, config.sequential, config.skip, config.only, config.include_grouped, config.pattern)
    hidden, size = _hidden_size(model), _element_size(model)
    recorded = samples.count * samples.length
    tokens = samples.parked_tokens(park)
    # A batch holds its embeddings to the end, and the residual stream. One that waits at a layer also holds the
    # normalized residual stream, and queries, keys, values and the output of the attention, or what the MLP computes.
    waiting, work = 2 * hidden, 0
    for unit in inventory.units:
        widest = max(max(layer.shape) for layer in unit.layers)
        if config.sequential == "layer":
            waiting = max(waiting, 3 * hidden + max(widest, 4 * hidden))
        at_once = samples.batch_tokens * (size * (2 * hidden + 3 * widest) + 2 * _FLOAT32 * widest)
        grams = _grams(unit.layers, config)  # the accumulated sums, those of one batch, and one being computed
        work = max(work, 2 * sum(grams) + max(grams) + at_once, sum(grams) + _to_solve(unit.layers, config))
        work = max(work, _FLOAT32 * config.recovery.workspace(unit) + at_once)
    work = max(work, _to_permute(inventory, config, samples.length, size))  # an allocation needs less than any solver
    work = max(work, _to_couple(inventory, config, samples.length, size))
    activations = tokens * waiting * size
    activations += recorded * config.recovery.recorded * hidden * size
    if config.reads_gradients and park == "memory":  # the inputs of all blocks wait for the backward pass
        together = max(SAMPLES_AT_ONCE, PREDICTIONS_AT_ONCE // samples.length)
        inputs = min(samples.count, together) * samples.length * hidden * size
        activations = max(activations, inputs * len(block_names(model)))
    return _memory(model, activations, work)


def memory_to_measure(model: nn.Module, length: int, batch_size: int, park: str = "memory") -> Memory:
    """Estimate the memory of `perplexity_from_disk`, with at least as many windows as it keeps in memory at once."""
    hidden, size = _hidden_size(model), _element_size(model)
    samples = Samples(AT_ONCE * batch_size, length, batch_size)
    vocabulary: Any = getattr(model, "get_output_embeddings", lambda: None)()
    logits = 0 if vocabulary is None else len(vocabulary.weight)
    tokens = samples.parked_tokens(park)
    return _memory(model, tokens * 2 * hidden * size, samples.batch_tokens * logits * size)


def _memory(model: nn.Module, activations: int, work: int) -> Memory:
    blocks = block_names(model)
    sizes = bytes_by_part(model, blocks)
    in_order = [sizes.get(block, 0) for block in blocks]
    pairs = [first + second for first, second in pairwise(in_order)]
    return Memory(sizes.get(RESIDENT, 0), max(pairs, default=sum(in_order)), activations, work)


def _to_solve(layers: Sequence[Layer], config: PruningConfig) -> int:
    """Return the bytes of the most expensive group of layers, without the sums."""

    def inputs_of(layer: Layer) -> tuple[str, int]:  # the same for most layers of one module with the same width
        return (layer.name if layer.siblings else layer.name.rpartition(".")[0]), layer.shape[1]

    def numbers(group: Sequence[Layer], d_in: int) -> int:
        centers = config.solver.intercept and any(layer.bias is not None for layer in group)  # a second Gram matrix
        return config.solver.workspace([layer.shape[0] for layer in group], d_in) + centers * d_in**2

    return _FLOAT32 * max(numbers(group, d_in) for (_, d_in), group in grouped(layers, inputs_of).items())


def _to_permute(inventory: Inventory, config: PruningConfig, length: int, size: int) -> int:
    """Return the bytes needed to choose the permutation, or to compare runs of a block if that is more."""
    if not config.permutation.reads_batches:
        return 0
    compared = max(_to_compare(layers, size) for layers in _by_block(inventory))
    chosen = config.permutation.workspace(max(layer.size for layer in inventory.layers))
    return max(_FLOAT32 * chosen, length * compared)


def _to_couple(inventory: Inventory, config: PruningConfig, length: int, size: int) -> int:
    """Return the bytes needed to run a block with half of its hidden units at zero, and without them."""
    if not config.pattern.prunes_units:
        return 0
    return max(  # a copy of the weights and half of them, and the inputs
        3 * size * sum(layer.size for layer in layers) // 2 + length * _to_compare(layers, size)
        for layers in _by_block(inventory)
    )


def _by_block(inventory: Inventory) -> Iterable[Sequence[Layer]]:
    return grouped(inventory.layers, lambda layer: inventory.blocks[layer.name]).values()


def _to_compare(layers: Sequence[Layer], size: int) -> int:
    """Return the bytes of a token's inputs of all layers before and after a change; two are compared in float64."""
    widths = [layer.shape[1] for layer in layers]
    return 2 * size * sum(widths) + 5 * _FLOAT64 * max(widths)


def _grams(layers: Iterable[Layer], config: PruningConfig) -> list[int]:
    """Return the bytes of the Gram matrix of each layer; layers that share one are counted apart."""
    needed = "gram" in config.unit_needs
    return [_FLOAT32 * layer.shape[1] ** (2 if needed else 1) for layer in layers]


def _hidden_size(model: Any) -> int:
    """Return the width of the hidden states; some models have narrower embeddings, which they project."""
    config = model.config.get_text_config()
    return int(config.hidden_size if hasattr(config, "hidden_size") else model.get_input_embeddings().weight.shape[-1])


def _element_size(model: nn.Module) -> int:
    return next(model.parameters()).element_size()
