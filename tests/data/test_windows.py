"""Drawing windows from documents reads no more of them than it needs."""

import torch
from support.data import documents, slow_document_windows

from wanda_lightning.data.windows import draw_from_documents


def test_drawing_tokenizes_only_what_is_drawn(tokenizer):
    texts = documents([100] * 1000)
    seen = []

    def tokenize(text):
        seen.append(text)
        return tokenizer(text).input_ids

    draw_from_documents(texts, tokenize, 20, 5, 0, "a.jsonl")
    assert len(seen) == 5


def test_drawing_ends_where_one_document_of_many_is_long_enough(tokenizer):
    texts = documents([5] * 300 + [100])
    windows = draw_from_documents(texts, lambda text: tokenizer(text).input_ids, 50, 3, 0, "a.jsonl")
    assert torch.equal(windows, slow_document_windows(texts, tokenizer, 50, 3, 0))
