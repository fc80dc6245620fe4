"""What a user has in the first hour: a folder with a space in its name, a small model in it, and no network."""

import pytest
from support.cli import shell as shell
from support.zoo import tokenizer_of_bytes
from tokenizers import decoders, pre_tokenizers
from torch import nn
from torch.nn.utils import parameters_to_vector
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def pytest_itemcollected(item):
    item.add_marker(pytest.mark.filterwarnings("default"))  # as in a user's program


@pytest.fixture
def tmp_path(tmp_path):
    folder = tmp_path / "my project"
    folder.mkdir()
    return folder


@pytest.fixture
def tokenizer():
    """One token for each byte of a word, and no token for padding."""
    tokens = tokenizer_of_bytes()
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokens)


@pytest.fixture
def llama():
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = LlamaConfig(vocab_size=256, num_attention_heads=4, initializer_range=0.3, **sizes)
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def folder(llama, tokenizer):
    """The relative path of a model, as Hugging Face saves it."""
    llama.save_pretrained("my models/tiny llama")
    tokenizer.save_pretrained("my models/tiny llama")
    return "my models/tiny llama"


@pytest.fixture
def sparsity():
    """A function that returns the share of zeros in the linear layers of a model."""

    def share_of_zeros(model):
        layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
        weights = parameters_to_vector(layer.weight for layer in layers)
        return (weights == 0).float().mean()

    return share_of_zeros
