"""Attention that reads keys and values where they lie equals attention over a copy of them, and float64."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from server.engine.attention import AttentionStep, HeadShape, PagedKV, RowSpan
from tests.support.native import require_library

BLOCK_TOKENS = 4
CPU = torch.device("cpu")
LENGTHS = (1, 2, 4, 5, 8, 9, 17, 40)


@pytest.fixture(autouse=True)
def _compiled() -> Iterator[None]:
    require_library()
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@dataclass(frozen=True)
class History:
    """Rows of different lengths: queries (heads * group, n, dim), keys and values (heads, n, dim) of every position."""

    queries: list[Tensor]
    keys: list[Tensor]
    values: list[Tensor]

    @property
    def lengths(self) -> list[int]:
        return [key.shape[1] for key in self.keys]

    def at(self, spans: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor, Tensor]:
        """Join the positions [start, end) of every row, (1, heads, T, dim) laid out token by token as in a model."""
        joined: list[Tensor] = []
        for rows in (self.queries, self.keys, self.values):
            parts = [row[:, start:end] for row, (start, end) in zip(rows, spans, strict=True)]
            joined.append(torch.cat(parts, dim=1).transpose(0, 1).contiguous().transpose(0, 1)[None])
        query, key, value = joined
        return query, key, value

    def pick(self, order: Sequence[int]) -> History:
        return History(*([rows[idx] for idx in order] for rows in (self.queries, self.keys, self.values)))


def build_history(
    lengths: Sequence[int],
    *,
    heads: int = 2,
    group: int = 3,
    dim: int = 16,
    value_dim: int | None = None,
    seed: int = 0,
) -> History:
    torch.manual_seed(seed)
    return History(
        [torch.randn(heads * group, length, dim) for length in lengths],
        [torch.randn(heads, length, dim) for length in lengths],
        [torch.randn(heads, length, value_dim or dim) for length in lengths],
    )


def build_kv(history: History, num_blocks: int) -> PagedKV:
    key, value = history.keys[0], history.values[0]
    shape = HeadShape(key.shape[0], key.shape[2], value.shape[2])
    return PagedKV([shape], num_blocks=num_blocks, block_tokens=BLOCK_TOKENS, device=CPU)


def deal_blocks(history: History, *, seed: int = 0) -> tuple[list[tuple[int, ...]], int]:
    """Give every row blocks from all over the pool; return them and the size of the pool."""
    needed = [-(-length // BLOCK_TOKENS) for length in history.lengths]
    shuffled = torch.randperm(sum(needed), generator=torch.Generator().manual_seed(seed)).tolist()
    ends = torch.tensor(needed).cumsum(0).tolist()
    return [tuple(shuffled[end - count : end]) for end, count in zip(ends, needed, strict=True)], sum(needed)


def run(
    kv: PagedKV,
    history: History,
    blocks: Sequence[tuple[int, ...]],
    spans: Sequence[tuple[int, int]],
    *,
    window: int | None = None,
    scale: float = 0.25,
    softcap: float | None = None,
) -> Tensor:
    """Run one step over the positions [start, end) of every row; return (T, query heads, value dim)."""
    rows: list[RowSpan] = []
    for (start, end), owned in zip(spans, blocks, strict=True):
        rows.append(RowSpan(sum(row.num_tokens for row in rows), end - start, start, owned))
    terms = {"scale": scale, "window": window, "softcap": softcap}
    return AttentionStep(kv, rows).run(0, *history.at(spans), **terms)[0]


def decode_last(history: History, *, seed: int = 0, **terms) -> Tensor:
    """Store all positions but the last of every row, then run one step with the last of each."""
    blocks, num_blocks = deal_blocks(history, seed=seed)
    kv = build_kv(history, num_blocks)
    long = [idx for idx, length in enumerate(history.lengths) if length > 1]
    if long:
        spans = [(0, history.lengths[idx] - 1) for idx in long]
        run(kv, history.pick(long), [blocks[idx] for idx in long], spans, **terms)
    return run(kv, history, blocks, [(length - 1, length) for length in history.lengths], **terms)


def exact_last(
    history: History, *, window: int | None = None, scale: float = 0.25, softcap: float | None = None
) -> Tensor:
    """softmax(scale * q k) v at the last position of every row, in float64; (rows, query heads, value dim)."""
    rows: list[Tensor] = []
    for queries, keys, values in zip(history.queries, history.keys, history.values, strict=True):
        first = 0 if window is None else max(0, keys.shape[1] - window)
        group = queries.shape[0] // keys.shape[0]
        key, value = (one[:, first:].double().repeat_interleave(group, dim=0) for one in (keys, values))
        scores = torch.einsum("hd,hnd->hn", queries[:, -1].double(), key) * scale
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        rows.append(torch.einsum("hn,hnd->hd", scores.softmax(dim=1), value))
    return torch.stack(rows)


@pytest.mark.parametrize("window", [None, 1, 5, 100])
@pytest.mark.parametrize(("dim", "value_dim"), [(16, 16), (24, 24), (64, 64), (80, 80), (5, 3), (16, 130)])
@pytest.mark.parametrize(("heads", "group"), [(1, 1), (2, 3), (1, 4), (3, 5), (1, 9)])
def test_rows_of_any_length_attend_as_float64_does(
    dim: int, value_dim: int, heads: int, group: int, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    history = build_history(LENGTHS, heads=heads, group=group, dim=dim, value_dim=value_dim)
    found = decode_last(history, window=window)
    assert (found - exact_last(history, window=window)).abs().max() < 2e-6
    monkeypatch.setattr("server.engine.paged_kv.find_library", lambda: None)
    assert (found - decode_last(history, window=window)).abs().max() < 2e-6


@pytest.mark.parametrize("softcap", [0.5, 30.0])
def test_scores_are_capped_as_float64_does(softcap: float, monkeypatch: pytest.MonkeyPatch) -> None:
    history = build_history(LENGTHS, heads=2, group=3, dim=16)
    found = decode_last(history, scale=2.0, softcap=softcap)
    assert (found - exact_last(history, scale=2.0, softcap=softcap)).abs().max() < 2e-6
    assert (found - exact_last(history, scale=2.0)).abs().max() > 1e-3
    monkeypatch.setattr("server.engine.paged_kv.find_library", lambda: None)
    assert (found - decode_last(history, scale=2.0, softcap=softcap)).abs().max() < 2e-6


def test_decoding_beside_prompts_gives_both_what_they_get_alone() -> None:
    history = build_history((9, 12, 6))
    blocks, num_blocks = deal_blocks(history)
    kv = build_kv(history, num_blocks)
    run(kv, history, blocks, [(0, 8), (0, 5), (0, 5)])
    found = run(kv, history, blocks, [(8, 9), (5, 12), (5, 6)])
    assert (found[[0, 7, 8]] - exact_last(history)).abs().max() < 2e-6


@pytest.mark.parametrize("layout", ["heads outside", "a slice of a fused projection", "dims apart"])
def test_queries_may_lie_in_any_order(layout: str) -> None:
    history = build_history((7,))
    blocks, num_blocks = deal_blocks(history)
    kv = build_kv(history, num_blocks)
    run(kv, history, blocks, [(0, 6)])
    query, key, value = history.at([(6, 7)])
    match layout:
        case "heads outside":
            laid = query.contiguous()
        case "a slice of a fused projection":
            laid = torch.cat([query, query + 1], dim=3)[..., :16]
        case _:
            laid = query.transpose(1, 3).contiguous().transpose(1, 3)
    step = AttentionStep(kv, [RowSpan(0, 1, 6, blocks[0])])
    found = step.run(0, laid, key, value, scale=0.25, window=None, softcap=None)[0]
    assert (found - exact_last(history)).abs().max() < 2e-6


@pytest.mark.parametrize("shift", [-30000.0, 0.0, 30000.0])
def test_scores_may_be_huge(shift: float) -> None:
    """Whole numbers, so that float32 holds every score exactly and only the softmax can go wrong."""
    history = build_history((40, 3))
    for rows in (history.queries, history.keys):
        for row in rows:
            row.copy_(row.mul(4).round())
    for row in history.queries:
        row[..., 0] = shift
    for row in history.keys:
        row[..., 0] = 1
    for scale in (0.0625, 1.0, 64.0):
        assert (decode_last(history, scale=scale) - exact_last(history, scale=scale)).abs().max() < 2e-6


def test_weights_are_those_of_softmax_to_the_last_digits() -> None:
    """With the unit vectors as values, the output is the weights; scores fall to where float32 ends."""
    num_positions = 512
    history = build_history((num_positions,), heads=1, group=1, value_dim=num_positions)
    history.queries[0].zero_()[..., 0] = 1
    history.keys[0].zero_()[0, :, 0] = -torch.linspace(0, 86, num_positions)
    history.values[0].copy_(torch.eye(num_positions))
    found, wanted = decode_last(history, scale=1.0)[0, 0], exact_last(history, scale=1.0)[0, 0]
    assert ((found - wanted).abs() / wanted).max() < 1e-6
    history.keys[0][0, ::2, 0] = -1e30
    found, wanted = decode_last(history, scale=1.0)[0, 0], exact_last(history, scale=1.0)[0, 0]
    assert (found - wanted).abs().max() < 1e-7


def test_a_block_keeps_nothing_of_its_last_owner() -> None:
    history = build_history((9, 6))
    blocks, num_blocks = deal_blocks(history)
    kv = build_kv(history, num_blocks)
    spoiled = History(*([torch.full_like(row, float("nan")) for row in rows] for rows in vars(history).values()))
    for spans in ([(0, 8), (0, 5)], [(8, 9), (5, 6)]):
        run(kv, spoiled, blocks, spans)
    heirs = blocks[::-1]  # Each row gets blocks of the other; the last one is filled in part.
    short = History(*([row[:, :6] for row in rows] for rows in vars(history).values()))
    heirs = [owned[:2] for owned in heirs]
    run(kv, short, heirs, [(0, 5), (0, 5)])
    found = run(kv, short, heirs, [(5, 6), (5, 6)])
    assert (found - exact_last(short)).abs().max() < 2e-6


def test_a_row_of_nan_spoils_no_other() -> None:
    history = build_history((9, 5, 1))
    clean = decode_last(history)
    history.keys[1][1, 2] = float("nan")
    found = decode_last(history)
    assert torch.equal(found[[0, 2]], clean[[0, 2]])
    assert found[1, 3:].isnan().all()
    assert torch.equal(found[1, :3], clean[1, :3])


def test_rows_may_read_the_same_blocks() -> None:
    """Two rows that begin alike share their full blocks and own the rest."""
    history = build_history((6, 11))
    for rows in (history.keys, history.values):
        rows[1][:, :4] = rows[0][:, :4]
    kv = build_kv(history, 4)
    blocks = [(2, 0), (2, 3, 1)]
    run(kv, history.pick([0]), blocks[:1], [(0, 5)])
    run(kv, history.pick([1]), blocks[1:], [(4, 10)])
    found = run(kv, history, blocks, [(5, 6), (10, 11)])
    assert (found - exact_last(history)).abs().max() < 2e-6


@pytest.mark.parametrize("num_threads", [1, 2])
def test_a_row_gets_the_same_bits_in_every_batch_and_wherever_its_blocks_lie(num_threads: int) -> None:
    history = build_history(LENGTHS, heads=2, group=5, dim=24)
    whole = decode_last(history)
    torch.set_num_threads(num_threads)
    for seed in range(4):
        order = torch.randperm(len(LENGTHS), generator=torch.Generator().manual_seed(seed)).tolist()[: 2 + 2 * seed]
        assert torch.equal(decode_last(history.pick(order), seed=seed), whole[order])


@pytest.mark.parametrize("num_threads", [1, 2])
def test_long_rows_with_many_query_heads_per_key_head_need_no_stack(num_threads: int) -> None:
    """40 heads over 60,000 positions are 9 MiB of scores; the stack of a thread is 8."""
    torch.set_num_threads(num_threads)
    num_positions, block_tokens = 60_000, 16
    kv = PagedKV(
        [HeadShape(1, 16, 16)], num_blocks=num_positions // block_tokens, block_tokens=block_tokens, device=CPU
    )
    history = build_history((num_positions,), heads=1, group=40)
    places = torch.arange(num_positions)
    _, key, value = history.at([(0, num_positions)])
    kv.write_(0, places, key, value, begun=places[::block_tokens] // block_tokens)
    found = run(kv, history, [tuple(range(kv.num_blocks))], [(num_positions - 1, num_positions)])
    assert (found - exact_last(history)).abs().max() < 2e-6
