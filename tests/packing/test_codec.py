"""Codes for zeros: bit for bit what a slow loop finds, for every integer type, shape and share of zeros."""

from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wanda_lightning.packing import codec
from wanda_lightning.packing.tensors import unpacked

TYPES = {np.uint8: torch.int8, np.uint16: torch.bfloat16, np.uint32: torch.float32, np.uint64: torch.float64}
FLOATS = [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn]
INTEGERS = [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool]


def slow_bitmask(words, shape):
    """Values, and bytes of bits row by row, lowest bit first."""
    matrix = words.reshape(shape[0], -1)
    values = [word for word in words.tolist() if word != 0]
    positions = np.zeros((shape[0], (matrix.shape[1] + 7) // 8), np.uint8)
    for row, column in np.argwhere(matrix != 0):
        positions[row, column // 8] += 2 ** (column % 8)
    return values, positions


def slow_pairs(words):
    """Two values of each group of four, and the numbers of their pairs of places, three in a byte."""
    values, numbers = [], []
    for at in range(0, words.size, 4):
        group = words[at : at + 4].tolist()
        places = next(pair for pair in combinations(range(4), 2) if all(not group[i] or i in pair for i in range(4)))
        numbers.append(list(combinations(range(4), 2)).index(places))
        values += [group[i] for i in places]
    numbers += [0] * (-len(numbers) % 3)
    return values, [a + 6 * b + 36 * c for a, b, c in zip(*[iter(numbers)] * 3, strict=True)]


@st.composite
def tensors(draw):
    shape = draw(st.lists(st.integers(1, 13), min_size=2, max_size=4))
    kind, seed = draw(st.sampled_from(list(TYPES))), draw(st.integers(0, 2**32 - 1))
    zeros, pairs = draw(st.sampled_from([0, 0.3, 0.5, 0.9, 1])), draw(st.booleans())
    rng = np.random.default_rng(seed)
    words = rng.integers(0, np.iinfo(kind).max, shape, kind, endpoint=True)
    words[rng.random(shape) < zeros] = 0
    if pairs and shape[-1] % 4 == 0:
        groups = words.reshape(-1, 4)
        np.put_along_axis(groups, rng.random(groups.shape).argsort(axis=1)[:, :2], 0, axis=1)
    return words.ravel(), tuple(shape)


@given(tensors())
def test_the_bitmask_is_that_of_a_loop_and_gives_back_every_bit(tensor):
    words, shape = tensor
    values, positions = codec.pack(words, shape, codec.BITMASK)
    expected, bits = slow_bitmask(words, shape)
    assert values.tolist() == expected
    assert positions.dtype == np.uint8
    assert np.array_equal(positions, bits)
    assert np.array_equal(codec.unpack(values, positions, shape, codec.BITMASK), words)


@given(tensors())
def test_the_cheapest_code_is_chosen_and_gives_back_every_bit(tensor):
    words, shape = tensor
    code, kept = codec.cheapest(words, shape)
    extra, kinds = 8 * len(shape), np.dtype(words.dtype).itemsize
    values, positions = slow_bitmask(words, shape)
    sizes = {codec.DENSE: words.nbytes, codec.BITMASK: len(values) * kinds + positions.size + extra}
    if shape[-1] % 4 == 0 and (np.count_nonzero(words.reshape(-1, 4), axis=1) <= 2).all():
        values, numbers = slow_pairs(words)
        sizes[codec.PAIRS] = len(values) * kinds + len(numbers) + extra
    assert sizes[code] == min(sizes.values())
    if code == codec.DENSE:
        return
    packed, places = codec.pack(words, shape, code)
    assert packed.size == kept
    assert places.shape == codec.positions_shape(shape, code)
    assert packed.nbytes + places.nbytes + extra == sizes[code]
    if code == codec.PAIRS:
        assert (packed.tolist(), places.tolist()) == (values, numbers)
    assert np.array_equal(codec.unpack(packed, places, shape, code), words)


@pytest.mark.parametrize("shape", [(3, 40_001), (200_000, 3), (5, 65_536), (1, 99_996), (70_000, 8)])
def test_tensors_of_several_chunks(shape):
    rng = np.random.default_rng(0)
    words = rng.integers(1, 2**16, shape, np.uint16)
    words[rng.random(shape) < 0.6] = 0
    expected, bits = slow_bitmask(words.ravel(), shape)
    values, positions = codec.pack(words.ravel(), shape, codec.BITMASK)
    assert values.tolist() == expected
    assert np.array_equal(positions, bits)
    assert np.array_equal(codec.unpack(values, positions, shape, codec.BITMASK), words.ravel())
    if shape[-1] % 4 == 0:
        words.reshape(-1, 4)[:, 1:3] = 0
        pairs = codec.pack(words.ravel(), shape, codec.PAIRS)
        assert (pairs[0].tolist(), pairs[1].tolist()) == slow_pairs(words.ravel())
        assert np.array_equal(codec.unpack(*pairs, shape, codec.PAIRS), words.ravel())


@pytest.mark.parametrize("code", [codec.BITMASK, codec.PAIRS])
@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.uint32, np.uint64])
def test_only_positive_zero_is_a_zero(code, kind):
    bits = 8 * np.dtype(kind).itemsize
    special = [1 << (bits - 1), (1 << bits) - 1, (1 << (bits - 1)) - 3, 1]  # -0.0, two NaN with payloads, a subnormal
    words = np.array([special[0], 0, 0, special[1], 0, special[2], special[3], 0], kind)
    values, positions = codec.pack(words, (2, 4), code)
    assert values.tolist() == special
    assert codec.unpack(values, positions, (2, 4), code).tolist() == words.tolist()


@pytest.mark.parametrize("dtype", [*FLOATS, *INTEGERS])
def test_every_dtype_of_tensors(dtype):
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randint(0, 2, (6, 20), generator=generator).mul(77).to(dtype)
    raw = matrix.view(torch.uint8).numpy().view(f"u{matrix.element_size()}").ravel()
    values, positions = codec.pack(raw, (6, 20), codec.BITMASK)
    stored = torch.from_numpy(values.view(f"i{values.itemsize}")).view(dtype)
    result = unpacked(stored, positions, (6, 20), codec.BITMASK)
    assert result.dtype == dtype
    assert result.equal(matrix) if dtype != torch.float8_e4m3fn else result.float().equal(matrix.float())


@pytest.mark.parametrize(
    ("kept", "positions", "shape", "code", "message"),
    [
        (3, [[1]], (1, 8), codec.BITMASK, "3 values are stored, but 1 positions"),
        (1, [[1]], (1, 9), codec.BITMASK, r"a bitmask of \(1, 1\) bytes does not fit the shape \(1, 9\)"),
        (1, [[1]], (2, 8), codec.BITMASK, r"a bitmask of \(1, 1\) bytes does not fit"),
        (2, [[1], [1]], (3, 3), codec.BITMASK, "does not fit the shape"),
        (1, 1, (1, 8), codec.BITMASK, r"a bitmask of \(\) bytes does not fit the shape \(1, 8\)"),
        (2, [[0, 3]], (1, 9), codec.BITMASK, "a bitmask has bits beyond the 9 columns of a row"),
        (2, [[1], [8]], (2, 3), codec.BITMASK, "a bitmask has bits beyond the 3 columns of a row"),
        (2, [216], (1, 4), codec.PAIRS, "a code is 216, but codes are below 216"),
        (3, [0], (1, 4), codec.PAIRS, "3 values are stored, but 2 positions"),
        (2, [0, 0], (1, 4), codec.PAIRS, r"\(2,\) codes do not fit the shape"),
        (2, [0], (1, 5), codec.PAIRS, "codes do not fit the shape"),
        (2, [0], (-1, -4), codec.PAIRS, r"the shape \(-1, -4\) is negative"),
    ],
)
def test_values_and_positions_that_disagree_are_refused(kept, positions, shape, code, message):
    with pytest.raises(ValueError, match=message):
        codec.unpack(np.ones(kept, np.uint16), np.array(positions, np.uint8), shape, code)
