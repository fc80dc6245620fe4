"""Folders of shrunk models load with their own library alone, and give the results of the model with zeros."""

import copy
import json
import subprocess
import sys
from functools import partial

import pytest
import timm
import torch
from support.pairwise import with_nightly
from support.tiny import VOCABULARY
from support.zoo import causal, seeded
from transformers import AutoModelForCausalLM

import wanda_lightning as wl

LANGUAGE = {
    **{"llama": "intermediate_size", "gpt2": "n_inner", "opt": "ffn_dim", "phi3": "intermediate_size"},
    **{"bloom": None, "llama by the loss": None},
}
"""The attribute of the configuration with the width, or None if there is none, or more than one width."""


@pytest.mark.parametrize("name", with_nightly(["llama", "bloom", "llama by the loss"], LANGUAGE))
def test_a_language_model_loads_without_this_package(name, tmp_path):
    """Loaded, it can be saved again, by this package or by transformers."""
    model, ids = causal(name.partition(" ")[0]).build(), torch.randint(3, VOCABULARY, (8, 16))
    allocation, attribute = "fisher" if "loss" in name else "uniform", LANGUAGE[name]
    wl.prune(model, [{"input_ids": ids}], 0.4, pattern="structured", progress=False, allocation=allocation)
    config, state, expected = model.config.to_dict(), copy.deepcopy(model.state_dict()), model(ids).logits
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
    wl.CausalLMModule(tmp_path / "out", trust_remote_code=attribute is None).save_pretrained(tmp_path / "again")
    for folder in (tmp_path / "out", tmp_path / "again"):
        assert [path.name for path in folder.glob("*.py")] == ["modeling_shrunk.py"] * (attribute is None)
        assert not any("wanda_lightning" in path.read_text() for path in folder.glob("*.py"))
        loaded = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=attribute is None).eval()
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
for folder in sys.argv[1:]:
    model = timm.create_model("local-dir:" + folder, pretrained=True).eval()
    torch.save(model(torch.load(folder + "/images.pt")), folder + "/logits.pt")
assert "wanda_lightning" not in sys.modules
"""


def test_image_models_load_without_this_package(tmp_path):
    """With it, no file of a folder runs, and the model can be saved again, and become smaller again."""
    modules, small = {}, {"img_size": 32, "embed_dim": 32, "num_heads": 4}
    for name, size, kwargs, choices, arguments in [
        ("vit_tiny_patch16_224", 32, {**small, "patch_size": 8, "depth": 2}, {}, {"mlp_ratio": 2.5}),
        ("cait_xxs24_224", 32, {**small, "depth": 1}, {}, {"mlp_ratio": 2.5, "mlp_ratio_token_only": 2.5}),
        ("levit_128s", 64, {"img_size": 64}, {}, {}),  # none of its attributes says for which size it was built
        ("test_efficientnet", 32, {}, {"allocation": "fisher"}, {}),
        ("test_resnet", 32, {}, {"allocation": "fisher_seconds"}, {}),
    ]:
        model = seeded(partial(timm.create_model, name, num_classes=10, **kwargs))
        images = torch.randn(4, 3, size, size)
        folder, module = tmp_path / name, wl.ImageClassifierModule(model, model_kwargs=kwargs).eval()
        wl.prune(model, [(images, torch.arange(4))], 0.4, pattern="structured", progress=False, **choices)
        module.save_pretrained(folder, shrink=True)
        modules[folder] = module
        torch.save(images, folder / "images.pt")
        assert (folder / "modeling_shrunk.py").exists() == (not arguments)
        assert arguments.items() <= json.loads((folder / "config.json").read_text()).get("model_args", {}).items()
    subprocess.run([sys.executable, "-I", "-c", ALONE, *map(str, modules)], check=True)
    for folder, module in modules.items():
        images, again = torch.load(folder / "images.pt"), wl.ImageClassifierModule(folder).eval()
        for logits in (torch.load(folder / "logits.pt"), again(images)):
            torch.testing.assert_close(logits, module(images), rtol=1e-4, atol=1e-5)
        again.save_pretrained(folder / "again")
        one, other = (json.loads((place / "config.json").read_text()) for place in (folder, folder / "again"))
        assert one == other
        wl.prune(again.model, [images], 0.5, pattern="structured", progress=False)
        again.save_pretrained(folder / "smaller", shrink=True)
        smaller = wl.ImageClassifierModule(folder / "smaller").eval()
        torch.testing.assert_close(smaller(images), again(images), rtol=1e-4, atol=1e-5)
        sizes = [sum(parameter.numel() for parameter in each.parameters()) for each in (smaller, again, module)]
        assert sizes == sorted({*sizes})
