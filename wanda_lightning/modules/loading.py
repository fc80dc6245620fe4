"""Load language models and image classifiers: hub id, folder, GGUF file or timm name."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import timm.optim
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def check_decoder_only(config: Any) -> None:
    if config.is_encoder_decoder:
        raise ValueError(
            f"CausalLMModule holds decoder-only language models, but {config.model_type} is an encoder-decoder. "
            "Load it with transformers and call wanda_lightning.prune(model, batches) on it directly."
        )


def load_causal_lm(name: str, dtype: str, hub: dict[str, Any], with_tokenizer: bool) -> tuple[Any, Any]:
    path = Path(name).expanduser()
    source: dict[str, Any] = {"pretrained_model_name_or_path": name, **hub}
    options: dict[str, Any] = {"dtype": dtype, "use_safetensors": True}
    if path.suffix == ".gguf":
        if not path.is_file():
            raise FileNotFoundError(f"The GGUF file {name} does not exist. Download it and give its local path.")
        source.update(pretrained_model_name_or_path=str(path.parent), gguf_file=path.name)
        # Since transformers 5.24 weights of some families stay packed unless told otherwise; before, all were unpacked.
        if hasattr(transformers, "GgufConfig"):
            options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    elif path.exists():
        _check_folder(path)
        source["pretrained_model_name_or_path"] = str(path)
    try:
        with bars_on_terminals_only():
            if path.suffix != ".gguf":
                check_decoder_only(AutoConfig.from_pretrained(**source))
            model, loaded = AutoModelForCausalLM.from_pretrained(**source, **options, output_loading_info=True)
            if missing := sorted(loaded["missing_keys"]):
                raise ValueError(
                    f"The model {name!r} has no weights for {len(missing)} parameters that its configuration asks for, "
                    f"{missing[0]} first; they would be random. Check the folder and its config.json."
                )
            has_tokenizer = not path.is_dir() or any(path.glob("*token*")) or any(path.glob("vocab*"))
            tokenizer = AutoTokenizer.from_pretrained(**source) if with_tokenizer and has_tokenizer else None
    except OSError as error:
        raise OSError(
            f"The model {name!r} was asked for, but neither a local folder nor the Hugging Face hub (revision "
            f"{hub['revision']!r}, or its cache) has it with safetensors weights. Check the name and the connection, "
            f"or give a local folder or a .gguf file. The cause: {error}"
        ) from error
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(
            f"The weights of {name!r} cannot be read, or do not fit its configuration. Download or save them again. "
            f"The cause: {error}"
        ) from error
    return model, tokenizer


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise OSError(
            f"The model {folder} is a file, and of single files only .gguf is read. Give the folder that holds "
            "config.json and the safetensors weights."
        )
    if not (folder / "config.json").is_file():
        raise OSError(f"The folder {folder} is no Hugging Face model: it has no config.json.")
    if not any(folder.glob("*.safetensors")):
        found = ", ".join(sorted(file.name for file in folder.iterdir()))
        raise OSError(
            f"The folder {folder} has no weights in safetensors, the only format that is read; it has {found}. "
            "Convert a checkpoint that you trust with AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)."
        )


@contextmanager
def bars_on_terminals_only() -> Iterator[None]:
    """Keep the progress bars of transformers out of log files."""
    logging = transformers.utils.logging
    silence = logging.is_progress_bar_enabled() and not (sys.stderr is not None and sys.stderr.isatty())
    if silence:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if silence:
            logging.enable_progress_bar()


def create_classifier(name: str, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    name = name.removeprefix("timm:")
    known = ":" in name or timm.is_model(name.partition(".")[0])  # a source such as hf-hub: is timm's to judge
    if not known:
        nearest = difflib.get_close_matches(name.partition(".")[0], timm.list_models(), n=5)
        raise ValueError(
            f"timm {timm.__version__} knows no model {name!r}"
            + (f"; the nearest names are {', '.join(nearest)}" if nearest else "")
            + ". A model on the hub is hf-hub:OWNER/NAME, one in a folder local-dir:FOLDER."
        )
    try:
        return timm.create_model(name, pretrained=pretrained, **kwargs)
    except OSError as error:
        raise OSError(
            f"The model {name!r} was asked for, but what it needs is neither in the cache nor can it be downloaded. "
            "Check the connection, name a local file with checkpoint=..., or start from random weights with "
            f"pretrained=False. The cause: {error}"
        ) from error


def load_checkpoint(model: nn.Module, checkpoint: str) -> None:
    path = Path(checkpoint).expanduser()
    if path.suffix != ".safetensors":
        raise ValueError(
            f"A checkpoint should be a .safetensors file, but it is {checkpoint}. Convert one that you trust: "
            "safetensors.torch.save_file(torch.load(path, weights_only=True), 'model.safetensors')."
        )
    if not path.is_file():
        raise FileNotFoundError(f"The checkpoint {checkpoint} does not exist. Check the path.")
    weights, expected = load_file(path), model.state_dict()
    faults = [f"{key} is missing" for key in expected if key not in weights]
    faults += [f"{key} is unknown to the model" for key in weights if key not in expected]
    faults += [
        f"{key} has the shape {tuple(weights[key].shape)} instead of {tuple(expected[key].shape)}"
        for key in expected
        if key in weights and weights[key].shape != expected[key].shape
    ]
    if faults:
        more = f"; and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise ValueError(
            f"The checkpoint {checkpoint} does not fit {type(model).__name__}: {'; '.join(faults[:5])}{more}. "
            "Check the name of the model; for other classes or image sizes give num_classes and model_kwargs, "
            "or a folder that holds the whole model as timm:local-dir:FOLDER."
        )
    model.load_state_dict(weights)
