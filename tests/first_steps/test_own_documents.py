"""Own documents, of 10 bytes to 1 MB."""

from pathlib import Path

import lightning as L
import pytest
from datasets import Dataset
from support.embedding import SENTENCES, tiny as tiny, tiny_folder as tiny_folder

from wanda_lightning import (
    CausalLMModule,
    SentenceDataModule,
    TextDataModule,
    UserError,
    WandaPrune,
    prune,
)

WORDS = "The quick brown fox jumps over the lazy dog, and 11 others watch. "
LONG = WORDS * 15_000  # 1 MB
DOCUMENTS = {
    "1_mb_to_10_bytes": [LONG[:size] for size in (1_000_000, 10_000, 300, 10)],
    "empty": ["", WORDS * 10, " ", WORDS * 20, ""],
    "like_paths": ["data/train.txt\n" * 300, "~/notes", "C:\\" * 100],
    "many": [WORDS * (number % 9) for number in range(2_000)],
    "null_bytes": ["a\0b" * 300, "\0" * 1_000, WORDS],
    "unicode": ["Größe, 大きさ, размер, 🦊. " * 200, "Übung " * 9, "…"],
}


@pytest.mark.parametrize("kind", DOCUMENTS)
def test_calibration_and_perplexity(llama, tokenizer, kind):
    documents = DOCUMENTS[kind]
    data = TextDataModule(tokenizer, documents, [documents], seqlen=128, num_samples=8, limit=4)
    trainer = L.Trainer(callbacks=[WandaPrune(0.5)], logger=False)
    (results,) = trainer.validate(CausalLMModule(llama), data)
    assert 1 < results["val_perplexity"] < 1e6
    for window in data.calibration_windows:
        text = tokenizer.decode(window).strip("\ufffd")  # a window may cut a character
        assert any(text in document for document in documents)


def test_a_file_a_list_and_a_dataset_are_the_same_text(tokenizer):
    text = LONG[:50_000]
    Path("my notes.txt").write_text(text)
    dataset = Dataset.from_dict({"text": [text]})
    for source in ("my notes.txt", Path("my notes.txt"), [text], dataset):
        data = TextDataModule(tokenizer, source, [source], seqlen=512, num_samples=4)
        assert tokenizer.decode(data.evaluation_windows[0]) == text[:512]
        assert tokenizer.decode(data.calibration_windows[0]) in text


@pytest.mark.parametrize("text", [LONG, "a null\0byte"], ids=["long", "null"])
@pytest.mark.parametrize("option", ["calibration", "evaluation"])
def test_one_string_is_refused_in_a_sentence(tokenizer, text, option):
    with pytest.raises(UserError, match=r"^.{,500}$"):
        TextDataModule(tokenizer, **{option: text}).setup()


def test_own_sentences(tiny):
    data = SentenceDataModule(tiny, [LONG, "", "a \0 b", *SENTENCES])
    assert prune(tiny, data.calibration_dataloader(), 0.5).sparsity == 0.5


def test_chats_with_a_tokenizer_that_has_no_token_for_padding(llama, tokenizer):
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    chats = [{"messages": [{"role": "user", "content": WORDS * n}]} for n in (1, 2, 9, 1_000)]
    data = TextDataModule(tokenizer, chats, num_samples=4, seqlen=256, packing="none")
    report = prune(llama, data.calibration_dataloader(), 0.5)
    assert 2 * 256 < report.layers[0].tokens < 4 * 256
