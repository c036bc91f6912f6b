"""Will it fit? The memory a rank needs, by formulas from the shape of the model alone."""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import torch

from llama import checkpoint, fast
from llama.model import ModelArgs

GIB = 2**30
_ROOT = Path("/")


@dataclasses.dataclass(frozen=True)
class Plan:
    """Bytes that one of ``n_ranks`` needs.

    Attributes:
        tied: the embedding is the output layer too and is held once.
        device: where it will be; None leaves out what ``fast`` adds on a device.
        weights: the parameters, and the copies of them that some processors want
            (``fast.packs_weights``).
        cache: keys and values of max_batch_size x max_seq_len positions.
        workspace: what a pass over as many prompt tokens holds beside them at its peak.
    """

    args: ModelArgs
    n_ranks: int
    dtype: torch.dtype
    device: torch.device | None
    tied: bool
    weights: int
    cache: int
    workspace: int

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.workspace

    def __str__(self) -> str:
        args = self.args
        return (
            f"weights {self.weights / GIB:.2f} GiB + key/value cache {self.cache / GIB:.2f} GiB "
            f"(max_batch_size {args.max_batch_size} x max_seq_len {args.max_seq_len}) + workspace "
            f"{self.workspace / GIB:.2f} GiB = {self.total / GIB:.2f} GiB per rank "
            f"({self.n_ranks} rank(s), {str(self.dtype).removeprefix('torch.')})"
        )


def plan(
    args: ModelArgs,
    n_ranks: int,
    dtype: torch.dtype,
    device: torch.device | None = None,
    *,
    tied: bool = False,
) -> Plan:
    """What each of ``n_ranks`` needs. Nothing is allocated, whatever the size."""
    cuts = checkpoint.cuts(args)
    sizes = {key: checkpoint.n_bytes(cut, n_ranks, dtype) for key, cut in cuts.items()}
    weights = sum(sizes.values()) - (sizes["output.weight"] if tied else 0)
    if device is not None and fast.packs_weights(device, dtype):
        weights += sum(
            sizes[key]
            for key, cut in cuts.items()
            if len(cut.sizes) == 2 and not key.startswith("tok_embeddings")
        )
    positions = args.max_batch_size * args.max_seq_len
    kv_width = args.kv_heads_of(n_ranks) * args.head_dim
    cache = 2 * args.n_layers * positions * kv_width * dtype.itemsize
    workspace = _workspace(args, n_ranks, dtype)
    if device is not None and device.type == "cpu":
        workspace *= 3  # with fast.keep_freed_memory the heap has gaps: 1.3 to 2.5 was measured
    return Plan(args, n_ranks, dtype, device, tied, weights, cache, workspace)


def _workspace(args: ModelArgs, n_ranks: int, dtype: torch.dtype) -> int:
    """Peak of the temporary tensors of a pass over max_batch_size prompts of max_seq_len tokens.

    A term for each place in a layer that may be the peak, counted from the tensors that model.py
    holds there at once; then the logits and what the sampler makes of them.
    """
    n_tokens = args.max_batch_size * args.max_seq_len
    heads = args.dim // n_ranks
    ffn = args.ffn_hidden_dim // n_ranks
    kv = args.kv_heads_of(n_ranks) * args.head_dim
    size, single = dtype.itemsize, 4
    residual = 2 * args.dim * size
    per_token = max(
        residual + 3 * args.dim * single,  # RMSNorm in float32
        residual + args.dim * size + (2 * heads + 2 * kv) * size + 2 * heads * single,  # RoPE
        residual + args.dim * size + (4 * heads + 2 * kv) * size,  # attention
        residual + args.dim * size + 2 * ffn * size,  # SwiGLU
    )
    angles = args.head_dim * single  # cos and sin, gathered for every token
    indices = 4 * 8 + 36  # rows, positions and ids, the latter as Python numbers first
    table = args.max_seq_len * args.head_dim * single
    sampling = args.max_batch_size * args.vocab_size * (8 * single + 2 * 8)
    tensors = n_tokens * (per_token + angles + indices) + table + sampling
    return tensors * 9 // 8  # allocators and matrix libraries keep some more


def free_bytes(device: torch.device, n_local_ranks: int) -> int | None:
    """Memory that one of ``n_local_ranks`` on this machine may still take; None if not known."""
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
    if not meminfo.is_file():  # macOS says how much there is, but not how much is free
        names = os.sysconf_names
        if "SC_PHYS_PAGES" not in names:
            return None
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    if "MemAvailable" not in fields:
        return None
    available = int(fields["MemAvailable"].split()[0]) * 1024
    return min([available, *_free_in_control_groups()])


class _Files(NamedTuple):
    """Where a control group of one version has its limit, its use, and its file pages, which the
    kernel gives back when it needs memory."""

    limit: str
    used: str
    reclaimable: tuple[str, str]  # in memory.stat


_CGROUP1 = _Files(
    "memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")
)
_CGROUP2 = _Files("memory.max", "memory.current", ("inactive_file", "active_file"))


def _free_in_control_groups() -> Iterator[int]:
    """Memory left in each control group with a limit that this process is in: a container's, a
    systemd slice's, a Slurm job's. The kernel kills a process that takes more (cgroups(7))."""
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
        inside = PurePosixPath(path)  # and outside of this mount with a namespace of its own
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


def check(needed: Plan, free: int | None, device: torch.device) -> None:
    """Raise MemoryError, with the sizes that would fit, if ``free`` bytes are too few."""
    if free is None or needed.total <= free:
        return
    raise MemoryError(
        f"this needs {needed}, but {device} has {free / GIB:.2f} GiB free for this rank; "
        f"{_what_fits(needed, free)}"
    )


@contextlib.contextmanager
def explained(planned: Plan) -> Iterator[None]:
    """Add the plan to the message if a device runs out of memory all the same."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise torch.OutOfMemoryError(f"{error}\nThe plan was {planned}") from error


def _what_fits(needed: Plan, free: int) -> str:
    args = needed.args

    def fits(batch: int, length: int) -> bool:
        smaller = dataclasses.replace(args, max_batch_size=batch, max_seq_len=length)
        planned = plan(smaller, needed.n_ranks, needed.dtype, needed.device, tied=needed.tied)
        return planned.total <= free

    batch, length = args.max_batch_size, args.max_seq_len
    if not fits(1, 1):
        counts = ", ".join(map(str, args.rank_counts))
        return (
            "the weights leave no room for any cache: use more ranks (the model divides by "
            f"{counts}) or a smaller dtype"
        )
    sizes = [
        (batch, _last_true(lambda n: fits(batch, n), length)),
        (_last_true(lambda n: fits(n, length), batch), length),
    ]
    possible = [(b, n) for b, n in sizes if b and n]
    possible = possible or [(1, _last_true(lambda n: fits(1, n), length))]
    words = [f"max_seq_len {n} at max_batch_size {b}" for b, n in possible]
    return f"what fits is {' or '.join(words)}"


def _last_true(holds: Callable[[int], bool], stop: int) -> int:
    """Largest number in 0 ... ``stop`` - 1 for which ``holds``; it holds up to some number."""
    low, high = 0, stop
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
