"""The interactive chat on a pseudo-terminal: python -m llama chat FOLDER."""

import importlib.util
import io
import json
import os
import re
import select
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import DEMO, PROGRAMS, TORCHRUN, environment, run

from llama import Llama
from llama.commands import interactive
from llama.commands.chat_session import ChatSession
from llama.commands.interactive import chat
from llama.driver import Driver
from llama.sampling import SamplingParams

if sys.platform == "win32":
    pytest.skip("needs pseudo-terminals", allow_module_level=True)

import pty
import signal
import termios

CTRL_C, CTRL_D = "\x03", "\x04"
# at the end of the output; prompt_toolkit lets pastes come in brackets, and shows the cursor again
PROMPT = r"(> |\x1b\[\?2004h[^\n]*>[^\n]*\x1b\[\?25h)\Z"
OPTIONS = ("--temperature", "0", "--device", "cpu")


class Terminal:
    """A program on a pseudo-terminal.

    Attributes:
        output: everything so far.
    """

    def __init__(self, *command: str | Path) -> None:
        self._descriptor, self._slave = pty.openpty()
        self.mode = termios.tcgetattr(self._slave)
        self.process = subprocess.Popen(
            [sys.executable, PROGRAMS / "on_terminal.py", *command],
            stdin=self._slave,
            stdout=self._slave,
            stderr=self._slave,
            # a pseudo-terminal doesn't answer the question where its cursor is
            env=environment({"TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}),
            start_new_session=True,
        )
        self.output = ""
        self._read = 0  # of the output, by ``expect``

    def send(self, text: str | bytes) -> None:
        os.write(self._descriptor, text.encode() if isinstance(text, str) else text)

    def characters(self) -> list[bytes]:
        """Those with a meaning to the terminal, by termios' numbers."""
        return termios.tcgetattr(self._slave)[6]

    def expect(self, pattern: str, timeout: float = 30) -> str:
        """Wait for a pattern in the output since the last match; returns the output up to it."""
        deadline = time.monotonic() + timeout
        while not (match := re.search(pattern, self.output[self._read :])):
            wait = deadline - time.monotonic()
            if not select.select([self._descriptor], [], [], max(0.0, wait))[0]:
                raise AssertionError(f"no {pattern!r} in {self.output[self._read :]!r}")
            try:
                self.output += os.read(self._descriptor, 2**16).decode(errors="replace")
            except OSError:  # the program has ended
                raise AssertionError(f"no {pattern!r} before the end: {self.output!r}") from None
        before = self.output[self._read : self._read + match.start()]
        self._read += match.end()
        return before

    def end(self) -> int:
        """The exit status, once the terminal is as it was."""
        code = self.process.wait(100)
        assert termios.tcgetattr(self._slave) == self.mode
        return code

    def close(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        os.close(self._slave)
        os.close(self._descriptor)


Start = Callable[..., Terminal]


@pytest.fixture
def start() -> Iterator[Start]:
    terminals: list[Terminal] = []

    def begin(*command: str | Path) -> Terminal:
        terminals.append(Terminal(*command))
        return terminals[-1]

    yield begin
    for terminal in terminals:
        terminal.close()


def saved(terminal: Terminal, path: Path) -> list[str]:
    """The contents of the messages, after /save."""
    terminal.send(f"/save {path}\r")
    terminal.expect(f"messages written to {path}")
    terminal.expect(PROMPT)
    return [message["content"] for message in json.loads(path.read_text())["messages"]]


def stop_an_answer(terminal: Terminal, path: Path) -> None:
    """Ctrl-C in an endless answer: the dialog keeps what was shown, and goes on."""
    terminal.send("Tell me a story.\r")
    terminal.expect("word word word")
    terminal.send("typed ahead\r" + CTRL_C)  # which drops it
    shown = terminal.expect(PROMPT)
    question, answer = saved(terminal, path)[-2:]
    assert question == "Tell me a story."
    n_words = len(answer.split())
    assert answer == " word" * n_words
    assert shown.count(" word") == n_words - 3


@pytest.mark.skipif(importlib.util.find_spec("prompt_toolkit") is None, reason="an extra")
def test_a_chat_with_prompt_toolkit(start: Start, tmp_path: Path) -> None:
    terminal = start(sys.executable, "-m", "llama", "chat", DEMO, *OPTIONS)
    terminal.expect("Ctrl-C stops an answer, Ctrl-D ends the chat, /help lists the commands")
    terminal.expect("a paste of several lines is one message")
    terminal.expect(PROMPT)
    terminal.send("What is 23 + 45?\r")
    terminal.expect(r"23 \+ 45 = 68\.\r\n")
    terminal.expect(PROMPT)
    terminal.send("\x1b[200~What is\r\n1 + 2?\x1b[201~")  # a paste, in its brackets
    terminal.expect(r"2\?")
    terminal.send("\r")
    terminal.expect(r"\d\.\r\n")  # the answer
    terminal.expect(PROMPT)
    assert saved(terminal, tmp_path / "a")[2] == "What is\n1 + 2?"
    terminal.send("one\x1b\rtwo")  # Alt-Enter
    terminal.expect("two")
    terminal.send(CTRL_C)  # drops the line
    terminal.expect(PROMPT)
    terminal.send("/unknown\r")
    terminal.expect("error: unknown command /unknown")
    terminal.expect(PROMPT)
    terminal.send("/stats\r")
    terminal.expect(r"\d+ tokens, \d+ of them reused; first token after [\d.]+ s; answer: \d+ tok")
    terminal.expect(PROMPT)
    assert len(saved(terminal, tmp_path / "b")) == 4
    terminal.send(CTRL_D)
    assert terminal.end() == 0


@pytest.mark.parametrize("kind", [pytest.param("prompt_toolkit", marks=pytest.mark.slow), "plain"])
def test_ctrl_c_stops_an_answer(start: Start, tmp_path: Path, kind: str) -> None:
    program = (PROGRAMS / "chat.py", f"endless,{kind}")
    terminal = start(sys.executable, *program, DEMO, *OPTIONS)
    hints = {"plain": r'Each line is a message.*-e "\.\[chat\]"', "prompt_toolkit": "Alt-Enter"}
    terminal.expect(hints[kind])
    terminal.expect(PROMPT)
    stop_an_answer(terminal, tmp_path / "a")
    stop_an_answer(terminal, tmp_path / "b")
    for _ in range(10):
        terminal.send("Tell me a story.\r")
        terminal.expect("word")
        for _ in range(6):  # impatient
            terminal.send(CTRL_C)
            time.sleep(0.003)
        terminal.expect(PROMPT)
    terminal.send("/set max_gen_len 20\r")
    terminal.expect("max_gen_len 20")
    terminal.expect(PROMPT)
    terminal.send("Go on.\r")
    terminal.expect(" word")
    terminal.send("/undo\r")  # typed ahead
    terminal.expect(r"the answer was cut off at max_gen_len \(20 tokens\)")
    terminal.expect("removed with its answer: 'Go on.'")
    terminal.expect(PROMPT)
    if kind == "plain":
        terminal.send("one line\rand another\r")
        terminal.expect("(?s)cut off.*cut off")
        terminal.expect(PROMPT)
        assert saved(terminal, tmp_path / "b")[-4::2] == ["one line", "and another"]
    terminal.send(CTRL_D)
    assert terminal.end() == 0


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.skipif(importlib.util.find_spec("prompt_toolkit") is None, reason="an extra")
def test_ctrl_z_suspends_a_chat(start: Start) -> None:
    terminal = start("bash", "--norc", "-i")
    command = (sys.executable, "-m", "llama", "chat", DEMO, *OPTIONS)
    terminal.send(f"{shlex.join(map(str, command))}\r")
    terminal.expect("paste of several lines")
    terminal.expect(PROMPT)
    terminal.send("What is\x1a")
    terminal.expect("Stopped")
    terminal.send("fg\r")
    terminal.expect(PROMPT)
    terminal.send(" 1 + 2?\r")
    terminal.expect(r"1 \+ 2 = 3\.")
    terminal.expect(PROMPT)
    terminal.send(CTRL_D)
    terminal.expect("bash-.*[#$] ")
    terminal.send("exit 7\r")
    assert terminal.end() == 7


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["prompt_toolkit", "plain"])
def test_a_chat_under_torchrun(start: Start, tmp_path: Path, kind: str) -> None:
    """Ctrl-C doesn't reach torchrun, which would end all ranks."""
    terminal = start(*TORCHRUN, "2", PROGRAMS / "chat.py", f"endless,{kind}", DEMO, *OPTIONS)
    terminal.expect(PROMPT)
    characters = terminal.characters()
    assert characters[termios.VINTR] == characters[termios.VSUSP] == b"\0"
    terminal.send(b"\xff\r")
    terminal.expect("error: .*(can't decode byte 0xff|not valid Unicode)")
    terminal.expect(PROMPT)
    stop_an_answer(terminal, tmp_path / "a")
    stop_an_answer(terminal, tmp_path / "b")
    terminal.send("dropped" + CTRL_C)
    terminal.expect(PROMPT)
    terminal.send("/set max_gen_len 20\r")
    terminal.expect("max_gen_len 20")
    terminal.expect(PROMPT)
    terminal.send("Go on.\r")
    terminal.expect(" word")
    terminal.send("/undo\r/undo\r")
    terminal.expect("removed with its answer: 'Go on.'")
    terminal.expect("removed with its answer: 'Tell me a story.'")
    terminal.expect(PROMPT)
    assert len(saved(terminal, tmp_path / "c")) == 2
    terminal.send(CTRL_D)
    assert terminal.end() == 0


@pytest.mark.slow
def test_the_terminal_is_restored_if_a_rank_is_killed(start: Start) -> None:
    terminal = start(*TORCHRUN, "2", PROGRAMS / "chat.py", "endless,dies", DEMO, *OPTIONS)
    terminal.expect(PROMPT)
    terminal.send("Tell me a story.\r")
    terminal.expect("all ranks exit")
    assert terminal.end() != 0


@pytest.mark.slow
@pytest.mark.parametrize("n_ranks", [1, 2])
def test_lines_of_a_pipe_are_answered_in_turn(n_ranks: int) -> None:
    launcher = [sys.executable] if n_ranks == 1 else [*TORCHRUN, str(n_ranks)]
    lines = "What is 23 + 45?\n\nWhat is 1 + 2?\n/undo\n"
    result = run(*launcher, "-m", "llama", "chat", DEMO, *OPTIONS, input=lines)
    assert result.returncode == 0, result.stderr
    loaded, *answers = result.stdout.splitlines()
    assert loaded.startswith("Loaded in")
    assert answers == [
        "23 + 45 = 68.",
        "1 + 2 = 3.",
        "removed with its answer: 'What is 1 + 2?'",
    ]


def test_an_error_ends_the_lines_of_a_pipe(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is 23 + 45?\n/unknown\nWhat is 1 + 2?\n"))
    with pytest.raises(ValueError, match="unknown command /unknown"):
        chat(str(DEMO), temperature=0, device="cpu")
    assert capsys.readouterr().out.splitlines()[1:] == ["23 + 45 = 68."]


def test_without_standard_input_there_is_nothing_to_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    chat(str(DEMO), device="cpu")


def test_ctrl_c_raises_at_the_prompt_or_pressed_twice_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def pressed(*_: str) -> str:
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("it raises KeyboardInterrupt")

    monkeypatch.setattr("builtins.input", pressed)
    handler, seen = signal.getsignal(signal.SIGINT), []
    with interactive._Terminal() as terminal:
        for _ in range(2):
            for _ in range(3):  # such as after the end of an answer
                signal.raise_signal(signal.SIGINT)
            with pytest.raises(KeyboardInterrupt):
                terminal.ask()
            with terminal.answering() as is_interrupted:
                seen.append(is_interrupted())
                signal.raise_signal(signal.SIGINT)
                seen.append(is_interrupted())
                with pytest.raises(KeyboardInterrupt):
                    pressed()
                signal.raise_signal(signal.SIGINT)  # while the second one is handled
    assert seen == [False, True] * 2
    assert signal.getsignal(signal.SIGINT) is handler


def test_faults_of_what_is_typed_are_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found: list[Exception | str]
    found = [UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), "/help", OSError(5)]

    def typed(_: str) -> str:
        if isinstance(line := found.pop(0), Exception):
            raise line
        return line

    monkeypatch.setattr("builtins.input", typed)
    llm = Llama.build(str(DEMO), device="cpu")
    with Driver(llm) as driver, interactive._Terminal() as terminal:
        interactive._converse(ChatSession(llm, driver, SamplingParams()), terminal)
    shown = capsys.readouterr()
    assert (
        shown.err
        == "error: 'utf-8' codec can't decode byte 0xff in position 0: invalid start byte\n"
    )
    assert "/help  " in shown.out
    assert not found  # without a terminal, the chat ends
