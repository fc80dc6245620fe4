"""Drawing and cutting windows against loops over the two protocols."""

import random

import torch
from support.data import documents, slow_document_windows, slow_text_windows

from wanda_lightning.data.windows import cut, draw_from_documents, draw_from_text


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


def test_one_text_is_drawn_from_as_the_reference_does():
    ids = random.Random(1).choices(range(100), k=200)
    assert torch.equal(draw_from_text(ids, 20, 9, 7, "a.txt"), slow_text_windows(ids, 20, 9, 7))


def test_cutting_drops_the_rest_and_stops_at_the_limit():
    assert cut(range(7), 2, None, "a.txt").tolist() == [[0, 1], [2, 3], [4, 5]]
    assert cut(range(7), 2, 1, "a.txt").tolist() == [[0, 1]]
