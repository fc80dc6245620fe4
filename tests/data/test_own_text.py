"""Text that the model writes: the same draws as a loop without a cache, and what cannot write."""

from types import SimpleNamespace

import pytest
import torch
from support.data import byte_tokenizer, quiet_trainer
from support.modules import tiny_llama
from torch import nn

from wanda_lightning import CausalLMModule, PruningCallback, TextDataModule, sample_windows

TOKENIZER = SimpleNamespace(bos_token_id=5, eos_token_id=7)
CHAT = (
    "{{ bos_token }}{% for message in messages %}[{{ message['role'] }}]{{ message['content'] | trim }}[end]"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def written_by_hand(model, start, count, new, seed, batch_size):
    """The tokens of `start`, and those drawn after them."""
    torch.manual_seed(seed)
    windows = []
    for done in range(0, count, batch_size):
        ids = torch.tensor([start] * min(batch_size, count - done))
        for _ in range(new):
            with torch.no_grad():
                chances = model(ids, use_cache=False).logits[:, -1].softmax(-1)
            ids = torch.cat([ids, torch.multinomial(chances, 1)], 1)
        windows.append(ids)
    return torch.cat(windows)


def chat_tokenizer(template=CHAT):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def writer(tokenizer):
    """A model with an embedding for each token."""
    model = tiny_llama()
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    return model


def test_tokens_are_drawn_from_the_predictions():
    model = tiny_llama().double().train()
    model.generation_config.update(eos_token_id=list(range(64)), repetition_penalty=2.0, top_k=3)
    own, state = model.generation_config, torch.get_rng_state()
    windows = sample_windows(model, TOKENIZER, 5, 12, seed=3, batch_size=2, progress=False)
    assert model.generation_config is own
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(windows, written_by_hand(model.eval(), [5], 5, 12, 3, 2)[:, 1:])
    assert not torch.equal(windows, sample_windows(model, TOKENIZER, 5, 12, seed=4, batch_size=2, progress=False))


def test_a_tokenizer_without_a_first_token_begins_with_the_last():
    model = tiny_llama().double()
    tokenizer = SimpleNamespace(bos_token_id=None, eos_token_id=7)
    expected = written_by_hand(model, [7], 2, 4, 0, 2)[:, 1:]
    assert torch.equal(sample_windows(model, tokenizer, 2, 4, progress=False), expected)
    with pytest.raises(ValueError, match=r"but this one has neither\. Set its bos_token"):
        sample_windows(model, SimpleNamespace(bos_token_id=None, eos_token_id=None), 2, 4)


def test_a_chat_begins_with_the_turn_of_the_user_and_includes_it():
    tokenizer = chat_tokenizer()
    model = writer(tokenizer).double().eval()
    start = tokenizer("<s>[user]", add_special_tokens=False).input_ids
    assert len(start) == 7
    windows = sample_windows(model, tokenizer, 5, 20, chat=True, seed=3, batch_size=2, progress=False)
    assert torch.equal(windows, written_by_hand(model, start, 5, 13, 3, 2))


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (byte_tokenizer(), r"calibration='self-chat' needs a tokenizer with a chat template, but .* has none\. Use "),
        (TOKENIZER, r"calibration='self-chat' needs a tokenizer with a chat template, but .* has none\. Use "),
        (chat_tokenizer("[user]"), r"contains the message, but this one makes '\[user\]' of the message "),
        (chat_tokenizer("{{ messages[0]['content'] }}"), "a chat template that begins the turn of the user"),
        (chat_tokenizer(), r"seqlen must be larger than 7, .* but it is 7\. Use longer windows, or calibration='self'"),
    ],
)
def test_a_template_that_does_not_begin_a_chat_is_refused(tokenizer, message):
    with pytest.raises(ValueError, match=message):
        sample_windows(tiny_llama(), tokenizer, 2, 7, chat=True)
    if "seqlen" not in message and tokenizer is not TOKENIZER:
        with pytest.raises(ValueError, match=message):
            TextDataModule(tokenizer, calibration="self-chat")


def test_a_model_that_cannot_write_is_refused():
    with pytest.raises(ValueError, match="but Linear has no method generate"):
        sample_windows(nn.Linear(2, 2), TOKENIZER, 2, 4)
    with pytest.raises(ValueError, match=r"a Trainer that runs a module with a model, .* but there is none"):
        TextDataModule(byte_tokenizer(), calibration="self").calibration_dataloader()


@pytest.mark.parametrize("calibration", ["self", "self-chat"])
def test_a_resumed_run_has_the_text_of_the_run_before(calibration):
    tokenizer = chat_tokenizer()
    data, resumed = (TextDataModule(tokenizer, calibration=calibration, seqlen=8, num_samples=2) for _ in range(2))
    data.trainer = quiet_trainer()
    data.trainer.strategy.connect(CausalLMModule(writer(tokenizer), tokenizer=tokenizer))
    assert data.state_dict() == {}
    windows = data.calibration_windows
    resumed.load_state_dict(data.state_dict())
    assert torch.equal(resumed.calibration_windows, windows)  # no Trainer runs a model that could write it
    assert TextDataModule(tokenizer).state_dict() == {}


@pytest.mark.parametrize("calibration", ["self", "self-chat"])
@pytest.mark.parametrize("choices", [{"method": "wanda"}, {"method": "sparsegpt", "recovery": "distil"}], ids=str)
def test_the_dense_model_writes_the_text_that_it_is_calibrated_on(choices, calibration):
    tokenizer = chat_tokenizer()
    module = CausalLMModule(writer(tokenizer), tokenizer=tokenizer)
    chat = calibration == "self-chat"
    expected = sample_windows(module.model, tokenizer, 9, 16, chat=chat, seed=1, progress=False)
    data = TextDataModule(tokenizer, calibration=calibration, seqlen=16, num_samples=9, seed=1, limit=4)
    callback = PruningCallback(num_samples=9, **choices)
    quiet_trainer(callbacks=[callback]).validate(module, data, verbose=False)
    assert torch.equal(data.calibration_windows, expected)
    assert callback.report.sparsity == pytest.approx(0.5, abs=0.01)
