"""Windows, simulated: what it lacks is removed or replaced. Nothing has run on Windows itself."""

import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import DEMO, PROGRAMS, run
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from llama import Tokenizer
from llama.distributed import groups, watchdog


def test_one_process_works_without_posix(tmp_path: Path) -> None:
    result = run(sys.executable, PROGRAMS / "without_posix.py", DEMO, tmp_path / "new")
    assert result.returncode == 0, result.stderr
    assert "no faults found" in result.stdout
    assert result.stdout.splitlines()[-1] == "23 + 45 = 68."


def test_a_path_with_a_drive_letter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "C:tokenizer.model").symlink_to(DEMO / "tokenizer.model")
    monkeypatch.chdir(tmp_path)
    assert (
        Tokenizer("C:tokenizer.model").n_words == Tokenizer(str(DEMO / "tokenizer.model")).n_words
    )
    with pytest.raises(FileNotFoundError, match=r"no tokenizer at 'C:none\.model': give tokenizer"):
        Tokenizer("C:none.model")


def test_one_cuda_process_under_torchrun_needs_no_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    launcher = {"TORCHELASTIC_RUN_ID": "1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    for name, value in (rank | launcher | address).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(dist, "is_nccl_available", lambda: False)
    groups.initialize(torch.device("cuda", 0), None, 60.0)
    assert dist.get_backend() == "gloo"
    assert groups.current_groups().size == 1


def test_the_state_of_a_process_is_asked_without_a_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    """On Windows, os.kill(pid, 0) sends Ctrl+C."""
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.delattr(os, "kill")
    assert watchdog._state(os.getpid()) == "R"
