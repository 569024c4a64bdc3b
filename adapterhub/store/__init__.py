"""The adapter store: content-addressed files, a SQL catalogue, aliases that move by compare-and-swap, a chained log."""

from adapterhub.store.entries import Alias, LogEntry, Version
from adapterhub.store.names import check_task
from adapterhub.store.publish import PublishStep
from adapterhub.store.store import Store
from adapterhub.store.weights import Limits

__all__ = ["Alias", "Limits", "LogEntry", "PublishStep", "Store", "Version", "check_task"]
