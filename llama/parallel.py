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
import io
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import fairscale.nn.model_parallel.initialize as groups
import fairscale.nn.model_parallel.layers as fairscale_layers
import torch
import torch.distributed as dist
import torch.nn.functional as F
from fairscale.nn.model_parallel.utils import VocabUtility, divide_and_check_no_remainder
from torch import nn

_T = TypeVar("_T")

# --- Groups -----------------------------------------------------------------------------------


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


def initialize(device: torch.device, requested_size: int | None) -> None:
    """Join the launched processes to one model-parallel group; nothing to do for one process.

    Args:
        device: the CPU communicates by gloo, a CUDA device by NCCL.
        requested_size: ranks that share one copy of the weights; None means all of them. With
            fewer, there are several copies (replicas).

    Raises:
        ValueError: the sizes do not fit the number of processes.
    """
    launched = dist.is_initialized() or dist.is_torchelastic_launched()
    if launched and not dist.is_initialized():
        if device.type == "mps" and n_processes() > 1:
            raise ValueError("MPS cannot run several processes: give device='cpu', or start one")
        if device.type == "cuda":
            dist.init_process_group("nccl", device_id=device)
        else:
            dist.init_process_group("gloo")
        atexit.register(_leave)
    world_size = n_processes()
    size = world_size if requested_size is None else requested_size
    if size < 1 or world_size % size:
        raise ValueError(
            f"model_parallel_size is {size}, but {world_size} process(es) are running, which is no "
            f"multiple of it; leave it out, or start with\n    {torchrun_line(max(size, 1))}"
        )
    if not launched:
        groups.destroy_model_parallel()  # a group of processes that are gone
    elif not groups.model_parallel_is_initialized() or model_parallel_size() != size:
        groups.destroy_model_parallel()
        with contextlib.redirect_stdout(io.StringIO()):  # fairscale reports the sizes by print
            groups.initialize_model_parallel(size)


def torchrun_line(n_processes: int) -> str:
    """The command that starts the running script again on ``n_processes``."""
    script = shlex.join(sys.argv) if sys.argv[0].endswith(".py") else "your_script.py"
    if Path(sys.argv[0]).name == "__main__.py":  # python -m package
        script = shlex.join(["-m", Path(sys.argv[0]).parent.name, *sys.argv[1:]])
    return f"torchrun --nproc_per_node {n_processes} {script}"


@contextlib.contextmanager
def failing_together(device: torch.device) -> Iterator[None]:
    """If the body fails on one process, all of those that were launched together raise: without
    this, the others would wait for it in their next collective call."""
    failure = None
    try:
        yield
    except Exception as error:
        failure = error
    n_failed = torch.tensor([float(failure is not None)], device=device)
    if n_processes() > 1:
        dist.all_reduce(n_failed)
    if failure is not None:
        raise failure
    if n_failed > 0:
        raise RuntimeError("another rank could not load its part: its own message says why")


def _leave() -> None:
    if dist.is_initialized():
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
    """What the replicas have each computed, in their order, on every rank. It travels pickled."""
    parts: list[_T] = [part] * n_replicas()
    if len(parts) > 1:
        dist.all_gather_object(parts, part, group=groups.get_data_parallel_group())
    return parts


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
