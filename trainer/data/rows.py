"""Read JSON lines and turn each row into a question and its answer, before any model is loaded.

Every row is looked at and all faults are collected: a run that starts has no bad row. Knows files and recipes; does
not know tokens. Rows that bring their own prompts may have any of the formats in `_FORMATS`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapterhub.errors import DataError
from adapterhub.recipes import FieldSource, Recipe

__all__ = ["MAX_FAULTS_SHOWN", "Example", "Message", "ParsedRows", "read_examples"]

MAX_FAULTS_SHOWN = 10  # A screen; the total is always given.
Message = dict[str, str]  # {"role": system | user | assistant, "content": text}
_ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
_FORMATS = "{prompt, completion}, {messages}, {conversations} or {instruction, input, output}"


class _FaultError(Exception):
    """What is wrong with one row; becomes one line of the DataError."""


class _LeftOutError(Exception):
    """The row is fine, but the recipe does not want it."""


@dataclass(frozen=True, slots=True)
class Example:
    """One row: either prompt variables for the recipe's template, or messages of its own; and the answer.

    row_digest: sha256 of the row as read, the same under every recipe.
    """

    line: int
    variables: Mapping[str, str]
    messages: tuple[Message, ...]
    target: str
    group: str | None
    row_digest: str = ""


@dataclass(frozen=True, slots=True)
class ParsedRows:
    """The good rows of a file, and how many the recipe's patterns left out."""

    examples: tuple[Example, ...]
    num_rows: int
    num_left_out: int


def read_examples(path: Path, recipe: Recipe) -> ParsedRows:
    """Read every row of `path` as `recipe` says. Raises DataError with file:line of the faults."""
    examples: list[Example] = []
    faults: list[str] = []
    num_rows = num_left_out = 0
    for line, text in _lines(path):
        num_rows += 1
        try:
            examples.append(_example(line, _parse_json(text), recipe))
        except _LeftOutError:
            num_left_out += 1
        except _FaultError as fault:
            faults.append(f"{path}:{line}: {fault}")
    if num_rows == 0:
        raise DataError(f"{path} holds no rows.", f"Write one JSON object per line: {_FORMATS}.")
    if faults:
        shown = "\n  ".join(faults[:MAX_FAULTS_SHOWN])
        more = f"\n  ... and {len(faults) - MAX_FAULTS_SHOWN} more" if len(faults) > MAX_FAULTS_SHOWN else ""
        raise DataError(
            f"{len(faults)} of {num_rows} rows are wrong:\n  {shown}{more}\n",
            "Correct or remove them; nothing was trained.",
        )
    if not examples:
        raise DataError(
            f"The patterns of the recipe leave none of the {num_rows} rows of {path}.", "Check `fields.*.pattern`."
        )
    return ParsedRows(tuple(examples), num_rows, num_left_out)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, text) of the lines that are not blank."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            for line, text in enumerate(file, start=1):
                if text.strip():
                    yield line, text
    except FileNotFoundError as exc:
        raise DataError(f"There is no data file {str(path)!r}.", "Give the path of a file of JSON lines.") from exc
    except IsADirectoryError as exc:
        raise DataError(f"{str(path)!r} is a folder.", "Give the path of a file of JSON lines.") from exc
    except UnicodeDecodeError as exc:
        raise DataError(f"{path} is not UTF-8 text: {exc}.", "Convert it, for example with `iconv -t utf-8`.") from exc
    except OSError as exc:
        raise DataError(f"{path} cannot be read: {exc.strerror}.", "Check the path and its permissions.") from exc


def _parse_json(text: str) -> dict[str, Any]:
    try:
        row = json.loads(text)
    except json.JSONDecodeError as exc:
        raise _FaultError(f"malformed JSON, {exc.msg} at column {exc.colno}") from exc
    except ValueError as exc:  # Python refuses to convert integers beyond sys.get_int_max_str_digits().
        raise _FaultError("a number with too many digits") from exc
    except RecursionError as exc:
        raise _FaultError("nested too deeply") from exc
    if not isinstance(row, dict):
        raise _FaultError(f"a row must be a JSON object, found {_kind(row)}")
    return row


def _digest(row: Mapping[str, Any]) -> str:
    """sha256 of a row, whatever the order of its keys."""
    try:
        return hashlib.sha256(json.dumps(row, ensure_ascii=False, sort_keys=True).encode()).hexdigest()
    except UnicodeEncodeError as exc:  # JSON can escape half of a surrogate pair; no tokenizer takes it.
        half = exc.object[exc.start : exc.end]
        raise _FaultError(f"half of a surrogate pair, {half!r}, which is no character") from exc
    except RecursionError as exc:
        raise _FaultError("nested too deeply") from exc


def _kind(value: object) -> str:
    names = {type(None): "null", bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list"}
    return names.get(type(value), "an object")


def _example(line: int, row: dict[str, Any], recipe: Recipe) -> Example:
    digest = _digest(row)
    group = None if recipe.split.group is None else _scalar(row, recipe.split.group)
    if recipe.prompt.template is None:
        messages, target = _free_form(row)
        return Example(line, {}, messages, _answer(target, "completion"), group, digest)
    variables = {name: _value(row, name, source) for name, source in recipe.fields.items()}
    if not recipe.prompt.template.format_map(variables).strip():
        raise _FaultError("the prompt is empty")
    target = str(recipe.target).format_map(variables)
    return Example(line, variables, (), _answer(target, "target"), group, digest)


def _answer(target: str, name: str) -> str:
    if not target.strip():
        raise _FaultError(f"the {name} is empty")
    return target.strip()


def _column(row: Mapping[str, Any], column: str) -> Any:
    if column not in row:
        raise _FaultError(f"column {column!r} is missing; the row has: {', '.join(row) or 'nothing'}")
    return row[column]


def _scalar(row: Mapping[str, Any], column: str) -> str:
    value = _column(row, column)
    if not isinstance(value, (str, int, float)):
        raise _FaultError(f"column {column!r} must be text or a number, found {_kind(value)}")
    return str(value)


def _value(row: Mapping[str, Any], name: str, source: FieldSource) -> str:
    text = _scalar(row, source.column).strip()
    if source.pattern is not None:
        match = re.search(source.pattern, text)
        if match is None:
            raise _LeftOutError
        text = match.group(1) if match.re.groups else match.group(0)
    if source.values is not None:
        if text not in source.values:
            allowed = ", ".join(sorted(source.values))
            raise _FaultError(f"column {source.column!r} has the value {text!r}; the recipe allows: {allowed}")
        text = source.values[text]
    if not text:
        raise _FaultError(f"column {source.column!r}, used as {name!r}, is empty")
    return text


def _free_form(row: Mapping[str, Any]) -> tuple[tuple[Message, ...], str]:
    """Read a row that brings its own prompt: (messages before the answer, answer)."""
    if "messages" in row:
        return _conversation(row["messages"], "messages", "role", "content")
    if "conversations" in row:
        return _conversation(row["conversations"], "conversations", "from", "value")
    if "instruction" in row:
        extra = _text(row, "input") if row.get("input") else ""
        prompt = _text(row, "instruction") + (f"\n\n{extra}" if extra else "")
        return ({"role": "user", "content": prompt},), _text(row, "output", is_answer=True)
    if "prompt" in row:
        prompt = row["prompt"]
        if isinstance(prompt, list):
            messages = tuple(_turn(turn, "prompt", "role", "content") for turn in prompt)
            _check_order(messages, "prompt")
            return messages, _text(row, "completion", is_answer=True)
        return ({"role": "user", "content": _text(row, "prompt")},), _text(row, "completion", is_answer=True)
    raise _FaultError(f"unknown row format with keys {', '.join(row) or 'none'}; allowed: {_FORMATS}")


def _text(row: Mapping[str, Any], column: str, *, is_answer: bool = False) -> str:
    value = _column(row, column)
    if not isinstance(value, str):
        raise _FaultError(f"{column!r} must be text, found {_kind(value)}")
    if not is_answer and not value.strip():
        raise _FaultError(f"{column!r} is empty")
    return value


def _conversation(turns: Any, name: str, role_key: str, text_key: str) -> tuple[tuple[Message, ...], str]:
    if not isinstance(turns, list) or len(turns) < 2:
        raise _FaultError(f"{name!r} must be a list of at least a question and an answer")
    messages = tuple(_turn(turn, name, role_key, text_key) for turn in turns)
    if messages[-1]["role"] != "assistant":
        raise _FaultError(f"{name!r} must end with an answer of the assistant, found role {messages[-1]['role']!r}")
    _check_order(messages[:-1], name)
    return messages[:-1], messages[-1]["content"]


def _turn(turn: Any, name: str, role_key: str, text_key: str) -> Message:
    if not isinstance(turn, dict) or not isinstance(turn.get(role_key), str) or not isinstance(turn.get(text_key), str):
        raise _FaultError(f"each turn of {name!r} must have {role_key!r} and {text_key!r} as text")
    role = _ROLES.get(turn[role_key])
    if role is None:
        raise _FaultError(f"role {turn[role_key]!r} in {name!r}; allowed: {', '.join(_ROLES)}")
    if not turn[text_key].strip():
        raise _FaultError(f"a turn of {name!r} with role {turn[role_key]!r} is empty")
    return {"role": role, "content": turn[text_key]}


def _check_order(messages: Sequence[Message], name: str) -> None:
    """System at most once and first; then user and assistant in turn, the last one the user."""
    roles = [message["role"] for message in messages]
    body = roles[1:] if roles[:1] == ["system"] else roles
    expected = ["user" if idx % 2 == 0 else "assistant" for idx in range(len(body))]
    if not body or body != expected or body[-1] != "user":
        raise _FaultError(
            f"roles in {name!r} must be [system,] user, assistant, user, ...; found {', '.join(roles) or 'none'}"
        )
