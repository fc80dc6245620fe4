"""Build a model without weights."""

from __future__ import annotations

import os

import torch
from torch import nn

from wanda_lightning.model_sources import load_config, reading, timm_name


def model_from_config(
    name: str | os.PathLike[str], cache_dir: str | None = None, trust_remote_code: bool = False
) -> nn.Module:
    """Build a model on the meta device, from its configuration alone.

    Args:
        name: Hub id, folder or .gguf file of a language model; or `timm:NAME` of an image classifier.
        cache_dir: Folder for downloads from the hub.
        trust_remote_code: Run the code that comes with a hub model.

    Raises:
        OSError: If the configuration is not found.
        ValueError: If timm does not know the model, or the configuration cannot be used.
    """
    with torch.device("meta"):
        if str(name).startswith("timm:"):
            import timm

            return timm.create_model(timm_name(name), pretrained=False)
        from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

        config = load_config(name, cache_dir=cache_dir, trust_remote_code=trust_remote_code)
        auto_class = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        with reading("configuration", name):
            return auto_class.from_config(config, trust_remote_code=trust_remote_code)
