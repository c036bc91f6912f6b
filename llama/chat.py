"""Dialogs as token ids: the chat formats of Llama 3 and Llama 2.

User text is always encoded as plain text, and only the format itself inserts the ids of special
tokens. A user who types ``<|eot_id|>`` gets the ids of those ten characters and can't end the turn.
The tags of Llama 2's format are plain text, as in that model's training; content that contains one
is rejected.
"""

from collections.abc import Sequence
from functools import partial
from typing import Protocol

from llama.dialog import Dialog, Message, Role, normalize_dialog, normalize_message

__all__ = ["ChatFormat", "Dialog", "Llama2ChatFormat", "Message", "Role"]


class ChatTokenizer(Protocol):
    """The part of a tokenizer that a chat format uses."""

    bos_id: int
    eos_id: int
    special_tokens: dict[str, int]
    control_ids: set[int]

    def encode(self, s: str, bos: bool, eos: bool) -> list[int]: ...

    def decode(self, t: Sequence[int]) -> str: ...


class ChatFormat:
    """The Llama 3 chat format.

    A message is ``<|start_header_id|>role<|end_header_id|>``, two newlines, the content without
    surrounding whitespace, ``<|eot_id|>``. A prompt is ``<|begin_of_text|>``, the messages, and the
    header of the assistant's answer. From Llama 3.1 on, a tool call follows the assistant's content
    as ``<|python_tag|>`` and its text, unchanged.

    Attributes:
        tool_call_id: id of ``<|python_tag|>``, None before Llama 3.1.
        eom_id: id of ``<|eom_id|>``, None before Llama 3.1.
    """

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        self.tokenizer = tokenizer
        self.tool_call_id: int | None = tokenizer.special_tokens.get("<|python_tag|>")
        self.eom_id: int | None = tokenizer.special_tokens.get("<|eom_id|>")

    def encode_header(self, message: Message) -> list[int]:
        """Encode the header of ``message``.

        Raises:
            ValueError: the message isn't a dict of a known role and a text, or has keys that this
                model doesn't support.
        """
        return self._header(self._normalized(message)["role"])

    def encode_message(self, message: Message) -> list[int]:
        """Encode a whole message, including its ``<|eot_id|>`` or ``<|eom_id|>``."""
        return self._message(self._normalized(message))

    def encode_dialog_prompt(
        self, dialog: Dialog, *, continue_final_message: bool = False
    ) -> list[int]:
        """Encode a dialog, up to where the assistant's next message starts.

        Args:
            continue_final_message: instead leave the last message, the assistant's, open to be
                continued.

        Raises:
            ValueError: the dialog is empty, or one of its messages isn't valid.
        """
        ids = [self.tokenizer.bos_id]
        for message in normalize_dialog(dialog, continue_final_message, self._normalized):
            ids += self._message(message)
        return ids[:-1] if continue_final_message else ids + self._header("assistant")

    def starts_answer(self, tokens: Sequence[int]) -> bool:
        """Whether a new text starts after these ids, so that its leading space is dropped."""
        return False

    def _normalized(self, message: Message, where: str = "the message") -> Message:
        return normalize_message(message, where, tools=self.tool_call_id is not None)

    def _message(self, message: Message) -> list[int]:
        special = self.tokenizer.special_tokens
        ids = self._header(message["role"])
        ids += self.tokenizer.encode(message["content"].strip(), bos=False, eos=False)
        if "tool_call" in message:
            ids.append(special["<|python_tag|>"])
            ids += self.tokenizer.encode(message["tool_call"], bos=False, eos=False)
        return [*ids, special["<|eom_id|>" if message.get("eom") else "<|eot_id|>"]]

    def _header(self, role: str) -> list[int]:
        special = self.tokenizer.special_tokens
        return [
            special["<|start_header_id|>"],
            *self.tokenizer.encode(role, bos=False, eos=False),
            special["<|end_header_id|>"],
            *self.tokenizer.encode("\n\n", bos=False, eos=False),
        ]


# --- Llama 2 ------------------------------------------------------------------------------------

B_INST, E_INST = "[INST]", "[/INST]"
B_SYS, E_SYS = "<<SYS>>\n", "\n<</SYS>>\n\n"


class Llama2ChatFormat:
    """The Llama 2 chat format.

    A question and its answer are ``<s>``, the text ``[INST] question [/INST] answer`` and one
    space, ``</s>``; the last question is ``<s>`` and ``[INST] question [/INST]``. A system message
    goes into the first question, between ``<<SYS>>`` and ``<</SYS>>``. Whitespace around questions
    and answers is stripped.

    Attributes:
        tool_call_id, eom_id: None; Llama 2 has no tools.
    """

    tool_call_id: int | None = None
    eom_id: int | None = None

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        self.tokenizer = tokenizer

    def encode_dialog_prompt(
        self, dialog: Dialog, *, continue_final_message: bool = False
    ) -> list[int]:
        """Encode a dialog, up to where the assistant's next message starts.

        Args:
            continue_final_message: instead leave the last message, the assistant's, open to be
                continued.

        Raises:
            ValueError: a message isn't valid or contains a tag of this format, or the messages
                don't alternate between user and assistant, after an optional system message.
        """
        normalize = partial(normalize_message, tools=False)
        messages = normalize_dialog(dialog, continue_final_message, normalize)
        for i, message in enumerate(messages):
            self._refuse_tags(message["content"], i)
        turns = _turns(messages[:-1] if continue_final_message else messages)
        ids: list[int] = []
        for question, answer in zip(turns[:-1:2], turns[1::2], strict=True):
            text = f"{B_INST} {question.strip()} {E_INST} {answer.strip()} "
            ids += [*self._begin(text), self.tokenizer.eos_id]
        text = f"{B_INST} {turns[-1].strip()} {E_INST}"
        if continue_final_message:
            text += f" {messages[-1]['content'].strip()}"
        return ids + self._begin(text)

    def _begin(self, text: str) -> list[int]:
        return [self.tokenizer.bos_id, *self.tokenizer.encode(text, bos=False, eos=False)]

    def _refuse_tags(self, content: str, index: int) -> None:
        """Also check the decoded ids: the vocabulary may normalize other characters to a tag."""
        ids = self.tokenizer.encode(content, bos=False, eos=False)
        for text in (content, self.tokenizer.decode(ids)):
            for tag in (B_INST, E_INST, B_SYS.strip(), E_SYS.strip()):
                if tag in text:
                    raise ValueError(
                        f"the content of message {index} holds {tag}, which the Llama 2 chat "
                        "format reserves for its structure: remove it, or ask the user to"
                    )
        if controls := self.tokenizer.control_ids.intersection(ids):
            raise ValueError(
                f"the content of message {index} is encoded to the control token {min(controls)}, "
                "expected text only: give the tokenizer.model that belongs to the weights"
            )

    def starts_answer(self, tokens: Sequence[int]) -> bool:
        """Whether these ids end like a dialog prompt: the answer is then a new text, and its
        leading space is dropped."""
        return self.tokenizer.decode(tokens[-8:]).endswith(E_INST)


def _turns(dialog: Dialog) -> list[str]:
    """Contents of the alternating user and assistant messages; the first includes the system's."""
    system = dialog[0]["content"] if dialog[0]["role"] == "system" else None
    first = 0 if system is None else 1
    if first == len(dialog):
        raise ValueError(
            "the dialog is only message 0, from the system, expected a user message after it"
        )
    for i, message in enumerate(dialog[first:], start=first):
        role, expected = message["role"], "assistant" if (i - first) % 2 else "user"
        if role == "system":
            raise ValueError(f"message {i} is from the system, expected that as message 0 only")
        if role != expected and i == first:
            raise ValueError(f"message {i} is from the assistant, expected the user to begin")
        if role != expected:
            raise ValueError(
                f"messages {i - 1} and {i} are both from the {role}, expected user and assistant "
                "in turns"
            )
    if (len(dialog) - first) % 2 == 0:
        raise ValueError(
            f"message {len(dialog) - 1}, the last, is from the assistant, expected the user: the "
            "model writes the next answer"
        )
    turns = [message["content"] for message in dialog[first:]]
    if system is not None:
        turns[0] = f"{B_SYS}{system}{E_SYS}{turns[0]}"
    return turns
