"""Files and folders are written atomically, also on a file system that fails."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError

from wanda_lightning.common import killed_runs
from wanda_lightning.common.refuse_path import (
    PROGRESS_NAME,
    refuse_existing,
    refuse_full,
    refuse_nonempty,
    refuse_replacement,
    refuse_unresumable,
)
from wanda_lightning.common.write_whole import reserved, unclaimed, whole_file, whole_folder


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


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs the names of open files that Linux shows")
def test_a_file_is_on_the_disk_before_its_name_and_its_name_before_the_next_step(tmp_path, monkeypatch):
    steps, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (steps.append(os.readlink(f"/proc/self/fd/{file}")), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda old, new: (steps.append((str(old), str(new))), replace(old, new)))
    with whole_file(tmp_path / "a.json") as temporary:
        temporary.write_text("1")
    target = str(tmp_path / "a.json")
    assert steps == [str(temporary), (str(temporary), target), str(tmp_path)]


def test_a_folder_that_cannot_be_flushed_is_no_error(tmp_path, monkeypatch):
    def refusing(descriptor, fsync=os.fsync):
        if os.path.isdir(descriptor):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refusing)
    with whole_file(tmp_path / "a.json") as temporary:
        temporary.write_text("1")
    assert (tmp_path / "a.json").read_text() == "1"


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
        with pytest.raises(FileExistsError, match="are not a model"):
            refuse(tmp_path / "x", True)
        with pytest.raises(FileExistsError, match=r"x is a folder that is not empty.*overwrite"):
            refuse(tmp_path / "x")
        with pytest.raises(FileExistsError, match="is a file"):
            refuse(tmp_path / "x" / "old", True)
        with monkeypatch.context() as inside:
            (tmp_path / "x" / "config.json").touch()
            inside.chdir(tmp_path / "x")
            with pytest.raises(FileExistsError, match="contains the working directory"):
                refuse(".", True)
            (tmp_path / "x" / "config.json").unlink()
    assert [entry.name for entry in tmp_path.iterdir()] == ["x"]


# ---- places that cannot be written


PLACES = {
    "file as parent": (lambda folder: folder / "file" / "x", "file is a file, not a folder"),
    "name too long": (lambda folder: folder / ("x" * 256), "File name too long"),
    "name too long inside": (lambda folder: folder / ("y" * 300) / "x", "File name too long"),
}


def test_links_that_form_a_loop_are_refused(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    for refuse in (refuse_existing, refuse_nonempty, refuse_replacement, refuse_unresumable):
        for path in (tmp_path / "loop", tmp_path / "loop/x"):
            with pytest.raises(OSError, match=f"^{path} cannot be written: .*symbolic links. Choose another path.$"):
                refuse(path, True)


@pytest.mark.parametrize("refuse", [refuse_existing, refuse_nonempty, refuse_replacement])
@pytest.mark.parametrize("place", PLACES)
def test_places_that_cannot_be_written_are_named(tmp_path, refuse, place):
    (tmp_path / "file").touch()
    make, reason = PLACES[place]
    with pytest.raises(OSError, match=f"cannot be written: .*{reason}. Choose another path.") as caught:
        refuse(make(tmp_path))
    assert str(make(tmp_path)) in str(caught.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_processes_that_check_the_same_path_do_not_fail(tmp_path, monkeypatch):
    def cleaned_up_by_another(folder, *args, mkdir=Path.mkdir, **kwargs):
        mkdir(folder, *args, **kwargs)
        folder.rmdir()

    monkeypatch.setattr(Path, "mkdir", cleaned_up_by_another)
    refuse_nonempty(tmp_path / "out")


def test_names_near_the_limit_and_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with whole_file("~/" + "x" * 250 + ".json") as temporary:
        temporary.write_text("1")
    with whole_folder("~/" + "y" * 255) as temporary:
        (temporary / "a").touch()
    assert sorted(len(entry.name) for entry in tmp_path.iterdir()) == [255, 255]
    (tmp_path / "here").mkdir()
    monkeypatch.chdir("here")
    with whole_folder(".") as new:  # the process runs in it
        (new / "config.json").touch()
    Path("log.txt").touch()
    assert sorted(os.listdir(tmp_path / "here")) == ["config.json", "log.txt"]


# ---- folders that cannot be renamed


@pytest.fixture(params=["mounted", "simulated"])
def mount_point(request, tmp_path, monkeypatch):
    """A folder that cannot be renamed: a real mount where that is allowed, else a simulated one."""
    folder = tmp_path / "volume"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(folder)]
    if request.param == "mounted" and subprocess.run(command, capture_output=True).returncode == 0:
        yield folder
        subprocess.run(["umount", str(folder)], check=True)
        return
    rename, is_mount = os.replace, os.path.ismount

    def busy(source, target):
        if folder in (Path(source), Path(target)):
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        rename(source, target)

    monkeypatch.setattr(os, "replace", busy)
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == folder or is_mount(path))
    yield folder


def test_a_mount_point_is_written_into(mount_point):
    (mount_point / "lost+found").mkdir()
    for text in ("first", "second"):
        with whole_folder(mount_point, overwrite=text == "second") as temporary:
            (temporary / "config.json").write_text(text)
            (temporary / f"{text}.bin").touch()
        assert {entry.name for entry in mount_point.iterdir()} == {"config.json", f"{text}.bin", "lost+found"}
        assert (mount_point / "config.json").read_text() == text


def test_a_failed_write_into_a_mount_point_brings_the_old_files_back(mount_point, monkeypatch):
    for name in ("config.json", "old"):
        (mount_point / name).write_text("old")
    rename = os.replace

    def fail(source, target):
        if Path(target) == mount_point / "config.json" and Path(source).read_text() == "new":
            raise OSError("disk gone")
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="disk gone"), whole_folder(mount_point, overwrite=True) as temporary:
            _ = [(temporary / name).write_text("new") for name in ("config.json", "added")]
    assert {entry.name: entry.read_text() for entry in mount_point.iterdir()} == {"config.json": "old", "old": "old"}


# ---- full disks


def test_a_disk_that_is_too_small_is_refused(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=2_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    refuse_full(tmp_path / "new" / "x", 2_000_000)
    with pytest.raises(OSError, match=r"x needs 3\.00 MB, but 2\.00 MB are free on its disk"):
        refuse_full(tmp_path / "new" / "x", 3_000_000)


@pytest.mark.parametrize("reason", ["No space left on device (os error 28)", "File too large (os error 27)"])
def test_a_full_disk_is_one_clear_error(tmp_path, reason):
    def fill(folder):
        (folder / "half").write_bytes(b"half")
        raise SafetensorError(f"Error while serializing: I/O error: {reason}")

    message = rf"x cannot be written: {reason.partition(' (')[0]}, after 0\.00 MB; .* MB are free on the disk"
    with pytest.raises(OSError, match=message), whole_folder(tmp_path / "x") as temporary:
        fill(temporary)
    assert list(tmp_path.iterdir()) == []


# ---- killed runs


KILLED = """
import sys, time
from wanda_lightning.common.write_whole import whole_file, whole_folder
with whole_folder(sys.argv[1]) as folder, whole_file(sys.argv[2]) as file:
    (folder / "half").write_text("half")
    file.write_text("half")
    print("in the middle", flush=True)
    time.sleep(60)
"""


def test_what_a_killed_run_left_is_removed_by_the_next(tmp_path):
    places = [str(tmp_path / "model"), str(tmp_path / "results.json")]
    process = subprocess.Popen([sys.executable, "-c", KILLED, *places], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "in the middle\n"
        half = sorted(entry.name for entry in tmp_path.iterdir())
        with pytest.raises(FileExistsError, match="is reserved by another run"):
            refuse_replacement(places[0])
        refuse_existing(places[1])
        assert sorted(entry.name for entry in tmp_path.iterdir()) == half
        assert len(half) == 2
    finally:
        process.kill()
        process.communicate()
    refuse_existing(places[1])
    with whole_folder(places[0]) as temporary:
        (temporary / "whole").touch()
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]
    assert [entry.name for entry in (tmp_path / "model").iterdir()] == ["whole"]


def test_a_folder_that_a_killed_run_moved_aside_comes_back(tmp_path):
    aside = tmp_path / f"{killed_runs._label(tmp_path / 'model')}12345678"
    (aside / killed_runs._OLD).mkdir(parents=True)
    (aside / killed_runs._OLD / "config.json").write_text("old")
    with pytest.raises(FileExistsError, match="not empty"):
        refuse_replacement(tmp_path / "model")
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.json")] == ["model/config.json"]


def test_a_run_continues_in_a_folder_that_a_killed_run_moved_aside(tmp_path):
    old = tmp_path / f"{killed_runs._label(tmp_path / 'model')}12345678" / killed_runs._OLD
    old.mkdir(parents=True)
    (old / PROGRESS_NAME).touch()
    refuse_unresumable(tmp_path / "model")
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.json")] == [f"model/{PROGRESS_NAME}"]


def test_a_half_written_folder_is_not_taken_for_an_old_one(tmp_path):
    half = tmp_path / f"{killed_runs._label(tmp_path / 'model')}12345678"
    (half / "model").mkdir(parents=True)  # a folder in the model with the name of the model
    refuse_replacement(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


STEPS = """
import os, sys
from pathlib import Path
from wanda_lightning.common.write_whole import whole_folder
folder, last, steps = Path(sys.argv[1]), int(sys.argv[2]), 0
os.path.ismount = lambda path: len(sys.argv) > 3

def counted(step):
    def count(*names, **options):
        global steps
        steps += 1
        if steps > last:
            os.kill(os.getpid(), 9)
        step(*names, **options)
    return count

os.replace, os.rename, os.unlink = map(counted, (os.replace, os.rename, os.unlink))
with whole_folder(folder, overwrite=True) as new:
    for name in ("config.json", "model.safetensors", "other"):
        (new / name).write_text("new")
"""


@pytest.mark.parametrize("mounted", [[], ["mounted"]], ids=["renamed", "mounted"])
def test_a_run_that_is_killed_at_any_rename_or_deletion_leaves_one_whole_model(tmp_path, mounted):
    old, whole = {"config.json": "old", "model.safetensors": "old"}, []
    for step in range(40):
        folder = tmp_path / str(step) / "model"
        folder.mkdir(parents=True)
        for name, text in old.items():
            (folder / name).write_text(text)
        command = [sys.executable, "-c", STEPS, folder, str(step), *mounted]
        ended = subprocess.run(command, capture_output=True, text=True)
        with pytest.raises(FileExistsError, match="not empty"):
            refuse_replacement(folder)  # the next run
        found = {file.name: file.read_text() for file in folder.iterdir()}
        assert found in (old, dict.fromkeys((*old, "other"), "new")), step
        whole.append(found == old)
        if ended.returncode == 0:
            break
    assert ended.returncode == 0, ended.stderr
    assert whole == sorted(whole, reverse=True)
    assert not whole[-1]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs the names of open files that Linux shows")
def test_a_folder_is_on_the_disk_before_the_old_one_is_deleted(tmp_path, monkeypatch):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "config.json").touch()
    steps, fsync, rmtree = [], os.fsync, shutil.rmtree
    monkeypatch.setattr(os, "fsync", lambda file: (steps.append(os.readlink(f"/proc/self/fd/{file}")), fsync(file)))
    monkeypatch.setattr(shutil, "rmtree", lambda path, **given: (steps.append("delete"), rmtree(path, **given)))
    with whole_folder(tmp_path / "x", overwrite=True) as new:
        (new / "config.json").touch()
    assert steps[: steps.index("delete")] == [str(new), str(new / "config.json"), str(tmp_path)]


def test_a_reserved_folder_can_be_written_by_its_own_process_only(tmp_path):
    line = [sys.executable, "-c", KILLED, tmp_path / "x", tmp_path / "y"]
    with reserved(tmp_path / "x"):
        refused = subprocess.run(line, capture_output=True, text=True)
        assert "is reserved by another run" in refused.stderr
        with whole_folder(tmp_path / "x") as new:
            (new / "config.json").touch()
    assert os.listdir(tmp_path) == ["x"]
    with reserved(tmp_path / "new/deep"):
        pass
    assert os.listdir(tmp_path) == ["x"]


def test_two_runs_do_not_replace_each_other(tmp_path):
    def is_free(place):
        return not (place / "report.json").exists()

    assert unclaimed(tmp_path / "out", is_free) == tmp_path / "out"
    for name in ("out", "out-2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").touch()
    assert unclaimed(tmp_path / "out", is_free) == tmp_path / "out-3"
