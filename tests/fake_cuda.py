"""Fake CUDA tensors: shapes and operators are real, numbers and kernels aren't.

``FakeTensorMode`` alone needs a CUDA build of torch: indexing asks for the device's guard, which a
CPU build lacks. ``fake_cuda`` turns indexing into the operators that torch would call.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten

# Composite operators that are one kernel on CUDA, and one that has no decomposition.
WHOLE = {"linear", "rms_norm", "scaled_dot_product_attention", "device"}
# Operators that run no kernel: views and allocations.
NO_KERNEL = {
    *("alias", "as_strided", "detach", "expand", "permute", "select", "slice", "split", "t"),
    *("split_with_sizes", "squeeze", "transpose", "unbind", "unsqueeze", "view", "view_as_complex"),
    *("view_as_real", "_unsafe_view", "_reshape_alias", "device", "lift_fresh"),
    *("empty", "empty_like", "new_empty"),
}


class _Indexing(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is Tensor.__getitem__:
            view, indices = _view(args[0], args[1])
            return view if indices is None else aten.index.Tensor(view, indices)
        if func is Tensor.__setitem__:
            view, indices = _view(args[0], args[1])
            value = args[2]
            if not isinstance(value, Tensor):
                value = torch.full((), value, dtype=view.dtype, device=view.device)
            if indices is None:
                return aten.copy_.default(view, value)
            return aten.index_put_.default(view, indices, value)
        return func(*args, **(kwargs or {}))


def _view(x: Tensor, index: Any) -> tuple[Tensor, list[Tensor | None] | None]:
    """The basic indices applied to x, and the tensors among them by axis, if there are any."""
    indices: list[Tensor | None] = []
    for i in index if isinstance(index, tuple) else (index,):
        axis = len(indices)
        if isinstance(i, int):
            x = x.select(axis, i)
            continue
        if i is None:
            x = x.unsqueeze(axis)
        elif isinstance(i, slice) and i != slice(None):
            x = aten.slice.Tensor(x, axis, i.start, i.stop)
        elif i is Ellipsis:
            raise NotImplementedError(index)
        if isinstance(i, list):
            i = torch.tensor(i).to(x.device)
        indices.append(i if isinstance(i, Tensor) else None)
    return x, indices if any(i is not None for i in indices) else None


class Record(TorchDispatchMode):
    """Counts kernels by operator, and calls in which the host waits for the device.

    Values that are fetched are 1.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        on_device = isinstance(args[0] if args else None, Tensor) and args[0].is_cuda
        if name in ("_local_scalar_dense", "nonzero", "is_nonzero", "equal") and on_device:
            self.waits.append(name)
            if name == "_local_scalar_dense":
                return 1
        device = kwargs.get("device")
        if name == "_to_copy" and device is not None:
            if on_device and device.type == "cpu":
                self.waits.append("copy to the host")
                with torch.utils._python_dispatch._disable_current_modes():
                    return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
            if device.type == "cuda" and not on_device and not kwargs.get("non_blocking"):
                self.waits.append("copy to the device")
        if name == "copy_" and not (args[0].is_cuda and args[1].is_cuda):
            self.waits.append("copy between devices")
        if name not in WHOLE:
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        if name not in NO_KERNEL:
            self.kernels[name] += 1
        return result


@contextlib.contextmanager
def fake_cuda() -> Iterator[None]:
    # FakeTensor's own tolist fetches element by element
    whole = mock.patch.object(FakeTensor, "tolist", lambda x: x.cpu().tolist())
    with FakeTensorMode(), _Indexing(), whole:
        yield
