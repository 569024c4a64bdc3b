"""Answers that must match a JSON schema or a regular expression: which tokens may come next.

The grammars are the library llguidance's (https://github.com/guidance-ai/llguidance, MIT): an Earley parser over a
lexer of regular-expression derivatives. Knows tokenizers and output rules; no logits, requests or HTTP.
"""

from __future__ import annotations

import asyncio
import re
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, assert_never

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.hf import from_tokenizer
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from adapterhub.errors import AdapterHubError, RequestError
from server.engine.types import OutputRule

__all__ = ["Grammars", "Matcher"]

_MAX_RULE_CHARS = 1 << 16  # A schema of this size with 5,000 enumerated values compiles in 60 ms.
_NUM_KEPT = 64  # Grammars; one takes up to some hundred kilobytes.
# Work on one regular expression at the start (the library counts about 50 per microsecond) and in one step: a rule
# that needs more is refused, because its masks would hold up the steps of every other request.
_LIMITS = {"initial_lexer_fuel": 200_000, "step_lexer_fuel": 200_000, "verbose_errors": False}
# Without a bound a model may write whitespace for ever. Enough for indented JSON eight levels deep.
_WHITESPACE = r"\n? {0,16}"
_NAMES = {"json_schema": "JSON schema", "json_object": "JSON object", "regex": "regular expression"}
_HINTS = {
    "json_schema": "Supported keywords: https://github.com/guidance-ai/llguidance/blob/main/docs/json_schema.md.",
    "json_object": "Ask for free text.",
    "regex": "Write it in Rust's syntax, without look-around and back-references: https://docs.rs/regex.",
}


class Matcher:
    """How far one answer has come within its grammar. Changes only with `accept`."""

    def __init__(self, inner: LLMatcher, num_tokens: int) -> None:
        self._inner = inner
        self._num_tokens = num_tokens

    def allowed(self) -> NDArray[np.bool_]:
        """Return which tokens may come next, (V,); stop tokens only where the answer may end.

        Raises AdapterHubError when no further token can be found within the limits.
        """
        packed = np.frombuffer(self._inner.compute_bitmask(), dtype=np.uint8)
        if self.problem:
            raise AdapterHubError(
                f"The answer cannot be continued within its output rule: {self.problem}.",
                "Simplify the schema or the regular expression.",
            )
        return np.unpackbits(packed, count=self._num_tokens, bitorder="little").view(np.bool_)

    def accept(self, token_id: int) -> None:
        """Record the next token of the answer. One that is not allowed makes the next `allowed` raise."""
        self._inner.consume_token(token_id)

    @property
    def problem(self) -> str:
        """Why no token can be allowed any more; empty while all is well."""
        return _reason(self._inner.get_error())

    @property
    def is_complete(self) -> bool:
        """Whether the answer is whole and nothing can follow."""
        return self._inner.is_stopped() and self._inner.is_accepting()

    def copy(self) -> Matcher:
        """Return one that goes its own way from here."""
        return Matcher(self._inner.deep_copy(), self._num_tokens)


class Grammars:
    """Compiles output rules for one tokenizer and keeps those used last.

    tokenizer: a fast transformers tokenizer; stop_ids: tokens that end an answer; num_tokens: V, the width of the
    masks. Built with the engine: it takes up to a second for a large vocabulary, and other threads stand still.
    """

    def __init__(self, tokenizer: Any, stop_ids: Sequence[int], *, num_tokens: int) -> None:
        self._tokenizer: LLTokenizer | None = None
        if isinstance(tokenizer, PreTrainedTokenizerFast) and stop_ids:
            self._tokenizer = from_tokenizer(tokenizer, n_vocab=num_tokens, eos_token=list(stop_ids))
        self._num_tokens = num_tokens
        # One thread: a rule is compiled once however many ask for it, and slow ones hold up nobody but their kind.
        self._thread = ThreadPoolExecutor(1, "grammar")
        self._kept: OrderedDict[OutputRule, Matcher | str] = OrderedDict()

    async def matcher(self, rule: OutputRule | None) -> Matcher | None:
        """Return a matcher at the beginning of an answer, compiled off the event loop; None for free text.

        Raises RequestError (param `output`) for a rule that is too long, does not parse, uses what the library does not
        support, or that nothing satisfies.
        """
        if rule is None:
            return None
        if len(rule.text) > _MAX_RULE_CHARS:
            reason = f"it has {len(rule.text)} characters, and at most {_MAX_RULE_CHARS} are allowed"
            raise _refusal(rule, reason)
        found = await asyncio.get_running_loop().run_in_executor(self._thread, self._find, rule)
        if isinstance(found, str):
            raise _refusal(rule, found)
        return found

    def _find(self, rule: OutputRule) -> Matcher | str:
        """Return a matcher of its own for one answer, or why there is none."""
        if rule not in self._kept:
            self._kept[rule] = self._compile(rule)
        self._kept.move_to_end(rule)
        if len(self._kept) > _NUM_KEPT:
            self._kept.popitem(last=False)
        found = self._kept[rule]
        return found if isinstance(found, str) else found.copy()

    def _compile(self, rule: OutputRule) -> Matcher | str:
        """Build the grammar, compute its first mask, and try one step of it."""
        if self._tokenizer is None:
            return "the tokenizer of this base does not tell the bytes of its tokens"
        try:
            grammar = _grammar(rule)
        except ValueError as exc:
            return _reason(str(exc))
        inner = LLMatcher(self._tokenizer, grammar, log_level=0, limits=LLParserLimits(**_LIMITS))
        matcher = Matcher(inner, self._num_tokens)
        return matcher.problem or _first_problem(matcher) or matcher


def _first_problem(matcher: Matcher) -> str:
    """Try the first step of a grammar: rules that nothing satisfies, or that are too complex, show it there."""
    probe = matcher.copy()
    try:
        probe.accept(int(probe.allowed().argmax()))
        if not probe.is_complete:
            probe.allowed()
    except AdapterHubError:
        return probe.problem
    return ""


def _grammar(rule: OutputRule) -> str:
    """Write a rule in the library's own form. Raises ValueError for a schema that is no JSON, or nested too deeply."""
    match rule.kind:
        case "regex":
            return LLMatcher.grammar_from_regex(rule.text)
        case "json_schema" | "json_object":
            text = rule.text if rule.kind == "json_schema" else '{"type": "object"}'
            options: Any = {"whitespace_flexible": True, "whitespace_pattern": _WHITESPACE, "lenient": False}
            return LLMatcher.grammar_from_json_schema(text, overrides=options)
        case _:
            assert_never(rule.kind)


def _refusal(rule: OutputRule, reason: str) -> RequestError:
    return RequestError(f"The {_NAMES[rule.kind]} cannot be used: {reason}.", _HINTS[rule.kind]).at("output")


def _reason(message: str) -> str:
    """Take the one sentence that says what is wrong out of the library's message."""
    if message.startswith("NoExtensionBias"):
        return "nothing satisfies it"
    if message.startswith("lexer error"):
        return "it is too complex"
    error = re.search(r"^error: (.+)$", message, re.MULTILINE)
    text = error[1] if error else message.partition("(in regex): ")[2] or message
    return text.strip().split("\n")[0].partition(". ")[0].rstrip(".")
