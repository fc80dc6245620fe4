"""Merge adapters into the weights and keep every zero."""

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
)
from torch import Tensor, nn

from wanda_lightning.lora.layer import KeepZerosLinear
from wanda_lightning.lora.targets import refuse_quantized


def _zero_bits(weight: Tensor) -> Any:
    return np.packbits((weight.detach() == 0).flatten().cpu().numpy())


def _targeted_weights(model: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    """Name here, name after unloading, and weight of each matrix that has adapters or is trained whole beside them."""
    for name, weight in model.named_parameters(remove_duplicate=False):
        after = name.replace(".original_module.", ".").replace(".base_layer.", ".")
        if after != name and weight.dim() >= 2:
            yield name, after, weight


def merge(model: PeftModel, reprune: bool = False) -> nn.Module:
    """Merge the active adapters into the weights and return the model without PEFT, still sparse if they keep zeros.

    Keep-zeros adapters merge to W + s (B A) * keep, and every zero is checked afterwards. Plain adapters merge to the
    dense W + s B A; with `reprune` the zeros that the weights had before are put back, and the model that comes out is
    then not the one that was trained: it lacks s B A where W was zero, so evaluate it again. The same holds for the
    matrices in `modules_to_save`, which PEFT trains whole. Needs 1 bit of memory for each targeted weight.

    Args:
        model: what `peft.get_peft_model` or `PeftModel.from_pretrained` returned. It is consumed.
        reprune: put zeros back that plain adapters filled.

    Raises:
        ValueError: the model is no `PeftModel`, has adapters that cannot be merged, or a target is quantised.

    Warns:
        UserWarning: zeros are lost, with the sparsity of the targeted matrices before and after.

    Source: Hu et al. 2021, section 4.1, for merging; Sun et al. 2024 keep the adapters of a pruned model apart.
    """
    if not isinstance(model, PeftModel) or not isinstance(model.base_model, BaseTuner):
        kind = (
            f"a PeftModel of {type(model.base_model).__name__}"
            if isinstance(model, PeftModel)
            else type(model).__name__
        )
        raise ValueError(
            f"merge needs a PeftModel with adapters in its layers, as peft.get_peft_model returns it, not {kind}."
        )
    tuner = model.base_model
    layers = {name: layer for name, layer in tuner.model.named_modules() if isinstance(layer, BaseTunerLayer)}
    for name, layer in layers.items():
        refuse_quantized(name, layer.get_base_layer())
    names = list(dict.fromkeys([n for layer in layers.values() for n in layer.merged_adapters] + model.active_adapters))
    for layer in layers.values():
        if layer.merged:
            layer.unmerge()  # the zeros are those of the weights without adapters

    keeping = tuple(f"{name}.base_layer." for name, layer in layers.items() if isinstance(layer, KeepZerosLinear))
    before = {after: (name, _zero_bits(weight)) for name, after, weight in _targeted_weights(tuner.model)}
    merged = tuner.merge_and_unload(adapter_names=names)
    after = dict(merged.named_parameters(remove_duplicate=False))
    lost, zeros_before, zeros_after, total = [], 0, 0, 0
    for name, (wrapped, zeros) in before.items():
        if name not in after:
            continue
        now = _zero_bits(after[name])
        total += after[name].numel()
        zeros_before += _count(zeros)
        zeros_after += _count(now)
        if (zeros & ~now).any():
            lost.append(name)
            assert not wrapped.startswith(keeping), f"{name} lost zeros in merging keep-zeros adapters"
            if reprune:
                _put_back(after[name], zeros)
    if lost and not reprune:
        warnings.warn(
            f"Merging took the sparsity of the {len(before)} targeted matrices from {zeros_before / total:.2%} to "
            f"{zeros_after / total:.2%}: plain LoRA and modules_to_save fill zeros (first: {lost[0]}). Train with "
            "KeepZerosLoraConfig, keep the adapters apart, or merge(model, reprune=True) and evaluate again.",
            stacklevel=2,
        )
    return merged


def _count(bits: Any) -> int:
    return int(np.unpackbits(bits).sum())


@torch.no_grad()
def _put_back(weight: Tensor, zeros: Any) -> None:
    flags = torch.from_numpy(np.unpackbits(zeros, count=weight.numel()).view(np.bool_))
    weight.masked_fill_(flags.view(weight.shape).to(weight.device), 0)
