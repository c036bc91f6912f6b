"""FlashAttention, and decoding steps as CUDA graphs."""

import contextlib
import math
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from llama.accel.selfcheck import agree, difference, warn
from llama.accel.ways import Ways
from llama.cache import Batch, Decode, KVCache
from llama.distributed import groups
from llama.files import summary
from llama.hooks import is_unmodified
from llama.model import Transformer

DecodeFunction = Callable[[Tensor, Decode], Tensor]


def why_not_flash(head_dim: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why FlashAttention can't run here, or None if it should."""
    if device.type != "cuda":
        return "FlashAttention needs a CUDA device"
    if torch.version.hip is not None:
        # refused before torch 2.14, and ignored by the composable-kernel backend
        return "ROCm's FlashAttention doesn't support seqused_k"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"FlashAttention doesn't support {str(dtype).removeprefix('torch.')}"
    # new in the versions of torch that this runs on; without it, the self-check has to do
    is_available = getattr(torch.backends.cuda, "is_flash_attention_available", None)
    if is_available is not None and not is_available():
        return f"torch {torch.__version__} is built without FlashAttention"
    if head_dim % 8 or head_dim > 256:
        return f"head_dim is {head_dim}, FlashAttention needs a multiple of 8 up to 256"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        found = ".".join(map(str, capability))
        return f"the device has compute capability {found}, FlashAttention needs 8.0"
    return None


def flash_attention(q: Tensor, cache: KVCache, batch: Batch) -> Tensor:
    """``attention`` in one call of FlashAttention's varlen kernel (Dao, 2023), for prefill and
    decode: it supports ragged lengths and grouped queries, splits long sequences over the device,
    and reads the lengths there, so that a CUDA graph can capture it."""
    # the cache as one sequence of max_batch_size * max_seq_len tokens [., K, D]
    k, v = (x.transpose(1, 2).flatten(0, 1) for x in (cache.k, cache.v))
    cu_seqlens_q, cu_seqlens_k = batch.cu_seqlens(cache.k.shape[2])
    return _flash_kernel(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        batch.max_seqlen_q,
        batch.max_seqlen_k,
        seqused_k=batch.seqlens_k,
    )


def _flash_kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    seqused_k: Tensor,
) -> Tensor:
    # torch.nn.attention.varlen.varlen_attn has seqused_k from torch 2.12 on; it calls this
    # operator, available since torch 2.4. The causal mask is aligned bottom-right.
    outputs = torch.ops.aten._flash_attention_forward(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        0.0,
        True,
        False,
        seqused_k=seqused_k,
    )
    return outputs[0]


class Capture(Protocol):
    """Captures functions whose tensors stay where they are, to replay them."""

    def warm_up(self, run: Callable[[], Tensor]) -> Tensor:
        """Run a function as it will be captured, and return its result."""

    def record(self, run: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        """Capture it: a function that replays it, and the tensor that then holds the result."""

    def reset(self) -> None:
        """Drop everything that was captured."""


class _Captured(NamedTuple):
    """A step for one size: its inputs and output, and the function that replays it."""

    tokens: Tensor
    positions: Tensor
    seqlens_k: Tensor
    replay: Callable[[], object]
    logits: Tensor


class GraphedStep:
    """``Transformer.decode``, captured once for each of a few sizes and then replayed.

    The batch is padded to a power of two, and the padding rows are computed and dropped. The length
    is padded too, unless attention reads the lengths on the device. A capture that fails, or whose
    replay doesn't give the result of the captured step, ends captures on all ranks: ``decode``
    then runs directly.
    """

    def __init__(
        self,
        model: Transformer,
        decode: DecodeFunction,
        *,
        any_length: bool,
        capture: Capture,
        ways: Ways | None = None,
    ) -> None:
        self._model, self._decode, self._capture = model, decode, capture
        self._any_length = any_length
        self._ways = Ways() if ways is None else ways
        self._direct = self._ways.decode
        self._ways.decode = "CUDA graph" if self._direct == "eager" else "compiled, CUDA graph"
        self._captured: dict[tuple[int, int], _Captured] = {}
        self._held: list[object] = []
        self._has_failed = False

    def __call__(self, tokens: Tensor, batch: Decode) -> Tensor:
        # a graph would replay without the hooks
        if self._has_failed or not is_unmodified(self._model):
            return self._decode(tokens, batch)
        args = self._model.params
        n = len(tokens)
        n_rows = _round_up(n, args.max_batch_size)
        length = args.max_seq_len
        if not self._any_length:
            length = _round_up(batch.max_seqlen_k, args.max_seq_len, 256)
        held = _held(self._model)
        if [*map(id, held)] != [*map(id, self._held)]:
            self._drop()
            self._held = held
        captured = self._captured.get((n_rows, length))
        if captured is None:  # padding rows write to the last position, which idle slots never use
            all_tokens = tokens.new_zeros(n_rows)
            all_positions = batch.positions.new_full((n_rows,), args.max_seq_len - 1)
            all_seqlens = batch.seqlens_k.new_ones(n_rows)
        else:
            all_tokens, all_positions, all_seqlens, _, _ = captured
        all_tokens[:n] = tokens
        all_positions[:n], all_positions[n:] = batch.positions, args.max_seq_len - 1
        all_seqlens[:n], all_seqlens[n:] = batch.seqlens_k, 1
        if captured is not None:
            captured.replay()
            return captured.logits[:n]

        def step() -> Tensor:  # runs now, so its inputs are already set
            padded = Decode(
                all_positions, length, ragged=not self._any_length, seqlens_k=all_seqlens
            )
            return self._decode(all_tokens, padded)

        result = self._capture_and_check(step)
        if result is None:
            return self._decode(tokens, batch)
        captured = _Captured(all_tokens, all_positions, all_seqlens, *result)
        self._captured[n_rows, length] = captured
        return captured.logits[:n]

    def _capture_and_check(
        self, step: Callable[[], Tensor]
    ) -> tuple[Callable[[], object], Tensor] | None:
        """Capture a step and replay it once. None if that failed on a rank."""
        control = self._model.groups.control
        expected = self._capture.warm_up(step)  # its errors are the step's own
        result, reason = None, None
        try:
            result = self._capture.record(step)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a capture raises, the step can run without it
            reason = summary(error)
        # before a replay, whose collectives would wait for a rank without a graph
        reason = agree(reason, control)
        if reason is None:
            assert result is not None
            replay, logits = result
            logits.fill_(math.nan)
            replay()
            reason = agree(difference(logits, expected), control)
            reason = reason and f"of a replayed step, {reason}"
        if reason is None:
            return result
        self._drop()
        self._has_failed = True
        self._ways.decode = self._direct
        self._ways.reasons["decode"] = f"capture as a CUDA graph failed: {reason}"
        warn(
            f"capturing a decoding step as a CUDA graph failed ({reason}): steps run without, "
            "which is slower",
            control,
        )
        return None

    def _drop(self) -> None:
        """Drop all graphs: they may share memory, so none is dropped alone."""
        self._captured.clear()
        self._capture.reset()


def _held(model: Transformer) -> list[object]:
    """The modules, weights and caches whose addresses a graph holds. Users may replace them; a
    change of ``parameter.data`` isn't seen."""
    modules = list(model.modules())
    weights = [p for module in modules for p in module._parameters.values() if p is not None]
    return [*modules, *weights, *(cache.k for cache in model.cache)]


def _round_up(n: int, limit: int, least: int = 1) -> int:
    """Round up to a power of two, at least ``least`` and at most ``limit``."""
    return min(max(least, 1 << (n - 1).bit_length()), limit)


class CudaCapture:
    """Captures the steps of one model as CUDA graphs, including NCCL collectives.

    It has a stream of its own, and warms up on it. Captured kernels use the stream's cuBLAS
    workspace: allocated during a capture, it would belong to that graph and be freed with it,
    although other graphs of the stream use it (pytorch#193402).
    """

    # torch allows one capture at a time; models in several threads have different locks
    _lock = threading.Lock()

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        self._graphs: list[torch.cuda.CUDAGraph] = []
        groups.reset_before_leaving(self)

    def warm_up(self, run: Callable[[], Tensor]) -> Tensor:
        with self._on_stream():
            run()  # libraries and compilers initialize
            return run()

    def record(self, run: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        """See ``Capture``. Raises the error that made the capture fail; torch's own message only
        says "due to a previous error"."""
        graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        failure: BaseException | None = None
        try:
            with self._lock, self._on_stream() as stream, warnings.catch_warnings():
                # nothing was captured: the kernels went to another device or stream
                warnings.filterwarnings("error", ".*CUDA Graph is empty")
                # NCCL's watchdog thread may call CUDA during the capture
                with torch.cuda.graph(
                    graph, pool=pool, stream=stream, capture_error_mode="thread_local"
                ):
                    try:
                        output = run()
                    except BaseException as error:
                        failure = error
                        raise
        except BaseException as error:
            self._end_recording(pool)
            raise failure or error from None
        self._graphs.append(graph)
        return graph.replay, output

    def _end_recording(self, pool: object) -> None:
        """A capture that fails leaves the allocator recording into its pool, which makes
        torch.cuda.empty_cache and later captures fail."""
        index = self._device.index
        device = torch.cuda.current_device() if index is None else index
        # if the capture was complete, it has ended, and the graph releases the pool itself
        with contextlib.suppress(AttributeError, RuntimeError):
            for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
                getattr(torch._C, name)(device, pool)

    def reset(self) -> None:
        # on ROCm, dropping a graph makes its device current
        with torch.cuda.device(self._device) if self._graphs else contextlib.nullcontext():
            for graph in self._graphs:
                graph.reset()
            self._graphs.clear()

    @contextlib.contextmanager
    def _on_stream(self) -> Iterator[torch.cuda.Stream]:
        """Make the model's device and this stream current; afterwards those from before are, also
        if a capture fails, which leaves its stream current. Each thread has its own current device,
        at first device 0, and kernels on another one aren't captured."""
        with torch.cuda.device(self._device):
            if self._stream is None:
                self._stream = torch.cuda.Stream(self._device)
            before = torch.cuda.current_stream(self._device)
            self._stream.wait_stream(before)
            try:
                with torch.cuda.stream(self._stream):
                    yield self._stream
            finally:  # kernels of a step that failed may still use the caller's tensors
                before.wait_stream(self._stream)
