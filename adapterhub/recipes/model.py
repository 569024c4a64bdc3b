"""What a recipe may say: every key with its type, bounds and default; and how keys are changed for one run.

Unknown keys are refused. Knows types and YAML values; reads no files. Learning rates that a recipe leaves out come from
the method profiles in `trainer/methods`.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from adapterhub.errors import RecipeError, suggest
from adapterhub.records import Method

__all__ = [
    "METHOD_KEYS",
    "DataSource",
    "FieldSource",
    "Filter",
    "Gate",
    "Generation",
    "Prompt",
    "Recipe",
    "Split",
    "Training",
    "TrainingChanges",
    "is_task_name",
    "parse_recipe",
]

_TASK_PATTERN = re.compile(r"[a-z][a-z0-9_-]{0,62}\Z")
_Seed = Annotated[int, Field(ge=0, lt=2**32)]  # What the generators of numpy take.
_Tokens = Annotated[int, Field(ge=1)]
# Keys that `--set` must not touch, because they would change nothing or only a name: key -> what to do.
_FIXED_KEYS = {
    "method": "Use `--method`.",
    "methods": "Change `training`, which holds what the method got.",
    "task": "Use `--task`.",
}
METHOD_KEYS = ("alpha", "learning_rate", "rank", "rank_stabilized", "weight_decay")


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class DataSource(_Model):
    """Where the rows come from: exactly one of `asset`, `file` and `hub`."""

    asset: str | None = Field(
        default=None, description="Name in the asset catalogue, fetched and checked on first use."
    )
    file: Path | None = Field(
        default=None, description="JSON lines; a relative path starts at the folder of the recipe."
    )
    hub: str | None = Field(default=None, description="Data set id on the Hugging Face hub.")
    config: str | None = Field(default=None, description="Configuration of the hub data set.")
    split: str = Field(default="train", description="Split of the hub data set.")

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        given = [name for name in ("asset", "file", "hub") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of asset, file, hub; found {', '.join(given) or 'none'}")
        return self


class FieldSource(_Model):
    """One prompt variable, read from a column."""

    column: str = Field(min_length=1)
    pattern: str | None = Field(
        default=None, description="Rows that do not match are left out; group 1, if any, is the value."
    )
    values: dict[str, str] | None = Field(
        default=None, description="Replacement of each raw value; other values are faults."
    )

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str | None) -> str | None:
        if pattern is not None:
            try:
                re.compile(pattern)
            except re.error as exc:
                raise ValueError(f"not a regular expression: {exc}") from exc
        return pattern

    @field_validator("values", mode="before")
    @classmethod
    def _names_are_text(cls, values: Any) -> Any:
        # YAML reads True, yes and 1 as other types than text; data columns are compared as text.
        return {str(key): value for key, value in values.items()} if isinstance(values, dict) else values


class Filter(_Model):
    """Rows to leave out before the split, by tokens of the base's tokenizer."""

    max_tokens: dict[str, _Tokens] = Field(default={}, description="Prompt variable -> most tokens its text may have.")
    min_tokens: dict[str, _Tokens] = Field(
        default={}, description="Prompt variable -> fewest tokens its text may have."
    )


class Split(_Model):
    """Which rows train and which are held out. Rows with equal normalised prompt or equal group stay together."""

    seed: _Seed = 0
    train: int | None = Field(default=None, ge=1, description="Most training rows; null means all that are left.")
    eval: int | None = Field(default=None, ge=2, description="Held-out rows; null means `eval_fraction` of the rows.")
    eval_fraction: float = Field(default=0.1, gt=0, lt=1)
    group: str | None = Field(default=None, description="Column whose equal values never cross the split.")
    deduplicate: bool = Field(default=True, description="Keep one row of those with equal prompt and target.")


class Prompt(_Model):
    """How a row becomes a question; the chat template of the base is put around it."""

    template: str | None = Field(
        default=None, description="Text with {variables}; null when the rows bring their own prompts."
    )
    system: str | None = Field(default=None, description="System message; null leaves it to the chat template.")
    truncate: dict[str, _Tokens] = Field(
        default={}, description="Prompt variable -> keep this many tokens from its start."
    )


class Training(_Model):
    """Budget and shape of a run. Null means: take the value of the method profile."""

    max_steps: int = Field(default=60, ge=1)
    batch_size: int = Field(default=8, ge=1)
    learning_rate: float | None = Field(default=None, gt=0)
    warmup: float = Field(default=0.1, ge=0, lt=1, description="Share of the steps with a rising learning rate.")
    schedule: Literal["linear", "cosine", "constant"] = "cosine"
    seed: _Seed = 0
    max_length: int = Field(
        default=512, ge=8, description="Most tokens of a row; longer rows are left out and counted."
    )
    rank: int | None = Field(default=None, ge=1, le=512)
    alpha: float | None = Field(default=None, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    rank_stabilized: bool = Field(
        default=False, description="rsLoRA, https://arxiv.org/abs/2312.03732; LoRA and DoRA only."
    )
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    weight_decay: float | None = Field(default=None, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)


class TrainingChanges(_Model):
    """What one method does differently from `training`; same keys, nothing required."""

    max_steps: int | None = Field(default=None, ge=1)
    batch_size: int | None = Field(default=None, ge=1)
    learning_rate: float | None = Field(default=None, gt=0)
    warmup: float | None = Field(default=None, ge=0, lt=1)
    schedule: Literal["linear", "cosine", "constant"] | None = None
    seed: _Seed | None = None
    max_length: int | None = Field(default=None, ge=8)
    rank: int | None = Field(default=None, ge=1, le=512)
    alpha: float | None = Field(default=None, gt=0)
    dropout: float | None = Field(default=None, ge=0, lt=1)
    rank_stabilized: bool | None = None
    target_modules: Literal["all-linear"] | tuple[str, ...] | None = None
    weight_decay: float | None = Field(default=None, ge=0)
    max_grad_norm: float | None = Field(default=None, gt=0)


class Generation(_Model):
    """How answers are produced for measuring: greedy, until a stop token, a stop text or the limit."""

    max_new_tokens: int = Field(default=64, ge=1)
    stop: tuple[str, ...] = Field(default=(), description="Texts that end an answer; they are cut off.")
    batch_size: int = Field(default=16, ge=1)


class Gate(_Model):
    """An adapter is published only when the interval of its gain over the base lies above `min_gain`."""

    min_gain: float = 0.0
    num_rows: int = Field(default=96, ge=2, description="Held-out rows to measure on, at most.")
    confidence: float = Field(default=0.95, gt=0, lt=1)


class Recipe(_Model):
    """Everything that defines a task."""

    task: str
    description: str = ""
    data: DataSource
    fields: dict[str, FieldSource] = Field(
        default={}, description="Prompt variable -> column, or column with pattern and values."
    )
    filter: Filter = Filter()
    split: Split = Split()
    prompt: Prompt = Prompt()
    target: str | None = Field(
        default=None, description="Template of the answer, such as {summary}; null with free prompts."
    )
    method: Method = Method.LORA
    methods: dict[Method, TrainingChanges] = Field(
        default={}, description="What a method does differently from `training`."
    )
    training: Training = Training()
    generation: Generation = Generation()
    metric: Literal["rouge_l", "accuracy", "number"] = "rouge_l"
    labels: tuple[str, ...] = Field(default=(), description="The allowed answers of metric `accuracy`.")
    gate: Gate = Gate()

    @field_validator("task")
    @classmethod
    def _task_is_a_name(cls, task: str) -> str:
        if not is_task_name(task):
            raise ValueError("a task is a lower-case letter, then at most 62 of a-z 0-9 _ -")
        return task

    @field_validator("fields", mode="before")
    @classmethod
    def _column_alone(cls, fields: Any) -> Any:
        if isinstance(fields, dict):
            return {key: {"column": value} if isinstance(value, str) else value for key, value in fields.items()}
        return fields

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if (self.prompt.template is None) != (self.target is None):
            raise ValueError("prompt.template and target go together: give both, or neither for rows with prompts")
        if self.prompt.template is None and self.fields:
            raise ValueError("fields need prompt.template and target")
        used = {*_variables(self.prompt.template), *_variables(self.target)}
        for name in sorted({*used, *self.prompt.truncate, *self.filter.max_tokens, *self.filter.min_tokens}):
            if name not in self.fields:
                hint = suggest(name, self.fields, otherwise=f"fields has: {', '.join(self.fields) or 'none'}.")
                raise ValueError(f"variable {name!r} is not among fields. {hint}")
        if (self.metric == "accuracy") != bool(self.labels):
            raise ValueError("metric accuracy needs labels, and labels need metric accuracy")
        return self

    def resolve(self, *, method: Method | None = None, changes: Mapping[str, str] | None = None) -> Recipe:
        """Return the recipe for one run: method chosen, its overrides merged, then `changes` applied.

        METHOD_KEYS of `training` were chosen for the recipe's own method; another method starts without them.
        changes: dotted key -> YAML text, such as {"training.rank": "8"}. Raises RecipeError naming unknown keys.
        """
        raw = self.model_dump(mode="json")
        chosen = method or self.method
        overrides = self.methods.get(chosen, TrainingChanges()).model_dump(mode="json", exclude_none=True)
        fresh = {} if chosen == self.method else Training().model_dump(mode="json", include=set(METHOD_KEYS))
        raw.update(method=str(chosen), methods={}, training=raw["training"] | fresh | overrides)
        for key, text in (changes or {}).items():
            _put(raw, key, text)
        return parse_recipe(raw, where="--set" if changes else f"recipe {self.task}")


def is_task_name(name: str) -> bool:
    """Whether a task may be called `name`."""
    return _TASK_PATTERN.match(name) is not None


def _variables(template: str | None) -> Iterator[str]:
    try:
        parts = list(string.Formatter().parse(template or ""))
    except ValueError as exc:
        raise ValueError(f"template {template!r} does not parse: {exc}; write {{{{ and }}}} for braces") from exc
    for _, name, spec, conversion in parts:
        if name is None:
            continue
        if not name.isidentifier() or spec or conversion:
            raise ValueError(
                f"template {template!r}: {{{name}}} is not a plain variable; write {{{{ and }}}} for braces"
            )
        yield name


def _put(raw: dict[str, Any], key: str, text: str) -> None:
    if key in _FIXED_KEYS:
        raise RecipeError(f"--set cannot change {key!r}.", _FIXED_KEYS[key])
    *parents, last = key.split(".")
    node: Any = raw
    for part in parents:
        node = node.get(part) if isinstance(node, dict) else None
    if not isinstance(node, dict) or (last not in node and not _is_open(parents)):
        known = list(_dotted(Recipe))
        tails = {name.rpartition(".")[2]: name for name in known}
        near = f"Did you mean {tails[key]!r}?" if key in tails else suggest(key, known, otherwise="")
        raise RecipeError(f"Unknown recipe key {key!r}.", near or f"Allowed: {', '.join(known)}.")
    try:
        node[last] = yaml.safe_load(text)
    except yaml.YAMLError as exc:
        raise RecipeError(f"The value of {key!r} is not YAML: {text!r}.", "Quote it as in a YAML file.") from exc


def _is_open(parents: list[str]) -> bool:
    """Whether keys under this path are names of the user's choosing."""
    return parents in (["fields"], ["prompt", "truncate"], ["filter", "max_tokens"], ["filter", "min_tokens"])


def _dotted(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, info in model.model_fields.items():
        kind = info.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from _dotted(kind, f"{prefix}{name}.")
        else:
            yield prefix + name


def parse_recipe(raw: object, *, where: str) -> Recipe:
    """Check a recipe that was read from `where`. Raises RecipeError naming each wrong key and the choices."""
    try:
        return Recipe.model_validate(raw)
    except ValidationError as exc:
        faults = [_fault(error) for error in exc.errors()]
        what = "; ".join(fault for fault, _ in faults)
        raise RecipeError(f"{where}: {what}" + ("" if what.endswith(("?", ".")) else "."), faults[0][1]) from exc


def _fault(error: Mapping[str, Any]) -> tuple[str, str]:
    """One pydantic error as (what, hint)."""
    path = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        known = [name.rpartition(".")[0] for name in _dotted(Recipe)] + list(_dotted(Recipe))
        siblings = _siblings(error["loc"][:-1])
        hint = suggest(str(error["loc"][-1]), siblings or known, otherwise=f"Allowed here: {', '.join(siblings)}.")
        return f"unknown key {path!r}", hint
    message = str(error["msg"]).removeprefix("Value error, ")
    if not path:
        return message, "Correct the recipe."
    if error["type"] == "missing":
        return f"key {path!r} is missing", "Add it to the recipe."
    return f"{path} is {error['input']!r}: {message}", "Correct the value of this key."


def _siblings(path: tuple[str | int, ...]) -> list[str]:
    """The keys allowed in the model that lies at `path`."""
    model: type[BaseModel] = Recipe
    for part in path:
        if part == "fields":
            model = FieldSource
        elif part == "methods":
            model = TrainingChanges
        elif str(part) in model.model_fields:
            kind = model.model_fields[str(part)].annotation
            model = kind if isinstance(kind, type) and issubclass(kind, BaseModel) else model
    return list(model.model_fields)
