"""A simulated Mac GPU: tensors that report `mps`, live on the CPU, and are refused what Metal refuses.

PyTorch's dispatcher hands every operation on such a tensor to `_run`, which does it on the CPU tensor inside. What
fails on a Mac and not on a CPU fails here, too: float64, operands on two devices, `numpy()` without `cpu()`, pinned
memory. A copy that does not wait is refused as well: on Metal it may read memory that was freed
(pytorch/pytorch#139550, #189690). Random numbers on the device come from a generator of its own, which is what
torch.mps gets, sets and seeds. What Metal's own kernels compute, and how fast, takes a Mac to know.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

MPS = torch.device("mps", 0)
UNKNOWN = (torch.float64, torch.complex128)  # to Metal
COPIES = ("copy_", "_to_copy")  # operations that may have operands on two devices
MISSING = ("linalg_qr", "_linalg_svd", "_linalg_eigh")  # on Metal, or new there
MEMORY = 24e9  # what Metal says it may have
TOLD = {"is_available", "is_initialized", "device_count", "manual_seed_all"}  # of torch.cuda: touch no device


class Metal:
    """The state of torch.mps, and the calls that it received."""

    def __init__(self) -> None:
        self.random = torch.Generator().manual_seed(0).get_state()
        self.emptied = 0
        self.fraction: float | None = None
        self.operations: set[str] = set()
        self.without: tuple[torch.dtype, ...] = ()  # number formats that this Mac's matrix product refuses

    def seed(self, seed: int) -> None:
        self.random = torch.Generator().manual_seed(seed).get_state()

    def set_random(self, state: Tensor) -> None:
        self.random = state.clone()

    def empty(self) -> None:
        self.emptied += 1

    def set_fraction(self, fraction: float) -> None:
        self.fraction = fraction


class MetalTensor(Tensor):
    """A CPU tensor, `inner`, that reports to be on Metal."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor, metal: Metal) -> MetalTensor:
        if inner.dtype in UNKNOWN:
            raise TypeError(f"Metal has no {inner.dtype}")
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        return Tensor._make_wrapper_subclass(cls, inner.size(), **layout, device="meta")

    def __init__(self, inner: Tensor, metal: Metal):
        self.inner, self.metal = inner, metal

    device = property(lambda self: MPS)  # type: ignore[assignment]

    def tolist(self) -> Any:
        return self.inner.tolist()

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Metal({self.inner})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        metal = next(t.metal for t in tree_leaves((args, kwargs)) if isinstance(t, MetalTensor))
        return _run(metal, func, args, dict(kwargs or {}))


def _run(metal: Metal, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation on the inner tensors; its output is on Metal if it was requested there or an input was there."""
    operands = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    ours = [t for t in operands if isinstance(t, MetalTensor)]
    name = func._schema.name.partition("::")[2]
    device = kwargs.get("device")
    if device is not None and device.type == "meta" and ours:
        device = kwargs["device"] = MPS  # what C++ takes these tensors' device for
    on_metal = device.type == "mps" if device is not None else bool(ours)
    if not on_metal and not ours:
        return func(*args, **kwargs)
    metal.operations.add(name)
    if device is not None and on_metal:
        kwargs["device"] = torch.device("cpu")
    if name in MISSING and ours:
        raise NotImplementedError(f"{name}: not implemented for MPS")
    elsewhere = [t for t in operands if not isinstance(t, MetalTensor) and t.dim() and t.device.type != "meta"]
    if ours and elsewhere and name not in COPIES:
        raise RuntimeError(f"{name}: operands on mps and on cpu")
    if name in ("mm", "bmm", "addmm", "baddbmm") and {t.dtype for t in ours} & set(metal.without):
        raise TypeError(f"{name}: this number format is not supported on MPS")
    if kwargs.get("pin_memory") or name in ("_pin_memory", "pin_memory"):
        raise AssertionError("there is no pinned memory on Metal")
    args, kwargs = tree_map(lambda t: t.inner if isinstance(t, MetalTensor) else t, (args, kwargs))
    with _device_random(metal, func, kwargs) if on_metal else contextlib.nullcontext():
        found = func(*args, **kwargs)
    given = {id(t.inner): t for t in ours}  # what an operation in place returns is what it was given

    def wrapped(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return given[id(value)] if id(value) in given else MetalTensor(value, metal)

    return tree_map(wrapped, found) if on_metal else found


@contextlib.contextmanager
def _device_random(metal: Metal, func: Any, kwargs: dict[str, Any]) -> Iterator[None]:
    """Random numbers of Metal's own generator."""
    if torch.Tag.nondeterministic_seeded not in func.tags or kwargs.get("generator") is not None:
        yield
        return
    host = torch.get_rng_state()
    torch.set_rng_state(metal.random)
    yield
    metal.random = torch.get_rng_state()
    torch.set_rng_state(host)


class _Operations(TorchDispatchMode):
    """Operations that make tensors on Metal out of nothing; and nanoft's own, which are looked into."""

    def __init__(self, metal: Metal):
        super().__init__()
        self.metal = metal

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "nanoft":
            with self:
                return func._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **(kwargs or {}))
        return _run(self.metal, func, args, dict(kwargs or {}))


class _Calls(TorchFunctionMode):
    """Calls that PyTorch refuses before it comes to operations, because it has no Metal here."""

    def __init__(self, metal: Metal):
        super().__init__()
        self.metal = metal

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.to:
            return self.to(*args, **kwargs)
        if func in (torch.tensor, torch.as_tensor) and torch.device(kwargs.get("device") or "cpu").type == "mps":
            del kwargs["device"]
            return MetalTensor(func(*args, **kwargs), self.metal)
        return func(*args, **kwargs)

    def to(self, x: Tensor, *args: Any, copy: bool = False, **kwargs: Any) -> Tensor:
        if args and isinstance(args[0], MetalTensor):
            args = (MPS, args[0].dtype, *args[1:])
        device, dtype, without_waiting, _ = torch._C._nn._parse_to(*args, **kwargs)
        if device is None or device.type != "mps":
            return x.to(*args, copy=copy, **kwargs)
        assert not without_waiting, "a copy to Metal that does not wait may read memory that was freed"
        if isinstance(x, MetalTensor):
            return x.to(dtype=dtype or x.dtype, copy=copy)
        assert not (x.requires_grad and torch.is_grad_enabled())
        return MetalTensor(x.detach().to(dtype or x.dtype, copy=True), self.metal)


@contextlib.contextmanager
def pretended_metal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Metal]:
    """Pretend that this machine has a Metal GPU, and a CUDA device that must not be used."""
    here = Metal()
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    answers = {
        "recommended_max_memory": lambda: MEMORY,
        "driver_allocated_memory": lambda: 1e9,
        "current_allocated_memory": lambda: 1e9,
        "get_rng_state": lambda: here.random.clone(),
        "set_rng_state": here.set_random,
        "manual_seed": here.seed,
        "empty_cache": here.empty,
        "set_per_process_memory_fraction": here.set_fraction,
        "synchronize": lambda: None,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.mps, name, answer)
    for name in touching_cuda():
        monkeypatch.setattr(torch.cuda, name, _refuse(name))
    with _Calls(here), _Operations(here):
        yield here


def touching_cuda() -> list[str]:
    """The functions of torch.cuda, but for those that only say whether there is one."""
    functions = (n for n in torch.cuda.__all__ if callable(getattr(torch.cuda, n)) and n not in TOLD)
    return [name for name in functions if not isinstance(getattr(torch.cuda, name), type)]


def _refuse(name: str) -> Any:
    def called(*_: Any, **__: Any) -> Any:
        raise AssertionError(f"torch.cuda.{name} was called")

    return called
