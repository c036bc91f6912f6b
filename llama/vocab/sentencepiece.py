"""Llama 2's tokenizer (SentencePiece)."""

from collections.abc import Collection, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any, Literal

from llama.files import summary
from llama.vocab.file import (
    LARGEST_VOCABULARY,
    SPACE,
    check_size,
    check_special,
    check_text,
    encode_with_special,
    is_sentencepiece,
    known_ids,
    read_vocabulary,
)
from llama.vocab.huggingface import read_tokenizer_config


class SentencePieceTokenizer:
    """Llama 2's tokenizer, with the same interface as ``Tokenizer``.

    In a Hugging Face folder, the tokens of its added_tokens.json are control tokens, and
    tokenizer_config.json may name one as the end token.

    Attributes:
        model, sp_model: the underlying ``sentencepiece.SentencePieceProcessor``.
        n_words: vocabulary size, control tokens included.
        n_padding: rows of the weights beyond ``n_words``, which decode to nothing.
        bos_id, eos_id: ids of ``<s>`` and ``</s>``.
        pad_id: -1; there is no padding token.
        stop_tokens: ids that end a generation: ``eos_id`` and ``</s>``.
        special_tokens: ids of the control tokens and the unknown token, by name.
        control_ids: ids that text must never encode to.
        drops_first_space: True: SentencePiece adds a space before the first word of a text, and
            ``decode`` strips it from the start. ``decode_bytes`` keeps it.
        chat_template, names: the folder's jinja template, or None; names of tokens that it uses.
        is_legacy: texts after control tokens begin with a space too.

    Raises:
        ImportError: sentencepiece is not installed.
        FileNotFoundError: the file doesn't exist.
        ValueError: the file is damaged, or not a SentencePiece vocabulary.
    """

    drops_first_space = True

    def __init__(self, model_path: str) -> None:
        try:
            import sentencepiece
        except ImportError as error:
            raise ImportError(
                "the tokenizer of Llama 2 needs the package sentencepiece: pip install "
                "sentencepiece"
            ) from error
        data = read_vocabulary(model_path)
        if not is_sentencepiece(data):
            raise ValueError(
                f"{model_path!r} isn't a SentencePiece vocabulary (Llama 2): it begins with "
                f"{data[:16]!r}, expected the piece <unk>; give the tokenizer.model that belongs "
                "to the weights"
            )
        check_size(_count_pieces(data), model_path)
        try:
            self.model: Any = sentencepiece.SentencePieceProcessor(model_proto=data)
            n_pieces: int = self.model.vocab_size()
            self._bytes = {i: self._piece_bytes(i) for i in range(n_pieces)}
        except (RuntimeError, UnicodeDecodeError) as error:
            raise ValueError(
                f"{model_path!r} is damaged: sentencepiece can't read it ({summary(error)}); "
                "download the file again"
            ) from error
        self.bos_id: int = self.model.bos_id()
        self.eos_id: int = self.model.eos_id()
        self.pad_id: int = -1
        if self.bos_id < 0 or self.eos_id < 0:
            raise ValueError(
                f"{model_path!r} has {n_pieces} pieces and bos id {self.bos_id}, eos id "
                f"{self.eos_id}, expected a vocabulary with <s> and </s>; give the tokenizer.model "
                "that belongs to the weights"
            )
        config = read_tokenizer_config(Path(model_path).parent)
        self.chat_template, self.names = config.chat_template, config.names
        added = {name: i for name, i in config.added.items() if i >= n_pieces}
        check_size(n_pieces + len(added), model_path)
        self.sp_model = self.model
        self.n_words: int = 1 + max([n_pieces - 1, *added.values()])
        self.n_padding = 0
        controls = [i for i in range(n_pieces) if self.model.is_control(i)]
        self.control_ids = {self.bos_id, self.eos_id, *controls, *added.values()}
        unknown = [i for i in range(n_pieces) if self.model.is_unknown(i)]
        named = sorted({*controls, *unknown})
        self.special_tokens: dict[str, int] = {self.model.id_to_piece(i): i for i in named} | added
        self.stop_tokens: set[int] = {self.eos_id}
        if config.eos is not None:
            self.eos_id = self.special_tokens.get(config.eos, self.eos_id)
            self.stop_tokens.add(self.eos_id)
        self.is_legacy = config.legacy

    def encode(
        self,
        s: str,
        bos: bool,
        eos: bool,
        *,
        allowed_special: Literal["all"] | AbstractSet[str] = frozenset(),
        disallowed_special: Literal["all"] | Collection[str] = (),
    ) -> list[int]:
        """Encode a text, optionally with ``bos_id`` before and ``eos_id`` after it.

        For the arguments and errors, see ``Tokenizer.encode``.
        """
        check_text(s)
        check_special(s, self.special_tokens, allowed_special, disallowed_special)
        ids = encode_with_special(
            s,
            self.special_tokens,
            allowed_special,
            self.model.encode,
            drops_inner_spaces=not self.is_legacy,
        )
        return [self.bos_id] * bos + ids + [self.eos_id] * eos

    def decode(self, t: Sequence[int] | int) -> str:
        """Decode ids to text, without the space that SentencePiece adds before the first word.

        Raises:
            ValueError: an id is outside the vocabulary.
        """
        ids = known_ids(t, self.n_words, self.n_padding)
        text: str = self.model.decode([i for i in ids if i in self._bytes])
        return text

    def decode_bytes(self, t: Sequence[int] | int) -> bytes:
        """Bytes of the pieces: the space before the first word is kept, control tokens are empty,
        and a character may span several byte pieces."""
        ids = known_ids(t, self.n_words, self.n_padding)
        return b"".join([self._bytes.get(i, b"") for i in ids])

    def _piece_bytes(self, token: int) -> bytes:
        if self.model.is_control(token):
            return b""
        if self.model.is_unknown(token):  # its text is defined by the vocabulary: " ⁇ "
            unknown: str = self.model.decode([token])
            return unknown.encode()
        piece: str = self.model.id_to_piece(token)
        if self.model.is_byte(token):  # written "<0x0A>"
            return bytes([int(piece[1:-1], 16)])
        return piece.replace(SPACE, " ").encode()


def _count_pieces(data: bytes) -> int:
    """Number of pieces in a model file (field 1 of the protobuf message), up to the limit.
    sentencepiece detects damage, but only after creating an object for every piece."""
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
