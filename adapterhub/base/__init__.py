"""The frozen base model: identity, catalogue, loading, chat prompts."""

from adapterhub.base.identity import Base, describe_base, file_sha256

__all__ = ["Base", "describe_base", "file_sha256"]
