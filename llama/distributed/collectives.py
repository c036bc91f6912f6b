"""Collective calls: all ranks make them together with equal arguments, or all raise.

Python values are sent as JSON over separate gloo groups: unlike pickle, JSON can't run code, and a
value can't be mistaken for a tensor of a pass.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from llama.distributed.watchdog import RankError, Watchdog
from llama.files import summary

# Set by groups.initialize.
watchdog: Watchdog | None = None
world: dist.ProcessGroup | None = None  # gloo, all launched processes


def fail_fast() -> contextlib.AbstractContextManager[None]:
    """Code in which ranks wait for each other: see ``Watchdog.fail_fast``."""
    return contextlib.nullcontext() if watchdog is None else watchdog.fail_fast()


@contextlib.contextmanager
def collective_call(
    name: str, group: dist.ProcessGroup | None, values: Mapping[str, object]
) -> Iterator[None]:
    """A call that the ranks of ``group`` make together.

    Raises:
        ValueError: on every rank, if the arguments differ.
    """
    with contextlib.ExitStack() as stack:
        if watchdog is not None:
            ranks = [] if group is None else dist.get_process_group_ranks(group)
            stack.enter_context(watchdog.call(ranks))
        with fail_fast():
            check_same_on_all_ranks(name, values, group)
        yield


@contextlib.contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """If the body fails on one of the launched processes, raise on all of them, so that none waits
    for it in the next collective call.

    Raises:
        RankError: on the ranks that haven't failed; the message is the failed rank's.
    """
    failure = None
    try:
        yield
    except Exception as error:
        failure = error
    with fail_fast():
        failures = all_gather_json(None if failure is None else summary(failure), world)
    if failure is not None:
        raise failure
    for rank, reason in enumerate(failures):
        if reason is not None:
            raise RankError(f"rank {rank} failed ({reason})")


def check_same_on_all_ranks(
    name: str, values: Mapping[str, object], group: dist.ProcessGroup | None
) -> None:
    """Raise ValueError on every rank of ``group`` if values differ, naming the first that does."""
    if group is None or dist.get_world_size(group) == 1:
        return
    every = all_gather_json({key: _short(value) for key, value in values.items()}, group)
    for rank, theirs in enumerate(every):
        for key, value in theirs.items():
            if value != every[0][key]:
                first = dist.get_global_rank(group, 0)
                raise ValueError(
                    f"{name}: {key} is {every[0][key]} on rank {first} and {value} on rank "
                    f"{first + rank}: every rank must make the same calls with the same arguments"
                )


def _short(value: object) -> str:
    """The value's repr or, if that is long, its start and a hash."""
    text = repr(value.tolist() if isinstance(value, torch.Tensor) else value)
    if len(text) <= 80:
        return text
    return f"{text[:60]}... ({hashlib.blake2b(text.encode(), digest_size=6).hexdigest()})"


def broadcast_json(value: Any, group: dist.ProcessGroup | None) -> Any:
    """The first rank's value, on every rank of a group. Returns when all have called it."""
    with fail_fast():
        return all_gather_json(value, group)[0]


def all_gather_json(value: Any, group: dist.ProcessGroup | None) -> list[Any]:
    """The values of all ranks of a group, on every rank; None is a group of one."""
    if group is None:
        return [value]
    data = torch.frombuffer(bytearray(json.dumps(value), "ascii"), dtype=torch.uint8)
    n_bytes = [torch.empty(1, dtype=torch.int64) for _ in range(dist.get_world_size(group))]
    dist.all_gather(n_bytes, torch.tensor([len(data)]), group=group)
    longest = int(max(n_bytes))
    received = [torch.empty(longest, dtype=torch.uint8) for _ in n_bytes]
    dist.all_gather(received, F.pad(data, (0, longest - len(data))), group=group)
    return [json.loads(bytes(r[: int(n)])) for r, n in zip(received, n_bytes, strict=True)]
