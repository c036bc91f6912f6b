"""Fail-fast watchdog: if one rank dies or hangs, all exit with an error code, and exactly one
message names the rank and the cause. Real torchrun processes and real signals."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import PARAMS, PROGRAMS, TORCHRUN, environment, run, torchrun, write_checkpoint
from torch import Tensor

from llama.distributed import watchdog
from llama.distributed.watchdog import Watchdog

SCRIPT = PROGRAMS / "faults.py"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, weights: dict[str, Tensor]) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("shards"), PARAMS, weights, n_shards=2)


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return False
    return bool(fields) and fields[0] not in "ZX"


def messages(result: Any) -> list[str]:
    return re.findall(r"^.*llama: (.*)$", result.stderr, re.MULTILINE)


def ended(result: Any) -> str:
    """Check that no process is left, and return the one message."""
    assert result.returncode != 0
    assert "finished" not in result.stdout
    pids = [int(pid) for pid in re.findall(r"process (\d+)$", result.stdout, re.MULTILINE)]
    assert pids
    assert not [pid for pid in pids if is_running(pid)]
    (message,) = messages(result) or [result.stderr]
    return message


@pytest.mark.parametrize(
    ("n_ranks", "victim", "place"),
    [
        (2, 1, "decode"),
        *(
            pytest.param(*where, marks=pytest.mark.slow)
            for where in [(2, 1, "load"), (2, 0, "prefill"), (4, 0, "load"), (4, 3, "decode")]
        ),
    ],
)
def test_a_killed_rank_ends_all_ranks(shards: Path, n_ranks: int, victim: int, place: str) -> None:
    result = torchrun(n_ranks, SCRIPT, shards, str(victim), place, "kill", timeout=60)
    assert re.match(rf"rank {victim} \(process \d+\) was killed or has crashed", ended(result))


@pytest.mark.parametrize(
    ("n_ranks", "victim", "place"),
    [
        (2, 0, "load"),
        *(pytest.param(*w, marks=pytest.mark.slow) for w in [(2, 1, "between"), (4, 2, "decode")]),
    ],
)
def test_an_exception_ends_all_ranks(shards: Path, n_ranks: int, victim: int, place: str) -> None:
    result = torchrun(n_ranks, SCRIPT, shards, str(victim), place, "raise", timeout=60)
    assert ended(result) == f"rank {victim} failed (KeyError: 'the fault'); all ranks exit"
    assert result.stderr.count("Traceback") <= 2  # the rank's, and torchrun's own report


@pytest.mark.parametrize(
    ("n_ranks", "victim", "place"),
    [(2, 0, "load"), pytest.param(4, 1, "decode", marks=pytest.mark.slow)],
)
def test_a_rank_without_heartbeat_ends_all_ranks(
    shards: Path, n_ranks: int, victim: int, place: str
) -> None:
    result = torchrun(n_ranks, SCRIPT, shards, str(victim), place, "stop", timeout=60)
    message = ended(result)
    assert message.startswith(f"rank {victim} (process ")
    assert message.endswith("sent no heartbeat for 3 s: it is stopped (SIGSTOP); all ranks exit")


@pytest.mark.slow
def test_a_rank_that_catches_the_exception(shards: Path) -> None:
    """It catches the exception and goes on, while the other is in the middle of a forward pass."""
    message = ended(torchrun(2, SCRIPT, shards, "1", "decode", "hide", timeout=60))
    assert message == "rank 1 failed (KeyError: 'the fault'); all ranks exit"


@pytest.mark.slow
def test_a_rank_that_cannot_see_the_folder(shards: Path) -> None:
    message = ended(torchrun(2, SCRIPT, shards, "1", "", "nowhere", timeout=60))
    assert message.startswith(
        "rank 1 failed (FileNotFoundError: no checkpoint folder at 'nowhere': give ckpt_dir"
    )


@pytest.mark.slow
def test_different_arguments_are_an_error_on_every_rank(shards: Path) -> None:
    """Afterwards all ranks can continue."""
    result = torchrun(2, PROGRAMS / "different_arguments.py", shards, timeout=60)
    assert result.returncode == 0, result.stderr
    loaded, *lines = sorted(filter(str.strip, result.stdout.splitlines()))
    assert loaded.startswith("Loaded in")
    assert (lines[0], lines[2]) == (lines[1], lines[3])  # both ranks report the same
    assert lines[2].startswith("and then")
    names = ["model_parallel_size is 1", "max_seq_len is 64", "adapter is 'adapter0'"]
    names += ["prompt_tokens is [[1, 2]]"]
    names += ["prompt_tokens is [[1]]", "max_gen_len is 3", "temperature is 0.5", "echo is False"]
    names += ["pairs is [(0, [1, 1, 1], [1], 1)]", "pairs is [(0, [1, 2], [3], 2)]"]
    names += ["pairs is [(0, [1], [1], 1), (1, [2], [2], 1)]"]
    names += ["tokens is [[1, 2]]", "tokens is [[1]]"]
    said = re.findall(r"(?:Llama|Transformer)\.\w+: .*?same arguments", lines[0])
    for message, name in zip(said, names, strict=True):
        assert re.search(rf"{re.escape(name)} on rank 0 and .* on rank 1: every rank", message)


@pytest.mark.slow
def test_ranks_in_different_calls(shards: Path) -> None:
    """One rank abandons a stream and begins the next call; the other is still in the first."""
    message = ended(torchrun(2, PROGRAMS / "different_calls.py", shards, timeout=60))
    assert message.startswith("rank 1 has begun its call 2, but rank 0 is still in call 1: ")


@pytest.mark.slow
def test_a_rank_that_ends_early(shards: Path) -> None:
    message = ended(torchrun(2, PROGRAMS / "ends_early.py", shards, timeout=60))
    assert message.startswith("rank 1 has ended, and rank 0 still waits for it: ")


@pytest.mark.slow
def test_a_rank_that_blocks_in_its_exit(shards: Path) -> None:
    """It is given up after rank_timeout, and torchrun's SIGTERM ends it (SIGKILL comes 30 s
    later)."""
    start = time.monotonic()
    message = ended(torchrun(2, PROGRAMS / "blocks_in_exit.py", shards, timeout=60))
    assert time.monotonic() - start < 28
    assert message.startswith("rank 1 has ended, and rank 0 still waits for it: ")


@pytest.mark.slow
def test_slow_ranks_do_not_time_out(shards: Path) -> None:
    """Loading, a pause between calls and a pause within a stream, each longer than the timeout;
    with stdin closed."""
    result = run(
        *TORCHRUN,
        "2",
        PROGRAMS / "slow_ranks.py",
        shards,
        timeout=60,
        preexec_fn=lambda: os.close(0),
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("finished") == 1
    assert not messages(result)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["interrupted", "terminated", "killed"])
def test_ranks_exit_with_torchrun(shards: Path, how: str) -> None:
    """By Ctrl-C and by a scheduler's SIGTERM, which aren't faults, and by SIGKILL."""
    command = [*TORCHRUN, "2", str(SCRIPT), str(shards), "-1", "", "loop"]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    ) as process:
        assert process.stdout is not None
        lines = []
        while "running\n" not in lines:
            lines.append(process.stdout.readline())
            assert lines[-1], lines
        number = {"interrupted": signal.SIGINT, "terminated": signal.SIGTERM}
        process.send_signal(number.get(how, signal.SIGKILL))
        _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    result = subprocess.CompletedProcess(command, process.returncode, "".join(lines), errors)
    pids = [int(pid) for pid in re.findall(r"process (\d+)$", result.stdout, re.MULTILINE)]
    assert len(pids) == 2
    deadline = time.monotonic() + 20
    while any(map(is_running, pids)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(is_running, pids))
    expected = {
        "interrupted": ["interrupted; all ranks exit"],
        "terminated": [],
        "killed": ["torchrun is gone; all ranks exit"],
    }
    assert messages(result) == expected[how]


def test_a_rank_that_ends_while_it_is_looked_at_was_not_killed() -> None:
    """Its final heartbeat comes before its end, and is read after it."""
    watch: Any = object.__new__(Watchdog)
    watch._pids, beats = [10, 11], ["5 1", "5 1"]

    def ends(rank: int) -> str:
        beats[1] = watchdog._TERMINATED
        return "Z" if rank == 1 else "R"

    watch._state, watch._heartbeats = ends, lambda: list(beats)
    assert watch._killed() is None
    watch._state = lambda rank: "Z" if rank == 1 else "R"
    beats[1] = "5 1"
    assert "rank 1 (process 11) was killed or has crashed" in watch._killed()


@pytest.mark.slow
def test_forked_children_arent_ranks(shards: Path) -> None:
    """Terminated pool workers and failing children don't end the ranks."""
    path = PROGRAMS / "forks.py"
    result = torchrun(2, path, shards, timeout=60)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("finished") == 1
    assert not messages(result)


@pytest.mark.slow
def test_models_of_different_sizes_take_turns(shards: Path) -> None:
    """Each model keeps the process groups that it was built with."""
    path = PROGRAMS / "two_sizes.py"
    result = torchrun(2, path, shards, timeout=60)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("finished") == 1
