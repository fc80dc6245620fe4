"""What FSDP2 shows of itself, in a single process."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from wanda_lightning.parallel import is_sharded


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_a_part_of_a_sharded_model_is_sharded_also_while_its_weights_are_gathered():
    """torch marks it by `_is_fsdp_managed_module`, a private name without a public counterpart."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
    states = []

    def look(part, *_):
        states.append((type(part.weight) is nn.Parameter, is_sharded(part)))

    model[0].register_forward_hook(look)
    fully_shard(model)
    assert is_sharded(model[0])
    model(torch.randn(2, 8))
    assert states == [(True, True)]


def test_a_model_in_one_process_is_not_sharded():
    assert not is_sharded(nn.Linear(8, 8))
