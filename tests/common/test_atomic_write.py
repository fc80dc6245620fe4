"""Files and folders are written as a whole or not at all, also by a process that is killed."""

import os
import resource
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
    require_writable,
)


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


def test_a_file_appears_whole(tmp_path):
    file = tmp_path / "new" / "a.json"
    with atomic_write(file) as temporary:
        temporary.write_text("1")
        assert temporary.suffix == ".json"
        assert not file.exists()
    assert file.read_text() == "1"


def test_an_error_leaves_the_file_as_it_was(tmp_path):
    file = tmp_path / "a.json"
    file.write_text("1")
    with pytest.raises(ZeroDivisionError), atomic_write(file) as temporary:
        temporary.write_text(f"{1 / 0}")
    assert file.read_text() == "1"
    assert names(tmp_path) == ["a.json"]


@pytest.mark.skipif(
    not Path("/proc/self/fd").exists(), reason="needs the names of open files that Linux shows"
)
def test_what_is_new_is_on_the_disk_before_what_is_old_goes(monkeypatch, tmp_path):
    model = tmp_path / "x"
    link = tmp_path / "link"
    (model / "folder").mkdir(parents=True)
    for name in ("config.json", "old"):
        (model / name).touch()
    link.symlink_to(model, target_is_directory=True)

    steps = []
    for name, described in (
        ("fsync", lambda file: os.readlink(f"/proc/self/fd/{file}")),
        ("replace", lambda old, new: (str(old), str(new))),
        ("unlink", lambda path, **_: f"delete {path}"),
    ):
        monkeypatch.setattr(os, name, recorded(getattr(os, name), described, steps))
    with atomic_folder(link, overwrite=True) as new:
        (new / "config.json").touch()

    assert names(model) == ["config.json"]
    assert names(tmp_path) == ["link", "x"]
    assert link.is_symlink()
    config = str(new / "config.json")
    assert steps[:3] == [config, str(new), f"delete {model}/config.json"]
    assert steps[-3:] == [config, (config, f"{model}/config.json"), str(model)]


def recorded(function, described, steps):
    """A function that notes each call of another one, and calls it."""

    def call(*arguments, **options):
        steps.append(described(*arguments, **options))
        function(*arguments, **options)

    return call


@pytest.fixture(params=["empty", "new/deep", "x" * 255, "."])
def place(request, tmp_path, monkeypatch):
    """A folder that does not exist or is empty, perhaps the working directory."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here" if request.param == "." else tmp_path)
    return Path(request.param)


def test_a_folder_appears_whole(place):
    with atomic_folder(place) as temporary:
        (temporary / "a").mkdir()
        (temporary / "config.json").touch()
        assert list_entries(place) == []
    assert names(place) == ["a", "config.json"]
    assert names(place / "a") == []
    Path("log.txt").touch()  # the working directory is still there


def test_an_error_leaves_the_place_of_a_folder_as_it_was(place):
    existed = place.exists()
    with pytest.raises(ZeroDivisionError), atomic_folder(place) as temporary:
        (temporary / "a").write_text(f"{1 / 0}")
    assert place.exists() == existed
    assert not existed or names(place) == []


def test_nothing_is_left_on_a_full_disk(tmp_path):
    before, largest = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, largest))  # bytes
    try:
        with (
            pytest.raises(Exception, match=r"File too large"),
            atomic_write(tmp_path / "m.safetensors") as new,
        ):
            save_file({"a": torch.ones(99)}, new)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, largest))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("theirs", [["theirs"], []])
def test_a_folder_that_cannot_be_completed_is_not_lost(tmp_path, monkeypatch, theirs):
    """Its place is taken meanwhile, or its files cannot be moved."""
    writing = atomic_folder(tmp_path)
    new = writing.__enter__()
    (new / "ours").touch()
    for name in theirs:
        (tmp_path / name).touch()
    monkeypatch.setattr(os, "replace", lambda *_: os.stat("gone"))
    with pytest.raises(OSError, match=r"but the files that it lacks are in .*\.wanda-"):
        writing.__exit__(None, None, None)
    assert names(new) == ["ours"]
    assert [entry.name for entry in list_entries(tmp_path)] == theirs


# A path, a kind, whether it may replace, and what is said about it.
REFUSED = r"""
full model overwrite: full must be empty or a model
full folder new: full exists and is not empty.* overwrite
full/file file new: file exists
full/file model overwrite: file must be a folder
. model overwrite: \. must be empty or a model \(with config.json, not the working directory
full/file/x file overwrite: Not a directory
loop/x model overwrite: symbolic links
/proc/x/a.html file overwrite: ^/proc/x/a\.html cannot be written, since /.* takes no new files
"""


@pytest.fixture
def untouched(tmp_path, monkeypatch):
    """A working directory with a full folder and a link to itself, which stay as they are."""
    (tmp_path / "full").mkdir()
    for file in ("full/file", "config.json"):
        (tmp_path / file).touch()
    (tmp_path / "loop").symlink_to("loop")
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    yield
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("case", REFUSED.strip().splitlines())
def test_a_place_that_cannot_be_written_is_refused(untouched, case):
    place, message = case.split(": ")
    path, kind, mode = place.split()
    with pytest.raises(OSError, match=message):
        require_writable(path, mode == "overwrite", kind)


def test_a_place_that_can_be_written_is_accepted(untouched):
    require_writable("new/deep")
    require_writable("new", kind="file")
    require_writable("full", overwrite=True, kind="folder")
    require_writable("full/file", overwrite=True, kind="file")


STEPS = """
import os, sys
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


def texts(paths):
    return {path.name: path.read_text() for path in paths if path.is_file()}


@pytest.mark.parametrize("old", [{}, {"config.json": "old", "model.safetensors": "old"}])
def test_a_run_that_is_killed_at_any_step_loses_no_model(tmp_path, old):
    """There is no half of a model that could be loaded: if there is a `config.json`, all else is there."""
    whole = dict.fromkeys(("config.json", "model.safetensors", "other"), "new")
    for step in range(20):
        folder = tmp_path / str(step) / "model"
        folder.mkdir(parents=True)
        for name, text in old.items():
            (folder / name).write_text(text)
        ended = subprocess.run(
            [sys.executable, "-c", STEPS, folder, str(step)], capture_output=True, text=True
        )
        found = texts(folder.iterdir())
        assert "config.json" not in found or found in (old, whole)
        new = {name: text for name, text in texts(folder.rglob("*")).items() if text == "new"}
        assert (bool(old) and found == old) or new == whole
        if ended.returncode == 0:
            break
    assert (ended.returncode, found, step > 1) == (0, whole, True), ended.stderr
