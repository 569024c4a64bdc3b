"""Root-mean-square norms of the base in one compiled call instead of eight small operations.

A norm is replaced only where the compiled formula gives the numbers of the original on a probe. Knows modules of
transformers; no adapters, slots or steps. Source: https://arxiv.org/abs/1910.07467, section 4.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from server.kernels.native import Library

__all__ = ["CompiledNorm", "replace_norms_"]

_TOLERANCE = 1e-5  # Of values near one, float32: an order of sums may differ, a formula may not.


class CompiledNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, in float32."""

    def __init__(self, weight: Tensor, epsilon: float, library: Library) -> None:
        super().__init__()
        self._weight = weight.contiguous()
        self._epsilon = epsilon
        self._library = library

    def forward(self, x: Tensor) -> Tensor:
        """Return the norm of x (..., H) float32."""
        x = x.contiguous()
        y = torch.empty_like(x)
        self._run(y, 0, x, 0)
        return y

    def add(self, x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        """Return x + delta and its norm; x, delta: (..., H) float32, contiguous."""
        total, y = torch.empty_like(x), torch.empty_like(x)
        self._run(y, total.data_ptr(), x, delta.data_ptr())
        return total, y

    def _run(self, y: Tensor, total: int, x: Tensor, delta: int) -> None:
        width = x.shape[-1]
        pointers = (y.data_ptr(), total, x.data_ptr(), delta, self._weight.data_ptr())
        self._library.rms_norm(*pointers, x.numel() // width, width, self._epsilon, self._library.num_threads)


@torch.inference_mode()
def replace_norms_(model: nn.Module, library: Library) -> int:
    """Replace the norms of `model` in place, and return how many."""
    num_replaced = 0
    for name, module in list(model.named_modules()):
        if not type(module).__name__.endswith("RMSNorm"):
            continue
        norm = _find_equal(module, library)
        if norm is not None:
            model.set_submodule(name, norm)
            num_replaced += 1
    return num_replaced


def _find_equal(module: nn.Module, library: Library) -> CompiledNorm | None:
    """Return the compiled norm that computes what `module` does, or None; some models store the weight minus one."""
    weight = getattr(module, "weight", None)
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(weight, Tensor) or not isinstance(epsilon, float) or weight.dim() != 1:
        return None
    weight = weight.detach().to(torch.float32)
    probe = torch.linspace(-2, 3, 3 * weight.shape[0]).view(3, -1) * torch.tensor([[1.0], [1e-3], [30.0]])
    expected = module(probe)
    for candidate in (weight, weight + 1):
        norm = CompiledNorm(candidate, epsilon, library)
        if torch.allclose(norm(probe), expected, rtol=_TOLERANCE, atol=_TOLERANCE):
            return norm
    return None
