"""Build a model without weights."""

from __future__ import annotations

import os

import torch
from torch import nn

from wanda_lightning.common.model_source import load_config, reading, timm_name


def model_from_config(
    name: str | os.PathLike[str], cache_dir: str | None = None, trust_remote_code: bool = False
) -> nn.Module:
    """Build a model on the meta device, from its configuration alone.

    `name` is a hub id, folder or .gguf file of a language model, or `timm:NAME` of an image classifier.
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
