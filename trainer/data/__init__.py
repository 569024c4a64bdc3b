"""Rows of a task: reading and checking, tokens and labels, split without leakage."""

from __future__ import annotations

from trainer.data.prepare import DataReport, PreparedData, data_file, prepare
from trainer.data.tokens import TokenRow

__all__ = ["DataReport", "PreparedData", "TokenRow", "data_file", "prepare"]
