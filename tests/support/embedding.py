"""A tiny model of sentence-transformers, pairs of sentences with scores, and how they are measured by hand."""

import csv
import itertools

import pytest
import torch
from scipy.stats import spearmanr
from support.layers import rng, seed
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

WORDS = "a cat dog man woman sleeps runs eats sees the old young big red house . !"
SENTENCES = [
    f"a {kind} {who} {does} {what} ."
    for kind, who, does, what in itertools.product(
        ("old", "young", "big"),
        ("cat", "dog", "man", "woman"),
        ("eats", "sees"),
        ("the red house", "a dog", "a cat"),
    )
]
PAIRS = [
    (first, second, float(index % 6))
    for index, (first, second) in enumerate(zip(SENTENCES, SENTENCES[7:], strict=False))
][:12]


def save_tiny(folder):
    """Save a model with random weights, whose tokenizer knows `WORDS`, and return its folder."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = {word: number for number, word in enumerate(special + WORDS.split())}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=16,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    ).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
    )
    with seed(0):
        model = BertModel(config)
        for parameter in model.parameters():  # far from each other, so that embeddings differ
            if parameter.ndim == 2:
                parameter.data.normal_(std=0.5, generator=rng())
        model.save_pretrained(folder)
    # Of a folder with a transformer only, it makes a model with mean pooling.
    load(folder).save(str(folder))
    return folder


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """The folder of the tiny model, which no test may change."""
    return save_tiny(tmp_path_factory.mktemp("embedding"))


def load(folder):
    """Load a model by sentence-transformers alone."""
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder), device="cpu")


@pytest.fixture
def tiny(tiny_folder):
    """The tiny model."""
    return load(tiny_folder)


def save_pairs(path, pairs=PAIRS, heading=("sentence1", "sentence2", "score")):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([heading, *pairs])
    return path


def spearman_by_hand(model):
    """The correlation by scipy of cosine similarities, one sentence at a time, times 100."""
    similarities = []
    for first, second, _ in PAIRS:
        a, b = (torch.tensor(model.encode([text])[0]) for text in (first, second))
        similarities.append(float(a @ b / (a.norm() * b.norm())))
    return 100 * spearmanr(similarities, [score for *_, score in PAIRS]).statistic
