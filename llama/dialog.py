"""Dialogs: messages as users write them, checked and normalized for the chat formats."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypedDict, cast, get_args

Role = Literal["system", "user", "assistant", "ipython", "tool"]


class _RoleAndContent(TypedDict):
    role: Role
    content: str


class Message(_RoleAndContent, total=False):
    """One turn of a dialog. A tool's output has the role ``ipython``, or ``tool``, its other name.

    In a dialog, the content may also be a list of text parts, and other keys are ignored: see
    ``normalize_message``.

    From Llama 3.1 on, assistant messages have two optional keys: ``tool_call``, the text after
    ``<|python_tag|>``, and ``eom``, whether the message ends in ``<|eom_id|>`` (the assistant waits
    for the tool) instead of ``<|eot_id|>`` (the turn is over).
    """

    tool_call: str
    eom: bool


Dialog = Sequence[Message]

_TOOL_KEYS = {"tool_call": str, "eom": bool}
_AS_TOOL_CALL = "give the text of the call as 'tool_call' (Llama 3.1 and later)"
# Keys of other libraries' messages that change the meaning, unlike ``id`` or ``refusal``.
_UNSUPPORTED_KEYS = {
    "name": "write it into the content, or leave it out",
    "tool_calls": _AS_TOOL_CALL,
    "function_call": _AS_TOOL_CALL,
    "images": "these models read text only",
}


def check_dialogs(dialogs: Sequence[Dialog]) -> None:
    """Raise TypeError for a single dialog or message in place of a list of dialogs."""
    if isinstance(dialogs, Mapping | str):
        raise TypeError(
            f"dialogs is a {type(dialogs).__name__}, expected a list of dialogs, each a list of "
            "messages: write [[message]]"
        )
    if isinstance(dialogs, Sequence) and dialogs and isinstance(dialogs[0], Mapping):
        raise TypeError("dialogs is one dialog, expected a list of them: write [dialog]")


def normalize_dialog(
    dialog: Dialog, continue_final_message: bool, normalize: Callable[[Any, str], Message]
) -> list[Message]:
    """The messages of a dialog, each as ``normalize`` returns it (``normalize_message``, or one of
    another format); it gets the message and its name in errors, such as "message 2".

    Raises:
        ValueError: the dialog is empty, or a message isn't valid; with ``continue_final_message``,
            also if the last one isn't the assistant's or has ended.
    """
    if isinstance(dialog, Mapping | str):
        raise ValueError(
            f"the dialog is {dialog!r:.60}, expected a list of messages: write [message]"
        )
    messages = [normalize(message, f"message {i}") for i, message in enumerate(dialog)]
    if not messages:
        raise ValueError("the dialog is empty, expected at least one message")
    where, last = f"message {len(messages) - 1}, the last,", messages[-1]
    if continue_final_message and last["role"] != "assistant":
        raise ValueError(
            f"continue_final_message is set, but {where} has the role {last['role']!r:.40}, "
            "expected 'assistant'"
        )
    if continue_final_message and last.get("eom"):
        raise ValueError(
            f"continue_final_message is set, but {where} has 'eom', which ends it: leave 'eom' out"
        )
    return messages


def normalize_message(message: Any, where: str, *, tools: bool) -> Message:
    """A message of Llama's formats: a string as content, the role ``ipython`` for ``tool``, and no
    other keys than those of ``Message``. Unknown keys are ignored, as in the published code.

    Args:
        where: names the message in errors.
        tools: the model supports tool calls (Llama 3.1 and later).

    Raises:
        ValueError: the message isn't valid, or has a key or part that would change its meaning.
    """
    for key, remedy in _UNSUPPORTED_KEYS.items():
        # other libraries write None for a key that isn't used
        if isinstance(message, dict) and message.get(key):
            raise ValueError(f"{where} has {key!r}, which the chat format can't express: {remedy}")
    content = text_of(message, where)
    role = message["role"]
    found = [f"the role {role!r}"] if role in ("ipython", "tool") else []
    found += [repr(key) for key in _TOOL_KEYS if key in message]
    if found and not tools:
        raise ValueError(
            f"{where} has {found[0]}, which this model's chat format doesn't have: tools need "
            "Llama 3.1 or later (by hand: Tokenizer(path, llama31=True))"
        )
    roles = [name for name in get_args(Role) if tools or name not in ("ipython", "tool")]
    if role not in roles:
        raise ValueError(f"{where} has the role {role!r}, expected one of {', '.join(roles)}")
    normal = {"role": "ipython" if role == "tool" else role, "content": content}
    for key, kind in _TOOL_KEYS.items():
        if key not in message:
            continue
        if role != "assistant":
            raise ValueError(
                f"{where} has {key!r} but the role {role!r}, expected it in assistant messages only"
            )
        if not isinstance(message[key], kind):
            raise ValueError(
                f"the {key} of {where} is a {type(message[key]).__name__}, expected a "
                f"{kind.__name__}"
            )
        normal[key] = message[key]
    return cast(Message, normal)


def text_of(message: Any, where: str) -> str:
    """The content of a message as one string: text parts, ``[{"type": "text", "text": "hi"}]``, are
    joined without a separator.

    Raises:
        ValueError: the message has no role or content, or holds more than text.
    """
    if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
        raise ValueError(f"{where} is {message!r:.200}, expected a dict of 'role' and 'content'")
    content = message["content"]
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ValueError(
            f"the content of {where} has the type {type(content).__name__}, expected a str or a "
            "list of text parts"
        )
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("text", None):
            raise ValueError(
                f"part {i} of the content of {where} has the type {kind!r:.40}, expected 'text': "
                "these models read text only"
            )
        if kind is None or not isinstance(part.get("text"), str):
            raise ValueError(
                f"part {i} of the content of {where} is {part!r:.60}, expected "
                "{'type': 'text', 'text': '...'}"
            )
    return "".join(part["text"] for part in content)
