"""The benchmark on a GPU, here on the CPU with tiny models."""

import re
import sys
from pathlib import Path

import pytest
import torch
from support.zoo import save_llama_of_bytes

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import gpu
from result import Result, Runs, read_table
from steps import Step, measure_in_turn

SIZES = {"hidden": 64, "mlp": 128, "layers": 2, "heads": 4, "vocabulary": 300}
COUNTS = {"samples": 2, "seqlen": 16, "small_samples": 2, "small_seqlen": 16, "runs": 1}
ELSEWHERE = ("float32-cpu", "bfloat16-cpu", "one-process")  # what masks are compared with


@pytest.fixture
def script(tmp_path, monkeypatch, capsys):
    """Run the script on the CPU; return the exit status and what it printed."""

    def run(*arguments):
        sizes = [text for name, size in (SIZES | COUNTS).items() for text in (f"--{name}", str(size))]
        save = ["--device", "cpu", "--save", str(tmp_path / "runs")]
        monkeypatch.setattr(sys, "argv", ["gpu.py", *sizes, *save, *map(str, arguments)])
        status = gpu.main()
        return status, capsys.readouterr().out

    return run


@pytest.mark.nightly  # the whole script takes 20 s
@pytest.mark.filterwarnings("ignore")
def test_every_step_is_measured_and_saved_once(script, tmp_path):
    save_llama_of_bytes(tmp_path / "llama")
    arguments = "--model", tmp_path / "llama", "--folder", tmp_path
    status, out = script(*arguments)
    assert status == 0, out
    assert "Failed: 0" in out

    runs = {run.name: run for run in read_table("gpu", tmp_path / "runs")}
    started = {line.split(" left: ")[1] for line in out.splitlines() if " left: " in line}
    assert started == runs.keys()
    masks = [run for name, run in runs.items() if name.endswith(ELSEWHERE)]
    assert len(masks) == 9
    assert all(run.measured["mask_difference"] == 0 for run in masks)
    large = [run for run in runs.values() if run.model == "random Llama 2 x 64"]
    assert [run.method for run in large].count("wanda") == 3
    assert {run.method for run in large} == {"forward pass", "wanda", "balanced", "sparsegpt", "best"}
    for run in large:
        ratio = run.measured.get("ratio", 1.0)
        assert ratio == pytest.approx(
            run.measured["seconds"] / run.measured.get("plain_seconds", run.measured["seconds"])
        )
        assert run.measured["device_mib"] > 0
    training = [run.measured for run in runs.values() if run.method.startswith("KeepZeros")]
    assert [measured["ratio"] > 0 for measured in training] == [True] * 3
    assert not list(tmp_path.glob("tmp*"))  # the models on disk are gone

    status, out = script(*arguments)
    assert (status, " left: " in out, "Failed: 0" in out) == (0, False, True)


def test_a_mask_that_differs_is_close_to_a_tie():
    cpu, own = torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.tensor([[1.0, 4.0, 3.0, 4.0]])
    measured = gpu.near_ties([cpu], [own])  # the second entry takes the place of the third
    assert measured == {"score_difference": 0.25, "tie_distance": 0.25}  # of 2 and 3 from the threshold 2: 0 and 0.5
    assert gpu.near_ties([cpu], [cpu]) == {"score_difference": 0, "tie_distance": 0}
    keep = {"a": torch.tensor([[True, False]]), "b": torch.tensor([[True, False]] * 2)}
    assert gpu.difference(keep, keep | {"a": ~keep["a"]}) == pytest.approx(2 / 6)


def test_steps_that_fail_or_take_too_long_lose_no_other(tmp_path, capsys):
    def fail():
        raise MemoryError("too large")

    def step(method, measure, expected=0.0, obstacle=""):
        return Step(Result(model="m", method=method), measure, lambda: expected, obstacle)

    def fine():
        return {"seconds": 1.0}

    steps = [step("bad", fail), step("good", fine), step("long", fine, 61), step("no", fine, 0, "needs a GPU")]
    assert measure_in_turn(steps, Runs(str(tmp_path), "gpu"), minutes=1) == 1
    assert [run.method for run in read_table("gpu", tmp_path)] == ["good"]
    out, err = capsys.readouterr()
    assert re.sub(r"\d+ s were", "some s were", out).splitlines()[-5:] == [
        "Not run: 2",
        "  m-long-dense: about 61 s, and some s were left",
        "  m-no-dense: needs a GPU",
        "Failed: 1",
        "  m-bad-dense: MemoryError",
    ]
    assert "MemoryError: too large" in err
    assert measure_in_turn(steps[1:2], Runs(str(tmp_path), "gpu"), minutes=0) == 0


def test_without_a_gpu_the_device_is_refused(script, capsys):
    if torch.accelerator.is_available():
        pytest.skip("needs a machine without a GPU")
    with pytest.raises(SystemExit):
        script("--device", "cuda")
    assert "--device cuda needs an accelerator" in capsys.readouterr().err
