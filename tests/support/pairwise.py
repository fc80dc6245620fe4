"""All pairs of choices in few combinations."""

import itertools


def pairwise(*axes, allowed=lambda *values: True):
    """Combinations of one value from each axis in which every allowed pair of values of two axes occurs.

    Greedy: each combination is the first of those with the most pairs that are not covered yet.
    """
    combinations = [values for values in itertools.product(*map(list, axes)) if allowed(*values)]
    pairs = {values: set(itertools.combinations(enumerate(values), 2)) for values in combinations}
    missing, chosen = set().union(*pairs.values()), []
    while missing:
        best = max(combinations, key=lambda values: len(pairs[values] & missing))
        chosen.append(best)
        missing -= pairs[best]
    return chosen
