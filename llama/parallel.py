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
import dataclasses
import datetime
import hashlib
import io
import json
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import fairscale.nn.model_parallel.initialize as fairscale_groups
import fairscale.nn.model_parallel.layers as fairscale_layers
import torch
import torch.distributed as dist
import torch.nn.functional as F
from fairscale.nn.model_parallel.utils import VocabUtility, divide_and_check_no_remainder
from torch import nn

from llama.files import summary
from llama.watch import RankError, Watch

# How long a collective call takes is up to users: it may wait for one who thinks, or for a slow
# disk. The watch finds ranks that are gone. Longer than 24 days is more than sockets can count.
_FOREVER = datetime.timedelta(days=20)

# --- Groups -----------------------------------------------------------------------------------

_watch: Watch | None = None
_is_forked = False  # from a process that had joined the others
# Gloo groups for values of Python, so that none is taken for a part of a pass.
_everyone: dist.ProcessGroup | None = None
_control: dist.ProcessGroup | None = None  # the ranks of the current model-parallel group
_made_in: dist.ProcessGroup | None = None  # torch.distributed's default group at that time


@dataclasses.dataclass(frozen=True, eq=False)
class Groups:
    """This rank's place among the launched processes. A model keeps the groups it was built in,
    whatever is built after it.

    Attributes:
        size: ranks that share one copy of the weights (tensor parallelism); ``rank`` is this one.
        n_replicas: copies of the weights; ``replica`` is the one this rank belongs to.
        tensors: fairscale's model-parallel group, for the tensors of a pass; None for one rank.
        control: a gloo group of the same ranks, for values of Python; None: they aren't compared.
    """

    size: int = 1
    rank: int = 0
    n_replicas: int = 1
    replica: int = 0
    tensors: dist.ProcessGroup | None = None
    control: dist.ProcessGroup | None = None

    def __deepcopy__(self, memo: object) -> "Groups":
        return self  # a copied model belongs to the same ranks

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(x, group=self.tensors)
        return x

    def all_gather_last_dim(self, x: torch.Tensor) -> torch.Tensor:
        if self.size == 1:
            return x
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous(), group=self.tensors)
        return torch.cat(parts, dim=-1)

    def broadcast_from_first(self, tensor: torch.Tensor) -> torch.Tensor:
        """Overwrite ``tensor`` on every rank by the first rank's."""
        if self.size > 1:
            assert self.tensors is not None
            source = dist.get_global_rank(self.tensors, 0)
            dist.broadcast(tensor, src=source, group=self.tensors)
        return tensor

    @contextlib.contextmanager
    def one_call(self, name: str, **values: object) -> Iterator[None]:
        """A call that all ranks make together, with equal arguments.

        Raises:
            ValueError: on every rank, if the arguments differ.
            RuntimeError: this process was forked from a rank.
        """
        if self.size > 1 and _is_forked:
            raise RuntimeError(
                "this process was forked from a rank and can't use its connections: call the model "
                "in the rank itself"
            )
        with contextlib.nullcontext() if _watch is None else _watch.call():
            with computing():
                _agree(name, values, self.control)
            yield

    def gather_from_replicas(self, part: Any) -> list[Any]:
        """The results of all replicas, in their order, on every rank: values that JSON can hold."""
        return _exchange(part if self.rank == 0 else None, _everyone)[:: self.size]


def current_groups() -> Groups:
    """The groups of the latest ``initialize``, or those that the caller made with fairscale."""
    if not fairscale_groups.model_parallel_is_initialized():
        return Groups()
    size, rank = (
        fairscale_groups.get_model_parallel_world_size(),
        fairscale_groups.get_model_parallel_rank(),
    )
    tensors = fairscale_groups.get_model_parallel_group() if size > 1 else None
    if _made_in is not dist.group.WORLD:  # not by ``initialize``: nothing to put replicas together
        return Groups(size, rank, tensors=tensors)
    return Groups(
        size,
        rank,
        fairscale_groups.get_data_parallel_world_size(),
        fairscale_groups.get_data_parallel_rank(),
        tensors,
        _control if _control is not None and _control.size() == size else None,
    )


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
    global _everyone, _control, _made_in
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
        fairscale_groups.destroy_model_parallel()
        _everyone = _control = _made_in = None
        return
    if current_groups().size != size or not fairscale_groups.model_parallel_is_initialized():
        fairscale_groups.destroy_model_parallel()  # forgets them; models that have them go on
        with contextlib.redirect_stdout(io.StringIO()):  # fairscale reports the sizes by print
            fairscale_groups.initialize_model_parallel(size)
        # fairscale's groups have torch's default, which is ten minutes for NCCL
        group = fairscale_groups.get_model_parallel_group()
        dist.distributed_c10d._set_pg_timeout(_FOREVER, group)
    if _control is None or _control.size() != size:
        for first in range(0, world_size, size):  # every process has to make every group
            ranks = list(range(first, first + size))
            group = dist.new_group(ranks, backend="gloo", timeout=_FOREVER)
            if dist.get_rank() in ranks:
                _control = group


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
    global _everyone, _control, _made_in, _watch
    if _made_in is not dist.group.WORLD:
        if _made_in is not None:  # fairscale's groups belong to one that is gone
            fairscale_groups.destroy_model_parallel()
        _everyone, _control = dist.new_group(backend="gloo", timeout=_FOREVER), None
        _made_in = dist.group.WORLD
    if dist.is_torchelastic_launched() and n_processes() > 1:
        if _watch is None:
            _watch = Watch(dist.get_rank(), dist.get_world_size())
            atexit.register(_watch.leave)
        _watch.timeout = rank_timeout
    with computing():
        sizes = {"model_parallel_size": size, "rank_timeout": rank_timeout}
        agree("Llama.build", sizes)


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


def computing() -> contextlib.AbstractContextManager[None]:
    """A part of a call in which the ranks wait for each other: see ``Watch.computing``."""
    return contextlib.nullcontext() if _watch is None else _watch.computing()


def agree(name: str, values: Mapping[str, object]) -> None:
    """Check that all processes that were launched together give the same values.

    Raises:
        ValueError: on every rank, if they do not; the message says what differs.
    """
    _agree(name, values, _everyone)


def _agree(name: str, values: Mapping[str, object], group: dist.ProcessGroup | None) -> None:
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
    """The values of every rank of a group, on all of them. They travel as JSON: unlike a pickle, it
    can't run code."""
    if group is None:
        return [value]
    data = torch.frombuffer(bytearray(json.dumps(value), "ascii"), dtype=torch.uint8)
    n_bytes = [torch.empty(1, dtype=torch.int64) for _ in range(dist.get_world_size(group))]
    dist.all_gather(n_bytes, torch.tensor([len(data)]), group=group)
    longest = int(max(n_bytes))
    received = [torch.empty(longest, dtype=torch.uint8) for _ in n_bytes]
    dist.all_gather(received, F.pad(data, (0, longest - len(data))), group=group)
    return [json.loads(bytes(r[: int(n)])) for r, n in zip(received, n_bytes, strict=True)]


def _leave() -> None:
    # with a rank gone, NCCL may wait for it here
    if dist.is_initialized() and (_watch is None or not _watch.has_told):
        fairscale_groups.destroy_model_parallel()
        dist.destroy_process_group()


def _before_fork() -> None:
    if _watch is not None:
        _watch.before_fork()


def _after_fork_in_parent() -> None:
    if _watch is not None:
        _watch.after_fork()


def _after_fork_in_child() -> None:
    """A forked process isn't a rank: it shares the connections of one, and must not use them."""
    global _watch, _is_forked
    _is_forked = _is_forked or dist.is_initialized()
    atexit.unregister(_leave)
    if _watch is not None:
        atexit.unregister(_watch.leave)
        _watch.detach_child()
        _watch = None


os.register_at_fork(
    before=_before_fork,
    after_in_parent=_after_fork_in_parent,
    after_in_child=_after_fork_in_child,
)

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
        self.groups = current_groups()
        self.output_size_per_partition = divide_and_check_no_remainder(
            out_features, self.groups.size
        )
        self.weight = _weight(self.output_size_per_partition, in_features)
        self.register_parameter("bias", None)

    def forward(self, input_: torch.Tensor) -> torch.Tensor:
        y = self.linear(input_, self.weight)
        return self.groups.all_gather_last_dim(y) if self.gather_output else y


class RowParallelLinear(fairscale_layers.RowParallelLinear):
    """x @ W.T with the columns of W (the inputs, split already) over the ranks; sums the parts."""

    linear: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = staticmethod(F.linear)

    def __init__(self, in_features: int, out_features: int) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.input_is_parallel = True
        self.groups = current_groups()
        self.input_size_per_partition = divide_and_check_no_remainder(in_features, self.groups.size)
        self.weight = _weight(out_features, self.input_size_per_partition)
        self.register_parameter("bias", None)

    def forward(self, input_: torch.Tensor) -> torch.Tensor:
        return self.groups.all_reduce(self.linear(input_, self.weight))


class VocabParallelEmbedding(fairscale_layers.VocabParallelEmbedding):
    """Embedding with the vocabulary split over the ranks: each adds the rows it holds."""

    def __init__(self, num_embeddings: int, embedding_dim: int) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.groups = current_groups()
        self.vocab_start_index, self.vocab_end_index = (
            VocabUtility.vocab_range_from_global_vocab_size(
                num_embeddings, self.groups.rank, self.groups.size
            )
        )
        self.num_embeddings_per_partition = self.vocab_end_index - self.vocab_start_index
        self.weight = _weight(self.num_embeddings_per_partition, embedding_dim)

    def forward(self, input_: torch.Tensor) -> torch.Tensor:
        if self.groups.size == 1:
            return F.embedding(input_, self.weight)
        local = input_ - self.vocab_start_index
        elsewhere = (local < 0) | (local >= self.num_embeddings_per_partition)
        y = F.embedding(local.masked_fill(elsewhere, 0), self.weight)
        return self.groups.all_reduce(y.masked_fill(elsewhere[..., None], 0))
