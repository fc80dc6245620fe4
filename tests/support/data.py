"""Tokenizers, texts, tables and pictures for the tests of the data modules."""

import json
import random
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm
import torch
from PIL import Image
from sklearn.datasets import load_digits
from support.zoo import tokenizer_of_bytes
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from wanda_lightning import ImageDataModule

BOS = 256


def byte_tokenizer(reverse=False):
    """One token for each byte, and <s> before each text, for a model with a context of 16."""
    tokenizer = tokenizer_of_bytes(reverse, {"<s>": BOS})
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", BOS)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", model_max_length=16)


def documents(lengths):
    """Texts of these lengths in bytes, whose windows all differ."""
    rng = random.Random(7)
    return ["".join(chr(rng.randint(97, 122)) for _ in range(length)) for length in lengths]


def write_jsonl(path, texts):
    path.write_text(
        "".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(texts))
    )
    return str(path)


def write_parquet(path, **columns):
    pq.write_table(pa.table(columns), path)
    return str(path)


def ids_of(loader):
    return torch.cat([batch["input_ids"] for batch in loader])


def opened(*arguments, **options):
    """A data module whose images are open."""
    data = ImageDataModule(*arguments, **options)
    data.setup()
    return data


def vit(in_chans=3, **options):
    options = {
        "img_size": 16,
        "patch_size": 4,
        "num_classes": 10,
        "depth": 1,
        "embed_dim": 24,
        "num_heads": 2,
        **options,
    }
    return timm.create_model("vit_tiny_patch16_224", in_chans=in_chans, **options)


def images_of(loader):
    images, labels = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(labels)


@pytest.fixture
def few_digits(monkeypatch):
    """The first 300 scans, of which 60 are for evaluation."""
    scans = load_digits()
    few = SimpleNamespace(images=scans.images[:300], target=scans.target[:300])
    monkeypatch.setattr("sklearn.datasets.load_digits", lambda: few)


def paint(folder, colour, count):
    folder.mkdir(parents=True)
    for i in range(count):
        Image.new("RGB", (20, 20), (*colour, 10 * i)).save(folder / f"{i}.png")


def slow_window(ids, seqlen):
    start = random.randint(0, len(ids) - seqlen - 1)
    return [ids[k] for k in range(start, start + seqlen)]


def slow_text_windows(ids, seqlen, num_samples, seed):
    random.seed(seed)  # the reference seeds the global generator
    return torch.tensor([slow_window(ids, seqlen) for _ in range(num_samples)])


def slow_document_windows(texts, tokenizer, seqlen, num_samples, seed):
    random.seed(seed)
    windows = []
    for _ in range(num_samples):
        while True:
            ids = tokenizer(texts[random.randint(0, len(texts) - 1)]).input_ids
            if len(ids) > seqlen:
                break
        windows.append(slow_window(ids, seqlen))
    return torch.tensor(windows)
