"""Store boolean tensors, such as the positions of zeros, in little memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_BITS = torch.arange(7, -1, -1, dtype=torch.uint8)  # shifts, highest bit first, as in numpy.packbits


def pack(flags: Tensor) -> Tensor:
    """Return a boolean tensor in compact form, on the CPU: the flat int64 indices of True, or uint8 with 8 bits each.

    The smaller of the two is returned. The last byte of bits is padded with zeros.

    Example:
        >>> pack(torch.tensor([True, False, True, False, True, True, True, True, True]))
        tensor([175, 128], dtype=torch.uint8)
    """
    flat = flags.flatten()
    if 64 * int(flat.count_nonzero()) < flat.numel():  # an index has 64 bits
        return flat.nonzero().squeeze(1).cpu()
    padding = flat.new_zeros(-flat.numel() % 8)
    octets = torch.cat([flat, padding]).view(torch.uint8).view(-1, 8)
    packed = torch.zeros_like(octets[:, 0])
    for column, shift in zip(octets.unbind(1), _BITS.tolist(), strict=True):
        packed |= column << shift
    return packed.cpu()


def unpack(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the boolean tensor of this shape from which `pack` returned `packed`, on the CPU.

    Example:
        >>> unpack(torch.tensor([160], dtype=torch.uint8), (1, 3))
        tensor([[ True, False,  True]])
    """
    size = torch.Size(shape)
    packed = packed.cpu()
    if packed.dtype == torch.uint8:
        flags = (packed[:, None] >> _BITS & 1).flatten()[: size.numel()].bool()
    else:
        flags = torch.zeros(size.numel(), dtype=torch.bool).index_fill_(0, packed, True)
    return flags.view(size)


def fits(packed: object, shape: Sequence[int]) -> bool:
    """Whether `pack` can have returned `packed` for a tensor of this shape."""
    size = torch.Size(shape).numel()
    if not isinstance(packed, Tensor) or packed.dim() != 1:
        return False
    if packed.dtype == torch.uint8:
        return len(packed) == -(-size // 8)
    return packed.dtype == torch.int64 and bool(((packed >= 0) & (packed < size)).all())
