"""python -m llama: its commands, their options and their help."""

import dataclasses
import inspect
import re

from test_convert import cli

from llama import Llama
from llama.__main__ import COMMANDS
from llama.commands.options import ModelOptions


def test_help_is_short_and_names_every_option() -> None:
    overview = cli("--help")
    assert overview == cli()
    for name, command in COMMANDS.items():
        assert f"\n  {name} " in overview
        text = cli(name, "--help")
        assert text.startswith(f"usage: python -m llama {name} ")
        assert len(text.splitlines()) < 45
        assert max(map(len, text.splitlines())) <= 100
        for option in inspect.signature(command).parameters:
            meaning = re.search(rf"^  (--)?{option}( .*)", text, re.MULTILINE | re.IGNORECASE)
            assert meaning, f"{name} lacks --{option}"
            assert meaning[2].strip(), f"{name} doesn't explain --{option}"


def test_commands_that_run_a_model_share_its_options() -> None:
    fields = {field.name for field in dataclasses.fields(ModelOptions)}
    assert fields <= inspect.signature(Llama.build).parameters.keys()
    for name in ("complete", "chat", "eval"):
        assert fields <= inspect.signature(COMMANDS[name]).parameters.keys()


def test_defaults_may_differ_by_command() -> None:
    def default(command: str, name: str) -> object:
        return inspect.signature(COMMANDS[command]).parameters[name].default

    assert (default("complete", "max_batch_size"), default("eval", "seed")) == (1, 1234)
    assert default("eval", "dtype") is None
