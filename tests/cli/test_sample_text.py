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
    ends_in_a_loop,
    measure_loops,
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


@pytest.mark.parametrize(("end", "expected"), [(None, 1), (7, 0), ([3, 7], 0)])
def test_a_model_that_repeats_a_token_is_in_a_loop_unless_it_ends(model, tokenizer, end, expected):
    model.generation_config.eos_token_id = end

    def always_7(module, args, logits):
        logits[..., 7] = logits.max() + 1
        return logits

    model.lm_head.register_forward_hook(always_7)
    measured = measure_loops(model, tokenizer, torch.ones(2, 40, dtype=torch.long))
    assert measured == {"in_a_loop": expected, "prompts": 2}


def test_the_configuration_of_the_model_does_not_keep_it_from_a_loop(model, tokenizer):
    windows = torch.ones(2, 40, dtype=torch.long)
    plain = measure_loops(model, tokenizer, windows)
    model.generation_config.update(repetition_penalty=5.0, no_repeat_ngram_size=1)
    assert measure_loops(model, tokenizer, windows) == plain
    del model.generation_config
    with pytest.warns(UserWarning, match="cannot continue a prompt, so loops are not counted"):
        assert measure_loops(model, tokenizer, windows) == {}


def test_a_loop_may_have_any_length_and_must_last_until_the_end():
    assert ends_in_a_loop([9, 1, 2, 3, 1, 2, 3, 1, 2, 3])
    assert ends_in_a_loop([4] * 8)
    assert not ends_in_a_loop([4] * 7)  # such as ... or 1000
    assert not ends_in_a_loop([1, 2, 3, 4, 1, 2, 3, 4])
    assert not ends_in_a_loop([*[4] * 8, 5])


def test_a_model_that_cannot_generate_is_a_warning(model, tokenizer):
    model.generate = None
    with pytest.warns(
        UserWarning, match="LlamaForCausalLM cannot continue a prompt, so no text is shown"
    ):
        assert continuations(model, tokenizer) == []
