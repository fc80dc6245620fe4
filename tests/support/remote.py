"""A device "remote" whose tensors lie in the memory of the CPU, and cannot be combined with tensors of the CPU.

They are ordinary tensors of PyTorch's `PrivateUse1` backend, with storages and addresses: DLPack makes them from CPU
tensors if the capsule says so. Every operator that has a kernel for the CPU gets one for the device, in Python, which
refuses mixed devices as CUDA does and runs the CPU's kernel on the same memory. So results are equal to the bit.
`connect` registers the device in the process, which cannot be undone.
"""

from __future__ import annotations

import ctypes
from functools import partial
from typing import ClassVar

import torch
from support.refusals import alike
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet
from torch.utils._pytree import tree_map_only
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)

DEVICES = ("cpu", "remote:0")
_CPU = 1
_EXTENSION = 12  # kinds of devices in DLPack; the second one is PyTorch's PrivateUse1
_aten = torch.ops.aten
_libraries = []  # they undo their registrations when they are freed
# For these, the CPU's kernel returns a tensor with the device and the storage of its argument.
_VIEWS = {
    "as_strided",
    "view",
    "_reshape_alias",
    "unfold",
    "view_as_real",
    "view_as_complex",
    "set_",
}
# What CUDA takes besides CPU scalars in elementwise operators: copies, CPU indices, a CPU scalar to fill with.
_COPIES = {"_copy_from", "_copy_from_and_resize", "_foreach_copy_"}
_INDEXED = {
    "index",
    "index_put",
    "index_put_",
    "_index_put_impl_",
    "_unsafe_index",
    "_unsafe_index_put",
}
_FILLS = {"fill_", "masked_fill_"}
# Operators whose results for floats are not deterministic on CUDA.
_NOT_DETERMINISTIC = {
    "bincount",
    "cumsum",
    "cumsum_",
    "histc",
    "kthvalue",
    "median",
    "nanmedian",
}
HAS_FLOAT64 = True  # a test may take it away, as from `mps`
# Autocast of the CPU must not apply to the device, though its kernels call the CPU's.
_AUTOCAST = DispatchKeySet(DispatchKey.AutocastCPU)


def connect():
    """Register the device in this process and return it."""
    if not _libraries:
        _setup_privateuseone_for_python_backend("remote", backend_module=_Module())
        # Otherwise tied weights would not stay tied.
        torch.__future__.set_swap_module_params_on_conversion(True)
        torch.Generator = _Generator
        torch.UntypedStorage.clone = _clone_storage
        aten, others = (torch.library.Library(name, "IMPL") for name in ("aten", "_"))
        names = torch._C._dispatch_get_registrations_for_dispatch_key("CPU")
        for name in (*names, *(f"aten::{name}" for name in _REPLACED)):
            if name.startswith("aten::"):
                packet, _, overload = name.removeprefix("aten::").partition(".")
                op = getattr(getattr(_aten, packet), overload or "default")
                on_cpu = partial(op.redispatch, DispatchKeySet(DispatchKey.CPU))
                aten.impl(op, on_cpu if packet in _VIEWS else partial(_run, op), "PrivateUse1")
        others.fallback(_run, "PrivateUse1")
        others.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
        for name in ("_copy_from", "_copy_from_and_resize"):
            for key in ("Conjugate", "Negative"):  # they would copy before a copy, without an end
                aten.impl(name, torch.library.fallthrough_kernel, key)
        _libraries.extend((aten, others))
    return torch.device("remote", 0)


class _Module(_DummyBackendModule):
    """What PyTorch looks up as `torch.remote`; random numbers are those of the CPU."""

    def get_amp_supported_dtype(self):
        return [torch.bfloat16]

    def get_rng_state(self, device=None):
        return torch.get_rng_state()

    def set_rng_state(self, state, device=None):
        torch.set_rng_state(state)


class _Generator(torch._C.Generator):
    """A generator of the device, which draws the numbers of the CPU."""

    addresses: ClassVar = set()  # kernels get another object of Python

    def __new__(cls, device="cpu"):
        is_remote = torch.device(device).type == "remote"
        made = super().__new__(cls if is_remote else torch._C.Generator)
        (cls.addresses.add if is_remote else cls.addresses.discard)(made._cdata)
        return made

    @property
    def device(self):
        return torch.device("remote", 0)


def _clone_storage(storage):
    """Clone a storage by a tensor: the device has no allocator for storages."""
    tensor = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
    return tensor.clone().untyped_storage()


def _run(op, *args, **kwargs):
    """Run the CPU's kernel on the memory of the arguments."""
    with torch._C.DisableTorchFunction(), torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
        name = op._schema.name.removeprefix("aten::")
        pairs = []  # of the device, and of the CPU on the same memory
        others = []  # of the CPU
        local_args = [_localize(value, pairs, others) for value in args]
        local_kwargs = {key: _localize(value, pairs, others) for key, value in kwargs.items()}

        # What CUDA refuses.
        if name in _NOT_DETERMINISTIC and torch.are_deterministic_algorithms_enabled():
            assert not any(local.is_floating_point() for _, local in pairs), (
                f"{op} is not deterministic"
            )
        if others and pairs and name not in _COPIES:
            _refuse_mixed(op, name, args[0], others)
        generator = kwargs.get("generator")
        if generator is not None and generator._cdata not in _Generator.addresses:
            raise RuntimeError("Expected a 'remote' device type for generator but found 'cpu'")

        if name.startswith("_copy_from"):
            local_args[1].copy_(local_args[0])
            return args[1]
        if op._overloadname == "Tensor" and any(isinstance(value, int | float) for value in args):
            op = op.overloadpacket  # a number in place of a tensor belongs to another overload
        result = _REPLACED.get(name, op)(*local_args, **local_kwargs)
        for remote, local in pairs:
            if not remote.numel() and local.numel():  # resized
                moved = _moved(local, _EXTENSION)
                remote.set_(moved.untyped_storage(), 0, moved.shape, moved.stride())
        return _wrap(result, pairs)


def _refuse_mixed(op, name, first, local):
    into_local = any(first is tensor for tensor in local)
    if name in _INDEXED and not into_local:
        return
    takes_scalars = (torch.Tag.pointwise in op.tags or name in _FILLS) and not (
        op._schema.is_mutable and into_local
    )
    if not takes_scalars or any(tensor.ndim for tensor in local):
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, remote:0 and cpu! "
            f"(in {op})"
        )


def _localize(value, pairs, others):
    """Return an argument for the CPU's kernel; collect its tensors."""
    if isinstance(value, Tensor):
        if value.device.type != "remote":
            others.append(value)
            return value
        # The operator may resize an empty tensor, which it could not do if another tensor owned the memory.
        local = _moved(value, _CPU) if value.numel() else torch.empty_like(value, device="cpu")
        pairs.append((value, local))
        return local
    if isinstance(value, torch.device):
        return torch.device("cpu")
    if isinstance(value, list | tuple):
        return [_localize(each, pairs, others) for each in value]
    return value


def _wrap(value, pairs):
    """Return the result of the CPU's kernel on the device; of an operator in place, its argument."""
    if isinstance(value, Tensor):
        if value.dtype == torch.float64 and not HAS_FLOAT64:
            raise TypeError(
                "Cannot convert a remote Tensor to float64 dtype as the framework doesn't support float64"
            )
        same = [remote for remote, local in pairs if local is value]
        return same[0] if same else _moved(value, _EXTENSION)
    if isinstance(value, list | tuple):
        return type(value)(_wrap(each, pairs) for each in value)
    return value


def _moved(tensor, kind):
    """Return a tensor of another kind of device on the same memory, which it keeps alive."""
    if tensor.is_conj() or tensor.is_neg():
        toggle = torch._conj if tensor.is_conj() else torch._neg_view
        return toggle(_moved(toggle(tensor), kind))
    capsule = torch._C._to_dlpack(tensor)
    start = _pointer(capsule, b"dltensor")  # of the fields: address, kind of device, its index, ...
    ctypes.c_int64.from_address(start + 8).value = kind  # and the index 0
    moved = torch._C._from_dlpack(capsule)
    stride = tensor.stride()  # DLPack changes those of dimensions with one entry
    return moved if moved.stride() == stride else moved.as_strided(tensor.shape, stride)


_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype = ctypes.c_void_p
_pointer.argtypes = [ctypes.py_object, ctypes.c_char_p]


def _convolution_backward(gradient, x, weight, *rest):
    bias_sizes = [gradient.shape[1]] if rest[-1][2] else None
    return _aten.convolution_backward(gradient, x, weight, bias_sizes, *rest)


# The names of convolutions on backends that PyTorch does not know.
_REPLACED = {
    "convolution_overrideable": _aten.convolution.default,
    "convolution_backward_overrideable": _convolution_backward,
}


def on(device, value):
    """Move all tensors of a batch."""
    return tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), value)


def assert_equal(on_cpu, on_device):
    """Weights and buffers are equal to the bit; those of a model that is not spread are on one device."""
    expected = on_cpu.state_dict()
    found = on_device.state_dict()
    assert expected.keys() == found.keys()
    assert not [name for name in expected if not alike(expected[name], found[name].cpu())]
    assert {tensor.device.type for tensor in expected.values()} == {"cpu"}
    assert "remote" in {tensor.device.type for tensor in found.values()}
