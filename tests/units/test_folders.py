"""Folders of shrunk models load with their own library alone, and give the results of the model with zeros."""

import copy
import json
import subprocess
import sys
from functools import cache, partial

import pytest
import timm
import torch
from support.pairwise import with_nightly
from support.tiny import VOCABULARY
from support.zoo import causal, seeded
from transformers import AutoModelForCausalLM

import wanda_lightning as wl
from wanda_lightning.units.shrunk_model import register_shrunk_model

LANGUAGE = {
    **{
        "llama": "intermediate_size",
        "gpt2": "n_inner",
        "opt": "ffn_dim",
        "phi3": "intermediate_size",
    },
    **{"bloom": None, "llama by the loss": None},
}
"""The attribute of the configuration with the width, or None if there is none, or more than one width."""


@pytest.mark.parametrize("name", with_nightly(["llama", "bloom", "llama by the loss"], LANGUAGE))
def test_a_language_model_loads_without_this_package(name, tmp_path):
    """Loaded, it can be saved again, by this package or by transformers."""
    model = causal(name.partition(" ")[0]).build()
    ids = torch.randint(3, VOCABULARY, (8, 16))
    allocation = "fisher" if "loss" in name else "uniform"
    attribute = LANGUAGE[name]
    wl.prune(
        model,
        [{"input_ids": ids}],
        0.4,
        pattern="structured",
        progress=False,
        allocation=allocation,
    )
    config = model.config.to_dict()
    state = copy.deepcopy(model.state_dict())
    expected = model(ids).logits
    report = wl.CausalLMModule(model).save_pretrained(tmp_path / "out", shrink=True)
    saved = json.loads((tmp_path / "out/config.json").read_text())
    widths = {after for _, after in report.layers.values()}
    assert (len(widths) > 1, "auto_map" in saved) == ("loss" in name, attribute is None)
    assert attribute is None or {saved[attribute]} == widths
    # The module keeps its zeros and its configuration.
    assert model.config.to_dict() == config
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    if attribute is None:
        with pytest.raises(ValueError, match="does not fit"):
            wl.CausalLMModule(tmp_path / "out").configure_model()
    wl.CausalLMModule(tmp_path / "out", trust_remote_code=attribute is None).save_pretrained(
        tmp_path / "again"
    )
    for folder in (tmp_path / "out", tmp_path / "again"):
        assert [path.name for path in folder.glob("*.py")] == ["modeling_shrunk.py"] * (
            attribute is None
        )
        assert not any("wanda_lightning" in path.read_text() for path in folder.glob("*.py"))
        loaded = AutoModelForCausalLM.from_pretrained(
            folder, trust_remote_code=attribute is None
        ).eval()
        assert loaded.generate(ids[:, :3], max_new_tokens=3, do_sample=False).shape[1] == 6
        torch.testing.assert_close(loaded(ids).logits, expected, rtol=1e-4, atol=1e-5)


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


def test_image_models_load_without_this_package(tmp_path):
    """With it, no file of a folder runs, and the model can be saved again, and become smaller again."""
    modules = {}
    small = {"img_size": 32, "embed_dim": 32, "num_heads": 4}
    # None of its attributes says for which size it was built.
    for name, size, kwargs, choices, arguments in [
        (
            "vit_tiny_patch16_224",
            32,
            {**small, "patch_size": 8, "depth": 2},
            {},
            {"mlp_ratio": 2.5},
        ),
        (
            "cait_xxs24_224",
            32,
            {**small, "depth": 1},
            {},
            {"mlp_ratio": 2.5, "mlp_ratio_token_only": 2.5},
        ),
        (
            "levit_128s",
            64,
            {"img_size": 64},
            {},
            {},
        ),
        ("test_efficientnet", 32, {}, {"allocation": "fisher"}, {}),
        ("test_resnet", 32, {}, {"allocation": "fisher_seconds"}, {}),
    ]:
        model = seeded(partial(timm.create_model, name, num_classes=10, **kwargs))
        images = torch.randn(4, 3, size, size)
        folder = tmp_path / name
        module = wl.ImageClassifierModule(model, model_kwargs=kwargs).eval()
        wl.prune(
            model, [(images, torch.arange(4))], 0.4, pattern="structured", progress=False, **choices
        )
        module.save_pretrained(folder, shrink=True)
        modules[folder] = module
        torch.save(images, folder / "images.pt")
        assert (folder / "modeling_shrunk.py").exists() == (not arguments)
        assert (
            arguments.items()
            <= json.loads((folder / "config.json").read_text()).get("model_args", {}).items()
        )
    subprocess.run([sys.executable, "-I", "-c", ALONE, *map(str, modules)], check=True)
    for folder, module in modules.items():
        images = torch.load(folder / "images.pt")
        again = wl.ImageClassifierModule(folder).eval()
        for logits in (torch.load(folder / "logits.pt"), again(images)):
            torch.testing.assert_close(logits, module(images), rtol=1e-4, atol=1e-5)
        again.save_pretrained(folder / "again")
        one, other = (
            json.loads((place / "config.json").read_text()) for place in (folder, folder / "again")
        )
        assert one == other
        wl.prune(again.model, [images], 0.5, pattern="structured", progress=False)
        again.save_pretrained(folder / "smaller", shrink=True)
        smaller = wl.ImageClassifierModule(folder / "smaller").eval()
        torch.testing.assert_close(smaller(images), again(images), rtol=1e-4, atol=1e-5)
        sizes = [
            sum(parameter.numel() for parameter in each.parameters())
            for each in (smaller, again, module)
        ]
        assert sizes == sorted({*sizes})


# Whatever timm does with the folder of a dense model, it does with that of the smaller one

SMALL_VIT = {"img_size": 32, "embed_dim": 32, "num_heads": 4, "patch_size": 8, "depth": 2}
DENSE_CALLS = [
    ("vit_tiny_patch16_224", {"img_size": 48}),
    ("vit_tiny_patch16_224", {"in_chans": 1, "num_classes": 0}),
    ("vit_tiny_patch16_224", {"features_only": True, "out_indices": (0, 1)}),
    ("vit_tiny_patch16_224", {"features_only": True, "out_indices": (0, 1), "img_size": 48}),
    ("test_resnet", {"in_chans": 1}),
    ("test_resnet", {"features_only": True}),
    ("test_resnet", {"features_only": True, "out_indices": (1, 2), "feature_cls": "hook"}),
    ("test_efficientnet", {"features_only": True}),  # of another class than the classifier
]


@pytest.fixture(scope="module")
def dense_and_shrunk(tmp_path_factory):
    """Prune and save a model of timm with zeros and without; return both folders. Each is pruned once."""

    @cache
    def save(name):
        kwargs = SMALL_VIT if "vit" in name else {}
        model = seeded(partial(timm.create_model, name, num_classes=10, **kwargs))
        images = torch.randn(4, 3, 32, 32)
        folder = tmp_path_factory.mktemp(name)
        module = wl.ImageClassifierModule(model, model_kwargs=kwargs).eval()
        # Other widths in each layer.
        choices = {
            "pattern": "structured",
            "allocation": "fisher",
            "progress": False,
        }
        wl.prune(model, [(images, torch.arange(4))], 0.4, **choices)
        module.save_pretrained(folder / "dense")
        module.save_pretrained(folder / "shrunk", shrink=True)
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
    with torch.no_grad():
        torch.testing.assert_close(smaller(images), dense(images), rtol=1e-4, atol=1e-5)
    numbers = [
        sum(parameter.numel() for parameter in model.parameters()) for model in (smaller, dense)
    ]
    assert numbers == sorted({*numbers})
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
    own = {
        "shrunk_from": "vgg11",
        "shrunk_shapes": shapes,
        "shrunk_numbers": numbers,
        "mlp_ratio": 0.01,
    }
    model = timm.create_model("shrunk_model", **own, features_only=True, out_indices=(0, 1)).eval()
    widths = [feature.shape[1] for feature in model(torch.zeros(1, 3, 32, 32))]
    assert model.feature_info.channels() == widths == [24, 128]
