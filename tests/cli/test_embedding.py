"""The commands with an embedding model, which they recognize by its modules.json."""

import pytest
from support.cli import IGNORED_WARNINGS, run, shell as shell
from support.embedding import (
    PAIRS,
    SENTENCES,
    load,
    save_pairs,
    spearman_by_hand,
    tiny_folder as tiny_folder,
)
from support.reports import read_json

pytestmark = IGNORED_WARNINGS


@pytest.fixture
def command(tiny_folder, tmp_path):
    """The options of a fast run."""
    (tmp_path / "sentences.txt").write_text("\n\n".join(SENTENCES))
    pairs = save_pairs(tmp_path / "pairs.csv")
    return f"prune --model {tiny_folder} --calibration sentences.txt --evaluation {pairs}".split()


def test_shrink_measures_and_saves_a_smaller_model(command, tiny_folder, capsys):
    saved = ["--save_model", "small", "--save", "results", "--report", "page.html"]
    assert run("shrink", *command[1:], "--units", "0.5", *saved) == 0
    before = spearman_by_hand(load(tiny_folder))
    after = spearman_by_hand(load("small"))

    result = read_json("results/pruning_report.json")["run"]
    assert (result["before"], result["after"]) == pytest.approx((before, after), abs=1e-3)
    assert result["calibration"] == f"sentences.txt, {len(SENTENCES)} sentences, seed 0"
    line = f"from {before:.2f} to {after:.2f}"
    assert line in capsys.readouterr().out
    with open("small/README.md") as card, open("page.html") as page:
        text = card.read()
        assert 'SentenceTransformer("small")' in text
        assert "sentence-similarity" in text
        for shown in (text, page.read()):
            assert f"{before:.2f}" in shown
            assert f"{after:.2f}" in shown
    assert load("small")[0].auto_model.config.intermediate_size == 16


def test_evaluate_shows_the_correlation_of_each_model(command, tiny_folder, capsys):
    assert run(*command, "--method", "magnitude", "--save_model", "out") == 0
    pairs = command[-1]
    capsys.readouterr()
    assert run("evaluate", "--dense", tiny_folder, "out", "--evaluation", pairs) == 0
    out = capsys.readouterr().out
    assert f"spearman ({len(PAIRS)} pairs)" in out
    assert f"{spearman_by_hand(load(tiny_folder)):.2f}" in out
    assert f"{spearman_by_hand(load('out')):.2f}" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--seqlen 8", "--seqlen must be left out for an embedding model"),
        ("--calibration self", "--calibration must be left out for an embedding model"),
        ("--evaluation missing.csv", "missing.csv"),
        ("--evaluation stsb,stsb", "must be one file of pairs"),
        ("--evaluation wikitext2", "evaluation must be stsb or an existing .csv file"),
    ],
)
def test_wrong_options_are_refused(command, options, message, capsys):
    assert run(*command, *options.split()) == 2
    assert message in capsys.readouterr().err


def test_a_wrong_score_is_refused_before_the_model_is_loaded(
    command, capsys, monkeypatch, tmp_path
):
    monkeypatch.delattr("wanda_lightning.cli.model_and_data.EmbeddingModule")
    save_pairs(tmp_path / "pairs.csv", [("a", "b", "high")])
    assert run(*command) == 2
    assert "Line 2 of" in capsys.readouterr().err
