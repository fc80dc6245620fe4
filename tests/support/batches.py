"""The same samples in other batches."""

import torch


def split(batches, size):
    """Cut batches (mappings of tensors) into batches of another size."""
    whole = {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}
    parts = {key: value.split(size) for key, value in whole.items()}
    return [dict(zip(parts, values, strict=True)) for values in zip(*parts.values(), strict=True)]
