"""Turn tokens into text one at a time: whole characters only, and nothing that may turn out to be a stop string.

Knows a tokenizer's `decode` and no tensors. The texts of one answer, joined, equal the decoded answer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Protocol

__all__ = ["Detokenizer", "StopFilter", "TokenTexts", "Tokenizer"]

_UNKNOWN = "\N{REPLACEMENT CHARACTER}"
# A UTF-8 character has at most four bytes, so at most three of them can be waiting for the rest.
_MAX_PENDING_BYTES = 3
# A space in the alphabet of byte-level tokenizers, and in SentencePiece's (https://arxiv.org/abs/1808.06226).
_BYTE_SPACE = "\N{LATIN CAPITAL LETTER G WITH DOT ABOVE}"
_PIECE_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that turns tokens into text."""

    def decode(
        self, token_ids: Sequence[int], *, skip_special_tokens: bool = ..., clean_up_tokenization_spaces: bool = ...
    ) -> str:
        """Join tokens to text; bytes that are no characters become U+FFFD."""
        ...

    def convert_ids_to_tokens(self, ids: int) -> str | None:
        """Return the vocabulary entry of a token, in the tokenizer's own alphabet, or None for a hole in it."""
        ...

    def get_vocab(self) -> dict[str, int]:
        """Return every vocabulary entry and its token."""
        ...


class Detokenizer:
    """Text of one answer, token by token. Special tokens have no text. num_characters: length of what was returned."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        # Tokens since the last two points where the text was made of whole characters. The tokens before the last point
        # are decoded again as context, because some tokenizers strip a space from the first token they see.
        self._window: list[int] = []
        self._num_context = 0
        self._num_shown = 0
        self.num_characters = 0

    def add(self, token_id: int) -> str:
        """Return the text that is certain now that `token_id` is known."""
        self._window.append(token_id)
        text = self._text(self._window)
        num_certain = len(text) - _num_pending(text)
        new = text[self._num_shown : num_certain]
        self._num_shown = max(self._num_shown, num_certain)
        if num_certain == len(text):
            self._window = self._window[self._num_context :]
            self._num_context = len(self._window)
            self._num_shown = len(self._text(self._window))
        self.num_characters += len(new)
        return new

    def flush(self) -> str:
        """Return what is left when no token follows: U+FFFD for half a character."""
        rest = self._text(self._window)[self._num_shown :]
        self._num_shown += len(rest)
        self.num_characters += len(rest)
        return rest

    def _text(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _num_pending(text: str) -> int:
    """How many characters at the end may still become another character."""
    return min(len(text) - len(text.rstrip(_UNKNOWN)), _MAX_PENDING_BYTES)


class StopFilter:
    """Cuts text exactly before the first stop string and holds back what may begin one."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""
        self.is_stopped = False

    def add(self, text: str) -> str:
        """Return the text that is certain to belong to the answer; sets `is_stopped` when a stop string is complete."""
        if self.is_stopped:
            return ""
        text = self._held + text
        # The one that is complete first ends the answer, so that the cut does not depend on how text came in tokens.
        hits = [(idx + len(stop), idx) for stop in self._stop if (idx := text.find(stop)) >= 0]
        if hits:
            self.is_stopped, self._held = True, ""
            return text[: min(hits)[1]]
        num_held = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]

    def flush(self) -> str:
        """Return what was held back when no text follows."""
        rest, self._held = self._held, ""
        return rest


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


def _byte_alphabet() -> dict[str, int]:
    """The letters byte-level tokenizers write bytes with: printable bytes as they are, the others from U+0100 upwards.

    Source: GPT-2 (https://github.com/openai/gpt-2, MIT), `bytes_to_unicode`; restated from its definition.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + idx): byte for idx, byte in enumerate(others)}


class TokenTexts:
    """Bytes and text of single tokens, for log probabilities. num_tokens: the highest token plus one."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        vocabulary = tokenizer.get_vocab()
        self.num_tokens = 1 + max(vocabulary.values())
        # Each kind of vocabulary has its own sign for a space as an entry. Some byte-level ones lack letters of rare
        # bytes, and others hold the letters as characters of their own.
        is_byte_level = _BYTE_SPACE in vocabulary and _PIECE_SPACE not in vocabulary
        self._alphabet = _byte_alphabet() if is_byte_level else None

    def raw(self, token_id: int) -> bytes:
        """Bytes of a token, which may be a part of a character; none for a hole in the vocabulary."""
        piece = self._tokenizer.convert_ids_to_tokens(token_id)
        if piece is None:
            return b""
        if self._alphabet is not None:
            if all(letter in self._alphabet for letter in piece):
                return bytes(self._alphabet[letter] for letter in piece)
            return piece.encode()
        byte = _BYTE_PIECE.fullmatch(piece)
        return bytes([int(byte[1], 16)]) if byte else piece.replace(_PIECE_SPACE, " ").encode()

    def text(self, token_id: int) -> str:
        """Text of a token; half a character becomes U+FFFD."""
        return self.raw(token_id).decode("utf-8", errors="replace")
