"""Samples of large sets of choices."""

import itertools

import pytest


def pairwise(*axes, allowed=lambda *values: True):
    """Combinations of one value from each axis in which every allowed pair of values of two axes occurs.

    Greedy: each combination is the first of those with the most pairs that are not covered yet.
    """
    combinations = [values for values in itertools.product(*map(list, axes)) if allowed(*values)]
    pairs = {values: set(itertools.combinations(enumerate(values), 2)) for values in combinations}
    missing = set().union(*pairs.values())
    chosen = []
    while missing:
        best = max(combinations, key=lambda values: len(pairs[values] & missing))
        chosen.append(best)
        missing -= pairs[best]
    return chosen


def with_nightly(sample, every):
    """A sample of values, or of tuples of values, for each run of the tests; the others of the set run at night."""
    cases = list(sample)
    for values in every:
        if values not in cases:
            values = values if isinstance(values, tuple) else (values,)
            cases.append(pytest.param(*values, marks=pytest.mark.nightly))
    return cases


def spread(*axes):
    """Few combinations in which every value of each axis occurs, for each run of the tests; all others run at night."""
    axes = [list(axis) for axis in axes]
    longest = max(map(len, axes))
    sample = zip(*(itertools.islice(itertools.cycle(axis), longest) for axis in axes), strict=True)
    return with_nightly(sample, itertools.product(*axes))
