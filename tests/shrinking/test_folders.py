"""Folders of shrunk models load with their own library alone, and give the results of the model with zeros."""

import copy
import json
import subprocess
import sys
import textwrap

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from support.pairwise import with_nightly
from support.tiny import VOCABULARY
from support.zoo import causal

import wanda_lightning as wl

_ALONE = """
    import sys

    class Blocked:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] == "wanda_lightning":
                raise ImportError(name)

    sys.meta_path.insert(0, Blocked())
    folder, inputs, outputs = sys.argv[1:]
    import torch
    from safetensors.torch import load_file, save_file

    x = load_file(inputs)["x"]
"""


def assert_loads_elsewhere(folder, x, load, expected):
    """A new process that cannot import wanda_lightning gets the same outputs from the folder."""
    inputs, outputs = folder.parent / "inputs.safetensors", folder.parent / "outputs.safetensors"
    save_file({"x": x}, inputs)
    code = textwrap.dedent(_ALONE + load)
    done = subprocess.run([sys.executable, "-c", code, folder, inputs, outputs], capture_output=True, text=True)
    assert not done.returncode, done.stderr
    torch.testing.assert_close(load_file(outputs)["y"], expected, rtol=1e-4, atol=1e-5)


_TRANSFORMERS = """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=TRUST)
    assert model.generate(x[:, :3], max_new_tokens=3, do_sample=False).shape[1] == 6
    with torch.no_grad():
        save_file({"y": model.eval()(x).logits}, outputs)
"""
_TIMM = """
    import timm

    with torch.no_grad():
        save_file({"y": timm.create_model(f"local-dir:{folder}", pretrained=True).eval()(x)}, outputs)
"""
LANGUAGE = {"llama": "intermediate_size", "gpt2": "n_inner", "opt": "ffn_dim", "phi3": "intermediate_size"}
"""The attribute of the configuration with the width; bloom has none."""


def pruned_text_model(name, **choices):
    model = causal(name).build()
    ids = torch.randint(3, VOCABULARY, (8, 16))
    wl.prune(model, [{"input_ids": ids}], 0.4, pattern="structured", progress=False, **choices)
    return model, ids


@pytest.mark.parametrize("name", with_nightly(["llama", "bloom"], LANGUAGE))
def test_a_language_model_loads_without_this_package(name, tmp_path):
    model, ids = pruned_text_model(name)
    with torch.no_grad():
        expected = model(ids).logits
    config, state = model.config.to_dict(), copy.deepcopy(model.state_dict())
    report = wl.CausalLMModule(model).save_pretrained(tmp_path / "out", shrink=True)
    saved, attribute = json.loads((tmp_path / "out" / "config.json").read_text()), LANGUAGE.get(name)
    (width,) = {after for _, after in report.layers.values()}
    assert saved.get(attribute) == (width if attribute else None)
    assert ("auto_map" in saved) == (tmp_path / "out" / "modeling_shrunk.py").exists() == (attribute is None)
    # The module keeps its zeros and its configuration.
    assert model.config.to_dict() == config
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    load = _TRANSFORMERS.replace("TRUST", str(attribute is None))
    assert_loads_elsewhere(tmp_path / "out", ids, load, expected)


def test_layers_of_several_widths_get_a_modeling_file(tmp_path):
    """Loaded, it can be saved again, by this package or by transformers."""
    model, ids = pruned_text_model("llama", allocation="fisher")
    with torch.no_grad():
        expected = model(ids).logits
    assert len({after for _, after in wl.shrink(model).layers.values()}) > 1
    wl.CausalLMModule(model).save_pretrained(tmp_path / "out")
    with pytest.raises(ValueError, match="do not fit"):
        wl.CausalLMModule(tmp_path / "out").configure_model()
    wl.CausalLMModule(tmp_path / "out", trust_remote_code=True).save_pretrained(tmp_path / "again")
    for folder in (tmp_path / "out", tmp_path / "again"):
        assert_loads_elsewhere(folder, ids, _TRANSFORMERS.replace("TRUST", "True"), expected)


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
    with torch.no_grad():
        expected = module(images)
    module.save_pretrained(tmp_path / "out", shrink=True)
    saved = json.loads((tmp_path / "out" / "config.json").read_text())["model_args"]
    assert {key: saved[key] for key in arguments} == arguments
    assert_loads_elsewhere(tmp_path / "out", images, _TIMM, expected)


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
