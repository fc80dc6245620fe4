"""Slow versions of what the package computes that are obviously right, in float64, by NumPy and torch.

Nothing here is shared with the package. `keep` arrays are True where a weight survives. Allocations return the
sparsity of each `NamedLayer` (see layers.py) by the formula, not rounded to a pattern's steps.
"""

import numpy as np
import torch
from torch.nn import functional as F

from wanda_lightning.core.patterns import NM, EqualShare, Experts, Structured, Unstructured


def array(tensor):
    """A tensor of any float type as a float64 array, exactly."""
    return tensor.detach().double().numpy()


def assert_keeps(keep, expected):
    assert keep.dtype == torch.bool
    np.testing.assert_array_equal(keep.numpy(), expected)


def square_sum(tokens):
    """The sum over tokens of x², for each column."""
    return (tokens**2).sum(axis=0)


def gram(tokens):
    """The sum over tokens of x x^T."""
    return sum(np.outer(token, token) for token in tokens)


def im2col(images, kernel, stride=(1, 1), padding=(0, 0), dilation=(1, 1)):
    """The inputs that a Conv2d multiplies by its weight, (tokens, d_in): one token for each image and output position.

    Columns run over kernel rows, then kernel columns, then input channels, as `weight.permute(0, 2, 3, 1)` does.
    `images` are (batch, channels, height, width); the other arguments are pairs (vertical, horizontal).
    """
    # (batch, channels * kernel positions, output positions)
    columns = F.unfold(torch.from_numpy(images), kernel, dilation, padding, stride)
    by_channel = columns.unflatten(1, (images.shape[1], -1))
    tokens = by_channel.permute(0, 3, 2, 1).flatten(2).flatten(0, 1)
    return tokens.numpy()


def magnitude(weight, tokens):
    """|W|."""
    return np.abs(weight)


def wanda(weight, tokens):
    """|W| times the norm of its input column."""
    return np.abs(weight) * square_sum(tokens) ** 0.5


def ria(weight, tokens):
    """The weight relative to its row plus relative to its column, times the square root of the norm of its input."""
    sizes = np.abs(weight)
    norms = square_sum(tokens) ** 0.5
    scores = np.zeros(weight.shape)
    for row, column in np.argwhere(weight):
        size = sizes[row, column]
        relative = size / sizes[row].sum() + size / sizes[:, column].sum()
        scores[row, column] = relative * norms[column] ** 0.5
    return scores


def saliency(weight, tokens):
    """The root of w_q^2 / d; d is the first diagonal entry of the inverse Gram matrix of the columns from q on."""
    matrix = damped_gram(tokens, 0.01)
    inverses = [np.linalg.inv(matrix[column:, column:])[0, 0] for column in range(len(matrix))]
    return (weight**2 / inverses) ** 0.5


SCORES = {"magnitude": magnitude, "wanda": wanda, "ria": ria, "saliency": saliency}


def damped_gram(tokens, dampening):
    """The Gram matrix plus `dampening` times its mean diagonal."""
    matrix = gram(tokens)
    return matrix + dampening * np.mean(np.diag(matrix)) * np.eye(len(matrix))


def surgeon(weight, tokens, dampening, keep):
    """Go through the columns; the weights right of a pruned one compensate for it (optimal brain surgeon)."""
    weight = weight.copy()
    matrix = damped_gram(tokens, dampening)
    for column in range(weight.shape[1]):
        inverse = np.linalg.inv(matrix[column:, column:])
        for row in np.flatnonzero(~keep[:, column]):
            weight[row, column:] -= weight[row, column] / inverse[0, 0] * inverse[0]
            weight[row, column] = 0
    return weight


def assert_least_squares(pruned, weight, tokens, dampening, keep):
    """The kept weights of each row give the nearest outputs, by lstsq on the tokens and the pull."""
    weight, tokens, keep = (tensor.numpy() for tensor in (weight, tokens, keep))
    pull = np.sqrt(dampening * np.mean(np.sum(tokens**2, axis=0)))
    design = np.concatenate([tokens, pull * np.eye(tokens.shape[1])])
    fitted = np.zeros(weight.shape)
    for row in range(weight.shape[0]):
        kept = np.flatnonzero(keep[row])
        fitted[row, kept] = np.linalg.lstsq(design[:, kept], design @ weight[row], rcond=None)[0]
    np.testing.assert_allclose(pruned.numpy(), fitted, rtol=1e-5, atol=1e-7)


def admm(weight, tokens, dampening, rhos, choose):
    """The mask after iterations that fit toward copy minus dual, mask fit plus dual, and update the dual (Boyd 2011).

    Inputs are scaled so that the dampened Gram matrix has a diagonal of 1; `choose(scores)` is the pattern. The dual
    variable is not divided by rho.
    """
    matrix = damped_gram(tokens, dampening)
    scale = np.sqrt(np.diag(matrix))
    matrix = matrix / np.outer(scale, scale)
    dense = weight * scale
    copy = dense * choose(np.abs(dense))
    dual = np.zeros(weight.shape)
    for rho in rhos:
        fit = np.linalg.solve(
            matrix + rho * np.eye(len(matrix)), (dense @ matrix + rho * copy - dual).T
        ).T
        keep = choose(np.abs(fit + dual / rho))
        copy = (fit + dual / rho) * keep
        dual = dual + rho * (fit - copy)
    return keep


def divergence(predicted, dense, temperature=1.0, reduction="batchmean"):
    """The Kullback-Leibler divergence of logits from the dense ones, which have one prediction a row."""
    log_q = (predicted / temperature).log_softmax(-1)
    log_p = (dense / temperature).log_softmax(-1)
    return F.kl_div(log_q, log_p, reduction=reduction, log_target=True)


def keep_largest(groups, count):
    """Prune the smallest scores of each row until `count` are left; among equal scores, the lower column first."""
    keep = np.ones(groups.shape, dtype=bool)
    smallest_first = np.argsort(groups, axis=1, kind="stable")
    np.put_along_axis(keep, smallest_first[:, : groups.shape[1] - count], False, axis=1)
    return keep


def keep_by_row(scores, sparsity):
    """Prune exactly int(d_in * sparsity) of each row."""
    return keep_largest(scores, scores.shape[1] - int(scores.shape[1] * sparsity))


def keep_by_layer(scores, sparsity):
    """Prune exactly int(numel * sparsity) of the matrix."""
    return keep_by_row(scores.reshape(1, -1), sparsity).reshape(scores.shape)


def keep_n_of_m(scores, n, m):
    """Keep n of every m consecutive inputs of a row."""
    return keep_largest(scores.reshape(-1, m), n).reshape(scores.shape)


def keep_above_share(scores, share):
    """Cut each row where its sorted scores sum up to `share` of the total; prune scores equal to the cut, too."""
    keep = np.ones(scores.shape, dtype=bool)
    for row, values in enumerate(scores):
        running = 0.0
        cut = -1.0
        for score in sorted(values):
            running += score
            if running > share * sum(values):
                break
            cut = score
        keep[row] = values > cut
    return keep


def keep_equal_share(scores, sparsity):
    """Bisect for the share from 0.4 in [0, 0.8], until within 0.001 of the sparsity or in a bracket below 0.001."""
    bottom = 0.0
    share = 0.4
    top = 0.8
    while True:
        keep = keep_above_share(scores, share)
        pruned = np.count_nonzero(~keep) / keep.size
        if abs(pruned - sparsity) <= 0.001 or top - bottom < 0.001:
            return keep
        if pruned > sparsity:
            top = share
        else:
            bottom = share
        share = (bottom + top) / 2


def kept_units(width, sparsity, multiple_of):
    """The multiple nearest to the units that are left (of two equally near ones, the even one), but at least one."""
    if sparsity == 0:
        return width
    multiples = range(width // multiple_of + 2)
    left = width * (1 - sparsity) / multiple_of
    nearest = min(multiples, key=lambda number: (abs(number - left), number % 2))
    return min(width, max(1, nearest) * multiple_of)


def keep_units(scores, sparsity, multiple_of, columns):
    """Keep the units with the largest sums of squared scores; those of unit u are in the columns u, u + width, ..."""
    width = scores.shape[1] // columns
    totals = np.zeros((1, width))
    for unit in range(width):
        totals[0, unit] = sum(score**2 for score in scores[:, unit::width].ravel())
    kept = keep_largest(totals, kept_units(width, sparsity, multiple_of))
    return np.tile(kept, (len(scores), columns))


def keep(pattern, scores, sparsity):
    """The slow version of any pattern."""
    match pattern:
        case Unstructured(group="row"):
            return keep_by_row(scores, sparsity)
        case Unstructured(group="layer"):
            return keep_by_layer(scores, sparsity)
        case NM(n=n, m=m):
            return keep_n_of_m(scores, n, m)
        case EqualShare():
            return keep_equal_share(scores, sparsity)
        case Structured(multiple_of=multiple_of, columns=columns):
            return keep_units(scores, sparsity, multiple_of, columns)
        case Experts():
            return keep_largest(scores, round(scores.shape[1] * (1 - sparsity)))
    raise NotImplementedError(f"write the slow version of {pattern} in tests/support/reference.py")


def survivors(pattern, keep):
    """The number of weights that survive in each group: of N:M, of a layer, or else of a row."""
    size = keep.shape[1]
    if isinstance(pattern, NM):
        size = pattern.m
    elif getattr(pattern, "group", "row") == "layer":
        size = keep.size
    return keep.reshape(-1, size).sum(axis=1).tolist()


def uniform(layers, sparsity):
    """The target."""
    return {layer.name: sparsity for layer in layers}


def owl(layers, sparsity):
    """The fraction of outliers among the Wanda scores of a block, mapped to [0, 0.16], subtracted from the target."""
    scores = {}
    for layer in layers:
        of_layer = wanda(layer.weight, layer.tokens / len(layer.tokens) ** 0.5)
        scores.setdefault(layer.block, []).extend(of_layer.ravel())

    fractions = [np.mean(values > 5 * np.mean(values)) for values in map(np.array, scores.values())]
    shifts = (np.array(fractions) - min(fractions)) / (max(fractions) - min(fractions)) * 2 * 0.08
    shift_of = dict(zip(scores, shifts, strict=True))
    sizes = [layer.weight.size for layer in layers]
    mean = np.average([shift_of[layer.block] for layer in layers], weights=sizes)
    return {layer.name: sparsity - (shift_of[layer.block] - mean) for layer in layers}


def fisher(layers, sparsity):
    """One threshold for w² times the square sum of its input; layers differ by 0.15, or 3/8 of what is kept."""
    deviation = min(0.15, 3 / 8 * (1 - sparsity))
    scores = [(layer.weight**2 * square_sum(layer.tokens)).ravel() for layer in layers]
    sizes = [layer.weight.size for layer in layers]

    def clipped(threshold):
        below = [np.mean(of_layer < threshold) for of_layer in scores]
        return np.clip(below, sparsity - deviation, sparsity + deviation)

    def distance(threshold):
        return abs(np.average(clipped(threshold), weights=sizes) - sparsity)

    best = min(np.sort(np.concatenate(scores)), key=distance)
    return dict(zip([layer.name for layer in layers], clipped(best), strict=True))


SPARSITIES = {"uniform": uniform, "owl": owl, "fisher": fisher}
