"""Sampling parameters, and the step from logits to the next token."""

import dataclasses
import functools
import math
import numbers
from collections.abc import Sequence

import torch
from torch import Tensor

# MKL selects its exp and log kernels at the first call of each; threads racing on that call can get
# a low-precision one (pytorch/pytorch#188792: some log-probabilities were off by 3e-5 in one of a
# hundred processes). Make the first call from a single thread, by computing one element.
torch.logsumexp(torch.zeros(1, device="cpu"), dim=0)

# Try the top 1,024 tokens before sorting the vocabulary.
_HEAD = 1024
# Below this, logits / temperature would overflow float32.
_MIN_TEMPERATURE = 1e-30


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How to continue one prompt.

    Attributes:
        max_gen_len: maximum number of tokens to generate; None: as many as fit.
        temperature: divides the logits; 0 is greedy.
        top_p: see ``sample_top_p``; 0 is greedy.
        stop: strings that end the text and are removed from it, and token ids that end it, in
            addition to ``tokenizer.stop_tokens``.
        logprobs: return log-probabilities of the tokens; with ``echo``, also of the prompt's.
        top_logprobs: at each token, also return this many of the highest log-probabilities.
        echo: return the prompt's tokens before the generated ones.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range; the message has the limit and the value.
    """

    max_gen_len: int | None = None
    temperature: float = 0.6
    top_p: float = 0.9
    stop: Sequence[str | int] = ()
    logprobs: bool = False
    top_logprobs: int = 0
    echo: bool = False

    def __post_init__(self) -> None:
        for name, kind in (
            ("max_gen_len", numbers.Integral),
            ("temperature", numbers.Real),
            ("top_p", numbers.Real),
            ("top_logprobs", numbers.Integral),
        ):
            value = getattr(self, name)
            if not isinstance(value, kind) and not (name == "max_gen_len" and value is None):
                expected = "an integer" if kind is numbers.Integral else "a number"
                raise TypeError(f"{name} is {value!r}, expected {expected}")
        if self.max_gen_len is not None and self.max_gen_len < 0:
            raise ValueError(f"max_gen_len is {self.max_gen_len}, expected 0 or more")
        if self.temperature != 0 and not _MIN_TEMPERATURE <= self.temperature < math.inf:
            raise ValueError(
                f"temperature is {self.temperature}, expected 0 (greedy) or at least "
                f"{_MIN_TEMPERATURE}"
            )
        if not 0 <= self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}, expected 0 to 1")
        if self.top_logprobs < 0:
            raise ValueError(f"top_logprobs is {self.top_logprobs}, expected 0 or more")
        if isinstance(self.stop, str):
            raise TypeError(f"stop is the str {self.stop!r:.60}, expected a list: write [stop]")
        for item in self.stop:
            if not isinstance(item, str | numbers.Integral) or item == "":
                raise TypeError(
                    f"stop has {item!r:.60}, expected strings that aren't empty, or ids"
                )
        object.__setattr__(self, "stop", tuple(self.stop))  # the caller's list may change

    @property
    def stop_strings(self) -> list[str]:
        return [item for item in self.stop if isinstance(item, str)]

    @property
    def stop_ids(self) -> set[int]:
        return {int(item) for item in self.stop if not isinstance(item, str)}


def new_generator(seed: int, device: torch.device) -> torch.Generator:
    """A generator with this seed.

    Raises:
        TypeError, ValueError: the seed isn't an integer that torch accepts.
    """
    if not isinstance(seed, numbers.Integral):
        raise TypeError(f"seed is {seed!r}, expected an integer")
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed is {seed}, expected -2**63 to 2**64 - 1")
    return torch.Generator(device).manual_seed(int(seed))


def draw_seed(generator: torch.Generator) -> int:
    """A seed for another generator."""
    draw = torch.empty((), dtype=torch.int64, device=generator.device)
    return int(draw.random_(generator=generator))


def sample(
    logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None
) -> Tensor:
    """The next token of each row of ``logits`` [B, V]: argmax at temperature 0, else sampled.

    Returns:
        int64 [B].
    """
    if temperature == 0:
        return torch.argmax(logits, dim=-1)
    probs = torch.softmax(logits / temperature, dim=-1)
    return sample_top_p(probs, top_p, generator=generator)[:, 0]


def sample_top_p(probs: Tensor, p: float, *, generator: torch.Generator | None = None) -> Tensor:
    """Draw one token per row from its nucleus (Holtzman et al., 2020, section 3.1).

    The nucleus is the most likely tokens, each kept while those before it sum to at most ``p``;
    ties are ordered by ascending id. The draw equals ``torch.multinomial``'s from the sorted
    nucleus, argmax(probability / exponential noise), written out because the checks in
    ``multinomial`` synchronize a CUDA device.

    Args:
        probs: [B, V], each row a distribution. Not modified.
        generator: source of the noise; default: torch's global one.

    Returns:
        int64 [B, 1].
    """
    ranked, ids = _ranked_head(probs, p) or torch.sort(probs, dim=-1, descending=True, stable=True)
    before = torch.cumsum(ranked, dim=-1) - ranked
    nucleus = ranked.masked_fill(before > p, 0.0)
    nucleus = nucleus / _padded(nucleus, probs.shape[-1]).sum(dim=-1, keepdim=True)
    choice = torch.argmax(nucleus / _noise(nucleus, probs.shape[-1], generator), -1, keepdim=True)
    return torch.gather(ids, -1, choice)


def _padded(x: Tensor, width: int) -> Tensor:
    """With zeros after the columns, for the same sum as over the whole vocabulary: that of fewer
    numbers is rounded differently."""
    return x if x.shape[-1] == width else torch.nn.functional.pad(x, (0, width - x.shape[-1]))


def _noise(like: Tensor, vocab_size: int, generator: torch.Generator | None) -> Tensor:
    """The first columns of exponential noise [B, vocab_size], in the shape of ``like``."""
    n_rows, n = like.shape
    if n < vocab_size and _can_skip(like.dtype):
        return _noise_of_head(n_rows, n, vocab_size, like.dtype, generator)
    return like.new_empty(n_rows, vocab_size).exponential_(generator=generator)[:, :n]


def _noise_of_head(
    n_rows: int, n: int, vocab_size: int, dtype: torch.dtype, generator: torch.Generator | None
) -> Tensor:
    """``_noise`` on the CPU, without the logarithms of the other columns, which take 2 ms per row
    of 128,000: random int64 take as many numbers from the generator, in a fifth of the time."""
    noise = torch.empty(n_rows, n, dtype=dtype, device="cpu")
    skipped = torch.empty(vocab_size - n, dtype=torch.int64, device="cpu")
    for row in noise:
        row.exponential_(generator=generator)
        skipped.random_(generator=generator)
    return noise


@functools.cache
def _can_skip(dtype: torch.dtype) -> bool:
    """Whether ``_noise_of_head`` draws the same noise and leaves the generator in the same state,
    which depends on the build of torch."""
    size, generators = 16 * _HEAD, [torch.Generator().manual_seed(0) for _ in range(2)]
    whole = torch.empty(2, size, dtype=dtype, device="cpu").exponential_(generator=generators[0])
    head = _noise_of_head(2, _HEAD, size, dtype, generators[1])
    states = [generator.get_state() for generator in generators]
    return torch.equal(head, whole[:, :_HEAD]) and torch.equal(*states)


def _ranked_head(probs: Tensor, p: float) -> tuple[Tensor, Tensor] | None:
    """The ``_HEAD`` largest probabilities, sorted, and their ids; None if the nucleus may be
    larger. CPU only, where sorting 128,000 numbers takes 10 ms; other devices would have to
    synchronize."""
    if probs.device.type != "cpu" or probs.shape[-1] <= _HEAD:
        return None
    head, ids = torch.topk(probs, _HEAD, dim=-1)  # ties are in any order
    kept = torch.cumsum(head, dim=-1) - head <= p
    smallest = head.masked_fill(~kept, math.inf).amin(dim=-1)
    if not (smallest > head[:, -1]).all():  # ties with the last one may be missing
        return None
    ids, by_id = torch.sort(ids, dim=-1)
    head, by_rank = torch.sort(head.gather(-1, by_id), dim=-1, descending=True, stable=True)
    return head, ids.gather(-1, by_rank)
