"""Run a model on one batch before and after hidden units are taken out, and compare the results."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from wanda_lightning.common.errors import UserError
from wanda_lightning.common.evaluating import evaluating, seeded, widest
from wanda_lightning.models import RemovableUnits, reads_images

_CLOSE = 1e-4  # relative


def example_batch(model: nn.Module, image_size: int | tuple[int, int] | None = None) -> Any:
    """Return a small batch for a model of transformers or timm; None for any other.

    A model of timm that was built for another size of images than its architecture may need that size.
    """
    config: Any = getattr(model, "config", None)
    if hasattr(model, "dummy_inputs") and config is not None:
        if not reads_images(model):
            return {name: tensor.to(_device(model)) for name, tensor in model.dummy_inputs.items()}  # type: ignore[operator,union-attr]
        config = getattr(config, "vision_config", config)
        size = getattr(config, "image_size", 224)
        size = tuple(size) if isinstance(size, list | tuple) else (size, size)
        return {"pixel_values": _noise(model, getattr(config, "num_channels", 3), *size)}
    settings: Any = getattr(model, "pretrained_cfg", None)
    if not settings or not settings.get("input_size"):
        return None
    own, *usual = settings["input_size"]
    built_for = next((size for m in model.modules() if isinstance(size := getattr(m, "img_size", None), tuple)), None)
    built_for = (image_size, image_size) if isinstance(image_size, int) else image_size or built_for
    stem = next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), own)
    # Built with `in_chans`; a multiple of the channels may be whole pixels that the model puts side by side first.
    return _noise(model, stem if stem % own else own, *(built_for or usual))


def _noise(model: nn.Module, *shape: int) -> Tensor:
    noise = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return noise.to(_device(model), dtype)


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


class _Results(NamedTuple):
    outputs: list[Tensor]  # of the model
    read: list[Tensor]  # outputs of one layer, one for each of its calls
    called: set[nn.Module]


class Trial:
    """Runs of a model on one batch.

    Without a batch, one is made for models of transformers and timm. `forward(batch)` runs it; the default is
    `model(**batch)` for a mapping, `model(batch[0])` for a tuple or list, and `model(batch)` otherwise.
    """

    def __init__(self, model: nn.Module, batch: Any = None, forward: Callable[[Any], object] | None = None) -> None:
        self._model, self._forward = model, forward or self._call
        self._batch = example_batch(model) if batch is None else batch
        self._first: list[Tensor] | None = None
        self._before = _Results([], [], set())

    def start(self, units: RemovableUnits) -> None:
        """Run the model as it is now, and record the outputs of the layer that reads some units."""
        if self._batch is None:
            raise UserError(
                f"shrink runs a batch to check that the model computes the same, but it cannot make one for a "
                f"{type(self._model).__name__}. Give batch=, and forward= if model(batch) is not the way to call it."
            )
        self._before = self._run(units)
        self._first = self._before.outputs if self._first is None else self._first

    def is_same(self, units: RemovableUnits) -> bool:
        """Whether the batch reaches all these layers, and the reader and the model return the same as at `start`.

        What the reader returns is compared, since a residual with a small scale may hide a difference from the model.
        """
        try:
            after = self._run(units)
        except Exception:  # shapes that do not fit raise whatever the model raises
            return False
        reached, before = _layers(units) <= after.called, self._before
        return reached and _same(before.read, after.read, most=0.5) and _same(before.outputs, after.outputs)

    def ends_same(self) -> bool:
        """Whether the model returns the same as at the first `start`."""
        return self._first is None or _same(self._first, self._run().outputs)

    def _run(self, units: RemovableUnits | None = None) -> _Results:
        read: list[Tensor] = []
        called: set[nn.Module] = set()

        def enter(module: nn.Module, _: object, output: object) -> None:
            called.add(module)
            if units and module is units.reader.module and isinstance(output, Tensor):
                read.append(output.clone())

        with ExitStack() as stack:
            stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
            torch.backends.mha.set_fastpath_enabled(False)  # the fused encoder layer bypasses its layers
            for module in _layers(units) if units else ():
                stack.callback(module.register_forward_hook(enter).remove)
            # Seeded: some models draw numbers in evaluation, too.
            with evaluating(self._model), seeded(0, _device(self._model)), torch.inference_mode(False), torch.no_grad():
                output = self._forward(self._batch)
        return _Results([leaf.clone() for leaf in tree_leaves(output) if isinstance(leaf, Tensor)], read, called)

    def _call(self, batch: Any) -> object:
        if isinstance(batch, Mapping):
            return self._model(**batch)
        return self._model(batch[0] if isinstance(batch, tuple | list) else batch)


def _layers(units: RemovableUnits) -> set[nn.Module]:
    return {units.reader.module, *(writer.module for writer in units.writers)}


def _same(before: Sequence[Tensor], after: Sequence[Tensor], most: float = 0.0) -> bool:
    """Whether there are tensors, and the norms of all differences are rounding.

    Also, more than a fraction `most` of the entries of each are close: in 16 bits, they are equal.
    """
    if not before or [x.shape for x in before] != [y.shape for y in after]:
        return False
    return all(_is_close(x, y, most) for x, y in zip(before, after, strict=True))


def _is_close(x: Tensor, y: Tensor, most: float) -> bool:
    if not x.is_floating_point():
        return torch.equal(x, y)
    limit = max(8 * torch.finfo(x.dtype).eps, _CLOSE)
    x, y = widest(x), widest(y)
    difference = torch.where(x == y, 0.0, x - y)  # both may be infinite
    scale = torch.linalg.vector_norm(torch.where(x.isfinite(), x, 0.0))
    close = (difference.abs() <= _CLOSE * x.abs()).double().mean()
    return bool(torch.linalg.vector_norm(difference) <= limit * scale) and (not most or bool(close > most))
