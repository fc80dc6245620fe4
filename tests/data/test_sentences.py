"""Sentences for calibration, and pairs with scores, in the batches of the data module."""

import pytest
import torch
from support.embedding import PAIRS, SENTENCES, save_pairs
from support.refusals import refuses

from wanda_lightning import SentenceDataModule
from wanda_lightning.data import sentence_pairs
from wanda_lightning.data.sentence_pairs import draw_pieces, draw_sentences, read_pairs


class Letters:
    """Tokenizes each letter, as a model of sentence-transformers tokenizes words."""

    def preprocess(self, texts, prompt):
        width = max(map(len, texts))
        rows = [[*map(ord, text), *[0] * (width - len(text))] for text in texts]
        ids = torch.tensor(rows)
        return {"input_ids": ids, "attention_mask": (ids > 0).long()}

    tokenize = preprocess


def text_of(row):
    return "".join(chr(number) for number in row.tolist() if number)


def test_a_seed_draws_the_same_different_sentences():
    documents = [" ".join(SENTENCES[start : start + 9]) for start in range(0, len(SENTENCES), 9)]
    drawn = draw_sentences(documents, 20, seed=3)
    assert drawn == draw_sentences(documents, 20, seed=3)
    assert drawn != draw_sentences(documents, 20, seed=4)
    assert len({*drawn}) == 20
    assert {*drawn} <= {*SENTENCES}


def test_of_a_short_text_all_sentences_are_drawn():
    text = "Title\n\nThese are five short words. Two words. And these, too, are five!"
    drawn = draw_sentences(text, 1024, seed=0)
    assert sorted(drawn) == ["And these, too, are five!", "These are five short words."]


def test_pieces_are_words_that_follow_each_other_equally_many_in_a_batch():
    words = [str(number) for number in range(100)]
    data = SentenceDataModule(Letters(), [" ".join(words)], batch_size=8, train_samples=100, seed=1)
    pieces = [piece.split() for piece in data.train_pieces]
    for piece in pieces:
        start = int(piece[0])
        assert piece == words[start : start + len(piece)]
    lengths = [{len(piece) for piece in pieces[start : start + 8]} for start in range(0, 100, 8)]
    assert all(len(lengths_of_batch) == 1 for lengths_of_batch in lengths)
    assert {min(map(min, lengths)), max(map(max, lengths))} == {4, 14}
    assert [len(batch["input_ids"]) for batch in data.train_dataloader()] == [8] * 12 + [4]
    again = SentenceDataModule(Letters(), [" ".join(words)], batch_size=8, train_samples=100)
    assert again.train_pieces != data.train_pieces
    again.seed = 1
    del again.train_pieces
    assert again.train_pieces == data.train_pieces


def test_pieces_reach_the_ends_of_a_text_and_pass_over_short_ones():
    words = [str(number) for number in range(14)]
    pieces = draw_pieces(["a b", "", " ".join(words)], 500, seed=0, together=1)
    assert {"0", "13"} <= {word for piece in pieces for word in piece.split()} <= {*words}
    with pytest.raises(ValueError, match="at least 14 words"):
        _ = SentenceDataModule(Letters(), ["a b"], train_samples=8).train_pieces


def test_calibration_batches_hold_the_drawn_sentences_in_order():
    data = SentenceDataModule(Letters(), [" ".join(SENTENCES)], batch_size=8, num_samples=20)
    batches = list(data.calibration_dataloader())
    assert [len(batch["input_ids"]) for batch in batches] == [8, 8, 4]
    rows = [text_of(row) for batch in batches for row in batch["input_ids"]]
    assert rows == draw_sentences([" ".join(SENTENCES)], 20, seed=0)


def test_a_batch_of_pairs_has_the_second_sentences_below_the_first(tmp_path):
    path = save_pairs(tmp_path / "pairs.csv")
    data = SentenceDataModule(Letters(), evaluation=path, batch_size=5, limit=7)
    first, last = data.val_dataloader()
    first_sentences = [pair[0] for pair in PAIRS[:5]]
    second_sentences = [pair[1] for pair in PAIRS[:5]]
    assert [text_of(row) for row in first["input_ids"]] == first_sentences + second_sentences
    assert last["score"].tolist() == pytest.approx([PAIRS[5][2] / 5, PAIRS[6][2] / 5])


@pytest.mark.parametrize(
    "heading", [("score", "other", "sentence2", "sentence1"), ("left", "right", "similarity")]
)
def test_columns_are_found_by_name_or_by_their_order(tmp_path, heading):
    rows = [(*pair[:2], pair[2] / 5) for pair in PAIRS]
    if len(heading) > 3:
        rows = [(score, "x", second, first) for first, second, score in rows]
    assert read_pairs(save_pairs(tmp_path / "a.csv", rows, heading), "test") == [
        (first, second, score / 5) for first, second, score in PAIRS
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("sentence1,score\na,1\n", "must have the columns sentence1, sentence2, score"),
        ("a,b,c\nx,y,0.5\nx,y,high\n", "Line 3 of .* must have a number as its c, .* 'high'"),
        ("a,b,c\nx,y\n", "Line 2 of .* None"),
        ("a,b,c\nx,y,nan\n", "Line 2 of"),
        ("a,b,c\n", "only a heading"),
        ("", "it has none"),
    ],
)
def test_a_wrong_file_of_pairs_is_refused_with_its_line(tmp_path, content, message):
    path = tmp_path / "pairs.csv"
    path.write_text(content)
    with refuses(message):
        SentenceDataModule(evaluation=path).setup("validate")


def test_stsb_comes_from_the_hub(monkeypatch):
    asked = []

    def load(*names, **options):
        asked.append((names, options))
        return {"sentence1": ["a"], "sentence2": ["b"], "score": [0.25]}

    monkeypatch.setattr(sentence_pairs, "load", load)
    assert SentenceDataModule(train="stsb", cache_dir="c").train_pairs == [("a", "b", 0.25)]
    assert asked == [(("sentence-transformers/stsb",), {"split": "train", "cache_dir": "c"})]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"calibration": "self"}, "calibration must be one of"),
        ({"evaluation": "pairs.csv"}, "evaluation must be stsb or an existing .csv file"),
        ({"train": "wikitext2"}, "train must be stsb"),
        ({"num_samples": 0}, "num_samples must be"),
        ({"train_samples": 0}, "train_samples must be"),
        ({"train": "stsb", "train_samples": 8}, "train_samples must not be given beside train"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with refuses(message):
        SentenceDataModule(**options)


def test_texts_without_a_sentence_or_a_model_are_refused():
    with refuses("at least five words"):
        SentenceDataModule(Letters(), calibration=["one two"]).calibration_dataloader()
    with refuses("model must be a SentenceTransformer"):
        list(SentenceDataModule(calibration=[SENTENCES[0]]).calibration_dataloader())
