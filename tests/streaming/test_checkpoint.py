"""Sources, places and devices that cannot be used are refused before anything is written."""

import os
import re
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.disk import add_predictions, batches, stream
from support.refusals import refuses
from support.zoo import causal
from transformers import LlamaForCausalLM

from wanda_lightning.common.model_source import ModelSource
from wanda_lightning.lightning_modules.model_loading import load_causal_lm
from wanda_lightning.streaming import perplexity_from_disk
from wanda_lightning.streaming.checkpoint import Checkpoint

pytestmark = pytest.mark.filterwarnings("ignore")

NO_GRADIENTS = {"allocation": "uniform", "pattern": "unstructured_layer"}


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        (
            {"sequential": "none", "method": "sparsegpt"},
            "sequential='none' with solver='sparsegpt' needs the Gram",
        ),
        (
            {"method": "thorough", **NO_GRADIENTS},
            "recovery='distill' needs the whole model in memory",
        ),
        (
            {"method": "best"},
            r"method='best' reads gradients.* Use allocation='uniform' and pattern=",
        ),
        ({"units": 0.5, "skip": ["*.mlp.*"]}, r"units=0\.5 finds no hidden units in the model"),
        ({"units": 0.5, "by": "loss"}, r"by='loss' reads gradients.* Use by='equal', or"),
        ({"experts": 0.97}, r"experts=0\.97 drops all of the 8 experts"),
        ({"units": 0.5, "experts": 0.5}, "From disk, units and experts leave in two runs"),
    ],
)
def test_choices_that_cannot_be_used_from_disk(source_for, out, choices, message):
    source = source_for(str(choices))
    with refuses(message):
        stream(source, out, batches(), **choices)
    assert not (out).exists()


@pytest.mark.parametrize("device", ["cuda:99", "meta", "nonsense"])
def test_devices_that_cannot_be_used_are_refused(source, out, device):
    message = f"device must be one .* but '{device}' is not: "
    with refuses(message):
        stream(source, out, batches(), device=device)
    with refuses(message):
        perplexity_from_disk(source, batches(), device=device)
    assert not (out).exists()


def test_bad_places_are_refused(source, tmp_path):
    for place in (source, source / "out"):
        with refuses("output must lie outside of the source"):
            stream(source, place, batches())
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="not empty"):
        stream(source, tmp_path, batches())


def test_a_changed_source_is_refused(copied, out, monkeypatch):
    load = Checkpoint.load

    def touching(self, part, *args):
        if part == "model.layers.2":
            for path in copied.glob("*.safetensors"):
                os.utime(path, (0, 0))
        return load(self, part, *args)

    monkeypatch.setattr(Checkpoint, "load", touching)
    with pytest.raises(OSError, match="must not change while the model is pruned"):
        stream(copied, out, batches())


UP_PROJ = "model.layers.3.mlp.up_proj.weight"


@pytest.fixture
def file_of_up_proj(copied):
    """The file of the copy with one of the weights."""
    return next(path for path in copied.glob("*.safetensors") if UP_PROJ in load_file(path))


def test_a_damaged_file_is_refused(copied, file_of_up_proj, out):
    content = file_of_up_proj.read_bytes()
    file_of_up_proj.write_bytes(content[: len(content) // 2])
    with refuses("a file is damaged"):
        stream(copied, out, batches())


def test_a_missing_weight_is_refused(copied, file_of_up_proj, out):
    tensors = {key: tensor.clone() for key, tensor in load_file(file_of_up_proj).items()}
    del tensors[UP_PROJ]
    save_file(tensors, file_of_up_proj, metadata={"format": "pt"})
    with refuses(f"no weights for 1 parameters .*{re.escape(UP_PROJ)}"):
        stream(copied, out, batches())


def test_a_missing_file_is_refused(copied, file_of_up_proj, out):
    file_of_up_proj.unlink()
    with pytest.raises((OSError, ValueError), match=re.escape(file_of_up_proj.name)):
        stream(copied, out, batches())
    assert not out.exists()


def test_tensors_without_a_place_are_counted_and_missing_ones_refused(copied):
    file = copied / "config.json"
    file.write_text(file.read_text().replace('"num_hidden_layers": 4', '"num_hidden_layers": 3'))
    text = r"no place for 9 stored tensors, model\.layers\.3\.input_layernorm\.weight first"
    with pytest.warns(UserWarning, match=text):
        Checkpoint(ModelSource(copied))
    with pytest.warns(UserWarning, match=text):
        load_causal_lm(ModelSource(copied), "auto")
    file.write_text(file.read_text().replace('"num_hidden_layers": 3', '"num_hidden_layers": 5'))
    with refuses(r"has no weights for 9 parameters .* model\.layers\.4"):
        Checkpoint(ModelSource(copied))


def test_a_loaded_model_says_what_transformers_ignores(tmp_path):
    causal("qwen3_next").build().save_pretrained(tmp_path)
    add_predictions(tmp_path)
    with pytest.warns(
        UserWarning,
        match=r"no place for 2 stored tensors, mtp\.fc\.weight first, which `save_pretrained` leaves out",
    ):
        load_causal_lm(ModelSource(tmp_path), "auto")


def test_layers_that_transformers_ignores_in_another_size_of_a_family_are_no_reason_to_warn(
    tmp_path,
):
    model = causal("glm4_moe").build()
    # In GLM-4.5-Air, which has 46 layers, `layers.46` predicts more tokens.
    model.config.num_hidden_layers = 47
    type(model)(model.config).save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_causal_lm(ModelSource(tmp_path), "auto")


def test_weights_in_other_formats_are_refused(copied, out):
    torch.save(LlamaForCausalLM.from_pretrained(copied).state_dict(), copied / "pytorch_model.bin")
    for file in copied.glob("*.safetensors*"):
        file.unlink()
    for expected in (
        r"generation_config\.json, pytorch_model\.bin\. Convert",
        r"generation_config\.json\. Convert",
    ):
        with pytest.raises(
            OSError, match=rf"weights in safetensors, .* has config\.json, {expected}"
        ):
            stream(copied, out, batches())
        (copied / "pytorch_model.bin").unlink(missing_ok=True)
    for name in ("timm:test_vit", "model.gguf"):
        with refuses("only Hugging Face models in safetensors"):
            stream(name, out, batches())
    assert not (out).exists()


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        (
            "model.layers.2.input_layernorm.weight",
            lambda tensor: tensor * torch.nan,
            "holds NaN or infinity",
        ),
        ("model.norm.weight", lambda tensor: tensor * torch.inf, "holds NaN or infinity"),
        (
            "model.layers.1.mlp.up_proj.weight",
            lambda tensor: tensor.to(torch.int8),
            "stores .* as I8",
        ),
    ],
)
def test_weights_that_cannot_be_used_are_refused(copied, out, key, change, message):
    for file in copied.glob("*.safetensors"):
        tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
        if key in tensors:
            save_file({**tensors, key: change(tensors[key])}, file, metadata={"format": "pt"})
    with refuses(message):
        stream(copied, out, batches(), method="wanda")
