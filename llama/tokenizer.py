"""Text to token ids and back (Llama 3, tiktoken), and the Llama 3 chat format.

Two rules hold throughout: text that comes from a user is always encoded as plain text, and the
ids of special tokens are put in by structure only. A user who types ``<|eot_id|>`` gets the ids of
those ten characters and cannot end the turn.
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Literal, TypedDict, get_args

import tiktoken

from llama.vocabulary import (
    SPLIT_PATTERN,
    is_sentencepiece,
    parse_tiktoken,
    parse_tokenizer_json,
    read_vocabulary,
)

Role = Literal["system", "user", "assistant", "ipython"]


class _RoleAndContent(TypedDict):
    role: Role
    content: str


class Message(_RoleAndContent, total=False):
    """One turn of a dialog. What a tool answered has the role ``ipython``.

    ``tool_call`` and ``eom`` belong to messages of the assistant from Llama 3.1 on: the text that
    follows ``<|python_tag|>``, and whether the message ends in ``<|eom_id|>`` (the assistant waits
    for the tool) instead of ``<|eot_id|>`` (the turn is over).
    """

    tool_call: str
    eom: bool


Dialog = Sequence[Message]

N_SPECIAL_TOKENS = 256
# Offsets from the end of the byte-pair vocabulary; the ids between them are reserved.
_LLAMA3_NAMES = {
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    9: "<|eot_id|>",
}
_LLAMA31_NAMES = {
    **_LLAMA3_NAMES,
    4: "<|finetune_right_pad_id|>",
    8: "<|eom_id|>",
    10: "<|python_tag|>",
}

# tiktoken's regular expression engine overflows its stack on very long pieces. The published
# tokenizer cuts text at these two lengths, so the cuts are part of what the ids are.
_MAX_CHARS = 400_000
_MAX_RUN = 25_000  # characters in a row that are all whitespace, or all not
_RUNS = re.compile(rf"(?:\s{{1,{_MAX_RUN}}}|\S{{1,{_MAX_RUN}}})")


def special_tokens(n_base: int, llama31: bool = False) -> dict[str, int]:
    """Names and ids of the 256 special tokens that follow ``n_base`` byte-pair tokens.

    Llama 3 and 3.1 share the ids; 3.1 gave names to three that were reserved, and numbered the
    reserved ones anew.
    """
    names = _LLAMA31_NAMES if llama31 else _LLAMA3_NAMES
    reserved = iter(range(N_SPECIAL_TOKENS))
    return {
        names.get(i) or f"<|reserved_special_token_{next(reserved)}|>": n_base + i
        for i in range(N_SPECIAL_TOKENS)
    }


def _check_added_tokens(
    added: Mapping[str, int], special: Mapping[str, int], names: Collection[str], path: str
) -> None:
    """Added tokens must lie where our special tokens do, those that chat needs at the same ids."""
    first, last = min(special.values()), max(special.values())
    for name, token_id in added.items():
        if type(token_id) is not int or not first <= token_id <= last:
            raise ValueError(
                f"{path!r} gives the added token {name!r:.80} the id {token_id!r}, expected one of "
                f"{first} to {last}, Llama 3's {N_SPECIAL_TOKENS} special tokens"
            )
    for name in names:
        if added.get(name) != special[name]:
            found = f"gives {name} the id {added[name]}" if name in added else f"has no {name}"
            raise ValueError(
                f"{path!r} {found}, expected id {special[name]}: give the tokenizer that belongs "
                "to the weights (Llama 3 and 3.1 name different tokens)"
            )


class Tokenizer:
    """Byte-pair tokenizer of Llama 3, from a tiktoken vocabulary or Hugging Face's tokenizer.json.

    Args:
        llama31: name the special tokens as Llama 3.1 and later do.

    Attributes:
        model: the underlying ``tiktoken.Encoding``.
        n_words: vocabulary size, special tokens included.
        bos_id, eos_id: ids of ``<|begin_of_text|>`` and ``<|end_of_text|>``.
        pad_id: -1, an id that no text has.
        stop_tokens: ids that end a generation: end of text, end of turn and, with ``llama31``, end
            of message.
        special_tokens: name to id of every special token. Names that a tokenizer.json gives to
            reserved ones are not taken over.
        drops_first_space: False: the text of the ids is their bytes, from the first on.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or not a vocabulary of this kind.
    """

    drops_first_space = False

    def __init__(self, model_path: str, *, llama31: bool = False) -> None:
        data = read_vocabulary(model_path)
        if is_sentencepiece(data):
            raise ValueError(
                f"{model_path!r} "
                "is a SentencePiece vocabulary (Llama 2), expected a tiktoken vocabulary "
                "(Llama 3): open it by llama.llama2.open_tokenizer or Llama.build, which take "
                "either, or give the tokenizer.model that belongs to the weights"
            )
        if data.lstrip()[:1] == b"{":
            ranks, added = parse_tokenizer_json(data, model_path)
            self.special_tokens = special_tokens(len(ranks), llama31)
            names = _LLAMA31_NAMES if llama31 else _LLAMA3_NAMES
            needed = [name for name in names.values() if name != "<|finetune_right_pad_id|>"]
            _check_added_tokens(added, self.special_tokens, needed, model_path)
        else:
            ranks = parse_tiktoken(data, model_path)
            self.special_tokens = special_tokens(len(ranks), llama31)
        self.model = tiktoken.Encoding(
            name=model_path,
            pat_str=SPLIT_PATTERN,
            mergeable_ranks=ranks,
            special_tokens=self.special_tokens,
        )
        self.n_words: int = self.model.n_vocab
        self.bos_id: int = self.special_tokens["<|begin_of_text|>"]
        self.eos_id: int = self.special_tokens["<|end_of_text|>"]
        self.pad_id: int = -1
        self.stop_tokens: set[int] = {self.eos_id, self.special_tokens["<|eot_id|>"]}
        if llama31:
            self.stop_tokens.add(self.special_tokens["<|eom_id|>"])

    def encode(
        self,
        s: str,
        *,
        bos: bool,
        eos: bool,
        allowed_special: Literal["all"] | AbstractSet[str] = frozenset(),
        disallowed_special: Literal["all"] | Collection[str] = (),
    ) -> list[int]:
        """Ids of a text, with ``bos_id`` before and ``eos_id`` behind it where asked for.

        Args:
            allowed_special: special tokens whose names in ``s`` become their ids. With the default
                every name is plain text.
            disallowed_special: special tokens whose names in ``s`` are an error.

        Raises:
            TypeError: ``s`` is not a string.
            ValueError: ``s`` holds a disallowed name, or half of a surrogate pair.
        """
        check_text(s)
        ids = [self.bos_id] if bos else []
        for piece in _bounded_pieces(s):
            ids += self.model.encode(
                piece, allowed_special=allowed_special, disallowed_special=disallowed_special
            )
        return [*ids, self.eos_id] if eos else ids

    def decode(self, t: Sequence[int]) -> str:
        """Text of the ids; bytes that are no UTF-8 become U+FFFD.

        Raises:
            ValueError: an id is outside the vocabulary.
        """
        return self.decode_bytes(t).decode("utf-8", errors="replace")

    def decode_bytes(self, t: Sequence[int]) -> bytes:
        """Bytes of the ids: a character may be spread over several of them."""
        check_ids(t, self.n_words)
        return self.model.decode_bytes(list(t))


def check_text(s: str) -> None:
    """Raise TypeError or ValueError for what is no text that can be encoded."""
    if not isinstance(s, str):
        raise TypeError(f"encode takes a str, got {type(s).__name__}: {s!r:.60}")
    try:
        s.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text is not valid Unicode: character {error.start} is {s[error.start]!r}, "
            "half of a surrogate pair; decode the input as UTF-8 with errors='replace'"
        ) from None


def check_ids(ids: Sequence[int], n_words: int) -> None:
    """Raise ValueError for an id that is not in a vocabulary of ``n_words``."""
    for token in ids:
        if not 0 <= token < n_words:
            raise ValueError(f"token id {token} is outside the vocabulary (0 to {n_words - 1})")


def _bounded_pieces(s: str) -> Iterator[str]:
    """Cut ``s`` so that no piece is too long for tiktoken (see ``_MAX_CHARS``)."""
    for start in range(0, len(s), _MAX_CHARS):
        chunk = s[start : start + _MAX_CHARS]
        piece_start, previous = 0, None
        for run in _RUNS.finditer(chunk):
            is_space = run[0][0].isspace()
            if is_space is previous:  # the same run goes on past the limit: cut here
                yield chunk[piece_start : run.start()]
                piece_start = run.start()
            previous = is_space
        yield chunk[piece_start:]


# --- Chat ---------------------------------------------------------------------------------------


class ChatFormat:
    """The Llama 3 chat format.

    A message is ``<|start_header_id|>role<|end_header_id|>``, two newlines, the content without
    surrounding whitespace, ``<|eot_id|>``. A prompt is ``<|begin_of_text|>``, the messages, and the
    header of the assistant's answer. With the names of Llama 3.1, a call of a tool stands behind
    the assistant's content as ``<|python_tag|>`` and its text, unchanged.

    Attributes:
        tool_call_id: id of ``<|python_tag|>``, None before Llama 3.1.
        eom_id: id of ``<|eom_id|>``, None before Llama 3.1.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.tool_call_id: int | None = tokenizer.special_tokens.get("<|python_tag|>")
        self.eom_id: int | None = tokenizer.special_tokens.get("<|eom_id|>")

    def encode_header(self, message: Message) -> list[int]:
        """Ids of the header that opens ``message``.

        Raises:
            ValueError: the message is not a role that is known and a text, or holds more than this
                model knows.
        """
        self._check(message, "the message")
        return self._header(message["role"])

    def encode_message(self, message: Message) -> list[int]:
        """Ids of a whole message, its ``<|eot_id|>`` or ``<|eom_id|>`` included."""
        self._check(message, "the message")
        return self._message(message)

    def encode_dialog_prompt(self, dialog: Dialog) -> list[int]:
        """Ids of a dialog, ready for the assistant's next message to be generated.

        Raises:
            ValueError: the dialog is empty, or one of its messages is not valid.
        """
        if not dialog:
            raise ValueError("the dialog is empty, expected at least one message")
        ids = [self.tokenizer.bos_id]
        for i, message in enumerate(dialog):
            self._check(message, f"message {i}")
            ids += self._message(message)
        return ids + self._header("assistant")

    def _check(self, message: Message, where: str) -> None:
        check_message(message, where, tools=self.tool_call_id is not None)

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


_TOOL_KEYS = {"tool_call": str, "eom": bool}


def check_message(message: Message, where: str, *, tools: bool) -> None:
    """Raise ValueError for what is no message; ``where`` names it, as in ``message 2``.

    Args:
        tools: the model knows calls of tools and their answers (Llama 3.1 and later).
    """
    keys = set(message) if isinstance(message, dict) else set()
    if not {"role", "content"} <= keys or keys - {"role", "content", *_TOOL_KEYS}:
        more = ", and optionally 'tool_call' and 'eom'" if tools else ""
        raise ValueError(
            f"{where} is {message!r:.200}, expected a dict of 'role' and 'content'{more}"
        )
    role = message["role"]
    roles = [name for name in get_args(Role) if tools or name != "ipython"]
    if not tools and (role == "ipython" or keys & set(_TOOL_KEYS)):
        found = "the role 'ipython'" if role == "ipython" else f"{min(keys & set(_TOOL_KEYS))!r}"
        raise ValueError(
            f"{where} has {found}, which needs Llama 3.1 or later: for such a model, open the "
            "tokenizer with llama31=True"
        )
    if role not in roles:
        raise ValueError(f"{where} has the role {role!r}, expected one of {', '.join(roles)}")
    if not isinstance(message["content"], str):
        raise ValueError(
            f"the content of {where} is a {type(message['content']).__name__}, expected a str"
        )
    for key, kind in _TOOL_KEYS.items():
        if key not in keys:
            continue
        if role != "assistant":
            raise ValueError(
                f"{where} has {key!r} but the role {role!r}, expected it in messages of the "
                "assistant only"
            )
        value = dict(message)[key]
        if not isinstance(value, kind):
            raise ValueError(
                f"the {key} of {where} is a {type(value).__name__}, expected a {kind.__name__}"
            )
