"""Text comes out in whole characters, and never contains a stop string or half of one."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from adapterhub.base import Base
from adapterhub.base.loading import load_tokenizer
from server.engine.detokenize import Detokenizer, StopFilter, TokenTexts
from tests.support.tiny_models import byte_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture(scope="module")
def real_tokenizer(real_base: Base):
    return load_tokenizer(real_base)


# Characters of one to four bytes, marks that join with the character before, sequences that are drawn as one sign,
# other scripts, spaces of all kinds, and what looks like half a character.
PIECES = [
    "a",
    " ",
    "  ",
    "\n",
    "\t",
    "é",
    "e\u0301",
    "ก็",
    "한국",
    "漢字",
    "👩\u200d👩\u200d👧",
    "🇩🇪",
    "👍🏽",
    "\ufffd",
    "\u00a0",
    "ﷺ",
]
texts = st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=6)), max_size=12).map("".join)


def _stream(tokenizer, token_ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [*(detokenizer.add(token_id) for token_id in token_ids), detokenizer.flush()]


def _encode(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_a_character_of_several_tokens_appears_when_it_is_whole(tokenizer) -> None:
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.add(token_id) for token_id in _encode(tokenizer, "aé€😀b")]
    assert pieces == ["a", "", "é", "", "", "€", "", "", "", "😀", "b"]
    assert detokenizer.flush() == ""


def test_half_a_character_at_the_end_becomes_a_replacement_character(tokenizer) -> None:
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.add(token_id) for token_id in _encode(tokenizer, "x😀")[:-1]]
    assert "".join(pieces) == "x"
    assert detokenizer.flush() == "\ufffd"


def test_special_tokens_have_no_text(tokenizer) -> None:
    detokenizer = Detokenizer(tokenizer)
    assert [detokenizer.add(token_id) for token_id in (tokenizer.eos_token_id, *_encode(tokenizer, "hi"))] == [
        "",
        "h",
        "i",
    ]


@given(data=st.lists(st.one_of(st.integers(0, 258), st.sampled_from(list("é😀 a\n".encode()))), max_size=60))
def test_joined_pieces_equal_the_decoded_answer_for_any_tokens(tokenizer, data: list[int]) -> None:
    detokenizer = Detokenizer(tokenizer)
    text = "".join(detokenizer.add(token_id) for token_id in data) + detokenizer.flush()
    assert text == tokenizer.decode(data, skip_special_tokens=True)


@given(text=texts)
def test_no_piece_ever_holds_a_part_of_a_character(tokenizer, text: str) -> None:
    pieces = _stream(tokenizer, _encode(tokenizer, text))
    assert "".join(pieces) == text
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


@pytest.mark.real_base
@given(text=texts)
def test_text_through_the_embedded_base_never_splits_a_character(real_tokenizer, text: str) -> None:
    token_ids = _encode(real_tokenizer, text)
    decoded = real_tokenizer.decode(token_ids)  # Its vocabulary lacks some bytes, so a few characters are lost.
    pieces = _stream(real_tokenizer, token_ids)
    assert "".join(pieces) == decoded
    assert "\ufffd" in decoded or not any("\ufffd" in piece for piece in pieces)


@pytest.mark.real_base
def test_many_scripts_pass_through_the_embedded_base_unchanged(real_tokenizer) -> None:
    text = " ".join(PIECES)
    token_ids, names = _encode(real_tokenizer, text), TokenTexts(real_tokenizer)
    assert "".join(_stream(real_tokenizer, token_ids)) == text
    assert b"".join(names.raw(token_id) for token_id in token_ids) == text.encode()


@pytest.mark.real_base
@given(data=st.lists(st.integers(0, 49151), max_size=30))
def test_joined_pieces_equal_the_decoded_answer_for_any_tokens_of_the_embedded_base(real_tokenizer, data) -> None:
    assert "".join(_stream(real_tokenizer, data)) == real_tokenizer.decode(data, skip_special_tokens=True)


@given(text=texts)
def test_every_token_is_named_by_its_own_bytes_and_they_join_to_the_text(tokenizer, text: str) -> None:
    names = TokenTexts(tokenizer)
    assert b"".join(names.raw(token_id) for token_id in _encode(tokenizer, text)) == text.encode()


def test_a_stop_string_across_tokens_is_cut_exactly() -> None:
    stop = StopFilter(("###", "END"))
    pieces = [stop.add(text) for text in ("ab#", "#c", "#", "#", "#d")]
    assert pieces == ["ab", "##c", "", "", ""]
    assert stop.is_stopped
    assert stop.flush() == ""


def test_text_that_may_begin_a_stop_string_is_released_at_the_end() -> None:
    stop = StopFilter(("\n\n",))
    assert [stop.add("one\n"), stop.add("two\n")] == ["one", "\ntwo"]
    assert stop.flush() == "\n"
    assert not stop.is_stopped


def test_the_stop_string_that_is_complete_first_wins() -> None:
    stop = StopFilter(("cd", "bc"))
    assert stop.add("abcde") == "a"
    assert stop.add("more") == ""


@given(
    text=st.text("ab", max_size=30),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
    cuts=st.lists(st.integers(0, 30), max_size=6),
)
def test_cutting_the_text_into_tokens_changes_nothing(text: str, stops: list[str], cuts: list[int]) -> None:
    bounds = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    stop = StopFilter(stops)
    answer = "".join(stop.add(text[a:b]) for a, b in itertools.pairwise(bounds)) + stop.flush()
    # Whichever stop string is complete first ends the answer; of two that end together the longer one.
    ends = [(idx + len(s), idx) for s in stops if (idx := text.find(s)) >= 0]
    assert answer == (text[: min(ends)[1]] if ends else text)
    assert stop.is_stopped == bool(ends)


def test_token_bytes_are_exact_even_for_parts_of_characters(tokenizer) -> None:
    texts = TokenTexts(tokenizer)
    ids = _encode(tokenizer, "é ")
    assert b"".join(texts.raw(token_id) for token_id in ids) == "é ".encode()
    assert texts.text(ids[0]) == "\ufffd"
    assert texts.text(tokenizer.eos_token_id) == "<|im_end|>"
