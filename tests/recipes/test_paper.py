"""The paper's tables as sweeps: the YAML files, what runs and what does not run again, what stands beside what."""

import re
from pathlib import Path

import pytest
import yaml
from support.cli import IGNORED_WARNINGS
from support.recipes import RECIPES, in_this_process, script
from support.reports import read_json
from support.tasks import tiny_llama, tiny_tokenizer, write_tasks

from wanda_lightning import cli
from wanda_lightning.cli.options import values_of

pytestmark = IGNORED_WARNINGS

PAPER = RECIPES / "paper"
FAMILIES = sorted(PAPER.glob("*.yaml"))
sweep = script("paper/run")


@pytest.fixture(autouse=True)
def launch(monkeypatch):
    monkeypatch.setattr(sweep, "launch", in_this_process)


FAMILY = """
options: {nsamples: 2, seqlen: 32, limit: 3, calibration: INPUTS/long.txt, eval: INPUTS/other.txt}
models: {1B: INPUTS/llama}
cells:
  magnitude_50: {prune_method: magnitude}
  wanda_2to4: {sparsity_type: "2:4"}
source: Nobody 2024
published: {dense: {1B: 111.5}, wanda_2to4: {1B: 222.25}}
"""


@pytest.fixture
def family(inputs, tmp_path):
    """A family whose options run as they are; `change` edits it."""

    def write(change=lambda content: None):
        content = yaml.safe_load(FAMILY.replace("INPUTS", str(inputs)))
        change(content)
        path = tmp_path / "tiny.yaml"
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        return path

    return write


def run(*arguments):
    return sweep.main([str(argument) for argument in arguments])


def rows():
    return read_json("out/results.json")


def times():
    return {
        str(path.relative_to("out")): path.stat().st_mtime_ns
        for path in Path("out").rglob("*.*")
        if path.is_file()
    }


@pytest.mark.parametrize("path", FAMILIES, ids=lambda path: path.stem)
def test_a_family_says_how_to_run_it_and_where_its_numbers_are_from(path):
    text = path.read_text()
    content = yaml.safe_load(text)
    assert f"\n#   python recipes/paper/run.py recipes/paper/{path.name} " in text
    assert "\n# Published: " in text
    published = content.get("published", {})
    assert published.keys() <= {"dense", *content["cells"]}
    assert all(numbers.keys() <= content["models"].keys() for numbers in published.values())
    assert not published or (content["source"] and content["options"]["seqlen"])


@pytest.mark.nightly  # it reads the options of every command
def test_the_page_of_all_tables_is_that_of_the_recipes(tmp_path):
    page = tmp_path / "paper.md"
    assert run(*FAMILIES, "--out", "out/paper", "--dry_run", "--table", page) == 0
    assert page.read_text() == (PAPER.parents[1] / "docs" / "paper.md").read_text()


def test_the_table_is_filled_from_finished_runs(family):
    path = family()
    assert run(path, "--out", "out", "--only", "wanda_2to4", "--table", "table.md") == 0
    (row,) = [row for row in rows() if row["cell"] == "wanda_2to4"]
    lines = Path("table.md").read_text().splitlines()
    assert f"| tiny/1B/wanda_2to4 | 222.25 | {row['ours']:.2f} | `--sparsity_type 2:4` |" in lines
    assert run(path, "--out", "out", "--dry_run", "--table", "table.md") == 0
    lines = Path("table.md").read_text().splitlines()
    assert f"| tiny/1B/wanda_2to4 | 222.25 | {row['ours']:.2f} | `--sparsity_type 2:4` |" in lines
    assert "| tiny/1B/magnitude_50 |  |  | `--prune_method magnitude` |" in lines


def test_a_family_of_zero_shot_tasks_has_their_mean_accuracy(family):
    write_tasks(Path())
    tiny_tokenizer().save_pretrained("model")
    tiny_llama(0).save_pretrained("model")

    def change(content):
        content["options"] |= {"eval_zero_shot": "true", "tasks_dir": "."}
        content["models"] = {"1B": "model"}
        del content["source"], content["published"]

    path = family(change)
    assert run(path, "--out", "out", "--only", "magnitude_50", "--table", "table.md") == 0
    dense, pruned = rows()
    measured = read_json("out/tiny/1B/magnitude_50/pruning_report.json")["run"]
    assert pruned["ours"] == measured["zero_shot"]["mean"]["acc"]
    assert dense["ours"] == measured["dense_zero_shot"]["mean"]["acc"]
    lines = Path("table.md").read_text().splitlines()
    assert f"| tiny/1B/dense |  | {100 * dense['ours']:.2f} |  |" in lines


def choices_in(cell):
    """The pattern and the sparsity that the name of a cell says."""
    method, *_, last = cell.name.split("_")
    if last in ("4to8", "2to4"):
        return last.replace("to", ":"), 0.5
    pattern = "equal_share" if method == "variant" else "unstructured"
    if "prune_granularity" in cell.options:
        pattern += f"_{cell.options['prune_granularity']}"
    return pattern, int(last) / 100


@pytest.mark.parametrize("path", FAMILIES, ids=lambda path: path.stem)
def test_every_cell_is_a_command_that_prunes_as_the_cell_is_named(path):
    content = yaml.safe_load(path.read_text())
    cells = list(sweep.read_cells(path))
    assert len(cells) == len(content["models"]) * len(content["cells"])
    one_model = next(iter(content["models"]))  # the commands of others differ in the model only
    for cell in cells:
        if cell.model != one_model:
            continue
        assert re.fullmatch(r"(?!dense$)[\w.-]*\w", cell.name)  # it names a folder beside `dense`
        groups = cli.parse(cell.command(Path("out")))[1]
        values = values_of(*groups.values())
        assert values["model"] == content["models"][cell.model]
        assert values["save"] == f"out/{cell.path}"
        method = cell.name.partition("_")[0]
        if method in ("magnitude", "sparsegpt", "wanda"):
            assert values["method"] == method
        if path.stem != "calibration":  # whose cells are named by the number of samples
            choices = groups["pruning"].choices
            assert (choices["pattern"], values["sparsity"]) == choices_in(cell)


@pytest.fixture
def swept(family):
    """The file of a family, and the arguments with which its cells have run; the last one fails."""
    arguments = (
        family(lambda content: content["cells"].update(broken={"sparsity_type": "5:10"})),
        "--out",
        "out",
        "--set",
        "batch_size=1",
    )
    assert run(*arguments) == 1
    return arguments


def test_published_numbers_stand_beside_what_was_measured(capsys, request):
    request.getfixturevalue("swept")  # here, since capsys has no output of fixtures before
    shown = capsys.readouterr().out
    dense, *others = rows()
    for text in ("111.50", "222.25", f"{dense['ours']:.2f}", "Published: Nobody 2024"):
        assert text in shown
    assert (dense["cell"], dense["published"]) == ("dense", 111.5)
    assert [(row["cell"], row["published"]) for row in others] == [
        ("magnitude_50", None),
        ("wanda_2to4", 222.25),
        ("broken", None),
    ]
    for row in others[:2]:
        report = read_json(Path("out/tiny/1B", row["cell"], "pruning_report.json"))
        assert row["ours"] == report["run"]["after"]
        assert dense["ours"] == report["run"]["before"]
        assert row["sparsity"] == 0.5

    # A cell that fails is named, and the others go on.
    for line, cell in zip(shown.splitlines(), others, strict=False):
        assert f"/3] tiny/1B/{cell['cell']}: " in line
    assert "[3/3] tiny/1B/broken: failed with status 2: wanda-lightning: error: " in shown
    assert "multiple of 10" in Path("out/tiny/1B/broken/output.txt").read_text()


@pytest.mark.parametrize("change", ["limit=3", "seqlen=16", "dtype=float32"])
def test_other_options_hide_the_published_numbers(family, change):
    """Even the same value: nobody compares it with the file."""
    cells = sweep.plan([family()], (), None, dict([change.split("=")]))
    assert [cell.published for cell in cells] == [{}, {}]


def test_a_sweep_resumes(swept, capsys):
    before = times()
    Path("out/tiny/1B/wanda_2to4/cell.json").unlink()  # as if it had been interrupted at the end
    assert run(*swept) == 1
    changed = {name for name, time in times().items() if before.get(name) != time}
    assert {Path(name).parts[2] for name in changed if "/" in name} == {"wanda_2to4", "broken"}

    # Finished cells with other options are run again only if that is asked for.
    before = times()
    other = (*swept[:3], "--set", "limit=2")
    assert run(*other) == 1
    assert (
        "tiny/1B/magnitude_50 has other options: batch_size was 1, is not given; limit"
        in capsys.readouterr().err
    )
    assert times() == before
    assert run(*other, "--only", "magnitude_50", "--overwrite") == 0
    assert rows()[1]["options"]["limit"] == "2"
