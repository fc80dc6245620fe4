"""Count the zeros of a pruned model that another model, such as its quantized version, has lost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from wanda_lightning.model_sources import load_config
from wanda_lightning.models import Layer, SkipReason, find_layers
from wanda_lightning.models.quantized import can_be_read, quantizer, read_weight
from wanda_lightning.modules.loading import load_causal_lm
from wanda_lightning.progress import ProgressBar
from wanda_lightning.streaming.checkpoint import Checkpoint
from wanda_lightning.streaming.parts import RESIDENT, part_of

_SAME = "against must be the pruned model from which the other one was made"
_ADVICE = "Give two versions of one model."


@dataclass(frozen=True)
class LayerZeros:
    """The number of zeros in a layer of the pruned model, and how many of them the other model has lost."""

    name: str
    zeros: int
    lost: int


def count_lost_zeros(name: str, pruned: str, hub: Mapping[str, Any], progress: bool = True) -> list[LayerZeros]:
    """Count the zeros of each prunable layer of `pruned`, and those that `name` has lost.

    A model in safetensors is read block by block. GGUF files and quantized models are loaded whole, and their weights
    are dequantized one at a time.

    Args:
        name: Hub id, folder or GGUF file of the model to check.
        pruned: Hub id, folder or GGUF file of the pruned model, whose weights are in floating point.
        hub: `cache_dir` and `trust_remote_code` of `from_pretrained`.
        progress: Show a bar.

    Raises:
        ValueError: If the models differ in their layers, the pruned one is quantized or has no zeros, or a weight of
            the other cannot be dequantized.
    """
    against, checked = _Model(pruned, hub), _Model(name, hub)
    pairs = _paired_layers(against, checked)
    blocks = against.blocks or checked.blocks
    parts = dict.fromkeys(part_of(layer.name, blocks) for layer, _ in pairs)
    counts: list[LayerZeros] = []
    with ProgressBar("Comparing", len(parts), progress) as bar:
        for part in parts:
            with against.loaded(part), checked.loaded(part):
                counts += [_compared(*pair) for pair in pairs if part_of(pair[0].name, blocks) == part]
            bar.advance()
    if not any(layer.zeros for layer in counts):
        raise ValueError(
            f"against must be a pruned model, but no layer of {pruned} holds a zero. Give the model that was pruned."
        )
    return counts


class _Model:
    """A language model whose blocks are loaded one at a time if its format allows it."""

    def __init__(self, name: str, hub: Mapping[str, Any]) -> None:
        self.name = name
        self.model: nn.Module
        self.blocks: tuple[str, ...] = ()
        self._checkpoint: Checkpoint | None = None
        if name.endswith(".gguf") or getattr(load_config(name, **hub), "quantization_config", None) is not None:
            self.model, _ = load_causal_lm(name, "auto", dict(hub), with_tokenizer=False)
        else:
            self._checkpoint = Checkpoint(name, "auto", hub)
            self.model, self.blocks = self._checkpoint.model, self._checkpoint.blocks

    @contextmanager
    def loaded(self, part: str) -> Iterator[None]:
        """Load a block, and free it afterward."""
        if self._checkpoint is None or part == RESIDENT:
            yield
            return
        self._checkpoint.load(part)
        try:
            yield
        finally:
            self._checkpoint.unload(part)


def _paired_layers(against: _Model, checked: _Model) -> list[tuple[Layer, nn.Module]]:
    """Return each layer of the pruned model with the module of the same name; refuse what cannot be compared."""
    found = find_layers(against.model)
    if quantized := found.skipped_for(SkipReason.QUANTIZED):
        raise ValueError(
            f"against must be a model in floating point, but {quantized[0].name} of {against.name} is not: "
            f"{quantized[0].detail}. Give the pruned model as it was before quantization."
        )
    names = {module: name for name, module in against.model.named_modules()}
    modules = dict(checked.model.named_modules())
    known = set(names.values())
    lacking = [names[layer.module] for layer in found.layers if names[layer.module] not in modules]
    surplus = [name for name in _listed_modules(checked.model) if name not in known]
    if lacking or surplus:
        name, owner, other = (surplus[0], checked, against) if surplus else (lacking[0], against, checked)
        raise ValueError(f"{_SAME}, but {owner.name} has {name} and {other.name} does not. {_ADVICE}")
    pairs = [(layer, modules[names[layer.module]]) for layer in found.layers]
    for layer, module in pairs:
        if not can_be_read(module, layer.parameter_name):
            library = quantizer(module, getattr(module, layer.parameter_name, None)) or "an unknown library"
            raise ValueError(
                f"The model {checked.name!r} cannot be checked: {layer.name} is quantized by {library} "
                f"({type(module).__name__}), whose weights cannot be dequantized here. Dequantize it with that library."
            )
    return pairs


def _listed_modules(model: nn.Module) -> Iterator[str]:
    """Yield the names of the modules in every `nn.ModuleList`, such as blocks and experts."""
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList):
            yield from (f"{name}.{child}" for child, _ in module.named_children())


def _compared(layer: Layer, module: nn.Module) -> LayerZeros:
    """Compare a layer of the pruned model with the module of the same name."""
    weight = read_weight(module, layer.parameter_name)
    is_linear = isinstance(module, nn.Linear)  # bitsandbytes replaces even GPT-2's Conv1D, whose weight is transposed
    expected = layer.shape if is_linear else tuple(layer.parameter.shape)
    if tuple(weight.shape) != expected:
        sizes = " and ".join(" x ".join(map(str, shape)) for shape in (expected, weight.shape))
        raise ValueError(f"{_SAME}, but the shapes of {layer.name} are {sizes}. {_ADVICE}")
    zero = layer.read() == 0
    # Some quantized models can only be loaded on a GPU.
    matrix = (weight if is_linear else layer.kind.read(layer.part(weight))).to(zero.device)
    return LayerZeros(layer.name, int(zero.count_nonzero()), int((zero & (matrix != 0)).count_nonzero()))
