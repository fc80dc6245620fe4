"""Patterns that name layers, suggestions for misspelled names, and numbers in words."""

import re

import pytest
from support.refusals import refuses

from wanda_lightning.common.layer_names import check_patterns, matches, refuse_unmatched
from wanda_lightning.common.wording import abbreviated, did_you_mean, duration

NAMES = ["blocks.0.mlp.up", "blocks.0.mlp.down", "blocks.10.mlp.up", "blocks.0.attn", "head"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("blocks.0", "blocks.0.mlp.up blocks.0.mlp.down blocks.0.attn"),
        ("*.mlp", "blocks.0.mlp.up blocks.0.mlp.down blocks.10.mlp.up"),
        ("*.up", "blocks.0.mlp.up blocks.10.mlp.up"),
        ("mlp", ""),
        ("HEAD", ""),
        ("re:blocks", ""),
        (r"re:.*\.\d{1,3}\.mlp\.(up|down)", "blocks.0.mlp.up blocks.0.mlp.down blocks.10.mlp.up"),
    ],
)
def test_names_globs_and_regular_expressions(pattern, expected):
    assert [name for name in NAMES if matches(name, pattern, "skip")] == expected.split()


def test_a_string_is_a_single_pattern():
    assert check_patterns("skip", "head") == ("head",)
    assert check_patterns("skip", ["head", "re:b.*"]) == ("head", "re:b.*")


def test_a_wrong_regular_expression_is_refused():
    message = re.escape("only='re:(' must be a regular expression after 're:', but")
    with refuses(message):
        check_patterns("only", ["head", "re:("])


def test_a_pattern_that_matches_no_name_is_refused_with_the_nearest_one():
    refuse_unmatched(["head", "*.up"], NAMES, "skip", "module")
    with refuses(
        r"skip='blocks.0.mpl.up' matches no module .* nearest is 'blocks.0.mlp.up'",
    ):
        refuse_unmatched(["head", "blocks.0.mpl.up"], NAMES, "skip", "module")


@pytest.mark.parametrize(
    ("name", "known", "suggestion"),
    [
        ("wnda", ["wanda", "magnitude"], " Did you mean wanda?"),
        (
            "VIT_tinyy",
            ["vit_tiny_r26_s32_384", "vit_tiny_p16_224"],
            " Did you mean vit_tiny_p16_224?",
        ),
        ("foo", ["boolq"], ""),
    ],
)
def test_names_that_resemble_a_wrong_one(name, known, suggestion):
    assert did_you_mean(name, known) == suggestion


@pytest.mark.parametrize(
    ("number", "in_words", "words"),
    [
        (7.25, duration, "7.2 s"),
        (192, duration, "3 min 12 s"),
        (7500, duration, "2 h 5 min"),
        (950, abbreviated, "950"),
        (134_515_008, abbreviated, "135 million"),
        (999_700_000, abbreviated, "1000 million"),
    ],
)
def test_numbers_in_words(number, in_words, words):
    assert in_words(number) == words
