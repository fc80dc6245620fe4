"""What the name of a model refers to, and how soon a wrong one is refused."""

import time
from pathlib import Path

import pytest
from huggingface_hub import constants
from support.hub import running_hub

from wanda_lightning.model_sources import load_config, load_tokenizer, locate, timm_name, why_missing
from wanda_lightning.models import model_from_config
from wanda_lightning.modules import ImageClassifierModule


@pytest.fixture
def network(monkeypatch, tmp_path):
    """A network in which the hub is at the given address; the times for which anyone has slept are returned."""
    slept = []

    def connect(url):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
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
        *((name, "does not exist. Check the path.") for name in ("./modl", "owner/model/a", "/modl", "modl.gguf")),
    ],
)
def test_a_path_that_does_not_exist(monkeypatch, tmp_path, name, reason):
    monkeypatch.chdir(tmp_path)
    Path("out/model").mkdir(parents=True)
    assert why_missing(name) == reason
    if not reason:
        assert locate(name) == {"pretrained_model_name_or_path": name}
    else:
        with pytest.raises(FileNotFoundError):
            locate(name)


@pytest.mark.parametrize("load", [load_config, load_tokenizer, model_from_config])
def test_without_a_network_nobody_waits_for_the_hub(network, load):
    slept = network("http://127.0.0.1:9")  # nothing listens there
    with pytest.raises(OSError, match=r"of 'owner/none' cannot be found.* owner/none is not in the cache, and the hub"):
        load("owner/none")
    assert slept == []


def test_nor_for_weights_of_timm(network):
    slept = network("http://127.0.0.1:9")
    with pytest.raises(OSError, match=r"^The weights of 'test_vit' are not in the cache .* the hub cannot be reached"):
        ImageClassifierModule("test_vit")
    with pytest.raises(OSError, match=r"^owner/none is not in the cache, and the hub .* a folder: local-dir:FOLDER\.$"):
        timm_name("timm:hf-hub:owner/none")
    assert slept == []


def test_a_hub_that_answers_is_not_called_unreachable(network):
    with running_hub() as hub:
        network(hub.url)
        with pytest.raises(OSError, match=r"configuration of 'owner/none' cannot be found") as found:
            load_config("owner/none")
    assert "the hub cannot be reached" not in str(found.value)
