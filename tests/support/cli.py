"""Run commands in this process, in an empty working directory on small inputs, and measure what they wrote.

The fixtures work in the folders whose conftest.py imports them.
"""

import math
import signal
import sys
import warnings

import numpy as np
import pytest
import rich
import timm
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from support.layers import seed
from support.reference import divergence
from support.zoo import save_llama_of_bytes

from wanda_lightning.cli import main

SEQLEN = 32
OUT = ["--save", "out", "--save_model", "out/model"]
# Warnings of tests that run commands on tiny models.
IGNORED_WARNINGS = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers",
    "ignore:.*and the model has .* outputs",
    "ignore:The number of training batches:UserWarning",
)


def run(*arguments):
    """The exit status of `wanda-lightning ARGUMENTS`; an option that is given again replaces the earlier one."""
    words = [str(argument) for argument in arguments]
    for index in reversed(range(len(words))):
        if words[index].startswith("--") and words[index] in words[index + 1 :]:
            has_value = not words[index + 1].startswith("--")
            del words[index : index + 1 + has_value]
    try:
        return main(words)
    except SystemExit as stop:
        return stop.code


def zeros_by_layer(model):
    return {name: m.weight == 0 for name, m in model.named_modules() if name.endswith("_proj")}


def perplexity_by_hand(model, text, windows):
    """The reference's formula, with the loss of transformers; on the first windows of the text."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model.name_or_path)
    ids = torch.tensor(tokenizer(text).input_ids)
    ids = ids[: len(ids) // SEQLEN * SEQLEN].view(-1, SEQLEN)[:windows]
    with torch.no_grad():
        losses = [model(input_ids=window[None], labels=window[None]).loss.item() for window in ids]
    return math.exp(sum(losses) / len(losses))


def agreement_by_hand(dense, pruned, text, windows):
    """The share of tokens with the same most likely prediction, and the mean divergence, with a loop over tokens."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(dense.name_or_path)
    ids = torch.tensor(tokenizer(text).input_ids)[: windows * SEQLEN].view(-1, SEQLEN)
    with torch.no_grad():
        before = dense(ids).logits[:, :-1].flatten(0, 1).double()
        after = pruned(ids).logits[:, :-1].flatten(0, 1).double()
    same = (before.argmax(-1) == after.argmax(-1)).double().mean().item()
    return {
        "same_top": pytest.approx(same),
        "kl_divergence": pytest.approx(divergence(after, before).item(), rel=1e-3, abs=1e-7),
        "predictions": len(after),
    }


def everything_in(folder):
    """The content of each file, by path; False for a folder."""
    return {
        str(path.relative_to(folder)): path.is_file() and path.read_bytes()
        for path in folder.rglob("*")
    }


@pytest.fixture(autouse=True)
def shell(tmp_path, monkeypatch):
    """An empty working directory, no network and no pictures on model cards, whose drawing takes longer than pruning.

    What a command changes in its process is put back.
    """
    import datasets
    import huggingface_hub.constants
    from lightning.pytorch import _logger

    # These libraries read the environment when they are imported.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    # Earlier downloads must not be found.
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path.parent / "no_cache")
    monkeypatch.setattr("wanda_lightning.PruningReport._picture", lambda report: b"a picture")
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    monkeypatch.setenv("PL_SEED_WORKERS", "0")
    monkeypatch.setenv("COLUMNS", "200")
    # Lightning 2.6 calls what jsonargparse 4.53 deprecates.
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    monkeypatch.setattr(sys, "argv", ["wanda-lightning"])  # which `fit` and the like replace
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    monkeypatch.chdir(tmp_path)
    rich.reconfigure()  # the bars of a command are on stderr
    level = _logger.level
    handler = signal.getsignal(signal.SIGINT)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # models as small as these are slower with more
    yield
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, handler)
    _logger.setLevel(level)


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    """A language model, texts, and an image classifier with images, none of which a command may change."""
    folder = tmp_path_factory.mktemp("inputs")
    save_llama_of_bytes(folder / "llama")
    rng = np.random.default_rng()
    with seed(0):
        for name in ("test_vit", "test_convnext"):
            model = timm.create_model(name)
            model.get_classifier().bias.data[1] = 1e4  # whatever it sees, it says the second class
            save_file(model.state_dict(), folder / f"{name}.safetensors")
    words = ["".join(map(chr, rng.integers(97, 123, 5))) for _ in range(500)]
    (folder / "long.txt").write_text(" ".join(words))
    (folder / "other.txt").write_text(" ".join(reversed(words)))
    (folder / "short.txt").write_text("too short")
    for part, count in (("train", 3), ("val", 2)):
        for label in ("ape", "bee", "cat", "dog"):
            save_noise(folder / "images" / part / label, count, rng)
    return folder


def save_noise(folder, count, rng):
    """Save random images."""
    folder.mkdir(parents=True)
    for i in range(count):
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(folder / f"{i}.png")


@pytest.fixture
def text(inputs):
    """The options of a fast run on the language model."""
    return f"""
    prune --model {inputs}/llama --num_samples 4 --seqlen {SEQLEN} --limit 6 --calibration {inputs}/long.txt
    --evaluation {inputs}/other.txt
    """.split()


@pytest.fixture
def pruned(text):
    """A folder `pruned` with the language model, pruned by the command."""
    assert run(*text, "--method", "magnitude", "--evaluation", "", "--save_model", "pruned") == 0
    return "pruned"


@pytest.fixture
def images(inputs):
    """The options of a fast run on the image classifier."""
    return f"""
    prune --model timm:test_vit --checkpoint {inputs}/test_vit.safetensors --data {inputs}/images --num_samples 6
    """.split()


@pytest.fixture
def refused(tmp_path, capsys, inputs):
    """Runs a command that must fail with one message and leave every folder and file as it was."""

    def check(*arguments, message):
        before = everything_in(tmp_path), everything_in(inputs)
        assert run(*arguments) == 2
        out, err = capsys.readouterr()
        assert message in err
        assert "Traceback" not in out + err, out + err
        assert (everything_in(tmp_path), everything_in(inputs)) == before
        return err

    return check
