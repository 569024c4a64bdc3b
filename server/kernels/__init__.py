"""Kernels that apply adapters to the rows of a step: one signature, a slow oracle, and fast implementations."""

from server.kernels.base import Kernel, Member, Segments, SlotWeights
from server.kernels.dispatch import KERNELS, pick_kernel

__all__ = ["KERNELS", "Kernel", "Member", "Segments", "SlotWeights", "pick_kernel"]
