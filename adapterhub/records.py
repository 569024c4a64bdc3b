"""What a version remembers about itself: the manifest and its parts.

A manifest is canonical JSON; its sha256 is the identity of a version. It holds no wall-clock time of publishing, so
publishing the same content twice gives the same manifest.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = [
    "BaseRecord",
    "EffectReport",
    "EvaluationRecord",
    "Manifest",
    "Method",
    "MetricsPoint",
    "ModuleEffect",
    "ProbeDivergence",
    "TensorRecord",
    "TrainingRecord",
]


class Method(StrEnum):
    """The adapter methods; rsLoRA is `lora` with `use_rslora`."""

    LORA = "lora"  # https://arxiv.org/abs/2106.09685
    DORA = "dora"  # https://arxiv.org/abs/2402.09353
    IA3 = "ia3"  # https://arxiv.org/abs/2205.05638
    ADALORA = "adalora"  # https://arxiv.org/abs/2303.10512
    VERA = "vera"  # https://arxiv.org/abs/2310.11454

    @property
    def is_additive(self) -> bool:
        """Whether an adapter only adds to what a linear computes, so that weighted sums are defined."""
        return self not in (Method.DORA, Method.IA3)


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TensorRecord(_Record):
    """One tensor of the adapter file."""

    name: str
    dtype: str
    shape: tuple[int, ...]


class BaseRecord(_Record):
    """Which base the adapter belongs to."""

    name: str
    digest: str = Field(description="sha256 over weights, quantization, tokenizer and chat template.")
    quantization: str
    chat_template_digest: str


class MetricsPoint(_Record):
    """One line of the training curve."""

    step: int
    loss: float
    learning_rate: float
    tokens_per_s: float
    eval_loss: float | None = None


class TrainingRecord(_Record):
    """How the adapter came to be; enough to repeat the run."""

    code_revision: str = Field(
        description="git revision with `-dirty` when files were changed, or the package version."
    )
    recipe: dict[str, Any] = Field(description="The resolved recipe, every default filled in.")
    data_digests: dict[str, str] = Field(description="sha256 of each data file.")
    token_digest: str = Field(description="sha256 over token ids and labels of the training rows, in order.")
    seed: int
    packages: dict[str, str]
    hardware: dict[str, str]
    wall_time_s: float
    num_train_tokens: int
    num_trainable_parameters: int
    metrics: tuple[MetricsPoint, ...]
    parents: tuple[str, ...] = Field((), description="Serving digests of the versions this one started from.")


class EvaluationRecord(_Record):
    """Adapter against base on the same held-out rows."""

    metric: str
    num_rows: int
    base_score: float
    adapter_score: float
    difference: float = Field(description="Mean of adapter minus base, row by row.")
    interval_low: float
    interval_high: float
    confidence: float = 0.95
    p_value: float | None = Field(None, description="Exact two-sided McNemar test; only for scores of 0 and 1.")
    num_base_unfinished: int = Field(0, description="Answers of the base that ran into the limit of new tokens.")
    num_adapter_unfinished: int = Field(0, description="The same for the adapter.")
    seed: int
    data_digest: str


class ModuleEffect(_Record):
    """What an adapter does to one linear of the base."""

    rank: int = Field(description="0 for IA3, which has none.")
    scale: float | None = Field(description="Factor on B A; None where vectors take its place (IA3, VeRA).")
    relative_size: float = Field(description="Frobenius norm of the change over that of the base weight.")


class ProbeDivergence(_Record):
    """How far the next token after a fixed prompt moves away from the base's."""

    prompt: str
    kl: float = Field(description="KL(adapter || base) in nats; a lower bound where num_tokens is not the vocabulary.")
    max_logprob_difference: float
    num_tokens: int = Field(description="Tokens compared one by one; the others are compared as one.")


class EffectReport(_Record):
    """What an adapter does to its base, measured by the server that loaded it. Sizes are relative to the base."""

    method: Method
    modules: dict[str, ModuleEffect] = Field(description="Every linear that is changed.")
    unmatched_targets: tuple[str, ...] = Field(description="Names in `target_modules` that no linear of the base has.")
    num_untouched: int = Field(description="Linears of the base that the configuration does not target.")
    num_pruned: int = Field(description="Targets that AdaLoRA has cut to rank 0.")
    max_relative_size: float
    median_relative_size: float
    total_relative_size: float = Field(description="Over all changed linears together.")
    probe: ProbeDivergence | None = None


class Manifest(_Record):
    """Everything a version is. Its canonical JSON is hashed to the manifest digest."""

    schema_version: Literal[1] = 1
    task: str
    method: Method
    rank: int | None
    alpha: float | None
    target_modules: tuple[str, ...]
    serving_digest: str
    base: BaseRecord
    files: dict[str, str] = Field(description="File name -> sha256 of the blob.")
    config: dict[str, Any] = Field(description="Normalised adapter configuration: what changes outputs, nothing else.")
    tensors: tuple[TensorRecord, ...]
    training: TrainingRecord | None = None
    evaluation: EvaluationRecord | None = None
    signatures: tuple[str, ...] = ()
