"""`keep_zeros` in plain training loops, and in those of Fabric and accelerate."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from lightning.fabric import Fabric
from support.callbacks import ADAMW, Net, loader, same, train_by_hand, zeros
from support.held_zeros import OPTIMIZERS
from support.layers import assert_same
from support.pairwise import pairwise
from support.quiet import prune
from support.refusals import refuses
from torch.optim.optimizer import _global_optimizer_post_hooks

from wanda_lightning import keep_zeros


def pruned_net():
    module = Net()
    prune(module, method="magnitude")
    return module


def train(module, batches, optimizer, accumulate=1, clip=None):
    for number, batch in enumerate(batches, start=1):
        (module._loss(batch) / accumulate).backward()
        if number % accumulate == 0:
            if clip:
                torch.nn.utils.clip_grad_norm_(module.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize(
    ("name", "accumulate", "clip"),
    pairwise(sorted(OPTIMIZERS.keys() - {"noisy"}), [1, 3], [None, 0.5]),
)
def test_a_plain_loop_takes_the_steps_of_one_that_masks(name, accumulate, clip):
    module = pruned_net()
    by_hand = pruned_net()
    optimizer = OPTIMIZERS[name](module.parameters())
    batches = list(loader(24)) * 2
    pruned = zeros(module)
    with keep_zeros(module, optimizer):
        train(module, batches, optimizer, accumulate, clip)

    train_by_hand(by_hand, batches, OPTIMIZERS[name](by_hand.parameters()), accumulate, clip)
    assert same(module, by_hand)
    assert_same(zeros(module), pruned)
    assert not _global_optimizer_post_hooks


def test_it_holds_until_it_is_released():
    module = pruned_net()
    pruned = zeros(module)
    held = keep_zeros(module)
    optimizer = ADAMW(module.parameters())  # created later
    train(module, loader(24), optimizer)
    assert_same(zeros(module), pruned)
    held.release()
    train(module, loader(24), optimizer)
    assert all((pruned[name] & ~where).any() for name, where in zeros(module).items())


def test_moments_from_before_pruning_are_cleared():
    module = Net()
    optimizer = ADAMW(module.parameters())
    train(module, loader(24), optimizer)
    prune(module, method="magnitude")
    with keep_zeros(module, optimizer):
        for place in (0, 2, 4):
            weight = module.layers[place].weight
            assert not optimizer.state[weight]["exp_avg"][weight == 0].any()


def test_a_resumed_loop_equals_one_that_was_not_interrupted(tmp_path):
    module = pruned_net()
    batches = list(loader(24))
    optimizer = ADAMW(module.parameters())
    with keep_zeros(module, optimizer) as held:
        train(module, batches[:3], optimizer)
        with torch.no_grad():
            weight = module.layers[2].weight
            weight[tuple((weight != 0).nonzero()[0])] = 0  # by chance
        saved = {
            "weights": module.state_dict(),
            "optimizer": optimizer.state_dict(),
            "zeros": held.state_dict(),
        }
        torch.save(saved, tmp_path / "state.pt")
        train(module, batches[3:], optimizer)

    again = Net()
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    again.load_state_dict(loaded["weights"])
    optimizer = ADAMW(again.parameters())
    optimizer.load_state_dict(loaded["optimizer"])
    with keep_zeros(again, optimizer, state=loaded["zeros"]):
        train(again, batches[3:], optimizer)
    assert same(again, module)


def test_a_copy_of_another_model_is_refused():
    module = pruned_net()
    other = torch.nn.Linear(2, 2)
    dense = Net()
    with keep_zeros(module) as held:
        for model, copy, name in ((module, other, "Linear"), (other, dense, "Net")):
            with refuses(f"a {name} has none of the 3 weights"):
                held.clear_copies(model, [copy])


def test_a_state_of_another_model_is_refused():
    state = {"layers": ["layers.0"], "unheld_zeros": {}}  # of a wrapped model
    model = torch.nn.Sequential(torch.nn.Linear(8, 32))
    with refuses(r"state must be of the same model, .* has no layers\.0\. Pass"):
        keep_zeros(model, state=state)
    assert not _global_optimizer_post_hooks


def test_fabric():
    module = pruned_net()
    pruned = zeros(module)
    fabric = Fabric(accelerator="cpu", precision="bf16-mixed")
    model, optimizer = fabric.setup(module, ADAMW(module.parameters()))
    model.mark_forward_method("_loss")
    with keep_zeros(model, optimizer):
        for batch in fabric.setup_dataloaders(loader(24)):
            fabric.backward(model._loss(batch))
            optimizer.step()
            optimizer.zero_grad()
    assert_same(zeros(module), pruned)


def test_accelerate():
    module = pruned_net()
    pruned = zeros(module)
    AcceleratorState._reset_state(reset_partial_state=True)  # it is kept for the process
    accelerator = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2)
    model, optimizer, batches = accelerator.prepare(module, ADAMW(module.parameters()), loader(24))
    with keep_zeros(model, optimizer):
        for batch in batches:
            with accelerator.accumulate(model):
                accelerator.backward(
                    torch.nn.functional.cross_entropy(model(batch[0]).float(), batch[1])
                )
                optimizer.step()
                optimizer.zero_grad()
    assert_same(zeros(module), pruned)
