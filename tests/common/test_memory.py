"""Free memory of the machine and of containers."""

import pytest
import torch

from wanda_lightning.common import memory


@pytest.mark.parametrize("version", [1, 2])
def test_a_container_may_use_less_than_the_machine(tmp_path, monkeypatch, version):
    limit, usage, cache = (
        ("memory.max", "memory.current", "inactive_file")
        if version == 2
        else ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    )
    root = tmp_path if version == 2 else tmp_path / "memory"
    (root / "outer/own").mkdir(parents=True)
    (tmp_path / "groups").write_text("0::/outer/own\n" if version == 2 else "3:cpu:/x\n7:hugetlb,memory:/outer/own\n")
    for folder, allowed in (("outer/own", "max"), ("outer", "900000"), (".", "500000")):
        (root / folder / limit).write_text(allowed)
        (root / folder / usage).write_text("300000")
        (root / folder / "memory.stat").write_text(f"anon 5\n{cache} 100000\n")
    monkeypatch.setattr(memory, "CGROUPS", tmp_path)
    monkeypatch.setattr(memory, "OWN_CGROUPS", tmp_path / "groups")
    assert memory.free_memory() == 300_000
    with pytest.raises(ValueError, match=r"need 0\.0 GiB and 0\.0 GiB are free\. Use at most 37\."):
        memory.check_memory("--nsamples", 38, 1000)
    monkeypatch.setattr(memory, "OWN_CGROUPS", tmp_path / "none")
    assert memory.free_memory() > 10**8


def test_an_accelerator_has_its_own_memory_if_it_says_how_much(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.accelerator, "get_memory_info", lambda device: asked.append(device) or (5, 10))
    assert memory.free_memory(torch.device("xpu", 1)) == 5
    assert asked == [torch.device("xpu", 1)]
    monkeypatch.undo()
    assert memory.free_memory(torch.device("meta")) > 10**8  # PyTorch knows nothing about it
