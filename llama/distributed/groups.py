"""Process groups: which ranks share one copy of the weights, and each process's role.

The groups are fairscale's. A single process has no process group; all functions work without one.
"""

import atexit
import contextlib
import dataclasses
import datetime
import io
import os
import shlex
import sys
import warnings
import weakref
from pathlib import Path
from typing import Any, Protocol

import fairscale.nn.model_parallel.initialize as fairscale_groups
import torch
import torch.distributed as dist

from llama.distributed import collectives
from llama.distributed.watchdog import Watchdog
from llama.files import summary

# No collective timeout: a rank may be waiting for user input or a slow disk. The watchdog detects
# lost ranks. (Socket timeouts are limited to 24 days.)
_FOREVER = datetime.timedelta(days=20)

_is_forked = False  # from a process that was one of several ranks
_tp_control: dist.ProcessGroup | None = None  # gloo, the ranks of the current model-parallel group
_default_group: dist.ProcessGroup | None = None  # torch's default group that these belong to


@dataclasses.dataclass(frozen=True, eq=False)
class Groups:
    """This rank's role among the launched processes. A model keeps the groups it was built with.

    Attributes:
        size: ranks that share one copy of the weights (tensor parallel); ``rank`` is this one.
        n_replicas: copies of the weights; ``replica`` is the one this rank belongs to.
        tensors: fairscale's model-parallel group, for the tensors of a pass; None for one rank.
        control: a gloo group of the same ranks, for Python values; None if there is none.
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
        """Overwrite ``tensor`` on every rank with the first rank's."""
        if self.size > 1:
            assert self.tensors is not None
            source = dist.get_global_rank(self.tensors, 0)
            dist.broadcast(tensor, src=source, group=self.tensors)
        return tensor

    def collective_call(
        self, name: str, **values: object
    ) -> contextlib.AbstractContextManager[None]:
        """A call that all ranks make together, with equal arguments.

        Raises:
            ValueError: on entry, on every rank, if the arguments differ.
            RuntimeError: this process was forked from a rank.
        """
        if self.size > 1 and _is_forked:
            raise RuntimeError(
                "this process was forked from a rank and can't use its connections: call the model "
                "in the rank itself"
            )
        return collectives.collective_call(name, self.control, values)

    def gather_from_replicas(self, part: Any) -> list[Any]:
        """The results of all replicas, in order, on every rank; must be JSON-serializable."""
        value = part if self.rank == 0 else None
        return collectives.all_gather_json(value, collectives.world)[:: self.size]


def current_groups() -> Groups:
    """The groups of the latest ``initialize``, or those the caller created with fairscale."""
    if not fairscale_groups.model_parallel_is_initialized():
        return Groups()
    size, rank = (
        fairscale_groups.get_model_parallel_world_size(),
        fairscale_groups.get_model_parallel_rank(),
    )
    tensors = fairscale_groups.get_model_parallel_group() if size > 1 else None
    if _default_group is not dist.group.WORLD:  # not made by ``initialize``
        return Groups(size, rank, tensors=tensors)
    return Groups(
        size,
        rank,
        fairscale_groups.get_data_parallel_world_size(),
        fairscale_groups.get_data_parallel_rank(),
        tensors,
        _tp_control if _tp_control is not None and _tp_control.size() == size else None,
    )


def n_processes() -> int:
    """Number of processes that were launched together.

    More than one if torchrun started them or the caller has initialized ``torch.distributed``;
    WORLD_SIZE alone may come from an unrelated launcher.
    """
    if dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ["WORLD_SIZE"]) if dist.is_torchelastic_launched() else 1


def n_local_processes() -> int:
    """Number of launched processes on this machine."""
    if dist.is_torchelastic_launched():
        return int(os.environ["LOCAL_WORLD_SIZE"])
    return n_processes()


def is_first_process() -> bool:
    """Whether this process is the first of all launched ones."""
    if dist.is_initialized():
        return dist.get_rank() == 0
    return not dist.is_torchelastic_launched() or os.environ["RANK"] == "0"


def is_first_on_machine() -> bool:
    """Whether this process is the first of the launched ones on its machine."""
    if dist.is_torchelastic_launched():
        return os.environ["LOCAL_RANK"] == "0"
    return is_first_process()


def initialize(device: torch.device, requested_size: int | None, rank_timeout: float) -> None:
    """Create model-parallel groups of the launched processes; does nothing for one process.

    Args:
        device: ranks communicate over gloo on the CPU, over NCCL on CUDA devices.
        requested_size: ranks that share one copy of the weights; None for all. With fewer than
            all, there are several copies (replicas).
        rank_timeout: see ``Llama.build``.

    Raises:
        ValueError: the size doesn't divide the number of processes, or differs between them.
        RuntimeError: the processes can't reach each other.
    """
    global _tp_control, _default_group
    launched = dist.is_initialized() or dist.is_torchelastic_launched()
    if launched and not dist.is_initialized():
        _join(device)
    world_size = n_processes()
    size = world_size if requested_size is None else requested_size
    if launched:
        _start_watchdog(size, rank_timeout)
    elif os.environ.get("WORLD_SIZE", "1") != "1":
        warnings.warn(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but torchrun did not start this process "
            "and torch.distributed is not initialized: it runs alone. Start it with torchrun, or "
            "call torch.distributed.init_process_group before Llama.build, to share the model",
            stacklevel=3,
        )
    if size < 1 or world_size % size:
        raise ValueError(
            f"model_parallel_size is {size}, but {world_size} process(es) are running, which isn't "
            f"a multiple of it; leave it out, or start with\n    {torchrun_line(max(size, 1))}"
        )
    if not launched:  # existing groups belong to a default group that was destroyed
        fairscale_groups.destroy_model_parallel()
        collectives.world = _tp_control = _default_group = None
        return
    if current_groups().size != size or not fairscale_groups.model_parallel_is_initialized():
        fairscale_groups.destroy_model_parallel()  # models keep the groups that they have
        with contextlib.redirect_stdout(io.StringIO()):  # fairscale prints the sizes
            fairscale_groups.initialize_model_parallel(size)
        # fairscale's groups have torch's default timeout, ten minutes for NCCL
        _set_timeout(fairscale_groups.get_model_parallel_group())
    if _tp_control is None or _tp_control.size() != size:
        # Every process must create every group. Beside NCCL, up to torch 2.14, a process that isn't
        # a member of a new group calls ncclCommSplit, but members of a gloo group don't. NCCL only
        # compares the number of calls: each process is a member of one group of each kind.
        for first in range(0, world_size, size):
            ranks = list(range(first, first + size))
            group = dist.new_group(ranks, backend="gloo", timeout=_FOREVER)
            if dist.get_rank() in ranks:
                _tp_control = group


def _set_timeout(group: dist.ProcessGroup) -> None:
    set_timeout = getattr(dist, "set_timeout", None)  # from torch 2.14 on, see pytorch#187387
    (set_timeout or dist.distributed_c10d._set_pg_timeout)(_FOREVER, group)


def _join(device: torch.device) -> None:
    if device.type == "mps" and n_processes() > 1:
        raise ValueError("MPS can't run several processes: give device='cpu', or start one process")
    options: dict[str, Any] = {"backend": "gloo"}
    # one process needs no NCCL, which torch for Windows lacks; resolve_device refuses several
    if device.type == "cuda" and dist.is_nccl_available():
        options = {"backend": "nccl", "device_id": device}
    try:
        dist.init_process_group(**options, timeout=_FOREVER)
    except (dist.DistNetworkError, ValueError) as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise RuntimeError(
            f"the {n_processes()} processes can't connect to {where} ({summary(error)}): if "
            "another program uses the port, give torchrun another --master_port, or --standalone "
            "on a single machine"
        ) from error
    atexit.register(_leave)


def _start_watchdog(size: int, rank_timeout: float) -> None:
    """Start the watchdog, and create the group for Python values."""
    global _tp_control, _default_group
    if _default_group is not dist.group.WORLD:
        if _default_group is not None:  # fairscale's groups belong to a destroyed default group
            fairscale_groups.destroy_model_parallel()
        collectives.world, _tp_control = dist.new_group(backend="gloo", timeout=_FOREVER), None
        _default_group = dist.group.WORLD
    if dist.is_torchelastic_launched() and n_processes() > 1:
        if collectives.watchdog is None:
            collectives.watchdog = Watchdog(dist.get_rank(), dist.get_world_size())
            atexit.register(collectives.watchdog.stop)
        collectives.watchdog.timeout = rank_timeout
    with collectives.fail_fast():
        sizes = {"model_parallel_size": size, "rank_timeout": rank_timeout}
        collectives.check_same_on_all_ranks("Llama.build", sizes, collectives.world)


def torchrun_line(n_processes: int) -> str:
    """The command that restarts the running script on ``n_processes``."""
    script = shlex.join(sys.argv) if sys.argv[0].endswith(".py") else "your_script.py"
    if Path(sys.argv[0]).name == "__main__.py":  # python -m package
        script = shlex.join(["-m", Path(sys.argv[0]).parent.name, *sys.argv[1:]])
    return f"torchrun --nproc_per_node {n_processes} {script}"


# --- Exit and fork ----------------------------------------------------------------------------


class _Resettable(Protocol):
    def reset(self) -> None: ...


_to_reset: "weakref.WeakSet[_Resettable]" = weakref.WeakSet()


def reset_before_leaving(captures: _Resettable) -> None:
    """Reset ``captures`` before this process leaves its groups at exit. Until the CUDA graphs that
    hold its kernels are gone, NCCL waits for them (pytorch#115388), and a model in a global
    variable outlives the groups."""
    _to_reset.add(captures)


def _leave() -> None:
    # if a rank is gone, NCCL may wait for it here
    watchdog = collectives.watchdog
    if dist.is_initialized() and (watchdog is None or not watchdog.has_reported):
        for captures in list(_to_reset):
            captures.reset()
        fairscale_groups.destroy_model_parallel()
        dist.destroy_process_group()


def _before_fork() -> None:
    if collectives.watchdog is not None:
        collectives.watchdog.before_fork()


def _after_fork_in_parent() -> None:
    if collectives.watchdog is not None:
        collectives.watchdog.after_fork()


def _after_fork_in_child() -> None:
    """A forked process isn't a rank: it shares a rank's connections, and must not use them."""
    global _is_forked
    _is_forked = _is_forked or dist.is_initialized()
    atexit.unregister(_leave)
    if collectives.watchdog is not None:
        atexit.unregister(collectives.watchdog.stop)
        collectives.watchdog.detach_child()
        collectives.watchdog = None


if hasattr(os, "register_at_fork"):  # Windows has no forks
    os.register_at_fork(
        before=_before_fork,
        after_in_parent=_after_fork_in_parent,
        after_in_child=_after_fork_in_child,
    )
