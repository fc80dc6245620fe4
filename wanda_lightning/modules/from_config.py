"""Build a model without weights."""

from __future__ import annotations

import torch
from torch import nn

from wanda_lightning.common.model_source import ModelSource, load_config, reading, timm_name


def model_from_config(source: ModelSource) -> nn.Module:
    """Build a language model or an image classifier on the meta device, from its configuration alone."""
    with torch.device("meta"):
        if str(source).startswith("timm:"):
            import timm

            return timm.create_model(timm_name(source.name), pretrained=False)
        from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

        config = load_config(source)
        auto_class = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        with reading("configuration", source):
            return auto_class.from_config(config, trust_remote_code=source.trust_remote_code)
