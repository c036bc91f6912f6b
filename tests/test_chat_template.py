"""A folder's own chat template, and Meta's, which our formats replace."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import DEMO
from test_convert import cli
from test_tokenizer_json import DIALOGS, LLAMA2, added, opened
from transformers import AutoTokenizer

from llama import ChatFormat, Llama
from llama.chat import Llama2ChatFormat
from llama.chat_template import (
    LLAMA2_TEMPLATE,
    LLAMA3_TEMPLATE,
    TemplateChatFormat,
    chat_format,
    render,
)
from llama.vocab.tokenizer_json import tokenizer_json

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# with a block per role and whitespace control, as Zephyr's
ROLES = """
{%- for message in messages %}
    {%- if message.role == 'user' %}
<|user|>
{{ message.content }}{{ eos_token }}
    {%- elif message.role == 'system' %}
<|system|>
{{ message.content }}{{ eos_token }}
    {%- else %}
<|assistant|>
{% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}
    {%- endif %}
    {%- if loop.last and add_generation_prompt %}
<|assistant|>
    {%- endif %}
{%- endfor %}
"""
# as DeepSeek's distills: full-width bars, reasoning is dropped from answers
THINKS = (
    "{% set ns = namespace(system='') %}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{% set ns.system = message['content'] %}{% endif %}"
    "{% endfor %}{{ bos_token }}{{ ns.system }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<\uff5cUser\uff5c>' + message['content'] }}{% endif %}"
    "{% if message['role'] == 'assistant' %}{% set text = message['content'] %}"
    "{% if '</think>' in text %}{% set text = text.split('</think>')[-1] %}{% endif %}"
    "{{ '<\uff5cAssistant\uff5c>' + text + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<\uff5cAssistant\uff5c><think>\\n' }}{% endif %}"
)
TEMPLATES = {"chatml": CHATML, "roles": ROLES, "thinks": THINKS}
# What transformers' template of Llama 3.1 renders for dialogs without tools.
DATES = (
    "{{- bos_token }}{%- set date = strftime_now('%d %b %Y') if strftime_now is defined else '' %}"
    "{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] | trim %}"
    "{%- set messages = messages[1:] %}{%- else %}{%- set system = '' %}{%- endif %}"
    "{{- '<|start_header_id|>system<|end_header_id|>\n\n' }}"
    "{{- 'Cutting Knowledge Date: December 2023\n' + 'Today Date: ' + date + '\n\n' }}"
    "{{- system + '<|eot_id|>' }}{%- for message in messages %}"
    "{%- if message.role == 'tool' %}{{- raise_exception('no tools here') }}{%- endif %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{- message['content'] | trim + '<|eot_id|>' }}{%- endfor %}{%- if add_generation_prompt %}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The demo in Hugging Face's layout, with the control tokens of ``TEMPLATES``."""
    target = tmp_path / "hf"
    cli("convert", DEMO, target, "--format", "hf")
    path = target / "tokenizer.json"
    content = json.loads(path.read_text())
    names = {
        "<|reserved_special_token_7|>": "<|im_start|>",
        "<|reserved_special_token_8|>": "<|im_end|>",
        "<|reserved_special_token_9|>": "<\uff5cUser\uff5c>",
        "<|reserved_special_token_10|>": "<\uff5cAssistant\uff5c>",
        "<|reserved_special_token_11|>": "<think>",
        "<|reserved_special_token_12|>": "</think>",
    }
    for token in content["added_tokens"]:
        if new := names.get(token["content"]):
            token |= added(token["id"], new, special="im_" in new)
    path.write_text(json.dumps(content))
    return target


def with_template(folder: Path, template: Any, *, in_config: bool = True) -> Any:
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"eos_token": "<|im_end|>"}
    config.pop("chat_template", None)
    if in_config:
        config["chat_template"] = template
    else:
        (folder / "chat_template.jinja").write_text(template)
    path.write_text(json.dumps(config))
    return opened(folder / "tokenizer.json")


@pytest.mark.parametrize("in_config", [True, False])
@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_equal_transformers(folder: Path, name: str, in_config: bool) -> None:
    tokenizer = with_template(folder, TEMPLATES[name], in_config=in_config)
    formatter = chat_format(tokenizer)
    assert isinstance(formatter, TemplateChatFormat)
    theirs = AutoTokenizer.from_pretrained(folder)
    thought: Any = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nHello."},
        {"role": "user", "content": "Bye"},
    ]
    for dialog in [*DIALOGS, thought]:
        ids = theirs.apply_chat_template(dialog, add_generation_prompt=True)["input_ids"]
        assert formatter.encode_dialog_prompt(dialog) == ids
        assert tokenizer.control_ids & set(ids) or name == "roles"
    opened_answer = [*DIALOGS[0], {"role": "assistant", "content": " 2 + 2 ="}]
    ids = theirs.apply_chat_template(opened_answer, continue_final_message=True)["input_ids"]
    assert formatter.encode_dialog_prompt(opened_answer, continue_final_message=True) == ids


@pytest.mark.parametrize("content", ["end", "im_start", "", "two\nlines  ", "x<y"])
def test_a_message_is_left_open_where_it_ends(folder: Path, content: str) -> None:
    formatter = chat_format(with_template(folder, CHATML))
    theirs = AutoTokenizer.from_pretrained(folder)
    dialog: Any = [*DIALOGS[0], {"role": "assistant", "content": content}]
    ids = formatter.encode_dialog_prompt(dialog, continue_final_message=True)
    assert ids == theirs.apply_chat_template(dialog, continue_final_message=True)["input_ids"]
    # an earlier message that holds the mark of an open one
    marked: Any = [{"role": "user", "content": "\ue000open\ue000 x"}, dialog[-1]]
    ids = formatter.encode_dialog_prompt(marked, continue_final_message=True)
    assert ids == theirs.apply_chat_template(marked, continue_final_message=True)["input_ids"]
    quoting = chat_format(with_template(folder, "{{ messages[0].content }}"))
    with pytest.raises(ValueError, match="doesn't render the last message as it is"):
        quoting.encode_dialog_prompt(dialog, continue_final_message=True)


def test_tool_calls_and_options_of_filters(folder: Path) -> None:
    template = (
        "{{ unk_token }}{{ messages[-1].tool_calls | tojson(ensure_ascii=True, sort_keys=True) }}"
        "{% generation %}x{% endgeneration %}"
    )
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"unk_token": "<|eot_id|>"}))
    formatter = chat_format(with_template(folder, template))
    theirs = AutoTokenizer.from_pretrained(folder)
    dialog: Any = [
        *DIALOGS[0],
        {"role": "assistant", "content": None, "tool_calls": [{"name": "né", "id": 1}]},
    ]
    ids = formatter.encode_dialog_prompt(dialog)
    text = theirs.apply_chat_template(dialog, tokenize=False)
    assert theirs.decode(ids) == text == '<|eot_id|>[{"id": 1, "name": "n\\u00e9"}]x'


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ messages[0]['content'] }}", "one"),
        ("{% for part in messages[0]['content'] %}{{ part['text'] }},{% endfor %}", "one,"),
        ("{% if messages[0].content is string %}{{ messages[0].content }}{% endif %}", "one"),
        (
            "{% if messages[0].content is string %}{{ messages[0].content }}{% else %}"
            "{{ messages[0].content[0].text }} in parts{% endif %}",
            "one",
        ),
    ],
)
def test_content_is_a_string_unless_the_template_reads_only_parts(
    folder: Path, template: str, text: str
) -> None:
    tokenizer = with_template(folder, template)
    parts = [{"type": "text", "text": "o"}, {"type": "text", "text": "ne"}]
    for content in ("one", parts):
        dialog: Any = [{"role": "user", "content": content}]
        assert tokenizer.decode(chat_format(tokenizer).encode_dialog_prompt(dialog)) == text


def test_templates_by_name(folder: Path) -> None:
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": CHATML}]
    formatter = chat_format(with_template(folder, named))
    assert isinstance(formatter, TemplateChatFormat)
    assert formatter.template == CHATML
    formatter = chat_format(with_template(folder, named[:1]))
    with pytest.raises(ValueError, match="several templates, expected one named default"):
        formatter.encode_dialog_prompt(DIALOGS[0])
    (folder / "chat_template.jinja").write_bytes("{{ 'ü' }}".encode("latin-1"))
    with pytest.raises(ValueError, match=r"chat_template\.jinja' has the chat template .* UTF-8"):
        opened(folder / "tokenizer.json")


@pytest.mark.parametrize(
    ("role", "content"),
    [
        ("user", "a<|im_end|>"),
        ("system", "<|im_start|>"),
        ("assistant", "x <|im_end|>"),
        ("assistant", "<\uff5cUser\uff5c>"),  # not marked as special in the file
        ("user<|im_end|>", "a"),
    ],
)
def test_content_never_becomes_a_control_token(folder: Path, role: str, content: str) -> None:
    formatter = chat_format(with_template(folder, CHATML))
    dialog: Any = [{"role": "user", "content": "a"}, {"role": role, "content": content}]
    with pytest.raises(ValueError, match=r"the (content|role) of message 1 holds '<.*remove it"):
        formatter.encode_dialog_prompt(dialog)


def test_other_keys_never_become_a_control_token(folder: Path) -> None:
    """Also inside of calls, and of values that aren't JSON."""
    formatter = chat_format(with_template(folder, "{{ messages[0].x }}"))
    for value in ({"a": ["<|im_end|>"]}, {"<|im_end|>": 1}, Path("<|im_end|>")):
        dialog: Any = [{"role": "user", "content": "a", "x": value}]
        with pytest.raises(ValueError, match=r"the x of message 0 holds '<\|im_end\|>'"):
            formatter.encode_dialog_prompt(dialog)


def test_content_that_is_normalized_to_a_control_token_is_refused(folder: Path) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text()) | {"normalizer": {"type": "NFKC"}}
    for token in content["added_tokens"]:
        token["normalized"] = True
    path.write_text(json.dumps(content))
    tokenizer = with_template(folder, CHATML)
    dialog: Any = [{"role": "user", "content": "a<\uff5cim_end\uff5c>"}]
    with pytest.raises(ValueError, match="the content of message 0 holds '"):
        chat_format(tokenizer).encode_dialog_prompt(dialog)
    assert not tokenizer.control_ids & set(tokenizer.encode(dialog[0]["content"], False, False))


def test_ordinary_added_tokens_are_content(folder: Path) -> None:
    """As a user's question about <think>."""
    formatter = chat_format(with_template(folder, CHATML))
    theirs = AutoTokenizer.from_pretrained(folder)
    dialog: Any = [{"role": "user", "content": "What does <think> do?"}]
    ids = theirs.apply_chat_template(dialog, add_generation_prompt=True)["input_ids"]
    assert formatter.encode_dialog_prompt(dialog) == ids
    assert not formatter.starts_answer(ids)  # this vocabulary has no first space to drop


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('only one turn') }}", "refuses the dialog: only one turn"),
        ("{% for %}", "chat template refuses the dialog"),
        ("{{ messages[9].content.x }}", "chat template refuses the dialog"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "is unsafe"),
        ("{{ messages.append(1) }}", "refuses the dialog"),
    ],
)
def test_templates_that_fail(folder: Path, template: str, message: str) -> None:
    formatter = chat_format(with_template(folder, template))
    with pytest.raises(ValueError, match=message):
        formatter.encode_dialog_prompt(DIALOGS[0])


def rendered(template: str) -> str:
    class Names:
        special_tokens, names, bos_id, eos_id = {"<s>": 1, "</s>": 2}, {"pad_token": "<pad>"}, 1, 2

    messages = [{"role": "user", "content": "Hi <b>", "extra": {"x": 1}}]
    return render(template, Names(), messages, add_generation_prompt=True)


@pytest.mark.parametrize(
    "template",
    [
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{% extends 'x' %}",
        "{{ lipsum.__globals__['os'] }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ messages.__len__() }}",
        "{{ messages[0].extra.update(x=2) }}",
        "{{ messages.clear() }}",
        "{{ messages[0].pop('role') }}",
        "{{ raise_exception.__globals__.json }}",
        "{{ {}|tojson(default=range) }}",
        "{% debug %}",
        "{% for i in range(200000) %}{% endfor %}",
        "{{ missing.x }}",
        "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    ],
)
def test_a_template_reaches_nothing_but_its_variables(template: str) -> None:
    with pytest.raises(ValueError, match="the folder's chat template refuses the dialog: "):
        rendered(template)


@pytest.mark.parametrize(
    "expression",
    [
        "strftime_now.__self__",
        "raise_exception.__globals__",
        "''|attr('__class__')",
        "'{0.__class__}'.format('')",
        "'{x.__class__}'.format_map({'x': 1})",
        "(1).__class__",
        "self.__class__",
    ],
)
def test_attributes_with_underscores_are_undefined(expression: str) -> None:
    assert rendered(f"{{{{ {expression} }}}}") == ""


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ messages[0]|tojson }}", '{"role": "user", "content": "Hi <b>", "extra": {"x": 1}}'),
        ("{{ ['é', 1]|tojson(indent=1) }}", '[\n "é",\n 1\n]'),
        ("{{ {'b': 1}|tojson(separators=(',', ':')) }}", '{"b":1}'),
        ("{{ tools is none and documents is none and add_generation_prompt }}", "True"),
        ("{{ builtin_tools is defined }}{{ missing }}", "False"),
        ("{{ bos_token + eos_token + pad_token }}", "<s></s><pad>"),
        ("{{ strftime_now('%Y-%m')|length }}", "7"),
        ("{% for i in range(5) %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}", "012"),
        (
            "{% for i in range(3) %}{% if i == 1 %}{% continue %}{% endif %}{{ i }}{% endfor %}",
            "02",
        ),
        ("{% generation %}{% set a = 1 %}{{ a }}{% endgeneration %}{{ a }}", "1"),
        ("  {% if true %}\na\n  {% endif %}\nb\n", "a\nb"),
        ("{{ messages[0].content }}", "Hi <b>"),
    ],
)
def test_what_transformers_gives_templates(template: str, text: str) -> None:
    assert rendered(template) == text


def test_a_templates_own_message_has_no_terminal_escapes() -> None:
    with pytest.raises(ValueError, match=r"dialog: \\x1b\[31mred\n.x{900}") as caught:
        rendered("{{ raise_exception('\x1b[31mred\n' + 'x' * 10000) }}")
    assert len(str(caught.value)) < 1100


def test_messages_a_template_cant_have(folder: Path) -> None:
    formatter = chat_format(with_template(folder, CHATML))
    for extra, message in (
        ({"tool_call": "f()"}, "has 'tool_call', which"),
        ({"eom": True}, "eom"),
    ):
        dialog: Any = [{"role": "assistant", "content": "a"} | extra]
        with pytest.raises(ValueError, match=message):
            formatter.encode_dialog_prompt(dialog)


def test_a_generation_ends_at_the_folders_end_token(folder: Path) -> None:
    with_template(folder, CHATML)
    llm = Llama.build(str(folder), max_seq_len=128, device="cpu", dtype="float32")
    end = llm.tokenizer.special_tokens["<|im_end|>"]
    assert end in llm.tokenizer.stop_tokens
    prompt = llm.formatter.encode_dialog_prompt(DIALOGS[0])
    (answer,) = llm.chat_completion([DIALOGS[0]], temperature=0, max_gen_len=10)
    (tokens,), _ = llm.generate([prompt], max_gen_len=10, temperature=0)
    assert answer["generation"]["content"] == llm.tokenizer.decode(tokens)


@pytest.mark.parametrize(
    "template",
    [
        ROLES,
        "{% for m in messages %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% endfor %}",
        "{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}",
        "{% if messages[0].role != 'system' %}{{ raise_exception('no system') }}{% endif %}",
    ],
)
def test_the_first_space_of_an_answer_is_dropped(tmp_path: Path, template: str) -> None:
    """With a vocabulary that adds one, as transformers does when it decodes an answer; a text that
    is continued keeps it."""
    content = tokenizer_json(opened(LLAMA2))
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    tokenizer = opened(tmp_path / "tokenizer.json")
    formatter = chat_format(tokenizer)
    assert isinstance(formatter, TemplateChatFormat)
    assert not formatter.starts_answer(tokenizer.encode("Once upon a time", True, False))
    assert not formatter.starts_answer([])
    for dialog in DIALOGS if "no system" not in template else []:
        ids = formatter.encode_dialog_prompt(dialog)
        assert formatter.starts_answer(ids)
        assert not formatter.starts_answer(ids[:-3])


@pytest.mark.parametrize(
    ("config", "middle"),
    [
        # recorded from transformers 5.23, which needs protobuf to read this vocabulary
        ({}, [1792, 13, 18567, 727, 32001, 13, 32000, 465, 22137, 13]),
        ({"legacy": False}, [1792, 13, 18567, 727, 32001, 13, 32000, 465, 22137, 13]),
        ({"legacy": True}, [1404, 13, 18567, 727, 32001, 29871, 13, 32000, 20255, 13]),
    ],
)
def test_chatml_with_a_sentencepiece_vocabulary(
    tmp_path: Path, config: dict[str, Any], middle: list[int]
) -> None:
    opened(LLAMA2)
    shutil.copy(LLAMA2, tmp_path / "tokenizer.model")
    added_tokens = {"<|im_start|>": 32000, "<|im_end|>": 32001}
    (tmp_path / "added_tokens.json").write_text(json.dumps(added_tokens))
    config = {"eos_token": "<|im_end|>", "chat_template": CHATML} | config
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = opened(tmp_path / "tokenizer.model")
    assert (tokenizer.eos_id, tokenizer.stop_tokens) == (32001, {2, 32001})
    dialog: Any = [{"role": "user", "content": "Hi there"}]
    assert chat_format(tokenizer).encode_dialog_prompt(dialog) == [32000, *middle]
    # the same from the tokenizer.json that convert would write
    config |= {"tokenizer_class": "LlamaTokenizer"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer_json(tokenizer)))
    read = opened(tmp_path / "tokenizer.json")
    assert chat_format(read).encode_dialog_prompt(dialog) == [32000, *middle]
    text = " two  spaces\n"
    assert read.encode(text, True, False) == tokenizer.encode(text, True, False)


@pytest.mark.parametrize("template", [LLAMA3_TEMPLATE, DATES])
def test_metas_template_of_llama3_gives_our_format(folder: Path, template: str) -> None:
    formatter = chat_format(with_template(folder, template))
    assert type(formatter) is ChatFormat
    theirs = AutoTokenizer.from_pretrained(folder)
    for dialog in DIALOGS:
        text = theirs.apply_chat_template(dialog, add_generation_prompt=True, tokenize=False)
        if template == DATES:  # the only difference, which Meta's own format doesn't have
            start = "<|start_header_id|>system<|end_header_id|>\n\n"
            before, _, after = text.partition(start)
            date, _, system = after.removeprefix(
                "Cutting Knowledge Date: December 2023\n"
            ).partition("\n\n")
            assert date.startswith("Today Date: ")
            text = before + (start if len(dialog) > 1 else "") + system
            if len(dialog) == 1:
                text = before + system.removeprefix("<|eot_id|>")
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert formatter.encode_dialog_prompt(dialog) == ids


def test_metas_template_of_llama2_gives_our_format(tmp_path: Path) -> None:
    original = opened(LLAMA2)
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer_json(original)))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "chat_template": LLAMA2_TEMPLATE,
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    formatter = chat_format(opened(tmp_path / "tokenizer.json"))
    assert type(formatter) is Llama2ChatFormat
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for dialog in DIALOGS:
        ids = theirs.apply_chat_template(dialog, add_generation_prompt=True)["input_ids"]
        assert formatter.encode_dialog_prompt(dialog) == ids
        assert Llama2ChatFormat(original).encode_dialog_prompt(dialog) == ids


def test_another_template_with_llama3s_headers_is_used(folder: Path) -> None:
    """A fine-tune's default system message."""
    template = LLAMA3_TEMPLATE.replace("{{ bos_token }}", "{{ bos_token }}Be brief. ")
    assert isinstance(chat_format(with_template(folder, template)), TemplateChatFormat)
