"""The mathematics of one-shot pruning, as pure functions of tensors."""
