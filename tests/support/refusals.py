"""What must be refused, and a call that is, and leaves the model as it was."""

import threading

import pytest
import torch
from support.quiet import prune


def refuses(message):
    """Expect a ValueError with this regular expression in its message, ours or that of a library which says enough."""
    return pytest.raises(ValueError, match=message)


class Untouched:
    """Calibration batches that must not be read before the refusal."""

    def __iter__(self):
        pytest.fail("a batch was read before the refusal")


def alike(first, second):
    """Whether two tensors are equal, bit for bit: NaN equals NaN, and 0.0 is not -0.0."""
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    bits, others = (tensor.detach().flatten().view(torch.uint8) for tensor in (first, second))
    return first.is_meta or torch.equal(bits, others)


def changed(model, before):
    """Names of what is no longer as before."""
    return [name for name, value in model.state_dict().items() if not alike(value, before[name])]


def state_of(model):
    """The mode, forward and hooks of each module, and whether each parameter requires a gradient and has one."""
    modules = [
        (
            module.training,
            vars(module).get("forward"),
            list(module._forward_pre_hooks),
            list(module._forward_hooks),
        )
        for module in model.modules()
    ]
    return modules, [(weight.requires_grad, weight.grad) for weight in model.parameters()]


def refusal(model, batches=None, *args, error=ValueError, written=(), verb=prune, **choices):
    """The message of a call that only wrote the weights that `written` names, and left nothing else behind."""
    before = {name: value.detach().clone() for name, value in model.state_dict().items()}
    state = state_of(model)
    threads = set(threading.enumerate())
    with pytest.raises(error) as caught:
        verb(model, batches, *args, **choices)

    assert changed(model, before) == [f"{name}.weight" for name in written]
    assert state_of(model) == state
    assert set(threading.enumerate()) <= threads
    assert torch.is_grad_enabled()
    assert torch.backends.mha.get_fastpath_enabled()
    assert not torch.overrides._get_current_function_mode_stack()

    # The user is told how many layers are already pruned.
    notes = [note for note in getattr(caught.value, "__notes__", []) if "already pruned" in note]
    assert len(notes) == bool(written)
    if notes:
        layers = "1 layer is" if len(written) == 1 else f"{len(written)} layers are"
        assert f"{layers} already pruned;" in notes[0]
        assert "Reload the model" in notes[0]
    return str(caught.value)
