"""What a row gets, to the last bit, does not depend on the other rows of the step."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server.kernels import Segments, load_kernel
from tests.support.kernel_cases import CPU_KERNELS, Case, build_case, run_cases

KINDS = [
    [("lora", 16), ("lora", 8)],
    [("lora", 5), ("lora", 1)],
    [("vera", 0), ("vera", 0)],
    [("vera", 0), ("none", 0)],
    [("dora", 3), ("everything", 64)],
    [("gated", 33), ("ia3-output", 0)],
]


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"], scope="module", autouse=True)
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def step(segments: Sequence[tuple[int, int]], *, seed: int) -> Case:
    return build_case(KINDS, segments, num_in=192, widths=(96, 64), seed=seed)


def pick_tokens(case: Case, tokens: list[int], segments: Sequence[tuple[int, int]]) -> Case:
    assert case.gates is not None
    cut = Segments(tuple(owner for owner, _ in segments), tuple(size for _, size in segments))
    return replace(case, x=case.x[tokens], y=case.y[tokens], gates=case.gates[tokens], segments=cut)


def tokens_of_segments(case: Case) -> list[list[int]]:
    ends = [sum(case.segments.sizes_tokens[: idx + 1]) for idx in range(len(case.segments.sizes_tokens))]
    return [list(range(end - size, end)) for end, size in zip(ends, case.segments.sizes_tokens, strict=True)]


sizes = st.one_of(st.integers(0, 7), st.sampled_from([13, 16, 18]))
segment_lists = st.lists(st.tuples(st.integers(-1, len(KINDS) - 1), sizes), min_size=1, max_size=9)


@pytest.mark.parametrize("name", CPU_KERNELS)
@settings(max_examples=40, deadline=None)
@given(segments=segment_lists, seed=st.integers(0, 2**16))
def test_permuting_segments_and_their_rows_permutes_the_result(name: str, segments, seed: int) -> None:
    case = step(segments, seed=seed)
    pairs = list(zip(segments, tokens_of_segments(case), strict=True))
    shuffle = random.Random(seed)
    shuffle.shuffle(pairs)
    for _, tokens in pairs:
        shuffle.shuffle(tokens)
    order = [token for _, tokens in pairs for token in tokens]
    permuted = pick_tokens(case, order, [segment for segment, _ in pairs])
    [(before, _)], [(after, _)] = run_cases(load_kernel(name), [case]), run_cases(load_kernel(name), [permuted])
    assert torch.equal(after, before[order])


@pytest.mark.parametrize("name", CPU_KERNELS)
@settings(max_examples=40, deadline=None)
@given(segments=segment_lists, seed=st.integers(0, 2**16))
def test_a_segment_gets_the_same_alone_and_among_others(name: str, segments, seed: int) -> None:
    case = step(segments, seed=seed)
    [(together, _)] = run_cases(load_kernel(name), [case])
    for segment, tokens in zip(segments, tokens_of_segments(case), strict=True):
        [(alone, _)] = run_cases(load_kernel(name), [pick_tokens(case, tokens, [segment])])
        assert torch.equal(alone, together[tokens])


@pytest.mark.parametrize("name", CPU_KERNELS)
def test_rows_of_the_base_are_not_touched(name: str) -> None:
    case = step([(-1, 2), (0, 3), (-1, 5), (4, 1), (-1, 1)], seed=0)
    [(found, _)] = run_cases(load_kernel(name), [case])
    base = [token for token, owner in enumerate(case.owners) if owner < 0]
    assert torch.equal(found[base], case.y[base])
