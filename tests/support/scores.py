"""Scores with and without ties, and masks compared with NumPy's."""

import numpy as np
import torch
from hypothesis import strategies as st


@st.composite
def score_matrices(draw, multiple_of=1, multiples=40):
    """Scores of few or many levels: 1 makes all equal, 3 makes many ties, 10000 almost none."""
    rows, d_in = draw(st.integers(1, 6)), multiple_of * draw(st.integers(1, multiples))
    levels = draw(st.sampled_from([1, 3, 10_000]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    return torch.randint(0, levels, (rows, d_in), generator=generator).float()


def assert_keeps(keep, expected):
    assert keep.dtype == torch.bool
    np.testing.assert_array_equal(keep.numpy(), expected)


def non_contiguous_views(scores):
    """The same scores laid out in other ways."""
    yield scores.t().contiguous().t()
    yield scores.repeat_interleave(2, dim=1)[:, ::2]
    yield torch.cat([scores, scores], dim=1)[:, scores.shape[1] :]
