"""Patterns that name layers, suggestions for misspelled names, and numbers in words."""

import re

import pytest

from wanda_lightning.common.layer_names import check_patterns, matches, refuse_unmatched
from wanda_lightning.common.wording import abbreviated, as_size, did_you_mean, duration

NAMES = ["blocks.0.mlp.up", "blocks.0.mlp.down", "blocks.10.mlp.up", "blocks.0.attn", "head"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("blocks.0", ["blocks.0.mlp.up", "blocks.0.mlp.down", "blocks.0.attn"]),
        ("*.mlp", ["blocks.0.mlp.up", "blocks.0.mlp.down", "blocks.10.mlp.up"]),
        ("*.up", ["blocks.0.mlp.up", "blocks.10.mlp.up"]),
        ("mlp", []),
        ("HEAD", []),
        ("re:blocks", []),
        (
            "re:.*\\.\\d{1,3}\\.mlp\\.(up|down)",
            ["blocks.0.mlp.up", "blocks.0.mlp.down", "blocks.10.mlp.up"],
        ),
    ],
)
def test_names_globs_and_regular_expressions(pattern, expected):
    assert [name for name in NAMES if matches(name, pattern, "skip")] == expected


def test_patterns_of_an_option():
    assert (check_patterns("skip", "head"), check_patterns("skip", ["head", "re:b.*"])) == (
        ("head",),
        ("head", "re:b.*"),
    )
    with pytest.raises(
        ValueError, match=re.escape("only='re:(' must be a regular expression after 're:', but")
    ):
        check_patterns("only", ["head", "re:("])
    refuse_unmatched(["head", "*.up"], NAMES, "skip", "module")
    with pytest.raises(
        ValueError,
        match=r"skip='blocks.0.mpl.up' matches no module .* nearest is 'blocks.0.mlp.up'",
    ):
        refuse_unmatched(["head", "blocks.0.mpl.up"], NAMES, "skip", "module")


def test_words():
    assert did_you_mean("wnda", ["wanda", "magnitude"]) == " Did you mean wanda?"
    assert (
        did_you_mean("VIT_tinyy", ["vit_tiny_r26_s32_384", "vit_tiny_p16_224"])
        == " Did you mean vit_tiny_p16_224?"
    )
    assert did_you_mean("foo", ["boolq"]) == ""
    assert [duration(seconds) for seconds in (7.25, 192, 7500)] == [
        "7.2 s",
        "3 min 12 s",
        "2 h 5 min",
    ]
    assert (abbreviated(134_515_008), abbreviated(950), as_size(999_700_000)) == (
        "135 million",
        "950",
        "1000 MB",
    )
