"""``python -m llama chat``: one answer, or an interactive chat in a terminal."""

import contextlib
import dataclasses
import math
import os
import select
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.distributed as dist

from llama.commands.chat_session import ChatSession
from llama.commands.options import ModelOptions, SamplingOptions, runs_model
from llama.dialog import Message
from llama.driver import Driver
from llama.files import escaped
from llama.request import TokenEvent

_CTRL_C = b"\x03"
_PROMPT = "> "


def show(text: str) -> None:
    """Print a piece of text, on a terminal without control characters."""
    print(escaped(text) if sys.stdout.isatty() else text, end="", flush=True)


def show_steps(steps: Iterable[list[TokenEvent]]) -> None:
    """Print the text of a stream, and a newline."""
    for events in steps:
        for event in events:
            show(event.text)
    print()


@runs_model(max_batch_size=1, max_seq_len=None)
def chat(
    model: ModelOptions,
    sampling: SamplingOptions,
    prompt: str | None = None,
    *,
    system: str | None = None,
) -> None:
    """Answer a message, or chat interactively, and show answers as they are generated.

    Without a prompt, each message is read from the terminal, or each line of another input. Ctrl-C
    stops an answer, Ctrl-D ends the chat, /help lists the commands.

    Args:
        prompt: the message; default: chat interactively.
        system: the system message, if any.
    """
    params = sampling.params()
    llm = model.build()
    if prompt is not None:
        dialog: list[Message] = [{"role": "user", "content": prompt}]
        if system is not None:
            dialog.insert(0, {"role": "system", "content": system})
        tokens = llm.formatter.encode_dialog_prompt(dialog)
        show_steps(llm.stream([tokens], **dataclasses.asdict(sampling), logprobs=False))
        return
    with Driver(llm) as driver:
        if not driver.is_first:
            driver.follow()
            return
        session = ChatSession(llm, driver, params, system=system, seed=model.seed)
        if sys.stdin is None or not sys.stdin.isatty():
            _answer_lines(session)
        else:
            with _terminal() as terminal:
                _converse(session, terminal)


def _answer_lines(session: ChatSession) -> None:
    """Respond to each line of an input that isn't a terminal. An error ends it."""
    for line in sys.stdin or ():
        if line.strip():
            _show_response(session, line.rstrip("\n"), lambda: False)


def _converse(session: ChatSession, terminal: "_Terminal") -> None:
    """Respond to what is typed on a terminal until Ctrl-D. Errors are shown."""
    print("Ctrl-C stops an answer, Ctrl-D ends the chat, /help lists the commands.")
    print(terminal.hint, flush=True)
    while True:
        try:
            line = terminal.ask()
            if line.strip():
                with terminal.answering() as is_interrupted:
                    _show_response(session, line, is_interrupted)
        except KeyboardInterrupt:  # drops the line, or stops the step
            print()
        except EOFError:
            print()
            return
        except (OSError, ValueError, FloatingPointError, torch.OutOfMemoryError) as error:
            print(f"error: {escaped(str(error))}", file=sys.stderr, flush=True)


def _show_response(session: ChatSession, line: str, is_interrupted: Callable[[], bool]) -> None:
    with contextlib.closing(session.respond(line)) as pieces:
        for piece in pieces:
            show(piece)
            if is_interrupted():
                break
    print(flush=True)
    if session.note is not None:
        print(f"[{session.note}]", file=sys.stderr, flush=True)


# --- Terminals ----------------------------------------------------------------------------------


class _Terminal:
    """A terminal whose Ctrl-C sends SIGINT to this program, which handles it as a context."""

    def __init__(self) -> None:
        self._edit = _line_editor()
        if self._edit is None:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  input() uses it
        # How many times Ctrl-C is only recorded before it raises KeyboardInterrupt: infinite unless
        # a line is read or answered, where ``_converse`` catches it.
        self._n_deferred = math.inf
        self._is_interrupted = False

    def __enter__(self) -> "_Terminal":
        self._before = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _handle(self, *_: object) -> None:
        self._is_interrupted = True
        if self._n_deferred == 0:
            self._n_deferred = math.inf
            raise KeyboardInterrupt
        self._n_deferred -= 1

    @property
    def hint(self) -> str:
        if self._edit is not None:
            return "Alt-Enter begins a new line; a paste of several lines is one message."
        return 'Each line is a message. For more: pip install -c constraints.txt -e ".[chat]"'

    def ask(self) -> str:
        """What the user types.

        Raises:
            KeyboardInterrupt: Ctrl-C.
            EOFError: Ctrl-D, or the terminal is gone.
            UnicodeDecodeError: the line isn't in the terminal's encoding.
        """
        try:
            self._n_deferred = 0
            return self._read()
        except OSError:
            raise EOFError from None
        finally:
            self._n_deferred = math.inf

    def _read(self) -> str:
        return input(_PROMPT) if self._edit is None else self._edit()

    @contextlib.contextmanager
    def answering(self) -> Iterator[Callable[[], bool]]:
        """Yields a function that returns whether Ctrl-C has been pressed. A step that is
        interrupted leaves the prefix cache unusable, so only a second Ctrl-C does that."""
        self._is_interrupted = False
        try:
            self._n_deferred = 1
            yield lambda: self._is_interrupted
        finally:
            self._n_deferred = math.inf


class _TorchrunTerminal(_Terminal):
    """The terminal of a rank, which torchrun starts in a session of its own.

    The signal of Ctrl-C would reach torchrun, which ends all ranks; so Ctrl-C is read as the end of
    a line. Lines that are typed during an answer are kept.
    """

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._typed: deque[bytes] = deque()

    def _read(self) -> str:
        if not self._typed:
            if self._edit is not None:
                return self._edit()
            print(_PROMPT, end="", flush=True)
            return self._decoded(self._read_line())
        line = self._decoded(self._typed.popleft())
        print(f"{_PROMPT}{escaped(line)}", flush=True)
        return line

    @contextlib.contextmanager
    def answering(self) -> Iterator[Callable[[], bool]]:
        yield self._reads_ctrl_c

    def _reads_ctrl_c(self) -> bool:
        if not select.select([self._descriptor], [], [], 0)[0]:
            return False
        self._typed.append(self._read_line())
        if not self._typed[-1].endswith(_CTRL_C):
            return False
        self._typed.clear()
        return True

    def _read_line(self) -> bytes:
        return os.read(self._descriptor, 2**16)  # a terminal returns at most one line

    def _decoded(self, line: bytes) -> str:
        if not line:
            raise EOFError
        if line.endswith(_CTRL_C):
            raise KeyboardInterrupt
        return line.decode(sys.stdin.encoding).rstrip("\n")


@contextlib.contextmanager
def _terminal() -> Iterator[_Terminal]:
    if not dist.is_torchelastic_launched() or os.name != "posix":
        with _Terminal() as terminal:
            yield terminal
        return
    descriptor = sys.stdin.fileno()
    with _ctrl_c_ends_lines(descriptor):
        yield _TorchrunTerminal(descriptor)


@contextlib.contextmanager
def _ctrl_c_ends_lines(descriptor: int) -> Iterator[None]:
    """Let a terminal treat Ctrl-C as the end of a line, not as a signal.

    Another process restores the terminal once this one has closed its pipe: ranks also end without
    cleanup, when another one has failed.
    """
    import termios

    mode = subprocess.check_output(["stty", "-g"], stdin=descriptor, text=True)  # noqa: S607
    with subprocess.Popen(  # noqa: S603
        ["sh", "-c", f"cat; stty {mode.strip()} <&1"],  # noqa: S607
        stdin=subprocess.PIPE,
        stdout=descriptor,
        start_new_session=True,
    ):
        attributes = termios.tcgetattr(descriptor)
        characters = attributes[6]
        disabled = bytes([os.fpathconf(descriptor, "PC_VDISABLE")])
        characters[termios.VINTR] = characters[termios.VSUSP] = disabled
        characters[termios.VEOL] = _CTRL_C
        termios.tcsetattr(descriptor, termios.TCSANOW, attributes)
        yield


def _line_editor() -> Callable[[], str] | None:
    """prompt_toolkit's prompt; None if it isn't installed or the output isn't a terminal."""
    if not sys.stdout.isatty():
        return None
    try:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.enums import DEFAULT_BUFFER
        from prompt_toolkit.filters import has_focus
        from prompt_toolkit.key_binding import KeyBindings
    except ImportError:
        return None
    keys = KeyBindings()
    is_message = has_focus(DEFAULT_BUFFER)  # not the search field
    keys.add("enter", filter=is_message)(lambda event: event.current_buffer.validate_and_handle())
    keys.add("escape", "enter", filter=is_message)(
        lambda event: event.current_buffer.insert_text("\n")
    )
    session: PromptSession[str] = PromptSession(
        multiline=True,
        key_bindings=keys,
        prompt_continuation=" " * len(_PROMPT),
        enable_suspend=True,  # Ctrl-Z
    )
    return lambda: session.prompt(_PROMPT)
