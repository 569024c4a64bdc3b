"""Turn examples into token ids and labels, and prove that the labels are right.

The prompt is rendered by `adapterhub.base.prompts`, the same functions the server calls. The answer is tokenized on its
own, because that is where generation starts, and ends with the stop token of the chat template. Only the answer has
labels.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from adapterhub.base.prompts import chat_token_ids, stop_token_ids, text_token_ids
from adapterhub.errors import DataError
from adapterhub.recipes import Recipe
from trainer.data.rows import Example, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["IGNORED", "TokenRow", "answer_stop_token", "encode", "masked_sample", "rows_digest"]

IGNORED = -100  # The label that torch's cross entropy leaves out.
_SENTINEL = "adapterhubanswer"


@dataclass(frozen=True, slots=True)
class TokenRow:
    """One row ready to train on or to ask.

    prompt_ids end where the answer starts; answer_ids end with the stop token. row_digest: see `Example`.
    """

    line: int
    messages: tuple[Message, ...]
    target: str
    group: str | None
    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    row_digest: str = ""

    @property
    def prompt_text(self) -> str:
        """The messages as plain text, to compare rows by."""
        return "\n".join(f"{message['role']}: {message['content']}" for message in self.messages)

    @property
    def input_ids(self) -> list[int]:
        """Prompt and answer."""
        return [*self.prompt_ids, *self.answer_ids]

    @property
    def labels(self) -> list[int]:
        """One label per input id: the token itself in the answer, IGNORED in the prompt."""
        return [IGNORED] * len(self.prompt_ids) + list(self.answer_ids)


def answer_stop_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the token that the chat template writes after an answer, or else the end-of-sequence token."""
    stops = stop_token_ids(tokenizer)
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": "."}, {"role": "assistant", "content": _SENTINEL}]
        text = str(tokenizer.apply_chat_template(turns, tokenize=False))
        after = text_token_ids(tokenizer, text.rpartition(_SENTINEL)[2])
        if after and after[0] in stops:
            return after[0]
    eos: Any = tokenizer.eos_token_id
    if eos is None:
        raise DataError("The tokenizer of this base has no end-of-sequence token.", "Set `eos_token` in its config.")
    return int(eos)


def _truncate(tokenizer: PreTrainedTokenizerBase, text: str, limit: int) -> str:
    """Keep the first `limit` tokens of text, cut at a character the tokenizer also cuts at."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    offsets = encoded["offset_mapping"]
    return text if len(offsets) <= limit else text[: offsets[limit - 1][1]].rstrip()


def _messages(example: Example, recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> list[Message]:
    if recipe.prompt.template is None:
        messages = list(example.messages)
    else:
        variables = dict(example.variables)
        for name, limit in recipe.prompt.truncate.items():
            variables[name] = _truncate(tokenizer, variables[name], limit)
        messages = [{"role": "user", "content": recipe.prompt.template.format_map(variables)}]
    if recipe.prompt.system is not None and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": recipe.prompt.system})
    return messages


def _prompt_ids(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    if tokenizer.chat_template:
        return chat_token_ids(tokenizer, messages)
    return text_token_ids(tokenizer, "\n".join(message["content"] for message in messages) + "\n")


def _is_wanted(example: Example, recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> bool:
    def within(limits: Mapping[str, int], sign: int) -> bool:
        return all(
            sign * len(text_token_ids(tokenizer, example.variables[name])) <= sign * limit
            for name, limit in limits.items()
        )

    return within(recipe.filter.max_tokens, 1) and within(recipe.filter.min_tokens, -1)


def encode(
    examples: Sequence[Example], recipe: Recipe, tokenizer: PreTrainedTokenizerBase
) -> Iterator[TokenRow | None]:
    """Yield a TokenRow per example, or None for one that the filter or `training.max_length` leaves out."""
    stop = answer_stop_token(tokenizer)
    for example in examples:
        if not _is_wanted(example, recipe, tokenizer):
            yield None
            continue
        messages = _messages(example, recipe, tokenizer)
        prompt_ids = _prompt_ids(tokenizer, messages)
        answer_ids = [*text_token_ids(tokenizer, example.target), stop]
        if len(prompt_ids) + len(answer_ids) > recipe.training.max_length:
            yield None
            continue
        yield TokenRow(
            line=example.line,
            messages=tuple(messages),
            target=example.target,
            group=example.group,
            prompt_ids=tuple(prompt_ids),
            answer_ids=tuple(answer_ids),
            row_digest=example.row_digest,
        )


def masked_sample(row: TokenRow, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """Decode one row as (prompt, which has no labels; answer, which has) for people to check."""
    labelled = [token for token in row.labels if token != IGNORED]
    return str(tokenizer.decode(list(row.prompt_ids))), str(tokenizer.decode(labelled))


def rows_digest(rows: Sequence[TokenRow]) -> str:
    """sha256 over token ids and labels of the rows, in order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps([row.input_ids, row.labels], separators=(",", ":")).encode())
    return digest.hexdigest()
