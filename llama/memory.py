"""Estimate the memory that a rank needs from the model's shape, before anything is loaded."""

import contextlib
import dataclasses
import os
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from llama.accel import is_quantized
from llama.accel.cpu import activation_dtype
from llama.accel.cuda import why_not_flash
from llama.checkpoint.sharding import n_bytes, quantized_bytes, shard_specs
from llama.config import ModelArgs
from llama.engine import MAX_PREFILL_TOKENS
from llama.model import Transformer
from llama.quantize import Bits
from llama.scoring import SCORING_LOGITS

MIB, GIB = 2**20, 2**30
# On CUDA devices, in addition to the tensors of a pass. The context (0.3 to 0.5 GiB) isn't counted:
# ``free_bytes`` creates it when it asks how much is free.
# Code that the driver loads at a kernel's first launch (CUDA_MODULE_LOADING=LAZY) and the handles
# of cuBLAS: 100 to 300 MiB, estimated from the sizes of the modules that torch's wheels hold.
_KERNELS = 300 * MIB
# torch gives cuBLAS a workspace for each stream: 32 MiB from Hopper on, about 8 MiB before
# (ATen/cuda/CublasHandlePool.cpp). Graphs are captured on a stream of their own.
_CUBLAS_WORKSPACES = 2 * 32 * MIB
# Blocks that the caching allocator reserves for the tensors of a graph, apart from large ones: 2
# MiB for tensors below 1 MiB, 20 MiB for those below 10 MiB (c10/core/AllocatorConfig.h).
_GRAPH_BLOCKS = (2 + 20) * MIB
# NCCL connects at the first collective: 14 MiB of buffers per channel and peer (10 + 2 + 2, from
# NVIDIA/nccl#1685), in up to 32 channels, for a ring and for a tree; 192 MiB for the rest of a
# communicator is an estimate. Reported: 0.53 and 0.67 GiB on 2 and 4 A100 (NVIDIA/nccl#964), 1.0
# GiB on 8 H100 (#1685).
_NCCL = 2 * 32 * 14 * MIB + 192 * MIB
_ROOT = Path("/")


@dataclasses.dataclass(frozen=True)
class Plan:
    """Bytes needed by each of ``n_ranks``.

    Attributes:
        tied: the embedding is also the output layer, and is stored once.
        device: the target; None leaves out the device-specific additions of ``accel``.
        max_prefill_tokens: tokens in the largest pass.
        bits: of quantized tensors, by key.
        weights: the parameters.
        cache: keys and values of max_batch_size x max_seq_len positions.
        workspace: activations at the peak of a pass.
        runtime: what CUDA and its libraries allocate: kernels, workspaces, graphs, connections.
    """

    args: ModelArgs
    n_ranks: int
    dtype: torch.dtype
    device: torch.device | None
    tied: bool
    max_prefill_tokens: int
    bits: Mapping[str, Bits]
    weights: int
    cache: int
    workspace: int
    runtime: int

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.workspace + self.runtime

    def __str__(self) -> str:
        args = self.args
        dtype = str(self.dtype).removeprefix("torch.")
        if self.bits:
            dtype = f"int{min(self.bits.values())} and {dtype}"
        runtime = f"+ CUDA's own {self.runtime / GIB:.2f} GiB " if self.runtime else ""
        return (
            f"weights {self.weights / GIB:.2f} GiB + key/value cache {self.cache / GIB:.2f} GiB "
            f"(max_batch_size {args.max_batch_size} x max_seq_len {args.max_seq_len}) + workspace "
            f"{self.workspace / GIB:.2f} GiB {runtime}= {self.total / GIB:.2f} GiB per rank "
            f"({self.n_ranks} rank(s), {dtype})"
        )


def plan(
    args: ModelArgs,
    n_ranks: int,
    dtype: torch.dtype,
    device: torch.device | None = None,
    *,
    tied: bool = False,
    max_prefill_tokens: int = MAX_PREFILL_TOKENS,
    bits: Mapping[str, Bits] = MappingProxyType({}),
) -> Plan:
    """The plan for each of ``n_ranks``. Nothing is allocated.

    Args:
        bits: of quantized tensors, by key: see ``Checkpoint.quantized_bits``.
    """
    specs = shard_specs(args)
    sizes = {key: n_bytes(spec, n_ranks, dtype) for key, spec in specs.items()}
    sizes |= {key: quantized_bytes(specs[key], n_ranks, n) for key, n in bits.items()}
    shares_output = tied and "output.weight" not in bits
    weights = sum(sizes.values()) - (sizes["output.weight"] if shares_output else 0)
    positions = args.max_batch_size * args.max_seq_len
    kv_width = args.n_local_kv_heads(n_ranks) * args.head_dim
    cache = 2 * args.n_layers * positions * kv_width * dtype.itemsize
    activations = dtype if device is None else activation_dtype(device, dtype)
    workspace = _workspace(args, n_ranks, activations, max_prefill_tokens)
    if device is not None and device.type == "cpu":
        workspace *= 3  # keep_freed_memory fragments the heap: 1.3 to 2.5 was measured
    runtime = 0
    if device is not None and device.type == "cuda":
        runtime = _cuda_runtime(args, n_ranks, dtype, device)
    return Plan(
        args,
        n_ranks,
        dtype,
        device,
        tied,
        max_prefill_tokens,
        bits,
        weights,
        cache,
        workspace,
        runtime,
    )


def plan_of(model: Transformer, max_prefill_tokens: int) -> Plan:
    """The plan of an existing model."""
    output, embedding = model.output.weight, model.tok_embeddings.weight
    modules: dict[str, Any] = dict(model.named_modules())
    bits = {f"{name}.weight": x.linear.bits for name, x in modules.items() if is_quantized(x)}
    return plan(
        model.params,
        model.groups.size,
        embedding.dtype,
        model.device,
        tied=output is not None and output.data_ptr() == embedding.data_ptr(),
        max_prefill_tokens=max_prefill_tokens,
        bits=bits,
    )


def _workspace(args: ModelArgs, n_ranks: int, dtype: torch.dtype, max_prefill_tokens: int) -> int:
    """Peak size of the temporary tensors in an engine step.

    One term for each place in a layer that may be the peak, counting the tensors of model.py that
    are alive there; then the logits and sampling tensors of a batch, or of a prompt being scored.
    """
    n_tokens = min(max_prefill_tokens, args.max_batch_size * args.max_seq_len)
    heads = args.n_heads * args.head_dim // n_ranks
    ffn = args.ffn_hidden_dim // n_ranks
    kv = args.n_local_kv_heads(n_ranks) * args.head_dim
    size, single = dtype.itemsize, 4
    residual = 2 * args.dim * size
    per_token = max(
        residual + 3 * args.dim * single,  # RMSNorm in float32
        residual + args.dim * size + (2 * heads + 2 * kv) * size + 2 * heads * single,  # RoPE
        # RoPE of ``accel.projection``
        residual + args.dim * size + (2 * heads + 3 * kv) * size + (heads + kv) * single,
        residual + args.dim * size + (4 * heads + 2 * kv) * size,  # attention
        residual + args.dim * size + 2 * ffn * size,  # SwiGLU
    )
    angles = args.head_dim * single  # cos and sin, gathered for every token
    indices = 4 * 8 + 36  # slots, positions and ids, which start as Python ints
    mask = args.max_seq_len * (1 + size)  # of a chunk after the first, as bool and as dtype
    table = args.max_seq_len * args.head_dim * single
    sampling = args.max_batch_size * args.vocab_size * (8 * single + 2 * 8)
    n_scored = min(n_tokens, max(1, SCORING_LOGITS // args.vocab_size))
    scoring = n_scored * args.vocab_size * (size + 2 * single)
    layers = n_tokens * (per_token + angles + indices + mask)
    tensors = max(layers, scoring) + table + sampling
    return tensors * 9 // 8  # overhead of allocators and matrix libraries


def _cuda_runtime(args: ModelArgs, n_ranks: int, dtype: torch.dtype, device: torch.device) -> int:
    """Peak of what CUDA adds to a rank's tensors, with a graph of every size captured.

    A graph keeps the memory of its step: the logits, as dtype and in float32, gathered from the
    ranks, and less than ``_GRAPH_BLOCKS`` for the activations of one token per row.
    """
    n_powers = (args.max_batch_size - 1).bit_length()  # of two, below max_batch_size
    n_rows = 2**n_powers - 1 + args.max_batch_size  # of all sizes together
    n_lengths = 1
    if not _reads_lengths(args, dtype, device):
        n_lengths += max(0, (args.max_seq_len - 1).bit_length() - 8)  # 256, 512, ...
    logits = n_rows * args.vocab_size * (2 * dtype.itemsize + 4)
    graphs = n_lengths * ((n_powers + 1) * _GRAPH_BLOCKS + logits)
    return _KERNELS + _CUBLAS_WORKSPACES + graphs + (_NCCL if n_ranks > 1 else 0)


def _reads_lengths(args: ModelArgs, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether attention reads the lengths on the device, so that one graph serves all. A device
    that isn't there is planned as a current one."""
    if not torch.cuda.is_available():
        return dtype != torch.float32
    return why_not_flash(args.head_dim, dtype, device) is None


def free_bytes(device: torch.device, n_local_ranks: int) -> int | None:
    """Memory available to each of ``n_local_ranks`` on this machine; None if unknown."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + unused
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    free_host = _free_host_bytes()
    return None if free_host is None else free_host // n_local_ranks


def _free_host_bytes() -> int | None:
    meminfo = _ROOT / "proc/meminfo"
    if not meminfo.is_file():  # macOS reports the total only, Windows has no sysconf
        names = getattr(os, "sysconf_names", {})
        if "SC_PHYS_PAGES" not in names:
            return None
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    if "MemAvailable" not in fields:
        return None
    available = int(fields["MemAvailable"].split()[0]) * 1024
    return min([available, *_free_in_control_groups()])


class _Files(NamedTuple):
    """Files of a control group with its limit, its usage, and its file pages, which the kernel can
    reclaim."""

    limit: str
    used: str
    reclaimable: tuple[str, str]  # in memory.stat


_CGROUP1 = _Files(
    "memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")
)
_CGROUP2 = _Files("memory.max", "memory.current", ("inactive_file", "active_file"))


def _free_in_control_groups() -> Iterator[int]:
    """Memory left in each limited control group of this process: a container, a systemd slice, a
    Slurm job. The kernel kills a process that exceeds it (cgroups(7))."""
    try:
        mounts = (_ROOT / "proc/self/mountinfo").read_text().splitlines()
        lines = (_ROOT / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    paths: dict[str, str] = {}  # by controller, "" for version 2
    for line in lines:
        _, controllers, path = line.split(":", 2)
        paths |= dict.fromkeys(controllers.split(","), path)
    for mount in mounts:
        fields, _, source = mount.partition(" - ")
        root, mounted_at = fields.split(" ")[3:5]
        kind, _, options = source.split(" ")
        if kind == "cgroup2":
            files, path = _CGROUP2, paths.get("", "/")
        elif kind == "cgroup" and "memory" in options.split(","):
            files, path = _CGROUP1, paths.get("memory", "/")
        else:
            continue
        top = _ROOT / mounted_at.lstrip("/")
        inside = PurePosixPath(path)  # outside of this mount in another namespace
        group = top / (inside.relative_to(root) if inside.is_relative_to(root) else "")
        for folder in (group, *group.parents):
            if folder.is_relative_to(top):
                yield from _free_in_control_group(folder, files)


def _free_in_control_group(folder: Path, files: _Files) -> Iterator[int]:
    try:
        limit = int((folder / files.limit).read_text())
        used = int((folder / files.used).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no limit, "max"
        return
    yield limit - used + sum(int(stat.get(name, 0)) for name in files.reclaimable)


def check(needed: Plan, free: int | None) -> None:
    """Raise MemoryError, listing sizes that would fit, if ``free`` bytes aren't enough."""
    if free is None or needed.total <= free:
        return
    raise MemoryError(
        f"this needs {needed}, but {needed.device or 'the device'} has {free / GIB:.2f} GiB free "
        f"for this rank; {_what_fits(needed, free)}"
    )


@contextlib.contextmanager
def explain_oom(plan: Callable[[], Plan]) -> Iterator[None]:
    """Add the plan to the message if a device runs out of memory."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise torch.OutOfMemoryError(f"{error}\nThe plan was {plan()}") from error


def _what_fits(needed: Plan, free: int) -> str:
    args = needed.args

    def fits(batch: int, length: int) -> bool:
        smaller = dataclasses.replace(args, max_batch_size=batch, max_seq_len=length)
        planned = plan(
            smaller,
            needed.n_ranks,
            needed.dtype,
            needed.device,
            tied=needed.tied,
            max_prefill_tokens=needed.max_prefill_tokens,
            bits=needed.bits,
        )
        return planned.total <= free

    def largest(holds: Callable[[int], bool], limit: int) -> int:
        """Largest n in [0, ``limit``) for which ``holds`` is true, given that it is true up to
        some n and false after."""
        return bisect_left(range(1, limit), True, key=lambda n: not holds(n))

    batch, length = args.max_batch_size, args.max_seq_len
    if not fits(1, 1):
        counts = ", ".join(map(str, args.valid_tp_sizes))
        return (
            f"the weights leave no room for a cache: use more ranks (possible: {counts}), a "
            "smaller dtype, or quantize"
        )
    sizes = [
        (batch, largest(lambda n: fits(batch, n), length)),
        (largest(lambda n: fits(n, length), batch), length),
    ]
    possible = [(b, n) for b, n in sizes if b and n]
    possible = possible or [(1, largest(lambda n: fits(1, n), length))]
    words = [f"max_seq_len {n} at max_batch_size {b}" for b, n in possible]
    return f"it would fit with {' or '.join(words)}"
