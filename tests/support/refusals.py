"""A `prune` that must be refused, and leave the model as it was."""

import threading

import pytest
import torch

from wanda_lightning import prune


class Untouched:
    """Calibration batches that must not be read before the refusal."""

    def __iter__(self):
        pytest.fail("a batch was read before the refusal")


def bits(tensor):
    return tensor.detach().flatten().view(torch.uint8)  # NaN equals NaN


def changed(model, before):
    """Names of what is no longer as before."""
    return [
        name
        for name, value in model.state_dict().items()
        if value.dtype != before[name].dtype
        or not (value.is_meta or torch.equal(bits(value), bits(before[name])))
    ]


def state_of(model):
    """The mode, hooks, forward and parameters' flags of each module."""
    return [
        (
            module.training,
            vars(module).get("forward"),
            list(module._forward_pre_hooks),
            list(module._forward_hooks),
            [
                (parameter.requires_grad, parameter.grad)
                for parameter in module.parameters(recurse=False)
            ],
        )
        for module in model.modules()
    ]


def refusal(model, batches=None, *args, error=ValueError, written=(), **choices):
    """The message of a `prune` that only wrote the weights that `written` names, and left nothing else behind."""
    before = {name: value.detach().clone() for name, value in model.state_dict().items()}
    state = state_of(model)
    threads = set(threading.enumerate())
    with pytest.raises(error) as caught:
        prune(model, batches, *args, progress=False, **choices)
    assert changed(model, before) == [f"{name}.weight" for name in written]
    assert state_of(model) == state
    assert set(threading.enumerate()) <= threads
    assert torch.is_grad_enabled()
    assert torch.backends.mha.get_fastpath_enabled()
    assert not torch.overrides._get_current_function_mode_stack()
    notes = [note for note in getattr(caught.value, "__notes__", []) if "already pruned" in note]
    assert len(notes) == bool(written)
    if notes:
        assert (
            f"{len(written)} {'layers are' if written[1:] else 'layer is'} already pruned;"
            in notes[0]
        )
        assert "Reload the model" in notes[0]
    return str(caught.value)
