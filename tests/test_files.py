"""Files and folders that appear whole or not at all, on a file system that fails."""

import os
from pathlib import Path

import pytest

from wanda_lightning.files import refuse_nonempty, refuse_replacement, whole_file, whole_folder


def test_a_file_appears_whole(tmp_path):
    with whole_file(tmp_path / "new" / "a.json") as temporary:
        temporary.write_text("1")
        assert temporary.suffix == ".json"
        assert not (tmp_path / "new" / "a.json").exists()
    with pytest.raises(ZeroDivisionError), whole_file(tmp_path / "new" / "a.json") as temporary:
        temporary.write_text(f"{1 / 0}")
    assert [(f.name, f.read_text()) for f in (tmp_path / "new").iterdir()] == [("a.json", "1")]
    with pytest.raises(IsADirectoryError, match="is a folder"), whole_file(tmp_path / "new"):
        pass


def test_a_folder_appears_whole(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("empty", "new/deep"):
        with whole_folder(tmp_path / name) as temporary:
            (temporary / "a").write_text("1")
            assert not (tmp_path / name / "a").exists()
        assert [entry.name for entry in (tmp_path / name).iterdir()] == ["a"]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["empty", "new"]


def test_overwriting_replaces_everything(tmp_path):
    (tmp_path / "x").mkdir()
    for name in ("config.json", "old"):
        (tmp_path / "x" / name).touch()
    (tmp_path / "link").symlink_to(tmp_path / "x", target_is_directory=True)
    with whole_folder(tmp_path / "link", overwrite=True) as temporary:
        (temporary / "new").touch()
    assert (tmp_path / "link").is_symlink()
    assert [entry.name for entry in (tmp_path / "x").iterdir()] == ["new"]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["link", "x"]


def test_a_rename_that_fails_brings_the_old_folder_back(tmp_path, monkeypatch):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "config.json").touch()
    rename = os.replace

    def fail(source, target):
        if (Path(source) / "new").exists():
            raise OSError("disk gone")
        rename(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk gone"), whole_folder(tmp_path / "x", overwrite=True) as temporary:
        (temporary / "new").touch()
    assert [entry.name for entry in tmp_path.iterdir()] == ["x"]
    assert [entry.name for entry in (tmp_path / "x").iterdir()] == ["config.json"]


def test_a_folder_filled_meanwhile_is_kept(tmp_path):
    (tmp_path / "x").mkdir()
    with pytest.raises(OSError, match="not empty"), whole_folder(tmp_path / "x"):
        (tmp_path / "x" / "theirs").touch()
    assert [entry.name for entry in (tmp_path / "x").iterdir()] == ["theirs"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["x"]


def test_refusals(tmp_path, monkeypatch):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "old").touch()
    refuse_nonempty(tmp_path / "none")
    refuse_nonempty(tmp_path / "x", True)
    for refuse in (refuse_replacement, lambda *args: whole_folder(*args).__enter__()):
        with pytest.raises(FileExistsError, match="is not a model"):
            refuse(tmp_path / "x", True)
        with pytest.raises(FileExistsError, match=r"x is not empty.*overwrite"):
            refuse(tmp_path / "x")
        with pytest.raises(FileExistsError, match="is a file"):
            refuse(tmp_path / "x" / "old", True)
        with monkeypatch.context() as inside:
            (tmp_path / "x" / "config.json").touch()
            inside.chdir(tmp_path / "x")
            with pytest.raises(FileExistsError, match="holds the working directory"):
                refuse(".", True)
            (tmp_path / "x" / "config.json").unlink()
    assert [entry.name for entry in tmp_path.iterdir()] == ["x"]
