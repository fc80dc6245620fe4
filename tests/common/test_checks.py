"""Option values that are refused before any library is loaded."""

import sys

import numpy as np
import pytest

from wanda_lightning.common import checks
from wanda_lightning.common.checks import check_at_least, check_not_negative, check_positive, require_extra


def test_whole_numbers_and_missing_ones_pass():
    check_positive(limit=None, seqlen=1, batch_size=np.int64(3))
    check_at_least(0, num_workers=0)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0, "limit must be at least 1, but it is 0."),
        ("512", "limit must be a whole number, but it is '512'."),
        (2.0, "limit must be a whole number, but it is 2.0."),
        (True, "limit must be a whole number, but it is True."),
    ],
)
def test_other_values_are_refused(value, message):
    with pytest.raises(ValueError, match=r"limit must be") as caught:
        check_positive(limit=value)
    assert str(caught.value) == message
    with pytest.raises(ValueError, match=r"num_workers must be at least 0, but it is -1"):
        check_at_least(0, num_workers=-1)


@pytest.mark.parametrize("value", [-0.1, "1e-3", float("nan"), float("inf"), None])
def test_numbers_must_be_finite_and_not_negative(value):
    check_not_negative(lr=0.0, weight_decay=1)
    with pytest.raises(ValueError, match=rf"^lr must be a number of at least 0, but it is {value!r}\.$"):
        check_not_negative(lr=value)


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
    monkeypatch.setattr(checks, "CGROUPS", tmp_path)
    monkeypatch.setattr(checks, "OWN_CGROUPS", tmp_path / "groups")
    assert checks.available_memory() == 300_000
    with pytest.raises(ValueError, match=r"need 0\.0 GiB and 0\.0 GiB are free\. Use at most 37\."):
        checks.check_memory("--nsamples", 38, 1000)
    monkeypatch.setattr(checks, "OWN_CGROUPS", tmp_path / "none")
    assert checks.available_memory() > 10**8


def test_a_missing_package_names_its_extra(monkeypatch):
    require_extra("demo", "torch", purpose="Tensors")
    for name in ("gguf", "accelerate"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError) as caught:
        require_extra("demo", "gguf", "torch", "accelerate", purpose="GGUF files")
    assert str(caught.value) == "GGUF files need gguf and accelerate: pip install 'wanda_lightning[demo]'"
