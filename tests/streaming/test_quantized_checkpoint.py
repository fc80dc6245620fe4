"""Experts are taken out of quantized checkpoints; what stays is copied."""

import signal
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from support import forks
from support.data import byte_tokenizer
from support.disk import (
    batches,
    contents,
    interrupted,
    prune_until_killed,
    same,
    stream,
    weights,
)
from support.pairwise import with_nightly
from support.quantized import BLOCK, CAN_DEQUANTIZE, compressed, fp8, kimi, mxfp4, rewrite
from support.quiet import shrink
from support.refusals import alike, refuses
from support.reports import read_json
from transformers import AutoConfig, AutoModelForCausalLM

from wanda_lightning import CausalLMModule, prune_from_disk, shrink_from_disk
from wanda_lightning.common.errors import UserError
from wanda_lightning.common.model_source import ModelSource
from wanda_lightning.streaming import perplexity_from_disk
from wanda_lightning.streaming.checkpoint import Checkpoint
from wanda_lightning.streaming.quantized_checkpoint import settings_of

pytestmark = CAN_DEQUANTIZE

FORMATS = {
    "fp8": fp8,
    "fp8, DeepSeek, scales are powers of two": partial(fp8, name="deepseek_v3", scale_fmt="ue8m0"),
    "mxfp4": mxfp4,
    "int4": partial(compressed, kind="pack-quantized"),
    "int4, Kimi": kimi,
    "fp8 of compressed-tensors": partial(compressed, kind="float-quantized"),
}
DROP = {"experts": 0.25}  # two of eight


@pytest.fixture(scope="module", params=FORMATS)
def source(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantized") / "model"
    FORMATS[request.param](folder)
    return folder


@pytest.fixture
def fp8_folder(tmp_path):
    fp8(tmp_path / "source")
    return tmp_path / "source"


def dequantized(folder):
    """A model as transformers loads it, dequantized."""
    config = AutoConfig.from_pretrained(folder)
    config.quantization_config["dequantize"] = True
    return AutoModelForCausalLM.from_pretrained(folder, config=config)


def in_memory(folder):
    """A model with all blocks, as they are read for calibration."""
    checkpoint = Checkpoint(ModelSource(folder))
    for block in checkpoint.blocks:
        checkpoint.load(block)
    return checkpoint.model


def small(folder, output, **choices):
    return stream(folder, output, batches(), **DROP, **choices)


@torch.no_grad()
def logits(model):
    return model(**batches(7)[0]).logits


def refusal(folder, tmp_path):
    """The message with which a folder is refused; nothing is written."""
    with pytest.raises((UserError, OSError)) as caught:
        small(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    return str(caught.value)


@pytest.fixture(scope="module")
def smaller(source, tmp_path_factory):
    """The folder of the model with fewer experts, and the report."""
    folder = tmp_path_factory.mktemp("smaller") / "out"
    return SimpleNamespace(folder=folder, report=small(source, folder))


def test_blocks_are_dequantized_as_transformers_does(source):
    assert same(in_memory(source).state_dict(), dequantized(source).state_dict())


@pytest.mark.parametrize("name", ["kv_a_proj_with_mqa", "kv_b_proj"])
def test_blocks_that_do_not_divide_a_weight(tmp_path, name):
    """20 rows in blocks of 8, and 12 columns, which are not two blocks of 6."""
    fp8(tmp_path, "deepseek_v3", kv_lora_rank=12)
    stored = weights(tmp_path)
    key = f"model.layers.0.self_attn.{name}.weight"
    weight = stored[key].float()
    assert {*weight.shape} & {12, 20}
    for row in range(weight.shape[0]):
        for column in range(weight.shape[1]):
            weight[row, column] *= stored[f"{key}_scale_inv"][row // BLOCK, column // BLOCK]
    assert alike(in_memory(tmp_path).get_parameter(key), weight.bfloat16())


def test_the_result_is_that_of_memory(source, smaller):
    """The smaller model computes what the dequantized one does without these experts, also if the library loads it."""
    model = dequantized(source)
    expected = shrink(model, batches(), **DROP)
    assert smaller.report.layers == expected.layers
    for loaded in (in_memory(smaller.folder), dequantized(smaller.folder)):
        assert same(loaded.state_dict(), model.state_dict())
        assert alike(logits(loaded), logits(model))


def test_kept_tensors_are_copied_byte_for_byte(source, smaller):
    assert any(layer.note for layer in smaller.report.layers)
    before = weights(source)
    after = weights(smaller.folder)
    kept = kept_experts(smaller.report)
    for key, tensor in after.items():
        original = before.get(key)
        if original is not None and original.shape == tensor.shape and ".experts." not in key:
            assert alike(octets(tensor), octets(original)), key
            continue
        block, name = key.split(".mlp.")
        numbers = kept[block]
        parts = name.split(".")
        if parts[1].isdigit():
            parts[1] = str(numbers[int(parts[1])])
            original = before[f"{block}.mlp.{'.'.join(parts)}"]
        else:
            original = torch.stack([before[key][number] for number in numbers])
        assert alike(octets(tensor), octets(original)), key
    separate = sum(".experts." in key for key in before) * 3 / 4
    if "_blocks" not in str(before.keys()):
        assert sum(".experts." in key for key in after) == separate


def kept_experts(report):
    """The numbers of the experts that stay, by block."""
    kept = {}
    for layer in report.layers:
        if not layer.note:
            numbers = kept.setdefault(layer.block, [])
            number = int(layer.name.rpartition(".")[2])
            if number not in numbers:
                numbers.append(number)
    return {block: sorted(numbers) for block, numbers in kept.items()}


def octets(tensor):
    return tensor.contiguous().flatten().view(torch.uint8)


def test_only_the_number_of_experts_changes_in_the_configuration(source, smaller):
    before = read_json(source / "config.json")
    after = read_json(smaller.folder / "config.json")
    changed = {key for key in before if before[key] != after.get(key)}
    assert changed - {"transformers_version", "use_cache"} in (
        {"num_experts"},
        {"n_routed_experts"},
        {"num_local_experts"},
    )
    assert after["quantization_config"] == before["quantization_config"]


@forks.IN_ONE_WORKER
@pytest.mark.parametrize("source", with_nightly(["mxfp4"], FORMATS), indirect=True)
def test_a_killed_run_continues_to_the_same_bytes(source, smaller, tmp_path):
    for after in (0, 1, 2, 3):  # of two blocks and the rest
        killed = forks.run(prune_until_killed, source, tmp_path / "out", after, DROP)
        assert killed.returncode == -signal.SIGKILL
        assert (tmp_path / "out/config.json").exists() == (after == 3)
    small(source, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(smaller.folder)


def test_a_dtype_writes_a_dequantized_model(source, smaller, tmp_path):
    small(source, tmp_path / "dense", dtype="bfloat16")
    assert "quantization_config" not in read_json(tmp_path / "dense/config.json")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert same(model.state_dict(), in_memory(smaller.folder).state_dict())


@pytest.mark.parametrize(("begun", "continued"), [("auto", "bfloat16"), ("bfloat16", "auto")])
def test_a_run_does_not_continue_in_another_format(
    fp8_folder, tmp_path, monkeypatch, begun, continued
):
    choices = {"dtype": begun, **DROP}
    interrupted(fp8_folder, tmp_path / "out", monkeypatch, "model.layers.1", **choices)
    with pytest.raises(UserError, match="was begun with other choices, data or weights: output"):
        small(fp8_folder, tmp_path / "out", dtype=continued)


def add_layer(folder, without=""):
    """Add a copy of the last layer, which transformers does not load, without one of its tensors."""
    stored = weights(folder)
    layer = {
        key.replace("model.layers.1", "model.layers.2"): tensor.clone()
        for key, tensor in stored.items()
        if key.startswith("model.layers.1.")
    }
    layer.pop(without, None)
    rewrite(folder, stored | layer)


@pytest.mark.filterwarnings("ignore:The model")
def test_a_weight_of_a_layer_that_is_not_loaded_has_its_scales(fp8_folder, tmp_path):
    scales = SCALE.replace("layers.1", "layers.2")
    add_layer(fp8_folder, without=scales)
    weight = scales.removesuffix("_scale_inv")
    assert f"stores {weight} as F8_E4M3, but no scales" in refusal(fp8_folder, tmp_path)


@pytest.mark.filterwarnings("ignore:The model")
def test_a_quantized_layer_that_is_not_loaded_leaves_a_dequantized_model(fp8_folder, tmp_path):
    add_layer(fp8_folder)
    copied = small(fp8_folder, tmp_path / "quantized")
    assert "copied as stored, with the 6 experts" in copied.notes[-1]
    left_out = small(fp8_folder, tmp_path / "dense", dtype="bfloat16")
    assert "left out" in left_out.notes[-1]
    after = weights(tmp_path / "dense")
    assert not any(key.startswith("model.layers.2.") for key in after)
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}


@pytest.mark.filterwarnings("ignore:The model")
def test_a_bias_beside_the_router_of_a_layer_that_is_not_loaded(fp8_folder, tmp_path):
    stored = weights(fp8_folder)
    router = "model.layers.2.mlp.gate.weight"
    bias = "model.layers.2.mlp.e_score_correction_bias"
    layer = {router: stored["model.layers.1.mlp.gate.weight"], bias: torch.zeros(8)}
    rewrite(fp8_folder, stored | layer)
    report = small(fp8_folder, tmp_path / "out")
    assert "left out" in report.notes[-1]


def test_perplexity_of_both(source, smaller):
    dense, sparse = (
        perplexity_from_disk(folder, batches(7), progress=False)
        for folder in (source, smaller.folder)
    )
    assert sparse != dense


def test_tensors_that_only_servers_read_stay_with_their_expert(fp8_folder, tmp_path):
    stored = weights(fp8_folder)
    stems = [key.removesuffix(".weight") for key in stored if key.endswith("gate_proj.weight")]
    scales = {f"{stem}.input_scale": torch.tensor(float(i)) for i, stem in enumerate(stems)}
    rewrite(fp8_folder, stored | scales)
    report = small(fp8_folder, tmp_path / "out")
    after = weights(tmp_path / "out")
    for block, numbers in kept_experts(report).items():
        for place, number in enumerate(numbers):
            name = f"{block}.mlp.experts.{{}}.gate_proj.input_scale"
            assert after[name.format(place)] == scales[name.format(number)]


def test_other_weights_than_those_of_experts_stay(fp8_folder, tmp_path):
    output = tmp_path / "out"
    for change in (
        partial(prune_from_disk, batches=batches()),
        partial(shrink_from_disk, batches=batches(), units=0.5),
        shrink_from_disk,
    ):
        with refuses("would have to be quantized again"):
            change(fp8_folder, output)
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_dequantized_in_memory_is_announced(fp8_folder):
    byte_tokenizer().save_pretrained(fp8_folder)
    with pytest.warns(UserWarning, match=r"is quantized \(fp8\), and was dequantized to bfloat16"):
        module = CausalLMModule(str(fp8_folder))
    assert same(module.model.state_dict(), in_memory(fp8_folder).state_dict())


def test_another_format_is_refused(fp8_folder, tmp_path):
    rewrite(fp8_folder, weights(fp8_folder), {"quant_method": "gptq", "bits": 4})
    message = refusal(fp8_folder, tmp_path)
    assert "quantized as 'gptq', but only fp8, mxfp4, compressed-tensors are read" in message


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"symmetric": False}, "pack-quantized, 4 bits, group, asymmetric"),
        ({"type": "float", "strategy": "block"}, "pack-quantized, 4 bits, block"),
    ],
)
def test_a_scheme_that_is_not_dequantized_is_refused(tmp_path, changed, message):
    settings = compressed(tmp_path / "source", "pack-quantized")["quantization_config"]
    settings["config_groups"]["group_0"]["weights"].update(changed)
    rewrite(tmp_path / "source", weights(tmp_path / "source"), settings)
    assert f"is quantized as {message!r}, but only" in refusal(tmp_path / "source", tmp_path)


def test_settings_where_transformers_does_not_look():
    text = SimpleNamespace(quantization_config={"quant_method": "fp8"})
    config = SimpleNamespace(get_text_config=lambda: text)
    with pytest.raises(UserError, match="inside of text_config"):
        settings_of(config, "a model")


SCALE = "model.layers.1.mlp.experts.3.up_proj.weight_scale_inv"


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        (SCALE, f"stores {SCALE.removesuffix('_scale_inv')} as F8_E4M3, but no scales"),
        (SCALE.removesuffix("_scale_inv"), f"stores the scales {SCALE} without their weight"),
    ],
)
def test_a_weight_or_its_scales_alone_are_refused(fp8_folder, tmp_path, missing, message):
    stored = weights(fp8_folder)
    del stored[missing]
    rewrite(fp8_folder, stored)
    assert message in refusal(fp8_folder, tmp_path)


def test_a_disk_that_is_full_leaves_nothing_that_loads(fp8_folder, tmp_path, monkeypatch):
    written = []

    def fill(tensors, path, **options):
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        written.append(path)
        save_file(tensors, path, **options)

    with monkeypatch.context() as patched:
        patched.setattr("wanda_lightning.streaming.output_folder.save_file", fill)
        with pytest.raises(OSError, match="No space left"):
            small(fp8_folder, tmp_path / "out")
    with pytest.raises((OSError, ValueError)):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")

    small(fp8_folder, tmp_path / "out")
    small(fp8_folder, tmp_path / "another")
    assert contents(tmp_path / "out") == contents(tmp_path / "another")
