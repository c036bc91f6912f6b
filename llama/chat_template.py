"""A folder's own chat template, and the choice of a chat format.

Templates are jinja programs that render a dialog to one text (ChatML, Zephyr, DeepSeek, ...).
Llama's own formats don't use theirs: they encode content apart from control tokens.
"""

import datetime
import functools
import json
import re
from collections.abc import Sequence
from typing import Any, NoReturn, cast

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from llama.chat import ChatFormat, ChatTokenizer, Llama2ChatFormat
from llama.dialog import Dialog, Message, normalize_dialog, text_of
from llama.files import escaped

# The formats of chat.py as templates: written by ``convert``, and compared with a folder's own.
LLAMA3_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' "
    "+ message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{% endif %}"
)
LLAMA2_TEMPLATE = (
    "{% if messages[0]['role'] == 'system' %}"
    "{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% set turns = messages[1:] %}{% else %}{% set system = '' %}{% set turns = messages %}"
    "{% endif %}{% for message in turns %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('expected user and assistant in turns') }}"
    "{% endif %}{% if message['role'] == 'user' %}"
    "{% set text = (system if loop.first else '') + message['content'] %}"
    "{{ bos_token + '[INST] ' + text.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
_PROBES: list[list[dict[str, str]]] = [
    [{"role": "user", "content": "one"}],
    [
        {"role": "system", "content": "two"},
        {"role": "user", "content": " three\n"},
        {"role": "assistant", "content": "four"},
        {"role": "user", "content": "five"},
    ],
]
# Hugging Face's templates of Llama 3.1 and later add these lines, and a system message for them.
_DATES = re.compile(r"Cutting Knowledge Date: .*\nToday Date: .*\n\n")
_EMPTY_SYSTEM = "<|start_header_id|>system<|end_header_id|>\n\n<|eot_id|>"
# Marks the end of an open message in the rendered text. Templates that trim content trim the space.
_OPEN = "\ue000open\ue000 "


class TemplateChatFormat:
    """A chat format defined by a jinja template, rendered in a sandbox as transformers does.

    The rendered text includes control tokens by name, from which content can't be distinguished:
    content that holds such a name is refused.

    Attributes:
        tool_call_id, eom_id: None; tool calls are part of the text.
    """

    tool_call_id: int | None = None
    eom_id: int | None = None

    def __init__(self, tokenizer: Any, template: str) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self._answer_start: list[int] | None = None

    def encode_dialog_prompt(
        self, dialog: Dialog, *, continue_final_message: bool = False
    ) -> list[int]:
        """Encode a dialog, up to where the assistant's next message starts.

        Args:
            continue_final_message: instead leave the last message, the assistant's, open to be
                continued.

        Raises:
            ValueError: a message isn't valid or holds the name of a control token, or the template
                refuses the dialog.
        """
        given = normalize_dialog(dialog, continue_final_message, self._normalized)
        messages = [dict(message) for message in given]
        if continue_final_message:
            messages[-1]["content"] = f"{messages[-1]['content'] or ''}{_OPEN}"
        text = self.render(messages, add_generation_prompt=not continue_final_message)
        if continue_final_message:
            text, mark, _ = text.rpartition(_OPEN.strip())
            if not mark:
                raise ValueError(
                    "continue_final_message is set, but the folder's chat template doesn't render "
                    "the last message as it is"
                )
        return self._ids(text)

    def starts_answer(self, tokens: Sequence[int]) -> bool:
        """Whether these ids end like a dialog prompt: the answer is then a new text, and its
        leading space is dropped."""
        if not self.tokenizer.drops_first_space:
            return False
        if self._answer_start is None:
            self._answer_start = self._find_answer_start()
        start = self._answer_start
        if visible := self.tokenizer.decode(start):
            return bool(self.tokenizer.decode(tokens[-64:]).endswith(visible))
        return len(start) > 0 and list(tokens[-len(start) :]) == start

    def render(self, messages: list[dict[str, Any]], *, add_generation_prompt: bool) -> str:
        """The template's text.

        Raises:
            ValueError: the template refuses the dialog or is wrong.
        """
        if self._reads_parts_only:
            messages = [_in_parts(message) for message in messages]
        return render(self.template, self.tokenizer, messages, add_generation_prompt)

    @functools.cached_property
    def _reads_parts_only(self) -> bool:
        """Whether the template reads content as a list of parts, as Llama Guard 3 1B's does, which
        would leave out a string without an error."""
        mark = _OPEN.strip()

        def shows(message: dict[str, Any]) -> bool:
            try:
                return mark in render(self.template, self.tokenizer, [message], True)
            except ValueError:
                return False

        message = {"role": "user", "content": mark}
        return not shows(message) and shows(_in_parts(message))

    def _normalized(self, message: Any, where: str) -> Message:
        """The message with its content as one string. Other keys are left to the template."""
        calls_tools = isinstance(message, dict) and message.get("tool_calls")
        if calls_tools and message.get("content") is None:
            content = None
        else:
            content = text_of(message, where)
        if extra := sorted(message.keys() & {"tool_call", "eom"}):
            raise ValueError(
                f"{where} has {extra[0]!r}, which this folder's chat template doesn't have: write "
                "it into the content"
            )
        for key, value in (message | {"content": content}).items():
            text = value if isinstance(value, str) else _to_json(value)
            found = [name for name in self.tokenizer.special_tokens if name in text]
            # the vocabulary may normalize other characters to a name
            found += map(str, self.tokenizer.control_ids.intersection(self._ids(text)))
            if found:
                raise ValueError(
                    f"the {key} of {where} holds {found[0]!r}, which is a control token of this "
                    "folder's chat template: remove it, or ask the user to"
                )
        return cast(Message, message | {"content": content})

    def _find_answer_start(self) -> list[int]:
        """The ids between a user's content and the answer."""
        content = _PROBES[0][0]["content"]
        try:
            text = self.render(_PROBES[0], add_generation_prompt=True)
        except ValueError:
            return []
        return self._ids(text.rpartition(content)[2])

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, bos=False, eos=False, allowed_special="all")
        return ids


class NoChatFormat:
    """For a tokenizer whose chat format is unknown: refuses every dialog."""

    tool_call_id: int | None = None
    eom_id: int | None = None

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        self.tokenizer = tokenizer

    def encode_dialog_prompt(
        self, dialog: Dialog, *, continue_final_message: bool = False
    ) -> list[int]:
        raise ValueError(
            "this model has no chat format: its folder has no chat_template, and its tokenizer has "
            "neither Llama 3's headers nor Llama 2's vocabulary. Use text_completion, or write the "
            "template to chat_template.jinja in the folder"
        )

    def starts_answer(self, tokens: Sequence[int]) -> bool:
        return False


AnyChatFormat = ChatFormat | Llama2ChatFormat | TemplateChatFormat | NoChatFormat


def chat_format(tokenizer: Any) -> AnyChatFormat:
    """The chat format for this tokenizer: its folder's template if it has one, unless that is
    Meta's; else by its special tokens."""
    template: str | None = tokenizer.chat_template
    if "<|start_header_id|>" in tokenizer.special_tokens:
        if template is None or _renders_same(template, LLAMA3_TEMPLATE, tokenizer):
            return ChatFormat(tokenizer)
    elif tokenizer.drops_first_space and (
        template is None or _renders_same(template, LLAMA2_TEMPLATE, tokenizer)
    ):
        return Llama2ChatFormat(tokenizer)
    return NoChatFormat(tokenizer) if template is None else TemplateChatFormat(tokenizer, template)


def _renders_same(template: str, metas: str, tokenizer: Any) -> bool:
    """Whether a template renders dialogs as Meta's format, apart from Llama 3.1's dates."""
    for messages in _PROBES:
        expected = render(metas, tokenizer, messages, add_generation_prompt=True)
        try:
            text = render(template, tokenizer, messages, add_generation_prompt=True)
        except ValueError:
            return False
        if _DATES.sub("", text).replace(_EMPTY_SYSTEM, "") != expected:
            return False
    return True


def render(
    template: str, tokenizer: Any, messages: list[dict[str, Any]], add_generation_prompt: bool
) -> str:
    """Render a chat template with the variables and functions that transformers gives it.

    Raises:
        ValueError: the template is wrong, or refuses the messages.
    """

    def fail(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    names = {i: name for name, i in tokenizer.special_tokens.items()}
    ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
    tokens = {key: names.get(i, "") for key, i in ids.items()} | tokenizer.names
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = fail
    environment.globals["strftime_now"] = datetime.datetime.now().strftime
    try:
        return environment.from_string(template).render(
            messages=messages,
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **tokens,
        )
    except Exception as error:  # a template can raise anything
        reason = escaped(f"{error!s:.1000}")
        raise ValueError(f"the folder's chat template refuses the dialog: {reason}") from error


def _in_parts(message: dict[str, Any]) -> dict[str, Any]:
    """The message with its text as a list of one part."""
    if not isinstance(message["content"], str):
        return message
    return message | {"content": [{"type": "text", "text": message["content"]}]}


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
        default=str,
    )


class _Generation(jinja2.ext.Extension):
    """The {% generation %} block, which marks answers for training and renders as its content."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)
