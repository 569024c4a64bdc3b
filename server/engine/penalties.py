"""Make tokens that were seen before less likely.

Repetition: CTRL (Keskar et al., 2019, https://arxiv.org/abs/1909.05858, section 4.1), over prompt and answer, as
transformers does it. Presence and frequency: https://platform.openai.com/docs/api-reference, over the answer alone.
Knows tokens and logits; no requests, no randomness.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from server.engine.types import SamplingParams

__all__ = ["Penalties", "apply_penalties_"]


class Penalties:
    """What one request has said so far, and what each of its tokens costs now."""

    def __init__(self, params: SamplingParams, prompt_token_ids: Sequence[int]) -> None:
        self.repetition = params.repetition_penalty
        self._presence = params.presence_penalty
        self._frequency = params.frequency_penalty
        self._seen = dict.fromkeys(prompt_token_ids) if self.repetition != 1 else {}
        self._counts: Counter[int] = Counter()

    @property
    def is_on(self) -> bool:
        """Whether any token can cost anything."""
        return self.repetition != 1 or self._presence != 0 or self._frequency != 0

    def count(self, token_id: int) -> None:
        """Record one more token of the answer."""
        if self.repetition != 1:
            self._seen[token_id] = None
        self._counts[token_id] += 1

    def repeated(self, num_tokens: int) -> list[int]:
        """Tokens below `num_tokens` that the repetition penalty applies to."""
        return [token_id for token_id in self._seen if token_id < num_tokens]

    def costs(self, num_tokens: int) -> dict[int, float]:
        """Return what to take from the logit of each token below `num_tokens`: presence + frequency * occurrences."""
        if self._presence == 0 and self._frequency == 0:
            return {}
        return {
            token_id: self._presence + self._frequency * count
            for token_id, count in self._counts.items()
            if token_id < num_tokens
        }


def apply_penalties_(logits: Tensor, penalties: Sequence[Penalties]) -> None:
    """Change the logits of tokens that were seen, all rows at once; every entry for itself.

    logits: (B, V) float32, contiguous, changed in place; row b belongs to penalties[b]. Repetition r first: z / r for
    z > 0, else z * r. Then z - presence - frequency * count.
    """
    num_tokens = logits.shape[1]
    places: list[int] = []
    factors: list[float] = []
    cost_places: list[int] = []
    costs: list[float] = []
    for row, one in enumerate(penalties):
        repeated = one.repeated(num_tokens)
        places += [row * num_tokens + token_id for token_id in repeated]
        factors += [one.repetition] * len(repeated)
        for token_id, cost in one.costs(num_tokens).items():
            cost_places.append(row * num_tokens + token_id)
            costs.append(cost)
    flat = logits.view(-1)
    if places:
        where = torch.tensor(places, device=logits.device)
        factor = torch.tensor(factors, dtype=logits.dtype, device=logits.device)
        values = flat[where]
        flat[where] = torch.where(values > 0, values / factor, values * factor)
    if cost_places:
        where = torch.tensor(cost_places, device=logits.device)
        flat[where] -= torch.tensor(costs, dtype=logits.dtype, device=logits.device)
