"""Run one step: the new tokens of many rows, each with its own adapter, through the base model once.

Computes and decides nothing: which rows, slots and blocks is the business of the scheduler. Owns the model, keys and
values, and the tensors of the slots. Every write to a slot raises the epoch, and a step planned for an older epoch is
refused, so that no row can run with the adapter of another row.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from adapterhub.base import Base
from adapterhub.errors import AdapterLoadError, BaseMismatchError, EngineStateError, UserInputError
from server.engine.attention import (
    ATTENTION_NAME,
    AttentionProbe,
    AttentionStep,
    register_paged_attention,
)
from server.engine.fused_layers import fuse_layers_
from server.engine.heap import release_freed
from server.engine.loader import LoadedAdapter, load_adapter
from server.engine.mix import load_mix
from server.engine.paged_kv import HeadShape, PagedKV, RowSpan
from server.kernels import Segments, pick_kernel
from server.kernels.native import find_library
from server.layers import wrap_linears
from server.norms import replace_norms_
from server.products import Compute, PackedHead, ProductBuilder, pick_products
from server.step_context import StepContext, step_context

__all__ = ["Runner", "StepRow"]

_log = logging.getLogger(__name__)

# Rotary embeddings whose frequencies depend on the longest row of the step: one row would change another.
_BATCH_DEPENDENT_ROPE = ("dynamic", "longrope")
# Kinds of layers whose mask the paged attention makes; the others change it by a mask that is never passed on.
_LAYER_TYPES = ("full_attention", "sliding_attention")


@dataclass(frozen=True, slots=True)
class StepRow:
    """What one sequence does in one step.

    token_ids: its new tokens, a piece of the prompt or the last generated token; start: position of the first of them;
    block_ids: its blocks from position 0 on, enough for the new tokens; those before `start` may be shared with other
    rows; slot: -1 for the base. gates: (T, L, K) float32 for the T new tokens, what each decoder layer gives to each
    expert of the slot; None for ones.
    """

    token_ids: tuple[int, ...]
    start: int
    block_ids: tuple[int, ...]
    slot: int
    gates: Tensor | None = None


class Runner:
    """A base model with `num_slots` places for adapters and `num_blocks` blocks for keys and values.

    model: as `load_model` returns it; its linears and its attention are replaced in place. kernel: a name in
    `server.kernels.KERNELS` or "auto". compute: see `server.products.pick_products`. Not safe for several threads.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        base: Base,
        *,
        num_slots: int,
        num_blocks: int,
        block_size: int = 16,
        kernel: str = "auto",
        compute: Compute = "float32",
    ) -> None:
        _refuse_batch_dependent_rope(model)
        _refuse_unknown_layers(model)
        self.model = model
        self.base = base
        self.num_slots = num_slots
        self.block_size = block_size
        self.vocab_size = int(model.config.get_text_config().vocab_size)
        self._num_layers = int(model.config.get_text_config().num_hidden_layers)
        self._device = model.device
        picked = pick_kernel(kernel, device=self._device.type)
        products = pick_products(compute, device=self._device.type)
        self._layers = wrap_linears(model, base.modules, num_slots=num_slots, kernel=picked, build_product=products)
        _pack_head_(model, products)
        self._library = find_library() if self._device.type == "cpu" else None
        if self._library is not None:
            self._library.num_threads = torch.get_num_threads()
            replace_norms_(model, self._library)
        self._prepared = threading.local()
        self._resident: list[LoadedAdapter | None] = [None] * num_slots
        self._epoch = 0
        register_paged_attention()
        model.set_attn_implementation(ATTENTION_NAME)
        shapes = self._discover_head_shapes()
        if self._library is not None:
            num_fused = fuse_layers_(model, self._library, compute=compute)
            _log.info("%d of %d decoder layers run fused", num_fused, self._num_layers)
        self._kv = PagedKV(shapes, num_blocks=num_blocks, block_tokens=block_size, device=self._device)
        release_freed()  # The weights as they were before they were packed.

    @property
    def epoch(self) -> int:
        """Number of slot writes so far."""
        return self._epoch

    @property
    def num_blocks(self) -> int:
        """Blocks for keys and values."""
        return self._kv.num_blocks

    def load_adapter(self, view: Path) -> LoadedAdapter:
        """Load the adapter of a view for this model; see `server.engine.loader.load_adapter`. Touches no slot."""
        return self._load(lambda: load_adapter(view, self.base, self.model))

    def load_mix(self, parts: Sequence[tuple[Path, float]]) -> LoadedAdapter:
        """Load the weighted sum of the adapters of several views; see `server.engine.mix.load_mix`. Touches no slot."""
        return self._load(lambda: load_mix(parts, self.base, self.model))

    def _load(self, load: Callable[[], LoadedAdapter]) -> LoadedAdapter:
        self._prepare_thread()
        try:
            return load()
        finally:
            release_freed()

    def write_slot(self, slot: int, adapter: LoadedAdapter) -> int:
        """Put an adapter into a slot and return the new epoch; whatever was there before is gone from every linear."""
        self._check_slot(slot)
        if adapter.base_digest != self.base.digest:
            raise BaseMismatchError(
                f"The adapter was loaded for base {adapter.base_digest!r}; this runner serves {self.base.digest!r}.",
                "Load it again for this base.",
            )
        unknown = sorted(set(adapter.modules) - set(self._layers))
        if unknown:
            raise AdapterLoadError(
                f"The adapter changes {len(unknown)} modules this runner does not have; the first is {unknown[0]!r}.",
                "Serve the base it was trained on.",
            )
        for name, layer in self._layers.items():
            layer.write_slot(slot, adapter.modules.get(name))
        self._resident[slot] = adapter
        self._epoch += 1
        return self._epoch

    def clear_slot(self, slot: int) -> int:
        """Empty a slot in every linear and return the new epoch."""
        self._check_slot(slot)
        for layer in self._layers.values():
            layer.write_slot(slot, None)
        self._resident[slot] = None
        self._epoch += 1
        return self._epoch

    @torch.inference_mode()
    def step(self, rows: Sequence[StepRow], *, epoch: int) -> Tensor:
        """Run the new tokens of every row; return the logits of each row's last token, (len(rows), V) float32.

        The result is an inference tensor: outside `torch.inference_mode` it can be read, not changed in place.
        Raises EngineStateError when `epoch` is not the current one or a row names a slot or block it cannot use.
        """
        if epoch != self._epoch:
            raise EngineStateError(
                f"The step was planned for slot epoch {epoch}, but the slots are at epoch {self._epoch}.",
                "Plan the step again with `Runner.epoch`.",
            )
        for row in rows:
            self._check_row(row)
        if not rows:
            return torch.empty(0, self.vocab_size)
        self._prepare_thread()
        order = sorted(range(len(rows)), key=lambda idx: rows[idx].slot)
        ordered = [rows[idx] for idx in order]
        ends = list(accumulate(len(row.token_ids) for row in ordered))
        spans = [
            RowSpan(end - len(row.token_ids), len(row.token_ids), row.start, row.block_ids)
            for row, end in zip(ordered, ends, strict=True)
        ]
        last = [0] * len(rows)
        for idx, end in zip(order, ends, strict=True):
            last[idx] = end - 1
        num_experts = max((self._num_experts(row.slot) for row in rows), default=0)
        context = StepContext(_segments(ordered), AttentionStep(self._kv, spans), _gates(ordered, num_experts))
        return self._forward(ordered, context, last=last)

    def _prepare_thread(self) -> None:
        """Let torch use one thread in the threads that run steps and load adapters.

        The products have threads of their own. Those of torch would make a step wait in the barrier of every small
        operation, and those of a load would take the processor from the steps.
        """
        if self._library is not None and not hasattr(self._prepared, "is_done"):
            self._prepared.is_done = True
            torch.set_num_threads(1)

    def _forward(self, rows: Sequence[StepRow], step: StepContext, *, last: Sequence[int]) -> Tensor:
        """Run the rows, sorted by slot, as one sequence (1, T); return the logits (len(last), V) at tokens `last`."""
        token_ids = [token for row in rows for token in row.token_ids]
        positions = [row.start + offset for row in rows for offset in range(len(row.token_ids))]
        with step_context(step):
            output: Any = self.model(
                input_ids=torch.tensor([token_ids], device=self._device),
                position_ids=torch.tensor([positions], device=self._device),
                use_cache=False,
                logits_to_keep=torch.tensor(last, device=self._device),
            )
        return output.logits[0].to(torch.float32)

    @torch.inference_mode()
    def _discover_head_shapes(self) -> list[HeadShape]:
        """Run one token without keys and values, and note what each attention layer would store."""
        probe = AttentionProbe()
        self._forward([StepRow((0,), 0, (), -1)], StepContext(None, probe), last=[0])
        if sorted(probe.shapes) != list(range(self._num_layers)):
            raise UserInputError(
                f"{type(self.model).__name__} attends in {len(probe.shapes)} of its {self._num_layers} layers.",
                "Serve a decoder model whose layers all use attention; recurrent layers have no paged state here.",
            )
        return [probe.shapes[idx] for idx in range(self._num_layers)]

    def _num_experts(self, slot: int) -> int:
        adapter = None if slot < 0 else self._resident[slot]
        return 0 if adapter is None else adapter.num_experts

    def _check_slot(self, slot: int) -> None:
        if not 0 <= slot < self.num_slots:
            raise EngineStateError(f"There is no slot {slot}.", f"Slots are 0 to {self.num_slots - 1}.")

    def _check_row(self, row: StepRow) -> None:
        if row.slot >= self.num_slots or row.slot < -1 or (row.slot >= 0 and self._resident[row.slot] is None):
            raise EngineStateError(
                f"A row uses slot {row.slot}, which holds no adapter.", "Write the slot first; -1 is the base."
            )
        needed = -(-(row.start + len(row.token_ids)) // self.block_size)
        if not row.token_ids or row.start < 0 or len(row.block_ids) < needed:
            raise EngineStateError(
                f"A row with {len(row.token_ids)} tokens from position {row.start} has {len(row.block_ids)} blocks.",
                f"It needs at least one token and {needed} blocks of {self.block_size} tokens.",
            )
        if row.gates is not None and row.gates.shape[:-1] != (len(row.token_ids), self._num_layers):
            raise EngineStateError(
                f"A row with {len(row.token_ids)} tokens has gates of shape {tuple(row.gates.shape)}.",
                f"Gates are (tokens, {self._num_layers} layers, experts).",
            )
        if min(row.block_ids) < 0 or max(row.block_ids) >= self.num_blocks:
            raise EngineStateError(f"A row uses blocks {row.block_ids}.", f"Blocks are 0 to {self.num_blocks - 1}.")


def _segments(rows: Sequence[StepRow]) -> Segments | None:
    """Cut rows that are sorted by slot into segments; None when all belong to the base."""
    sizes = [
        (slot, sum(len(row.token_ids) for row in group)) for slot, group in groupby(rows, key=lambda row: row.slot)
    ]
    if all(slot < 0 for slot, _ in sizes):
        return None
    return Segments(tuple(slot for slot, _ in sizes), tuple(size for _, size in sizes))


def _gates(rows: Sequence[StepRow], num_experts: int) -> Tensor | None:
    """Join the gates of all rows, (T, L, K) float32; rows without gates, and experts a row does not name, get ones.

    num_experts: the most experts of a slot of the step.
    """
    given = [row.gates for row in rows if row.gates is not None]
    if not given:
        return None
    widest = max(num_experts, *(gates.shape[2] for gates in given))
    num_tokens = sum(len(row.token_ids) for row in rows)
    joined = torch.ones(num_tokens, given[0].shape[1], widest, device=given[0].device)
    start = 0
    for row in rows:
        if row.gates is not None:
            joined[start : start + len(row.token_ids), :, : row.gates.shape[2]] = row.gates
        start += len(row.token_ids)
    return joined


def _pack_head_(model: PreTrainedModel, products: ProductBuilder) -> None:
    """Replace the linear that gives logits by one with a packed weight."""
    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if module is head and isinstance(module, nn.Linear):
            model.set_submodule(name, PackedHead(products([module])))


def _refuse_batch_dependent_rope(model: PreTrainedModel) -> None:
    config = model.config.get_text_config()
    parameters = getattr(config, "rope_parameters", None) or {}
    kinds = {parameters.get("rope_type")} | {
        entry.get("rope_type") for entry in parameters.values() if isinstance(entry, dict)
    }
    for kind in kinds & set(_BATCH_DEPENDENT_ROPE):
        raise UserInputError(
            f"The base rotates positions by {kind!r}, whose angles depend on the longest row of a batch.",
            "Serve a base with another rope type, such as 'default', 'linear', 'yarn' or 'llama3'.",
        )


def _refuse_unknown_layers(model: PreTrainedModel) -> None:
    found = getattr(model.config.get_text_config(), "layer_types", None) or ()
    for kind in sorted(set(found) - set(_LAYER_TYPES)):
        raise UserInputError(
            f"The base has layers of type {kind!r}, which this server does not compute.",
            f"Serve a base whose layers are all {' or '.join(repr(one) for one in _LAYER_TYPES)}.",
        )
