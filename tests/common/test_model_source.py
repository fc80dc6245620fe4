"""What the name of a model refers to, and how soon a wrong one is refused."""

import json
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import timm
from huggingface_hub import constants, is_offline_mode
from support.modules import tiny_llama
from support.refusals import refuses

from wanda_lightning.common.model_source import ModelSource, load_config, load_tokenizer
from wanda_lightning.lightning_modules import ImageClassifierModule


def test_a_path_or_a_hub_id(monkeypatch, tmp_path):
    """A folder may have the name of an owner on the hub."""
    monkeypatch.chdir(tmp_path)
    Path("out/model").mkdir(parents=True)
    for name in ("out", "out/model", "owner/model", "model", "out/modl"):
        assert ModelSource(name).locate() == {
            "pretrained_model_name_or_path": name,
            **ModelSource(name).hub,
        }
    for name in ("./modl", "owner/model/a", "/modl", "modl.gguf", "~nobody_here/models/tiny"):
        with pytest.raises(FileNotFoundError, match=r"does not exist\. Check the path"):
            ModelSource(name).locate()


def test_a_file_with_weights_alone(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(OSError, match=r"model\.safetensors has only weights\. Give its folder"):
        ModelSource(tmp_path / "model.safetensors").locate()


def test_the_offline_mode_of_the_hub_is_a_constant(monkeypatch):
    for offline in (True, False):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        assert is_offline_mode() == offline, (
            "huggingface_hub.is_offline_mode no longer reads constants.HF_HUB_OFFLINE at each call, so "
            "common/model_source.py must make libraries read their caches alone in another way."
        )


LOADERS = {
    "configuration": lambda: load_config(ModelSource("owner/none")),
    "tokenizer": lambda: load_tokenizer(ModelSource("owner/none")),
    "weights": lambda: ImageClassifierModule("test_vit"),
}


@pytest.mark.parametrize("answers", [False, True])
@pytest.mark.parametrize("part", LOADERS)
def test_a_hub_is_asked_once(monkeypatch, tmp_path, part, answers):
    """Without a network nobody waits, and a hub that answers is not called unreachable."""
    slept = []
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port if answers else 9}"  # nothing listens at 9
        template = f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        changes = {"HF_HUB_OFFLINE": False, "HF_HUB_CACHE": str(tmp_path), "ENDPOINT": url}
        for name, value in {**changes, "HUGGINGFACE_CO_URL_TEMPLATE": template}.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(time, "sleep", slept.append)
        with pytest.raises(OSError, match=rf"^The {part} of .* cannot be loaded: ") as found:
            LOADERS[part]()
        server.shutdown()
    reasons = "no file or folder has this name, it is not in the cache, and the Hugging Face hub cannot be reached"
    assert (reasons in str(found.value)) == (not answers)
    assert slept == []
    assert not constants.HF_HUB_OFFLINE


@pytest.mark.parametrize(
    "name", ["../../x.safetensors", "/etc/x.safetensors", "..\\\\x.safetensors"]
)
def test_an_index_may_only_name_files_in_its_folder(tmp_path, name):
    tiny_llama().config.save_pretrained(tmp_path)
    index = {"weight_map": {"a": "model-1.safetensors", "b": name}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with refuses(r"index\.json must name files in its folder, but it names .*x"):
        load_config(ModelSource(tmp_path))


def test_a_classifier_without_its_prefix(tmp_path):
    timm.models.save_for_hf(timm.create_model("test_vit"), tmp_path)
    with refuses(rf"is an image classifier of timm: its name is timm:local-dir:{tmp_path}"):
        load_config(ModelSource(tmp_path))
