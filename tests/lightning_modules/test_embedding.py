"""The module for sentence embeddings: prune, shrink, train and save models of sentence-transformers."""

import json
import re
import subprocess
import sys
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import CrossEncoder, SparseEncoder
from support.callbacks import WITHOUT_ADVICE, trainer
from support.embedding import PAIRS, SENTENCES, load, save_pairs, save_tiny, spearman_by_hand
from support.layers import assert_same
from support.quiet import prune, shrink, zero_units
from support.refusals import refuses
from support.reports import read_json
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
)

from wanda_lightning import (
    DistillFromDense,
    EmbeddingModule,
    PruningCallback,
    SentenceDataModule,
)
from wanda_lightning.calibration.samples import forward_batch
from wanda_lightning.common.text_features import text_features
from wanda_lightning.models import find_layers

pytestmark = [WITHOUT_ADVICE, pytest.mark.filterwarnings("ignore:num_samples is")]


def test_texts_give_the_zeros_of_batches_by_hand(tiny, tiny_folder):
    by_hand = EmbeddingModule(tiny_folder).model
    batches = [text_features(by_hand, SENTENCES[start : start + 32]) for start in (0, 32, 64)]
    prune(by_hand, batches, forward=lambda batch: by_hand(dict(batch)))
    report = prune(tiny, SENTENCES)

    assert_same(tiny, by_hand)
    # Padding counts for no layer of the encoder: words and two special tokens of each sentence.
    tokens = sum(len(sentence.split()) + 2 for sentence in SENTENCES)
    assert {layer.tokens for layer in report.layers if "encoder" in layer.name} == {tokens}


class OwnTokenizer(torch.nn.Module):
    """Tokenizes texts, but takes the features by name, as models of transformers do."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 4)

    def preprocess(self, texts, prompt):
        return {"x": torch.ones(len(texts), 4)}

    tokenize = preprocess

    def forward(self, x):
        return self.layer(x)


def test_a_model_that_tokenizes_may_take_features_by_name():
    report = prune(OwnTokenizer(), ["one text", "another"])
    assert [layer.name for layer in report.layers] == ["layer"]


def test_texts_for_a_model_without_tokenizer_are_refused():
    with refuses("Linear has no method `tokenize`"):
        prune(torch.nn.Linear(4, 4), ["a cat ."])


def tiny_with_head(kind, architecture, tiny_folder, folder):
    """Return a CrossEncoder or SparseEncoder, of the size and with the tokenizer of the tiny model."""
    config = BertConfig.from_pretrained(tiny_folder, num_labels=1)
    architecture(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(folder)
    return kind(str(folder), device="cpu")


@pytest.mark.parametrize(
    ("texts", "found"),
    [
        ([("a cat .", "a dog .")], r"tensors, but the model was given \('a cat \.', 'a dog"),
        (["a cat ."], r"pairs of texts, but batches\[0\] is the text 'a cat \.'"),
    ],
)
@pytest.mark.skipif(not hasattr(CrossEncoder, "preprocess"), reason="tokenizes no pairs")
def test_texts_for_a_cross_encoder_are_refused(tiny_folder, tmp_path, texts, found):
    architecture = BertForSequenceClassification
    model = tiny_with_head(CrossEncoder, architecture, tiny_folder, tmp_path)
    weights = model.state_dict()
    before = {name: weight.clone() for name, weight in weights.items()}
    with refuses(rf"{found}.* \[model\.preprocess\(pairs\)\]"):
        prune(model, texts)
    assert all(torch.equal(weights[name], weight) for name, weight in before.items())
    assert prune(model, [model.preprocess([("a cat .", "a dog .")])]).layers


def test_gradients_of_a_model_that_writes_in_place_are_refused(tiny_folder, tmp_path):
    model = tiny_with_head(SparseEncoder, BertForMaskedLM, tiny_folder, tmp_path)
    with refuses("writes into some of them, as SPLADE models do .* Choose allocation='uniform'"):
        prune(model, SENTENCES, method="best")
    without_gradients = {"allocation": "uniform", "pattern": "unstructured_layer"}
    assert prune(model, SENTENCES, method="best", **without_gradients).layers


# ---- smaller folders in a process without this package, which takes seconds to start and so loads all of them

LOAD = """
import json, sys
from sentence_transformers import SentenceTransformer
found = {}
for folder, trust in json.loads(sys.argv[1]).items():
    model = SentenceTransformer(folder, device="cpu", trust_remote_code=trust)
    weights = {n: p.shape for n, p in model.named_parameters() if n.endswith("intermediate.dense.weight")}
    embedding = model.encode(["a cat sees the red house ."])[0].tolist()
    found[folder] = {"widths": [width for width, _ in weights.values()], "embedding": embedding}
assert "wanda_lightning" not in sys.modules
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def smaller(tiny_folder, tmp_path_factory):
    """By whether all layers lost units: a model with zeros, and what another process finds in the smaller folder."""
    cases = {}
    for equal in (True, False):
        folder = tmp_path_factory.mktemp("smaller") / "out"
        module = EmbeddingModule(tiny_folder)
        zero_units(module.model, SENTENCES, skip=() if equal else "*layer.0*")
        zeros = deepcopy(module.model).eval()
        (note,) = shrink(module.model).notes
        assert ("trust_remote_code=True only" in note) != equal
        module.save_pretrained(folder)
        cases[equal] = SimpleNamespace(zeros=zeros, folder=folder)

    folders = {str(case.folder): not equal for equal, case in cases.items()}
    command = [sys.executable, "-I", "-c", LOAD, json.dumps(folders)]
    home = str(tmp_path_factory.mktemp("home"))
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": home, "PATH": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    for case in cases.values():
        case.found = json.loads(done.stdout)[str(case.folder)]
    return cases


@pytest.mark.xdist_group("smaller")  # the fixture runs another process
@pytest.mark.parametrize("equal", [True, False])
def test_a_smaller_folder_loads_without_this_package(smaller, equal):
    case = smaller[equal]
    expected = case.zeros.encode(["a cat sees the red house ."])[0]
    assert case.found["embedding"] == pytest.approx(expected.tolist(), abs=1e-5)
    assert case.found["widths"] == [16 if equal else 32, 16]


def test_the_module_loads_a_smaller_folder(smaller):
    case = smaller[True]
    assert spearman_by_hand(EmbeddingModule(case.folder).model.eval()) == pytest.approx(
        spearman_by_hand(case.zeros)
    )


class Normalize(torch.nn.Module):
    """A module of a user, with the name of one in sentence-transformers."""

    def save(self, path):
        pass


def test_a_folder_names_classes_that_versions_5_and_6_have(tiny, tmp_path):
    tiny.append(Normalize())
    EmbeddingModule(tiny).save_pretrained(tmp_path / "out")
    assert [entry["type"] for entry in read_json(tmp_path / "out/modules.json")] == [
        "sentence_transformers.models.Transformer",
        "sentence_transformers.models.Pooling",
        f"{Normalize.__module__}.Normalize",
    ]


def test_a_folder_is_not_replaced(tiny, tmp_path):
    module = EmbeddingModule(tiny)
    module.save_pretrained(tmp_path / "out")
    with pytest.raises(FileExistsError):
        module.save_pretrained(tmp_path / "out")


@pytest.fixture(params=["prompt", "prompt outside of pooling", "truncated"])
def encoding(request, tiny):
    """The tiny model with a setting of its own for `encode`."""
    if request.param == "truncated":
        tiny.truncate_dim = 4
    else:
        tiny.prompts["passage"] = "the big red "
        tiny.default_prompt_name = "passage"
        tiny.set_pooling_include_prompt(request.param == "prompt")
    return tiny.eval()


def test_the_correlation_is_that_of_encode(encoding, tiny_folder, tmp_path):
    data = SentenceDataModule(evaluation=save_pairs(tmp_path / "pairs.csv"), batch_size=5)
    expected = spearman_by_hand(encoding)
    for loop, stage in ((trainer().validate, "val"), (trainer().test, "test")):
        (measured,) = loop(EmbeddingModule(encoding), data, verbose=False)
        assert measured == {f"{stage}_spearman": pytest.approx(expected, abs=1e-4)}
    assert abs(expected - spearman_by_hand(load(tiny_folder).eval())) > 1


@pytest.mark.parametrize("run", ["module", "model alone"])
def test_training_and_calibration_see_what_encode_returns(encoding, run):
    data = SentenceDataModule(encoding, [" ".join(SENTENCES)], num_samples=8, train_samples=8)
    for texts, loader in (
        (data.calibration_sentences, data.calibration_dataloader()),
        (data.train_pieces, data.train_dataloader()),
    ):
        (batch,) = loader
        batch.pop("score", None)
        if run == "module":
            found = EmbeddingModule(encoding).eval()(batch)
        else:
            found = forward_batch(encoding, batch)["sentence_embedding"]
        expected = torch.tensor(encoding.encode(texts))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_prompt_is_among_the_tokens_that_prune_counts(tiny):
    tiny.prompts["passage"] = "the big red "
    tiny.default_prompt_name = "passage"
    tiny.set_pooling_include_prompt(False)
    report = prune(tiny, SENTENCES, method="best")
    tokens = sum(len(sentence.split()) + 5 for sentence in SENTENCES)
    assert {layer.tokens for layer in report.layers if "encoder" in layer.name} == {tokens}


def test_distillation_compares_what_encode_returns(tiny, tiny_folder, tmp_path):
    tiny.truncate_dim = 4
    prune(tiny, SENTENCES, 0.7)
    dense = load(tiny_folder)
    dense.truncate_dim = 4
    pairs = save_pairs(tmp_path / "pairs.csv")
    data = SentenceDataModule(tiny, [" ".join(SENTENCES)], pairs, train_samples=8)
    found, expected = (torch.tensor(m.encode(data.train_pieces)) for m in (tiny, dense))

    loop = trainer(DistillFromDense(dense, weight=1), max_epochs=1)
    loop.fit(EmbeddingModule(tiny), data)
    error = (found - expected).square().mean().item()
    assert loop.callback_metrics["distillation_loss"] == pytest.approx(error, rel=1e-4)


def fit(module, tmp_path, *callbacks):
    pairs = save_pairs(tmp_path / "pairs.csv")
    sentences = tmp_path / "sentences.txt"
    sentences.write_text("\n\n".join(SENTENCES))
    data = SentenceDataModule(
        calibration=sentences, evaluation=pairs, train=pairs, batch_size=4, num_samples=32
    )
    loop = trainer(*callbacks, max_epochs=6)
    loop.fit(module, data)
    return loop.callback_metrics


def test_the_loss_is_the_squared_difference_of_similarities_and_scores(tiny, tmp_path):
    module = EmbeddingModule(tiny).eval()
    pairs = save_pairs(tmp_path / "pairs.csv")
    (batch,) = SentenceDataModule(tiny, evaluation=pairs).val_dataloader()
    first, second, scores = zip(*PAIRS, strict=True)
    embeddings = [torch.tensor(tiny.encode([*texts])) for texts in (first, second)]
    errors = torch.cosine_similarity(*embeddings) - torch.tensor(scores) / 5
    module.log = lambda *args, **options: None
    assert module.training_step(batch, 0).item() == pytest.approx(errors.square().mean().item())


def test_a_callback_prunes_and_keeps_the_zeros_in_fit(tiny, tmp_path):
    before = {layer.name: layer.weight.clone() for layer in find_layers(tiny).layers}
    callback = PruningCallback(num_samples=32)
    fit(EmbeddingModule(tiny, lr=0.01), tmp_path, callback)

    for layer in callback.report.layers:
        weight = tiny.get_submodule(layer.name).weight
        assert int((weight == 0).sum()) == layer.zeros
        if "pooler" not in layer.name:  # which has no gradient
            changed = (weight != 0) & (weight != before[layer.name])
            assert int(changed.sum()) > (layer.size - layer.zeros) / 2


def test_distillation_adds_the_mean_squared_error_of_the_embeddings(tiny, tiny_folder, tmp_path):
    prune(tiny, SENTENCES, 0.7)
    dense = EmbeddingModule(tiny_folder).model.eval()

    def error():
        found, expected = (torch.tensor(m.eval().encode(SENTENCES)) for m in (tiny, dense))
        return (found - expected).square().mean()

    before = error()
    module = EmbeddingModule(tiny, lr=0.01)
    metrics = fit(module, tmp_path, DistillFromDense(str(tiny_folder), weight=1, temperature=3.0))
    assert error() < before / 2
    assert metrics["distillation_loss"] < before


def fit_on_pieces(module, folder, *callbacks):
    data = SentenceDataModule(
        calibration=[" ".join(SENTENCES)],
        evaluation=save_pairs(folder / "pairs.csv"),
        train_samples=320,
    )
    trainer(*callbacks, max_epochs=1).fit(module, data)


def test_without_scores_a_pruned_model_learns_the_embeddings_of_the_dense_one(tiny, tmp_path):
    expected = torch.tensor(tiny.encode(SENTENCES))
    prune(tiny, SENTENCES, 0.7)
    before = (torch.tensor(tiny.encode(SENTENCES)) - expected).square().mean()
    module = EmbeddingModule(tiny, lr=0.01, lr_decay=True)
    dense = EmbeddingModule(save_tiny(tmp_path / "dense"))
    fit_on_pieces(module, tmp_path, DistillFromDense(dense, weight=1))

    found = torch.tensor(tiny.eval().encode(SENTENCES))
    assert (found - expected).square().mean() < before / 2
    assert module.optimizers().param_groups[0]["lr"] == 0


def test_without_scores_or_a_dense_model_nothing_is_trained(tiny, tmp_path):
    with pytest.raises(RuntimeError, match="does not require grad"):
        fit_on_pieces(EmbeddingModule(tiny), tmp_path)


def test_a_model_that_reads_no_texts_is_refused():
    with refuses("SentenceTransformer, which tokenizes"):
        EmbeddingModule(torch.nn.Linear(2, 2))


def test_a_folder_without_pooling_is_refused(tiny, tmp_path):
    tiny[0].auto_model.save_pretrained(tmp_path)
    with refuses(re.escape("has no modules.json")):
        EmbeddingModule(tmp_path)


def test_weights_that_are_not_finite_are_refused(tiny, tmp_path):
    tiny.save(str(tmp_path))
    weights = load_file(tmp_path / "model.safetensors")
    weights["encoder.layer.1.output.dense.weight"][0, 0] = float("nan")
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with refuses(r"layer\.1\.output\.dense holds NaN"):
        EmbeddingModule(tmp_path)
