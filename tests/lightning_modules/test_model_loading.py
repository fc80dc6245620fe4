"""Loading by name: models load completely, and broken ones raise one clear error."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.callbacks import same
from support.gguf import write_gguf
from support.modules import VIT, tiny_llama, tiny_tokenizer, tiny_vit
from support.refusals import refuses
from support.reports import read_json
from support.tiny import tiny
from support.zoo import other
from transformers import AutoModelForCausalLM, AutoTokenizer, T5Config

from wanda_lightning.common.model_source import ModelSource
from wanda_lightning.lightning_modules import CausalLMModule, ImageClassifierModule, model_loading


def model_from_config(name):
    return model_loading.model_from_config(ModelSource(name))


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    # The variables are read when huggingface_hub is imported, so the constant it was read into is set.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_gguf_becomes_an_ordinary_model(tmp_path):
    tensors = write_gguf(tmp_path / "tiny.gguf")
    module = CausalLMModule(str(tmp_path / "tiny.gguf"))
    assert module.model.dtype == torch.float32
    assert torch.equal(
        module.model.model.layers[1].mlp.down_proj.weight, torch.tensor(tensors["blk.1.ffn_down"])
    )
    assert module.tokenizer("theta", add_special_tokens=False).input_ids == [29, 21, 2]
    module.save_pretrained(tmp_path / "model")
    assert "quantization_config" not in read_json(tmp_path / "model" / "config.json")
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), module.model)
    assert AutoTokenizer.from_pretrained(tmp_path / "model").tokenize(
        "theta"
    ) == module.tokenizer.tokenize("theta")


def test_checkpoint(tmp_path):
    module = tiny_vit()
    save_file(module.model.state_dict(), tmp_path / "weights.safetensors")
    torch.manual_seed(1)
    # pretrained stays true: with a checkpoint nothing is downloaded
    name = "vit_tiny_patch16_224"
    path = str(tmp_path / "weights.safetensors")
    again = ImageClassifierModule(name, num_classes=10, checkpoint=path, model_kwargs=VIT)
    assert same(again.model, module.model)
    with refuses(r"size mismatch for head\.weight: .*\[10, 32\].*\[9, 32\]"):
        ImageClassifierModule(name, num_classes=9, checkpoint=path, model_kwargs=VIT)
    weights = load_file(path)
    weights["extra"] = weights.pop("norm.bias")
    save_file(weights, path)
    with refuses(r"Missing key\S* .*norm\.bias.* Unexpected key\S* .*extra"):
        ImageClassifierModule(name, num_classes=10, checkpoint=path, model_kwargs=VIT)


@pytest.mark.parametrize(
    ("make", "name", "checkpoint", "message"),
    [
        (
            CausalLMModule,
            "nobody/nothing",
            None,
            r"'nobody/nothing'.*couldn't find them in the cached files",
        ),
        (
            CausalLMModule,
            "{}/nothing",
            None,
            r"The model .*nothing does not exist\. Check the path\.",
        ),
        (CausalLMModule, "{}", None, r"(?i)should have a `model_type` key in its config\.json"),
        (CausalLMModule, "{}/nothing.gguf", None, r"nothing\.gguf does not exist"),
        (
            ImageClassifierModule,
            "test_vit",
            "{}/a.pth",
            r"must be a \.safetensors file, but it is .*a\.pth",
        ),
        (ImageClassifierModule, "test_vit", "{}/a.safetensors", "No such file"),
        (ImageClassifierModule, "timm:local-dir:{}/gone", None, "gone"),
        (
            ImageClassifierModule,
            "convnext_ato",
            None,
            r"is 'convnext_ato'\. Did you mean convnext_atto or",
        ),
        (
            ImageClassifierModule,
            "resnet18.a1_in2k",
            None,
            r"is 'resnet18\.a1_in2k'\. Did you mean resnet18\.a1_in1k or",
        ),
        (
            ImageClassifierModule,
            "hf-hub:nobody/nothing",
            None,
            "weights of 'hf-hub:nobody/nothing' cannot be loaded",
        ),
        (
            ImageClassifierModule,
            "vit_tiny_patch16_224",
            None,
            "weights of 'vit_tiny_patch16_224' cannot be loaded",
        ),
    ],
)
def test_missing_models_and_other_formats_are_refused(tmp_path, make, name, checkpoint, message):
    options = {"checkpoint": checkpoint.format(tmp_path)} if checkpoint else {}
    with pytest.raises((OSError, ValueError), match=message):
        make(name.format(tmp_path), **options)


def test_home_is_expanded_and_a_path_object_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    module = CausalLMModule(tiny_llama(), tiny_tokenizer())
    vit = tiny_vit()
    module.save_pretrained(tmp_path / "llama")
    vit.save_pretrained(tmp_path / "vit")
    assert same(CausalLMModule("~/llama").model, module.model)
    write_gguf(tmp_path / "tiny.gguf")
    assert CausalLMModule("~/tiny.gguf").model is not None
    assert CausalLMModule(tmp_path / "llama").hparams.model == str(tmp_path / "llama")
    assert type(model_from_config("~/llama")) is type(module.model)
    for name in ("timm:local-dir:~/vit", tmp_path / "vit"):
        assert same(ImageClassifierModule(name).model, vit.model)
    assert len(model_from_config("~/tiny.gguf").model.layers) == 2


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    tiny_llama().save_pretrained(folder / "llama")
    tiny_tokenizer().save_pretrained(folder / "llama")
    tiny_vit().save_pretrained(folder / "vit")
    write_gguf(folder / "tiny.gguf")
    return folder


def cut(size):
    return lambda path: path.write_bytes(path.read_bytes()[:size])


def text(content):
    return lambda path: path.write_text(content)


def changed(**fields):
    return lambda path: path.write_text(json.dumps({**read_json(path), **fields}))


def stored(change):
    """Change the weights of a file: `change` returns new ones by name."""

    def rewrite(path):
        weights = load_file(path)
        save_file({**weights, **change(weights)}, path, metadata={"format": "pt"})

    return rewrite


def not_a_number(weights):
    name = next(name for name in weights if name.endswith("norm.weight"))
    return {name: weights[name].index_fill(0, torch.tensor([1]), float("nan"))}


def integers(weights):
    return {
        name: (10 * weight).to(torch.int8) for name, weight in weights.items() if weight.ndim == 2
    }


DAMAGED = "cannot be loaded: a file is damaged; download or save it again"
BOTH = [
    (
        "model.safetensors",
        lambda path: path.rename(path.with_name("a.bin")),
        r"only format .* has a\.bin, config",
    ),
    ("model.safetensors", cut(5000), f"weights of .* {DAMAGED}"),
    ("model.safetensors", stored(integers), r"stores \S+\.weight as I8: packed integers"),
    (
        "model.safetensors",
        stored(not_a_number),
        r"the weight of \S*norm holds NaN or infinity in float32",
    ),
]
LLAMAS = [
    *BOTH,
    ("config.json", text('{"a": '), f"configuration of .* {DAMAGED}.*config.json"),
    ("config.json", changed(num_attention_heads=3), "multiple of the number|does not fit"),
    (
        "config.json",
        changed(vocab_size=100),
        r"lm_head\.weight first: \(128, 32\) instead of \(100, 32\)",
    ),
    (
        "config.json",
        changed(num_hidden_layers=3),
        r"no weights for 9 parameters .* model\.layers\.2\.input_layernorm",
    ),
    ("tokenizer.json", text('{"a": '), f"tokenizer of .* {DAMAGED}"),
]


CLASSIFIERS = [
    *BOTH,
    ("config.json", text("{"), DAMAGED),
    (
        "config.json",
        changed(num_classes=9, model_args={**VIT, "num_classes": 9}),
        "size mismatch for head.weight",
    ),
]
BROKEN = [
    *(("llama", "{}", *row) for row in LLAMAS),
    *(("vit", "timm:local-dir:{}", *row) for row in CLASSIFIERS),
]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("model", "form", "file", "change", "message"), BROKEN)
def test_a_broken_model_is_named(folders, tmp_path, model, form, file, change, message):
    shutil.copytree(folders / model, tmp_path / "broken")
    change(tmp_path / "broken" / file)
    name = form.format(tmp_path / "broken")
    build = CausalLMModule if model == "llama" else ImageClassifierModule
    with pytest.raises((ValueError, OSError), match=message) as caught:
        build(name)
    sentence = str(caught.value)
    assert str(tmp_path / "broken") in sentence
    assert "\n" not in sentence
    assert ("damaged" in sentence) == (DAMAGED in message)
    if "configuration" in message or message == DAMAGED:
        with refuses(message):
            model_from_config(name)


@pytest.mark.parametrize("part", [lambda c: c[:1000], lambda c: b"x" + c[1:]])
def test_a_broken_gguf_file_is_named(folders, tmp_path, part):
    path = tmp_path / "broken.gguf"
    path.write_bytes(part((folders / "tiny.gguf").read_bytes()))
    with refuses(r"broken\.gguf' cannot be loaded: "):
        CausalLMModule(str(path))


@pytest.mark.parametrize("loaded", [False, True])
def test_encoders_are_refused(tmp_path, loaded):
    model = other("BertForMaskedLM").build()
    model.save_pretrained(tmp_path)
    with refuses(
        r"bert is an encoder.*perplexity would be meaningless.*wanda_lightning\.prune",
    ):
        CausalLMModule(model if loaded else str(tmp_path))
    T5Config(d_model=32).save_pretrained(tmp_path)
    with refuses(r"t5 is an encoder-decoder.*wanda_lightning\.prune"):
        CausalLMModule(str(tmp_path))


@pytest.mark.parametrize(
    "name", ["GPTNeoXConfig", "GPTNeoXJapaneseConfig", "MptConfig", "BertConfig"]
)
def test_decoders_are_not_taken_for_encoders(name):
    extra = {"is_decoder": True} if name == "BertConfig" else {}
    model = AutoModelForCausalLM.from_config(tiny(getattr(transformers, name), **extra))
    assert CausalLMModule(model).model is model


def test_a_model_of_the_hub_is_checked_like_a_folder(folders, tmp_path):
    for name in ("without_owner", "owner--good", "owner--integers"):
        snapshot = tmp_path / f"models--{name}" / "snapshots" / ("a" * 40)
        shutil.copytree(folders / "llama", snapshot)
        (snapshot.parents[1] / "refs").mkdir()
        (snapshot.parents[1] / "refs" / "main").write_text("a" * 40)
    stored(integers)(snapshot / "model.safetensors")
    for name in ("without_owner", "owner/good"):
        module = CausalLMModule(name, cache_dir=str(tmp_path))
        assert same(module.model, tiny_llama())
    assert module.tokenizer("w3 w7").input_ids == [3, 7]
    with refuses(r"'owner/integers' stores lm_head\.weight as I8"):
        CausalLMModule("owner/integers", cache_dir=str(tmp_path))
