"""The number of experts that fit into a size."""

import pytest
from support.disk import batches, stream
from support.experts import build
from support.quantized import CAN_DEQUANTIZE, fp8
from support.quiet import shrink
from transformers import AutoConfig

from wanda_lightning.common.errors import UserError
from wanda_lightning.common.model_source import ModelSource
from wanda_lightning.experts.size import fitting_sparsity, parse_size
from wanda_lightning.streaming.checkpoint import Checkpoint


def test_units():
    texts = ("1B", "2MB", "60GB", "0.5 TB", "2MiB", "1.5gib", "1TiB")
    expected = [1, 2e6, 60e9, 5e11, 2**21, 3 * 2**29, 2**40]
    assert [parse_size(text) for text in texts] == expected


@pytest.mark.parametrize("text", ["60", "GB", "-1GB", "1e9B", "60 GB of disk", ""])
def test_a_size_without_a_number_or_a_unit(text):
    with pytest.raises(UserError, match="max_size must be a number with a unit"):
        parse_size(text)


def sizes_of(model):
    return {name: weight.nbytes for name, weight in model.named_parameters()}


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_a_model_as_large_as_possible(family):
    """One expert more (of each group) would not fit."""
    dense = build(family)
    sizes = sizes_of(dense)
    limit = int(sum(sizes.values()) * 0.9)
    groups = getattr(dense.config, "n_group", None) or 1

    fits = build(family)
    report = shrink(fits, batches(), max_size=f"{limit}B")
    assert sum(sizes_of(fits).values()) <= limit
    larger = build(family)
    fewer = report.config["sparsity"] - groups / 8
    if fewer:
        shrink(larger, batches(), experts=fewer)
    assert sum(sizes_of(larger).values()) > limit


@CAN_DEQUANTIZE
def test_the_sizes_of_files(tmp_path, caplog):
    """The size is that of the quantized weights that are written."""
    fp8(tmp_path / "source")
    checkpoint = Checkpoint(ModelSource(tmp_path / "source"))
    sizes = checkpoint.sizes()
    weights = sum(file.stat().st_size for file in (tmp_path / "source").glob("*.safetensors"))
    headers = 2 * 40_000
    assert weights - headers < sum(sizes.values()) < weights

    limit = int(sum(sizes.values()) * 0.8)
    with caplog.at_level("INFO"):
        stream(tmp_path / "source", tmp_path / "out", batches(), max_size=f"{limit}B")
    written = Checkpoint(ModelSource(tmp_path / "out")).sizes()
    assert sum(written.values()) <= limit
    kept = AutoConfig.from_pretrained(tmp_path / "out").num_experts
    assert f"keeps {kept} of 8 experts in each layer: about " in caplog.text
    each = (sum(sizes.values()) - sum(written.values())) / (8 - kept)
    assert sum(written.values()) + each > limit


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        (1000, r"max_size must be at least .* GB, the size with 1 of 8 experts in each layer"),
        (10**9, r"max_size must be less than the size of the model, .* GB.*: no expert has to"),
    ],
)
def test_a_size_that_no_number_of_experts_has(limit, message):
    dense = build("qwen3_moe")
    with pytest.raises(UserError, match=message):
        fitting_sparsity(dense, sizes_of(dense), limit)
