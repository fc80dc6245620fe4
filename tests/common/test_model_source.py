"""What the name of a model refers to, and how soon a wrong one is refused."""

import json
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from huggingface_hub import constants
from support.hub import running_hub
from support.modules import tiny_llama

from wanda_lightning import prune_from_disk
from wanda_lightning.common.model_source import ModelSource, load_config, load_tokenizer, timm_name, why_missing
from wanda_lightning.modules import CausalLMModule, ImageClassifierModule
from wanda_lightning.modules.loading import model_from_config
from wanda_lightning.streaming.checkpoint import Checkpoint


@pytest.fixture
def network(monkeypatch, tmp_path):
    """A network in which the hub is at the given address; the times for which anyone has slept are returned."""
    slept = []

    def connect(url):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        )
        monkeypatch.setattr(time, "sleep", slept.append)
        return slept

    return connect


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        *((name, "") for name in ("out", "out/model", "owner/model", "model")),
        ("out/modl", ""),  # a folder may have the name of an owner on the hub
        *((name, "does not exist. Check the path.") for name in ("./modl", "owner/model/a", "/modl")),
        ("modl.gguf", "does not exist. Check the path. `python recipes/llm/get_smollm2.py .cache` downloads SmolLM2."),
    ],
)
def test_a_path_that_does_not_exist(monkeypatch, tmp_path, name, reason):
    monkeypatch.chdir(tmp_path)
    Path("out/model").mkdir(parents=True)
    assert why_missing(name) == reason
    if not reason:
        assert ModelSource(name).locate() == {"pretrained_model_name_or_path": name, **ModelSource(name).hub}
    else:
        with pytest.raises(FileNotFoundError):
            ModelSource(name).locate()


@pytest.mark.parametrize("load", [load_config, load_tokenizer, model_from_config])
def test_without_a_network_nobody_waits_for_the_hub(network, load):
    slept = network("http://127.0.0.1:9")  # nothing listens there
    with pytest.raises(OSError, match=r"of 'owner/none' cannot be loaded: not in the cache, and the .* hub"):
        load(ModelSource("owner/none"))
    assert slept == []


def test_nor_for_weights_of_timm(network):
    slept = network("http://127.0.0.1:9")
    for name in ("test_vit", "timm:hf-hub:owner/none"):
        with pytest.raises(OSError, match=r"^The weights of .* cannot be loaded: not in the cache, and the .* hub"):
            ImageClassifierModule(name)
    assert slept == []


def test_a_hub_that_answers_is_not_called_unreachable(network):
    with running_hub() as hub:
        network(hub.url)
        with pytest.raises(OSError, match=r"configuration of 'owner/none' cannot be loaded") as found:
            load_config(ModelSource("owner/none"))
    assert "cannot be reached" not in str(found.value)


@pytest.mark.parametrize("name", ["../../x.safetensors", "/etc/x.safetensors", "..\\\\x.safetensors", "a/../../x"])
@pytest.mark.parametrize("index", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
def test_an_index_may_only_name_files_in_its_folder(tmp_path, index, name):
    tiny_llama().config.save_pretrained(tmp_path)
    (tmp_path / index).write_text(json.dumps({"weight_map": {"a": "model-1.safetensors", "b": name}}))
    for load in (load_config, model_from_config, Checkpoint):
        with pytest.raises(ValueError, match=f"{index} must name files in its folder, but it names .*x"):
            load(ModelSource(tmp_path))


def test_the_home_of_an_unknown_user_is_a_name_like_any_other(tmp_path):
    name = "~nobody_here/models/tiny"
    assert ModelSource(name).path == Path(name)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        prune_from_disk(name, tmp_path / "out", [])


def test_links_that_the_cache_of_the_hub_makes_are_followed(tmp_path):
    model = tiny_llama()
    model.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    (tmp_path / "blobs").mkdir()
    for number, file in enumerate(sorted((tmp_path / "model").iterdir())):
        file.rename(tmp_path / f"blobs/{number}")
        file.symlink_to(f"../blobs/{number}")
    loaded = CausalLMModule(str(tmp_path / "model")).model
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in model.state_dict().items())


def test_a_classifier_without_its_prefix(tmp_path):
    (tmp_path / "config.json").write_text('{"architecture": "vit_tiny_patch16_224", "num_classes": 10}')
    with pytest.raises(
        ValueError, match=rf"{tmp_path} is an image classifier of timm: its name is timm:local-dir:{tmp_path}"
    ):
        load_config(ModelSource(tmp_path))


@pytest.mark.parametrize("name", ["s3:foo", "timm:s3:foo", "https://x/y"])
def test_places_that_timm_does_not_load_from(name):
    with pytest.raises(ValueError, match=r"model must be a name that timm .* knows, but it is '(s3:foo|https://x/y)'"):
        timm_name(name)


def test_a_package_that_a_quantized_model_needs_is_named(tmp_path, monkeypatch):
    config = tiny_llama().config
    config.quantization_config = {"quant_method": "gptq", "bits": 4}
    config.save_pretrained(tmp_path)
    safetensors.torch.save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ImportError, match=r"The weights of .* cannot be loaded: .*(optimum|gptq|accelerate)"):
        CausalLMModule(str(tmp_path)).configure_model()
