"""A model in files for the tests of this folder, and what becomes of it."""

from functools import cache

import pytest
from support.disk import CHOICES, batches, save_llama, stream
from support.experts import build
from transformers import LlamaForCausalLM


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "source"
    save_llama(folder)
    return folder


@pytest.fixture(scope="session")
def source_for(source, tmp_path_factory):
    """The folder of the model for the choices with a name."""
    mixture = tmp_path_factory.mktemp("mixture") / "source"
    build("mixtral", num_hidden_layers=4).save_pretrained(mixture, max_shard_size="50KB")
    return lambda name: mixture if "experts" in name else source


@pytest.fixture(scope="session")
def streamed(source_for, tmp_path_factory):
    """Prune a model by the choices with a name; return the report and the folder. Each name is pruned once."""

    @cache
    def prune_once(name):
        folder = tmp_path_factory.mktemp("streamed") / "out"
        return stream(source_for(name), folder, batches(), **CHOICES[name]), folder

    return prune_once


@pytest.fixture
def out(tmp_path):
    """A folder that does not exist yet."""
    return tmp_path / "out"


@pytest.fixture
def copied(source, tmp_path):
    """A copy of the source that a test may damage."""
    folder = tmp_path / "copy"
    LlamaForCausalLM.from_pretrained(source).save_pretrained(folder, max_shard_size="20KB")
    return folder
