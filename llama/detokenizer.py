"""Streaming detokenizer: tokens to text, piece by piece, up to a stop string."""

import codecs
from collections.abc import Sequence
from typing import Protocol


class TokenDecoder(Protocol):
    """The part of a tokenizer that a ``Detokenizer`` uses."""

    drops_first_space: bool

    def decode(self, t: Sequence[int]) -> str: ...

    def decode_bytes(self, t: Sequence[int]) -> bytes: ...


class Detokenizer:
    """Detokenizes one sequence incrementally. Pieces end at character boundaries; a possible start
    of a stop string is held back.

    At the start of a text, the space that SentencePiece adds before the first word is dropped; a
    continuation keeps it, so that prompt and continuation concatenate to the full text.

    Attributes:
        stop: strings that end the text and are removed from it.
        stopped: whether one was found.
    """

    def __init__(self, tokenizer: TokenDecoder, *, starts_text: bool) -> None:
        self._tokenizer, self._starts_text = tokenizer, starts_text
        self._drop_space = starts_text and tokenizer.drops_first_space
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""  # may be the start of a stop string
        self.stop: Sequence[str] = ()
        self.stopped = False

    def without_stop(self) -> "Detokenizer":
        """One for the same text from its start, without stop strings."""
        return Detokenizer(self._tokenizer, starts_text=self._starts_text)

    def add(self, token: int | None, *, final: bool = False) -> str:
        """Add a token, if any, and return the text that it completes.

        Args:
            final: the sequence ends here: incomplete characters become U+FFFD.
        """
        data = b"" if token is None else self._tokenizer.decode_bytes([token])
        if data and self._drop_space:
            self._drop_space = False
            dropped = data.removeprefix(b" ")
            assert token is not None
            if self._tokenizer.decode([token]) == dropped.decode(errors="replace"):
                data = dropped  # else the space belongs to the token, as in " \u2047 "
        text = self._held + self._utf8.decode(data, final=final)
        if not self.stop:
            return text
        found = [at for at in map(text.find, self.stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        n_held = 0
        if not final:
            starts = (s[:n] for s in self.stop for n in range(1, len(s)))
            n_held = max((len(start) for start in starts if text.endswith(start)), default=0)
        self._held = text[len(text) - n_held :]
        return text[: len(text) - n_held]
