"""A model from its configuration alone."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import torch
from torch import nn


def model_from_config(name: str, cache_dir: str | None = None, trust_remote_code: bool = False) -> nn.Module:
    """A model without weights, from its configuration alone, on the meta device.

    Args:
        name: Hub id, folder or .gguf file of a language model; or `timm:NAME` of an image classifier.
        cache_dir: Where downloads from the hub are kept.
        trust_remote_code: Run the code that comes with a hub model.

    Raises:
        OSError: If there is no such configuration.
        ValueError: If timm knows no such model.
    """
    with torch.device("meta"):
        if name.startswith("timm:"):
            import timm

            try:
                return timm.create_model(name.removeprefix("timm:"), pretrained=False)
            except RuntimeError as error:
                near = difflib.get_close_matches(name.removeprefix("timm:"), timm.list_models(), n=3)
                raise ValueError(f"timm cannot make {name!r}: {error}. Near names: {', '.join(near)}") from error
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

        source: dict[str, Any] = {"cache_dir": cache_dir, "trust_remote_code": trust_remote_code}
        if name.endswith(".gguf"):
            path = Path(name)
            if not path.is_file():
                raise FileNotFoundError(f"there is no GGUF file {name}")
            name, source["gguf_file"] = str(path.parent), path.name
        try:
            config = AutoConfig.from_pretrained(name, **source)
        except (OSError, ValueError) as error:
            raise OSError(
                f"no configuration of a language model was found for {name!r}: give a hub id, a folder with "
                f"config.json, a .gguf file, or timm:NAME. The cause: {error}"
            ) from error
        auto_class = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        return auto_class.from_config(config, trust_remote_code=trust_remote_code)
