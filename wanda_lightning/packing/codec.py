"""Exact codes for matrices with many zeros: the kept values, and where they are.

A weight is a zero only if all its bits are zero, so -0.0 and every NaN are kept values, and the dtype does not matter:
all functions work on unsigned integers of the same size. There are two codes for the positions:

- `BITMASK`: one bit per weight, rows padded to whole bytes, lowest bit first (`numpy.packbits(bitorder="little")`).
- `PAIRS`, for 2:4: one of six patterns for each group of four consecutive weights, three groups in a byte (6^3 = 216),
  which is 8/3 bits per group; at least log2(6) = 2.58 are necessary, and a bitmask has 4. Each group keeps two values,
  +0.0 among them if fewer are left.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Words: TypeAlias = NDArray[np.unsignedinteger]
Bytes: TypeAlias = NDArray[np.uint8]

BITMASK, PAIRS, DENSE = "bitmask", "pairs", "dense"

_SHAPE_BYTES = 8  # of each dimension, which is stored with a packed tensor
_CHUNK = 1 << 15  # weights at once: their indices stay in the L2 cache
_POPCOUNT = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(axis=1, dtype=np.uint8)

_PATTERNS = np.array([0b0011, 0b0101, 0b1001, 0b0110, 0b1010, 0b1100], dtype=np.uint8)
_NO_CODE = 6
# The first pattern that keeps all weights of a group.
_CODE_OF_GROUP = np.array(
    [next((code for code, kept in enumerate(_PATTERNS) if kept & bits == bits), _NO_CODE) for bits in range(16)],
    dtype=np.uint8,
)
_GROUPS_OF_CODE = _PATTERNS[np.arange(256)[:, None] // np.array([1, 6, 36]) % 6]
_PATTERN_OF_GROUP = np.append(_PATTERNS, np.uint8(0))[_CODE_OF_GROUP]
# For each byte of a bitmask: the patterns and the codes of both of its groups, and whether they have codes.
_TWO_OF_FOUR: Bytes = (_PATTERN_OF_GROUP[:, None] << 4 | _PATTERN_OF_GROUP).ravel().astype(np.uint8)
_CODES_OF_BYTE = np.stack([np.tile(_CODE_OF_GROUP, 16), np.repeat(_CODE_OF_GROUP, 16)], axis=1)
_HAS_CODES: NDArray[np.bool_] = np.asarray((_CODES_OF_BYTE < _NO_CODE).all(axis=1))


def cheapest(words: Words, shape: Sequence[int]) -> tuple[str, int]:
    """Return the code that stores a tensor in the fewest bytes (`BITMASK`, `PAIRS` or `DENSE`), and how many values.

    Args:
        words: The tensor as flat unsigned integers.
        shape: Its shape. Vectors stay dense.
    """
    rows, columns = _matrix(shape)
    if len(shape) < 2 or words.size == 0:
        return DENSE, words.size
    extra = _SHAPE_BYTES * len(shape)
    kept = int(np.count_nonzero(words))
    bitmask = kept * words.itemsize + rows * -(-columns // 8) + extra
    pairs = words.nbytes // 2 + -(-words.size // 12) + extra
    if pairs < min(bitmask, words.nbytes) and shape[-1] % 4 == 0 and _fits_pairs(words):
        return PAIRS, words.size // 2
    return (BITMASK, kept) if bitmask < words.nbytes else (DENSE, words.size)


def positions_shape(shape: Sequence[int], code: str) -> tuple[int, ...]:
    """Return the shape of the positions of a tensor."""
    rows, columns = _matrix(shape)
    return (-(-prod(shape) // 12),) if code == PAIRS else (rows, -(-columns // 8))


def pack(words: Words, shape: Sequence[int], code: str) -> tuple[Words, Bytes]:
    """Return the kept values in order, and their positions.

    Args:
        words: The tensor as flat unsigned integers.
        shape: Its shape.
        code: What `cheapest` returned, but not `DENSE`.
    """
    rows, columns = _matrix(shape)
    if code == PAIRS:
        bits, columns, kept = _bits(words), words.size, words.size // 2
        positions = _codes(bits, words.size)
        bits = _TWO_OF_FOUR[bits]
    else:
        bits = _bits(words) if columns % 8 == 0 else np.packbits(words.reshape(rows, columns) != 0, 1, "little").ravel()
        positions, kept = bits.reshape(rows, -1), _count(bits)
    values = np.empty(kept, words.dtype)
    done = 0
    for start, keep in _chunks(bits, columns, words.size):
        found = words[start : start + keep.size][np.flatnonzero(keep)]
        values[done : done + found.size] = found
        done += found.size
    return values, positions


def unpack(values: Words, positions: Bytes, shape: Sequence[int], code: str) -> Words:
    """Return the tensor that `pack` was given, as flat unsigned integers.

    Raises:
        ValueError: If values and positions disagree.
    """
    check(values.size, positions, shape, code)
    words = np.zeros(prod(shape), values.dtype)
    bits, columns = positions.reshape(-1), words.size
    if code == PAIRS:
        bits = _bits_of_codes(bits, words.size)
    else:
        columns = words.size // prod(positions.shape[:-1])
    done = 0
    for start, keep in _chunks(bits, columns, words.size):
        indices = np.flatnonzero(keep)
        words[start : start + keep.size][indices] = values[done : done + indices.size]
        done += indices.size
    return words


def check(kept: int, positions: Bytes, shape: Sequence[int], code: str) -> None:
    """Raise a ValueError if this many values cannot have these positions."""
    size = prod(shape)
    if min(shape, default=0) < 0:
        raise ValueError(f"the shape {tuple(shape)} is negative")
    if code == PAIRS:
        groups = size // 4
        if size % 4 or positions.shape != (-(-groups // 3),):
            raise ValueError(f"{positions.shape} codes do not fit the shape {tuple(shape)}")
        if positions.size and positions.max() >= 6**3:
            raise ValueError(f"a code is {positions.max()}, but codes are below {6**3}")
        expected = size // 2
    else:
        rows = prod(positions.shape[:-1])
        if positions.ndim == 0 or rows == 0 or size % rows or positions.shape[-1] != -(-(size // rows) // 8):
            raise ValueError(f"a bitmask of {positions.shape} bytes does not fit the shape {tuple(shape)}")
        columns = size // rows
        if columns % 8 and (positions[..., -1] >> columns % 8).any():
            raise ValueError(f"a bitmask has bits beyond the {columns:,} columns of a row")
        expected = _count(positions)
    if kept != expected:
        raise ValueError(f"{kept:,} values are stored, but {expected:,} positions")


def _matrix(shape: Sequence[int]) -> tuple[int, int]:
    """Return the number of rows of a bitmask, and of weights in each."""
    return (shape[0], prod(shape[1:])) if shape else (1, 1)


def _bits(words: Words) -> Bytes:
    """Return one bit per weight, without padding between rows."""
    pieces = range(0, words.size, _CHUNK)
    return np.concatenate([np.packbits(words[at : at + _CHUNK] != 0, bitorder="little") for at in pieces])


def _count(bits: Bytes) -> int:
    return int(_POPCOUNT[bits].sum(dtype=np.int64))


def _chunks(bits: Bytes, columns: int, size: int) -> Iterator[tuple[int, NDArray[np.bool_]]]:
    """Yield the first index of some consecutive weights, and whether each is kept; rows are padded to bytes."""
    if columns % 8 == 0 or columns == size:  # no padding between rows
        for at in range(0, bits.size, _CHUNK // 8):
            piece = bits[at : at + _CHUNK // 8]
            count = min(8 * piece.size, size - 8 * at)
            yield 8 * at, np.unpackbits(piece, count=count, bitorder="little").view(np.bool_)
        return
    rows = bits.reshape(size // columns, -1)
    step = max(1, _CHUNK // columns)
    for at in range(0, len(rows), step):
        yield at * columns, np.unpackbits(rows[at : at + step], 1, columns, "little").ravel().view(np.bool_)


def _fits_pairs(words: Words) -> bool:
    pieces = (words[at : at + _CHUNK] for at in range(0, words.size, _CHUNK))
    return all(_HAS_CODES[_bits(piece)].all() for piece in pieces)


def _codes(bits: Bytes, size: int) -> Bytes:
    """Return three groups in a byte, in base 6; the last byte is padded."""
    codes = _CODES_OF_BYTE[bits].ravel()[: size // 4]
    codes = np.pad(codes, (0, -codes.size % 3))
    return codes[::3] + codes[1::3] * 6 + codes[2::3] * 36


def _bits_of_codes(codes: Bytes, size: int) -> Bytes:
    """Return one bit for each of the first `size` weights; the padding is dropped."""
    count = size // 4
    groups = np.pad(_GROUPS_OF_CODE[codes].ravel()[:count], (0, count % 2))
    return groups[::2] | groups[1::2] << 4
