"""Turn messages into token ids.

Training, evaluation and serving call the same functions, so their prompts cannot differ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

from adapterhub.errors import RequestError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["chat_token_ids", "stop_token_ids", "text_token_ids"]


def chat_token_ids(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Render messages with the base's chat template, ready for the assistant to answer. Raises RequestError."""
    if not tokenizer.chat_template:
        raise RequestError("This base has no chat template.", "Use `/v1/completions` or a plain prompt instead.")
    try:
        text = tokenizer.apply_chat_template([dict(m) for m in messages], tokenize=False, add_generation_prompt=True)
    except Exception as exc:  # Templates are programs and may raise anything.
        raise RequestError(f"The chat template refused the messages: {exc}.", "Check roles and their order.") from exc
    return text_token_ids(tokenizer, str(text))


def text_token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokenize text as it stands; nothing is added."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def stop_token_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Tokens that end an answer: the end-of-sequence token and, where the vocabulary has them, end-of-turn tokens."""
    names = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "<|endoftext|>")
    vocabulary = tokenizer.get_vocab()
    found = {vocabulary[name] for name in names if name in vocabulary}
    if tokenizer.eos_token_id is not None:
        found.add(cast("int", tokenizer.eos_token_id))
    return tuple(sorted(found))
