"""A plain implementation of SparseGPT for Llama, the baseline for the time of ours."""

import torch
from torch import Tensor, nn


@torch.no_grad()
def prune_by_hand(model: nn.Module, samples: Tensor, sparsity: float, n: int = 0, m: int = 0) -> None:
    """Prune a Llama-like model in place, block by block, one sample at a time.

    Args:
        model: Has `model.embed_tokens`, `model.rotary_emb` and `model.layers`. Its attention is causal without a mask.
        samples: Token ids of shape (samples, tokens).
        sparsity: The sparsity of each linear layer in the blocks.
        n: The number of weights that survive of every m. 0 is unstructured.
        m: The size of a group.
    """
    if model.config._attn_implementation != "sdpa":
        raise ValueError("model must have attn_implementation='sdpa', since the baseline passes no mask to its blocks.")
    body = model.model
    hidden = [body.embed_tokens(sample[None]) for sample in samples]
    position_embeddings = body.rotary_emb(hidden[0], torch.arange(samples.shape[1])[None])
    for block in body.layers:
        linears = [module for module in block.modules() if isinstance(module, nn.Linear)]
        hessians = {linear: torch.zeros(linear.in_features, linear.in_features) for linear in linears}

        def accumulate(linear: nn.Linear, inputs: tuple[Tensor], _: Tensor, hessians: dict = hessians) -> None:
            x = inputs[0].flatten(0, -2)
            hessians[linear] += x.T @ x

        handles = [linear.register_forward_hook(accumulate) for linear in linears]
        for sample in hidden:
            block(sample, position_embeddings=position_embeddings)
        for handle in handles:
            handle.remove()
        for linear in linears:
            linear.weight.copy_(sparsegpt(linear.weight.clone(), hessians.pop(linear), sparsity, n, m))
        hidden = [block(sample, position_embeddings=position_embeddings) for sample in hidden]


def sparsegpt(weight: Tensor, hessian: Tensor, sparsity: float, n: int = 0, m: int = 0, size: int = 128) -> Tensor:
    """Run algorithm 1 of Frantar & Alistarh 2023, which compares all rows of a block. It modifies its arguments."""
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    diagonal[dead] = 1
    weight[:, dead] = 0
    diagonal += 0.01 * diagonal.mean()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    factor = torch.linalg.cholesky(inverse, upper=True)
    size -= size % m if m else 0
    for start in range(0, weight.shape[1], size):
        block, here = weight[:, start : start + size].clone(), factor[start : start + size, start : start + size]
        errors, pruned = torch.zeros_like(block), torch.zeros_like(block, dtype=torch.bool)
        if not m:
            scores = (block / here.diagonal()) ** 2
            threshold = scores.flatten().kthvalue(max(1, int(scores.numel() * sparsity))).values
            pruned = scores <= threshold
        for column in range(block.shape[1]):
            if m and column % m == 0:
                group = slice(column, column + m)
                lowest = ((block[:, group] / here.diagonal()[group]) ** 2).topk(m - n, dim=1, largest=False).indices
                pruned[:, group] = pruned[:, group].scatter(1, lowest, True)
            errors[:, column] = block[:, column] * pruned[:, column] / here[column, column]
            block[:, column:] -= errors[:, column, None] * here[column, column:]
        weight[:, start : start + size] = block * ~pruned
        weight[:, start + size :] -= errors @ factor[start : start + size, start + size :]
    return weight
