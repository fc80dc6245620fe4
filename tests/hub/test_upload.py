"""Uploads to a hub on this machine, and what is refused before one begins."""

import subprocess
import sys

import pytest
from support.hub import running_hub

from wanda_lightning.hub.upload import refuse_upload

UPLOAD = (
    "import sys; from wanda_lightning.hub.upload import *; refuse_upload(sys.argv[2]);"
    "print(upload(sys.argv[1], sys.argv[2], sys.argv[3].split(','), sys.argv[4:] == ['private']))"
)


@pytest.fixture
def hub():
    with running_hub() as hub:
        yield hub


FILES = {"config.json": b"{}", "README.md": b"---\nlicense: mit\n---\n", "model.safetensors": bytes(range(256)) * 9}


@pytest.fixture
def model(tmp_path):
    """A folder with the kinds of files that a model has."""
    (tmp_path / "a model").mkdir()
    for name, content in FILES.items():
        (tmp_path / "a model" / name).write_bytes(content)
    return tmp_path / "a model", FILES


def run(hub, folder, repo_id, files=FILES, *how, **environment):
    """Upload in a process of its own, since huggingface_hub reads the environment when it is imported."""
    return subprocess.run(
        [sys.executable, "-c", UPLOAD, folder, repo_id, ",".join(files), *how],
        env=hub.environment(folder.parent / "home", **environment),
        capture_output=True,
        text=True,
    )


def test_a_folder_is_uploaded_to_a_new_repository(hub, model):
    folder, files = model
    ended = run(hub, folder, "us/tiny")
    assert (ended.returncode, ended.stdout) == (0, f"{hub.url}/us/tiny\n"), ended.stderr
    assert hub.repositories == {"us/tiny": files}


def test_a_folder_is_uploaded_with_hf_xet_installed(hub, model):
    folder, files = model
    (folder / "model.safetensors").rename(folder / "model.bin")  # the hub of the tests takes it without xet
    ended = run(hub, folder, "us/tiny", ["model.bin"], HF_HUB_DISABLE_XET="0")
    assert ended.returncode == 0, ended.stderr
    assert hub.repositories["us/tiny"]["model.bin"] == files["model.safetensors"]


def test_weights_of_another_model_in_the_repository_are_deleted(hub, model):
    folder, files = model
    names = ["model-00001-of-00002.safetensors", "model.safetensors.index.json"]
    others = {"LICENSE": b"mine", "adapter_model.safetensors": b"adapters"}
    hub.repositories["us/tiny"] = {**dict.fromkeys(names, b"old"), **others, "config.json": b"old"}
    ended = run(hub, folder, "us/tiny")
    assert ended.returncode == 0, ended.stderr
    assert hub.repositories["us/tiny"] == {**others, **files}


def test_a_refused_upload_says_how_to_repeat_it(hub, model):
    folder, files = model
    hub.refused = "us/tiny"
    ended = run(hub, folder, "us/tiny")
    assert ended.returncode != 0
    last = ended.stderr.strip().splitlines()[-1]
    assert f"push_to_hub='us/tiny' failed: the model is saved in {folder}, but it was not uploaded" in last
    assert "You have no permission to write" in last
    included = "--include README.md --include config.json --include model.safetensors"
    assert last.endswith(f"run: hf upload us/tiny '{folder}' {included}")
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == files


def test_only_the_files_of_the_model_are_uploaded(hub, model):
    folder, files = model
    (folder / "logs").mkdir()
    for private in ("report.html", "logs/config.json", "config.json.bak", "adapter[1].json"):
        (folder / private).write_text("/home/me")
    ended = run(hub, folder, "us/tiny", [*files, "adapter[1].json"])
    assert ended.returncode == 0, ended.stderr
    assert hub.repositories == {"us/tiny": {**files, "adapter[1].json": b"/home/me"}}


def test_a_private_repository(hub, model):
    folder, files = model
    assert run(hub, folder, "us/tiny", FILES, "private").returncode == 0
    assert hub.private == {"us/tiny"}
    assert hub.repositories == {"us/tiny": files}
    hub.repositories["us/public"] = {}
    ended = run(hub, folder, "us/public", FILES, "private")
    last = ended.stderr.strip().splitlines()[-1]
    assert "us/public' failed" in last
    assert "the repository exists and is public; make it private, or choose another name" in last
    assert hub.repositories["us/public"] == {}


def test_a_hub_that_cannot_be_reached(hub, model):
    ended = run(hub, model[0], "us/tiny", HF_ENDPOINT="http://127.0.0.1:9")
    assert "hf upload us/tiny" in ended.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"HF_TOKEN": ""}, "push_to_hub must be left out without a token that may write to 'us/tiny'"),
        ({"HF_HUB_OFFLINE": "1"}, "push_to_hub must be left out while HF_HUB_OFFLINE is set, but it is 'us/tiny'"),
    ],
)
def test_what_cannot_succeed_is_refused_without_a_request(hub, model, environment, message):
    ended = run(hub, model[0], "us/tiny", **environment)
    assert message in ended.stderr.strip().splitlines()[-1]
    assert hub.requests == []


@pytest.mark.parametrize("repo_id", ["tiny", "a/b/c", "us/ti ny", "", "us--tiny", True])
def test_malformed_names_are_refused(repo_id):
    with pytest.raises(ValueError, match="push_to_hub must be OWNER/NAME of a model repository, but it is "):
        refuse_upload(repo_id)
