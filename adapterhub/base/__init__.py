"""The frozen base model: identity, catalogue, loading, chat prompts."""

from adapterhub.base.identity import Base, describe_base

__all__ = ["Base", "describe_base"]
