"""A folder's own chat template, and the choice of a chat format.

Templates are jinja programs that render a dialog to one text (ChatML, Zephyr, DeepSeek, ...).
Llama's own formats don't use theirs: they encode content apart from control tokens.
"""

import datetime
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
# Ordinary words of some assistants' answers, such as <think>.
_IS_TAG = re.compile(r"</?\w+>")


class TemplateChatFormat:
    """A chat format defined by a jinja template, rendered in a sandbox as transformers does.

    The rendered text includes control tokens by name, and content can't be told from them: content
    that holds the name of an added token is refused. Answers may hold tags such as ``<think>``.

    Attributes:
        tool_call_id, eom_id: None; tool calls are part of the text.
    """

    tool_call_id: int | None = None
    eom_id: int | None = None

    def __init__(self, tokenizer: Any, template: str) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self._names: list[str] = getattr(tokenizer, "added_names", list(tokenizer.special_tokens))
        self._answer_start: str | None = None

    def encode_dialog_prompt(
        self, dialog: Dialog, *, continue_final_message: bool = False
    ) -> list[int]:
        """Encode a dialog, up to where the assistant's next message starts.

        Args:
            continue_final_message: instead leave the last message, the assistant's, open to be
                continued.

        Raises:
            ValueError: a message isn't valid or holds the name of an added token, or the template
                refuses the dialog.
        """
        given = normalize_dialog(dialog, continue_final_message, self._normalized)
        messages = [dict(message) for message in given]
        text = self.render(messages, add_generation_prompt=not continue_final_message)
        if continue_final_message:
            content = given[-1]["content"].strip()
            text = text[: text.rindex(content) + len(content)]
        return list(self.tokenizer.encode(text, bos=False, eos=False, allowed_special="all"))

    def starts_answer(self, tokens: Sequence[int]) -> bool:
        """Whether these ids end like a dialog prompt: the answer is then a new text, and its
        leading space is dropped."""
        if not self.tokenizer.drops_first_space:
            return False
        if self._answer_start is None:
            self._answer_start = self._find_answer_start()
        return self.tokenizer.decode(tokens[-64:]).endswith(self._answer_start)

    def render(self, messages: list[dict[str, Any]], *, add_generation_prompt: bool) -> str:
        """The template's text.

        Raises:
            ValueError: the template refuses the dialog or is wrong.
        """
        return render(self.template, self.tokenizer, messages, add_generation_prompt)

    def _normalized(self, message: Any, where: str) -> Message:
        """The message with its content as one string. Its other keys are the template's matter."""
        content = text_of(message, where)
        if extra := sorted(message.keys() & {"tool_call", "eom"}):
            raise ValueError(
                f"{where} has {extra[0]!r}, which this folder's chat template doesn't have: write "
                "it into the content"
            )
        is_answer = message["role"] == "assistant"
        for key, value in (message | {"content": content}).items():
            text = value if isinstance(value, str) else _to_json(value)
            for name in self._names:
                if name in text and not (is_answer and _IS_TAG.fullmatch(name)):
                    raise ValueError(
                        f"the {key} of {where} holds {name!r}, which is a control token of this "
                        "folder's chat template: remove it, or ask the user to"
                    )
        return cast(Message, message | {"content": content})

    def _find_answer_start(self) -> str:
        """The text after a dialog that begins an answer, without control tokens."""
        whole, start = (
            self.tokenizer.decode(
                self.tokenizer.encode(
                    self.render(_PROBES[0], add_generation_prompt=prompt),
                    bos=False,
                    eos=False,
                    allowed_special="all",
                )
            )
            for prompt in (True, False)
        )
        return whole.removeprefix(start)


class NoChatFormat:
    """For a tokenizer whose chat format can't be told: refuses every dialog."""

    tool_call_id: int | None = None
    eom_id: int | None = None

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        self.tokenizer = tokenizer

    def encode_dialog_prompt(
        self, dialog: Dialog, *, continue_final_message: bool = False
    ) -> list[int]:
        raise ValueError(
            "this model has no chat format: its folder has no chat_template, and its tokenizer "
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
            bos_token=names.get(tokenizer.bos_id, ""),
            eos_token=names.get(tokenizer.eos_id, ""),
        )
    except Exception as error:  # a template can raise anything
        raise ValueError(f"the folder's chat template refuses the dialog: {error}") from error


def _to_json(value: Any, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent, default=str, **options)


class _Generation(jinja2.ext.Extension):
    """The {% generation %} block, which marks answers for training and renders as its content."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)
