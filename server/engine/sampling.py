"""Draw the next token of each row. The draw of a request depends on its logits and its seed, never on other rows."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from server.engine.detokenize import TokenTexts
from server.engine.types import SamplingParams, TokenLogprob, TokenScore

__all__ = ["Draw", "Sampler", "draw_tokens"]

# Rarely do more tokens than this share the mass of top_p; finding that many is far cheaper than sorting a vocabulary.
_NUM_CANDIDATES = 1024


class Draw:
    """What one request brings to every draw: its parameters and its random numbers."""

    def __init__(self, params: SamplingParams) -> None:
        self.params = params
        self.random = random.Random(params.seed)  # None seeds from the system.


class Sampler:
    """Turns logits into tokens and log probabilities."""

    def __init__(self, texts: TokenTexts) -> None:
        self._texts = texts

    def sample(self, logits: Tensor, draws: Sequence[Draw]) -> list[tuple[int, TokenLogprob | None] | None]:
        """Return (token, log probability if asked for) per row, and None for a row that holds NaN or infinity.

        logits: (B, V) float32, row b belongs to draws[b]. A padded vocabulary is cut to what the tokenizer knows.
        """
        logits = logits[:, : self._texts.num_tokens]
        is_finite = torch.isfinite(logits).all(dim=1).tolist()
        tokens = draw_tokens(logits, draws)
        return [
            (token_id, self._logprob(logits[row], token_id, draw.params.logprobs)) if is_finite[row] else None
            for row, (token_id, draw) in enumerate(zip(tokens, draws, strict=True))
        ]

    def _logprob(self, logits: Tensor, token_id: int, num_top: int | None) -> TokenLogprob | None:
        """Log probabilities before temperature and top_p, log softmax(logits); logits: (V,) float32."""
        if num_top is None:
            return None
        logprobs = torch.log_softmax(logits, dim=-1)
        best = torch.topk(logprobs, min(num_top, logprobs.shape[0]))
        top = tuple(self._score(*pair) for pair in zip(best.indices.tolist(), best.values.tolist(), strict=True))
        return TokenLogprob(self._score(token_id, float(logprobs[token_id])), top)

    def _score(self, token_id: int, logprob: float) -> TokenScore:
        return TokenScore(token_id, self._texts.text(token_id), self._texts.raw(token_id), logprob)


def draw_tokens(logits: Tensor, draws: Sequence[Draw]) -> list[int]:
    """Return one token per row: the best for temperature 0, else a draw. Rows that are not finite give any token.

    logits: (B, V) float32, row b belongs to draws[b].
    """
    best = logits.argmax(dim=-1).tolist()
    return [
        _draw_one(logits[row], draw) if draw.params.temperature > 0 else best[row] for row, draw in enumerate(draws)
    ]


def _draw_one(logits: Tensor, draw: Draw) -> int:
    """Invert the cumulative distribution of softmax(logits / temperature), cut to top_p, at one random number.

    logits: (V,) float32. The sum runs in float64, so that rounding cannot reach past the last candidate.
    """
    scaled = (logits - logits.max()).to(torch.float64) / draw.params.temperature
    probabilities = torch.softmax(scaled, dim=-1)
    if draw.params.top_p < 1:
        probabilities, tokens = _nucleus(probabilities, draw.params.top_p)
    else:
        tokens = None
    cumulative = probabilities.cumsum(dim=-1)
    point = draw.random.random() * float(cumulative[-1])
    idx = min(int(torch.searchsorted(cumulative, point, right=True)), cumulative.shape[0] - 1)
    return int(tokens[idx]) if tokens is not None else idx


def _nucleus(probabilities: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """Return the probabilities and tokens of the smallest set that reaches `top_p`, best first.

    Source: https://arxiv.org/abs/1904.09751, section 3.1. probabilities: (V,) float64; both results: (K,).
    """
    values, tokens = torch.topk(probabilities, min(_NUM_CANDIDATES, probabilities.shape[0]))
    if float(values.sum()) < top_p:
        values, tokens = torch.sort(probabilities, descending=True)
    num_kept = int((values.cumsum(dim=-1) < top_p).sum()) + 1
    return values[:num_kept], tokens[:num_kept]
