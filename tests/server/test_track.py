from __future__ import annotations

from typing import Any

import pytest

from server.engine.track import Track
from server.engine.types import FinishEvent
from tests.support.engines import TOKENIZER, request

_END = int(TOKENIZER.vocab["<|im_end|>"])


@pytest.mark.parametrize(("ignore_eos", "reason", "num_tokens"), [(False, "stop", 1), (True, "length", 3)])
def test_the_token_that_ends_an_answer_can_be_ignored(ignore_eos: bool, reason: str, num_tokens: int) -> None:
    tokenizer: Any = TOKENIZER
    track = Track(request("r", max_tokens=3, ignore_eos=ignore_eos), tokenizer, {_END})
    events = []
    while not events or not isinstance(events[-1], FinishEvent):
        events += track.accept(_END, None)
    assert isinstance(events[-1], FinishEvent)
    assert (events[-1].reason, events[-1].num_completion_tokens) == (reason, num_tokens)
