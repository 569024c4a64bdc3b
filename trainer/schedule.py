"""How the learning rate goes up and down.

Own code because the usual schedules start at zero, which wastes the first step: 3 percent of a run of 30.
"""

from __future__ import annotations

import math

from adapterhub.recipes import Training

__all__ = ["learning_rate_factor"]


def learning_rate_factor(step: int, training: Training) -> float:
    """Factor on the learning rate at `step`, counted from 0; above 0 at every step of the run.

    Rises linearly over the warm-up to 1, then stays, or falls linearly or as half a cosine towards 0 at the end.
    """
    num_warmup = math.ceil(training.warmup * training.max_steps)
    if step < num_warmup:
        return (step + 1) / (num_warmup + 1)
    done = (step - num_warmup) / max(1, training.max_steps - num_warmup)
    match training.schedule:
        case "constant":
            return 1.0
        case "linear":
            return max(0.0, 1 - done)
        case "cosine":
            return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
