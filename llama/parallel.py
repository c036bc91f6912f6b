"""Tensor parallelism: the process groups, and the three layers that are split over ranks.

Megatron's scheme (Shoeybi et al., 2019, section 3): a column-parallel layer holds a slice of the
outputs, the row-parallel layer after it the matching slice of the inputs, so that a pair of them
needs one all-reduce. Groups, layer classes and shapes are fairscale's. The forward passes are ours:
fairscale's mark tensors for autograd and index with boolean masks, which torch.compile and CUDA
graphs cannot take.

With one process there is no process group at all; every function here then answers for a group of
one.
"""

import atexit
import contextlib
import datetime
import hashlib
import io
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import fairscale.nn.model_parallel.initialize as groups
import fairscale.nn.model_parallel.layers as fairscale_layers
import torch
import torch.distributed as dist
import torch.nn.functional as F
from fairscale.nn.model_parallel.utils import VocabUtility, divide_and_check_no_remainder
from torch import nn

from llama.files import summary
from llama.watch import RankError, Watch

_T = TypeVar("_T")

# How long a collective call takes is up to users: it may wait for one who thinks, or for a slow
# disk. The watch finds ranks that are gone. Longer than 24 days is more than sockets can count.
_FOREVER = datetime.timedelta(days=20)

# --- Groups -----------------------------------------------------------------------------------

_watch: Watch | None = None
# Groups of their own for what is said in Python: it cannot be taken for a part of a pass.
_everyone: dist.ProcessGroup | None = None
_partners: dist.ProcessGroup | None = None  # of the model-parallel group
_made_in: dist.ProcessGroup | None = None  # torch.distributed's own group at that time


def n_processes() -> int:
    """Number of processes that were launched together.

    They were if torchrun started them or the caller has initialized ``torch.distributed``;
    WORLD_SIZE alone may come from a launcher that has nothing to do with us.
    """
    if dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ["WORLD_SIZE"]) if dist.is_torchelastic_launched() else 1


def n_local_processes() -> int:
    """Number of them on this machine."""
    if dist.is_torchelastic_launched():
        return int(os.environ["LOCAL_WORLD_SIZE"])
    return n_processes()


def initialize(device: torch.device, requested_size: int | None, rank_timeout: float) -> None:
    """Join the launched processes to model-parallel groups; nothing to do for one process.

    Args:
        device: the CPU communicates by gloo, a CUDA device by NCCL.
        requested_size: ranks that share one copy of the weights; None means all of them. With
            fewer, there are several copies (replicas).
        rank_timeout: see ``Llama.build``.

    Raises:
        ValueError: the sizes do not fit the number of processes, or differ between them.
        RuntimeError: the processes cannot reach each other.
    """
    global _everyone, _partners, _made_in
    launched = dist.is_initialized() or dist.is_torchelastic_launched()
    if launched and not dist.is_initialized():
        _join(device)
    world_size = n_processes()
    size = world_size if requested_size is None else requested_size
    if launched:
        _listen(size, rank_timeout)
    elif os.environ.get("WORLD_SIZE", "1") != "1":
        warnings.warn(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but torchrun did not start this process "
            "and torch.distributed is not initialized: it runs alone. Start it by torchrun, or "
            "call torch.distributed.init_process_group before Llama.build, to share the model",
            stacklevel=3,
        )
    if size < 1 or world_size % size:
        raise ValueError(
            f"model_parallel_size is {size}, but {world_size} process(es) are running, which is no "
            f"multiple of it; leave it out, or start with\n    {torchrun_line(max(size, 1))}"
        )
    if not launched:  # what there is belongs to a group that is gone
        groups.destroy_model_parallel()
        _everyone = _partners = _made_in = None
        return
    if not groups.model_parallel_is_initialized() or model_parallel_size() != size:
        groups.destroy_model_parallel()
        with contextlib.redirect_stdout(io.StringIO()):  # fairscale reports the sizes by print
            groups.initialize_model_parallel(size)
        # fairscale's groups have torch's default, which is ten minutes for NCCL
        dist.distributed_c10d._set_pg_timeout(_FOREVER, groups.get_model_parallel_group())
    if _partners is None or dist.get_world_size(_partners) != size:
        for first in range(0, world_size, size):  # every process has to make every group
            ranks = list(range(first, first + size))
            group = dist.new_group(ranks, backend="gloo", timeout=_FOREVER)
            if dist.get_rank() in ranks:
                _partners = group


def _join(device: torch.device) -> None:
    if device.type == "mps" and n_processes() > 1:
        raise ValueError("MPS cannot run several processes: give device='cpu', or start one")
    options: dict[str, Any] = {"backend": "gloo"}
    if device.type == "cuda":
        options = {"backend": "nccl", "device_id": device}
    try:
        dist.init_process_group(**options, timeout=_FOREVER)
    except (dist.DistNetworkError, ValueError) as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise RuntimeError(
            f"the {n_processes()} processes cannot meet at {where} ({summary(error)}): if another "
            "program uses the port, give torchrun another --master_port, or --standalone on a "
            "single machine"
        ) from error
    atexit.register(_leave)


def _listen(size: int, rank_timeout: float) -> None:
    """Start the watch, and the groups for what is said in Python."""
    global _everyone, _partners, _made_in, _watch
    if _made_in is not dist.group.WORLD:
        _everyone, _partners = dist.new_group(backend="gloo", timeout=_FOREVER), None
        _made_in = dist.group.WORLD
    if dist.is_torchelastic_launched() and n_processes() > 1:
        if _watch is None:
            _watch = Watch(dist.get_rank(), dist.get_world_size())
            atexit.register(_watch.leave)
        _watch.timeout = rank_timeout
    with computing():
        sizes = {"model_parallel_size": size, "rank_timeout": rank_timeout}
        agree("Llama.build", sizes, everyone=True)


def torchrun_line(n_processes: int) -> str:
    """The command that starts the running script again on ``n_processes``."""
    script = shlex.join(sys.argv) if sys.argv[0].endswith(".py") else "your_script.py"
    if Path(sys.argv[0]).name == "__main__.py":  # python -m package
        script = shlex.join(["-m", Path(sys.argv[0]).parent.name, *sys.argv[1:]])
    return f"torchrun --nproc_per_node {n_processes} {script}"


# --- What the ranks do together ---------------------------------------------------------------


@contextlib.contextmanager
def failing_together() -> Iterator[None]:
    """If the body fails on one process, all of those that were launched together raise: without
    this, the others would wait for it in their next collective call.

    Raises:
        RankError: where it has not failed itself; the message is the other's.
    """
    failure = None
    try:
        yield
    except Exception as error:
        failure = error
    with computing():
        failures = _exchange(None if failure is None else summary(failure), _everyone)
    if failure is not None:
        raise failure
    for rank, reason in enumerate(failures):
        if reason is not None:
            raise RankError(f"rank {rank} failed ({reason})")


@contextlib.contextmanager
def one_call(name: str, **values: object) -> Iterator[None]:
    """A call that all ranks of the model-parallel group make together, with equal arguments."""
    with contextlib.nullcontext() if _watch is None else _watch.call():
        with computing():
            agree(name, values)
        yield


def computing() -> contextlib.AbstractContextManager[None]:
    """A part of a call in which the ranks wait for each other: see ``Watch.computing``."""
    return contextlib.nullcontext() if _watch is None else _watch.computing()


def agree(name: str, values: Mapping[str, object], *, everyone: bool = False) -> None:
    """Check that all ranks of the model-parallel group, or all there are, give the same values.

    Raises:
        ValueError: on every rank, if they do not; the message says what differs.
    """
    group = _everyone if everyone else _partners
    if group is None or dist.get_world_size(group) == 1:
        return
    given = _exchange({key: _shown(value) for key, value in values.items()}, group)
    for rank, theirs in enumerate(given):
        for key, value in theirs.items():
            if value != given[0][key]:
                first = dist.get_global_rank(group, 0)
                raise ValueError(
                    f"{name}: {key} is {given[0][key]} on rank {first} and {value} on rank "
                    f"{first + rank}: every rank must make the same calls with the same arguments"
                )


def _shown(value: object) -> str:
    """A value as a text that is short, and another one for another value."""
    text = repr(value.tolist() if isinstance(value, torch.Tensor) else value)
    if len(text) <= 80:
        return text
    return f"{text[:60]}... ({hashlib.blake2b(text.encode(), digest_size=6).hexdigest()})"


def _exchange(value: Any, group: dist.ProcessGroup | None) -> list[Any]:
    """What every rank of a group has given, on all of them. It travels pickled."""
    if group is None:
        return [value]
    values = [value] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def _leave() -> None:
    # with a rank gone, NCCL may wait for it here
    if dist.is_initialized() and (_watch is None or not _watch.has_told):
        groups.destroy_model_parallel()
        dist.destroy_process_group()


def model_parallel_size() -> int:
    initialized = groups.model_parallel_is_initialized()
    return groups.get_model_parallel_world_size() if initialized else 1


def model_parallel_rank() -> int:
    initialized = groups.model_parallel_is_initialized()
    return groups.get_model_parallel_rank() if initialized else 0


def n_replicas() -> int:
    """Number of copies of the weights; ``model_parallel_size`` ranks hold one together."""
    initialized = groups.model_parallel_is_initialized()
    return groups.get_data_parallel_world_size() if initialized else 1


def replica() -> int:
    """Which of the copies this rank belongs to."""
    initialized = groups.model_parallel_is_initialized()
    return groups.get_data_parallel_rank() if initialized else 0


def gather_from_replicas(part: _T) -> list[_T]:
    """What the replicas have each computed, in their order, on every rank."""
    size = model_parallel_size()
    if n_replicas() == 1:
        return [part]
    return _exchange(part if model_parallel_rank() == 0 else None, _everyone)[::size]


def broadcast_from_first(tensor: torch.Tensor) -> torch.Tensor:
    """Overwrite ``tensor`` on every rank of the model-parallel group by the first rank's."""
    if model_parallel_size() > 1:
        source, group = groups.get_model_parallel_src_rank(), groups.get_model_parallel_group()
        dist.broadcast(tensor, src=source, group=group)
    return tensor


def all_reduce(x: torch.Tensor) -> torch.Tensor:
    """Sum over the model-parallel group, in place."""
    if model_parallel_size() > 1:
        dist.all_reduce(x, group=groups.get_model_parallel_group())
    return x


def _all_gather_last_dim(x: torch.Tensor) -> torch.Tensor:
    size = model_parallel_size()
    if size == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(size)]
    dist.all_gather(parts, x.contiguous(), group=groups.get_model_parallel_group())
    return torch.cat(parts, dim=-1)


# --- Layers -----------------------------------------------------------------------------------
# The constructors skip fairscale's on purpose: it ignores the default device (so nothing can be
# built on "meta") and, with several ranks, fills a full-size master weight. ``linear`` is what
# fast.py may exchange for the same in another form.


def _weight(rows: int, columns: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(rows, columns), requires_grad=False)


class ColumnParallelLinear(fairscale_layers.ColumnParallelLinear):
    """x @ W.T with the rows of W (the outputs) split over the ranks."""

    linear: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = staticmethod(F.linear)

    def __init__(self, in_features: int, out_features: int, gather_output: bool = False) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.gather_output = gather_output
        self.output_size_per_partition = divide_and_check_no_remainder(
            out_features, model_parallel_size()
        )
        self.weight = _weight(self.output_size_per_partition, in_features)
        self.register_parameter("bias", None)

    def forward(self, input_: torch.Tensor) -> torch.Tensor:
        y = self.linear(input_, self.weight)
        return _all_gather_last_dim(y) if self.gather_output else y


class RowParallelLinear(fairscale_layers.RowParallelLinear):
    """x @ W.T with the columns of W (the inputs, split already) over the ranks; sums the parts."""

    linear: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = staticmethod(F.linear)

    def __init__(self, in_features: int, out_features: int) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.input_is_parallel = True
        self.input_size_per_partition = divide_and_check_no_remainder(
            in_features, model_parallel_size()
        )
        self.weight = _weight(out_features, self.input_size_per_partition)
        self.register_parameter("bias", None)

    def forward(self, input_: torch.Tensor) -> torch.Tensor:
        return all_reduce(self.linear(input_, self.weight))


class VocabParallelEmbedding(fairscale_layers.VocabParallelEmbedding):
    """Embedding with the vocabulary split over the ranks: each adds the rows it holds."""

    def __init__(self, num_embeddings: int, embedding_dim: int) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.vocab_start_index, self.vocab_end_index = (
            VocabUtility.vocab_range_from_global_vocab_size(
                num_embeddings, model_parallel_rank(), model_parallel_size()
            )
        )
        self.num_embeddings_per_partition = self.vocab_end_index - self.vocab_start_index
        self.weight = _weight(self.num_embeddings_per_partition, embedding_dim)

    def forward(self, input_: torch.Tensor) -> torch.Tensor:
        if model_parallel_size() == 1:
            return F.embedding(input_, self.weight)
        local = input_ - self.vocab_start_index
        elsewhere = (local < 0) | (local >= self.num_embeddings_per_partition)
        y = F.embedding(local.masked_fill(elsewhere, 0), self.weight)
        return all_reduce(y.masked_fill(elsewhere[..., None], 0))
