"""Llama 2: SentencePiece ids, and the [INST] chat format.

The rules of ``llama/tokenizer.py`` hold here too: text of a user is encoded as plain text, and the
ids of control tokens are put in by structure only. The tags of the chat format are an exception
that Llama 2 was trained with: they are text. A content that holds one is refused.
"""

from collections.abc import Sequence
from typing import Any

from llama.files import summary
from llama.tokenizer import (
    ChatFormat,
    Dialog,
    Tokenizer,
    check_ids,
    check_message,
    check_text,
)
from llama.vocabulary import LARGEST_VOCABULARY, check_size, is_sentencepiece, read_vocabulary

_TAGS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")


class SentencePieceTokenizer:
    """Tokenizer of Llama 2, behind the interface of ``Tokenizer``.

    Attributes:
        model: the underlying ``sentencepiece.SentencePieceProcessor``.
        n_words: vocabulary size, control tokens included.
        bos_id, eos_id: ids of ``<s>`` and ``</s>``.
        pad_id: -1, an id that no text has.
        stop_tokens: ids that end a generation: ``eos_id`` alone.
        special_tokens: name to id of the control tokens and of the unknown token.
        control_ids: ids that no text may be encoded to.
        drops_first_space: True: SentencePiece puts a space before the first word of a text, and
            ``decode`` drops it again where a text begins. ``decode_bytes`` keeps it.

    Raises:
        ImportError: sentencepiece is not installed.
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or not a SentencePiece vocabulary.
    """

    drops_first_space = True

    def __init__(self, model_path: str) -> None:
        try:
            import sentencepiece
        except ImportError as error:
            raise ImportError(
                "the tokenizer of Llama 2 needs sentencepiece: pip install 'llama[llama2]', or "
                "pip install -e '.[llama2]' in a checkout"
            ) from error
        data = read_vocabulary(model_path)
        if not is_sentencepiece(data):
            raise ValueError(
                f"{model_path!r} is no SentencePiece vocabulary (Llama 2): it begins with "
                f"{data[:16]!r}, expected the piece <unk>; give the tokenizer.model that belongs "
                "to the weights"
            )
        check_size(_count_pieces(data), model_path)
        try:
            self.model: Any = sentencepiece.SentencePieceProcessor(model_proto=data)
            self.n_words: int = self.model.vocab_size()
            self._bytes = [self._piece_bytes(i) for i in range(self.n_words)]
        except (RuntimeError, UnicodeDecodeError) as error:
            raise ValueError(
                f"{model_path!r} is damaged: sentencepiece cannot read it ({summary(error)}); "
                "download the file again"
            ) from error
        self.bos_id: int = self.model.bos_id()
        self.eos_id: int = self.model.eos_id()
        self.pad_id: int = -1
        if self.bos_id < 0 or self.eos_id < 0:
            raise ValueError(
                f"{model_path!r} has {self.n_words} pieces and bos id {self.bos_id}, eos id "
                f"{self.eos_id}, expected a vocabulary with <s> and </s>; give the tokenizer.model "
                "that belongs to the weights"
            )
        self.stop_tokens: set[int] = {self.eos_id}
        self.control_ids = {self.bos_id, self.eos_id} | {
            i for i in range(self.n_words) if self.model.is_control(i)
        }
        self.special_tokens: dict[str, int] = {
            self.model.id_to_piece(i): i
            for i in range(self.n_words)
            if self.model.is_control(i) or self.model.is_unknown(i)
        }

    def encode(self, s: str, *, bos: bool, eos: bool) -> list[int]:
        """Ids of a text, with ``bos_id`` before and ``eos_id`` behind it where asked for.

        Raises:
            TypeError: ``s`` is not a string.
            ValueError: ``s`` holds half of a surrogate pair.
        """
        check_text(s)
        ids: list[int] = self.model.encode(s)
        return [self.bos_id] * bos + ids + [self.eos_id] * eos

    def decode(self, t: Sequence[int]) -> str:
        """Text of the ids as SentencePiece gives it, without the space before the first word.

        Raises:
            ValueError: an id is outside the vocabulary.
        """
        check_ids(t, self.n_words)
        text: str = self.model.decode(list(t))
        return text

    def decode_bytes(self, t: Sequence[int]) -> bytes:
        """Bytes of the pieces, each by itself: the space before the first word is kept, control
        tokens have none, and a character may be spread over several byte pieces."""
        check_ids(t, self.n_words)
        return b"".join([self._bytes[token] for token in t])

    def _piece_bytes(self, token: int) -> bytes:
        if self.model.is_control(token):
            return b""
        if self.model.is_unknown(token):  # the vocabulary says how it looks: " ⁇ "
            unknown: str = self.model.decode([token])
            return unknown.encode()
        piece: str = self.model.id_to_piece(token)
        if self.model.is_byte(token):  # written "<0x0A>"
            return bytes([int(piece[1:-1], 16)])
        return piece.replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode()


def _count_pieces(data: bytes) -> int:
    """Number of the pieces in a model file, field 1 of the message, up to the limit. Damage is for
    the library to find, but it would first make an object of every piece."""
    n_pieces = at = 0
    while data[at : at + 1] == b"\x0a" and n_pieces <= LARGEST_VOCABULARY:
        size = shift = 0
        at += 1
        while at < len(data):
            size |= (data[at] & 0x7F) << shift
            at, shift = at + 1, shift + 7
            if data[at - 1] < 0x80 or shift > 63:
                break
        at += size
        n_pieces += 1
    return n_pieces


class Llama2ChatFormat:
    """The Llama 2 chat format.

    A question and its answer are ``<s>``, the text ``[INST] question [/INST] answer`` and one
    space, ``</s>``; the last question is ``<s>`` and ``[INST] question [/INST]``. A system message
    is written into the first question, between ``<<SYS>>`` and ``<</SYS>>``. Questions and answers
    lose the whitespace around them.

    Attributes:
        tool_call_id, eom_id: None, Llama 2 has no tools.
    """

    tool_call_id: int | None = None
    eom_id: int | None = None

    def __init__(self, tokenizer: SentencePieceTokenizer) -> None:
        self.tokenizer = tokenizer

    def encode_dialog_prompt(self, dialog: Dialog) -> list[int]:
        """Ids of a dialog, ready for the assistant's next message to be generated.

        Raises:
            ValueError: a message is not valid or holds a tag of this format, or the messages are
                not an optional system message, then user and assistant in turns, the user last.
        """
        for i, message in enumerate(dialog):
            check_message(message, f"message {i}", tools=False)
            self._refuse_tags(message["content"], i)
        turns = _turns(dialog)
        ids: list[int] = []
        for question, answer in zip(turns[:-1:2], turns[1::2], strict=True):
            text = f"[INST] {question.strip()} [/INST] {answer.strip()} "
            ids += self.tokenizer.encode(text, bos=True, eos=True)
        return ids + self.tokenizer.encode(
            f"[INST] {turns[-1].strip()} [/INST]", bos=True, eos=False
        )

    def _refuse_tags(self, content: str, index: int) -> None:
        """The vocabulary may normalize text, so that a tag is spelled in other characters."""
        ids = self.tokenizer.encode(content, bos=False, eos=False)
        for text in (content, self.tokenizer.decode(ids)):
            for tag in _TAGS:
                if tag in text:
                    raise ValueError(
                        f"the content of message {index} holds {tag}, which the Llama 2 chat "
                        "format keeps for its own structure: take it out, or ask the user to"
                    )
        if controls := self.tokenizer.control_ids.intersection(ids):
            raise ValueError(
                f"the content of message {index} is encoded to the control token {min(controls)}, "
                "expected text only: give the tokenizer.model that belongs to the weights"
            )

    def asks(self, tokens: Sequence[int]) -> bool:
        """Whether these ids end like a dialog prompt, so that an answer follows: a new text."""
        return self.tokenizer.decode(tokens[-8:]).endswith("[/INST]")


def _turns(dialog: Dialog) -> list[str]:
    """Contents of the messages of user and assistant in turns, with the system's in the first."""
    if not dialog:
        raise ValueError("the dialog is empty, expected at least one message")
    system = dialog[0]["content"] if dialog[0]["role"] == "system" else None
    first = 0 if system is None else 1
    if first == len(dialog):
        raise ValueError(
            "the dialog is message 0 from the system alone, expected a message of the user after it"
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
        turns[0] = f"<<SYS>>\n{system}\n<</SYS>>\n\n{turns[0]}"
    return turns


def open_tokenizer(path: str, *, llama31: bool = False) -> Tokenizer | SentencePieceTokenizer:
    """The tokenizer of a vocabulary file, chosen by what the file holds.

    Args:
        llama31: which names a Llama 3 vocabulary gives its special tokens; SentencePiece files
            hold their own.

    Raises:
        FileNotFoundError, ImportError, ValueError: as the tokenizers do.
    """
    if is_sentencepiece(read_vocabulary(path, 16)):
        return SentencePieceTokenizer(path)
    return Tokenizer(path, llama31=llama31)


def chat_format(tokenizer: Tokenizer | SentencePieceTokenizer) -> ChatFormat | Llama2ChatFormat:
    """The chat format that the models of this tokenizer were trained with."""
    if isinstance(tokenizer, SentencePieceTokenizer):
        return Llama2ChatFormat(tokenizer)
    return ChatFormat(tokenizer)
