"""A dialog with a model, turn by turn, and the commands that change it. interactive.py runs it in a
terminal."""

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Generator
from typing import Any

import torch

from llama.completions import Completion
from llama.dialog import Message
from llama.driver import Driver
from llama.files import expanded, parse_json, read_bounded, replace_text
from llama.generation import Llama
from llama.sampling import SamplingParams, draw_seed, new_generator

_LARGEST_FILE = 2**26  # bytes of a saved dialog
_SETTINGS = ("temperature", "top_p", "max_gen_len")

Pieces = Generator[str, None, None]


@dataclasses.dataclass(frozen=True)
class AnswerStats:
    """The work for one answer.

    Attributes:
        n_prompt: tokens of the whole dialog up to the answer.
        n_reused: those of them that were in the prefix cache.
        n_generated: tokens of the answer, including the stop token.
        first_token_s: seconds to the first token; None if there was none.
        total_s: seconds to the last token.
    """

    n_prompt: int
    n_reused: int
    n_generated: int
    first_token_s: float | None
    total_s: float

    def __str__(self) -> str:
        text = f"prompt: {self.n_prompt} tokens, {self.n_reused} of them reused"
        if self.first_token_s is not None:
            text += f"; first token after {self.first_token_s:.3f} s"
        text += f"; answer: {self.n_generated} tokens"
        if self.first_token_s is not None and self.n_generated > 1:
            rate = (self.n_generated - 1) / max(self.total_s - self.first_token_s, 1e-9)
            text += f", {rate:.1f} tokens per second"
        return text


class ChatSession:
    """A dialog with a model.

    Each turn encodes the whole dialog; prefix caching makes it cost its own tokens only.

    Args:
        driver: entered, on the first rank.
        params: sampling parameters of the answers.
        system: the system message, if any.
        seed: of the generator that draws the seeds of the answers.

    Attributes:
        messages: the dialog so far, including the system message.
        stats: of the last answer; None before the first.
        note: the reason if the last answer was cut off, else None.
    """

    def __init__(
        self,
        llm: Llama,
        driver: Driver,
        params: SamplingParams,
        *,
        system: str | None = None,
        seed: int = 1,
    ) -> None:
        self._llm, self._driver, self.params = llm, driver, params
        self._seeds = new_generator(seed, torch.device("cpu"))
        self.messages: list[Message] = []
        if system is not None:
            self.messages.append({"role": "system", "content": system})
        self.stats: AnswerStats | None = None
        self.note: str | None = None

    def respond(self, line: str) -> Pieces:
        """Answer a message or run a command, and yield the text to show, piece by piece.

        There is a piece for every step of the engine; it may be empty. Closing the generator ends
        the answer, and the dialog keeps what was yielded. After an error the dialog is as before.

        Raises:
            ValueError: the command is unknown or its argument invalid, or the dialog isn't valid in
                the model's chat format or leaves no room for an answer.
            OSError: a file can't be read or written.
            FloatingPointError, torch.OutOfMemoryError, RankError: see ``Driver.step``.
        """
        self.note = None
        if line.startswith("/") and not line.startswith("//"):
            yield from self._run(line)
        else:
            text = line[1:] if line.startswith("//") else line
            yield from self._answer([*self.messages, {"role": "user", "content": text}])

    def _answer(self, dialog: list[Message]) -> Pieces:
        """Stream the assistant's next message, and append it to ``dialog``, the new dialog."""
        engine, formatter = self._llm.engine, self._llm.formatter
        prompt = self._checked(dialog)
        request = engine.request(prompt, self.params)
        completion, first, last = Completion(), None, 0.0
        start = time.perf_counter()
        self._driver.add(request, draw_seed(self._seeds))
        has_failed = False
        try:
            while not request.finish_reason:
                events = [event for r, event in self._driver.step() if r is request]
                if events:
                    last = time.perf_counter() - start
                    first = last if first is None else first
                for event in events:
                    completion.add(event, is_stop_token=request.is_stop_token(event))
                yield "".join(event.text for event in events)
        except Exception:
            has_failed = True
            raise
        finally:  # also when the generator is closed
            self._driver.cancel(request)  # if it hasn't finished
            if not has_failed:
                self.messages = [*dialog, completion.answer(formatter)]
                self.stats = AnswerStats(
                    len(prompt), request.n_reused, len(request.tokens), first, last
                )
        if request.finish_reason == "length":
            self.note = "the answer was cut off at " + (
                f"max_gen_len ({self.params.max_gen_len} tokens)"
                if request.limit == self.params.max_gen_len
                else f"max_seq_len ({self._max_seq_len} tokens): /undo or /clear makes room"
            )

    @property
    def _max_seq_len(self) -> int:
        return self._llm.model.params.max_seq_len

    def _checked(self, dialog: list[Message]) -> list[int]:
        """The ids of a dialog.

        Raises:
            ValueError: it isn't valid in the model's chat format, or is too long.
        """
        prompt = self._llm.formatter.encode_dialog_prompt(dialog)
        if len(prompt) >= self._max_seq_len:
            raise ValueError(
                f"the dialog has {len(prompt)} tokens, which leaves no room for an answer in "
                f"max_seq_len ({self._max_seq_len}): shorten the message, make room with /undo or "
                "/clear, or /save the dialog and /load it with a larger --max_seq_len"
            )
        return prompt

    # --- Commands -------------------------------------------------------------------------------

    def _run(self, line: str) -> Pieces:
        name, *rest = line[1:].split(maxsplit=1) if line[1:2].strip() else [""]
        argument = rest[0].strip() if rest else ""
        if name not in COMMANDS:
            raise ValueError(
                f"unknown command /{name}, expected one of /{', /'.join(COMMANDS)}; a message that "
                "starts with / is written with //"
            )
        usage, _, command = COMMANDS[name]
        if argument and not usage:
            raise ValueError(f"/{name} is followed by {argument!r:.60}, expected nothing")
        if not argument and usage and not usage.startswith("["):
            raise ValueError(f"/{name} has no argument, expected /{name} {usage}")
        output = command(self, argument)
        if isinstance(output, str):
            yield output
        else:
            yield from output

    @property
    def _n_system(self) -> int:
        """1 with a system message, else 0."""
        return int(bool(self.messages) and self.messages[0]["role"] == "system")

    def _system(self, text: str) -> str:
        system: list[Message] = [{"role": "system", "content": text}] if text else []
        self.messages = [*system, *self.messages[self._n_system :]]
        return "system message set" if text else "no system message"

    def _undo(self, _: str) -> str:
        questions = [i for i, message in enumerate(self.messages) if message["role"] == "user"]
        if not questions:
            raise ValueError("there is no message to remove")
        self.messages, removed = self.messages[: questions[-1]], self.messages[questions[-1]]
        return f"removed with its answer: {removed['content']!r:.60}"

    def _regen(self, _: str) -> Pieces:
        dialog = list(self.messages)
        while dialog and dialog[-1]["role"] == "assistant":
            dialog.pop()
        if len(dialog) <= self._n_system:
            raise ValueError("there is no message to answer")
        yield from self._answer(dialog)

    def _clear(self, _: str) -> str:
        self.messages = self.messages[: self._n_system]
        return "new dialog"

    def _set(self, argument: str) -> str:
        words = argument.split()
        if words and (len(words) != 2 or words[0] not in _SETTINGS):
            raise ValueError(
                f"/set is followed by {argument!r:.60}, expected one of {', '.join(_SETTINGS)} and "
                "a value, or nothing"
            )
        if words:
            change: dict[str, Any] = {words[0]: _value(words[1])}
            try:
                self.params = dataclasses.replace(self.params, **change)
            except TypeError as error:
                raise ValueError(str(error)) from None
        return "\n".join(
            f"{name} {'none' if (value := getattr(self.params, name)) is None else value}"
            for name in _SETTINGS
        )

    def _save(self, name: str) -> str:
        path = expanded(name)
        if path.exists():
            _read_dialog(name)  # replaces nothing else
        text = json.dumps({"messages": self.messages}, indent=1, ensure_ascii=False)
        replace_text(path, f"{text}\n")
        return f"{len(self.messages)} messages written to {name}"

    def _load(self, name: str) -> str:
        messages = _read_dialog(name)
        waits = bool(messages) and messages[-1].get("role") not in ("system", "assistant")
        probe: list[Message] = [] if waits else [{"role": "user", "content": "?"}]
        try:
            self._checked([*messages, *probe])
        except ValueError as error:
            raise ValueError(f"{name!r} can't be continued: {error}") from None
        self.messages = messages
        return f"{len(messages)} messages read from {name}"

    def _stats(self, _: str) -> str:
        if self.stats is None:
            raise ValueError("there is no answer yet")
        return str(self.stats)

    def _help(self, _: str) -> str:
        lines = [f"{f'/{name} {usage}':20} {text}" for name, (usage, text, _) in COMMANDS.items()]
        lines.append(f"{'//TEXT':20} send a message that starts with /")
        return "\n".join(lines)


# argument (in brackets if it may be left out), meaning, function
COMMANDS: dict[str, tuple[str, str, Callable[[ChatSession, str], str | Pieces]]] = {
    "system": ("[TEXT]", "set the system message, or remove it", ChatSession._system),
    "undo": ("", "remove the last message and its answer", ChatSession._undo),
    "regen": ("", "answer the last message anew", ChatSession._regen),
    "clear": ("", "start a new dialog; the system message stays", ChatSession._clear),
    "set": (
        "[NAME VALUE]",
        "set temperature, top_p or max_gen_len, or show them",
        ChatSession._set,
    ),
    "save": ("FILE", "write the dialog to a file, as JSON", ChatSession._save),
    "load": ("FILE", "go on with the dialog in a file", ChatSession._load),
    "stats": ("", "tokens, time and speed of the last answer", ChatSession._stats),
    "help": ("", "list the commands", ChatSession._help),
}


def _value(word: str) -> float | str | None:
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(word)
    return None if word == "none" else word


def _read_dialog(name: str) -> list[Message]:
    """The messages of a saved dialog, not checked further.

    Raises:
        FileNotFoundError, ValueError: there is none in this file.
    """
    try:
        found = parse_json(read_bounded(expanded(name), _LARGEST_FILE))
    except ValueError as error:
        raise ValueError(f"{name!r} isn't a saved dialog: {error}") from None
    messages = found.get("messages") if isinstance(found, dict) else None
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise ValueError(f'{name!r} isn\'t a saved dialog, expected {{"messages": [...]}}')
    return messages
