"""Sparsities that are shifted to the target and rounded to what a pattern can have."""

import torch
from hypothesis import given, settings, strategies as st
from support.layers import dense_layer

from wanda_lightning.core.allocation import match_target
from wanda_lightning.core.patterns import NM


@given(st.integers(1, 300), st.data())
def test_a_step_is_not_lost_to_rounding(levels, data):
    step = data.draw(st.integers(0, levels - 1))
    weight = torch.ones(1, levels)
    layers = [dense_layer("a", "a", weight), dense_layer("b", "b", weight)]
    got = match_target(layers, {"a": 0.0, "b": 0.0}, 0.0, fixed={"a": step / levels})["a"]
    assert int(levels * got) == step


@given(seed=st.integers(0, 2**31), shapes=st.lists(st.integers(1, 40), min_size=2, max_size=12), n=st.integers(1, 15))
@settings(max_examples=20)
def test_mixed_n_of_m_has_the_mean_of_n_of_m(seed, shapes, n):
    pattern, generator = NM(n, 16), torch.Generator().manual_seed(seed)
    layers = [(str(i), str(i), torch.ones(d_out, 16), None) for i, d_out in enumerate(shapes)]
    wanted = {name: float(torch.rand((), generator=generator)) for name, _, _, _ in layers}
    got = match_target([dense_layer(*layer, pattern) for layer in layers], wanted, pattern.sparsity)
    chosen = {name: pattern.for_sparsity(sparsity) for name, sparsity in got.items()}
    survivors = {name: kind.n if isinstance(kind, NM) else 16 for name, kind in chosen.items()}
    assert all(count >= 1 for count in survivors.values())
    assert abs(sum(survivors[str(i)] * d_out for i, d_out in enumerate(shapes)) - n * sum(shapes)) <= max(shapes) / 2
    for a in wanted:
        for b in wanted:
            if wanted[a] < wanted[b]:
                assert survivors[a] + 1 >= survivors[b], "who should have more sparsity has no more than one step less"
