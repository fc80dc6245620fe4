"""Tensors that transformers does not load, such as layers for multi-token prediction: copied, or left out.

Servers build such a layer with the number of experts in the configuration. vLLM does so for DeepSeek-V3 and Qwen3-Next:
the layer is a decoder layer of the model. So it loses as many experts as the others. No token reaches it here, so the
experts with the largest rows in the router are kept.
"""

import re
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path

from safetensors import safe_open
from torch import Tensor
from torch.linalg import vector_norm

from wanda_lightning.common.wording import quantity
from wanda_lightning.config import PruningConfig
from wanda_lightning.experts.mixtures import Mixture
from wanda_lightning.loop.run import KeptEntries
from wanda_lightning.streaming.checkpoint import Checkpoint
from wanda_lightning.streaming.quantized_checkpoint import kept_tensor

_FLOATS = ("F64", "F32", "F16", "BF16")
Entries = Mapping[str, KeptEntries]  # by name of the module with the router and the experts

# Settings for multi-token prediction: num_nextn_predict_layers, num_mtp_layers, num_mtp_modules, mtp_num_hidden_layers.
_PREDICTIONS = re.compile(r"\w*(nextn|mtp)\w*_(layers|modules)")
_ROUTER = re.compile(r"(.+)\.(gate|router)\.weight")
_OF_MIXTURE = re.compile(r"(.+)\.(gate|router|experts)\.[^.].*")


def largest_routers(
    checkpoint: Checkpoint, config: PruningConfig, mixture: Mixture
) -> Entries | None:
    """Choose the experts of each layer that is not loaded; return None if such layers cannot be copied.

    That is so if one has no router like the mixture's, if a tensor beside the router has an entry for each expert, or
    if they are quantized and the output is not.

    Args:
        checkpoint: The dense model.
        config: Says how many experts are kept.
        mixture: A mixture of the model, with the number of experts and of their groups.
    """
    entries = {}
    found = set[str]()
    for path, keys in checkpoint.not_loaded.items():
        with safe_open(path, framework="pt") as file:
            for key in keys:
                stored = file.get_slice(key)
                shape = stored.get_shape()
                inside = _OF_MIXTURE.fullmatch(key)
                if inside:
                    found.add(inside[1])
                elif _has_entries(key, shape, mixture.number):
                    return None
                is_quantized = checkpoint.quantization and stored.get_dtype() not in _FLOATS
                if is_quantized and not checkpoint.copies:
                    return None

                router = _ROUTER.fullmatch(key)
                if router and shape[0] == mixture.number:
                    sizes = vector_norm(file.get_tensor(key).float(), dim=1)
                    keep = config.pattern(sizes.view(mixture.groups, -1), config.sparsity)
                    indices = keep.flatten().nonzero().flatten().tolist()
                    entries[router[1]] = KeptEntries(0, indices)
    return entries if found <= entries.keys() else None


def _has_entries(key: str, shape: Sequence[int], number: int) -> bool:
    """Whether a tensor outside of routers and experts seems to have an entry for each expert, such as a bias."""
    return list(shape) == [number] and ("bias" in key or "expert" in key)


def read_not_loaded(checkpoint: Checkpoint, path: Path, entries: Entries) -> dict[str, Tensor]:
    """Return the tensors of a file that transformers does not load, as they are stored, without the other experts."""
    checkpoint.refuse_changed([path])
    tensors: dict[str, Tensor] = {}
    with safe_open(path, framework="pt") as file:
        for key in checkpoint.not_loaded[path]:
            inside = _OF_MIXTURE.fullmatch(key)
            owner = inside[1] if inside else key
            tensors.update(kept_tensor(key, file.get_tensor(key), owner, entries))
    return tensors


def note_on_not_loaded(checkpoint: Checkpoint, fate: str) -> str:
    """Say what happens to the tensors that transformers does not load; empty if there are none."""
    names = list(chain(*checkpoint.not_loaded.values()))
    if not names:
        return ""
    return f"transformers does not load {quantity(len(names), 'stored tensor')}, {min(names)} first: {fate}"


def note_on_copied(checkpoint: Checkpoint, entries: Entries) -> str:
    """Say that the tensors are copied, and which experts of them; empty if there are none."""
    fate = "copied as stored"
    if entries:
        number = len(next(iter(entries.values())).indices)
        fate += f", with the {number} experts of {', '.join(entries)} whose rows of the router have the largest norms"
    return note_on_not_loaded(checkpoint, fate)


def leave_out(checkpoint: Checkpoint) -> str:
    """Set the numbers of multi-token prediction layers to 0; return a note, empty if there are no such tensors.

    The tensors of these layers may not fit the changed configuration any more.
    """
    if not checkpoint.not_loaded:
        return ""
    changed: dict[str, None] = {}  # names of settings, each once
    model_config = checkpoint.model.config
    for config in (model_config, model_config.get_text_config()):
        for name, value in list(vars(config).items()):
            if _PREDICTIONS.fullmatch(name) and type(value) is int and value > 0:
                setattr(config, name, 0)
                changed[name] = None
    fate = "left out, since they may not fit the smaller model"
    fate += "".join(f"; {name} is now 0" for name in changed)
    return note_on_not_loaded(checkpoint, fate)
