"""Trainers with two processes: each calibrates on a part of the samples, and all get the same weights."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, SingleDeviceStrategy
from safetensors.torch import load_file
from support import pair_cases as cases
from support.callbacks import zeros_in
from support.layers import assert_same
from support.pair_cases import (
    alone,
    assert_same_report,
    assert_same_weights,
)
from support.pairwise import pairwise
from support.quiet import prune
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from wanda_lightning import KeepZeros, WandaPrune
from wanda_lightning.callbacks.calibration_data import CalibrationData
from wanda_lightning.callbacks.trainer import processes_of

pytestmark = pytest.mark.filterwarnings("ignore:num_samples is")  # some tests take all there are


@pytest.mark.parametrize("num_samples", [2, 7])
def test_a_given_loader_is_divided(pair, num_samples):
    (batches, weights, report), (others, other_weights, _) = pair.run(cases.fit, num_samples, True)
    samples = cases.SAMPLES[:num_samples]
    assert_same([batches, others], [list(samples.split(3))[rank::2] for rank in (0, 1)])
    module = cases.Regression()
    expected = prune(module, list(samples.split(3)), sequential="none")
    assert_same(weights, other_weights)
    assert_same_weights(weights, dict(module.named_parameters()))
    assert_same_report(report, expected)


def test_a_given_loader_is_shuffled_in_the_same_order(pair):
    (batches, *_), (others, *_) = pair.run(cases.fit, 16, True, shuffle=True)
    assert sorted(torch.cat([*batches, *others]).tolist()) == sorted(cases.SAMPLES.tolist())


def test_lightnings_own_loader_is_already_divided(pair):
    (batches, weights, report), (others, other_weights, _) = pair.run(cases.fit, 7, False)
    assert (sum(map(len, batches)), sum(map(len, others))) == (4, 3)
    assert report.layers[0].tokens == 7
    assert_same(weights, other_weights)
    found = torch.cat([*batches, *others]).tolist()
    assert len({tuple(sample) for sample in found}) == 7  # no sample twice


def test_a_pruned_language_model_trains_and_is_saved_under_fsdp2(pair, tmp_path):
    model = alone("llama")[0]
    saved = tmp_path / "saved"
    model.save_pretrained(tmp_path / "pruned")
    (sharded, *_), _ = results = pair.run(cases.fit_llama, str(tmp_path / "pruned"), saved)
    loaded = AutoModelForCausalLM.from_pretrained(saved)
    for _, (shrinking, again), trained in results:
        assert "shrink needs whole layers" in shrinking[1]
        assert "exists and is not empty" in again[1]  # in every process
        assert_same(trained, dict(loaded.named_parameters()))
    assert loaded.config.architectures == ["LlamaForCausalLM"]
    blocks = ["FSDPLlamaDecoderLayer"] * 2
    assert sharded == ["FSDPLlamaForCausalLM", *blocks]
    dense = dict(model.named_parameters())
    for name, weight in loaded.named_parameters():
        assert torch.equal(weight == 0, dense[name] == 0), name
        assert not torch.equal(weight, dense[name]), name


def assert_all_moved(before, after):
    assert not [name for name in before if torch.equal(before[name], after[name])]


def test_the_callback_prunes_and_keeps_the_zeros(pair):
    results = pair.run(
        cases.fit_with,
        "ddp",
        partial(WandaPrune, num_samples=16, dataloader=DataLoader(cases.SAMPLES, batch_size=2)),
    )
    module = cases.Regression()
    expected = prune(module, list(cases.SAMPLES.split(2)))
    for pruned, trained, report in results:
        assert_same_weights(pruned, dict(module.named_parameters()))
        assert_same_report(report, expected)
        assert_same(trained, results[0][1])
        assert_all_moved(pruned, trained)
        assert_same(zeros_in(trained), zeros_in(pruned))


@pytest.mark.parametrize(("strategy", "blocks"), [("ddp", True), ("fsdp2", True), ("fsdp2", False)])
def test_earlier_zeros_are_kept(pair, strategy, blocks):
    for pruned, trained, _ in pair.run(
        cases.fit_with, strategy, KeepZeros, zeros_in=1, blocks=blocks
    ):
        zeros = trained["layers.1.up.weight"] == 0
        assert zeros[:, ::2].all()
        assert not zeros[:, 1::2].any()
        assert_all_moved(pruned, trained)


def test_all_processes_wait_until_the_folder_is_saved(pair, tmp_path):
    assert pair.run(cases.save_slowly, tmp_path / "out") == [True, True]


def test_tied_weights_are_saved_once(pair, tmp_path):
    weights, _ = pair.run(cases.save_tied, tmp_path / "out")
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert_same(weights, dict(loaded.named_parameters()))


@pytest.mark.parametrize(
    ("case", "kind", "message"),
    [
        (cases.prune_shards, "UserError", "model must be whole in each process"),
        (cases.save_classifier, "UserError", "save_pretrained needs the whole model"),
        (
            cases.save_shards,
            "MisconfigurationException",
            "distributes the model. With ModelParallelStrategy (FSDP2)",
        ),
        (cases.tensor_parallel, "MisconfigurationException", "tensor_parallel_size=2"),
    ],
)
def test_what_no_process_holds_is_refused(pair, tmp_path, case, kind, message):
    for error in pair.run(case, tmp_path / "out"):
        assert error[0] == kind
        assert message in error[1]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("strategy", "world_size"),
    [(DeepSpeedStrategy, 1), (FSDPStrategy, 1), (FSDPStrategy, 2), (SingleDeviceStrategy, 2)],
)
def test_other_strategies_are_refused_by_name(strategy, world_size):
    trainer = SimpleNamespace(strategy=object.__new__(strategy), world_size=world_size)
    with pytest.raises(
        MisconfigurationException, match=rf"is {strategy.__name__}\. .*strategy='ddp'.*KeepZeros"
    ):
        processes_of(trainer)


@pytest.mark.parametrize(
    ("world_size", "num_samples", "batch_size"), pairwise([2, 3, 5], [1, 4, 7, 10, 100], [1, 3, 4])
)
def test_all_processes_use_the_samples_of_one_process(
    monkeypatch, world_size, num_samples, batch_size
):
    monkeypatch.setattr("wanda_lightning.callbacks.calibration_data.run_alone", lambda *_: True)

    def share(rank, size):
        processes = SimpleNamespace(
            world_size=size, rank=rank, broadcast=lambda value, source: value
        )
        data = CalibrationData(
            None,
            cases.Regression(),
            DataLoader(torch.arange(10), batch_size=batch_size),
            num_samples,
            processes,
        )
        return [batch.tolist() for batch in data.batches()]

    whole = share(0, 1)
    shares = [share(rank, world_size) for rank in range(world_size)]
    for rank, batches in enumerate(shares):
        assert batches == whole[rank::world_size]
