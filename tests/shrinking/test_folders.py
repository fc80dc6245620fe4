"""Folders of shrunk models load with their own library alone, and give the results of the model with zeros."""

import copy
import json

import pytest
import timm
import torch
from support.pairwise import with_nightly
from support.tiny import VOCABULARY
from support.zoo import causal
from transformers import AutoModelForCausalLM

import wanda_lightning as wl

LANGUAGE = {"llama": "intermediate_size", "gpt2": "n_inner", "opt": "ffn_dim", "phi3": "intermediate_size"}
"""The attribute of the configuration with the width; bloom has none."""


def pruned_text_model(name, **choices):
    """A model with zeros, tokens, and the logits for them."""
    model, ids = causal(name).build(), torch.randint(3, VOCABULARY, (8, 16))
    wl.prune(model, [{"input_ids": ids}], 0.4, pattern="structured", progress=False, **choices)
    with torch.no_grad():
        return model, ids, model(ids).logits


def assert_loads(folder, ids, expected, own_file):
    """Transformers gets the same logits from the folder, whose own modeling file does not import this package."""
    assert [path.name for path in folder.glob("*.py")] == ["modeling_shrunk.py"] * own_file
    assert not any("wanda_lightning" in path.read_text() for path in folder.glob("*.py"))
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=own_file).eval()
    assert model.generate(ids[:, :3], max_new_tokens=3, do_sample=False).shape[1] == 6
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", with_nightly(["llama", "bloom"], LANGUAGE))
def test_a_language_model_loads_without_this_package(name, tmp_path):
    model, ids, expected = pruned_text_model(name)
    config, state = model.config.to_dict(), copy.deepcopy(model.state_dict())
    report = wl.CausalLMModule(model).save_pretrained(tmp_path / "out", shrink=True)
    saved, attribute = json.loads((tmp_path / "out" / "config.json").read_text()), LANGUAGE.get(name)
    (width,) = {after for _, after in report.layers.values()}
    assert saved.get(attribute) == (width if attribute else None)
    assert ("auto_map" in saved) == (attribute is None)
    # The module keeps its zeros and its configuration.
    assert model.config.to_dict() == config
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert_loads(tmp_path / "out", ids, expected, attribute is None)


def test_layers_of_several_widths_get_a_modeling_file(tmp_path):
    """Loaded, it can be saved again, by this package or by transformers."""
    model, ids, expected = pruned_text_model("llama", allocation="fisher")
    assert len({after for _, after in wl.shrink(model).layers.values()}) > 1
    wl.CausalLMModule(model).save_pretrained(tmp_path / "out")
    with pytest.raises(ValueError, match="do not fit"):
        wl.CausalLMModule(tmp_path / "out").configure_model()
    wl.CausalLMModule(tmp_path / "out", trust_remote_code=True).save_pretrained(tmp_path / "again")
    for folder in ("out", "again"):
        assert_loads(tmp_path / folder, ids, expected, True)


@pytest.mark.parametrize(
    ("name", "sizes", "sparsity", "arguments"),
    [
        ("vit_tiny_patch16_224", {"patch_size": 8, "depth": 2}, 0.4, {"mlp_ratio": 2.5}),
        ("cait_xxs24_224", {"depth": 1}, 0.25, {"mlp_ratio": 3.0, "mlp_ratio_token_only": 3.0}),
    ],
)
def test_an_image_model_loads_without_this_package(name, sizes, sparsity, arguments, tmp_path):
    torch.manual_seed(0)
    kwargs = {"img_size": 32, "embed_dim": 32, "num_heads": 4, **sizes}
    module = wl.ImageClassifierModule(name, False, num_classes=10, model_kwargs=kwargs).eval()
    images = torch.randn(4, 3, 32, 32)
    wl.prune(module.model, [images], sparsity, pattern="structured", progress=False)
    module.save_pretrained(tmp_path / "out", shrink=True)
    saved = json.loads((tmp_path / "out" / "config.json").read_text())["model_args"]
    assert {key: saved[key] for key in arguments} == arguments
    loaded = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), module(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "size", "text"),
    [
        ("levit_128s", 64, "no arguments of LevitDistilled"),  # none of its attributes says for which size it was built
        ("convnext_atto", 32, r"no arguments of ConvNeXt give the widths .*mlp\.fc1\.weight"),
    ],
)
def test_timm_has_no_arguments_for_the_widths(name, size, text, tmp_path):
    torch.manual_seed(0)
    kwargs = {"img_size": size} if name == "levit_128s" else {}
    module = wl.ImageClassifierModule(name, False, num_classes=10, model_kwargs=kwargs).eval()
    wl.prune(module.model, [torch.randn(2, 3, size, size)], 0.5, pattern="structured", only=["*.mlp.*"], progress=False)
    with pytest.raises(ValueError, match=text):
        module.save_pretrained(tmp_path / "out", shrink=True)
    assert not (tmp_path / "out").exists()
    timm.create_model(name, num_classes=10, **kwargs).load_state_dict(module.model.state_dict())  # with its zeros


def test_a_model_without_zeros_is_not_saved_as_shrunk(tmp_path):
    module = wl.CausalLMModule(causal("llama").build())
    with pytest.raises(ValueError, match=r"shrink must remove something\. Nothing can be removed"):
        module.save_pretrained(tmp_path / "out", shrink=True)
    assert not any(tmp_path.iterdir())
