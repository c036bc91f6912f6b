"""Stand-ins for CUDA graphs that run on the CPU: ``OnCpu`` for the capture of a step, ``FakeCuda``
for torch.cuda's streams and graphs.

The latter behaves as torch 2.9 to 2.14 do: streams and graphs belong to the current device, which
each thread has for itself; a graph holds the operations launched on its stream, and replays them on
the same tensors; a failed capture leaves its stream current and hides the first error; cuBLAS'
workspace is allocated at a stream's first operation, in the graph's memory if that is captured.
"""

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class OnCpu:
    """Emulates CUDA graph capture: a replay calls the function again, into the same tensor."""

    def __init__(self) -> None:
        self.n_captures = self.n_replays = 0

    def warm_up(self, compute: Callable[[], Tensor]) -> Tensor:
        return compute()

    def record(self, compute: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        self.n_captures += 1
        output = compute()

        def replay() -> None:
            self.n_replays += 1
            output.copy_(compute())

        return replay, output

    def reset(self) -> None: ...


class Stream:
    def __init__(self, device: torch.device | int) -> None:
        self.index = torch.device("cuda", device).index if isinstance(device, int) else device.index

    def wait_stream(self, other: "Stream") -> None:
        assert other.index == self.index


class FakeCuda(TorchDispatchMode):
    """Enter it in each thread that uses the model.

    Args:
        home: index of the device on which the model's operations run.

    Attributes:
        error: raised by the operations of a capture.
        is_broken: graphs keep nothing of what they capture.
        n_replays: of all graphs.
        graphs: that exist.
    """

    def __init__(self, patch: pytest.MonkeyPatch, home: int = 0) -> None:
        super().__init__()
        self.home, self.is_broken = home, False
        self.error: Exception | None = None
        self.n_replays = 0
        self.graphs: list[Graph] = []
        self.capturing: Graph | None = None
        self.recording: set[object] = set()  # memory pools
        self.workspaces: dict[Stream, Graph | None] = {}  # and the graph whose memory has it
        self._state = threading.local()
        self._defaults = [Stream(0), Stream(1)]
        fake = self

        class graph:
            default_capture_stream: Stream | None = None

            def __init__(
                self,
                cuda_graph: Graph,
                pool: object = None,
                stream: Stream | None = None,
                capture_error_mode: str = "global",
            ) -> None:
                assert capture_error_mode == "thread_local"
                if stream is None and graph.default_capture_stream is None:
                    graph.default_capture_stream = fake.new_stream()
                chosen = graph.default_capture_stream if stream is None else stream
                assert chosen is not None
                self.graph, self.graph.stream, self.pool = cuda_graph, chosen, pool

            def __enter__(self) -> None:
                # not a context manager of fake's: a generator that is dropped would end it later
                stream = self.graph.stream
                self.before = fake.current_stream(torch.device("cuda", stream.index))
                fake.set_stream(stream)
                fake.capturing = self.graph
                fake.recording.add(self.pool)

            def __exit__(self, kind: object, *rest: Any) -> None:
                fake.capturing = None
                if kind is not None:
                    raise RuntimeError("operation failed due to a previous error during capture")
                fake.recording.remove(self.pool)
                if not self.graph.operations:
                    warnings.warn("The CUDA Graph is empty. This usually ...", stacklevel=2)
                if fake.is_broken:
                    self.graph.operations.clear()
                fake.set_stream(self.before)

        patch.setattr(torch.cuda, "graph", graph)
        patch.setattr(torch.cuda, "CUDAGraph", lambda: Graph(self))
        patch.setattr(torch.cuda, "Stream", self.new_stream)
        patch.setattr(torch.cuda, "graph_pool_handle", object)
        end, release = "_cuda_endAllocateToPool", "_cuda_releasePool"
        patch.setattr(torch._C, end, lambda _, pool: self.end_recording(pool), raising=False)
        patch.setattr(torch._C, release, lambda *_: None, raising=False)
        for name in ("device", "stream", "current_stream", "set_stream"):
            patch.setattr(torch.cuda, name, getattr(self, name))

    def end_recording(self, pool: object) -> None:
        if pool not in self.recording:
            raise RuntimeError("not currently recording to the pool")
        self.recording.remove(pool)

    # --- Devices and streams, by thread ---------------------------------------------------------

    @property
    def current_device(self) -> int:
        return getattr(self._state, "device", 0)

    def new_stream(self, device: torch.device | None = None) -> Stream:
        return Stream(self.current_device if device is None else device)

    def current_stream(self, device: torch.device | None = None) -> Stream:
        index = self.current_device if device is None else device.index
        return getattr(self._state, "streams", {}).get(index, self._defaults[index])

    def set_stream(self, stream: Stream) -> None:
        self._state.device = stream.index
        self._state.streams = {**getattr(self._state, "streams", {}), stream.index: stream}

    def is_as_found(self) -> bool:
        """Whether device 0 and the default streams are current, and no pool is recorded into."""
        if self.recording:
            return False
        streams = [self.current_stream(torch.device("cuda", i)) for i in range(2)]
        return self.current_device == 0 and streams == self._defaults

    @contextlib.contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        before, self._state.device = self.current_device, device.index
        try:
            yield
        finally:
            self._state.device = before

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        device = self.current_device
        before = self.current_stream(torch.device("cuda", stream.index))
        self.set_stream(stream)
        try:
            yield
        finally:
            self.set_stream(before)
            self._state.device = device

    # --- Operations -----------------------------------------------------------------------------

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        stream = self.current_stream(torch.device("cuda", self.home))
        graph = self.capturing
        is_captured = graph is not None and stream is graph.stream
        self.workspaces.setdefault(stream, graph if is_captured else None)
        if is_captured and self.error is not None:
            raise self.error
        result = function(*args, **(kwargs or {}))
        if is_captured:
            assert graph is not None
            graph.operations.append((function, args, kwargs or {}, result))
        return result


class Graph:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda, self.stream = cuda, Stream(0)
        self.operations: list[tuple[Callable[..., Any], Any, Any, Any]] = []
        self.workspace_was_freed = self.was_reset = False
        cuda.graphs.append(self)

    def replay(self) -> None:
        assert not self.was_reset
        self.cuda.n_replays += 1
        for function, args, kwargs, result in self.operations:
            used = {x.untyped_storage().data_ptr() for x in tensors((args, kwargs))}
            for old, new in zip(tensors(result), tensors(function(*args, **kwargs)), strict=True):
                if old.untyped_storage().data_ptr() in used:
                    continue  # a view, or written in place
                old.copy_(new)
                if self.workspace_was_freed and old.is_floating_point():
                    old.fill_(7.0)

    def reset(self) -> None:
        self.was_reset = True
        self.cuda.graphs.remove(self)
        if self.cuda.workspaces.get(self.stream) is self:
            for graph in self.cuda.graphs:
                graph.workspace_was_freed |= graph.stream is self.stream


def tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]
