"""vLLM's CPU build through its engine's own step loop, in one process, with multi-LoRA.

Runs in the environment of `benchmarks.peers`. Source of the settings:
https://docs.vllm.ai/en/latest/getting_started/installation/cpu.html
"""

from __future__ import annotations

import os
import time
from importlib import metadata
from typing import Any

from benchmarks.systems.job import Job, Outcome, Request, RequestTimes
from benchmarks.systems.memory import peak_mib, resident_mib

__all__ = ["run"]

_MAX_TOKENS = 1024  # Longest prompt plus answer; larger values only reserve memory.
_MAX_ROWS = 32  # Rows of one step, as in our own engine.


def run(job: Job) -> Outcome:
    """Answer the requests of `job` with every adapter resident."""
    began = time.perf_counter()
    os.environ |= {
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{job.threads - 1}",  # Else it leaves one core to its front end.
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB, the smallest.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_TARGET_DEVICE": "cpu",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    from vllm import LLM  # pyright: ignore[reportMissingImports]  # Only in the peer's environment.

    options: dict[str, Any] = {}
    if job.adapters:
        options = {
            "enable_lora": True,
            "max_loras": len(job.adapters),
            "max_lora_rank": max(8, *(adapter.rank for adapter in job.adapters)),
        }
    llm = LLM(
        model=job.copy_folder, dtype=job.compute, max_model_len=_MAX_TOKENS, max_num_seqs=_MAX_ROWS, seed=0, **options
    )
    engine: Any = llm.llm_engine
    plain = [Request(prompt_token_ids=one.prompt_token_ids, adapter=None) for one in job.warm_up]
    _answer_all(engine, job, plain, num_tokens=job.warm_up_tokens)
    base_mib = resident_mib()
    _answer_all(engine, job, list(job.warm_up), num_tokens=job.warm_up_tokens)
    loaded_mib = resident_mib()
    start = time.perf_counter()
    times = _answer_all(engine, job, list(job.requests), num_tokens=job.new_tokens, start=start)
    return Outcome(
        requests=times,
        total_s=time.perf_counter() - start,
        ready_s=start - began,
        base_mib=base_mib,
        loaded_mib=loaded_mib,
        peak_mib=peak_mib(),
        versions={name: metadata.version(name) for name in ("torch", "transformers", "vllm-cpu")},
    )


def _answer_all(
    engine: Any, job: Job, requests: list[Request], *, num_tokens: int, start: float = 0.0
) -> tuple[RequestTimes, ...]:
    """Answer all requests, at most `job.concurrency` at once."""
    waiting = list(reversed(list(enumerate(requests))))
    sent: dict[str, float] = {}
    first: dict[str, float] = {}
    done: dict[str, RequestTimes] = {}
    while len(done) < len(requests):
        while waiting and len(sent) - len(done) < job.concurrency:
            idx, request = waiting.pop()
            sent[str(idx)] = time.perf_counter()
            _add(engine, str(idx), request, job, num_tokens=num_tokens)
        for output in engine.step():
            now = time.perf_counter()
            token_ids = output.outputs[0].token_ids
            if token_ids:
                first.setdefault(output.request_id, now)
            if output.finished:
                done[output.request_id] = RequestTimes(
                    sent_s=sent[output.request_id] - start,
                    first_s=first[output.request_id] - start,
                    last_s=now - start,
                    num_tokens=len(token_ids),
                    token_ids=tuple(token_ids),
                )
    return tuple(done[str(idx)] for idx in range(len(requests)))


def _add(engine: Any, request_id: str, request: Request, job: Job, *, num_tokens: int) -> None:
    from vllm import SamplingParams  # pyright: ignore[reportMissingImports]
    from vllm.inputs import TokensPrompt  # pyright: ignore[reportMissingImports]
    from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]

    lora = None
    if request.adapter is not None:
        adapter = job.adapters[request.adapter]
        lora = LoRARequest(adapter.name, request.adapter + 1, adapter.folder)
    engine.add_request(
        request_id,
        TokensPrompt(prompt_token_ids=list(request.prompt_token_ids)),
        SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True),
        lora_request=lora,
    )
