"""Several processes prune one model: the same masks everywhere, those of one process on all samples, and no hanging."""

import re
from functools import partial
from itertools import zip_longest
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, SingleDeviceStrategy
from support import pair_cases as cases
from support.batches import split
from support.pair import Pair
from support.zoo import ZOO, run
from torch import nn
from torch.utils.data import DataLoader

from wanda_lightning import Fisher, KeepZeros, Magnitude, WandaPrune, prune
from wanda_lightning.calibration.gradients import fisher
from wanda_lightning.calibration.mode import calibration_mode
from wanda_lightning.callbacks.batches import calibration_batches
from wanda_lightning.callbacks.trainer import processes_of
from wanda_lightning.models import find_layers, token_masks
from wanda_lightning.parallel import SINGLE_PROCESS, Processes

pytestmark = pytest.mark.filterwarnings("ignore:num_samples=.* were asked for")  # some tests take all there are


@pytest.fixture(scope="module")
def pair():
    with Pair() as processes:
        yield processes


def alone(name, batches=None, **choices):
    """The same in one process: what comes out, and the report."""
    model = cases.few_rows() if name == "few_rows" else ZOO[name].build()
    if batches is None:
        batches = cases.vectors() if name == "few_rows" else ZOO[name].batches()
    report = prune(model, batches, progress=False, **choices)
    return model, report


def assert_same_weights(weights, expected, tolerance=1e-3):
    """The same zeros but for near ties (sums in another order differ in the last bit); what stays is bit-equal."""
    expected = {name: value.detach() for name, value in expected.items()}
    assert weights.keys() == expected.keys()
    others = sum(int(((weights[name] == 0) != (expected[name] == 0)).sum()) for name in weights)
    assert others <= tolerance * sum(value.numel() for value in expected.values())
    for name, value in weights.items():
        kept = (value != 0) & (expected[name] != 0)
        assert torch.equal(value[kept], expected[name][kept]), name


def assert_same_report(report, expected):
    def plain(layers):
        return [(layer.name, layer.shape, layer.tokens, layer.note, layer.target) for layer in layers]

    assert plain(report.layers) == plain(expected.layers)
    assert [layer.zeros for layer in report.layers] == [layer.zeros for layer in expected.layers]
    assert report.skipped == expected.skipped
    assert (report.parameters, report.zeros) == (expected.parameters, expected.zeros)
    assert report.config == expected.config
    assert report.notes == expected.notes


def assert_equal_everywhere(first, second):
    assert all(torch.equal(first[name], second[name]) for name in first)


# ---------------------------------------------------------------------------------------------- the collectives


def test_the_collectives(pair):
    for rank, found in enumerate(pair.run(cases.collectives)):
        assert found == {
            "add": [[3.0, 6.0], 21, [[1.0]], [], [[6.0], [8.0]]],
            "minimum": 4,
            "share": ["of 0", "of 1"],
            "gather": [[0, 5], [1, 5]],
        }, rank


@pytest.mark.parametrize(
    ("who", "first", "second"),
    [
        ({"inner": [], "outer": []}, "fine", "fine"),
        ({"inner": [1], "outer": []}, ("RuntimeError", "process 1 of 2 .* KeyError: 1"), ("KeyError", "1")),
        ({"inner": [], "outer": [0]}, ("ValueError", "bad 0"), ("ValueError", "process 0 of 2 .* bad 0")),
        ({"inner": [], "outer": [0, 1]}, ("ValueError", "bad 0"), ("ValueError", "bad 1")),
        ({"inner": [0, 1], "outer": []}, ("KeyError", "0"), ("KeyError", "1")),
    ],
)
def test_all_fail_together(pair, who, first, second):
    for (outcome, in_step), expected in zip(pair.run(cases.failures, who), (first, second), strict=True):
        assert in_step == 3
        if expected == "fine":
            assert outcome == expected
        else:
            assert outcome[0] == expected[0]
            assert re.search(expected[1], outcome[1])


def test_one_process_sends_nothing():
    processes, tensor = Processes(), torch.tensor([1.0])
    processes.all_reduce_sum([tensor])
    with processes.fail_together():
        assert (processes.all_reduce_min(3), processes.broadcast("mine", 0), tensor.item()) == (3, "mine", 1.0)
    with pytest.raises(KeyError, match="mine"), processes.fail_together():
        raise KeyError("mine")
    assert (processes.world_size, processes.rank) == (1, 0)


# ------------------------------------------------------------------------------------------------- replicated (DDP)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("sequential", ["block", "layer", "none"])
def test_masks_are_those_of_one_process(pair, sequential, pattern):
    (first, report), (second, other) = pair.run(cases.replicated, "llama", sequential=sequential, pattern=pattern)
    model, expected = alone("llama", sequential=sequential, pattern=pattern)
    assert_equal_everywhere(first, second)
    assert_same_weights(first, dict(model.named_parameters()))
    assert_same_report(report, expected)
    assert_same_report(other, expected)


@pytest.mark.parametrize("sequential", ["block", "layer", "none"])
@pytest.mark.parametrize(
    "name", ["llama_padded", "t5", "convnext", "resnet18", "block_twice", "unreached", "mixtral_padded"]
)
def test_other_architectures(pair, name, sequential):
    (first, report), (second, _) = pair.run(cases.replicated, name, sequential=sequential)
    model, expected = alone(name, sequential=sequential)
    assert_equal_everywhere(first, second)
    assert_same_weights(first, dict(model.named_parameters()))
    assert_same_report(report, expected)


@pytest.mark.parametrize("shares", [([0, 1, 2], []), ([], [0, 1, 2]), ([2], [0, 1])])
@pytest.mark.parametrize("sequential", ["block", "layer", "none"])
def test_uneven_and_empty_shares(pair, sequential, shares):
    (first, report), (second, _) = pair.run(cases.replicated, "plain_mlp", shares, sequential=sequential)
    model, expected = alone("plain_mlp", sequential=sequential)
    assert_equal_everywhere(first, second)
    assert_same_weights(first, dict(model.named_parameters()))
    assert_same_report(report, expected)


@pytest.mark.parametrize("sequential", ["block", "layer", "none"])
def test_a_process_may_have_no_batch_at_a_unit(pair, sequential):
    (first, report), (second, _) = pair.run(cases.replicated, "routed", sequential=sequential)
    model, expected = alone("routed", sequential=sequential)
    assert_equal_everywhere(first, second)
    assert_same_weights(first, dict(model.named_parameters()))
    assert_same_report(report, expected)


@pytest.mark.parametrize("pattern", ["unstructured_layer", "equal_share"])
def test_patterns_over_all_rows(pair, pattern):
    (first, _), (second, _) = pair.run(cases.replicated, "plain_mlp", pattern=pattern)
    model, _ = alone("plain_mlp", pattern=pattern)
    assert_equal_everywhere(first, second)
    assert_same_weights(first, dict(model.named_parameters()))


@pytest.mark.parametrize("sequential", ["block", "layer", "none"])
@pytest.mark.parametrize("allocation", ["owl", "alpha"])
def test_allocations_are_of_the_batches_of_all(pair, sequential, allocation):
    choices = {"sequential": sequential, "allocation": allocation, "criterion": "ria"}
    (first, report), (second, _) = pair.run(cases.replicated, "vit", **choices)
    model, expected = alone("vit", **choices)
    assert len({layer.target for layer in report.layers}) > 1
    assert_equal_everywhere(first, second)
    assert_same_weights(first, dict(model.named_parameters()))
    assert_same_report(report, expected)


# ------------------------------------------------------------------------------------- statistics by distinct input


def test_layers_with_one_input_are_added_up_once(pair):
    (found, groups, sent), (_, others, _) = pair.run(cases.statistics_of, "llama")
    attention, mlp = "model.layers.0.self_attn.", "model.layers.0.mlp."
    assert groups == others
    assert [f"{attention}{name}_proj" for name in "qkv"] in groups
    assert [f"{mlp}gate_proj", f"{mlp}up_proj"] in groups
    assert len(groups) == 2 * 4
    distinct = [found[names[0]][1] for names in groups]
    numbers = sum(value.numel() for sums in distinct for value in sums.values())
    assert numbers <= sent <= numbers + 100  # besides some counts


@pytest.mark.parametrize(
    ("shares", "groups"),
    [
        (([0], [1]), [["first", "second"], ["third"]]),
        (([0, 1], [2, 3]), [["first"], ["second"], ["third"]]),
        (([0, 2], [1]), [["first"], ["second"], ["third"]]),
        (([0], []), [["first", "second"], ["third"]]),
        (([4], [1]), [["first"], ["second"], ["third"]]),
        (([4], [4]), [["first", "third"], ["second"]]),
        (([0, 1, 2], [3, 4]), [["first"], ["second"], ["third"]]),
    ],
)
def test_layers_whose_inputs_differ_in_one_process_are_added_up_alone(pair, shares, groups):
    expected = {}
    model, batches = cases.Fork(), cases.fork_batches()
    for name in ("first", "second", "third"):
        getattr(model, name).register_forward_pre_hook(
            lambda _, args, name=name: expected.setdefault(name, []).append(args[0])
        )
    for index in [*shares[0], *shares[1]]:
        model(batches[index])
    for found, found_groups, _ in pair.run(cases.statistics_of, "fork", shares):
        assert found_groups == groups
        for name, (count, sums) in found.items():
            tokens = torch.cat(expected.get(name, [torch.zeros(0, 8)]))
            assert count == len(tokens)
            torch.testing.assert_close(sums["gram"], (tokens.T @ tokens).detach(), atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(sums["square_sum"], tokens.square().sum(0).detach(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("samples", [None, 1, 3, 5])
@pytest.mark.parametrize("shares", [None, ([0, 1, 2], []), ([0], [1, 2])])
@pytest.mark.parametrize("name", ["llama", "llama_padded"])
def test_fisher_counts_the_samples_of_all_processes(pair, name, shares, samples):
    """In turns, as a loader that is the same for all is divided; the labels are those of one process."""
    batches = split(ZOO[name].batches(), 1)
    first, second = (cases.share_of(batches, rank, shares) for rank in (0, 1))
    turns = [batch for turn in zip_longest(first, second) for batch in turn if batch is not None]
    model = ZOO[name].build().double()
    masks = [token_masks(model, batch) for batch in turns]
    forwards = [partial(run, model, batch) for batch in turns]
    layers = find_layers(model).layers
    with calibration_mode(model), torch.no_grad():
        expected = fisher(model, layers, forwards, masks, lambda: None, SINGLE_PROCESS, samples)
    for sums in pair.run(cases.fisher_of, name, shares, samples):
        assert sums.keys() == expected.keys()
        for layer, value in expected.items():
            torch.testing.assert_close(sums[layer], value, rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("samples", [3, None])
def test_masks_with_fisher_are_those_of_one_process(pair, samples):
    (first, report), (second, _) = pair.run(cases.best, samples)
    model, expected = alone("llama", allocation=Fisher(num_samples=samples), solver="admm")
    assert_equal_everywhere(first, second)
    assert [layer.target for layer in report.layers] == pytest.approx([layer.target for layer in expected.layers])
    zeros = [(first[name] == 0, value == 0) for name, value in model.named_parameters()]
    assert sum(int((one != other).sum()) for one, other in zeros) <= 1e-3 * sum(one.numel() for one, _ in zeros)


def test_only_the_first_process_shows_progress(pair):
    first, second = pair.run(cases.progress)
    assert "done" in first
    assert second == ""


@pytest.mark.parametrize("sequential", ["block", "layer", "none"])
@pytest.mark.parametrize(
    ("spoil", "kinds", "text"),
    [
        ("input", ("ValueError", "ValueError"), "NaN or infinity"),
        ("weight", ("ValueError", "ValueError"), "holds NaN or infinity"),
        ("iterator", ("RuntimeError", "OSError"), "no more disk"),
        ("forward", ("RuntimeError", "OSError"), "no more disk"),
    ],
)
def test_what_is_wrong_in_one_process_ends_all(pair, sequential, spoil, kinds, text):
    (other, unchanged), (own, _) = pair.run(cases.spoilt, sequential, spoil)
    assert (other[0], own[0]) == kinds
    assert "process 1 of 2" in other[1]
    assert text in other[1]
    assert text in own[1]
    assert "process 1 of 2" not in own[1]
    assert unchanged or spoil == "forward"
    if spoil == "input":
        assert "batch 0 of process 1" in own[1]


@pytest.mark.parametrize("sequential", ["block", "layer", "none"])
def test_no_batches_in_any_process(pair, sequential):
    for error, unchanged in pair.run(cases.spoilt, sequential, "nothing"):
        assert error[0] == "ValueError"
        assert "holds none" in error[1]
        assert unchanged


# ------------------------------------------------------------------------------------------------ sharded (FSDP2)


def check_sharded(results, name, **choices):
    (first, second), (model, expected) = results, alone(name, **choices)
    for found in (first, second):
        assert found["asleep"]
        assert not found["hooks"]
        assert_same_report(found["report"], expected)
        torch.testing.assert_close(found["output"], run(model, first_batch(name)).detach())
        assert_same_weights(found["weights"], dict(model.named_parameters()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run(model, first_batch(name)).square().mean().backward()
    optimizer.step()
    for key, value in model.named_parameters():
        torch.testing.assert_close(first["trained"][key], value.detach(), msg=key)


def first_batch(name):
    return cases.vectors()[0] if name == "few_rows" else ZOO[name].batches()[0]


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("sequential", ["block", "none"])
def test_gathered_it_is_the_model_of_one_process(pair, sequential, pattern):
    choices = {"sequential": sequential, "pattern": pattern}
    check_sharded(pair.run(cases.sharded, "llama", **choices), "llama", **choices)


@pytest.mark.parametrize("sequential", ["block", "none"])
@pytest.mark.parametrize("name", ["t5", "convnext", "resnet18", "block_twice", "unreached", "few_rows"])
def test_other_architectures_sharded(pair, name, sequential):
    check_sharded(pair.run(cases.sharded, name, sequential=sequential), name, sequential=sequential)


@pytest.mark.parametrize("shares", [([0, 1, 2, 3], []), ([], [0, 1, 2, 3]), ([2], [0, 1, 3])])
@pytest.mark.parametrize("sequential", ["block", "none"])
def test_uneven_and_empty_shares_sharded(pair, sequential, shares):
    check_sharded(pair.run(cases.sharded, "few_rows", shares, sequential=sequential), "few_rows", sequential=sequential)


def test_blocks_that_are_compiled(pair):
    check_sharded(pair.run(cases.sharded, "few_rows", compiled=True), "few_rows")


def test_magnitude_needs_no_forward_and_any_layout(pair):
    choices = {"criterion": "magnitude", "sequential": "layer"}
    check_sharded(pair.run(cases.sharded, "llama", **choices), "llama", **choices)


def test_mixed_precision(pair):
    first, second = pair.run(cases.sharded, "few_rows", dtype=torch.bfloat16)
    model, expected = alone("few_rows")
    assert_equal_everywhere(first["weights"], second["weights"])
    assert_same_report(first["report"], expected)
    assert_same_weights(first["weights"], dict(model.named_parameters()), tolerance=0.05)  # inputs of blocks are bf16
    assert first["asleep"]


def test_parameters_that_are_not_sharded(pair):
    (first, report), (second, _) = pair.run(cases.evaluation_of_ignored)
    torch.manual_seed(0)
    model = nn.Sequential(cases.Block(), cases.Block())
    expected = prune(model, cases.vectors(), progress=False)
    assert_equal_everywhere(first, second)
    assert_same_weights(first, dict(model.named_parameters()))
    assert_same_report(report, expected)


def test_an_error_leaves_all_at_rest(pair):
    model = ZOO["llama"].build()
    for error, asleep, unchanged, output in pair.run(cases.ends_early):
        assert error[0] == "OSError"
        assert asleep
        assert unchanged
        torch.testing.assert_close(output, run(model, ZOO["llama"].batches()[0]).detach())


@pytest.mark.parametrize(
    ("case", "name", "text"),
    [
        ("layer", "llama", r"sequential='layer' stops at model.layers.0.self_attn.q_proj.*sequential='none'"),
        ("unstructured_layer", "llama", r"Unstructured\(group='layer'\) compares the rows"),
        ("equal_share", "llama", r"EqualShare\(\) compares the rows"),
        ("owl", "llama", r"OWL\(.*\) reads all rows of model.layers.0.self_attn.q_proj together.*devices=1"),
        ("alpha", "llama", r"AlphaPruning\(.*\) reads all rows"),
        ("per_layer", "llama", r"PerLayer\(.*\) reads all rows"),
        ("ria", "llama", r"RIA\(a=0.5\) reads all rows"),
        ("columns", "gpt2", r"transformer.h.0.attn.c_attn, a Conv1D, is stored by columns"),
        ("experts", "mixtral", r"experts .*gate_up_proj.* spread over processes.*skip=\['\*.experts'\]"),
        ("root_only", "llama", r"manages model.layers.0.self_attn.q_proj as a part of the whole model.*skip=\["),
        ("second_dimension", "llama", r"each must hold whole rows"),
        ("two_dimensions", "llama", r"each must hold whole rows"),
        ("alone", "llama", r"is spread over 2 processes, but 1 prune"),
        ("outside", "llama", r"managed from outside"),
        ("outside_awake", "llama", r"managed from outside"),
    ],
)
def test_what_cannot_be_pruned_sharded(pair, case, name, text):
    dense = dict(ZOO[name].build().named_parameters())
    for error, weights in pair.run(cases.refused, case):
        assert error[0] == "ValueError"
        assert re.search(text, error[1]), error[1]
        assert_same_weights(weights, dense, tolerance=0)


def test_a_model_that_routes_its_batches(pair):
    for error, _ in pair.run(cases.refused, "routed"):
        assert error[0] == "ValueError"
        assert "do not call the same parts of the model" in error[1]


# --------------------------------------------------------------------------------------------------- in a Trainer


def assert_samples(shares, expected):
    """Together, whatever the order, the processes have these samples."""
    found = torch.cat([batch for share in shares for batch in share])
    assert sorted(found.tolist()) == sorted(expected.tolist())


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("num_samples", [7, 2, 16])
def test_a_given_loader_is_divided(pair, strategy, num_samples):
    (batches, weights, report), (others, other_weights, _) = pair.run(cases.fit, strategy, num_samples, True)
    samples = cases.SAMPLES[:num_samples]
    if strategy == "ddp" or num_samples == 7:  # with fsdp2 one process repeats a batch where it has fewer
        own = [list(samples.split(3))[rank::2] for rank in (0, 1)]
        assert all(map(torch.equal, batches, own[0]))
        assert all(map(torch.equal, others, own[1]))
    module = cases.Regression()
    expected = prune(module, list(samples.split(3)), progress=False)
    assert_equal_everywhere(weights, other_weights)
    assert_same_weights(weights, dict(module.named_parameters()))
    assert_same_report(report, expected)


def test_a_given_loader_is_shuffled_alike(pair):
    (batches, *_), (others, *_) = pair.run(cases.fit, "ddp", 16, True, shuffle=True)
    assert_samples([batches, others], cases.SAMPLES)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_lightnings_own_loader_is_a_share_already(pair, strategy):
    (batches, weights, report), (others, other_weights, _) = pair.run(cases.fit, strategy, 7, False)
    assert (sum(map(len, batches)), sum(map(len, others))) == (4, 3)
    assert report.layers[0].tokens == 7
    assert_equal_everywhere(weights, other_weights)
    found = torch.cat([*batches, *others]).tolist()
    assert len({tuple(sample) for sample in found}) == 7  # no sample twice


@pytest.mark.parametrize("sequential", ["block", "none"])
def test_a_language_model_of_ours_under_fsdp2(pair, sequential):
    (weights, report), (others, _) = pair.run(cases.fit_llama, sequential)
    model, expected = alone("llama", sequential=sequential)
    assert_equal_everywhere(weights, others)
    assert_same_weights(weights, dict(model.named_parameters()))
    assert [layer.tokens for layer in report.layers] == [layer.tokens for layer in expected.layers]


def moved(before, after):
    return [name for name in before if not torch.equal(before[name], after[name])]


@pytest.mark.parametrize("sequential", ["block", "none"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_the_callback_prunes_and_keeps_the_zeros(pair, strategy, sequential):
    loader = DataLoader(cases.SAMPLES, batch_size=2)
    make = partial(WandaPrune, num_samples=16, dataloader=loader, sequential=sequential)
    results = pair.run(cases.fit_with, strategy, make)
    module = cases.Regression()
    expected = prune(module, list(cases.SAMPLES.split(2)), progress=False, sequential=sequential)
    for pruned, trained, report in results:
        assert_same_weights(pruned, dict(module.named_parameters()))
        assert_same_report(report, expected)
        assert_equal_everywhere(trained, results[0][1])
        assert len(moved(pruned, trained)) == len(pruned)
        for layer in report.layers:
            name = f"{layer.name}.weight"
            assert torch.equal(trained[name] == 0, pruned[name] == 0), name


@pytest.mark.parametrize(("strategy", "blocks"), [("ddp", True), ("fsdp2", True), ("fsdp2", False)])
def test_zeros_of_before_are_kept(pair, strategy, blocks):
    for pruned, trained, _ in pair.run(cases.fit_with, strategy, KeepZeros, zeros_in=1, blocks=blocks):
        zeros = trained["layers.1.up.weight"] == 0
        assert zeros[:, ::2].all()
        assert not zeros[:, 1::2].any()
        assert len(moved(pruned, trained)) == len(pruned)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_pruned_by_the_validation_loop(pair, strategy):
    make = partial(WandaPrune, num_samples=16, sequential="none", calibrate_on="validation")
    (weights, report), (others, _) = pair.run(cases.validate_with, strategy, make)
    module = cases.Regression()
    expected = prune(module, [cases.SAMPLES], progress=False, sequential="none")
    assert_equal_everywhere(weights, others)
    assert_same_weights(weights, dict(module.named_parameters()))
    assert [(layer.name, layer.tokens, layer.zeros) for layer in report.layers] == [
        (layer.name, layer.tokens, layer.zeros) for layer in expected.layers
    ]


def test_a_folder_is_not_saved_from_shards(pair, tmp_path):
    for error in pair.run(cases.save_shards, tmp_path / "out"):
        assert error[0] == "MisconfigurationException"
        assert "ModelParallelStrategy distributes the model. Use Lightning's ModelCheckpoint" in error[1]
    assert not (tmp_path / "out").exists()


def test_tensor_parallelism_is_refused(pair):
    for error in pair.run(cases.tensor_parallel):
        assert error[0] == "MisconfigurationException"
        assert "tensor_parallel_size=2" in error[1]


@pytest.mark.parametrize("strategy", [DeepSpeedStrategy, FSDPStrategy])
@pytest.mark.parametrize("world_size", [1, 2])
def test_other_strategies_are_refused_by_name(strategy, world_size):
    trainer = SimpleNamespace(strategy=object.__new__(strategy), world_size=world_size)
    with pytest.raises(MisconfigurationException, match=rf"is {strategy.__name__}\. .*strategy='ddp'.*KeepZeros"):
        processes_of(trainer)


def test_a_strategy_nobody_knows_is_refused_with_several_processes():
    strategy = object.__new__(SingleDeviceStrategy)
    assert processes_of(SimpleNamespace(strategy=strategy, world_size=1)).world_size == 1
    with pytest.raises(MisconfigurationException, match="but it is SingleDeviceStrategy"):
        processes_of(SimpleNamespace(strategy=strategy, world_size=2))


@pytest.mark.parametrize("world_size", [2, 3, 5])
@pytest.mark.parametrize("num_samples", [1, 4, 7, 10, 100])
@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_shares_are_together_what_one_process_takes(world_size, num_samples, batch_size):
    def share(rank, size):
        processes = SimpleNamespace(world_size=size, rank=rank, broadcast=lambda value, source: value)
        loader = DataLoader(torch.arange(10), batch_size=batch_size)
        return [batch.tolist() for batch in calibration_batches(None, None, loader, num_samples, processes)]

    whole = share(0, 1)
    shares = [share(rank, world_size) for rank in range(world_size)]
    assert [
        batch for turn in range(len(whole)) for batch in shares[turn % world_size][turn // world_size :][:1]
    ] == whole
    assert sum(map(len, shares)) == len(whole)


def test_criteria_without_statistics_send_no_batches(pair):
    (first, _), (second, _) = pair.run(cases.replicated, "plain_mlp", criterion=Magnitude())
    model, _ = alone("plain_mlp", criterion=Magnitude())
    assert_equal_everywhere(first, second)
    assert_same_weights(first, dict(model.named_parameters()), tolerance=0)


def test_a_trainer_in_one_process_sends_nothing():
    assert processes_of(L.Trainer(accelerator="cpu", devices=1, logger=False)).world_size == 1
