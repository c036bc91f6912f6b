"""Which form of each part of a model runs, and why a faster one doesn't."""

import dataclasses
import os

_VARIABLE = "LLAMA_ACCELERATE"


@dataclasses.dataclass
class Ways:
    """The forms that were chosen.

    Attributes:
        linear: of large linear layers: "F.linear", "F.linear, q, k and v in one", "weight on the
            left" or "C kernels" with their instruction set.
        attention: "SDPA", "FlashAttention", or "SDPA, C kernels in decoding steps".
        activations: their dtype, "float32", where it isn't that of the weights.
        decode: a decoding step: "eager", "C kernels", "compiled", "CUDA graph" or "compiled, CUDA
            graph".
        reasons: by attribute, why it isn't a faster form.
    """

    linear: str = "F.linear"
    attention: str = "SDPA"
    decode: str = "eager"
    activations: str | None = None
    reasons: dict[str, str] = dataclasses.field(default_factory=dict)

    @classmethod
    def plain(cls, reason: str) -> "Ways":
        """Nothing is accelerated."""
        return cls(reasons=dict.fromkeys(("linear", "attention", "decode"), reason))

    def __str__(self) -> str:
        labels = {"linear": "linear layers", "attention": "attention", "decode": "decoding step"}
        parts = []
        for name, label in labels.items():
            reason = f" ({self.reasons[name]})" if name in self.reasons else ""
            parts.append(f"{label}: {getattr(self, name)}{reason}")
        if self.activations:
            parts.append(f"activations: {self.activations}")
        return "; ".join(parts)


def why_off(wanted: bool) -> str | None:
    """Why nothing is to be accelerated: the caller's argument, or the environment variable."""
    if not wanted:
        return "accelerate is False"
    value = os.environ.get(_VARIABLE, "")
    if value not in ("", "0", "1"):
        raise ValueError(f"{_VARIABLE} is {value!r}, expected 0 or 1")
    return f"{_VARIABLE} is 0" if value == "0" else None
