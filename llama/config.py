"""ModelArgs: a model's hyperparameters, named as in params.json, and the size of its KV cache."""

import dataclasses
from typing import Literal, NamedTuple

# Llama 2's files don't have rope_theta; those of Llama 3 do, and have a larger vocabulary.
LLAMA2_ROPE_THETA, LLAMA3_ROPE_THETA = 10000.0, 500000.0
LLAMA3_VOCABULARY = 128000
# Files don't record the RoPE scaling factor: 8, but 32 for Llama 3.2, recognized by its shape.
LLAMA31_FACTOR, LLAMA32_FACTOR = 8.0, 32.0
LLAMA32_SHAPES = ((2048, 16), (3072, 28))  # dim, n_layers


class RopeScaling(NamedTuple):
    """How RoPE's wavelengths are scaled to extend the context (``model.precompute_freqs_cis``).

    With an ``original_context`` of 1 all are, which is linear scaling (position interpolation,
    Chen et al., 2023).
    """

    scaling_factor: float = LLAMA31_FACTOR
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192


# The same, as fields of ModelArgs.
ROPE_FIELDS = tuple(f"rope_{name}" for name in RopeScaling._fields)


@dataclasses.dataclass
class ModelArgs:
    """Hyperparameters of a model, named as in params.json, and the size of its KV cache.

    Raises:
        ValueError: a field has an invalid value; the message names the field.
    """

    dim: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int | None = None  # None: as many as n_heads
    vocab_size: int = -1  # -1: as many as the tokenizer has
    multiple_of: int = 256  # the feed-forward width is rounded up to a multiple of this
    ffn_dim_multiplier: float | None = None
    norm_eps: float = 1e-5
    rope_theta: float = -1  # -1: Llama 2's, or with a larger vocabulary Llama 3's
    max_batch_size: int = 32
    max_seq_len: int = 2048
    use_scaled_rope: bool = False
    rope_scaling_factor: float = -1  # -1: 32 for Llama 3.2, else 8
    rope_low_freq_factor: float = RopeScaling().low_freq_factor
    rope_high_freq_factor: float = RopeScaling().high_freq_factor
    rope_original_context: int = RopeScaling().original_context  # 1: linear scaling
    attention_head_dim: int | None = None  # None: dim / n_heads

    def __post_init__(self) -> None:
        self.resolve()

    def resolve(self) -> None:
        """Check the fields, and replace values of -1 by those that follow from other fields, once
        these are known.

        Transformer does it again: scripts assign fields after construction.
        """
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is None and field.default is None:
                continue
            if value in (None, -1) and field.default == -1:
                setattr(self, field.name, self._default(field.name))
                continue
            if field.name == "use_scaled_rope":
                valid, expected = isinstance(value, bool), "true or false"
            elif field.type in (int, int | None):
                limit = 2**12 if field.name == "n_layers" else 2**24
                valid = type(value) is int and 0 < value < limit
                expected = f"a positive integer below {limit}"
                if field.default == -1:
                    expected += ", or -1"
            else:
                valid = type(value) in (int, float) and 0 < value < 1e12
                expected = "a positive number below 1e12"
            if not valid:
                raise ValueError(f"{field.name} is {value!r:.40}, expected {expected}")
        if self.attention_head_dim is None and self.dim % self.n_heads:
            raise ValueError(
                f"dim is {self.dim} and n_heads {self.n_heads}, expected dim to be a multiple of "
                "n_heads, or attention_head_dim to be given"
            )
        if self.head_dim % 2:
            raise ValueError(
                f"head_dim is {self.head_dim} (dim {self.dim}, n_heads {self.n_heads}), expected "
                "an even number: RoPE rotates pairs of elements"
            )
        if self.rope_low_freq_factor >= self.rope_high_freq_factor:
            raise ValueError(
                f"rope_high_freq_factor is {self.rope_high_freq_factor}, expected more than "
                f"rope_low_freq_factor ({self.rope_low_freq_factor})"
            )
        if self.n_heads % self.kv_heads:
            raise ValueError(
                f"n_kv_heads is {self.n_kv_heads}, expected a divisor of n_heads ({self.n_heads})"
            )
        if self.ffn_hidden_dim >= 2**24:
            raise ValueError(
                f"ffn_dim_multiplier is {self.ffn_dim_multiplier}, which makes the feed-forward "
                f"layer {self.ffn_hidden_dim} wide, expected less than {2**24}"
            )

    def _default(self, name: str) -> float:
        if name == "rope_theta" and self.vocab_size != -1:
            is_llama3 = self.vocab_size >= LLAMA3_VOCABULARY
            return LLAMA3_ROPE_THETA if is_llama3 else LLAMA2_ROPE_THETA
        if name == "rope_scaling_factor" and self.use_scaled_rope:
            is_llama32 = (self.dim, self.n_layers) in LLAMA32_SHAPES
            return LLAMA32_FACTOR if is_llama32 else LLAMA31_FACTOR
        return -1

    @property
    def kv_heads(self) -> int:
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def head_dim(self) -> int:
        return self.attention_head_dim or self.dim // self.n_heads

    @property
    def rope_scaling(self) -> RopeScaling | Literal[False]:
        if not self.use_scaled_rope:
            return False
        return RopeScaling(*(getattr(self, name) for name in ROPE_FIELDS))

    @property
    def ffn_hidden_dim(self) -> int:
        return self.ffn_width(4 * self.dim, self.multiple_of, self.ffn_dim_multiplier)

    @staticmethod
    def ffn_width(hidden_dim: int, multiple_of: int, multiplier: float | None) -> int:
        """2/3 of ``hidden_dim`` (SwiGLU has three matrices, not two), scaled and rounded up."""
        width = int((multiplier or 1.0) * int(2 * hidden_dim / 3))
        return -(-width // multiple_of) * multiple_of

    @property
    def valid_tp_sizes(self) -> list[int]:
        """Possible tensor parallel sizes: divisors of the query heads, feed-forward width and
        vocabulary that divide the key/value heads or are a multiple of them."""

        def is_valid(n: int) -> bool:
            widths = (self.n_heads, self.ffn_hidden_dim, self.vocab_size)
            kv_heads = max(n, self.kv_heads) % min(n, self.kv_heads)
            return kv_heads == 0 and not any(width % n for width in widths)

        return [n for n in range(1, min(self.n_heads, 1024) + 1) if is_valid(n)]

    def n_local_kv_heads(self, tp_size: int) -> int:
        """Key/value heads per rank: with more ranks than heads, each head is replicated."""
        return max(1, self.kv_heads // tp_size)

    def check_tp_size(
        self, tp_size: int, what: str = "the model", remedy: str = "", parts: str = "ranks"
    ) -> None:
        """Raise ValueError if the model can't be split over ``tp_size`` ranks.

        Args:
            what, remedy, parts: for the message: its subject, its end, and the unit of ``tp_size``.
        """
        if self.vocab_size == -1:
            raise ValueError("vocab_size is -1, expected the tokenizer's n_words")
        if tp_size not in self.valid_tp_sizes:
            possible = ", ".join(map(str, self.valid_tp_sizes))
            raise ValueError(
                f"{what} can't be split over {tp_size} {parts} (possible: {possible}){remedy}"
            )

    def check_fits(self, n_rows: int, n_tokens: int, start_pos: int) -> None:
        """Raise ValueError if these tokens don't fit into the cache."""
        if not 0 < n_rows <= self.max_batch_size or n_tokens == 0:
            raise ValueError(
                f"tokens have the shape {(n_rows, n_tokens)}, expected 1 to {self.max_batch_size} "
                "(max_batch_size) rows of at least one token"
            )
        if not 0 <= start_pos <= self.max_seq_len - n_tokens:
            raise ValueError(
                f"{n_tokens} tokens at start_pos {start_pos} are outside the positions 0 to "
                f"{self.max_seq_len - 1} (max_seq_len {self.max_seq_len})"
            )
