"""The OpenAI-compatible HTTP layer. Knows the engine's interface, the store and the base; no tensors."""

from server.http.adapters import AdapterNames
from server.http.app import create_app

__all__ = ["AdapterNames", "create_app"]
