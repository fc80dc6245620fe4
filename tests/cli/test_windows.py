"""The length of windows against the context of a model."""

import shutil
from types import SimpleNamespace

import pytest

from wanda_lightning.cli.windows import checked_seqlen, refuse_long_windows


def config(context):
    inner = SimpleNamespace() if context is None else SimpleNamespace(max_position_embeddings=context)
    return SimpleNamespace(get_text_config=lambda: inner)


@pytest.mark.parametrize(
    ("seqlen", "context", "expected"),
    [(None, 64, 64), (None, 4096, 2048), (None, None, 2048), (32, 64, 32), (64, 64, 64)],
)
def test_the_context_is_the_default_and_the_limit(seqlen, context, expected):
    assert checked_seqlen(seqlen, config(context), 2048) == expected


def test_more_than_the_context_is_refused():
    with pytest.raises(ValueError, match="--seqlen must be at most 64, the model's context, but it is 65"):
        checked_seqlen(65, config(64), 2048)


def test_long_windows_are_refused_without_the_weights(inputs, tmp_path):
    shutil.copytree(inputs / "llama", tmp_path / "weightless", ignore=shutil.ignore_patterns("*.safetensors"))
    refuse_long_windows(None, "gone", {})
    refuse_long_windows(64, "weightless", {})
    with pytest.raises(ValueError, match="--seqlen must be at most 64"):
        refuse_long_windows(65, "weightless", {})
