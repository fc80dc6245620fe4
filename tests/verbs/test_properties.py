"""Whatever the layer and the batches: statistics are those of a slow loop, and counts of zeros are exact."""

from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import assume, given, strategies as st
from numpy.testing import assert_allclose
from support import reference
from support.convolutions import MODES, convolutions
from support.layers import rng
from support.mlps import Holding
from support.quiet import prune
from support.samples import samples_of
from timm.layers import Conv2dSame
from torch import nn
from transformers.pytorch_utils import Conv1D

from wanda_lightning import NM
from wanda_lightning.calibration.lockstep import whole_model_calls
from wanda_lightning.calibration.observer import Observer
from wanda_lightning.calibration.samples import forward_batch
from wanda_lightning.core import Unstructured
from wanda_lightning.methods import SEQUENTIAL_CHOICES
from wanda_lightning.models import Stop, find_layers

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Case:
    """A model of one layer, its batches, and by hand what enters each of its matrices: (tokens, d_in) in float64."""

    model: nn.Module
    batches: list
    tokens: dict
    dtype: torch.dtype

    def matrices(self):
        return {layer.name: layer.read().clone() for layer in find_layers(self.model).layers}


def seeded(module, seed):
    """The generator that the weights came from."""
    generator = rng(seed)
    for parameter in module.parameters():
        nn.init.normal_(parameter, generator=generator)
    return generator


@st.composite
def linear(draw, dtypes):
    dtype = draw(dtypes)
    d_in = draw(st.integers(1, 24))
    d_out = draw(st.integers(1, 5))
    module = draw(st.sampled_from([lambda: nn.Linear(d_in, d_out), lambda: Conv1D(d_out, d_in)]))()
    generator = seeded(module, draw(st.integers(0, 2**32 - 1)))
    batches = []
    tokens = []
    batch = st.tuples(st.integers(1, 3), st.integers(1, 6), st.booleans())
    for samples, length, padded in draw(st.lists(batch, min_size=1, max_size=3)):
        x = torch.randn(samples, length, d_in, generator=generator).to(dtype)
        keep = torch.rand(samples, length, generator=generator) < (0.6 if padded else 2)
        batches.append({"x": x, "attention_mask": keep.long()} if padded else x)
        tokens += [x[sample, place] for sample, place in keep.nonzero()]
    assume(tokens)
    return Case(
        Holding(module.to(dtype)), batches, {"part": reference.array(torch.stack(tokens))}, dtype
    )


def same(size, kernel, stride, dilation):
    """TensorFlow's: as many places as strides begin; the odd one out is behind."""
    missing = max(0, (-(-size // stride) - 1) * stride + dilation * (kernel - 1) + 1 - size)
    return missing // 2, missing - missing // 2


@st.composite
def convolution(draw, dtypes):
    dtype = draw(dtypes)
    module, shape = draw(convolutions([nn.Conv2d, Conv2dSame]))
    windows = (module.kernel_size, module.stride, module.dilation)
    if isinstance(module, Conv2dSame) or module.padding == "same":
        pads = [same(*sizes) for sizes in zip(shape[1:], *windows, strict=True)]
    else:
        pads = [(0, 0)] * 2 if module.padding == "valid" else [(p, p) for p in module.padding]
    generator = seeded(module, draw(st.integers(0, 2**32 - 1)))
    counts = draw(st.lists(st.integers(1, 2), min_size=1, max_size=3))
    batches = [torch.randn(count, *shape, generator=generator).to(dtype) for count in counts]
    each = shape[0] // module.groups
    tokens = {}
    for group in range(module.groups):
        parts = []
        for x in batches:
            of_group = reference.array(x)[:, group * each : (group + 1) * each]
            mode = MODES[module.padding_mode]
            padded = np.pad(of_group, ((0, 0), (0, 0), *pads), mode=mode)
            kernel, stride, dilation = windows
            parts.append(reference.im2col(padded, kernel, stride, (0, 0), dilation))
        tokens["part" if module.groups == 1 else f"part.group{group}"] = np.concatenate(parts)
    return Case(Holding(module.to(dtype)), batches, tokens, dtype)


def cases(*dtypes):
    of = st.sampled_from(dtypes)
    return st.one_of(linear(of), convolution(of))


@st.composite
def patterns(draw, d_in):
    """A pattern that fits the width, and a sparsity that it can have."""
    divisors = [m for m in range(2, d_in + 1) if d_in % m == 0]
    if divisors and draw(st.booleans()):
        m = draw(st.sampled_from(divisors))
        pattern = NM(draw(st.integers(1, m - 1)), m)
        return pattern, pattern.sparsity
    return Unstructured(draw(st.sampled_from(["row", "layer"]))), draw(st.floats(0, 0.99))


def assert_statistics(case):
    layers = find_layers(case.model).layers
    samples = samples_of(case.model, case.batches, forward=partial(forward_batch, case.model))
    with torch.no_grad():
        found = Observer(frozenset({"square_sum", "gram"}))(
            Stop("", None, layers), whole_model_calls(samples)
        ).inputs
    assert found.keys() == case.tokens.keys()
    for name, tokens in case.tokens.items():
        sums = found[name].sums
        gram = reference.gram(tokens)
        assert found[name].count == len(tokens)
        wide = torch.promote_types(case.dtype, torch.float32)
        assert {value.dtype for value in sums.values()} == {wide}
        rtol = 1e-12 if case.dtype == torch.float64 else 1e-5
        scale = max(np.abs(gram).max(), 1e-30)
        assert_allclose(
            reference.array(sums["square_sum"]), reference.square_sum(tokens), rtol=rtol
        )
        assert_allclose(reference.array(sums["gram"]) / scale, gram / scale, atol=rtol)


# PyTorch pads an image by itself where the two sides differ, and says so.
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@given(
    st.data(),
    cases(*DTYPES, torch.float64, torch.float64, torch.float64),
    st.sampled_from(SEQUENTIAL_CHOICES),
)
def test_statistics_and_masks_are_those_of_a_slow_loop_and_counts_are_exact(data, case, sequential):
    assert_statistics(case)
    dense = case.matrices()
    pattern, sparsity = data.draw(patterns(next(iter(dense.values())).shape[1]))
    report = prune(case.model, case.batches, sparsity, pattern=pattern, sequential=sequential)
    pruned = {layer.name: layer for layer in report.layers}
    assert pruned.keys() == {name for name, tokens in case.tokens.items() if tokens.any()}
    for name, layer in pruned.items():
        matrix = case.matrices()[name]
        kept = matrix != 0
        assert torch.equal(matrix[kept], dense[name][kept])
        assert (layer.tokens, layer.zeros) == (len(case.tokens[name]), int((~kept).sum()))
        scores = reference.wanda(reference.array(dense[name]), case.tokens[name])
        kept = kept.numpy()
        expected = reference.keep(pattern, scores, sparsity)
        survivors = reference.survivors(pattern, kept)
        assert survivors == reference.survivors(pattern, expected), name
        # Others have near ties.
        assert case.dtype != torch.float64 or (kept == expected).all(), name
    parameters = nn.utils.parameters_to_vector(case.model.parameters())
    assert report.parameters == len(parameters)
    assert report.zeros == (parameters == 0).sum()
