"""Files and folders are written as a whole or not at all, also by a process that is killed."""

import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from wanda_lightning.common.atomic_write import (
    atomic_folder,
    atomic_write,
    list_entries,
    require_space,
    require_writable,
)


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


def test_a_file_appears_whole(tmp_path):
    with atomic_write(tmp_path / "new" / "a.json") as temporary:
        temporary.write_text("1")
        assert temporary.suffix == ".json"
        assert not (tmp_path / "new" / "a.json").exists()
    with pytest.raises(ZeroDivisionError), atomic_write(tmp_path / "new" / "a.json") as temporary:
        temporary.write_text(f"{1 / 0}")
    assert [(f.name, f.read_text()) for f in (tmp_path / "new").iterdir()] == [("a.json", "1")]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs the names of open files that Linux shows")
def test_what_is_new_is_on_the_disk_before_it_gets_its_name_and_before_what_is_old_goes(tmp_path, monkeypatch):
    steps, fsync, replace, rmtree = [], os.fsync, os.replace, shutil.rmtree
    monkeypatch.setattr(os, "fsync", lambda file: (steps.append(os.readlink(f"/proc/self/fd/{file}")), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda old, new: (steps.append((str(old), str(new))), replace(old, new)))
    monkeypatch.setattr(shutil, "rmtree", lambda path, **given: (steps.append("delete"), rmtree(path, **given)))
    with atomic_write(tmp_path / "a.json") as temporary:
        temporary.write_text("1")
    assert steps == [str(temporary), (str(temporary), str(tmp_path / "a.json")), str(tmp_path)]
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "config.json").touch()
    steps.clear()
    with atomic_folder(tmp_path / "x", overwrite=True) as new:
        (new / "config.json").touch()
    target = str(tmp_path / "x")
    assert steps[:2] == [str(new / "config.json"), str(new)]
    assert steps[2][0] == target
    assert steps[3:6] == [(str(new), target), str(tmp_path), "delete"]


@pytest.mark.parametrize("name", ["empty", "new/deep", "x" * 255, "."])
def test_a_folder_appears_whole(tmp_path, monkeypatch, name):
    (tmp_path / "empty").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / ("here" if name == "." else "."))  # which must still be there
    with pytest.raises(ZeroDivisionError), atomic_folder(name) as temporary:
        (temporary / "a").write_text(f"{1 / 0}")
    with atomic_folder(name) as temporary:
        (temporary / "a").mkdir()
        (temporary / "config.json").touch()
        assert list_entries(Path(name)) == []
    assert names(Path(name)) == ["a", "config.json"]
    assert names(Path(name) / "a") == []
    Path("log.txt").touch()


@pytest.mark.parametrize(
    "write", [lambda new: save_file({"a": torch.ones(99)}, new), lambda new: new.write_text("a" * 99)]
)
def test_a_full_disk_is_named(tmp_path, write):
    before, largest = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, largest))  # bytes
    try:
        with pytest.raises(OSError, match=r"m\.safetensors cannot be written: .*File too large"):  # noqa: SIM117
            with atomic_write(tmp_path / "m.safetensors") as new:
                write(new)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, largest))
    assert not list(tmp_path.iterdir())


def test_overwriting_replaces_everything(tmp_path):
    (tmp_path / "x").mkdir()
    for name in ("config.json", "old"):
        (tmp_path / "x" / name).touch()
    (tmp_path / "link").symlink_to(tmp_path / "x", target_is_directory=True)
    with atomic_folder(tmp_path / "link", overwrite=True) as temporary:
        (temporary / "new").touch()
    assert (tmp_path / "link").is_symlink()
    assert names(tmp_path / "x") == ["new"]
    assert names(tmp_path) == ["link", "x"]


@pytest.mark.parametrize("before", ["missing", "empty"])
def test_a_folder_whose_place_is_taken_meanwhile_is_not_lost(tmp_path, before):
    def write(place, theirs):
        with atomic_folder(place) as new:
            (new / "ours").touch()
            theirs.parent.mkdir(exist_ok=True)
            theirs.touch()

    if before == "empty":
        (tmp_path / "x").mkdir()
    with pytest.raises(OSError, match="x exists and is not empty") as caught:
        write(tmp_path / "x", tmp_path / "x" / "theirs")
    (new,) = tmp_path.rglob(".wanda-*")
    assert f"but the complete folder is {new}" in str(caught.value)
    assert names(new) == ["ours"]
    assert list_entries(tmp_path / "x") == [tmp_path / "x" / "theirs"]


def test_a_folder_that_cannot_get_its_name_is_not_lost(tmp_path, monkeypatch):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "config.json").touch()
    rename = os.replace

    def fail(source, target):
        if (Path(source) / "ours").exists():
            raise OSError("disk gone")
        rename(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk gone") as caught, atomic_folder(tmp_path / "x", overwrite=True) as new:
        (new / "ours").touch()
    assert names(new) == ["ours"]
    (old,) = (folder for folder in tmp_path.iterdir() if folder != new)
    assert f"but the complete folder is {new}, and the one that it replaces is {old}." in str(caught.value)
    assert names(old) == ["config.json"]


REFUSED = [
    ("full", True, "model", "full must be empty or a model"),
    ("full", False, "model", "full exists and is not empty.* overwrite"),
    ("full", False, "folder", "full exists and is not empty"),
    ("full", True, "file", "full must be a file"),
    ("full/file", False, "file", "file exists"),
    ("full/file", True, "model", "file must be a folder"),
    (".", True, "model", r"\. must be empty or a model \(with config.json, not the working directory"),
    ("full/file/x", True, "file", "Not a directory"),
    ("y" * 256, False, "folder", "File name too long"),
    ("y" * 256 + "/x", False, "model", "File name too long"),
    ("loop/x", True, "model", "symbolic links"),
]


@pytest.mark.parametrize(("place", "overwrite", "kind", "message"), REFUSED)
def test_a_place_that_cannot_be_written_is_refused(tmp_path, monkeypatch, place, overwrite, kind, message):
    (tmp_path / "full").mkdir()
    for file in ("full/file", "config.json"):
        (tmp_path / file).touch()
    (tmp_path / "loop").symlink_to("loop")
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OSError, match=message):
        require_writable(place, overwrite, kind)
    for allowed in (("new/deep",), ("full", True, "folder"), ("full/file", True, "file"), ("new", False, "file")):
        require_writable(*allowed)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_disk_that_is_too_small_is_refused(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=2_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    require_space(tmp_path / "new" / "x", 2_000_000)
    with pytest.raises(OSError, match=r"x needs 3\.00 MB, but 2\.00 MB are free on its disk"):
        require_space(tmp_path / "new" / "x", 3_000_000)


STEPS = """
import os, shutil, sys
from pathlib import Path
from wanda_lightning.common.atomic_write import atomic_folder
folder, last, steps = Path(sys.argv[1]), int(sys.argv[2]), 0

def counted(step):
    def count(*names, **options):
        global steps
        steps += 1
        if steps > last:
            os.kill(os.getpid(), 9)
        step(*names, **options)
    return count

os.replace, os.unlink = map(counted, (os.replace, os.unlink))
with atomic_folder(folder, overwrite=True) as new:
    for name in ("config.json", "model.safetensors", "other"):
        (new / name).write_text("new")
"""


@pytest.mark.parametrize("old", [{}, {"config.json": "old", "model.safetensors": "old"}], ids=["empty", "model"])
def test_a_run_that_is_killed_at_any_step_loses_no_model(tmp_path, old):
    """There is no half of a model that could be loaded: if there is a `config.json`, all else is there."""
    whole = dict.fromkeys(("config.json", "model.safetensors", "other"), "new")
    for step in range(20):
        folder = tmp_path / str(step) / "model"
        folder.mkdir(parents=True)
        for name, text in old.items():
            (folder / name).write_text(text)
        ended = subprocess.run([sys.executable, "-c", STEPS, folder, str(step)], capture_output=True, text=True)
        places = [place for place in (folder, *folder.parent.glob(".wanda-*")) if place.is_dir()]
        found = [{file.name: file.read_text() for file in place.iterdir() if file.is_file()} for place in places]
        assert "config.json" not in found[0] or found[0] in (old, whole)
        assert not old or old in found or whole in found
        if ended.returncode == 0:
            break
    assert ended.returncode == 0, ended.stderr
    assert found[0] == whole
    assert step > 1
