"""tiktoken vocabulary files, and Llama 3's split pattern."""

import base64
import binascii
import io

from llama.vocab.file import check_single_bytes, check_size

# How Llama 3 splits text before byte-pair merging: contractions, words with at most one leading
# character that is neither letter, digit nor newline, groups of up to three digits, punctuation,
# newlines, other whitespace.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+"
    r"|\s+(?!\S)"
    r"|\s+"
)


def parse_tiktoken(data: bytes, path: str) -> dict[bytes, int]:
    """Ranks of a tiktoken vocabulary: ``base64(token bytes) rank`` per line, ranks 0, 1, 2, ...

    Raises:
        ValueError: this is not a tiktoken vocabulary; the message names ``path`` and the line.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(io.BytesIO(data), start=1):
        if not line.strip():
            continue
        check_size(len(ranks) + 1, path)
        try:
            token_base64, rank_text = line.split()
            token, rank = base64.b64decode(token_base64, validate=True), int(rank_text)
        except (ValueError, binascii.Error):
            raise ValueError(
                f"{path!r} is damaged: line {number} is {line.strip()[:60]!r}, expected a base64 "
                "token, a space and its rank; download the file again"
            ) from None
        if rank != len(ranks) or token in ranks:
            problem = "repeats a token" if token in ranks else f"has rank {rank}"
            raise ValueError(
                f"{path!r} is damaged: line {number} {problem}, expected a new token with rank "
                f"{len(ranks)}; download the file again"
            )
        ranks[token] = rank
    check_single_bytes(ranks, path)
    return ranks
