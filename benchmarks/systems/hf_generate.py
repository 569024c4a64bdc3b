"""transformers' `generate` on the bare base, and PEFT's `adapter_names` on several LoRA adapters.

All requests of a batch go in together, padded on the left, with a key-value cache; each wave of `concurrency` requests
ends before the next begins. Mixed batches: https://huggingface.co/docs/peft/developer_guides/lora (inference with
different adapters in the same batch), for which PEFT loops over the adapters in every linear.
"""

from __future__ import annotations

import time
import warnings
from importlib import metadata
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer

from benchmarks.systems.job import Job, Outcome, Request, RequestTimes
from benchmarks.systems.memory import peak_mib, resident_mib

__all__ = ["run"]

_PAD_ID = 0  # Masked, so any token serves.


class _Clock(BaseStreamer):
    """Notes when each token of a batch arrives; the first call brings the prompt."""

    def __init__(self) -> None:
        self.times_s: list[float] = []

    def put(self, value: torch.Tensor) -> None:  # noqa: ARG002
        """Note one step."""
        self.times_s.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left to note."""


def run(job: Job) -> Outcome:
    """Answer the requests of `job`, in PEFT's mixed batches when they name adapters."""
    began = time.perf_counter()
    torch.set_num_threads(job.threads)
    model: Any = AutoModelForCausalLM.from_pretrained(job.copy_folder, dtype=torch.float32, local_files_only=True)
    model.eval()
    _generate(model, [Request(prompt_token_ids=job.warm_up[0].prompt_token_ids, adapter=None)], num_tokens=2)
    base_mib = resident_mib()
    if job.adapters:
        model = _with_adapters(model, job)
    loaded_mib = resident_mib()
    _generate(model, list(job.warm_up[: job.concurrency]), num_tokens=job.warm_up_tokens)
    start = time.perf_counter()
    times: list[RequestTimes] = []
    for first in range(0, len(job.requests), job.concurrency):
        wave = list(job.requests[first : first + job.concurrency])
        times += _generate(model, wave, num_tokens=job.new_tokens, start=start)
    return Outcome(
        requests=tuple(times),
        total_s=time.perf_counter() - start,
        ready_s=start - began,
        base_mib=base_mib,
        loaded_mib=loaded_mib,
        peak_mib=peak_mib(),
        versions={name: metadata.version(name) for name in ("torch", "transformers", "peft")},
    )


def _with_adapters(model: Any, job: Job) -> Any:
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT reads attributes that transformers deprecates.
        wrapped = PeftModel.from_pretrained(model, job.adapters[0].folder, adapter_name="0")
        for idx, adapter in enumerate(job.adapters[1:], start=1):
            wrapped.load_adapter(adapter.folder, adapter_name=str(idx))
    return wrapped.eval()


def _generate(model: Any, requests: list[Request], *, num_tokens: int, start: float = 0.0) -> list[RequestTimes]:
    """Answer one batch greedily with exactly `num_tokens` tokens each."""
    longest = max(len(request.prompt_token_ids) for request in requests)
    ids = torch.full((len(requests), longest), _PAD_ID)
    mask = torch.zeros_like(ids)
    for row, request in enumerate(requests):
        ids[row, longest - len(request.prompt_token_ids) :] = torch.tensor(request.prompt_token_ids)
        mask[row, longest - len(request.prompt_token_ids) :] = 1
    options: dict[str, Any] = {"max_new_tokens": num_tokens, "do_sample": False, "pad_token_id": _PAD_ID}
    if any(request.adapter is not None for request in requests):
        options["adapter_names"] = [str(request.adapter) for request in requests]
    model.generation_config.eos_token_id = None
    clock = _Clock()
    sent = time.perf_counter()
    with torch.inference_mode():
        answers = model.generate(input_ids=ids, attention_mask=mask, streamer=clock, **options)
    steps = clock.times_s[1:]
    assert len(steps) == num_tokens, f"{len(steps)} steps instead of {num_tokens}"
    return [
        RequestTimes(
            sent_s=sent - start,
            first_s=steps[0] - start,
            last_s=steps[-1] - start,
            num_tokens=num_tokens,
            token_ids=tuple(answer[longest:].tolist()),
        )
        for answer in answers
    ]
