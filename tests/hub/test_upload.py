"""Uploads to a hub on this machine, and what is refused before one begins."""

import pytest
from huggingface_hub import constants
from support.hub import hub as hub
from support.refusals import refuses

from wanda_lightning.hub.upload import list_files, refuse_upload, upload

FILES = {
    "config.json": b"{}",
    "README.md": b"---\nlicense: mit\n---\n",
    "model.safetensors": bytes(range(256)) * 9,
}


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "a model"
    folder.mkdir()
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    return folder


def test_only_the_files_of_the_model_are_uploaded(hub, folder):
    (folder / "logs").mkdir()
    for private in ("report.html", "logs/config.json", "adapter[1].json"):
        (folder / private).write_text("/home/me")
    assert upload(folder, "us/tiny", [*FILES, "adapter[1].json"]) == f"{hub.url}/us/tiny"
    assert hub.repositories == {"us/tiny": {**FILES, "adapter[1].json": b"/home/me"}}


def test_an_upload_replaces_weights_and_results_of_another_model(hub, folder):
    weights = ["model-00001-of-00002.safetensors", "model.safetensors.index.json", "config.json"]
    old = dict.fromkeys([*weights, ".eval_results/wanda_lightning_c4.yaml"], b"old")
    others = {"LICENSE": b"mine", "adapter_model.safetensors": b"adapters"}
    hub.repositories["us/other"] = old | others
    new = ".eval_results/wanda_lightning_boolq.yaml"
    (folder / new).parent.mkdir()
    (folder / new).write_bytes(b"[]")
    upload(folder, "us/other", list_files(folder))
    assert hub.repositories["us/other"] == {**others, **FILES, new: b"[]"}


def test_a_refused_upload_says_how_to_repeat_it(hub, folder, monkeypatch):
    hub.refused = "us/tiny"
    with pytest.raises(
        OSError, match=r"^push_to_hub='us/tiny' failed.* You have no permission to write"
    ) as caught:
        upload(folder, "us/tiny", FILES)
    included = "--include README.md --include config.json --include model.safetensors"
    assert str(caught.value).endswith(f"run: hf upload us/tiny '{folder}' {included}")


def test_a_new_repository_may_be_private(hub, folder):
    upload(folder, "us/tiny", FILES, private=True)
    assert (hub.private, hub.repositories) == ({"us/tiny"}, {"us/tiny": FILES})


def test_a_public_repository_is_refused_for_a_private_model(hub, folder):
    hub.repositories["us/public"] = {}
    message = "push_to_hub='us/public' must be a private repository with private=True, but it exists and is public"
    for refused in (
        lambda: refuse_upload("us/public", True),
        lambda: upload(folder, "us/public", FILES, True),
    ):
        with pytest.raises((ValueError, OSError), match=message) as caught:
            refused()
        assert "hf upload" not in str(caught.value)  # which would publish it
    assert hub.repositories["us/public"] == {}


@pytest.mark.parametrize("repo_id", ["tiny", "a/b/c", "us/ti ny", ""])
def test_a_name_that_no_repository_can_have_is_refused(hub, repo_id):
    with refuses("push_to_hub must be OWNER/NAME of a model repository, but"):
        refuse_upload(repo_id)
    assert hub.requests == []


@pytest.mark.parametrize(
    ("offline", "when"), [(False, "without a token"), (True, "while HF_HUB_OFFLINE is set")]
)
def test_an_upload_that_cannot_succeed_is_refused(hub, monkeypatch, offline, when):
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    with refuses(f"push_to_hub must be left out {when}.* 'us/tiny'"):
        refuse_upload("us/tiny")
    assert hub.requests == []
