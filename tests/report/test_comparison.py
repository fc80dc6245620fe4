"""Several prunings side by side."""

from dataclasses import replace

import pytest
from support.reports import Page, llama_report

pytest.importorskip("matplotlib", reason="pages need the extra report")

from wanda_lightning.report import comparison_table, groups_of, read_reports, write_comparison
from wanda_lightning.report.comparison import plots_of_group

RESULTS = {"wanda": (19.8, 40.0), "sparsegpt": (18.9, 81.0), "best": (17.2, 391.0)}


@pytest.fixture
def paths(tmp_path):
    for name, (perplexity, seconds) in RESULTS.items():
        llama_report(2, perplexity=perplexity, seconds=seconds).save(tmp_path / "out" / name)
    unmeasured = llama_report(2)
    unmeasured.run = None
    unmeasured.save(tmp_path / "out" / "callback")
    return [tmp_path / "out" / name / "pruning_report.json" for name in (*RESULTS, "callback")]


def test_a_page_with_a_table_and_two_figures(paths, tmp_path):
    write_comparison(read_reports(paths), tmp_path / "compare.html")
    page = Page(tmp_path / "compare.html")
    assert page.open == []
    assert "4 prunings compared" in page.text
    for name, (perplexity, _) in RESULTS.items():
        assert f" {name} " in page.text
        assert f" {perplexity:.2f} " in page.text
    assert sum(tag == "svg" for tag, _ in page.tags) == 4
    assert "These prunings were not measured" in page.text
    assert "http" not in page.source.replace('http-equiv="Content-Security-Policy"', "")


def test_results_are_compared_within_one_model_and_data_set(paths):
    reports = read_reports(paths)
    other = llama_report(2, name="other")
    images = llama_report(2)
    images.run = replace(images.run, metric="top-1", before=0.9, after=0.8, data="digits, 360 images")
    groups = groups_of(reports | {"other": other, "images": images})
    assert [list(group.reports) for group in groups] == [[*RESULTS], ["other"], ["images"], ["callback"]]
    assert [group.dense for group in groups] == [16.06, 16.06, 0.9, None]
    assert [len(plots_of_group(0, group)) for group in groups] == [2, 2, 2, 0]
    (row,) = comparison_table(groups[2]).rows
    assert [cell.text for cell in row][-4:] == ["90.00%", "80.00%", "-10.00 points", "1 min 36 s"]
    assert [cell.value for cell in row][-4:] == pytest.approx([0.9, 0.8, -0.1, 95.5])


def test_a_picture_of_the_same(paths, tmp_path):
    write_comparison(read_reports(paths), tmp_path / "compare.png")
    assert (tmp_path / "compare.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match=r"report must be a page, since no pruning has results"):
        write_comparison(read_reports(paths[-1:]), tmp_path / "none.png")


def test_names_tell_the_paths_apart(tmp_path):
    report = llama_report(1)
    places = [tmp_path / first / second for first in ("a", "b") for second in ("x", "y")]
    files = [report.save(place) for place in places]
    assert list(read_reports(files)) == ["a/x", "a/y", "b/x", "b/y"]
    assert list(read_reports(files[:2])) == ["x", "y"]
    assert list(read_reports([files[0], files[2]])) == ["a", "b"]
    assert list(read_reports(places)) == ["a/x", "a/y", "b/x", "b/y"]
    (tmp_path / "one.json").write_text(report.to_json())
    assert list(read_reports([tmp_path / "one.json", files[0]])) == ["one", "x"]
    assert len(read_reports([files[0], files[0]])) == 1


def test_a_folder_without_a_report_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"^{tmp_path} has no pruning_report\.json\. Give a folder of prune"):
        read_reports([tmp_path])


@pytest.mark.parametrize("content", ["", "[]", "3", "{}", '{"layers": 3}', "\ud83d\ude00", b"\xff\xfe"])
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "other.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    with pytest.raises(ValueError, match=r"other\.json is not the report of a pruning"):
        read_reports([path])
