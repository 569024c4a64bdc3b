"""How far an adapter moves the next token after a fixed prompt, asked of the engine like any other request.

Knows the engine's interface; no tensors, no slots. The two requests wait for their turn and touch nothing that belongs
to others.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from contextlib import aclosing

from adapterhub.errors import AdapterLoadError
from adapterhub.records import ProbeDivergence
from server.engine.types import (
    AdapterHandle,
    Engine,
    ErrorEvent,
    GenerateRequest,
    OutputRule,
    SamplingParams,
    TokenEvent,
    TokenLogprob,
)

__all__ = ["PROBE_PROMPT", "compare", "probe"]

# Any text serves; this one asks for all of an adapter's layers and fits into the smallest context.
PROBE_PROMPT = "Read the text and answer in one sentence. The weather in the north was cold, but"
# Texts of alternatives are made in the step thread, 10 microseconds each; these hold nearly all of the probability.
_NUM_ALTERNATIVES = 512
_ANYTHING = OutputRule("regex", r"(?s:.)")  # An answer that ends at once would show no log probabilities.


async def probe(engine: Engine, handle: AdapterHandle, prompt_token_ids: Sequence[int]) -> ProbeDivergence:
    """Compare the next token after the tokens of PROBE_PROMPT with and without an adapter.

    Raises AdapterLoadError when nothing differs, and what the engine raises or answers with.
    """
    adapter = await _next_token(engine, handle, prompt_token_ids)
    divergence = compare(adapter, await _next_token(engine, None, prompt_token_ids))
    if divergence.max_logprob_difference == 0:
        raise AdapterLoadError(
            f"With adapter {handle.label!r} the next token after {PROBE_PROMPT!r} is as likely as without, for each of "
            f"{divergence.num_tokens} tokens: it has no effect.",
            "Its weights are too small to change float32 results; train it longer, or use the base.",
        )
    return divergence


async def _next_token(engine: Engine, handle: AdapterHandle | None, prompt_token_ids: Sequence[int]) -> TokenLogprob:
    request = GenerateRequest(
        request_id=f"probe-{secrets.token_hex(8)}",
        prompt_token_ids=tuple(prompt_token_ids),
        adapter=handle,
        sampling=SamplingParams(max_tokens=1, logprobs=_NUM_ALTERNATIVES, output=_ANYTHING),
    )
    found: TokenLogprob | None = None
    async with aclosing(engine.generate(request)) as events:
        async for event in events:
            if isinstance(event, ErrorEvent):
                raise event.error
            if isinstance(event, TokenEvent):
                found = event.logprob
    assert found is not None
    return found


def compare(adapter: TokenLogprob, base: TokenLogprob) -> ProbeDivergence:
    """Return KL(adapter || base) over the tokens that both list as alternatives and one more for all the others.

    Joining tokens never raises the divergence (data processing inequality), so the result is a lower bound, and exact
    when both list every token.
    """
    p, q = ({score.token_id: score.logprob for score in one.top} for one in (adapter, base))
    shared = p.keys() & q.keys()
    kl = sum(math.exp(p[token]) * (p[token] - q[token]) for token in shared)
    p_rest, q_rest = (max(0.0, 1 - math.fsum(math.exp(one[token]) for token in shared)) for one in (p, q))
    if p_rest > 0 and q_rest > 0:
        kl += p_rest * math.log(p_rest / q_rest)
    return ProbeDivergence(
        prompt=PROBE_PROMPT,
        kl=max(0.0, kl),
        max_logprob_difference=max((abs(p[token] - q[token]) for token in shared), default=math.inf),
        num_tokens=len(shared),
    )
