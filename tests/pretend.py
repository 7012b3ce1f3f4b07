"""Pretended CUDA devices: real numbers on a CPU, with the rules of several GPUs.

A `Pretended` tensor says that it lies on `cuda:0` or `cuda:1` and holds an ordinary tensor. Inside `pretended()` what CUDA would refuse is refused:
operands on different devices (tensors without axes on the CPU excepted, as CUDA excepts them), numpy of a device's tensor. Everything else is computed on
the CPU, so results are exact. Whatever would make the host wait for a device is counted, with the line of mechscope that asked.

PyTorch itself sees CPU tensors, because a build without CUDA can neither allocate nor differentiate on the device type `cuda`; where a tensor lies is
decided here, above it: a function mode answers what names a device (`to`, `cpu`, factories), a dispatch mode labels what operations return.
"""

from __future__ import annotations

import contextlib
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode

CPU = torch.device("cpu")
# of what a backward pass makes from nothing: it lies where the first operand it meets does
_ANYWHERE = torch.device("meta")
_aten = torch.ops.aten
_SOURCE = str(Path("src") / "mechscope")


@dataclass
class Traffic:
    """What made the host wait for a device, or moved data between devices.

    Attributes:
        events: How often, by kind: `to host`, `to device`, `sent` (to a device without waiting), `between` (devices), `scalar`, `mask` (a boolean mask
            that is counted on the host), `equal`.
        places: The same by kind and the line of mechscope that asked.
    """

    events: Counter[str] = field(default_factory=Counter)
    places: Counter[tuple[str, str]] = field(default_factory=Counter)

    def note(self, kind: str) -> None:
        """Count one event, at the innermost line of mechscope."""
        self.events[kind] += 1
        frames = [frame for frame in traceback.extract_stack() if _SOURCE in frame.filename]
        at = f"{frames[-1].filename.split(_SOURCE)[-1].lstrip('/')}:{frames[-1].lineno}" if frames else "outside"
        self.places[kind, at] += 1

    @property
    def waits(self) -> int:
        """How often the host waited for a device."""
        return sum(count for kind, count in self.events.items() if kind not in ("between", "sent"))


_TRAFFIC: list[Traffic] = []
# devices of the torch functions under way: what such a function makes inside of itself lies where its operands lie
_UNDER_WAY: list[torch.device | None] = []


def _note(kind: str) -> None:
    for traffic in _TRAFFIC:
        traffic.note(kind)


class Pretended(Tensor):
    """A tensor on a pretended device, made of a real one."""

    held: Tensor
    place: torch.device

    @staticmethod
    def __new__(cls, inner: Tensor, place: torch.device) -> Pretended:
        """Wrap a real tensor."""
        # compressed rows have no strides; what they are is known to the operations, which are given the real tensor
        strides, offset = (inner.stride(), inner.storage_offset()) if inner.layout is torch.strided else (None, None)
        self = Tensor._make_wrapper_subclass(cls, inner.shape, strides=strides, storage_offset=offset, dtype=inner.dtype, device=CPU)
        self.held, self.place = inner, place
        return self

    # torch's stubs have attributes where a subclass has to have properties, and the two dispatch methods without their arguments
    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """Where it pretends to lie."""
        return self.place

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        """Always."""
        return True

    @property
    def is_cpu(self) -> bool:  # type: ignore[override]
        """Never."""
        return False

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        """Show the values and the device."""
        return f"{self.held!r} on {self.place}"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answer what names a device; hand the rest on."""
        return _function(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Compute on the CPU and label the results."""
        return _dispatch(func, args, kwargs or {})


# --- what names a device ---------------------------------------------------------------------------------------------------------------------


def _is_pretended(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def _indexed(device: Any) -> torch.device:
    found = torch.device(device)
    return torch.device("cuda", found.index or 0) if found.type == "cuda" else found


def moved(x: Tensor, device: Any, dtype: torch.dtype | None = None, *, copy: bool = False, waits: bool = True) -> Tensor:
    """Return a tensor on a device, pretended or the CPU; differentiable, and itself where nothing changes."""
    target = _indexed(device)
    if x.device == target and not copy and dtype in (None, x.dtype):
        return x
    if target == CPU and x.device == CPU:
        return _plain(x.to, CPU, dtype or x.dtype, copy=copy)
    return _Move.apply(x, target, dtype or x.dtype, waits)


class _Move(torch.autograd.Function):
    """A copy to another device, whose gradient goes back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, target: torch.device, dtype: torch.dtype, waits: bool) -> Tensor:
        ctx.source, ctx.dtype = x.device, x.dtype
        return _placed(x, target, dtype, waits)

    @staticmethod
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor, None, None, None]:
        return _placed(above, ctx.source, ctx.dtype), None, None, None


def _placed(x: Tensor, target: torch.device, dtype: torch.dtype, waits: bool = True) -> Tensor:
    if x.device != target:
        _note("to host" if target == CPU else "between" if x.device != CPU else "to device" if waits else "sent")
    with torch._C.DisableTorchFunction(), _outside():
        inner = (x.held if isinstance(x, Pretended) else x).detach().to(dtype, copy=True)
        return inner if target == CPU else Pretended(inner, target)


@contextlib.contextmanager
def _outside() -> Iterator[None]:
    """Leave the dispatch modes for the duration."""
    with torch.utils._python_dispatch._disable_current_modes():
        yield


def _plain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with torch._C.DisableTorchFunction():
        return function(*args, **kwargs)


def _to(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    copy = kwargs.pop("copy", False)
    kwargs.pop("memory_format", None)
    waits = not kwargs.pop("non_blocking", False)
    other = args[0] if args and isinstance(args[0], Tensor) else kwargs.get("other")
    if other is not None:
        return moved(x, other.device, other.dtype, copy=copy)
    device, dtype = kwargs.get("device"), kwargs.get("dtype")
    for argument in args:
        if isinstance(argument, torch.dtype):
            dtype = argument
        elif isinstance(argument, str | torch.device) or (isinstance(argument, int) and not isinstance(argument, bool)):
            device = argument
    if device is None or _indexed(device) == x.device:
        if dtype in (None, x.dtype) and not copy:
            return x
        return _plain(Tensor.to, x, dtype or x.dtype, copy=copy)
    return moved(x, device, dtype, copy=copy, waits=waits)


def _refuse_numpy(x: Tensor, *_: Any, **__: Any) -> Any:
    raise TypeError(f"can't convert {x.device} device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory first.")


def _set_data(x: Pretended, value: Tensor) -> None:
    if not isinstance(value, Pretended):
        raise RuntimeError(f"data of a tensor on {x.device} set to a tensor on {value.device}")
    x.held, x.place = value.held, value.place


def _copy(x: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    return _plain(Tensor.copy_, x, moved(value, x.device))


def _set(x: Tensor, index: Any, value: Any) -> None:
    places = index if isinstance(index, tuple) else (index,)
    # what slices choose is copied, from any device; what tensors choose is not
    if isinstance(value, Tensor) and all(place is None or place is ... or isinstance(place, int | slice) for place in places):
        value = moved(value, x.device)
    _plain(Tensor.__setitem__, x, index, value)


_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    Tensor.to: _to,
    Tensor.cpu: lambda x, *_, **__: moved(x, CPU),
    Tensor.cuda: lambda x, device=0, *_, **__: moved(x, torch.device("cuda", device) if isinstance(device, int) else device),
    Tensor.tolist: lambda x: moved(x, CPU).detach().tolist(),
    Tensor.numpy: _refuse_numpy,
    Tensor.__array__: _refuse_numpy,
    Tensor.data_ptr: lambda x: x.held.data_ptr(),
    Tensor.untyped_storage: lambda x: x.held.untyped_storage(),
    Tensor.storage_offset: lambda x: x.held.storage_offset(),
    Tensor.is_pinned: lambda x, *_: False,
    Tensor.copy_: _copy,
    Tensor.__setitem__: _set,
    Tensor.data.__set__: _set_data,  # type: ignore[attr-defined]
}


def _function(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Handle one call of torch's Python interface."""
    with torch._C.DisableTorchFunctionSubclass():
        return _answered(func, args, kwargs)


def _answered(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    first = args[0] if args else None
    if isinstance(first, Pretended) and func in _FUNCTIONS:
        return _FUNCTIONS[func](*args, **kwargs)
    if func in (Tensor.to, Tensor.cuda, Tensor.copy_, Tensor.__setitem__) and isinstance(first, Tensor):
        return _FUNCTIONS[func](*args, **kwargs)
    if func is torch._has_compatible_shallow_copy_type:
        return not any(isinstance(x, Pretended) for x in args)  # parameters that move are made anew
    device = kwargs.get("device")
    if func in (torch.as_tensor, torch.asarray) and isinstance(first, Tensor):
        return moved(first, first.device if device is None else device, kwargs.get("dtype"))
    target = _home(args, kwargs)
    if device is not None:
        kwargs = {**kwargs, "device": CPU}
        target = _indexed(device)
        if _is_pretended(device) and func in (torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor):
            return moved(_plain(func, *args, **kwargs), target)  # numbers of Python: made on the host, then moved
    _UNDER_WAY.append(_ANYWHERE if func in (torch.autograd.grad, torch.autograd.backward, Tensor.backward) else target)
    try:
        return _plain(func, *args, **kwargs)
    finally:
        _UNDER_WAY.pop()


def _home(args: Any, kwargs: dict[str, Any]) -> torch.device | None:
    """Return the device of the first operand that has axes, else of the first."""
    tensors = [*_tensors((args, kwargs))]
    return next((x.device for x in tensors if x.ndim), tensors[0].device if tensors else None)


class _Functions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _function(func, args, kwargs or {})


# --- what computes ---------------------------------------------------------------------------------------------------------------------------

_INDEXED = {
    _aten.index.Tensor,
    _aten.index_put.default,
    _aten.index_put_.default,
    _aten._index_put_impl_.default,
    _aten._unsafe_index.Tensor,
}
_COUNTED = {
    _aten.nonzero.default,
    _aten.masked_select.default,
    _aten.repeat_interleave.Tensor,
    _aten._unique2.default,
    _aten.unique_dim.default,
}
_FACTORIES = {
    "zeros",
    "ones",
    "full",
    "empty",
    "arange",
    "scalar_tensor",
    "rand",
    "randn",
    "empty_strided",
    "eye",
    "linspace",
    "tril_indices",
}


def _dispatch(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run one operation of ATen on real tensors, and say where its results lie."""
    tensors = [*_tensors((args, kwargs))]
    if not any(isinstance(x, Pretended) for x in tensors):
        out = func(*args, **kwargs)
        made_at = _UNDER_WAY[-1] if _UNDER_WAY else None
        if made_at is not None and made_at != CPU and func._schema.name.removeprefix("aten::") in _FACTORIES:
            return Pretended(out, made_at)
        return out
    here = [x for x in tensors if x.device != _ANYWHERE]
    place = _place(func, args, here) if any(x.device != CPU for x in here) else CPU if any(x.ndim for x in here) else _ANYWHERE
    _count(func, args)
    out = _computed(func, *_mapped(_inner, args), **_mapped(_inner, kwargs))
    if func is _aten.copy_.default:
        return args[0]
    if place == CPU:
        return out
    labelled = _mapped(lambda x: Pretended(x, place), out)
    return _same_if_in_place(func, args, kwargs, labelled)


def _tensors(x: Any) -> Iterator[Tensor]:
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, tuple | list | dict):
        for part in x.values() if isinstance(x, dict) else x:
            yield from _tensors(part)


def _mapped(function: Callable[[Tensor], Tensor], x: Any) -> Any:
    """Apply a function to every tensor of an operation's arguments or results."""
    if isinstance(x, Tensor):
        return function(x)
    if isinstance(x, dict):
        return {name: _mapped(function, part) for name, part in x.items()}
    return type(x)(_mapped(function, part) for part in x) if type(x) in (tuple, list) else x


def _inner(x: Tensor) -> Tensor:
    return x.held if isinstance(x, Pretended) else x


def _place(func: Any, args: Any, tensors: list[Tensor]) -> torch.device:
    """Return where the results lie; refuse operands on different devices, as CUDA does."""
    if func is _aten.copy_.default:
        return args[0].device
    if func in _INDEXED and args[0].device != _ANYWHERE:
        # indices may lie on the CPU, whatever is indexed
        home = args[0].device
        others = [x for x in args[1] if x is not None and x.device != CPU] + [x for x in args[2:3] if isinstance(x, Tensor) and x.ndim]
        tensors = [args[0], *(x for x in others if x.device != _ANYWHERE)]
    else:
        home = next((x.device for x in tensors if x.ndim), tensors[0].device)
        # on a device, a number on the CPU is as good as a Python number
        if home == CPU and all(x.ndim == 0 for x in tensors if x.device == CPU):
            home = next(x.device for x in tensors if x.device != CPU)
    away = [x for x in tensors if x.device != home and not (x.device == CPU and x.ndim == 0)]
    if home == CPU or away:
        found = sorted({str(x.device) for x in tensors})
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, {' and '.join(found)}! ({func})"
        )
    return home


def _count(func: Any, args: Any) -> None:
    if func is _aten._local_scalar_dense.default:
        _note("scalar")
    elif func is _aten.copy_.default:
        one, two = args[0].device, args[1].device
        if one != two:
            _note("to host" if one == CPU else "to device" if two == CPU else "between")
    elif func in _COUNTED:
        _note("mask")
    elif func is _aten.equal.default:
        _note("equal")
    elif func in _INDEXED:
        indices = [x for x in args[1] if x is not None]
        if any(x.dtype in (torch.bool, torch.uint8) for x in indices):
            _note("mask")
        elif args[0].device != CPU and any(x.device == CPU and x.ndim for x in indices):
            _note("to device")


def _computed(func: Any, *args: Any, **kwargs: Any) -> Any:
    if func is _aten._scaled_dot_product_efficient_attention.default:
        query, key, value, bias, _, dropout, causal = args
        if not query.shape[1] == key.shape[1] == value.shape[1]:
            raise RuntimeError("the memory-efficient kernel needs as many heads in query, key and value")
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, dropout, causal, attn_mask=bias, **kwargs)
        # like the kernel: the logsumexp in float32, its rows up to a multiple of 32, and nothing sensible in what was added
        if query.dtype == torch.float64:
            raise RuntimeError("the memory-efficient kernel has no float64")
        rows = -(-query.shape[2] // 32) * 32
        padded = lse.new_full((*lse.shape[:2], rows), torch.nan)
        padded[..., : lse.shape[2]] = lse
        return out, padded.float(), torch.zeros((), dtype=torch.int64), torch.zeros((), dtype=torch.int64)
    return func(*args, **kwargs)


def _same_if_in_place(func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> Any:
    """Return the operand itself where the operation wrote into it."""
    written = [argument for argument in func._schema.arguments if argument.alias_info is not None and argument.alias_info.is_write]
    if not written:
        return out
    first = func._schema.arguments.index(written[0])
    target = kwargs[written[0].name] if written[0].name in kwargs else args[first]
    if isinstance(target, Pretended) and target.place == _ANYWHERE:
        target.place = out.place if isinstance(out, Pretended) else out[0].place
    if torch.Tag.inplace_view in func.tags:
        with no_dispatch():  # the real tensor has its new shape, the label needs it too
            func(*args, **kwargs)
    return target if len(func._schema.returns) == 1 else out


class _Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatch(func, args, kwargs or {})


@contextlib.contextmanager
def pretended() -> Iterator[None]:
    """Let the devices `cuda:0`, `cuda:1`, … be there."""
    with _Functions(), _Dispatch():
        yield


@contextlib.contextmanager
def traffic() -> Iterator[Traffic]:
    """Count what makes the host wait, inside `pretended`."""
    counted = Traffic()
    _TRAFFIC.append(counted)
    try:
        yield counted
    finally:
        _TRAFFIC.remove(counted)
