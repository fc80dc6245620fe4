"""The data modules against slow versions of their protocols, and every refusal."""

import json
import logging
import random

import datasets
import lightning as L
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm
import torch
from jsonargparse import auto_cli
from PIL import Image
from sklearn.datasets import load_digits
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import PreTrainedTokenizerFast

from wanda_lightning.data import ImageDataModule, TextDataModule
from wanda_lightning.data.image_sources import find_columns
from wanda_lightning.data.images import resolve_preprocessing
from wanda_lightning.data.text import draw_from_documents
from wanda_lightning.data.text_sources import python_docs

BOS = 256
pytestmark = pytest.mark.filterwarnings("ignore:.*tells .* apart")  # models are made without regard to the images

runs_a_trainer = pytest.mark.filterwarnings(  # Lightning 2.6 under torch 2.13
    "ignore:.*LeafSpec.* is deprecated:FutureWarning"
)


def byte_tokenizer():
    """One token a byte, and <s> before every text; its model has a context of 16."""
    vocab = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab={**vocab, "<s>": BOS}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", model_max_length=16)


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def offline(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # read when it was imported
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def documents(lengths):
    """Texts of so many bytes, no two windows alike."""
    rng = random.Random(7)
    return ["".join(chr(rng.randint(97, 122)) for _ in range(length)) for length in lengths]


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(texts)))
    return str(path)


def write_parquet(path, **columns):
    pq.write_table(pa.table(columns), path)
    return str(path)


def ids_of(loader):
    return torch.cat([batch["input_ids"] for batch in loader])


# ---------------------------------------------------------------------------------------- text: the two protocols


def slow_text_windows(ids, seqlen, num_samples, seed):
    random.seed(seed)  # the reference seeds the global generator
    windows = []
    for _ in range(num_samples):
        start = random.randint(0, len(ids) - seqlen - 1)
        windows.append([ids[k] for k in range(start, start + seqlen)])
    return torch.tensor(windows)


def slow_document_windows(texts, tokenizer, seqlen, num_samples, seed):
    random.seed(seed)
    windows = []
    for _ in range(num_samples):
        while True:
            ids = tokenizer(texts[random.randint(0, len(texts) - 1)]).input_ids
            if len(ids) > seqlen:
                break
        start = random.randint(0, len(ids) - seqlen - 1)
        windows.append([ids[k] for k in range(start, start + seqlen)])
    return torch.tensor(windows)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_calibration_on_documents_draws_the_references_windows(tmp_path, tokenizer, kind, seed):
    texts = documents([3, 40, 19, 20, 200, 0, 21])  # with <s>, 19 gives 20 tokens: not more than seqlen
    file = tmp_path / f"texts.{kind}"
    source = write_jsonl(file, texts) if kind == "jsonl" else write_parquet(file, text=texts)
    data = TextDataModule(tokenizer, source, seqlen=20, num_samples=9, batch_size=4, seed=seed)
    loader = data.calibration_dataloader()
    assert [tuple(batch["input_ids"].shape) for batch in loader] == [(4, 20), (4, 20), (1, 20)]
    assert all(batch.keys() == {"input_ids"} and batch["input_ids"].dtype == torch.int64 for batch in loader)
    assert torch.equal(ids_of(loader), slow_document_windows(texts, tokenizer, 20, 9, seed))


def test_calibration_on_one_text_draws_the_references_windows(tmp_path, tokenizer):
    (text,) = documents([500])
    (tmp_path / "a.txt").write_text(text)
    data = TextDataModule(tokenizer, str(tmp_path / "a.txt"), seqlen=16, num_samples=10, seed=3)
    expected = slow_text_windows(tokenizer(text).input_ids, 16, 10, 3)
    assert torch.equal(ids_of(data.calibration_dataloader()), expected)


def test_calibration_on_python_docs_draws_from_its_part(tokenizer):
    data = TextDataModule(tokenizer, seqlen=64, num_samples=5, seed=2)
    ids = tokenizer("\n\n".join(python_docs()[0].values())).input_ids
    assert torch.equal(data.calibration_windows, slow_text_windows(ids, 64, 5, 2))


def test_drawing_tokenizes_only_what_is_drawn(tokenizer):
    texts = documents([100] * 1000)
    seen = []

    def tokenize(text):
        seen.append(text)
        return tokenizer(text).input_ids

    draw_from_documents(texts, tokenize, seqlen=20, num_samples=5, seed=0)
    assert len(seen) == 5


def test_drawing_ends_where_one_document_of_many_is_long_enough(tokenizer):
    texts = documents([5] * 300 + [100])
    windows = draw_from_documents(texts, lambda text: tokenizer(text).input_ids, seqlen=50, num_samples=3, seed=0)
    assert torch.equal(windows, slow_document_windows(texts, tokenizer, 50, 3, 0))


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_evaluation_cuts_the_joined_text(tmp_path, tokenizer, kind):
    texts = documents([30, 41, 10])
    file = tmp_path / f"texts.{kind}"
    if kind == "txt":
        file.write_text("\n\n".join(texts))
    elif kind == "jsonl":
        write_jsonl(file, texts)
    else:
        write_parquet(file, text=texts)
    ids = tokenizer("\n\n".join(texts)).input_ids
    assert len(ids) == 1 + 81 + 4
    expected = torch.tensor([ids[k : k + 20] for k in (0, 20, 40, 60)])
    data = TextDataModule(tokenizer, evaluation=str(file), seqlen=20, batch_size=3)
    for loader in (data.val_dataloader(), data.test_dataloader(), data.predict_dataloader()):
        assert torch.equal(ids_of(loader), expected)
    data = TextDataModule(tokenizer, evaluation=str(file), seqlen=20, limit=3)
    assert torch.equal(ids_of(data.val_dataloader()), expected[:3])


def hub_of(tables):
    """A stand-in for `datasets.load_dataset` over the two text sets, which also notes how it was asked."""
    asked = []

    def load_dataset(name, config=None, *, split, data_files=None, cache_dir=None, **options):
        asked.append((name, config, split, data_files, cache_dir))
        return datasets.Dataset.from_dict({"text": tables[name, split]})

    return load_dataset, asked


def test_c4_is_read_as_the_reference_reads_it(monkeypatch, tokenizer):
    train, validation = documents([50, 90, 10]), documents([7] * 1105)
    load, asked = hub_of({("allenai/c4", "train"): train, ("allenai/c4", "validation"): validation})
    monkeypatch.setattr(datasets, "load_dataset", load)
    data = TextDataModule(tokenizer, "c4", "c4", seqlen=30, num_samples=4, cache_dir="cache")
    assert torch.equal(data.calibration_windows, slow_document_windows(train, tokenizer, 30, 4, 0))
    ids = tokenizer(" ".join(validation[:1100])).input_ids
    assert len(ids) == 8800  # 1100 documents of 7 bytes, 1099 spaces, <s>
    assert torch.equal(data.evaluation_windows, torch.tensor(ids)[: 256 * 30].view(256, 30))
    assert asked == [
        ("allenai/c4", None, "train", {"train": "en/c4-train.00000-of-01024.json.gz"}, "cache"),
        ("allenai/c4", None, "validation", {"validation": "en/c4-validation.00000-of-00008.json.gz"}, "cache"),
    ]
    data = TextDataModule(tokenizer, "c4", "c4", seqlen=64)  # 137 windows are fewer than 256
    assert torch.equal(data.evaluation_windows, torch.tensor(ids)[: 137 * 64].view(137, 64))


def test_wikitext2_is_read_as_the_reference_reads_it(monkeypatch, tokenizer):
    train, test = documents([50, 0, 90]), documents([30, 0, 71])
    load, asked = hub_of({("Salesforce/wikitext", "train"): train, ("Salesforce/wikitext", "test"): test})
    monkeypatch.setattr(datasets, "load_dataset", load)
    data = TextDataModule(tokenizer, "wikitext2", "wikitext2", seqlen=30, num_samples=4)
    assert torch.equal(data.calibration_windows, slow_text_windows(tokenizer(" ".join(train)).input_ids, 30, 4, 0))
    ids = tokenizer("\n\n".join(test)).input_ids
    assert torch.equal(data.evaluation_windows, torch.tensor(ids[:90]).view(3, 30))
    assert [call[:3] for call in asked] == [("Salesforce/wikitext", "wikitext-2-raw-v1", s) for s in ("train", "test")]


def test_long_texts_do_not_warn_about_the_context_of_the_model(tmp_path, caplog):
    (tmp_path / "a.txt").write_text(documents([100])[0])
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        TextDataModule(byte_tokenizer(), evaluation=str(tmp_path / "a.txt"), seqlen=20).setup("validate")
        assert caplog.text == ""
        byte_tokenizer()("x" * 100)
        assert "longer than the specified maximum" in caplog.text
    finally:
        logger.removeHandler(caplog.handler)


def test_files_keep_their_characters(tmp_path, tokenizer):
    text = "a\u2028b\u00e9" * 10
    write_jsonl(tmp_path / "a.jsonl", [text])  # \u2028 ends a line for str.splitlines
    (tmp_path / "raw.jsonl").write_text(json.dumps({"text": text}, ensure_ascii=False) + "\n\n", encoding="utf-8")
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    expected = torch.tensor(tokenizer(text).input_ids[:70]).view(1, 70)
    for name in ("a.jsonl", "raw.jsonl", "bom.txt"):
        data = TextDataModule(tokenizer, evaluation=str(tmp_path / name), seqlen=70)
        assert torch.equal(data.evaluation_windows, expected)


# ------------------------------------------------------------------------------------------------ text: python-docs


def test_python_docs_has_two_parts_without_a_common_paragraph():
    from pydoc_data.topics import topics

    calibration, evaluation = python_docs()
    assert {**calibration, **evaluation} == topics
    assert not calibration.keys() & evaluation.keys()
    share = sum(map(len, evaluation.values())) / sum(map(len, topics.values()))
    assert 0.25 < share < 0.35
    long = [
        {p.strip() for text in part.values() for p in text.split("\n\n") if len(p.strip()) >= 80}
        for part in (calibration, evaluation)
    ]
    assert all(long)
    assert not long[0] & long[1]
    assert python_docs() == (calibration, evaluation)


# ------------------------------------------------------------------------------------------- text: the data module


def test_only_what_is_needed_is_read_and_only_once(monkeypatch, tokenizer):
    from wanda_lightning.data import text

    reads = []
    for name in ("calibration_source", "evaluation_text"):
        original = getattr(text, name)
        monkeypatch.setattr(text, name, lambda *a, name=name, original=original: (reads.append(name), original(*a))[1])
    data = TextDataModule(tokenizer, seqlen=32, num_samples=2)
    assert reads == []
    for stage in ("validate", "test", "predict"):
        data.setup(stage)
    data.val_dataloader(), data.test_dataloader(), data.predict_dataloader()
    assert reads == ["evaluation_text"]
    data.setup("fit")
    data.setup("fit")
    data.train_dataloader(), data.calibration_dataloader()
    assert reads == ["evaluation_text", "calibration_source"]
    calibration_mode = TextDataModule(tokenizer, seqlen=32, num_samples=2)
    calibration_mode.calibration_dataloader()
    assert reads[2:] == ["calibration_source"]


def test_training_shuffles_the_calibration_windows_by_the_seed(tokenizer):
    def epochs(seed):
        loader = TextDataModule(tokenizer, seqlen=16, num_samples=20, seed=seed).train_dataloader()
        return [ids_of(loader) for _ in range(2)]

    first, second = epochs(5)
    drawn = TextDataModule(tokenizer, seqlen=16, num_samples=20, seed=5).calibration_windows
    assert sorted(first.tolist()) == sorted(second.tolist()) == sorted(drawn.tolist())
    assert not torch.equal(first, drawn)
    assert not torch.equal(first, second)
    assert all(torch.equal(a, b) for a, b in zip(epochs(5), (first, second), strict=True))


class Embedding(L.LightningModule):
    """Small enough to go through a Trainer."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Embedding(300, 4)
        self.shapes = []

    def validation_step(self, batch, batch_idx):
        self.shapes.append(tuple(batch["input_ids"].shape))

    def training_step(self, batch, batch_idx):
        return self.layer(batch["input_ids"]).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def quiet_trainer(**options):
    return L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


@runs_a_trainer
def test_a_trainer_runs_it_without_advice_on_workers(monkeypatch, tokenizer):
    from lightning.pytorch.trainer.connectors import data_connector

    monkeypatch.setattr(data_connector, "suggested_max_num_workers", lambda _: 31)  # a machine with 32 cores
    module, data = Embedding(), TextDataModule(tokenizer, seqlen=32, num_samples=4, batch_size=2, limit=3)
    quiet_trainer().validate(module, data, verbose=False)
    assert module.shapes == [(2, 32), (1, 32)]
    quiet_trainer(max_epochs=1).fit(module, data)


# ----------------------------------------------------------------------------------------------- text: the tokenizer


def test_the_tokenizer_may_be_a_folder(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path / "saved")
    data = TextDataModule(str(tmp_path / "saved"), seqlen=32, num_samples=2)
    assert torch.equal(
        data.calibration_windows, TextDataModule(tokenizer, seqlen=32, num_samples=2).calibration_windows
    )


def test_the_tokenizer_may_be_a_gguf_file(tmp_path):
    import gguf

    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ab", "<|endoftext|>"]
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "gpt2")
    writer.add_context_length(16)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 257 + [3])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(257)
    writer.add_eos_token_id(257)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (tmp_path / "a.txt").write_text("ab" * 10)
    data = TextDataModule(str(tmp_path / "tiny.gguf"), evaluation=str(tmp_path / "a.txt"), seqlen=10)
    assert data.evaluation_windows.tolist() == [[256] * 10]


def test_the_tokenizer_is_refused_before_anything_is_read(tmp_path, offline):
    with pytest.raises(FileNotFoundError, match=r"missing\.gguf does not exist"):
        TextDataModule(str(tmp_path / "missing.gguf"))
    with pytest.raises(ValueError, match="A tokenizer is needed to read text, but int"):
        TextDataModule(3)
    with pytest.raises(ValueError, match="none was given, and no Trainer runs a module that has one"):
        TextDataModule().setup("validate")
    with pytest.raises(OSError, match=r"'no/such' was asked for, but neither a local folder nor") as error:
        TextDataModule("no/such").setup("validate")
    assert error.value.__cause__ is not None
    with pytest.raises(OSError, match="was asked for, but neither a local folder"):
        TextDataModule(str(tmp_path)).setup("validate")


# -------------------------------------------------------------------------------------------------- text: bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seqlen": 1}, "seqlen must be at least 2, but it is 1"),
        ({"num_samples": 0}, "num_samples must be at least 1, but it is 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, but it is 0"),
        ({"limit": 0}, "limit must be at least 1, but it is 0"),
        (
            {"calibration": "wikitxt2"},
            r"one of c4, wikitext2, python-docs, or a file .* 'wikitxt2' .* mean wikitext2\?",
        ),
        ({"evaluation": "ptb"}, r"but 'ptb' was asked for\.$"),
        ({"evaluation": "{tmp}/a.csv"}, r"ends in \.txt, \.jsonl, \.parquet, but .*a\.csv ends in \.csv"),
        ({"evaluation": "{tmp}"}, "ends in nothing"),
    ],
)
def test_bad_arguments_are_refused_at_once(tmp_path, tokenizer, options, message):
    (tmp_path / "a.csv").write_text("text\nhello")
    options = {k: v.format(tmp=tmp_path) if isinstance(v, str) else v for k, v in options.items()}
    with pytest.raises(ValueError, match=message):
        TextDataModule(tokenizer, **options)


def test_a_missing_file_is_refused_at_once(tmp_path, tokenizer):
    with pytest.raises(FileNotFoundError, match=r"missing\.jsonl does not exist"):
        TextDataModule(tokenizer, calibration=str(tmp_path / "missing.jsonl"))
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(FileNotFoundError, match="is a folder"):
        TextDataModule(tokenizer, evaluation=str(tmp_path / "folder.txt"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"caf\xe9 au lait", r"a\.txt is not: byte 3 \(0xe9\)"),
        ("a.jsonl", b'{"text": "\xff"}', r"a\.jsonl is not: byte 10 \(0xff\)"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": \n', r"a\.jsonl .* but line 3 is not JSON"),
        ("a.jsonl", b'{"text": "a"}\n{"body": "b", "id": 1}\n', "but line 2 has 'body', 'id'. Rename"),
        ("a.jsonl", b"{}\n", "but line 1 has nothing"),
        ("a.jsonl", b'["a"]\n', "but line 1 is a list"),
        ("a.jsonl", b'{"text": null}\n', "but line 1 has a 'text' of type NoneType"),
        ("a.txt", b" \n", "there is no text in it"),
        ("a.jsonl", b"\n", "there is no text in it"),
        ("a.jsonl", b'{"text": ""}\n', "there is no text in it"),
        ("a.parquet", b"PAR? no", r"read as Parquet, but it is not"),
    ],
)
def test_bad_files_are_refused_when_read(tmp_path, tokenizer, name, content, message):
    (tmp_path / name).write_bytes(content)
    source = str(tmp_path / name)
    with pytest.raises(ValueError, match=message):
        TextDataModule(tokenizer, evaluation=source).setup("validate")
    with pytest.raises(ValueError, match=message):
        TextDataModule(tokenizer, calibration=source).calibration_dataloader()


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"body": ["a"], "id": [1]}, "should have a column 'text', but it has 'body', 'id'"),
        ({"text": ["a", None]}, "row 1 has a NoneType"),
        ({"text": [1, 2]}, "row 0 has a int"),
        ({"text": pa.array([], pa.string())}, "there is no text in it"),
    ],
)
def test_bad_tables_are_refused_when_read(tmp_path, tokenizer, columns, message):
    source = write_parquet(tmp_path / "a.parquet", **columns)
    with pytest.raises(ValueError, match=message):
        TextDataModule(tokenizer, evaluation=source).setup("validate")


def test_too_short_texts_are_refused_with_counts(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("x" * 19)  # 20 tokens with <s>
    text, table = str(tmp_path / "a.txt"), write_jsonl(tmp_path / "a.jsonl", documents([5, 19, 12]))
    with pytest.raises(ValueError, match=r"need a text of at least 21, but .*a\.txt has 20"):
        TextDataModule(tokenizer, calibration=text, seqlen=20).calibration_dataloader()
    with pytest.raises(ValueError, match=r"at least 21, but the longest of the 3 documents of .* has 20.*\.txt file"):
        TextDataModule(tokenizer, calibration=table, seqlen=20).calibration_dataloader()
    assert TextDataModule(tokenizer, text, text, seqlen=19, num_samples=2).calibration_windows.shape == (2, 19)
    assert TextDataModule(tokenizer, evaluation=text, seqlen=20).evaluation_windows.shape == (1, 20)
    with pytest.raises(ValueError, match=r"seqlen=21 tokens was asked for, but .*a\.txt has only 20"):
        TextDataModule(tokenizer, evaluation=text, seqlen=21).setup("validate")


@pytest.mark.parametrize(("source", "name"), [("c4", "allenai/c4"), ("wikitext2", "Salesforce/wikitext")])
def test_an_unreachable_hub_is_one_clear_error(tmp_path, offline, tokenizer, source, name):
    data = TextDataModule(tokenizer, source, source, cache_dir=str(tmp_path))
    message = rf"{name} was asked for, but .* cannot be reached\. Use python-docs"
    with pytest.raises(OSError, match=message) as error:
        data.setup("validate")
    assert isinstance(error.value.__cause__, ConnectionError)
    with pytest.raises(OSError, match=message):
        data.calibration_dataloader()


# ------------------------------------------------------------------------------------------------------------ images


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


def test_digits_are_split_by_class_into_disjoint_parts():
    data = ImageDataModule("digits", vit())
    data.setup("fit")
    train, train_labels = images_of(data.calibration_dataloader())
    evaluation, labels = images_of(data.val_dataloader())
    assert (len(train), len(evaluation)) == (1437, 360)
    assert data.num_classes == 10
    assert data.class_names == tuple("0123456789")
    counts = np.bincount(load_digits().target)
    assert (np.abs(labels.bincount().numpy() - 0.2 * counts) < 1).all()
    everything = {image.numpy().tobytes() for image in torch.cat([train, evaluation])}
    assert len(everything) == len({image.tobytes() for image in load_digits().images})  # a scan may occur once only
    assert torch.equal((train_labels.bincount() + labels.bincount()), torch.tensor(counts))
    again = ImageDataModule("digits", vit(), seed=1)  # the parts do not depend on the seed
    again.setup("fit")
    assert torch.equal(images_of(again.val_dataloader())[0], evaluation)


@pytest.mark.parametrize("in_chans", [1, 3])
def test_digits_are_resized_whole_and_normalized_for_the_model(in_chans):
    model = vit(in_chans)
    data = ImageDataModule("digits", model, batch_size=7)
    data.setup("validate")
    images, labels = next(iter(data.val_dataloader()))
    assert images.shape == (7, in_chans, 16, 16)
    assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
    pixels, target = load_digits().images, load_digits().target
    candidates = []
    for scan in pixels[target == labels[0].item()]:
        picture = Image.fromarray((scan * 255 / 16).round().astype(np.uint8)).resize((16, 16), Image.Resampling.BICUBIC)
        candidates.append((np.asarray(picture) / 255 - 0.5) / 0.5)
    distances = [np.abs(images[0].numpy() - candidate).max() for candidate in candidates]
    assert min(distances) < 1e-5
    assert model(images).shape == (7, 10)


def test_calibration_images_are_a_seeded_choice_of_training_images():
    def calibration(seed, num_samples=64):
        data = ImageDataModule("digits", vit(), num_samples=num_samples, seed=seed)
        data.setup("validate")
        return images_of(data.calibration_dataloader()), data

    (images, labels), data = calibration(0)
    assert len(images) == 64
    assert len(labels.unique()) == 10
    assert torch.equal(calibration(0)[0][0], images)
    assert not torch.equal(calibration(1)[0][0], images)
    train = data.train_dataloader().dataset.tensors[0]
    order = torch.randperm(1437, generator=torch.Generator().manual_seed(0))
    assert torch.equal(images, train[order[:64]])


def test_training_on_digits_shuffles_by_the_seed_and_mirrors_nothing():
    def epoch(seed):
        data = ImageDataModule("digits", vit(), seed=seed)
        data.setup("fit")
        return images_of(data.train_dataloader())[0], images_of(data.calibration_dataloader())[0]

    (train, calibration), (again, _), (other, _) = epoch(0), epoch(0), epoch(1)
    assert torch.equal(train, again)
    assert not torch.equal(train, other)
    assert sorted(t.numpy().tobytes() for t in train) == sorted(t.numpy().tobytes() for t in calibration)


def test_digits_are_prepared_once_and_large_ones_on_the_fly():
    data = ImageDataModule("digits", vit())
    data.setup("validate")
    kept = data.val_dataloader().dataset
    data.setup("validate")
    assert data.val_dataloader().dataset is kept
    data.model = vit(img_size=8)
    data.setup("validate")
    assert data.val_dataloader().dataset[0][0].shape == (3, 8, 8)
    data = ImageDataModule("digits", "resnet18", num_workers=2)
    data.setup("validate")
    loader = data.val_dataloader()
    assert loader.num_workers == 2
    assert loader.dataset[0][0].shape == (3, 224, 224)


class Wrapped(L.LightningModule):
    """As ImageClassifierModule: the timm model is `.model`."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.shapes = []

    def validation_step(self, batch, batch_idx):
        images, _ = batch
        assert self.model(images).shape == (len(images), 10)
        self.shapes.append(tuple(images.shape))


@runs_a_trainer
def test_transforms_come_from_the_model_of_the_trainer(monkeypatch):
    from lightning.pytorch.trainer.connectors import data_connector

    monkeypatch.setattr(data_connector, "suggested_max_num_workers", lambda _: 31)
    module = Wrapped(vit(in_chans=1))
    data = ImageDataModule("digits", batch_size=300)
    quiet_trainer().validate(module, data, verbose=False)
    assert module.shapes == [(300, 1, 16, 16), (60, 1, 16, 16)]
    quiet_trainer().validate(other := Wrapped(vit()), data, verbose=False)
    assert other.shapes[0] == (300, 3, 16, 16)


def test_preprocessing_is_the_models_own():
    found = resolve_preprocessing(timm.create_model("convnext_atto", num_classes=10))
    assert found.input_size == (3, 224, 224)
    assert found.mean == (0.485, 0.456, 0.406)
    assert found.crop_pct == 0.875
    assert resolve_preprocessing("convnext_atto") == resolve_preprocessing("timm:convnext_atto.d2_in1k") == found
    assert resolve_preprocessing("convnext_atto", image_size=64).input_size == (3, 64, 64)
    gray = resolve_preprocessing(Wrapped(timm.create_model("resnet18", in_chans=1)))
    assert gray.input_size == (1, 224, 224)
    assert gray.mean == pytest.approx(((0.485 + 0.456 + 0.406) / 3,))
    assert gray.std == pytest.approx(((0.229 + 0.224 + 0.225) / 3,))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("convnext_ato", r"timm knows no 'convnext_ato'\. Did you mean convnext_atto"),
        (nn.Linear(2, 2), r"neither Linear nor its \.model has timm's pretrained_cfg"),
        (vit(in_chans=4), "1 or 3 channels, but VisionTransformer wants 4"),
        (None, "but there is none: give model="),
    ],
)
def test_a_model_without_known_transforms_is_refused(model, message):
    with pytest.raises(ValueError, match=message):
        ImageDataModule("digits", model).setup("fit")


def test_more_classes_than_logits_are_refused():
    with pytest.raises(ValueError, match="digits has 10 classes, but the model tells only 3 apart"):
        ImageDataModule("digits", vit(num_classes=3)).setup("validate")


# --------------------------------------------------------------------------------------------- images: folders, hub


def paint(folder, colour, count):
    folder.mkdir(parents=True)
    for i in range(count):
        Image.new("RGB", (20, 20), (*colour, 10 * i)).save(folder / f"{i}.png")


@pytest.fixture
def imagenet(tmp_path):
    for part, count in (("train", 4), ("val", 2)):
        paint(tmp_path / "data" / part / "blue", (0, 0), count)
        paint(tmp_path / "data" / part / "green", (0, 255), count)
    return tmp_path / "data"


@pytest.mark.parametrize("in_chans", [1, 3])
def test_a_folder_in_the_manner_of_imagenet(imagenet, in_chans):
    data = ImageDataModule(str(imagenet), vit(in_chans), batch_size=3, num_samples=5)
    data.setup("fit")
    assert data.class_names == ("blue", "green")
    images, labels = images_of(data.val_dataloader())
    assert images.shape == (4, in_chans, 16, 16)
    assert labels.tolist() == [0, 0, 1, 1]
    colours = [np.array([0, green, blue]) for green in (0, 255) for blue in (0, 10)]
    if in_chans == 1:  # ITU-R 601
        colours = [np.array([round(0.587 * green + 0.114 * blue)]) for _, green, blue in colours]
    expected = torch.tensor(np.stack(colours) / 255 * 2 - 1, dtype=torch.float32)
    torch.testing.assert_close(images, expected[:, :, None, None].expand_as(images), atol=0.01, rtol=0)
    assert images_of(data.calibration_dataloader())[0].shape[0] == 5
    train, labels = images_of(data.train_dataloader())
    assert train.shape == (8, in_chans, 16, 16)
    assert labels.bincount().tolist() == [4, 4]


def test_calibration_is_not_augmented_but_training_is(tmp_path):
    rng = np.random.default_rng(0)
    for part in ("train", "val"):
        (tmp_path / part / "noise").mkdir(parents=True)
        Image.fromarray(rng.integers(0, 255, (20, 20, 3), np.uint8)).save(tmp_path / part / "noise" / "0.png")
    data = ImageDataModule(str(tmp_path), vit())
    data.setup("fit")
    calibration = [images_of(data.calibration_dataloader())[0] for _ in range(2)]
    assert torch.equal(*calibration)
    torch.manual_seed(0)
    random.seed(0)
    assert not torch.equal(*[images_of(data.train_dataloader())[0] for _ in range(2)])


def test_a_folder_of_classes_calibrates_and_measures_but_does_not_train(imagenet):
    data = ImageDataModule(str(imagenet / "val"), vit())
    data.setup("validate")
    images, labels = images_of(data.val_dataloader())
    assert len(images) == 4
    assert sorted(images_of(data.calibration_dataloader())[1].tolist()) == sorted(labels.tolist())
    with pytest.raises(ValueError, match="nothing to train on"):
        data.train_dataloader()


@pytest.mark.parametrize("splits", [("train", "test"), ("train", "validation", "test"), ("train",)])
def test_a_hub_data_set_shows_its_columns_by_type(tmp_path, splits):
    features = datasets.Features({"picture": datasets.Image(), "kind": datasets.ClassLabel(names=["cat", "dog"])})
    (tmp_path / "set" / "data").mkdir(parents=True)
    for part, split in enumerate(splits):
        pictures = [Image.new("RGB", (8, 8), (0, 0, 100 * part + i)) for i in range(3)]
        table = datasets.Dataset.from_dict({"picture": pictures, "kind": [0, 1, 1]}, features=features)
        table.to_parquet(tmp_path / "set" / "data" / f"{split}-00000-of-00001.parquet")
    data = ImageDataModule(str(tmp_path / "set"), vit(), cache_dir=str(tmp_path / "cache"))
    data.setup("fit")
    assert data.class_names == ("cat", "dog")
    images, labels = images_of(data.val_dataloader())
    assert labels.tolist() == [0, 1, 1]
    blue = images[:, 2].mean(dim=(1, 2))
    first = 100 * min(1, len(splits) - 1)  # the second split, or the only one
    torch.testing.assert_close(blue, torch.tensor([first, first + 1, first + 2]) / 255 * 2 - 1, atol=0.01, rtol=0)
    if len(splits) > 1:
        assert len(images_of(data.train_dataloader())[0]) == 3


def test_columns_that_do_not_decide_are_refused():
    image, label, text = datasets.Image(), datasets.ClassLabel(names=["a"]), datasets.Value("string")
    cifar100 = {"img": image, "fine_label": label, "coarse_label": label}
    assert find_columns(cifar100, "cifar100", "fine_label") == ("img", "fine_label")
    for features, found in (
        (cifar100, r"img \(Image\), fine_label \(ClassLabel\), coarse_label \(ClassLabel\)"),
        ({"img": image, "text": text}, r"img \(Image\), text \(Value\)"),
        ({"a": image, "b": image, "label": label}, r"a \(Image\), b \(Image\)"),
    ):
        with pytest.raises(ValueError, match=rf"some/set should have one column of type Image .* it has {found}"):
            find_columns(features, "some/set")


def test_splits_that_cannot_be_told_apart_are_refused(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a"])})
    table = datasets.Dataset.from_dict({"image": [Image.new("L", (8, 8))], "label": [0]}, features=features)
    from wanda_lightning.data.image_sources import _from_splits

    with pytest.raises(ValueError, match="named validation, val, test, but it has left, right"):
        _from_splits({"left": table, "right": table}, "some/set", None)


@pytest.mark.parametrize("data", ["cifar10", "cifar100", "some/images"])
def test_images_from_an_unreachable_hub_are_one_clear_error(tmp_path, offline, data):
    module = ImageDataModule(data, vit(num_classes=100), cache_dir=str(tmp_path))
    with pytest.raises(OSError, match=r"was asked for, but .* cannot be reached\. Use digits") as error:
        module.setup("fit")
    assert isinstance(error.value.__cause__, ConnectionError)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"num_samples": 0}, "num_samples must be at least 1"),
        ({"image_size": 0}, "image_size must be at least 1"),
        ({"num_workers": -1}, "num_workers must be at least 0"),
        ({"data": "cifar"}, r"'cifar' is no folder here and no known data set\. Did you mean cifar10"),
    ],
)
def test_bad_image_arguments_are_refused_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        ImageDataModule(**options)


def test_bad_folders_are_refused(tmp_path, imagenet):
    with pytest.raises(FileNotFoundError, match="missing does not exist"):
        ImageDataModule(str(tmp_path / "missing"))
    (tmp_path / "list.txt").write_text("")
    with pytest.raises(FileNotFoundError, match=r"list\.txt is a file"):
        ImageDataModule(str(tmp_path / "list.txt"))
    paint(tmp_path / "flat", (0, 0), 3)
    with pytest.raises(ValueError, match=r"there are none: .* has the folders \(none\) and 3 files"):
        ImageDataModule(str(tmp_path / "flat"))
    (tmp_path / "empty" / "cat").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"Each class of .* should have images, but .* cat"):
        ImageDataModule(str(tmp_path / "empty"), vit()).setup("fit")
    paint(tmp_path / "half" / "train" / "cat", (0, 0), 1)
    with pytest.raises(
        ValueError, match=r"looked for in .*val, but there are none: .* has the folders train and 0 files"
    ):
        ImageDataModule(str(tmp_path / "half"))
    paint(imagenet / "val" / "azure", (128, 128), 1)
    with pytest.raises(ValueError, match=r"should have the same classes, .* only one of them has azure"):
        ImageDataModule(str(imagenet))


def test_images_are_not_there_before_setup():
    with pytest.raises(RuntimeError, match=r"Call setup\(\) first"):
        _ = ImageDataModule("digits", vit()).num_classes


# ------------------------------------------------------------------------------------------------------------- YAML


def built(data: L.LightningDataModule) -> L.LightningDataModule:
    return data


def test_both_can_be_built_from_yaml(tmp_path, tokenizer):
    def build(name, **arguments):
        config = tmp_path / "config.yaml"  # JSON is YAML
        config.write_text(json.dumps({"data": {"class_path": f"wanda_lightning.data.{name}", "init_args": arguments}}))
        return auto_cli(built, args=[f"--config={config}"])

    tokenizer.save_pretrained(tmp_path / "saved")
    data = build("TextDataModule", tokenizer=str(tmp_path / "saved"), seqlen=32, num_samples=3)
    assert isinstance(data, TextDataModule)
    assert data.calibration_windows.shape == (3, 32)
    data = build("ImageDataModule", model="convnext_atto", image_size=32)
    assert isinstance(data, ImageDataModule)
    data.setup("validate")
    assert next(iter(data.val_dataloader()))[0].shape == (64, 3, 32, 32)
    assert build("ImageDataModule").model is None
