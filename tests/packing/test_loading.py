"""Loading packed models: the same model as from dense files, or an error that says what to do."""

import json
import subprocess
import sys

import pytest
import timm
import torch
import transformers as hf
from safetensors.torch import load_file
from support.modules import VIT, same_weights, tiny_llama
from support.tiny import tiny
from timm.models import save_for_hf
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, MixtralConfig

from wanda_lightning import CausalLMModule, ImageClassifierModule, load_packed, pack, save_packed, unpack
from wanda_lightning.modules.loading import create_classifier
from wanda_lightning.packing.quantizer import PackedConfig


def zeroed(model, share=0.6, seed=0):
    """The model with this share of zeros in each matrix."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            parameter.data[torch.rand(parameter.shape, generator=generator) < share] = 0
    return model


def mixtral(dtype=torch.float32):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = MixtralConfig(vocab_size=128, num_key_value_heads=2, num_local_experts=4, **sizes)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


# ------------------------------------------------------------------------------------------------- transformers models

LOAD = """
import sys
{first}
{second}
assert "wanda_lightning" in sys.modules
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(sum(int((p == 0).sum()) for p in model.parameters()), type(model).__name__, hasattr(model, "hf_quantizer"))
"""
IMPORTS = ("import wanda_lightning", "from transformers import AutoModelForCausalLM")


def run(code, folder):
    return subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("order", [IMPORTS, IMPORTS[::-1]], ids=["before transformers", "after transformers"])
def test_a_fresh_process_needs_one_import(tmp_path, order):
    model = zeroed(mixtral())
    save_packed(model, tmp_path / "packed")
    done = run(LOAD.format(first=order[0], second=order[1]), tmp_path / "packed")
    zeros = sum(int((parameter == 0).sum()) for parameter in model.parameters())
    assert done.stdout.split() == [str(zeros), "MixtralForCausalLM", "False"], done.stderr


@pytest.mark.parametrize("name", ["AutoModelForCausalLM", "LlamaForCausalLM", "AutoModel"])
def test_without_the_import_an_error_names_the_package(tmp_path, name):
    save_packed(zeroed(tiny_llama()), tmp_path / "packed")
    done = run(f"import sys; from transformers import {name}; {name}.from_pretrained(sys.argv[1])", tmp_path / "packed")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("ValueError: ")
    assert done.stderr.rstrip().endswith("the weights are packed; import wanda_lightning before they are loaded")


def test_the_import_loads_neither_torch_nor_transformers():
    code = "import sys, wanda_lightning; sys.exit(bool({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    assert run(code, "").returncode == 0


@pytest.mark.parametrize("dtype", ["auto", "float32", "float16"])
@pytest.mark.parametrize("build", [mixtral, tiny_llama], ids=["fused experts", "Llama"])
def test_dtypes(tmp_path, build, dtype):
    model = zeroed(build().bfloat16())
    model.save_pretrained(tmp_path / "dense")
    pack(tmp_path / "dense", tmp_path / "packed")
    dense, packed = (AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=dtype) for name in ("dense", "packed"))
    assert packed.dtype == dense.dtype
    assert same_weights(packed, dense)


@pytest.mark.parametrize("share", [0.0, 0.6])
def test_experts_of_which_only_some_are_packed(tmp_path, share):
    model = mixtral()
    for name, parameter in model.named_parameters():
        if "experts" in name:
            parameter.data[2, :, ::2] = 0
            parameter.data[1] = zeroed(nn.Linear(*parameter.shape[:0:-1], bias=False), share).weight
    model.save_pretrained(tmp_path / "dense")
    size = pack(tmp_path / "dense", tmp_path / "packed")
    experts = {int(name.split("experts.")[1].split(".")[0]): code for name, code in size.codes.items()}
    assert experts == ({2: "pairs"} if share == 0 else {1: "bitmask", 2: "pairs"})
    assert same_weights(AutoModelForCausalLM.from_pretrained(tmp_path / "packed"), model)


def test_tied_embeddings_stay_tied(tmp_path):
    save_packed(zeroed(tiny_llama(tie_word_embeddings=True)), tmp_path / "packed")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert (model.lm_head.weight == 0).float().mean() > 0.5


def test_parts_of_a_checkpoint(tmp_path):
    model = zeroed(tiny_llama())
    save_packed(model, tmp_path / "packed")
    base = AutoModel.from_pretrained(tmp_path / "packed")
    assert same_weights(base, model.model)


def test_the_loaded_model_is_an_ordinary_dense_one(tmp_path):
    model = zeroed(mixtral())
    save_packed(model, tmp_path / "packed")
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", output_loading_info=True)
    assert not any(report.values())
    assert same_weights(loaded, model)
    assert not {"quantization_config", "transformers_weights"} & loaded.config.to_dict().keys()
    loaded.save_pretrained(tmp_path / "saved")
    model.save_pretrained(tmp_path / "dense")
    assert (tmp_path / "saved" / "config.json").read_text() == (tmp_path / "dense" / "config.json").read_text()
    saved, dense = (load_file(tmp_path / name / "model.safetensors") for name in ("saved", "dense"))
    assert saved.keys() == dense.keys()
    assert all(saved[name].equal(dense[name]) for name in dense)


@pytest.mark.parametrize(
    "config_class", [hf.GPT2Config, hf.OPTConfig, hf.Qwen3MoeConfig, hf.GptOssConfig, hf.PhiConfig, hf.DeepseekV3Config]
)
def test_families_whose_weights_are_converted_or_not(tmp_path, config_class):
    torch.manual_seed(0)
    zeroed(AutoModelForCausalLM.from_config(tiny(config_class))).save_pretrained(tmp_path / "dense")
    assert pack(tmp_path / "dense", tmp_path / "packed").codes
    dense, packed = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("dense", "packed"))
    assert same_weights(packed, dense)


def test_a_matrix_that_transformers_would_not_find_is_refused(tmp_path):
    zeroed(AutoModelForCausalLM.from_config(tiny(hf.LlamaConfig))).save_pretrained(tmp_path / "dense")
    pack(tmp_path / "dense", tmp_path / "packed")
    mapping = {r"q_proj\.weight$": "k_proj.weight"}  # matches the names of dense weights only
    with pytest.raises(
        ValueError, match=r"q_proj\.weight is packed, but transformers cannot load .* Unpack the folder"
    ):
        AutoModelForCausalLM.from_pretrained(tmp_path / "packed", key_mapping=mapping)


def test_damage_is_found_before_a_weight_is_loaded(tmp_path):
    save_packed(zeroed(tiny_llama()), tmp_path / "packed")
    path = tmp_path / "packed" / "packed-model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-100])
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    config["quantization_config"]["version"] = 2
    (tmp_path / "packed" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="must have version 1 of the packed format, but it has 2"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "packed")


def test_dense_files_under_a_packed_configuration_are_refused(tmp_path):
    model = zeroed(tiny_llama())
    save_packed(model, tmp_path / "packed")
    model.save_pretrained(tmp_path / "dense")
    (tmp_path / "dense" / "model.safetensors").replace(tmp_path / "packed" / "packed-model.safetensors")
    with pytest.raises(ValueError, match=r"must be packed, as config\.json says, but it is an ordinary file"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "packed")


def test_a_model_is_not_packed_while_it_is_loaded(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="quantization_config must be left out"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=PackedConfig(1))


def test_a_model_with_adapters_is_refused_and_nothing_written(tmp_path):
    peft = pytest.importorskip("peft")
    from wanda_lightning.lora import merge

    model = peft.get_peft_model(zeroed(tiny_llama()), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"must have no adapters .* Merge them first: .*wanda_lightning\.lora\.merge"):
        save_packed(model, tmp_path / "packed")
    assert not any(tmp_path.iterdir())
    save_packed(merge(model), tmp_path / "packed")
    assert same_weights(AutoModelForCausalLM.from_pretrained(tmp_path / "packed"), model.get_base_model())


@pytest.mark.parametrize(
    "save", [save_packed, lambda model, to: CausalLMModule(model).save_pretrained(to, packed=True)]
)
def test_a_quantized_model_is_refused_by_its_name_and_nothing_written(tmp_path, save):
    model = tiny_llama()
    model.config.quantization_config = {"quant_method": "fp8"}
    with pytest.raises(ValueError, match="model must be dense to be packed, but LlamaForCausalLM is quantized"):
        save(model, tmp_path / "packed")
    assert not any(tmp_path.iterdir())


def test_layers_of_a_quantization_library_are_refused(tmp_path):
    kind = type("Linear4bit", (nn.Linear,), {"__module__": "bitsandbytes.nn"})
    with pytest.raises(ValueError, match="model must be dense to be packed, but Sequential is quantized"):
        save_packed(nn.Sequential(kind(4, 4)), tmp_path / "packed")
    model = timm.create_model("test_convnext", num_classes=3)
    model.head.fc = kind(4, 3)
    with pytest.raises(ValueError, match="model must be dense to be packed, but ConvNeXt is quantized"):
        ImageClassifierModule(model).save_pretrained(tmp_path / "packed", packed=True)
    assert not any(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------- other models


def test_timm_models(tmp_path):
    torch.manual_seed(0)
    model = zeroed(timm.create_model("vit_tiny_patch16_224", num_classes=7, **VIT))
    save_packed(model, tmp_path / "vit")  # sizes that are not those of the name are given again
    other = timm.create_model("vit_tiny_patch16_224", num_classes=7, **VIT)
    assert same_weights(load_packed(tmp_path / "vit", other), model)
    model = zeroed(timm.create_model("test_convnext", num_classes=3))
    save_packed(model, tmp_path / "test_convnext")
    assert same_weights(load_packed(tmp_path / "test_convnext"), model)
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict"):
        timm.create_model(f"local-dir:{tmp_path / 'test_convnext'}", pretrained=True)


@pytest.mark.parametrize("change", [{"num_classes": 5}, {"num_classes": 0}, {"in_chans": 1}, {"img_size": 48}])
def test_timm_adapts_packed_weights_like_dense_ones(tmp_path, change):
    torch.manual_seed(0)
    model = zeroed(timm.create_model("vit_tiny_patch16_224", num_classes=7, **VIT))
    save_for_hf(model, tmp_path / "dense", model_args=VIT, safe_serialization=True)
    pack(tmp_path / "dense", tmp_path / "packed")
    models = []
    for name in ("dense", "packed"):
        torch.manual_seed(1)  # of a new head
        models.append(create_classifier(f"local-dir:{tmp_path / name}", True, change))
    dense, packed = models
    assert same_weights(packed, dense)
    assert {**packed.pretrained_cfg, "file": None} == {**dense.pretrained_cfg, "file": None}


def test_any_module(tmp_path):
    shared = nn.Linear(8, 8)
    model = zeroed(nn.Sequential(shared, nn.BatchNorm1d(8), shared, nn.Conv2d(4, 6, 3)))
    save_packed(model, tmp_path / "net")
    other = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.Conv2d(4, 6, 3))
    assert same_weights(load_packed(tmp_path / "net", other), model)
    unpack(tmp_path / "net", tmp_path / "dense")
    assert load_file(tmp_path / "dense" / "model.safetensors").keys() == model.state_dict().keys()
    with pytest.raises(ValueError, match=r"does not fit Sequential: .*3\.weight"):
        load_packed(tmp_path / "net", other[:3])
    with pytest.raises(ValueError, match=r"model must be given for .* which is not a timm model"):
        load_packed(tmp_path / "net")
    with pytest.raises(ValueError, match=r"must be packed, but its config\.json does not say so"):
        load_packed(tmp_path / "dense", other)
