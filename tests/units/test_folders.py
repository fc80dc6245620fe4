"""Folders of shrunk models load with their own library alone, and give the results of the model with zeros."""

import hashlib
import subprocess
import sys
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path

import pytest
import timm
import torch
from support.disk import same
from support.layers import rng
from support.modules import VIT
from support.pairwise import with_nightly
from support.quiet import shrink, zero_units
from support.refusals import refuses
from support.reports import read_json
from support.tiny import VOCABULARY
from support.zoo import causal, number_of_weights, seeded
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaForCausalLM,
)

import wanda_lightning as wl
from wanda_lightning.units.shrunk_model import register_shrunk_model

LANGUAGE = {
    "llama": "intermediate_size",
    "gpt2": "n_inner",
    "opt": "ffn_dim",
    "phi3": "intermediate_size",
    "bloom": None,
    "llama by the loss": None,
}
"""The attribute of the configuration with the width, or None if there is none, or more than one width."""
EVERY_LANGUAGE_MODEL = pytest.mark.parametrize(
    "name", with_nightly(["llama", "bloom", "llama by the loss"], LANGUAGE)
)
IDS = torch.randint(3, VOCABULARY, (8, 16), generator=rng())


assert_close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def shrunk_language_model(tmp_path_factory):
    """Shrink and save a model once; return it with its zeros, the smaller one, the report and the folder."""

    @cache
    def save(name):
        model = causal(name.partition(" ")[0]).build()
        zero_units(model, [{"input_ids": IDS}], 0.4, by="loss" if "loss" in name else "equal")
        zeros = deepcopy(model)
        report = shrink(model)
        folder = tmp_path_factory.mktemp("shrunk") / "out"
        wl.CausalLMModule(model).save_pretrained(folder)
        return zeros, model, report, folder

    return save


def assert_loads_without_this_package(folder, name, model):
    """A folder needs a file if no attribute of its configuration has the width."""
    needs_file = LANGUAGE[name] is None
    files = list(folder.glob("*.py"))
    assert [path.name for path in files] == (["modeling_shrunk.py"] if needs_file else [])
    assert not any("wanda_lightning" in path.read_text() for path in files)
    loaded = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=needs_file).eval()
    assert loaded.generate(IDS[:, :3], max_new_tokens=3, do_sample=False).shape[1] == 6
    assert_close(loaded(IDS).logits, model(IDS).logits)


@EVERY_LANGUAGE_MODEL
def test_a_language_model_loads_without_this_package(shrunk_language_model, name):
    """The configuration has the width if it has an attribute for it."""
    zeros, _, report, folder = shrunk_language_model(name)
    assert_loads_without_this_package(folder, name, zeros)
    saved = read_json(folder / "config.json")
    widths = {round(layer.shape[1] * (1 - layer.sparsity)) for layer in report.layers}
    assert (len(widths) > 1) == ("loss" in name)
    attribute = LANGUAGE[name]
    assert ("auto_map" in saved) == (attribute is None)
    assert attribute is None or {saved[attribute]} == widths


@EVERY_LANGUAGE_MODEL
def test_a_loaded_language_model_can_be_saved_again(shrunk_language_model, name, tmp_path):
    zeros, *_, folder = shrunk_language_model(name)
    needs_file = LANGUAGE[name] is None
    if needs_file:
        with refuses("does not fit"):
            wl.CausalLMModule(folder).configure_model()
    module = wl.CausalLMModule(folder, trust_remote_code=needs_file)
    module.save_pretrained(tmp_path / "again")
    assert_loads_without_this_package(tmp_path / "again", name, zeros)


def test_a_base_model_loads_from_the_folder_of_a_model_with_a_head(shrunk_language_model):
    zeros, *_, folder = shrunk_language_model("llama by the loss")
    base = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    assert type(base).__name__ == "ShrunkLlamaModel"
    assert_close(base(IDS).last_hidden_state, zeros.model(IDS).last_hidden_state)


def test_another_head_loads_from_the_folder_of_a_base_model(tmp_path):
    base = causal("llama").build().model
    shrink(base, [{"input_ids": IDS}], units=0.4, skip="layers.0.*")
    base.save_pretrained(tmp_path)
    auto = AutoModelForSequenceClassification
    classifier = auto.from_pretrained(tmp_path, trust_remote_code=True, num_labels=3)
    assert same(classifier.model.state_dict(), base.state_dict())


def test_what_is_shrunk_in_memory_is_saved_by_transformers_alone(shrunk_language_model, tmp_path):
    zeros, model, *_ = shrunk_language_model("llama by the loss")
    assert isinstance(model, LlamaForCausalLM)
    model.save_pretrained(tmp_path)
    assert_loads_without_this_package(tmp_path, "llama by the loss", zeros)


@pytest.mark.parametrize(("name", "is_served"), [("llama by the loss", True), ("bloom", False)])
def test_a_family_that_no_server_can_build_is_named(shrunk_language_model, name, is_served):
    *_, report, _ = shrunk_language_model(name)
    assert ("vLLM and SGLang cannot serve it" in report.notes[0]) != is_served


def test_the_documentation_has_the_hashes_of_the_files(shrunk_language_model, dense_and_shrunk):
    page = (Path(__file__).parents[2] / "docs/shrink.md").read_text(encoding="utf-8")
    for folder in (shrunk_language_model("bloom")[-1], dense_and_shrunk("test_resnet")[1]):
        file = (folder / "modeling_shrunk.py").read_bytes()
        assert hashlib.sha256(file).hexdigest() in page


ALONE = """
import sys, timm, torch
try:
    timm.create_model("local-dir:" + sys.argv[-1])
except RuntimeError as error:
    assert str(error) == "Unknown model (shrunk_model)"
sys.path.append(sys.argv[-1])
import modeling_shrunk
assert "shrunk_model" not in timm.list_models()  # its name alone does not build a model
for folder in sys.argv[1:]:
    model = timm.create_model("local-dir:" + folder, pretrained=True).eval()
    torch.save(model(torch.load(folder + "/images.pt")), folder + "/logits.pt")
assert "wanda_lightning" not in sys.modules
"""


@dataclass(frozen=True)
class ImageModel:
    """A model of timm, and with which arguments it is saved."""

    kwargs: dict = field(default_factory=dict)
    by: str = "equal"
    # Arguments that give the widths; without any, the folder needs a file.
    arguments: dict = field(default_factory=dict)


IMAGE_MODELS = {
    "vit_tiny_patch16_224": ImageModel(VIT, arguments={"mlp_ratio": 2.5}),
    "cait_xxs24_224": ImageModel(
        {"img_size": 32, "embed_dim": 32, "num_heads": 4, "depth": 1},
        arguments={"mlp_ratio": 2.5, "mlp_ratio_token_only": 2.5},
    ),
    "test_efficientnet": ImageModel(by="loss"),
    "test_resnet": ImageModel(by="seconds"),
}


@pytest.fixture(scope="module")
def image_folders(tmp_path_factory):
    """Folders of smaller image models with images and the logits that timm alone computes, and the modules."""
    modules = {}
    for name, specimen in IMAGE_MODELS.items():
        model = seeded(partial(timm.create_model, name, num_classes=10, **specimen.kwargs))
        size = specimen.kwargs.get("img_size", 32)
        images = torch.randn(4, 3, size, size)
        folder = tmp_path_factory.mktemp("images") / name
        module = wl.ImageClassifierModule(model, model_kwargs=specimen.kwargs).eval()
        shrink(model, [(images, torch.arange(4))], units=0.4, by=specimen.by)
        module.save_pretrained(folder)
        torch.save(images, folder / "images.pt")
        modules[folder] = module
    subprocess.run([sys.executable, "-I", "-c", ALONE, *map(str, modules)], check=True)
    return modules


@pytest.mark.xdist_group("image_folders")  # the fixture runs another process
def test_image_models_load_without_this_package(image_folders):
    """With it, no file of a folder runs; only widths without arguments need one."""
    for folder, module in image_folders.items():
        arguments = IMAGE_MODELS[folder.name].arguments
        assert (folder / "modeling_shrunk.py").exists() == (not arguments)
        saved = read_json(folder / "config.json").get("model_args", {})
        assert arguments.items() <= saved.items()
        images = torch.load(folder / "images.pt")
        loaded = wl.ImageClassifierModule(folder).eval()
        for logits in (torch.load(folder / "logits.pt"), loaded(images)):
            assert_close(logits, module(images))


@pytest.mark.xdist_group("image_folders")
@pytest.mark.parametrize("name", with_nightly(["test_resnet"], IMAGE_MODELS))
def test_a_loaded_image_model_can_be_saved_and_become_smaller_again(image_folders, tmp_path, name):
    (folder,) = [folder for folder in image_folders if folder.name == name]
    images = torch.load(folder / "images.pt")
    again = wl.ImageClassifierModule(folder).eval()
    again.save_pretrained(tmp_path / "again")
    assert read_json(tmp_path / "again/config.json") == read_json(folder / "config.json")

    before = number_of_weights(again)
    shrink(again.model, [images], units=0.5)
    again.save_pretrained(tmp_path / "smaller")
    smaller = wl.ImageClassifierModule(tmp_path / "smaller").eval()
    assert_close(smaller(images), again(images))
    assert number_of_weights(smaller) < before


# ---- whatever timm does with the folder of a dense model, it does with that of the smaller one

DENSE_CALLS = [
    ("vit_tiny_patch16_224", {"img_size": 48}),
    ("vit_tiny_patch16_224", {"in_chans": 1, "num_classes": 0}),
    ("vit_tiny_patch16_224", {"features_only": True, "out_indices": (0, 1), "img_size": 48}),
    ("test_resnet", {"in_chans": 1}),
    ("test_resnet", {"features_only": True, "out_indices": (1, 2), "feature_cls": "hook"}),
    ("test_efficientnet", {"features_only": True}),  # of another class than the classifier
]


@pytest.fixture(scope="module")
def dense_and_shrunk(tmp_path_factory):
    """Save a model of timm with zeros and without them once; return both folders."""

    @cache
    def save(name):
        kwargs = VIT if "vit" in name else {}
        model = seeded(partial(timm.create_model, name, num_classes=10, **kwargs))
        images = torch.randn(4, 3, 32, 32)
        folder = tmp_path_factory.mktemp(name)
        module = wl.ImageClassifierModule(model, model_kwargs=kwargs).eval()
        # The layers get different widths.
        zero_units(model, [(images, torch.arange(4))], 0.4, by="loss")
        module.save_pretrained(folder / "dense")
        shrink(model)
        module.save_pretrained(folder / "shrunk")
        assert (folder / "shrunk/modeling_shrunk.py").exists()
        return folder / "dense", folder / "shrunk"

    return save


@pytest.mark.parametrize(("name", "arguments"), DENSE_CALLS)
def test_timm_adapts_a_folder_as_that_of_the_dense_model(dense_and_shrunk, name, arguments):
    register_shrunk_model()
    dense, smaller = (
        timm.create_model(f"local-dir:{folder}", pretrained=True, **arguments).eval()
        for folder in dense_and_shrunk(name)
    )
    size = arguments.get("img_size", 32)
    images = torch.randn(2, arguments.get("in_chans", 3), size, size)
    assert_close(smaller(images), dense(images))
    assert number_of_weights(smaller) < number_of_weights(dense)
    described = {"architecture": "shrunk_model", "file": str(dense_and_shrunk(name)[1])}
    assert smaller.pretrained_cfg == {**dense.pretrained_cfg, **described}


def test_features_that_are_hidden_units_are_counted():
    """The first convolution of a VGG is followed by another one, and is the first feature."""
    register_shrunk_model()
    shapes = {
        "features.0.weight": [24, 3, 3, 3],
        "features.0.bias": [24],
        "features.3.weight": [128, 24, 3, 3],
    }
    numbers = {"features.0": {"out_channels": 24}, "features.3": {"in_channels": 24}}
    model = timm.create_model(
        "shrunk_model",
        shrunk_from="vgg11",
        shrunk_shapes=shapes,
        shrunk_numbers=numbers,
        mlp_ratio=0.01,
        features_only=True,
        out_indices=(0, 1),
    ).eval()
    widths = [feature.shape[1] for feature in model(torch.zeros(1, 3, 32, 32))]
    assert model.feature_info.channels() == widths == [24, 128]
