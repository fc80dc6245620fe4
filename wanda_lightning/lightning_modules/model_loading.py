"""Load language models, embedding models and image classifiers from a hub id, a folder, a GGUF file or a timm name.

Weights are read only from safetensors and GGUF files, since other checkpoint formats can run code. Missing, misshapen,
non-finite or quantized weights raise an error.
"""

import inspect
import re
import warnings
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import timm
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from torch.nn import Module
from transformers import AutoModelForCausalLM

from wanda_lightning.common.aliases import Kwargs, StrPath
from wanda_lightning.common.busy_machine import warn_if_busy
from wanda_lightning.common.checks import require_extra
from wanda_lightning.common.dtypes import DTYPES
from wanda_lightning.common.errors import UserError
from wanda_lightning.common.model_source import (
    ModelSource,
    is_embedding_model,
    load_config,
    reading,
    timm_name,
)
from wanda_lightning.common.wording import did_you_mean, quantity
from wanda_lightning.models.layers import all_finite
from wanda_lightning.units.shrunk_model import register_shrunk_model

_CHECKED = (*DTYPES.values(), torch.float64)
_OTHERS = "Load it with transformers and call wanda_lightning.prune(model, batches) on it directly."
_CONVERTER = "AutoModelForCausalLM.from_pretrained(...).save_pretrained(...), which needs memory for all weights once"
_EMBEDDING_CONVERTER = "SentenceTransformer(...).save(...)"
_CAUSAL = ("gpt_neox_japanese",)  # although its configuration says is_decoder=False


def check_source(source: ModelSource, weights: bool = True) -> None:
    """Raise an error for the configuration of another kind of model, and for a folder without `weights` in safetensors.

    For a GGUF file, only check that it exists.
    """
    if "gguf_file" not in source.locate():
        _check_decoder_only(load_config(source))
        if weights and source.path.is_dir():
            require_safetensors(source.path)


def load_causal_lm(source: ModelSource, dtype: str) -> Any:
    """Load a decoder-only language model.

    Raises an OSError for a model that neither a folder nor the hub has in safetensors, and a ValueError for files that
    are broken or contradict each other, and for weights that cannot be used.
    """
    warn_if_busy()
    check_source(source)
    name = str(source)
    is_gguf = source.path.suffix == ".gguf"
    options = source.locate()
    # Before transformers 5.24 GGUF weights were always dequantized; since then, this option is needed for some models.
    if is_gguf and hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with reading("weights", source, on_hub=not source.path.exists()):
        model, loaded = AutoModelForCausalLM.from_pretrained(
            **options,
            dtype=dtype,
            use_safetensors=True,
            use_kernels=False,  # the default of transformers 5.25 downloads kernels, which have no `meta` device
            ignore_mismatched_sizes=True,  # `check_complete` names them
            output_loading_info=True,
        )

    check_causal(model)
    check_complete(name, loaded["missing_keys"], loaded["mismatched_keys"])
    unused = set(loaded["unexpected_keys"])
    fate = ", which `save_pretrained` leaves out"
    if not is_gguf:
        fate += " (`prune_from_disk` and `prune --stream` copy them)"
        if getattr(model.config, "quantization_config", None) is None:
            files = sorted(source.loaded_folder().glob("*.safetensors"))
            check_stored_as_float(name, files, model)
            unused |= _ignored(model, _stored_dtypes(files))
    warn_of_unused(name, unused, fate)
    check_finite(model.named_parameters(), name)
    _warn_of_dequantized(source, model)
    return model


def _warn_of_dequantized(source: ModelSource, model: Any) -> None:
    """Warn that a model in FP8, for example, is in another dtype now, in which it would be saved."""
    if source.path.suffix == ".gguf":
        return
    settings = getattr(load_config(source), "quantization_config", None) or {}
    if settings and all(weight.dtype in _CHECKED for weight in model.parameters()):
        dtype = str(model.dtype).removeprefix("torch.")
        warnings.warn(
            f"The model {str(source)!r} is quantized ({settings.get('quant_method')}), and was dequantized to {dtype}, "
            "in which it will be saved. To remove experts from the quantized weights, use `shrink --stream --experts`, "
            "or `shrink_from_disk`.",
            stacklevel=2,
        )


def _ignored(model: Any, stored: Collection[str]) -> set[str]:
    """Return the stored tensors that transformers leaves out without a warning, such as `mtp.*`.

    Transformers has no public name for the patterns of the tensors that it leaves out.
    """
    ignored = set[str]()
    for pattern in model._keys_to_ignore_on_load_unexpected or ():
        # A pattern may stand for another model of the family: `layers.46` is the last one of GLM-4.5-Air only.
        if not any(re.search(pattern, name) for name in model.state_dict()):
            ignored.update(name for name in stored if re.search(pattern, name))
    return ignored


def _check_decoder_only(config: Any) -> None:
    if config.is_encoder_decoder:
        raise UserError(
            f"model must be a decoder, but {config.model_type} is an encoder-decoder. {_OTHERS}"
        )


def check_causal(model: Module) -> None:
    """Raise a ValueError for an encoder, which attends to the next token, so predicting it would be trivial."""
    config: Any = model.config
    _check_decoder_only(config)
    options = inspect.signature(type(config)).parameters
    if "is_decoder" not in options or config.is_decoder or config.model_type in _CAUSAL:
        return
    if not any(getattr(module, "is_causal", None) is True for module in model.modules()):
        raise UserError(
            f"model must predict each token from the ones before it, but {config.model_type} is an encoder: it attends "
            f"to all tokens, so its perplexity would be meaningless. {_OTHERS}"
        )


def check_complete(name: str, missing: Collection[str], mismatched: Collection[Any]) -> None:
    """Raise a ValueError for weights that are missing or misshapen."""
    if mismatched:
        key, stored, expected = min(mismatched)
        raise UserError(
            f"config.json of {name!r} does not fit {quantity(len(mismatched), 'weight')}, {key} first: {tuple(stored)} "
            f"instead of {tuple(expected)}. If `shrink` wrote it, set trust_remote_code; else correct config.json."
        )
    if missing:
        raise UserError(
            f"The model {name!r} has no weights for {len(missing)} parameters of its configuration, {min(missing)} "
            "first; they would be random. Check the folder and its config.json."
        )


def warn_of_unused(name: str, unused: Collection[str], fate: str = "") -> None:
    """Warn of stored weights without a place in the model."""
    if unused:
        warnings.warn(
            f"The model {name!r} has no place for {quantity(len(unused), 'stored tensor')}, {min(unused)} first{fate}. "
            "If it should use them, correct config.json.",
            stacklevel=2,
        )


def create_classifier(name: StrPath, pretrained: bool, kwargs: Kwargs) -> Module:
    """Create an image classifier of timm, with a name that `timm_name` accepts and more arguments of `create_model`.

    Raises an OSError for weights that can neither be downloaded nor found, and a ValueError for a wrong option or file.
    """
    warn_if_busy()
    full_name = timm_name(name)
    is_folder = full_name.startswith("local-dir:")
    folder = Path(full_name.removeprefix("local-dir:"))
    if is_folder and pretrained:
        require_safetensors(
            folder,
            "safetensors.torch.save_file; in Python, pretrained=False starts from random ones",
        )
    register_shrunk_model()
    is_built_in = ":" not in full_name
    if is_built_in:
        _refuse_unknown(full_name)

    # For a name that timm knows, the hub has only the weights.
    on_hub = not is_folder and (pretrained or not is_built_in)
    part = "weights" if pretrained else "configuration"
    with reading(part, full_name, on_hub):
        model = timm.create_model(full_name, pretrained=pretrained, **kwargs)
    if pretrained:
        if is_folder:
            check_stored_as_float(full_name, folder.glob("*.safetensors"), model)
        check_finite(model.named_parameters(), full_name)
    return model


def _refuse_unknown(name: str) -> None:
    """Raise a ValueError with similar names for one that timm does not know, before the hub is asked for weights."""
    try:
        timm.get_pretrained_cfg(name)
        is_known = timm.is_model(name)
    except RuntimeError:  # no weights of this model have the tag after the dot
        is_known = False
    if not is_known:
        names = timm.list_pretrained() if "." in name else timm.list_models()
        raise UserError(
            f"model must be a name that timm knows (timm.list_models), but it is {name!r}."
            f"{did_you_mean(name, names)}"
        )


def load_embedding_model(source: ModelSource, **options: Any) -> Any:
    """Load a model of sentence-transformers, with more options of `from_pretrained`; errors as for language models."""
    warn_if_busy()
    require_extra("embedding", "sentence_transformers", purpose="Embedding models")
    if not is_embedding_model(source):
        raise UserError(
            f"model must be an embedding model, but {source} has no modules.json, which says how embeddings of tokens "
            f"become one of the sentence. Make such a folder with {_EMBEDDING_CONVERTER}."
        )
    if source.path.is_dir():
        require_safetensors(source.path, _EMBEDDING_CONVERTER)
    from sentence_transformers import SentenceTransformer

    with reading("weights", source, on_hub=not source.path.exists()):
        model = SentenceTransformer(
            str(source.path if source.path.exists() else source),
            device=options.get("device_map", "cpu"),
            revision=source.revision,
            cache_folder=source.cache_dir,
            trust_remote_code=source.trust_remote_code,
            model_kwargs={"use_safetensors": True, "use_kernels": False, **options},
        )
        inner: Any = model[0]
        files = source.loaded_folder().glob("*.safetensors")
        check_stored_as_float(str(source), files, inner.auto_model)
    check_finite(model.named_parameters(), str(source))
    return model


def load_checkpoint(model: Module, checkpoint: StrPath) -> None:
    """Load all weights of a model from a `.safetensors` file; refuse one that is damaged or does not fit the model."""
    path = ModelSource(checkpoint).path
    if path.suffix != ".safetensors":
        raise UserError(
            f"checkpoint must be a .safetensors file, but it is {path}. Convert it with safetensors.torch."
        )
    check_stored_as_float(str(path), [path], model)
    with reading("weights", path):
        model.load_state_dict(load_file(path))
    check_finite(model.named_parameters(), str(checkpoint))


def model_from_config(source: ModelSource) -> Module:
    """Build a model on the meta device, from its configuration alone."""
    if is_embedding_model(source):
        return load_embedding_model(source, device_map="meta")
    with torch.device("meta"):
        if str(source).startswith("timm:"):
            return create_classifier(source.name, False, {})
        config = load_config(source)
        with reading("configuration", source):
            return AutoModelForCausalLM.from_config(
                config, trust_remote_code=source.trust_remote_code
            )


def require_safetensors(folder: Path, converter: str = _CONVERTER) -> None:
    """Refuse a folder without weights in safetensors; `converter` makes such weights from others."""
    if not any(folder.glob("*.safetensors")):
        files = ", ".join(sorted(file.name for file in folder.iterdir())) or "nothing"
        raise OSError(
            f"model must be a folder with weights in safetensors, the only format that is read, but {folder} has "
            f"{files}. Convert a checkpoint that you trust with {converter}."
        )


def check_finite(parameters: Iterable[tuple[str, nn.Parameter]], name: str) -> None:
    """Raise a ValueError that names the first weight of a model with NaN or infinity."""
    for key, weight in parameters:
        # Others, such as quantized ones, cannot be tested.
        if weight.is_meta or type(weight) is not nn.Parameter or weight.dtype not in _CHECKED:
            continue
        if not all_finite(weight):
            raise UserError(
                f"The model {name!r} cannot be used: the weight of {key.removesuffix('.weight')} holds NaN or infinity "
                f"in {str(weight.dtype)[6:]}. Check the checkpoint, or load it in a wider dtype, such as bfloat16."
            )


def _stored_dtypes(files: Iterable[Path]) -> dict[str, str]:
    """Return the data types of all tensors in `.safetensors` files, by name."""
    dtypes = {}
    for path in files:
        with reading("weights", path), safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (it is no mapping)
                dtypes[key] = file.get_slice(key).get_dtype()
    return dtypes


def check_stored_as_float(name: str, files: Iterable[Path], model: Module) -> None:
    """Raise a ValueError for integers stored for a floating-point parameter: their scales are not known."""
    parameters = {
        key for key, parameter in model.named_parameters() if parameter.is_floating_point()
    }
    # A name may have a first part, such as `model.`, in the model or in the file only.
    parameters |= {key.partition(".")[2] for key in parameters}
    for key, dtype in _stored_dtypes(files).items():
        is_parameter = key in parameters or key.partition(".")[2] in parameters
        if is_parameter and dtype.startswith(("I", "U", "BOOL")):
            raise UserError(
                f"The model {name!r} stores {key} as {dtype}: packed integers, whose scales are not known. Give "
                "the model in float32, bfloat16 or float16."
            )
