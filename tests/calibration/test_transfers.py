"""Memory that leaves a device and returns: the same bytes, on a GPU beside kernels that run meanwhile."""

from contextlib import closing
from functools import partial

import pytest
import torch
from support.chains import WIDTH, Chain, Mlp, through
from torch import nn

from wanda_lightning.calibration.lockstep import lockstep
from wanda_lightning.calibration.parking import Host, HostParking
from wanda_lightning.calibration.transfers import CudaTransfers, Transfers, transfers_for

needs_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_a_gpu)])
def test_memory_returns_as_it_left(device):
    transfers = transfers_for(torch.device(device))
    assert type(transfers) is (CudaTransfers if device == "cuda" else Transfers)
    x = torch.randn(1000, 1001, dtype=torch.bfloat16, device=device)
    expected = x.clone()
    host = transfers.leave(x.untyped_storage())
    x.zero_()
    arrival = transfers.begin_return(host)
    arrival.wait()
    assert (host.device.type, arrival.memory.device.type) == ("cpu", device)
    returned = torch.empty(0, dtype=x.dtype, device=device).set_(arrival.memory, 0, x.shape, x.stride())
    assert torch.equal(returned, expected)


@needs_a_gpu
def test_memory_returns_while_kernels_run():
    transfers = CudaTransfers(torch.device("cuda"))
    x, factor = torch.randn(1 << 22, device="cuda"), torch.randn(8192, 8192, device="cuda")
    arrival = transfers.begin_return(transfers.leave(x.untyped_storage()))
    for _ in range(200):  # seconds of work
        factor @ factor
    later = torch.cuda.current_stream().record_event()
    arrival.wait()
    assert not later.query()
    assert torch.equal(torch.empty(0, device="cuda").set_(arrival.memory), x)


@needs_a_gpu
@torch.no_grad()
def test_the_activations_of_two_batches_are_on_the_gpu():
    size, count = 1 << 24, 24  # bytes of a batch, which waits with its input and its activation
    model = Chain(*(Mlp() for _ in range(3))).cuda()
    model.head = nn.Identity()
    seeds, outputs = range(count), {}

    def batch(seed):
        generator = torch.Generator("cuda").manual_seed(seed)
        return torch.randn(size // 4 // WIDTH, WIDTH, device="cuda", generator=generator)

    def run(seed):
        outputs[seed] = model(batch(seed)).cpu()

    runs, make = [partial(run, seed) for seed in seeds], partial(HostParking, Host(CudaTransfers(torch.device("cuda"))))
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with closing(lockstep(runs, model.blocks, to_end=True, make_parking=make)) as stops:
        for _ in stops:
            pass
    assert torch.cuda.max_memory_allocated() - before < count * size / 2  # with 8 for the work of a block
    assert all(torch.equal(outputs[seed], through(model.blocks, batch(seed)).cpu()) for seed in seeds)
