"""Activations that are moved: the same values in the same tensors, wherever they are."""

import gc
import itertools
import os
import resource
import threading
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.chains import Chain, Mlp, through, vectors
from support.pairwise import with_nightly
from support.parking import hide, is_hidden
from support.samples import as_samples, samples_of
from support.zoo import ZOO
from torch import nn

from wanda_lightning.calibration.lockstep import lockstep
from wanda_lightning.config import PruningConfig
from wanda_lightning.engine.prune import prune_as
from wanda_lightning.engine.run import WeightStore
from wanda_lightning.streaming import disk_and_host_parking as parking
from wanda_lightning.streaming.disk_and_host_parking import DiskParking, HostParking

WIDE = 1 << 15  # numbers, which take more memory than the smallest that is moved


def is_in_a_file(tensor):
    return (tensor.untyped_storage().filename or "").startswith("/dev/fd/")


@pytest.fixture
def all_sizes(monkeypatch):
    monkeypatch.setattr(parking, "SMALLEST", 0)


@pytest.fixture(autouse=True)
def hidden_host(monkeypatch):
    monkeypatch.setattr(parking, "_copied", hide)


def makers(folder):
    """What makes the parking of a batch. For the host, a CPU takes the place of an accelerator."""
    return {"disk": partial(DiskParking, folder), "host": partial(HostParking, torch.device("cpu:0"), {})}


@torch.no_grad()
def test_tensors_keep_their_values_and_what_they_share(tmp_path):
    x = torch.randn(4, WIDE)
    views = [x[1:], x.t(), x.view(2, 2, WIDE).transpose(0, 1)]
    copies, version, pointer = [each.clone() for each in (x, *views)], x._version, x.data_ptr()
    disk = DiskParking(tmp_path)
    disk.add(views)  # the tensor that they are views of is found through them
    disk.offload()
    assert all(map(is_in_a_file, (x, *views)))
    assert x.data_ptr() != pointer
    assert all(map(torch.equal, (x, *views), copies))
    assert [each.stride() for each in views] == [each.stride() for each in (x[1:], x.t(), views[2])]
    assert x._version == version
    x.add_(1)
    disk.offload()  # what was written into the file stays
    assert all(torch.equal(each, copy + 1) for each, copy in zip((x, *views), copies, strict=True))
    assert x._version == views[0]._version == version + 1


@torch.no_grad()
def test_what_a_function_returns_is_found(tmp_path):
    with DiskParking(tmp_path) as disk:
        x = torch.randn(WIDE)
        first, second = torch.stack([x, x]).add_(1).unbind()
    disk.offload()
    assert all(map(is_in_a_file, (x, first, second)))
    assert torch.equal(first, x + 1)


def test_files_vanish_with_their_tensors(tmp_path):
    before = len(os.listdir("/dev/fd"))
    tensors = [torch.randn(WIDE) for _ in range(20)]
    disk = DiskParking(tmp_path)
    disk.add(tensors)
    free = os.statvfs(tmp_path).f_bfree
    disk.offload()
    assert len(os.listdir("/dev/fd")) == before
    assert not list(tmp_path.iterdir())
    assert free - os.statvfs(tmp_path).f_bfree != 0
    assert str(tmp_path) in Path("/proc/self/maps").read_text()
    del tensors
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


SHARED = {
    "from NumPy": lambda: (torch.from_numpy(array := np.ones(WIDE, dtype=np.float32)), array),
    "to NumPy": lambda: (x := torch.ones(WIDE), x.numpy()),
    "to DLPack": lambda: (x := torch.ones(WIDE), np.from_dlpack(x)),
    "with an unknown view": lambda: (x := torch.ones(WIDE), x.detach()),
    "a weight": lambda: ((layer := nn.Linear(WIDE, 1)).weight.detach(), layer),
    "a parameter": lambda: (nn.Parameter(torch.ones(WIDE)), None),
    "saved by autograd": lambda: (x := torch.ones(WIDE, requires_grad=True) * 1, x.exp() * x),
    "of inference mode": torch.inference_mode()(lambda: (torch.ones(WIDE), None)),
    "conjugate": lambda: (torch.ones(WIDE, dtype=torch.complex64).conj(), None),
    "meta": lambda: (torch.ones(WIDE, device="meta"), None),
    "sparse": lambda: (torch.ones(WIDE).to_sparse(), None),
    "small": lambda: (torch.ones(8), None),
}


@pytest.mark.parametrize("make", SHARED.values(), ids=SHARED)
def test_memory_that_others_may_use_stays(tmp_path, make):
    x, other = make()
    pointer = x.data_ptr() if x.layout is torch.strided else None
    disk = DiskParking(tmp_path)
    disk.add([x])
    disk.offload()
    assert pointer is None or (x.data_ptr() == pointer and not is_in_a_file(x))
    del other


def test_a_full_disk_is_explained(tmp_path):
    disk, x = DiskParking(tmp_path), torch.randn(WIDE)
    disk.add(x)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"park='disk' .*131,072 bytes could not be written .* Free some space"):
            disk.offload()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not is_in_a_file(x)


@torch.no_grad()
def test_what_is_moved_to_the_host_comes_back():
    x = torch.randn(4, WIDE)
    views = [x[1:], x.t(), x.view(2, 2, WIDE).transpose(0, 1)]
    small, copies, version = torch.ones(8), [each.clone() for each in (x, *views)], x._version
    own, other = (make() for make in [makers(None)["host"]] * 2)
    own.add([*views, small])
    for _ in range(2):
        for _ in range(2):
            own.offload()
            assert all(map(is_hidden, (x, *views)))
            assert not is_hidden(small)
            assert not torch.equal(x, copies[0])
        own.restore()
        assert all(map(torch.equal, (x, *views), copies))
        assert [each.stride() for each in views] == [each.stride() for each in (x[1:], x.t(), views[2])]
        assert x._version == version
    own.offload()
    with other:  # another batch, which knows nothing of these tensors, and uses one of them
        assert torch.equal(torch.stack([views[0]])[0], copies[1])
    assert torch.equal(x, copies[0])


class Gated(nn.Module):
    """While `up` waits, the output of `gate` is only on the stack of the interpreter."""

    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return x + self.down(F.silu(self.gate(x)) * self.up(x))


@pytest.mark.parametrize("module", [0, 1, 2])
def test_a_waiting_batch_holds_nothing_in_memory(tmp_path, all_sizes, module):
    model, batches = Gated(), vectors(3)
    units = [(model.gate, model.up, model.down)[module]]
    expected = {0: batches, 1: batches, 2: [F.silu(model.gate(x)) * model.up(x) for x in batches]}[module]
    made, outputs = [], []

    def make():
        made.append(DiskParking(tmp_path))
        return made[-1]

    runs = [lambda x=x: outputs.append(model(x + 0)) for x in batches]
    with torch.no_grad(), closing(lockstep(as_samples(runs, make), units, to_end=True)) as stops:
        for stop in stops:
            assert all(map(is_in_a_file, (call.args[0] for call in stop.calls)))
            assert all(torch.equal(call.args[0], x) for call, x in zip(stop.calls, expected, strict=True))
            alive = [reference() for each in made for reference in each._made.values()]
            assert len([x for x in alive if x is not None]) == len(batches) * (2 if module else 1)
            assert all(is_in_a_file(x) for x in alive if x is not None)
            for call in stop.calls:
                call.run()
    with torch.no_grad():
        assert all(torch.equal(output, model(x)) for output, x in zip(outputs, batches, strict=True))


@pytest.mark.parametrize("kind", ["disk", "host"])
def test_tensors_that_batches_share_stay_valid(tmp_path, all_sizes, kind):
    """Every batch adds one table, which the model keeps; the first batch moves it."""

    class Sharing(Chain):
        table = None

        def forward(self, x):
            if self.table is None:
                self.table = torch.arange(x.shape[-1]) * 1.0
            table = self.table
            for block in self.blocks:
                x = block(x + table)
            return self.head(x)

    model, batches = Sharing(Mlp(), Mlp()), vectors(4)
    table = torch.arange(batches[0].shape[-1]) * 1.0
    make = makers(tmp_path)[kind]
    with closing(lockstep(samples_of(model, batches, make), model.blocks)) as stops:
        for stop in stops:
            for call in stop.calls:
                x = batches[call.sample.batch_index] + table
                call.sample.parking.restore()
                assert torch.equal(call.args[0], x if stop.unit == 0 else through(model.blocks[:1], x) + table)
                call.sample.parking.offload()
    assert is_in_a_file(model.table) == (kind == "disk")
    assert not is_hidden(model.table)  # the last batch has copied it back
    assert torch.equal(model.table, table)


def test_an_interrupted_run_leaves_no_file_and_no_thread(tmp_path, all_sizes):
    threads, model = set(threading.enumerate()), Chain(Mlp(), Mlp())
    stops = lockstep(samples_of(model, vectors(), partial(DiskParking, tmp_path)), model.blocks)
    next(stops)
    assert str(tmp_path) in Path("/proc/self/maps").read_text()
    with pytest.raises(KeyboardInterrupt):
        stops.throw(KeyboardInterrupt)
    gc.collect()
    assert set(threading.enumerate()) <= threads
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


CHOICES = [
    {"method": "sparsegpt", "sequential": "layer"},
    {"method": "wanda", "sequential": "block", "recovery": "reconstruct"},
    {"method": "wanda", "allocation": "owl", "pattern": "2:4", "permutation": "assignment"},
]
CASES = list(itertools.product(CHOICES, ["disk", "host"]))
SAMPLED = zip(["mixtral", "t5", "convnext", "routed", "inplace", "autocast_inside"], CASES, strict=True)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "case"), with_nightly(SAMPLED, zip(ZOO, itertools.cycle(CASES))), ids=str)
def test_every_model_is_pruned_the_same(tmp_path, all_sizes, name, case):
    specimen, store, (choices, kind) = ZOO[name], WeightStore(), case
    store.make_parking = makers(tmp_path)[kind]
    models = [specimen.build() for _ in range(2)]
    config = PruningConfig.from_names(0.5, **choices)
    reports = [
        prune_as(config, model, specimen.batches(), progress=False, store=each)
        for model, each in zip(models, (store, WeightStore()), strict=True)
    ]
    assert reports[0].layers == reports[1].layers
    first, second = (model.state_dict() for model in models)
    assert all(torch.equal(first[key], second[key]) for key in first)
