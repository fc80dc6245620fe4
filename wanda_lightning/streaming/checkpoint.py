"""Read a model from safetensors part by part, through the loading code of transformers.

This is the only file that uses semi-private functions of transformers: one step of `from_pretrained` is replaced, so
that everything else (configuration, dtypes, buffers, tied weights) stays its own.
"""

import ctypes
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.modeling_utils import remove_tied_weights_from_state_dict
from transformers.utils import logging

from wanda_lightning.calibration.interception import weights_moved
from wanda_lightning.common.dtypes import dtype_name
from wanda_lightning.common.errors import UserError
from wanda_lightning.common.model_source import ModelSource, load_config, reading
from wanda_lightning.common.wording import one_line
from wanda_lightning.core.placeholders import placeholder
from wanda_lightning.lightning_modules.model_loading import (
    check_complete,
    check_finite,
    check_stored_as_float,
    require_safetensors,
    warn_of_unused,
)
from wanda_lightning.loop.run import KeptEntries
from wanda_lightning.models import Stop, find_layers, repeated_parameters
from wanda_lightning.streaming.quantized_checkpoint import (
    Spread,
    kept_tensor,
    require_scales,
    require_weights,
    settings_of,
    stored_size,
    uneven_scales,
)

Keys = Mapping[Path, Sequence[str]]  # by file: names of tensors as they are stored
RESIDENT = ""
"""The part of a model that lies outside of all blocks, and is always in memory. The other parts are the blocks."""


class Checkpoint:
    """A language model in safetensors whose blocks are loaded one at a time.

    The model is complete except for the weights of its blocks, which are placeholders until they are loaded. Quantized
    weights are dequantized when they are loaded. Damaged files, weights that two parts share, and blocks without
    weights are refused before any block is loaded. A single weight of a block that is missing or not finite is refused
    when the block is loaded.
    """

    def __init__(
        self, source: ModelSource, dtype: str | torch.dtype = "auto", device: str = "cpu"
    ) -> None:
        dtype = dtype_name(dtype)
        self._name = str(source)
        self.device = available_device(device)
        self.blocks: tuple[str, ...] = ()
        # Names of tensors that transformers leaves in a file.
        self.not_loaded: dict[Path, list[str]] = {}
        self._keys: dict[str, dict[Path, list[str]]] = {}  # by part
        # The parameter into which each stored tensor is loaded, or beside which it is stored.
        self._parameters: dict[str, str] = {}
        self._companions: dict[str, dict[Path, list[str]]] = {}  # as `_keys`, but not loaded
        self._spreads: dict[str, Spread] = {}  # by key of scales
        self._stored_sizes: dict[str, int] = {}  # bytes of each stored tensor
        self._conversions: dict[str, Any] = {}  # by part
        config = self._read_config(source)
        auto_class = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        arguments = source.locate()
        # How the weights are quantized; None if they are not.
        self.quantization = settings_of(config, self._name)
        self.copies = self.quantization is not None and dtype == "auto"
        if self.quantization:
            config.quantization_config = {**self.quantization, "dequantize": True}
            arguments["config"] = config
            if dtype == "auto":
                dtype = config.dtype or "bfloat16"

        load = staticmethod(self._load_resident)
        with (
            reading("weights", source),
            _quiet(),
            patch.object(PreTrainedModel, "_load_pretrained_model", load),
        ):
            self.model, loaded = auto_class.from_pretrained(
                **arguments,
                dtype=dtype,
                use_safetensors=True,
                use_kernels=False,
                output_loading_info=True,
            )

        # Transformers computes some buffers on the CPU instead of loading them.
        for module in self.model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                if buffer.device != self.device:
                    setattr(module, name, buffer.to(self.device))
        self._check(loaded)

    def _read_config(self, source: ModelSource) -> Any:
        """Return the configuration of a model, and refuse models that cannot be read block by block."""
        if self._name.startswith("timm:") or self._name.endswith(".gguf"):
            raise UserError(
                f"The model {self._name!r} cannot be read block by block: only Hugging Face models in safetensors "
                "can. Prune it in memory."
            )
        config = load_config(source)
        if source.path.is_dir():
            require_safetensors(source.path)
        return config

    def _check(self, loaded: Mapping[str, Any]) -> None:
        """Refuse a model with weights that are missing, damaged, or shared by two parts."""
        # Weights of blocks, too: otherwise the error would come when batches arrive there.
        names = [name for name, _ in self.model.named_parameters()]
        missing = {name for name in names if self.part_of(name) not in self._keys}
        missing.update(loaded["missing_keys"])
        check_complete(self._name, missing, loaded["mismatched_keys"])
        warn_of_unused(self._name, loaded["unexpected_keys"])
        if not self.quantization:
            check_stored_as_float(self._name, self.files, self.model)

        for name, first_name in repeated_parameters(self.model):
            if self.part_of(name) != self.part_of(first_name):
                raise UserError(
                    f"The model {self._name!r} cannot be read block by block, because {name} is shared by two parts of "
                    "the model. Prune it in memory."
                )

    def _load_resident(
        self,
        model: Any,
        state_dict: object,
        files: Sequence[str],
        load_config: Any,
        expected_keys: object = None,
    ) -> tuple[Any, None]:
        """Replacement of `PreTrainedModel._load_pretrained_model`: load only the weights outside of the blocks."""
        self.model = model
        self._load_config = replace(load_config, device_map={"": self.device})
        self.files = {path: _stamp(path) for path in map(Path, files)}
        self.blocks = tuple(stop.name for stop in find_layers(model).stops if stop.is_block)
        unexpected = self._sort_keys()
        loaded = self.load(RESIDENT)
        # Transformers removes those that a family is known to have.
        loaded.unexpected_keys.update(unexpected)

        for block in self.blocks:
            self.unload(block)
        for name, tensor in model.state_dict(keep_vars=True).items():
            if self.part_of(name) != RESIDENT:
                # Otherwise transformers would allocate and initialize it.
                tensor._is_hf_initialized = True
                loaded.missing_keys.discard(name)
        return loaded, None

    def _sort_keys(self) -> set[str]:
        """Find the part of each stored tensor; return the names of those that are not loaded."""
        mapping = self._load_config.weight_mapping or []
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        expected = self.model.state_dict()
        unexpected = set[str]()
        dtypes = {}
        shapes = {}

        for path in self.files:
            with safe_open(path, framework="pt") as file:
                keys = list(file.keys())
                for key in keys:
                    stored = file.get_slice(key)
                    dtypes[key] = stored.get_dtype()
                    shapes[key] = stored.get_shape()
                    self._stored_sizes[key] = stored_size(dtypes[key], shapes[key])
            for key in keys:
                name, _ = rename_source_key(
                    key, renamings, converters, self.model.base_model_prefix, expected
                )
                # A renaming may also match a tensor that has its new name already.
                if name not in expected and key in expected:
                    name = key

                if name in expected:
                    keys_by_file = self._keys.setdefault(self.part_of(name), {})
                    keys_by_file.setdefault(path, []).append(key)
                    self._parameters[key] = name
                else:
                    self.not_loaded.setdefault(path, []).append(key)
                    unexpected.add(name)
        if self.quantization:
            require_scales(self._name, dtypes, self._parameters)
            require_weights(self._name, self._parameters)
            self._spreads = uneven_scales(self.quantization, shapes)
            unexpected -= self._find_companions()
        return unexpected

    def _find_companions(self) -> set[str]:
        """Move tensors that lie in blocks, such as scales of activations, from those that are not loaded; return them.

        Transformers does not read them, but a server does.
        """
        owners = {key.rpartition(".")[0]: name for key, name in self._parameters.items()}
        moved = set[str]()
        for path, keys in self.not_loaded.items():
            for key in keys:
                owner = owners.get(key.rpartition(".")[0], key)
                part = self.part_of(owner)
                if part != RESIDENT:
                    self._parameters[key] = owner
                    self._companions.setdefault(part, {}).setdefault(path, []).append(key)
                    moved.add(key)
            keys[:] = [key for key in keys if key not in moved]
        self.not_loaded = {path: keys for path, keys in self.not_loaded.items() if keys}
        return moved

    def part_of(self, name: str) -> str:
        """Return the block that a parameter or module is or lies in, or `RESIDENT`."""
        inside = (block for block in self.blocks if f"{name}.".startswith(f"{block}."))
        return next(inside, RESIDENT)

    def sizes(self) -> dict[str, int]:
        """Return how many bytes the output has for each parameter, and for each tensor that is not loaded."""
        if not self.copies:
            sizes = {name: weight.nbytes for name, weight in self.model.named_parameters()}
            not_loaded = chain.from_iterable(self.not_loaded.values())
            return sizes | {key: self._stored_sizes[key] for key in not_loaded}
        sizes = {}
        for key, size in self._stored_sizes.items():
            name = self._parameters.get(key, key)
            sizes[name] = sizes.get(name, 0) + size
        return sizes

    def parameters(self, part: str) -> dict[str, nn.Parameter]:
        """Return the parameters of a part by name."""
        return {
            name: weight
            for name, weight in self.model.named_parameters()
            if self.part_of(name) == part
        }

    def load(self, part: str, source: Keys | None = None) -> Any:
        """Load a block or `RESIDENT` from the checkpoint, or from other files in the same format."""
        if source is None:
            source = self._keys.get(part, {})
            self.refuse_changed(source)
        slices = {
            key: _TensorInFile(path, key, self._spreads.get(key))
            for path, keys in source.items()
            for key in keys
        }
        with _quiet():
            # None: nothing is offloaded; before transformers 5.10, no plan of tensor parallelism.
            loaded, _ = convert_and_load_state_dict_in_model(
                self.model, slices, self._load_config, None
            )
        self._conversions[part] = self.model._weight_conversions  # `as_stored` reverts them
        weights_moved()

        # `_check` looks at the weights outside of the blocks, which transformers may still tie or initialize.
        if part != RESIDENT:
            missing = [name for name in loaded.missing_keys if self.part_of(name) == part]
            check_complete(self._name, missing, loaded.mismatched_keys)
        parameters = self.parameters(part)
        for parameter in parameters.values():
            parameter.requires_grad_(False)  # a weight that is freed has no place for its gradient
        check_finite(parameters.items(), self._name)
        return loaded

    def refuse_changed(self, paths: Iterable[Path]) -> None:
        """Raise an OSError if a file has changed since the checkpoint was opened."""
        for path in paths:
            if _stamp(path) != self.files[path]:
                raise OSError(
                    f"{path} must not change while the model is pruned, but it was written meanwhile. "
                    "Start again with the model that you want."
                )

    def unload(self, part: str) -> None:
        """Free the weights of a block."""
        block = self.model.get_submodule(part)
        in_checkpoint = block.state_dict(keep_vars=True).keys()
        for path, module in block.named_modules():
            prefix = f"{path}." if path else ""
            for name, parameter in list(module.named_parameters(recurse=False)):
                empty = placeholder(parameter, self.device)
                setattr(module, name, nn.Parameter(empty, parameter.requires_grad))
            for name, buffer in list(module.named_buffers(recurse=False)):
                if prefix + name in in_checkpoint:
                    setattr(module, name, placeholder(buffer, self.device))
        self._conversions.pop(part, None)
        weights_moved()

    def as_stored(self, part: str) -> dict[str, Tensor]:
        """Return a loaded part on the CPU, under the names and in the layout of the checkpoint."""
        # The steps of `save_pretrained`, for some of the tensors.
        model = self.model
        if self.quantization:
            # Only the conversions of the family: those of the quantizer would quantize again.
            self._conversions[part] = None
        ignored = model._keys_to_ignore_on_save or ()
        tensors = {
            name: tensor
            for name, tensor in model.state_dict().items()
            if self.part_of(name) == part and name not in ignored
        }
        tensors = remove_tied_weights_from_state_dict(tensors, model)
        model._weight_conversions = self._conversions[part]
        reverted = revert_weight_conversion(model, tensors)
        return {name: tensor.cpu().contiguous() for name, tensor in reverted.items()}

    def copied(self, part: str, kept: Mapping[str, KeptEntries]) -> dict[str, Tensor]:
        """Return the tensors of a part as they are stored, without the experts that are not kept."""
        tensors: dict[str, Tensor] = {}
        stored = (self._keys.get(part, {}), self._companions.get(part, {}))
        for path, keys in chain.from_iterable(keys.items() for keys in stored):
            self.refuse_changed([path])
            with safe_open(path, framework="pt") as file:
                for key in keys:
                    tensor = file.get_tensor(key)
                    tensors.update(kept_tensor(key, tensor, self._parameters[key], kept))
        return tensors

    def save_configuration(self, folder: Path) -> None:
        """Write all files of the model except the weights."""
        if self.copies:
            self.model.config.quantization_config = self.quantization
        with _quiet():
            self.model.save_pretrained(folder, state_dict={})


class BlockLoader:
    """Keeps the blocks in memory that are in use.

    `written` returns the files of a block that was written, or None to load it from the checkpoint. Loading raises an
    OSError if a block cannot be read.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        written: Callable[[str], Keys | None] = lambda block: None,
    ) -> None:
        self._checkpoint = checkpoint
        self._written = written
        self.loaded: list[str] = []  # in the order of loading
        self._latest = ""  # the block of the latest call of `load_only`
        self._to_visit: set[str] = set()  # blocks left to `load_only`

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Load each block when the model calls it; free all blocks at the end."""
        with ExitStack() as stack:
            stack.callback(self.reset)
            for block in self._checkpoint.blocks:
                module = self._checkpoint.model.get_submodule(block)
                hook = partial(self._load_before_forward, block)
                stack.enter_context(module.register_forward_pre_hook(hook))
            yield

    def _load_before_forward(self, block: str, *_: object) -> None:
        if block not in self._to_visit:
            self.load(block)

    @contextmanager
    def visiting(self, stops: Iterable[Stop]) -> Iterator[None]:
        """Leave the blocks at which calls wait to `load_only` in this block, so that one is in memory at a time."""
        self._to_visit = {stop.name for stop in stops}
        try:
            yield
        finally:
            self._to_visit = set()

    @torch.no_grad()
    def load(self, block: str) -> None:
        """Load a block unless it is in memory."""
        if block in self.loaded:
            return
        self._checkpoint.load(block, self._written(block))
        self.loaded.append(block)

    def load_only(self, block: str) -> None:
        """Load a block, and free all others."""
        self._to_visit.discard(block)  # a model may call it again, after its visit
        if block == self._latest:  # batches may already have called another block
            return
        for loaded in list(self.loaded):
            if loaded != block:
                self.free(loaded)
        self.load(block)
        self._latest = block

    def free(self, block: str) -> None:
        """Free a block, and return its memory to the operating system: glibc would keep up to twice the block."""
        self.loaded.remove(block)
        self._checkpoint.unload(block)
        with suppress(OSError, AttributeError, TypeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)

    def reset(self) -> None:
        """Free all blocks, for another pass through the model."""
        for block in list(self.loaded):
            self.free(block)
        self._latest = ""


def available_device(device: str) -> torch.device:
    """Return a device with its index, and refuse one that cannot be used."""
    try:
        tensor = torch.zeros(1, device=device)
        tensor.tolist()  # the meta device has no values
        return tensor.device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(
            f"device must be one that PyTorch can use on this machine, but {device!r} is not: {one_line(error)}."
        ) from error


@dataclass(frozen=True)
class _TensorInFile:
    """A tensor of a file, copied when it is read.

    Each tensor opens the file anew: what has been read from an open file stays in memory as long as it is open.
    """

    path: Path
    key: str
    spread: Spread | None = None

    def get_dtype(self) -> str:
        """Return the data type, by which transformers decides how to load a tensor."""
        with safe_open(self.path, framework="pt") as file:
            return file.get_slice(self.key).get_dtype()

    def __getitem__(self, index: Any) -> Tensor:
        with safe_open(self.path, framework="pt") as file:
            tensor = file.get_slice(self.key)[index].clone()
        return self.spread(tensor) if self.spread else tensor


def _stamp(path: Path) -> tuple[int, int]:
    """Return the size and the time of the last change, in ns."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide the progress bars of transformers: each part would show one."""
    shows = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shows:
            logging.enable_progress_bar()
