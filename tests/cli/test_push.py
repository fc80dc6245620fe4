"""`--push_to_hub`: what arrives at a hub on this machine is what was saved."""

import subprocess
import sys
from pathlib import Path

import pytest
from support.hub import running_hub

pytestmark = pytest.mark.filterwarnings("ignore:The number of training batches:UserWarning")


@pytest.fixture
def hub():
    with running_hub() as hub:
        yield hub


def run(hub, arguments, **environment):
    """Run a command in a process of its own, since huggingface_hub reads the environment when it is imported."""
    command = [sys.executable, "-m", "wanda_lightning", *map(str, arguments)]
    return subprocess.run(command, env=hub.environment("home", **environment), capture_output=True, text=True)


def files_in(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


@pytest.mark.parametrize("how", [[], ["--stream"]])
def test_a_pruned_model(hub, text, how):
    more = ["--save", "out/logs", "--report", "out/page.html", "--private"]
    ended = run(hub, [*text, *how, "--save_model", "out", "--push_to_hub", "us/tiny", *more])
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines()[-1] == f"Uploaded out to {hub.url}/us/tiny."
    saved = files_in("out")
    private = {name for name in saved if name.startswith(("logs", "page"))}
    assert len(private) == 3
    assert hub.repositories == {"us/tiny": {name: saved[name] for name in saved.keys() - private}}
    assert hub.private == {"us/tiny"}
    card = hub.repositories["us/tiny"]["README.md"].decode()
    assert 'from_pretrained("us/tiny")' in card
    assert "import wanda_lightning" not in card


def test_a_fine_tuned_model(hub, text, inputs):
    assert run(hub, [*text, "--save_model", "pruned"]).returncode == 0
    texts = ["--data", inputs / "long.txt", "--eval", inputs / "other.txt", "--limit", "2", "--steps", "2"]
    ended = run(hub, ["finetune", "--model", "pruned", *texts, "--save_model", "tuned", "--push_to_hub", "us/tiny"])
    assert ended.returncode == 0, ended.stderr
    assert hub.repositories == {"us/tiny": files_in("tuned")}
    card = hub.repositories["us/tiny"]["README.md"].decode()
    assert "## Fine-tuning" in card
    assert 'from_pretrained("us/tiny")' in card


def test_a_refused_upload_leaves_the_model_and_the_results(hub, text):
    hub.refused = "us/tiny"
    ended = run(hub, [*text, "--save", "log", "--save_model", "out", "--push_to_hub", "us/tiny"])
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    (message,) = [line for line in ended.stderr.splitlines() if "error: " in line]
    assert "--push_to_hub us/tiny failed: the model is saved in out, but it was not uploaded" in message
    assert "To upload it later, run: hf upload us/tiny out --include README.md --include config.json" in message
    assert {"config.json", "model.safetensors"} <= files_in("out").keys()
    assert "pruning_report.json" in files_in("log")
    assert "pruned perplexity" in ended.stdout


@pytest.mark.parametrize(
    ("more", "environment", "message"),
    [
        (["--save_model", "out"], {"HF_TOKEN": ""}, "--push_to_hub must be left out without a token"),
        ([], {}, "--push_to_hub has no meaning for pruning without --save_model. Leave it out."),
    ],
)
def test_what_cannot_succeed_is_refused_before_pruning(hub, text, more, environment, message):
    ended = run(hub, [*text, "--push_to_hub", "us/tiny", *more], **environment)
    assert ended.returncode == 2
    assert message in ended.stderr
    assert not Path("out").exists()
    assert hub.requests == []


@pytest.mark.parametrize("command", ["prune", "finetune"])
def test_malformed_names_are_refused(inputs, refused, command):
    options = ["--model", inputs / "llama", "--save_model", "out"]
    if command == "finetune":
        options += ["--data", "python-docs", "--eval", "python-docs"]
    refused(command, *options, "--push_to_hub", "a/b/c", message="--push_to_hub must be OWNER/NAME", code=2)
