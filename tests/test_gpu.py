"""The benchmark on a GPU, here on the CPU with tiny models."""

import sys
from pathlib import Path

import pytest
from support.zoo import save_llama_of_bytes

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import gpu
from result import read_table

SIZES = {"hidden": 64, "mlp": 128, "layers": 2, "heads": 4, "vocabulary": 300, "samples": 2, "seqlen": 16}


@pytest.mark.nightly  # the whole script takes 20 s
@pytest.mark.filterwarnings("ignore")
def test_every_step_is_measured_and_saved_once(tmp_path, monkeypatch, capsys):
    save_llama_of_bytes(tmp_path / "llama")
    monkeypatch.setattr(gpu, "SMALL", (2, 16))
    sizes = [text for name, size in SIZES.items() for text in (f"--{name}", str(size))]
    places = ["--model", f"{tmp_path}/llama", "--folder", f"{tmp_path}", "--save", f"{tmp_path}/runs"]
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", *sizes, *places])
    gpu.main()
    runs = {run.name: run for run in read_table("gpu", tmp_path / "runs")}
    assert {line.split(":")[0] for line in capsys.readouterr().out.splitlines()} == runs.keys()
    assert [run.measured["mask_difference"] for name, run in runs.items() if name.startswith("llama")] == [0] * 8
    large = [run for run in runs.values() if run.model == "random Llama 2 x 64"]
    assert sorted(run.method for run in large) == ["balanced", "best", "forward pass", "sparsegpt", *["wanda"] * 3]
    for run in large:
        assert run.measured["device_mib"] > 0
        assert run.measured.get("ratio", 1) > 0
    assert not list(tmp_path.glob("tmp*"))  # the models on disk are gone
    gpu.main()
    assert capsys.readouterr().out == ""
