"""Kernels that apply adapters to the rows of a step: one signature, a slow oracle, and fast implementations."""

from server.kernels.base import Kernel, Member, Segments, SlotWeights, by_columns
from server.kernels.dispatch import KERNELS, load_kernel, pick_kernel

__all__ = ["KERNELS", "Kernel", "Member", "Segments", "SlotWeights", "by_columns", "load_kernel", "pick_kernel"]
