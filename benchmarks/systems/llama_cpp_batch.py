"""llama.cpp on the bare base: prompts one by one, then one batch of all running sequences per step.

Runs in the environment of `benchmarks.peers`. Uses the C interface (https://github.com/ggml-org/llama.cpp, MIT) through
llama-cpp-python, because the Python class of that package knows one sequence at a time.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import llama_cpp  # pyright: ignore[reportMissingImports]  # Only in the peer's environment.
import numpy as np

from benchmarks.systems.job import Job, Outcome, Request, RequestTimes
from benchmarks.systems.memory import peak_mib, resident_mib

__all__ = ["run"]

_MAX_TOKENS = 512  # Longest prompt plus answer of one sequence.


def run(job: Job) -> Outcome:
    """Answer the requests of `job`, in waves of `concurrency`."""
    began = time.perf_counter()
    llama_cpp.llama_backend_init()
    decoder = _Decoder(job.gguf, num_sequences=job.concurrency, threads=job.threads)
    decoder.answer(job.warm_up[: job.concurrency], num_tokens=job.warm_up_tokens, start=0.0)
    resident = resident_mib()
    start = time.perf_counter()
    times: list[RequestTimes] = []
    for first in range(0, len(job.requests), job.concurrency):
        wave = job.requests[first : first + job.concurrency]
        times += decoder.answer(wave, num_tokens=job.new_tokens, start=start)
    return Outcome(
        requests=tuple(times),
        total_s=time.perf_counter() - start,
        ready_s=start - began,
        base_mib=resident,
        loaded_mib=resident,
        peak_mib=peak_mib(),
        versions={"llama-cpp-python": metadata.version("llama-cpp-python")},
    )


class _Decoder:
    """One context with room for `num_sequences` sequences at once."""

    def __init__(self, model_file: str, *, num_sequences: int, threads: int) -> None:
        self._model: Any = llama_cpp.llama_model_load_from_file(
            model_file.encode(), llama_cpp.llama_model_default_params()
        )
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = _MAX_TOKENS * num_sequences
        params.n_batch = params.n_ubatch = _MAX_TOKENS
        params.n_seq_max = num_sequences
        params.n_threads = params.n_threads_batch = threads
        params.no_perf = True
        self._context: Any = llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError(f"llama.cpp could not open {model_file!r}.")
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._batch: Any = llama_cpp.llama_batch_init(_MAX_TOKENS, 0, 1)

    def answer(self, requests: Sequence[Request], *, num_tokens: int, start: float) -> list[RequestTimes]:
        """Give every request exactly `num_tokens` greedy tokens."""
        sent = time.perf_counter() - start
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        answers: list[list[int]] = []
        first: list[float] = []
        for seq, request in enumerate(requests):
            prompt = request.prompt_token_ids
            rows = [(token, pos, seq, pos == len(prompt) - 1) for pos, token in enumerate(prompt)]
            answers.append(self._step(rows))
            first.append(time.perf_counter() - start)
        for step in range(num_tokens - 1):
            rows = [
                (answers[seq][-1], len(request.prompt_token_ids) + step, seq, True)
                for seq, request in enumerate(requests)
            ]
            for seq, token in enumerate(self._step(rows)):
                answers[seq].append(token)
        last = time.perf_counter() - start
        return [
            RequestTimes(sent_s=sent, first_s=begun, last_s=last, num_tokens=num_tokens, token_ids=tuple(answer))
            for begun, answer in zip(first, answers, strict=True)
        ]

    def _step(self, rows: Sequence[tuple[int, int, int, bool]]) -> list[int]:
        """Run rows of (token, position, sequence, is_wanted); return the likeliest next token of each wanted row."""
        batch = self._batch
        batch.n_tokens = len(rows)
        for idx, (token, position, sequence, is_wanted) in enumerate(rows):
            batch.token[idx], batch.pos[idx] = token, position
            batch.n_seq_id[idx], batch.seq_id[idx][0] = 1, sequence
            batch.logits[idx] = is_wanted
        if code := llama_cpp.llama_decode(self._context, batch):
            raise RuntimeError(f"llama.cpp stopped with code {code}.")
        tokens: list[int] = []
        for idx, (_, _, _, is_wanted) in enumerate(rows):
            if is_wanted:
                logits = llama_cpp.llama_get_logits_ith(self._context, idx)
                tokens.append(int(np.ctypeslib.as_array(logits, shape=(self._vocab_size,)).argmax()))
        return tokens
