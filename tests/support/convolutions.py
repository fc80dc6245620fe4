"""Convolutions for tests with hypothesis."""

from hypothesis import assume, strategies as st
from timm.layers import Conv2dSame
from torch import nn

# Of torch and of numpy.
MODES = {"zeros": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}


@st.composite
def convolutions(draw, kinds=(nn.Conv1d, nn.Conv2d, Conv2dSame)):
    """A convolution, maybe grouped, and the shape of an image that it takes."""
    make = draw(st.sampled_from(kinds))
    dimensions = 1 if make is nn.Conv1d else 2

    def sizes(least, most):
        return tuple(draw(st.integers(least, most)) for _ in range(dimensions))

    groups = draw(st.integers(1, 4))
    # With one channel for each of several groups, it would be depthwise.
    channels = groups * draw(st.integers(min(groups, 2), 4))
    options = {
        "stride": sizes(1, 3),
        "dilation": sizes(1, 3),
        "groups": groups,
        "bias": draw(st.booleans()),
    }
    if make is not Conv2dSame:
        options["padding"] = draw(
            st.one_of(st.sampled_from(["same", "valid"]), st.just(sizes(0, 3)))
        )
        options["padding_mode"] = draw(st.sampled_from(list(MODES)))
        if options["padding"] == "same":
            options["stride"] = 1
    module = make(channels, groups * draw(st.integers(1, 3)), sizes(1, 3), **options)
    size = sizes(4, 8)
    if make is not Conv2dSame:
        pads = module._reversed_padding_repeated_twice[::-1]
        for dim, (gap, kernel) in enumerate(zip(module.dilation, module.kernel_size, strict=True)):
            assume(size[dim] + sum(pads[2 * dim : 2 * dim + 2]) > gap * (kernel - 1))
    return module, (channels, *size)
