"""Slow versions that are obviously right of what the package computes: plain loops over NumPy arrays in float64.

Nothing here is shared with the package. `keep` arrays are True where a weight survives.
"""

import numpy as np

from wanda_lightning.core.patterns import NM, EqualShare, Unstructured


def array(tensor):
    """A tensor of any float type as a float64 array, exactly."""
    return tensor.detach().double().numpy()


# ---- statistics


def square_sum(tokens):
    """The sum over tokens of x², for each column."""
    total = np.zeros(tokens.shape[1])
    for row in range(tokens.shape[0]):
        for column in range(tokens.shape[1]):
            total[column] += tokens[row, column] ** 2
    return total


def gram(tokens):
    """The sum over tokens of x x^T."""
    matrix = np.zeros((tokens.shape[1], tokens.shape[1]))
    for token in tokens:
        matrix += np.outer(token, token)
    return matrix


def im2col(images, kernel, stride=(1, 1), padding=(0, 0), dilation=(1, 1)):
    """The inputs that a Conv2d multiplies by its weight, (tokens, d_in): one token for each image and output position.

    Columns run over kernel rows, then kernel columns, then input channels, as `weight.permute(0, 2, 3, 1)` does.
    `images` are (batch, channels, height, width); the other arguments are pairs (vertical, horizontal).
    """
    batch, channels, height, width = images.shape
    out_height = (height + 2 * padding[0] - dilation[0] * (kernel[0] - 1) - 1) // stride[0] + 1
    out_width = (width + 2 * padding[1] - dilation[1] * (kernel[1] - 1) - 1) // stride[1] + 1
    tokens = []
    for image in range(batch):
        for out_row in range(out_height):
            for out_column in range(out_width):
                token = []
                for kernel_row in range(kernel[0]):
                    for kernel_column in range(kernel[1]):
                        row = out_row * stride[0] + kernel_row * dilation[0] - padding[0]
                        column = out_column * stride[1] + kernel_column * dilation[1] - padding[1]
                        inside = 0 <= row < height and 0 <= column < width
                        for channel in range(channels):
                            token.append(images[image, channel, row, column] if inside else 0.0)
                tokens.append(token)
    return np.array(tokens)


def routed_tokens(module, x, *routing):
    """The inputs of each expert's matrices and the indices of their tokens, computed one token after the other."""
    found = {}
    columns = type(module).__name__ in ("GptOssExperts", "Llama4TextExperts")
    experts = len(module.down_proj)
    if routing:
        chosen = routing[0].numpy()
        pairs = [(token, int(e)) for token in range(len(x)) for e in chosen[token]]
        inputs = [x[token] for token, _ in pairs]
    else:  # Llama-4: a copy of all tokens for each expert, in which the tokens of other experts are zero
        tokens = len(x) // experts
        pairs = [(row % tokens, row // tokens) for row in range(len(x)) if x[row].any()]
        inputs = [x[expert * tokens + token] for token, expert in pairs]
    for (token, expert), vector in zip(pairs, inputs, strict=True):
        up = module.gate_up_proj[expert].detach()
        both = vector @ up if columns else up @ vector
        if type(module).__name__ == "GptOssExperts":
            both = both + module.gate_up_proj_bias[expert].detach()
            gate, linear = both[::2].clamp(max=module.limit), both[1::2].clamp(-module.limit, module.limit)
            middle = (linear + 1) * gate * (gate * module.alpha).sigmoid()
        else:
            middle = module.act_fn(both[: len(both) // 2]) * both[len(both) // 2 :]
        for name, entering in (("gate_up_proj", vector), ("down_proj", middle)):
            tokens, rows = found.setdefault((name, expert), ([], []))
            tokens.append(array(entering))
            rows.append(token)
    return {key: (np.array(tokens), np.array(rows)) for key, (tokens, rows) in found.items()}


# ---- criteria


def magnitude(weight, tokens):
    """|W|."""
    scores = np.zeros(weight.shape)
    for row in range(weight.shape[0]):
        for column in range(weight.shape[1]):
            scores[row, column] = abs(weight[row, column])
    return scores


def wanda(weight, tokens):
    """|W| times the norm of its input column."""
    sums = square_sum(tokens)
    scores = np.zeros(weight.shape)
    for row in range(weight.shape[0]):
        for column in range(weight.shape[1]):
            scores[row, column] = abs(weight[row, column]) * sums[column] ** 0.5
    return scores


def ria(weight, tokens):
    """The weight relative to its row plus relative to its column, times the square root of the norm of its input."""
    sums = square_sum(tokens)
    scores = np.zeros(weight.shape)
    for row in range(weight.shape[0]):
        for column in range(weight.shape[1]):
            if weight[row, column] != 0:
                in_row = abs(weight[row, column]) / sum(abs(other) for other in weight[row])
                in_column = abs(weight[row, column]) / sum(abs(other) for other in weight[:, column])
                scores[row, column] = (in_row + in_column) * sums[column] ** 0.25
    return scores


def saliency(weight, tokens, dampening=0.01):
    """The root of w_q^2 / d; d is the first diagonal entry of the inverse Gram matrix of the columns from q on."""
    matrix = damped_gram(tokens, dampening)
    scores = np.zeros(weight.shape)
    for column in range(weight.shape[1]):
        here = np.linalg.inv(matrix[column:, column:])[0, 0]
        for row in range(weight.shape[0]):
            scores[row, column] = (weight[row, column] ** 2 / here) ** 0.5
    return scores


SCORES = {"magnitude": magnitude, "wanda": wanda, "ria": ria, "saliency": saliency}


# ---- solvers


def damped_gram(tokens, dampening):
    """The Gram matrix plus `dampening` times its mean diagonal."""
    matrix = gram(tokens)
    return matrix + dampening * np.mean(np.diag(matrix)) * np.eye(len(matrix))


def surgeon(weight, tokens, dampening, keep):
    """Go through the columns; the weights right of a pruned one compensate for it (optimal brain surgeon)."""
    weight, matrix = weight.copy(), damped_gram(tokens, dampening)
    for column in range(weight.shape[1]):
        inverse = np.linalg.inv(matrix[column:, column:])
        for row in range(weight.shape[0]):
            if not keep[row, column]:
                weight[row, column:] -= weight[row, column] / inverse[0, 0] * inverse[0]
                weight[row, column] = 0
    return weight


def least_squares(weight, tokens, dampening, keep):
    """The kept weights of each row that give the nearest outputs, by lstsq on the tokens and the pull."""
    pull = np.sqrt(dampening * np.mean(np.sum(tokens**2, axis=0)))
    design = np.concatenate([tokens, pull * np.eye(tokens.shape[1])])
    fitted = np.zeros(weight.shape)
    for row in range(weight.shape[0]):
        kept = np.flatnonzero(keep[row])
        fitted[row, kept] = np.linalg.lstsq(design[:, kept], design @ weight[row], rcond=None)[0]
    return fitted


def admm(weight, tokens, dampening, rhos, choose):
    """The mask after iterations that fit toward copy minus dual, mask fit plus dual, and update the dual (Boyd 2011).

    Inputs are scaled so that the dampened Gram matrix has a diagonal of 1; `choose(scores)` is the pattern. The dual
    variable is not divided by rho.
    """
    matrix = damped_gram(tokens, dampening)
    scale = np.sqrt(np.diag(matrix))
    matrix, dense = matrix / np.outer(scale, scale), weight * scale
    copy, dual = dense * choose(np.abs(dense)), np.zeros(weight.shape)
    for rho in rhos:
        fit = np.linalg.solve(matrix + rho * np.eye(len(matrix)), (dense @ matrix + rho * copy - dual).T).T
        keep = choose(np.abs(fit + dual / rho))
        copy = (fit + dual / rho) * keep
        dual = dual + rho * (fit - copy)
    return keep


# ---- patterns


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
    for row in range(scores.shape[0]):
        allowed = share * sum(scores[row])
        running, cut = 0.0, -1.0
        for score in sorted(scores[row]):
            running += score
            if running > allowed:
                break
            cut = score
        for column in range(scores.shape[1]):
            keep[row, column] = scores[row, column] > cut
    return keep


def keep_equal_share(scores, sparsity):
    """Bisect for the share from 0.4 in [0, 0.8], until within 0.001 of the sparsity or in a bracket below 0.001."""
    bottom, top = 0.0, 0.8
    share = 0.4
    while True:
        keep = keep_above_share(scores, share)
        pruned = np.count_nonzero(~keep) / keep.size
        if abs(pruned - sparsity) <= 0.001:
            return keep
        if top - bottom < 0.001:
            return keep
        if pruned > sparsity:  # too many: look below
            top = share
            share = (share + bottom) / 2
        else:
            bottom = share
            share = (share + top) / 2


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
    raise NotImplementedError(f"write the slow version of {pattern} in tests/support/reference.py")


# ---- allocations: the sparsity of each (name, block, weight, tokens) by the formula, not rounded to a pattern's steps


def uniform(layers, sparsity):
    """The target."""
    return {name: sparsity for name, _, _, _ in layers}


def owl(layers, sparsity, per_block=True):
    """The fraction of outliers among the Wanda scores of a block, mapped to [0, 0.16], subtracted from the target."""
    scores = {}
    for name, block, weight, tokens in layers:
        mean_square = square_sum(tokens) / len(tokens)
        of_layer = [abs(w) * mean_square[column] ** 0.5 for row in weight for column, w in enumerate(row)]
        scores.setdefault(block if per_block else name, []).extend(of_layer)
    fraction = {}
    for group, values in scores.items():
        mean = sum(values) / len(values)
        fraction[group] = sum(1 for value in values if value > 5 * mean) / len(values)
    low, high = min(fraction.values()), max(fraction.values())
    of_layer = {name: fraction[block if per_block else name] for name, block, _, _ in layers}
    shift = {name: (value - low) / (high - low) * 2 * 0.08 for name, value in of_layer.items()}
    mean = sum(shift[name] * weight.size for name, _, weight, _ in layers) / sum(layer[2].size for layer in layers)
    return {name: sparsity - (value - mean) for name, value in shift.items()}


def hill(weight):
    """1 + k / (the sum of ln(e_i / e_(k+1)) over the k largest of n eigenvalues of the Gram matrix), k = n / 2."""
    eigenvalues = [float(e) for e in np.linalg.eigvalsh(weight.T @ weight)]
    if weight.shape[0] < weight.shape[1]:
        eigenvalues = [float(e) for e in np.linalg.eigvalsh(weight @ weight.T)]
    descending = sorted(eigenvalues, reverse=True)
    k = len(descending) // 2
    total = 0.0
    for i in range(k):
        total += np.log(descending[i] / descending[k])
    return 1 + k / total


def alpha(layers, sparsity, per_block=True):
    """Tail exponents, averaged over each block, mapped to [0.7, 1.3] and then by one factor to the target."""
    exponents = {}
    for name, block, weight, _ in layers:
        exponents.setdefault(block if per_block else name, []).append(hill(weight))
    mean = {group: sum(values) / len(values) for group, values in exponents.items()}
    low, high = min(mean.values()), max(mean.values())
    of_layer = {name: mean[block if per_block else name] for name, block, _, _ in layers}
    mapped = {name: (value - low) / (high - low) * (1.3 - 0.7) + 0.7 for name, value in of_layer.items()}
    total = sum(layer[2].size for layer in layers)
    factor = sparsity * total / sum(mapped[name] * weight.size for name, _, weight, _ in layers)
    return {name: value * factor for name, value in mapped.items()}


def fisher(layers, sparsity, max_deviation=0.15):
    """One threshold for w² times the square sum of its input in all layers, each at most 0.15 from the target."""
    scores = {}
    for name, _, weight, tokens in layers:
        sums = square_sum(tokens)
        scores[name] = [w * w * sums[column] for row in weight for column, w in enumerate(row)]
    everything = sorted(score for of_layer in scores.values() for score in of_layer)
    best = None
    for threshold in everything:
        shares = {name: sum(1 for s in of_layer if s < threshold) / len(of_layer) for name, of_layer in scores.items()}
        clipped = {
            name: min(max(share, sparsity - max_deviation), sparsity + max_deviation) for name, share in shares.items()
        }
        mean = sum(clipped[name] * len(scores[name]) for name in scores) / len(everything)
        if best is None or abs(mean - sparsity) < best[0]:
            best = abs(mean - sparsity), clipped
    return best[1]


SPARSITIES = {
    "uniform": uniform,
    "owl": owl,
    "owl_layer": lambda layers, sparsity: owl(layers, sparsity, per_block=False),
    "alpha": alpha,
    "alpha_layer": lambda layers, sparsity: alpha(layers, sparsity, per_block=False),
    "fisher": fisher,
}
