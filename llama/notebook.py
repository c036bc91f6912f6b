"""HTML representations for notebooks."""

import html
import math
from collections.abc import Sequence
from typing import Any


class Prediction(dict[str, Any]):
    """A prediction, which a notebook shows with each token coloured by its probability, if it has
    log-probabilities: the redder, the less likely."""

    def _repr_html_(self) -> str:
        if "tokens" not in self or "logprobs" not in self:
            generation = self["generation"]
            text = generation if isinstance(generation, str) else generation["content"]
            return f"<pre>{html.escape(text)}</pre>"
        return coloured(self["tokens"], self["logprobs"])


def coloured(texts: Sequence[str], logprobs: Sequence[float]) -> str:
    """HTML of tokens in the colours of their probabilities, with the numbers as tooltips."""
    parts = []
    for text, logprob in zip(texts, logprobs, strict=True):
        probability = math.exp(logprob)
        style = f"background: rgba(255, 0, 0, {0.7 * (1 - probability):.3f})"
        title = html.escape(f"{text!r}: {100 * probability:.1f} %, log-probability {logprob:.3f}")
        parts.append(f'<span style="{style}" title="{title}">{html.escape(text)}</span>')
    return f'<pre style="white-space: pre-wrap">{"".join(parts)}</pre>'
