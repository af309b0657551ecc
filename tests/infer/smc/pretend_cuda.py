"""A CUDA device that is none: tensors that say they are there, counted looks at them, and graphs that are replayed.

An operation on such a tensor runs on the CPU, and Python takes the way that it takes for a GPU (``is_cpu`` is False).
As on a GPU, tensors of two devices do not meet. In a capture nothing happens to tensors that were there before, what is
made holds rubbish, and a look at a value or a copy between devices is refused; a replay does the recorded operations
again, on the recorded tensors, and no Python.
"""

from contextlib import contextmanager, nullcontext

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
#: operations that wait for the device, as their result's size or an exception depends on numbers
LOOKS = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.equal.default,
    aten._linalg_check_errors.default,
    aten.repeat_interleave.Tensor,
    aten.linalg_lu_factor.default,
    aten._linalg_solve_ex.default,
    aten.multinomial.default,
}
COPIES = {aten._to_copy.default, aten.copy_.default}


class OnDevice(torch.Tensor):
    """A tensor on the device; ``inner`` holds its numbers."""

    @staticmethod
    def __new__(cls, inner):
        found = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device="meta",  # to torch's own code, which would ask for the device's library
        )
        found.inner = inner
        return found

    device = property(lambda self: torch.device("cuda", 0))
    is_cuda = property(lambda self: True)
    is_meta = property(lambda self: False)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} outside of PretendCuda")

    def __repr__(self):
        return f"OnDevice({self.inner})"

    def new_tensor(self, data, dtype=None, device=None):
        return torch.tensor(data, dtype=dtype or self.dtype, device=device or self.device)

    def tolist(self):
        return self.to(device="cpu").tolist()


def _inner(tree):
    return pytree.tree_map_only(OnDevice, lambda x: x.inner, tree)


def _tensors(tree):
    return [x for x in pytree.tree_leaves(tree) if isinstance(x, torch.Tensor)]


def _storage(x):
    return x.untyped_storage().data_ptr()


class PretendCuda(TorchDispatchMode):
    """The device; ``looks`` counts how often the host waited for it."""

    def __init__(self):
        super().__init__()
        self.looks, self.record = 0, None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        given = _tensors((args, kwargs))
        here = [x for x in given if isinstance(x, OnDevice)]
        asked = kwargs.get("device")
        there = bool(here) if asked is None else torch.device(asked).type in ("cuda", "meta")
        if asked is not None:
            kwargs["device"] = torch.device("cpu")
        crossing = func in COPIES and (there != bool(here) or len(here) not in (0, len(given)))
        if crossing or (here and (func in LOOKS or _is_boolean_index(func, args))):
            self.looks += 1
            if self.record is not None:
                raise RuntimeError(f"{func}: operation not permitted when stream is capturing")
        elif here and any(not isinstance(x, OnDevice) and (x.dim() or func is aten.index.Tensor) for x in given):
            raise RuntimeError(f"{func}: expected all tensors to be on the same device")
        plain_args, plain_kwargs = _inner((args, kwargs))
        if self.record is not None and there:
            out = self.record.run(func, plain_args, plain_kwargs)
        else:
            out = func(*plain_args, **plain_kwargs)
        if func is aten._local_scalar_dense.default:
            return out
        known = {id(x.inner): x for x in here}

        def wrap(x):
            return known[id(x)] if id(x) in known else OnDevice(x) if there else x

        return pytree.tree_map_only(torch.Tensor, wrap, out)

    @staticmethod
    def move(module):
        """A module's parameters and buffers, there."""
        for part in module.modules():
            for name, x in part._parameters.items():
                if x is not None:
                    part._parameters[name] = torch.nn.Parameter(OnDevice(x.detach()))
            for name, x in part._buffers.items():
                if x is not None:
                    part._buffers[name] = OnDevice(x)
        return module


def _is_boolean_index(func, args):
    if func not in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default):
        return False
    return any(x is not None and x.dtype == torch.bool for x in args[1])


class _Record:
    """Operations with the tensors that they read and write."""

    def __init__(self):
        self.calls, self.own, self.before = [], set(), []
        self.random = torch.get_rng_state()
        self.alive = []  # addresses stay taken

    def run(self, func, args, kwargs):
        """The operation's result, for its shape; a tensor that was there before is put back at the end."""
        given = _tensors((args, kwargs))
        self.alive += given
        if func._schema.is_mutable:
            seen = {_storage(x) for x, _ in self.before}
            self.before += [(x, x.clone()) for x in given if _storage(x) not in self.own | seen]
        out = func(*args, **kwargs)
        addresses = {_storage(x) for x in given}
        fresh = [_storage(x) not in addresses for x in _tensors(out)]
        self.own |= {_storage(x) for x, new in zip(_tensors(out), fresh, strict=True) if new}
        self.calls.append((func, args, kwargs, out, fresh))
        self.alive += _tensors(out)
        return out

    def end(self):
        torch.set_rng_state(self.random)
        for x, value in self.before:
            x.copy_(value)
        for *_, out, fresh in self.calls:
            for x, new in zip(_tensors(out), fresh, strict=True):
                if new:
                    x.fill_(True if x.dtype == torch.bool else 77)

    def replay(self):
        for func, args, kwargs, out, fresh in self.calls:
            again = func(*args, **kwargs)
            for place, x, new in zip(_tensors(out), _tensors(again), fresh, strict=True):
                if new:
                    place.copy_(x)


class Graph:
    """As ``torch.cuda.CUDAGraph``."""

    def __init__(self):
        self.record, self.replays = None, 0

    def replay(self):
        self.replays += 1
        with torch.utils._python_dispatch._disable_current_modes():
            self.record.replay()


class _Stream:
    def __init__(self, device=None):
        pass

    def wait_stream(self, other):
        pass

    def synchronize(self):
        pass


@contextmanager
def pretend_cuda(monkeypatch):
    """The device, and ``torch.cuda`` for it; graphs that were made are in ``device.graphs``."""
    device = PretendCuda()
    device.graphs = []

    def new_graph():
        device.graphs.append(Graph())
        return device.graphs[-1]

    @contextmanager
    def graph(made, stream=None, capture_error_mode="global"):
        device.record = _Record()
        try:
            yield
        finally:
            made.record, device.record = device.record, None
            with torch.utils._python_dispatch._disable_current_modes():
                made.record.end()

    for name, value in {
        "_lazy_init": lambda: None,
        "Stream": _Stream,
        "current_stream": _Stream,
        "stream": lambda stream: nullcontext(),
        "device": lambda device: nullcontext(),
        "CUDAGraph": new_graph,
        "graph": graph,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") is a copy
    try:
        with device, torch.no_grad():
            yield device
    finally:
        torch._C._set_only_lift_cpu_tensors(False)
