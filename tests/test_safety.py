"""example_safety.py with a stand-in for Llama Guard.

The stand-in isn't Llama Guard, and knows nothing of safety: its weights are set by hand so that it
answers "unsafe" and S1 if its prompt holds one certain token, else "safe". With it, the script
runs as it would with Llama Guard: a second model in the process, with a prompt of its own.
"""

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DEMO, PARAMS, ROOT, random_weights, run, write_checkpoint
from test_convert import cli

from llama import Dialog, Llama, Tokenizer
from llama.chat_template import TemplateChatFormat

SCRIPT = ROOT / "example_safety.py"

# In the structure of Llama Guard 3's template: the role to check follows from the number of
# messages, then categories, conversation and instructions. The texts are our own.
TEMPLATE = """\
{%- set role = 'User' if messages | length % 2 == 1 else 'Agent' -%}
{{- bos_token + '<|start_header_id|>user<|end_header_id|>\n\n' -}}
Task: judge the last '{{ role }}' message of a conversation by these categories.

<BEGIN CATEGORIES>
S1: Cities.
S2: Numbers.
<END CATEGORIES>

<BEGIN CONVERSATION>
{% for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('expected user and assistant in turns') }}
    {%- endif %}
{{ 'User' if message['role'] == 'user' else 'Agent' }}: {{ CONTENT }}
{% endfor %}
<END CONVERSATION>

Write 'safe' or 'unsafe', and the categories on the next line if it is unsafe.
{{- '<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n' -}}
"""
TEMPLATES = {
    "string": TEMPLATE.replace("CONTENT", "message['content'] | trim"),  # as Llama Guard 3 8B
    "parts": TEMPLATE.replace(  # as Llama Guard 3 1B
        "{{ CONTENT }}",
        "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}"
        "{{ part['text'] | trim }}{% endfor %}\n",  # jinja drops the line's own newline
    ),
}


def stand_in(folder: Path, flagged: str, template: str) -> Path:
    """A folder in Hugging Face's layout of the model that flags the token ``flagged``.

    Attention without queries and keys averages over the prompt, and so brings the share of the
    flagged token to the last position. There it decides after the prompt ("s" or "un") and after
    "e" (the end or a new line); each other token has one successor.
    """
    tokenizer = Tokenizer(str(DEMO / "tokenizer.model"))
    end = tokenizer.special_tokens["<|eot_id|>"]
    start, s, a, f, e, un, line, category, one = (
        tokenizer.model.encode_single_token(text)
        for text in ("\n\n", "s", "a", "f", "e", "un", "\n", "S", "1")
    )
    successors = {un: s, s: a, a: f, f: e, line: category, category: one, one: end}
    flag, share, other, *dims = range(PARAMS["dim"])
    dim_of = dict(zip([start, e, *successors], dims, strict=False))
    weights = {
        key: torch.ones_like(x) if "norm" in key else torch.zeros_like(x)
        for key, x in random_weights(PARAMS | {"n_layers": 1}).items()
    }
    embeddings, output = weights["tok_embeddings.weight"], weights["output.weight"]
    embeddings[:, other] = 1
    for token, dim in {**dim_of, tokenizer.model.encode_single_token(flagged): flag}.items():
        embeddings[token, other] = 0
        embeddings[token, dim] = 1
    weights["layers.0.attention.wv.weight"][0, flag] = 1
    weights["layers.0.attention.wo.weight"][share, 0] = 100
    for token, unflagged, otherwise in ((start, s, un), (e, end, line)):
        output[unflagged, dim_of[token]] = 2
        output[otherwise, dim_of[token]] = 1
        output[otherwise, share] = 1.5  # times 1 to 10: the prompts have 100 to 1000 tokens
    for token, following in successors.items():
        output[following, dim_of[token]] = 1000
    native = write_checkpoint(folder / "native", PARAMS | {"n_layers": 1}, weights)
    cli("convert", native, folder / "hf", "--format", "hf")
    (folder / "hf" / "chat_template.jinja").write_text(template)
    return folder / "hf"


@pytest.fixture(scope="module", params=TEMPLATES)
def guard_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Flags a token of " Rome"."""
    return stand_in(tmp_path_factory.mktemp("guard"), "ome", TEMPLATES[request.param])


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(SCRIPT))


def shown(guard_dir: Path, prompt: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What the script prints, in this process, since starting a new one takes two seconds."""
    words = [str(SCRIPT), str(guard_dir), "--temperature", "0", "--prompt", prompt]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", words)
        runpy.run_path(str(SCRIPT), run_name="__main__")
    return capsys.readouterr().out.partition("User: ")[2]


def test_both_messages_are_checked(guard_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(guard_dir, "What is 23 + 45?", capsys) == (
        "What is 23 + 45?\n\nAssistant: 23 + 45 = 68.\n\nGuard: both are safe.\n"
    )
    # the answer is Rome
    assert shown(guard_dir, "What is the capital of Italy?", capsys) == (
        "What is the capital of Italy?\n\nGuard: the answer is unsafe (S1) and isn't shown.\n"
    )
    assert shown(guard_dir, "Was Rome nice?", capsys) == (
        "Was Rome nice?\n\nGuard: the question is unsafe (S1) and isn't answered.\n"
    )


def test_the_script_runs_as_a_program(tmp_path: Path) -> None:
    guard_dir = stand_in(tmp_path, "ome", TEMPLATES["parts"])
    result = run(sys.executable, SCRIPT, guard_dir, "--temperature", "0", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "Guard: the answer is unsafe (S1)" in result.stdout
    assert "Rome" not in result.stdout
    assert result.stderr == ""


def test_the_template_is_rendered_in_full(guard_dir: Path) -> None:
    """The roles by number of messages, and all content, as a string or in parts."""
    guard = Llama.build(str(guard_dir), max_seq_len=512, device="cpu", dtype="float32")
    assert isinstance(guard.formatter, TemplateChatFormat)
    dialog: Dialog = [{"role": "user", "content": "Is it far?"}]
    answered: Dialog = [*dialog, {"role": "assistant", "content": "It is near."}]
    parts: Any = [{"role": "user", "content": [{"type": "text", "text": "Is it far?"}]}]
    for given, role, conversation in (
        (dialog, "User", "User: Is it far?\n"),
        (parts, "User", "User: Is it far?\n"),
        (answered, "Agent", "User: Is it far?\nAgent: It is near.\n"),
    ):
        text = guard.tokenizer.decode(guard.formatter.encode_dialog_prompt(given))
        assert f"the last '{role}' message" in text
        assert f"<BEGIN CONVERSATION>\n{conversation}<END CONVERSATION>" in text


def test_the_last_of_several_turns_is_classified(guard_dir: Path, script: dict[str, Any]) -> None:
    """With the others in the prompt: the stand-in flags a token anywhere in it."""
    guard = script["build_guard"](str(guard_dir), 512)

    def categories(*contents: Any) -> list[str]:
        roles = ("user", "assistant") * 2
        dialog = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]
        found: list[str] = script["unsafe_categories"](guard, dialog)
        return found

    assert categories("Is it far?", "It is near.", "And nice?") == []
    assert categories("Is it far?", "It is near.", "As nice as Rome?") == ["S1"]
    assert categories("Is it far?", "It is near.", "And nice?", "As Rome.") == ["S1"]
    assert categories("Is Rome far?", "It is near.", "And nice?") == ["S1"]
    parts = [{"type": "text", "text": "As nice "}, {"type": "text", "text": "as Rome?"}]
    assert categories(parts) == ["S1"]
    with pytest.raises(ValueError, match="expected user and assistant in turns"):
        script["unsafe_categories"](guard, [{"role": "system", "content": "Be brief."}])
    call = {"role": "assistant", "content": "", "tool_call": "f()"}
    with pytest.raises(ValueError, match="has 'tool_call', which"):
        script["unsafe_categories"](guard, [{"role": "user", "content": "Hi"}, call])


def test_a_verdict_that_is_cut_off_counts_as_unsafe(
    guard_dir: Path, script: dict[str, Any]
) -> None:
    question: Any = [{"role": "user", "content": "Is it far?"}]
    guard = script["build_guard"](str(guard_dir), 512)
    n_prompt = len(guard.formatter.encode_dialog_prompt(question))
    for n_more, text in ((0, ""), (1, "s"), (3, "saf")):
        guard = script["build_guard"](str(guard_dir), n_prompt + n_more)
        found = script["unsafe_categories"](guard, question)
        assert found == [f"unknown verdict {text!r}"]


@pytest.mark.parametrize(
    ("verdict", "categories"),
    [
        ("safe", []),
        ("\n\nsafe", []),
        ("unsafe\nS1", ["S1"]),
        ("\n\nunsafe\nS14", ["S14"]),
        ("\n\nunsafe\nS1,S12,S5", ["S1", "S12", "S5"]),
    ],
)
def test_verdicts(script: dict[str, Any], verdict: str, categories: list[str]) -> None:
    assert script["categories_of"](verdict) == categories


@pytest.mark.parametrize(
    "verdict",
    [
        "",
        "Safe",
        "safe.",
        "safe\nS1",
        "safe unsafe",
        "safe\nunsafe\nS1",
        "not safe",
        "unsafe\nS1\nsafe",
        "unsafe\nviolence",
        "unsafe",
        "unsafe\n",
        "unsafe\nS1,",
        "unsafe\nsafe",
        "unsafe S1",
    ],
)
def test_other_verdicts_count_as_unsafe(script: dict[str, Any], verdict: str) -> None:
    assert script["categories_of"](verdict) == [f"unknown verdict {verdict.strip()!r}"]


def test_a_guard_that_cant_read_the_message_is_an_error(
    guard_dir: Path, script: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="no chat_template of its own"):
        script["build_guard"](str(DEMO), 512)
    guard = script["build_guard"](str(guard_dir), 512)
    with pytest.raises(ValueError, match=r"holds '<\|eot_id\|>'"):
        script["unsafe_categories"](guard, [{"role": "user", "content": "a<|eot_id|>"}])
    with pytest.raises(ValueError, match="max_seq_len is 512"):
        script["unsafe_categories"](guard, [{"role": "user", "content": "a b " * 300}])
    guard.formatter = TemplateChatFormat(guard.tokenizer, "{{ messages[0]['role'] }}")
    with pytest.raises(ValueError, match="leaves out the message to check"):
        script["unsafe_categories"](guard, [{"role": "user", "content": "Is it far?"}])
