"""RigL's move of zeros equals a slow loop."""

import pytest
import torch

from wanda_lightning.core.patterns import NM, Unstructured
from wanda_lightning.core.rigl import drop_and_grow


def layer(seed=0, group=0):
    random = torch.Generator().manual_seed(seed)
    weight, gradient = torch.randn(6, 16, generator=random), torch.randn(6, 16, generator=random)
    keep = (NM(2, 4) if group else Unstructured())(weight.abs(), 0.5)
    return weight * keep, gradient, keep


def by_a_loop(weight, gradient, keep, share, group):
    """Swap pairs: the smallest kept weight, and the zero with the largest gradient."""
    cells = [(row, column) for row in range(weight.shape[0]) for column in range(weight.shape[1])]
    kept, zeros = [c for c in cells if keep[c]], [c for c in cells if not keep[c] and gradient[c] != 0]
    new, count = keep.clone(), int(share * len(kept))
    small, large = (lambda c: abs(float(weight[c]))), (lambda c: -abs(float(gradient[c])))
    if not group:
        pairs = list(zip(sorted(kept, key=small), sorted(zeros, key=large), strict=False))[:count]
        pairs = [*zip(sorted(kept, key=small)[: len(pairs)], [grown for _, grown in pairs], strict=True)]
    else:
        pairs = []
        for row in range(weight.shape[0]):
            for start in range(0, weight.shape[1], group):
                inside = [(row, column) for column in range(start, start + group)]
                mine, others = [c for c in inside if c in kept], [c for c in inside if c in zeros]
                if mine and others:
                    pairs.append((min(mine, key=small), min(others, key=large)))
        pairs = sorted(pairs, key=lambda pair: small(pair[0]))[:count]
    for dropped, grown in pairs:
        new[dropped], new[grown] = False, True
    return new


@pytest.mark.parametrize("group", [0, 4])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("sparse_gradients", [False, True])
def test_it_equals_a_loop(group, share, sparse_gradients):
    weight, gradient, keep = layer(group=group)
    if sparse_gradients:
        gradient[::2] = 0
    new = drop_and_grow(weight, gradient, keep, share, group)
    assert torch.equal(new, by_a_loop(weight, gradient, keep, share, group))
    assert int(new.sum()) == int(keep.sum())
    if group:
        assert (new.view(-1, group).sum(dim=1) == 2).all()
    if share == 0.5 and not sparse_gradients:
        assert not torch.equal(new, keep)


def test_without_gradients_nothing_moves():
    weight, gradient, keep = layer()
    assert torch.equal(drop_and_grow(weight, gradient * 0, keep, 0.5), keep)
