"""python -m llama: its commands, their options and their help."""

import dataclasses
import inspect
import re

import pytest
from conftest import DEMO
from test_convert import cli

from llama import Llama
from llama.__main__ import COMMANDS
from llama.commands.options import ModelOptions, SamplingOptions


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


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["complete", DEMO], "no value for the required argument: prompt"),
        (["complete", DEMO, "one", "two"], "Could not consume arg: two"),
        (["complete", DEMO, "one", "-t", "0"], "'-t' is ambiguous"),
    ],
)
def test_faults_of_arguments_are_shown_with_the_usage(words: list[str], message: str) -> None:
    first, second = cli(*words, code=2).splitlines()[:2]
    assert first.startswith("error: ")
    assert message in first
    assert second == "usage: python -m llama complete CKPT_DIR PROMPT [OPTIONS]"


@pytest.mark.parametrize("name", ["complete", "chat", "serve", "batch", "eval"])
def test_options_of_other_commands_are_refused(name: str) -> None:
    assert "error: unknown option --mp, expected one of --ckpt_dir" in cli(name, "--mp=2", code=2)


@pytest.mark.parametrize("prompt", ["123", "[1, 2]", "None", "True", "{'a': 1}", "1e3", "-5", "-"])
def test_texts_are_taken_as_they_are(prompt: str) -> None:
    shown = cli("complete", DEMO, prompt, "--max_gen_len=0", "--device", "cpu")
    assert shown.splitlines()[1:] == [prompt]
    assert cli("complete", DEMO, f"--prompt={prompt}", "--max-gen-len", "0").endswith(
        f"\n{prompt}\n"
    )


def test_commands_that_run_a_model_share_its_options() -> None:
    fields = {field.name for field in dataclasses.fields(ModelOptions)}
    assert fields <= inspect.signature(Llama.build).parameters.keys()
    for name in ("complete", "chat", "serve", "batch", "eval"):
        assert fields <= inspect.signature(COMMANDS[name]).parameters.keys()


def test_commands_that_generate_share_their_options() -> None:
    fields = {field.name for field in dataclasses.fields(SamplingOptions)}
    for name in ("complete", "chat", "batch"):
        assert fields <= inspect.signature(COMMANDS[name]).parameters.keys()
    text = cli("complete", DEMO, "Once", "--max_gen_len=3", "--temperature=0", "--device=cpu")
    expected = Llama.build(str(DEMO), device="cpu").text_completion(["Once"], 0, max_gen_len=3)
    assert text.splitlines()[1] == f"Once{expected[0]['generation']}"
    assert "top_p is 2.0, expected" in cli("chat", DEMO, "Hi", "--top_p=2.0", code=1)


def test_defaults_may_differ_by_command() -> None:
    def default(command: str, name: str) -> object:
        return inspect.signature(COMMANDS[command]).parameters[name].default

    assert (default("complete", "max_batch_size"), default("eval", "seed")) == (1, 1234)
    assert default("eval", "dtype") is None
