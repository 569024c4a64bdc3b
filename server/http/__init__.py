"""The OpenAI-compatible HTTP layer. Knows the engine's interface, the store and the base; no tensors."""

from server.http.app import create_app

__all__ = ["create_app"]
