"""Command line to function call: Fire parses the options, and their types are checked."""

import contextlib
import inspect
import io
import re
import sys
import textwrap
from collections.abc import Callable
from functools import partial, wraps
from types import NoneType
from typing import Any, get_args, get_type_hints

import fire
import torch

from llama.distributed.groups import n_processes

_Command = Callable[..., None]
_HELP = ("--help", "-h")
_KINDS = {int: "a whole number", float: "a number", bool: "True or False", str: "text"}


def run(commands: _Command | dict[str, _Command], name: str | None = None) -> None:
    """Call the function named on the command line, or the only one, with its options.

    String options are taken verbatim; one that may also be a list of strings accepts
    ``["one", "two"]``. Errors with a message for the user are shown without a traceback, unless
    there are several ranks: then one of them reports the error.
    """
    calls: list[Callable[[], None]] = []
    words = sys.argv[1:]
    name = name or f"python {sys.argv[0]}"
    if isinstance(commands, dict):
        if not words or words[0] in _HELP:
            print(_overview(commands, name))
            return
        key, *words = words
        if key not in commands:
            print(f"error: unknown command {key}\n\n{_overview(commands, name)}", file=sys.stderr)
            sys.exit(2)
        command, name = commands[key], f"{name} {key}"
    else:
        command = commands
    if not set(_HELP).isdisjoint(words):
        print(_help(command, name))
        return
    _check_options(words, command)
    # Fire ends a call at "-" by default; no argument can contain a NUL
    words += ["--separator=\0"] if "--" in words else ["--", "--separator=\0"]
    bound, shown = _bound(command, calls), io.StringIO()
    try:
        with contextlib.redirect_stderr(shown):
            fire.Fire(bound, command=words, name=name, serialize=lambda _: None)
    except fire.core.FireExit as end:
        if not end.code:  # such as after -- --trace
            raise
        fault = re.search(r"ERROR: (?:\x1b\[0m)?(.*)", shown.getvalue())
        print(f"error: {fault[1] if fault else shown.getvalue()}", file=sys.stderr)
        print(_usage(command, name), file=sys.stderr)
        sys.exit(2)
    try:
        for call in calls:
            call()
    except (
        OSError,
        ValueError,
        ImportError,
        MemoryError,
        FloatingPointError,
        torch.OutOfMemoryError,
    ) as error:
        if n_processes() > 1:
            raise  # one of the ranks reports it
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("\ninterrupted")
        sys.exit(130)


def _overview(commands: dict[str, _Command], name: str) -> str:
    """The names of the commands, with the first line of each one's docstring."""
    lines = [f"usage: {name} COMMAND ...   ({name} COMMAND --help lists its options)", ""]
    for key, command in commands.items():
        lines.append(f"  {key:10} {inspect.cleandoc(command.__doc__ or '').splitlines()[0]}")
    return "\n".join(lines)


def _usage(command: _Command, name: str) -> str:
    parameters = inspect.signature(command).parameters.items()
    required = [key.upper() for key, p in parameters if p.default is p.empty]
    return " ".join([f"usage: {name}", *required, "[OPTIONS]"])


def _help(command: _Command, name: str) -> str:
    """The docstring of a command, with a line or two for each argument."""
    text, _, described = inspect.cleandoc(command.__doc__ or "").partition("\n\nArgs:\n")
    found = re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", described, re.MULTILINE)
    meanings = {key: re.sub(r"\s+", " ", meaning) for key, meaning in found}
    lines = []
    for key, parameter in inspect.signature(command).parameters.items():
        default, label = parameter.default, f"--{key}"
        if default is parameter.empty:
            label = key.upper()
        elif default is not None and default is not False:
            label += f" {default}"
        first, rest = f"  {label:26} ", " " * 29
        lines.append(textwrap.fill(first + meanings.get(key, ""), 100, subsequent_indent=rest))
    return "\n".join([_usage(command, name), "", text, "", *lines])


def _texts(command: _Command) -> set[str]:
    """The options of type str."""
    hints = get_type_hints(command)
    return {name for name, hint in hints.items() if str in (hint, *get_args(hint))}


def _check_options(words: list[str], command: _Command) -> None:
    """Exit if an option is unknown, or a string option has no value, which Fire would read as
    "True", or "False" after --no."""
    names, texts = inspect.signature(command).parameters, _texts(command)
    if "--" in words:  # Fire's own options follow
        words = words[: words.index("--")]
    for word, following in zip(words, [*words[1:], "--"], strict=False):
        option = re.match(r"--?([a-zA-Z][\w-]*)", word)
        if not option or option[1] in ("help", "h"):
            continue
        name = option[1].replace("-", "_")
        meant = {key for key in names if name in (key, f"no{key}", key[0])}
        if not meant:
            print(
                f"error: unknown option {option[0]}, expected one of --{', --'.join(names)}",
                file=sys.stderr,
            )
            sys.exit(2)
        if meant & texts and "=" not in word and re.match(r"--|-[a-zA-Z]", following):
            sys.exit(
                f'error: {word} has no value: write {word} "TEXT", or {word}=TEXT for text '
                "that begins with -"
            )


def _bound(command: _Command, calls: list[Callable[[], None]]) -> _Command:
    """Wrap ``command`` for Fire: check the types of the arguments and append the call to ``calls``.
    Deferring the call lets Fire reject leftover arguments before anything runs."""
    hints = get_type_hints(command)

    @wraps(command)
    def bind(*args: Any, **kwargs: Any) -> None:
        for name, value in inspect.signature(command).bind(*args, **kwargs).arguments.items():
            choices = (hints[name], *get_args(hints[name]))
            kinds = [kind for kind in _KINDS if kind in choices]
            valid = type(value) in kinds or (type(value) is int and float in kinds)
            valid = valid or (value is None and NoneType in choices)  # Fire passes some defaults
            if kinds and not valid and not (type(value) is list and list[str] in choices):
                expected = " or ".join(_KINDS[kind] for kind in kinds)
                sys.exit(f"error: --{name} is {value!r}, expected {expected}")
        calls.append(partial(command, *args, **kwargs))

    parsers = {
        name: _text_or_list if list[str] in get_args(hints[name]) else str
        for name in _texts(command)
    }
    return fire.decorators.SetParseFns(**parsers)(bind)


def _text_or_list(value: str) -> str | list[str]:
    """The string verbatim; ["one", "two"] is parsed as a list."""
    items = fire.parser.DefaultParseValue(value) if value[:2] in ('["', "['") else None
    return items if isinstance(items, list) and all(type(i) is str for i in items) else value
