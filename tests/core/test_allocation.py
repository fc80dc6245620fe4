"""What every allocation promises, against slow versions and laws; and whole models whose layers differ in sparsity."""

import copy
import itertools
import math

import jaxtyping
import lightning as L
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import reference
from support.zoo import ZOO, run
from torch import nn
from torch.utils.data import DataLoader

from wanda_lightning import (
    NM,
    OWL,
    AlphaPruning,
    CubicSchedule,
    Magnitude,
    MagnitudePrune,
    PerLayer,
    PruningCallback,
    PruningConfig,
    Uniform,
    Unstructured,
    WandaPrune,
    prune,
)
from wanda_lightning.core.allocation import ALLOCATIONS, DenseLayer, match_target, tail_exponent
from wanda_lightning.core.patterns import PATTERNS
from wanda_lightning.core.statistics import InputStatistics
from wanda_lightning.methods import SEQUENTIAL_CHOICES
from wanda_lightning.models import find_layers
from wanda_lightning.pruning import PassiveCalibration

EVERY_ALLOCATION = pytest.mark.parametrize("name", ALLOCATIONS)
EVERY_GRANULARITY = pytest.mark.parametrize("sequential", SEQUENTIAL_CHOICES)
UNEQUAL = [name for name in ALLOCATIONS if name != "uniform"]


def dense(name, block, weight, tokens=None, pattern=Unstructured()):
    inputs = InputStatistics(() if tokens is None else {"square_sum"})
    if tokens is not None:
        inputs.update(tokens)
    fisher = None if tokens is None else tokens.square().sum(dim=0)  # of gradients that are 1 everywhere
    return DenseLayer(
        name, block, weight.numel(), pattern.sparsity_steps(*weight.shape), lambda: weight, inputs, fisher
    )


def some_layers(seed=0, shapes=((6, 24), (24, 6)), blocks=4, heavy=True):
    """Name, block, weight and tokens of each layer; the tails of weights and inputs differ from block to block."""
    generator = torch.Generator().manual_seed(seed)
    for block in range(blocks):
        for index, shape in enumerate(shapes):
            weight = torch.randn(shape, generator=generator)
            tokens = torch.randn(5 + index, shape[1], generator=generator)
            if heavy:
                weight = weight * weight.abs() ** (block + 0.3 * index)
            yield f"{block}.{index}", str(block), weight, tokens


def allocate(allocation, layers, sparsity, pattern=Unstructured()):
    return allocation([dense(*layer, pattern) for layer in layers], sparsity)


def mean_of(sparsities, layers):
    size = sum(weight.numel() for _, _, weight, _ in layers)
    return sum(sparsities[name] * weight.numel() for name, _, weight, _ in layers) / size


# ---- every allocation


@EVERY_ALLOCATION
@pytest.mark.parametrize("seed", range(3))
def test_sparsities_are_those_of_the_formula_to_within_a_weight_per_row(name, seed):
    layers = list(some_layers(seed))
    got = allocate(ALLOCATIONS[name](), layers, 0.5)
    arrays = [(n, block, reference.array(weight), reference.array(tokens)) for n, block, weight, tokens in layers]
    expected = reference.SPARSITIES[name](arrays, 0.5)
    assert list(got) == list(expected)
    for layer, _, weight, _ in layers:
        assert abs(got[layer] - expected[layer]) < 1 / weight.shape[1], layer
    assert len(set(expected.values())) >= {"uniform": 1, "owl": 4, "alpha": 4}.get(name, 5)


@pytest.mark.parametrize("name", UNEQUAL)
@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
@given(
    seed=st.integers(0, 2**31),
    shapes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 6)), min_size=1, max_size=3),
    blocks=st.integers(2, 5),
    sparsity=st.floats(0, 0.99),
)
@settings(max_examples=15)
def test_the_mean_is_the_target_as_near_as_the_pattern_allows(name, pattern, seed, shapes, blocks, sparsity):
    layers = list(some_layers(seed, [(d_out, 8 * d_in) for d_out, d_in in shapes], blocks))
    sparsity = getattr(pattern, "sparsity", sparsity)
    before = copy.deepcopy(layers)
    got = allocate(ALLOCATIONS[name](), layers, sparsity, pattern)
    assert all(0 <= value < 1 for value in got.values())
    assert all(torch.equal(a[2], b[2]) and torch.equal(a[3], b[3]) for a, b in zip(layers, before, strict=True))
    if len(set(got.values())) == 1 and next(iter(got.values())) == sparsity:
        return  # equal blocks: as Uniform
    steps = [weight.numel() / pattern.sparsity_steps(*weight.shape) for _, _, weight, _ in layers]
    size = sum(weight.numel() for _, _, weight, _ in layers)
    reachable = [(1 - 1 / pattern.sparsity_steps(*weight.shape)) * weight.numel() for _, _, weight, _ in layers]
    missing = min(sparsity * size, sum(reachable)) - mean_of(got, layers) * size
    assert abs(missing) <= max(steps) / 2 + 1e-6 * size


@EVERY_ALLOCATION
@pytest.mark.parametrize("pattern", [Unstructured(), Unstructured("layer"), NM(2, 4), NM(4, 8)], ids=str)
def test_patterns_have_the_sparsity_that_is_given_out(name, pattern):
    layers = list(some_layers(shapes=((6, 24), (24, 8))))
    for layer, sparsity in allocate(ALLOCATIONS[name](), layers, 0.5, pattern).items():
        weight = next(weight for other, _, weight, _ in layers if other == layer)
        assert (~pattern.for_sparsity(sparsity)(weight.abs(), sparsity)).sum() == round(sparsity * weight.numel())


@given(st.integers(1, 300), st.data())
def test_a_level_is_not_lost_to_rounding(levels, data):
    step = data.draw(st.integers(0, levels - 1))
    weight = torch.ones(1, levels)
    layers = [dense("a", "a", weight), dense("b", "b", weight)]
    got = match_target(layers, {"a": 0.0, "b": 0.0}, 0.0, fixed={"a": step / levels})["a"]
    assert int(levels * got) == step


@EVERY_ALLOCATION
def test_equal_blocks_give_uniform(name):
    weight, tokens = torch.randn(6, 24), torch.randn(9, 24)
    layers = [(f"{block}.up", str(block), weight, tokens) for block in range(3)]
    assert allocate(ALLOCATIONS[name](), layers, 0.43) == dict.fromkeys(["0.up", "1.up", "2.up"], 0.43)


@pytest.mark.parametrize("name", UNEQUAL)
@pytest.mark.parametrize("pattern", [Unstructured(), Unstructured("layer"), NM(2, 4), NM(4, 8)], ids=str)
@given(seed=st.integers(0, 2**31), sparsity=st.floats(0.01, 0.95), rise=st.floats(0, 1))
@settings(max_examples=15)
def test_what_is_zero_stays_and_enough_zeros_are_enough(name, pattern, seed, sparsity, rise):
    """The second time statistics and spectra are others, and so would be the sparsities."""
    layers = list(some_layers(seed, ((6, 24), (24, 8))))
    sparsity = getattr(pattern, "sparsity", sparsity)

    def pruned(layers, sparsity):
        given_out = allocate(ALLOCATIONS[name](), layers, sparsity, pattern)
        for layer, block, weight, tokens in layers:
            keep = pattern.for_sparsity(given_out[layer])(weight.abs(), given_out[layer])
            yield layer, block, weight * keep, tokens

    once = list(pruned(layers, sparsity))
    if not 0 < (once[0][2] == 0).float().mean() < 1:
        return
    twice = list(pruned(once, sparsity))
    assert len(set(allocate(ALLOCATIONS[name](), layers, sparsity, pattern).values())) == 1 or all(
        torch.equal(a[2], b[2]) for a, b in zip(once, twice, strict=True)
    )
    if not isinstance(pattern, NM):
        higher = sparsity + rise * (0.95 - sparsity)
        more = list(pruned(once, higher))
        assert all(not b[2][a[2] == 0].any() for a, b in zip(once, more, strict=True))
        size = sum(layer[2].numel() for layer in layers)
        zeros = sum(int((layer[2] == 0).sum()) for layer in more)
        assert abs(zeros - higher * size) <= size / 8  # one weight per row


# ---- OWL


def test_more_outliers_less_sparsity():
    weight = torch.ones(3, 8, 100)
    weight[1, :, 0], weight[2, :, :3] = 100, 100
    layers = [(name, name, weight[i], torch.ones(1, 100)) for i, name in enumerate("abc")]
    got = allocate(OWL(), layers, 0.5, Unstructured("layer"))
    assert got["a"] > got["b"] > got["c"]
    assert got["a"] - got["c"] == pytest.approx(2 * 0.08, abs=1e-2)
    assert allocate(OWL(lambda_=0.2), layers, 0.5, Unstructured("layer"))["c"] < got["c"]
    assert len(set(allocate(OWL(m=200.0), layers, 0.5).values())) == 1  # no outliers anywhere


def test_owl_keeps_within_what_a_layer_can_have():
    weight = torch.ones(2, 8, 100)
    weight[1, :, 0] = 100
    layers = [(name, name, weight[i], torch.ones(1, 100)) for i, name in enumerate("ab")]
    assert allocate(OWL(), layers, 0.02) == {"a": 0.04, "b": 0.0}
    assert allocate(OWL(lambda_=0.5), layers, 0.75) == {"a": 0.99, "b": 0.51}


# ---- AlphaPruning


@pytest.mark.parametrize("exponent", [2.0, 3.5])
def test_tail_exponent_of_a_pareto_spectrum(exponent):
    rng = np.random.default_rng(0)
    eigenvalues = rng.pareto(exponent - 1, 400) + 1
    basis = [np.linalg.qr(rng.standard_normal((400, 400)))[0] for _ in range(2)]
    weight = torch.from_numpy(basis[0] @ np.diag(eigenvalues**0.5) @ basis[1])
    got = tail_exponent(weight)
    assert got == pytest.approx(reference.hill(reference.array(weight)), rel=1e-9)
    assert got == pytest.approx(exponent, rel=0.15)
    assert tail_exponent(weight.float()) == pytest.approx(got, rel=1e-4)
    assert tail_exponent(7 * weight) == pytest.approx(got, rel=1e-9)
    assert tail_exponent(weight[:, :100].T) == pytest.approx(tail_exponent(weight[:, :100]), rel=1e-9)


def spectrum(singular_values):
    """A matrix that has them, and no zeros."""
    generator = torch.Generator().manual_seed(0)
    size = len(singular_values)
    left, right = (torch.linalg.qr(torch.randn(size, size, generator=generator))[0] for _ in range(2))
    return left @ torch.diag(singular_values) @ right


def test_heavier_tails_get_less_sparsity():
    weights = [spectrum(torch.arange(1.0, 9) ** power) for power in (0.5, 1, 2)]
    assert sorted(map(tail_exponent, weights), reverse=True) == list(map(tail_exponent, weights))
    layers = [(name, name, weight, None) for name, weight in zip("abc", weights, strict=True)]
    got = allocate(AlphaPruning(), layers, 0.5, Unstructured("layer"))
    assert got["a"] > got["b"] > got["c"]
    assert got["a"] / got["c"] == pytest.approx(1.3 / 0.7, rel=0.05)


def test_matrices_without_a_tail():
    assert math.isnan(tail_exponent(torch.ones(4, 8)))
    assert math.isnan(tail_exponent(torch.zeros(4, 8)))
    assert math.isfinite(tail_exponent(torch.eye(8)))
    flat = [("a", "a", torch.ones(4, 8), None), ("b", "b", torch.ones(8, 4), None)]
    assert allocate(AlphaPruning(), flat, 0.3) == {"a": 0.3, "b": 0.3}
    spectra = [("c", "c", spectrum(torch.ones(8)), None), ("d", "d", spectrum(torch.arange(1.0, 9)), None)]
    got = allocate(AlphaPruning(), flat + spectra, 0.5, Unstructured("layer"))
    assert got["d"] < got["a"] < got["c"]
    assert got["a"] == pytest.approx(got["b"], abs=1 / 32)


# ---- PerLayer


NAMES = ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down", "last"]


def plain_layers(shape=(4, 100), names=NAMES):
    generator = torch.Generator().manual_seed(0)
    return [(name, name, torch.randn(shape, generator=generator), None) for name in names]


def test_the_given_and_the_rest():
    got = allocate(PerLayer({"*.up": 0.8, "re:l.st": 0.1, "blocks.1": 0.2}), plain_layers(), 0.5)
    assert got == pytest.approx(dict(zip(NAMES, [0.8, 0.6, 0.8, 0.2, 0.1], strict=True)))
    assert allocate(PerLayer(), plain_layers(), 0.3) == dict.fromkeys(NAMES, 0.3)


def test_half_of_everything_is_half_of_each():
    assert PerLayer({"*.up": 0.8, "last": 0.2}).scaled(0.5) == PerLayer({"*.up": 0.4, "last": 0.1})
    assert OWL().scaled(0.25) == OWL(lambda_=0.02)
    assert AlphaPruning().scaled(0.5) == AlphaPruning()


def test_pairs_from_a_file_are_a_mapping():
    assert PerLayer((("a", 0.5),)) == PerLayer({"a": 0.5})
    assert hash(PerLayer({"a": 0.5})) == hash(PerLayer({"a": 0.5}))
    assert eval(repr(PerLayer({"a": 0.5}))) == PerLayer({"a": 0.5})


@pytest.mark.parametrize(
    ("sparsities", "texts"),
    [
        ({"blocks.0.upp": 0.6}, ["'blocks.0.upp' matches no pruned layer", "the nearest is 'blocks.0.up'"]),
        ({"*.up": 0.6, "blocks.0.up": 0.3}, ["'blocks.0.up' names only layers", "give it earlier"]),
        ({"re:(": 0.6}, ["is not a regular expression"]),
        ({"blocks": 0.9}, ["leaves 20.0% of the weights", "-1.1000", "from 0.7200 to below 0.9200"]),
        ({"blocks": 0.1}, ["sparsity of 0.5 cannot be reached", "2.1000", "from 0.0800 to below 0.2800"]),
        ({"*": 0.6}, ["names every layer", "sparsity is 0.6000, but 0.5 was", "sparsity=0.6000"]),
    ],
)
def test_per_layer_refuses(sparsities, texts):
    layers = [dense(*layer) for layer in plain_layers()]
    with pytest.raises(ValueError) as refusal:  # noqa: PT011
        PerLayer(sparsities).check(layers, 0.5)
    assert all(text in str(refusal.value) for text in texts), refusal.value


def test_all_layers_may_be_named():
    layers = plain_layers((4, 100))
    allocation = PerLayer({"*.up": 0.8, "*": 0.12344})
    allocation.check([dense(*layer) for layer in layers], 0.3941)
    assert allocate(allocation, layers, 0.3941)["blocks.0.up"] == 0.8


def test_numbers_hold_in_a_model_that_has_zeros_enough():
    layers = plain_layers()
    for _, _, weight, _ in layers:
        weight[:, :50] = 0
    got = allocate(PerLayer({"last": 0.7, "blocks.0.up": 0.2}), layers, 0.5)
    assert got == dict(zip(NAMES, [0.5, 0.5, 0.5, 0.5, 0.7], strict=True))


@pytest.mark.parametrize("value", [-0.1, 1.0, math.nan])
def test_sparsities_outside_the_range(value):
    with pytest.raises(ValueError, match=r"'last' a sparsity of .*, but it is in \[0, 1\)"):
        PerLayer({"last": value})


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: OWL(m=0.0), "m > 0"),
        (lambda: OWL(lambda_=0.6), "lambda_ in [0, 0.5]"),
        (lambda: OWL(lambda_=math.nan), "lambda_ in [0, 0.5]"),
        (lambda: AlphaPruning(epsilon=1.0), "epsilon in [0, 1)"),
    ],
)
def test_hyperparameters_out_of_range(make, text):
    with pytest.raises(ValueError) as refusal:  # noqa: PT011
        make()
    assert text in str(refusal.value)


# ---- N:M


@given(seed=st.integers(0, 2**31), shapes=st.lists(st.integers(1, 40), min_size=2, max_size=12), n=st.integers(1, 15))
def test_mixed_n_of_m_has_the_mean_of_n_of_m(seed, shapes, n):
    pattern, generator = NM(n, 16), torch.Generator().manual_seed(seed)
    layers = [(str(i), str(i), torch.ones(d_out, 16), None) for i, d_out in enumerate(shapes)]
    wanted = {name: float(torch.rand((), generator=generator)) for name, _, _, _ in layers}
    got = match_target([dense(*layer, pattern) for layer in layers], wanted, pattern.sparsity)
    chosen = {name: pattern.for_sparsity(sparsity) for name, sparsity in got.items()}
    survivors = {name: kind.n if isinstance(kind, NM) else 16 for name, kind in chosen.items()}
    assert all(count >= 1 for count in survivors.values())
    assert abs(sum(survivors[str(i)] * d_out for i, d_out in enumerate(shapes)) - n * sum(shapes)) <= max(shapes) / 2
    for a in wanted:
        for b in wanted:
            if wanted[a] < wanted[b]:
                assert survivors[a] + 1 >= survivors[b], "who should have more sparsity has no more than one step less"


def test_a_given_zero_leaves_a_layer_dense():
    model = ZOO["llama"].build()
    allocation = PerLayer({"model.layers.0.self_attn.q_proj": 0.0})
    report = prune(model, ZOO["llama"].batches(), 0.5, pattern="4:8", allocation=allocation, progress=False)
    assert report.layers[0].sparsity == 0
    assert report.sparsity == pytest.approx(0.5, abs=0.01)
    assert any(note.startswith("mixed N:M: ") and "1 layers dense" in note for note in report.notes)


# ---- whole models


MODELS = ["llama", "gpt2", "t5", "vit", "convnext", "resnet18", "unreached"]


def unpadded(specimen):
    """Batches of which every token counts."""
    return [
        {key: value for key, value in batch.items() if not key.endswith("mask")} if isinstance(batch, dict) else batch
        for batch in specimen.batches()
    ]


def reached(model, batches):
    """Name, block, weight and all tokens of each layer that the dense model calls."""
    blocks = {layer.name: unit.name for unit in find_layers(model).units for layer in unit.layers}
    tokens, handles = {}, []
    for layer in find_layers(model).layers:

        def read(module, args, layer=layer):
            tokens.setdefault(layer.name, []).append(layer.tokens(args[0]))

        handles.append(layer.module.register_forward_pre_hook(read))
    with torch.no_grad():
        for batch in batches:
            run(model, batch)
    for handle in handles:
        handle.remove()
    for layer in find_layers(model).layers:
        if layer.name in tokens:
            yield (
                layer.name,
                blocks[layer.name],
                reference.array(layer.read()),
                reference.array(torch.cat(tokens[layer.name])),
            )


@pytest.mark.parametrize("name", ["owl", "owl_layer"])
@pytest.mark.parametrize("model_name", MODELS)
def test_owl_sees_the_dense_model_at_every_granularity(model_name, name):
    specimen = ZOO[model_name]
    given_out = {}
    for sequential in SEQUENTIAL_CHOICES:
        model = specimen.build()
        dense_model = copy.deepcopy(model)
        options = {"allocation": OWL(m=2.0, per="layer" if name == "owl_layer" else "block"), "progress": False}
        report = prune(model, unpadded(specimen), 0.5, sequential=sequential, **options)
        given_out[sequential] = {layer.name: layer.target for layer in report.layers}
        for layer in report.layers:
            assert layer.sparsity == pytest.approx(layer.target, abs=1e-6)
    assert given_out["block"] == given_out["layer"] == given_out["none"]
    assert len(set(given_out["none"].values())) > 1
    assert report.sparsity == pytest.approx(0.5, abs=0.01)

    layers = list(reached(dense_model, unpadded(specimen)))
    scores = {}
    for layer, block, weight, tokens in layers:
        mean_square = (tokens**2).mean(axis=0)
        group = layer if name == "owl_layer" else block
        scores.setdefault(group, []).append((np.abs(weight) * np.sqrt(mean_square)).ravel())
    outliers = {group: np.concatenate(values) for group, values in scores.items()}
    fraction = {group: (values > 2 * values.mean()).mean() for group, values in outliers.items()}
    for one, one_block, weight, _ in layers:
        for other, other_block, _, _ in layers:
            keys = (one, other) if name == "owl_layer" else (one_block, other_block)
            if fraction[keys[0]] > fraction[keys[1]]:
                assert given_out["block"][one] <= given_out["block"][other] + 1 / min(weight.shape[1], 8)


@EVERY_GRANULARITY
@pytest.mark.parametrize("name", UNEQUAL)
@pytest.mark.parametrize("pattern", ["unstructured", "unstructured_layer", "4:8"])
def test_pruning_twice_changes_nothing(name, pattern, sequential):
    model, options = ZOO["llama"].build(), {"allocation": name, "pattern": pattern, "sequential": sequential}
    first = prune(model, ZOO["llama"].batches(), 0.5, progress=False, **options)
    once = copy.deepcopy(model.state_dict())
    second = prune(model, ZOO["llama"].batches(), 0.5, progress=False, **options)
    assert all(torch.equal(value, once[key]) for key, value in model.state_dict().items())
    assert first.sparsity == second.sparsity


@pytest.mark.parametrize("allocation", [AlphaPruning(), PerLayer({"*.mlp": 0.6}), OWL(m=2.0)], ids=str)
@pytest.mark.parametrize("model_name", ["llama", "vit"])
def test_mixed_n_of_m(model_name, allocation):
    specimen = ZOO[model_name]
    model = specimen.build()
    report = prune(model, specimen.batches(), 0.5, pattern=NM(8, 16), allocation=allocation, progress=False)
    counts = {}
    for layer in find_layers(model).layers:
        kept = (layer.read().reshape(-1, 16) != 0).sum(dim=1).unique().tolist()
        assert len(kept) == 1
        counts[kept[0]] = counts.get(kept[0], 0) + 1
        assert next(pruned for pruned in report.layers if pruned.name == layer.name).sparsity == 1 - kept[0] / 16
    assert len(counts) > 1
    expected = "mixed N:M: " + ", ".join(f"{counts[n]} layers {n}:16" for n in sorted(counts, key=lambda n: f"{n}:16"))
    assert expected in report.notes
    largest = max(layer.size for layer in report.layers)
    assert abs(report.sparsity - 0.5) * sum(layer.size for layer in report.layers) <= largest / 16 / 2


def test_uniform_n_of_m_is_not_mixed():
    report = prune(ZOO["llama"].build(), ZOO["llama"].batches(), 0.5, pattern="2:4", progress=False)
    assert not report.notes


@EVERY_GRANULARITY
def test_batches_are_read_once(sequential):
    """A generator is as good as a list, though `block` and `layer` need a pass more."""
    kept = []
    for batches in (ZOO["llama"].batches(), iter(ZOO["llama"].batches())):
        model = ZOO["llama"].build()
        report = prune(model, batches, allocation="owl", sequential=sequential, progress=False)
        assert report.config["calibration_batches"] == len(ZOO["llama"].batches())
        kept.append(model.state_dict())
    assert all(torch.equal(kept[0][key], kept[1][key]) for key in kept[0])


@EVERY_GRANULARITY
@pytest.mark.parametrize(
    ("criterion", "passes"),
    [("wanda", {"block": 3, "layer": 2, "none": 1}), ("magnitude", dict.fromkeys(SEQUENTIAL_CHOICES, 1))],
)
def test_how_often_each_layer_runs(criterion, passes, sequential):
    model, calls = ZOO["llama"].build(), []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    options = {"allocation": "owl", "sequential": sequential, "progress": False}
    prune(model, ZOO["llama"].batches(), criterion=criterion, **options)
    assert len(calls) == passes[sequential] * len(ZOO["llama"].batches())


def test_alpha_pruning_needs_no_data():
    model = ZOO["llama"].build()
    report = prune(model, None, 0.5, criterion=Magnitude(), allocation=AlphaPruning(), progress=False)
    assert len({layer.target for layer in report.layers}) > 1
    assert report.sparsity == pytest.approx(0.5, abs=0.01)
    assert report.config["allocation"] == {"name": "AlphaPruning", "epsilon": 0.3, "per": "block"}


@pytest.mark.parametrize("kind", [OWL, AlphaPruning])
def test_neither_blocks_nor_layers(kind, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # beartype refuses it before we do
    with pytest.raises(ValueError, match="per='row' was given"):
        kind(per="row")


class Untouched:
    def __iter__(self):
        raise AssertionError("the batches were touched before the refusal")


def refusal(model, batches, **choices):
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        prune(model, batches, progress=False, **choices)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    return str(caught.value)


def one_block():
    model = ZOO["llama"].build()
    del model.model.layers[1:]
    return model


@EVERY_GRANULARITY
@pytest.mark.parametrize("name", UNEQUAL)
def test_one_block_has_nothing_to_compare(name, sequential):
    if name.endswith("layer") or name == "fisher":
        assert "the model has one, 0" in refusal(
            nn.Sequential(nn.Linear(8, 8)), Untouched(), allocation=name, sequential=sequential
        )
        return
    message = refusal(one_block(), Untouched(), allocation=name, sequential=sequential)
    kind = type(ALLOCATIONS[name]()).__name__
    assert "compares blocks with each other, but the model has one, model.layers.0" in message
    assert f"Use allocation={kind}(per='layer') or Uniform()" in message
    prune(one_block(), ZOO["llama"].batches(), allocation=f"{name}_layer", sequential=sequential, progress=False)


def test_refusals_come_before_the_batches():
    model = ZOO["llama"].build
    assert "matches no pruned layer" in refusal(model(), Untouched(), allocation=PerLayer({"lm_head": 0.5}))
    assert "cannot be reached" in refusal(model(), Untouched(), allocation=PerLayer({"*.mlp": 0.9}))
    assert "sparsity must be 0.5 for the pattern 2:4" in refusal(
        model(), Untouched(), sparsity=0.6, pattern="2:4", allocation="owl"
    )
    assert "OWL(m=5.0, lambda_=0.08, per='block') needs calibration batches" in refusal(
        model(), None, criterion="magnitude", allocation="owl"
    )
    for sequential in SEQUENTIAL_CHOICES:
        assert "OWL(" in (text := refusal(model(), [], criterion="magnitude", allocation="owl", sequential=sequential))
        assert "holds none" in text
    with pytest.raises(ValueError, match="use one of uniform, owl, owl_layer, alpha, alpha_layer, fisher"):
        PruningConfig.from_names(allocation="owll")


# ---- in Lightning


def test_watching_is_pruning_with_the_model_granularity():
    specimen = ZOO["vit"]
    config = PruningConfig.from_names(0.5, allocation="owl", sequential="none")
    watched_model, model = specimen.build(), specimen.build()
    watched = PassiveCalibration(config, watched_model)
    for batch in specimen.batches():
        with torch.no_grad(), watched.batch(batch):
            run(watched_model, batch)
    report = watched.prune()
    other = prune(model, specimen.batches(), 0.5, allocation="owl", sequential="none", progress=False)
    assert [layer.target for layer in report.layers] == [layer.target for layer in other.layers]
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in watched_model.state_dict().items())


class Net(L.LightningModule):
    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            self.blocks = nn.Sequential(
                *(nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)) for _ in range(3))
            )
            with torch.no_grad():
                self.blocks[1][0].weight.pow_(3)

    def forward(self, x):
        return self.blocks(x)

    def training_step(self, batch):
        return self(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


def fit(callback, steps):
    model = Net()
    data = torch.randn(128, 32, generator=torch.Generator().manual_seed(0))
    trainer = L.Trainer(
        max_steps=steps,
        callbacks=[callback],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(data, 8))
    return model


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.parametrize("allocation", [OWL(m=2.0), AlphaPruning(), PerLayer({"blocks.1": 0.6})], ids=str)
@pytest.mark.parametrize("kind", [WandaPrune, MagnitudePrune])
def test_a_schedule_ends_at_what_was_asked_for(kind, allocation):
    seen = []

    class Noting(kind):
        def _take(self, report, trainer):
            super()._take(report, trainer)
            seen.append({layer.name: layer.sparsity for layer in report.layers})

    callback = Noting(0.8, allocation=allocation, schedule=CubicSchedule(0, 6, every=2))
    fit(callback, 7)
    assert len(seen) == 3
    for earlier, later in itertools.pairwise(seen):
        assert all(earlier[name] <= later[name] for name in earlier)
    assert callback.report.sparsity == pytest.approx(0.8, abs=0.01)
    assert len(set(seen[-1].values())) > 1
    if isinstance(allocation, PerLayer):
        for sparsities, (_, share) in zip(seen, callback.schedule.stages, strict=True):
            assert sparsities["blocks.1.0"] == pytest.approx(0.6 * share, abs=1 / 32)


def test_the_callback_refuses_before_training():
    with pytest.raises(ValueError, match=r"sparsity must be 0\.5 for the pattern 2:4"):
        PruningCallback(0.6, pattern="2:4", allocation="owl")
    assert PruningCallback(0.5, criterion="ria", allocation=Uniform()).config.allocation == Uniform()
