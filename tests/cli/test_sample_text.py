"""Text after a prompt, against a loop without a cache."""

import logging

import pytest
import torch
import transformers
from support.cli import IGNORED_WARNINGS
from transformers import AutoModelForCausalLM

from wanda_lightning.cli.sample_text import (
    PROMPTS,
    continuation,
    continuations,
)

pytestmark = IGNORED_WARNINGS


@pytest.fixture
def model(inputs):
    return AutoModelForCausalLM.from_pretrained(inputs / "llama").eval()


@pytest.fixture
def tokenizer(inputs):
    return transformers.AutoTokenizer.from_pretrained(inputs / "llama")


def test_text_is_the_most_likely_one_however_the_model_samples(model, tokenizer, caplog):
    ids = tokenizer(PROMPTS[0]).input_ids
    start = len(ids)
    for _ in range(min(40, 64 - start)):  # the context has 64
        ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
    expected = tokenizer.decode(ids[start:])

    model.generation_config.update(do_sample=True, temperature=2.0, top_p=0.5, top_k=7)
    transformers.utils.logging.enable_propagation()
    with caplog.at_level(logging.WARNING):
        assert continuation(model, tokenizer, PROMPTS[0]) == expected
    assert caplog.messages == []


def test_a_model_that_cannot_generate_is_a_warning(model, tokenizer):
    model.generate = None
    with pytest.warns(
        UserWarning, match="LlamaForCausalLM cannot continue a prompt, so no text is shown"
    ):
        assert continuations(model, tokenizer) == []
