"""The two example scripts, run as a user would."""

import ast
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import DEMO, ROOT, TORCHRUN, run

CHAT = ROOT / "example_chat_completion.py"
TEXT = ROOT / "example_text_completion.py"


def test_chat_example_answers_on_the_demo_model(tmp_path: Path) -> None:
    """No arguments, another working directory, and more dialogs than max_batch_size."""
    result = run(sys.executable, CHAT, "--temperature", "0", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    for answer in (
        "Assistant: 23 + 45 = 68.",
        "Assistant: Your name is Clara.",
        "Assistant: A COW SAYS MOO.",
        "Assistant: g-a-r-d-e-n",
        "Assistant: Sorry, I don't know.",
    ):
        assert answer in result.stdout
    assert result.stdout.count("=====") > 0
    assert "User: Do you remember my name?" in result.stdout
    assert result.stderr == ""


@pytest.mark.slow
def test_text_example_under_torchrun_tells_stories(tmp_path: Path) -> None:
    result = run(*TORCHRUN, "1", TEXT, "--temperature", "0", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("Loaded in") == 1
    assert result.stdout.count("\n> ") == 4
    story = result.stdout.split("Once upon a time there was a little fox named Clara.\n> ")[1]
    assert "Clara" in story.split("====")[0]


@pytest.mark.slow
def test_both_examples_run_with_defaults() -> None:
    for script in (CHAT, TEXT):
        result = run(sys.executable, script)
        assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("typed", "prompts"),
    [
        ("Hello, world", ["Hello, world"]),
        ("1, 2", ["1, 2"]),
        ("42", ["42"]),
        ("None", ["None"]),
        ("{'a': 1}", ["{'a': 1}"]),
        ("[1, 2]", ["[1, 2]"]),
        ("[INST] hi", ["[INST] hi"]),
        ('["one, two", "3"]', ["one, two", "3"]),
        ("-", ["-"]),
        ("True", ["True"]),
    ],
)
def test_prompts_are_read_as_text(
    typed: str,
    prompts: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Runs in this process, since starting a new one takes two seconds."""
    monkeypatch.setattr(sys, "argv", [str(TEXT), "--prompt", typed, "--max_gen_len", "1"])
    runpy.run_path(str(TEXT), run_name="__main__")
    output = capsys.readouterr().out
    shown = [part.split("\n> ")[0].strip() for part in output.split("=" * 34)[:-1]]
    shown[0] = shown[0].split("seconds\n")[1]
    assert shown == prompts


@pytest.mark.slow
@pytest.mark.parametrize("script", [CHAT, TEXT], ids=lambda path: path.stem)
def test_a_misspelt_flag_is_refused_before_weights_are_read(script: Path) -> None:
    result = run(sys.executable, script, "--temprature", "0", "--ckpt_dir", "/nowhere")
    assert result.returncode == 2
    assert "unknown option --temprature, expected one of --ckpt_dir, " in result.stderr
    assert "max_gen_len" in result.stderr
    assert "nowhere" not in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize(
    "words",
    [
        ["--prompt"],
        ["-p"],
        ["--noprompt"],
        ["--prompt", "--temperature", "0"],
        ["--tokenizer_path", "--prompt", "True"],
        ["--ckpt-dir", "-t", "0"],
    ],
)
def test_a_text_flag_without_a_value_is_refused(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fire would read the value as "True"."""
    monkeypatch.setattr(sys, "argv", [str(TEXT), *words])
    with pytest.raises(SystemExit, match=rf"^error: {words[0]} has no value: write {words[0]} "):
        runpy.run_path(str(TEXT), run_name="__main__")


@pytest.mark.slow
@pytest.mark.parametrize("script", [CHAT, TEXT], ids=lambda path: path.stem)
def test_help_explains_the_arguments(script: Path) -> None:
    result = run(sys.executable, script, "--help", stdin=subprocess.DEVNULL)
    assert result.returncode == 0
    for name in ("ckpt_dir", "temperature", "max_gen_len", "prompt"):
        assert f"  --{name} " in result.stdout


@pytest.mark.slow
def test_a_missing_folder_is_named() -> None:
    result = run(sys.executable, CHAT, "--ckpt_dir", "/nowhere/8B")
    assert result.returncode == 1
    assert "no checkpoint folder at '/nowhere/8B'" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("script", "word"), [(CHAT, "Lisbon"), (TEXT, "Hanoi")])
def test_other_checkpoints_get_general_prompts(tmp_path: Path, script: Path, word: str) -> None:
    folder = shutil.copytree(DEMO, tmp_path / "other")
    result = run(sys.executable, script, "--ckpt_dir", folder, "--max_seq_len", "512")
    assert result.returncode == 0, result.stderr
    assert word in result.stdout


@pytest.mark.parametrize("script", [CHAT, TEXT], ids=lambda path: path.stem)
def test_examples_import_only_llama_and_the_standard_library(script: Path) -> None:
    imports = []
    for node in ast.walk(ast.parse(script.read_text())):
        if isinstance(node, ast.Import):
            imports += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            imports.append(str(node.module))
    assert set(imports) <= {"llama", "pathlib", "sys", "typing"}
