"""Every error AdapterHub raises on purpose.

AdapterHubError
|- UserInputError                what the caller gave is wrong: exit code 2, HTTP 400
|  |- SettingsError              an environment variable or a configuration key
|  |- InvalidNameError           a task, version, alias or digest that does not parse
|  |- UnknownTaskError           no recipe of that name
|  |- UnknownMethodError         not one of the adapter methods
|  |- RecipeError                a recipe file or key
|  |- DataError                  a data file or row
|  |- AdapterConfigError         adapter_config.json asks for something we do not do
|  |- AdapterWeightsError        adapter_model.safetensors is malformed or unsafe
|  |- AdapterMismatchError       tensors and base model do not fit together
|  |- BaseMismatchError          the adapter was made for another base
|  |- AssetChecksumError         downloaded bytes are not the expected ones
|  |- RequestError               a field of an HTTP request
|  |  |- ContextTooLongError
|  |  `- UnsupportedFieldError
|  `- PortInUseError
|- NotFoundError                 exit code 2, HTTP 404
|  |- AdapterNotFoundError
|  |- AliasNotFoundError
|  |- BaseNotPulledError
|  `- UnknownAssetError
|- ConflictError                 the state moved on: exit code 1, HTTP 409
|- JobFailedError                a run ended badly: exit code 1, HTTP 500
|  |- QualityGateError
|  |- TrainingError
|  |- AssetFetchError
|  |- StoreCorruptError
|  |- AdapterLoadError           HTTP 503: published, but this server cannot load it
|  `- EngineStateError           the engine's plan does not fit its slots or blocks
`- OverloadedError               queue full or shutting down: exit code 1, HTTP 503
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable
from typing import ClassVar, Self

__all__ = [
    "AdapterConfigError",
    "AdapterHubError",
    "AdapterLoadError",
    "AdapterMismatchError",
    "AdapterNotFoundError",
    "AdapterWeightsError",
    "AliasNotFoundError",
    "AssetChecksumError",
    "AssetFetchError",
    "BaseMismatchError",
    "BaseNotPulledError",
    "ConflictError",
    "ContextTooLongError",
    "DataError",
    "EngineStateError",
    "InvalidNameError",
    "JobFailedError",
    "NotFoundError",
    "OverloadedError",
    "PortInUseError",
    "QualityGateError",
    "RecipeError",
    "RequestError",
    "SettingsError",
    "StoreCorruptError",
    "TrainingError",
    "UnknownAssetError",
    "UnknownMethodError",
    "UnknownTaskError",
    "UnsupportedFieldError",
    "UserInputError",
    "suggest",
]


def suggest(name: str, known: Collection[str], *, otherwise: str) -> str:
    """Say which known name is near `name`, or `otherwise` when none is."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"Did you mean {near[0]!r}?" if near else otherwise


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"


class AdapterHubError(Exception):
    """Base of every error raised on purpose. Holds two strings, so it pickles between workers.

    what: what happened, with the offending value; hint: what is allowed and what to do next.
    """

    code: ClassVar[str] = "internal"
    http_status: ClassVar[int] = 500
    exit_code: ClassVar[int] = 1
    param: str | None = None  # The field of a request that is at fault.

    def __init__(self, what: str, hint: str) -> None:
        super().__init__(what, hint)

    def at(self, param: str) -> Self:
        """Name the field of a request that is at fault, and return the error itself."""
        self.param = param
        return self

    @property
    def what(self) -> str:
        """What happened."""
        return str(self.args[0])

    @property
    def hint(self) -> str:
        """What is allowed and what to do next."""
        return str(self.args[1])

    def __str__(self) -> str:
        return f"{self.what} {self.hint}"


class UserInputError(AdapterHubError):
    """What the caller gave is wrong."""

    code, http_status, exit_code = "invalid_input", 400, 2


class SettingsError(UserInputError):
    """An environment variable or configuration key does not parse."""

    code = "invalid_settings"


class InvalidNameError(UserInputError):
    """A task, version, alias or digest does not parse."""

    code = "invalid_name"


class UnknownTaskError(UserInputError):
    """No recipe has that name."""

    code = "unknown_task"

    @classmethod
    def named(cls, name: str, known: Collection[str]) -> Self:
        """Build the error for task `name` among the `known` recipes."""
        near = suggest(name, known, otherwise="For data of your own add `--data FILE`.")
        return cls(f"No recipe for task {name!r}; there are recipes for: {_listed(known)}.", near)


class UnknownMethodError(UserInputError):
    """Not one of the adapter methods."""

    code = "unknown_method"

    @classmethod
    def named(cls, name: str, known: Collection[str]) -> Self:
        """Build the error for method `name` among the `known` methods."""
        near = suggest(name, known, otherwise="Choose one with `--method`.")
        return cls(f"Unknown adapter method {name!r}; allowed: {_listed(known)}.", near)


class RecipeError(UserInputError):
    """A recipe file or one of its keys is wrong."""

    code = "invalid_recipe"


class DataError(UserInputError):
    """A data file or one of its rows is wrong."""

    code = "invalid_data"


class AdapterConfigError(UserInputError):
    """adapter_config.json asks for something AdapterHub does not do."""

    code = "invalid_adapter_config"


class AdapterWeightsError(UserInputError):
    """adapter_model.safetensors is malformed or unsafe."""

    code = "invalid_adapter_weights"


class AdapterMismatchError(UserInputError):
    """The tensors of an adapter and the modules of the base do not fit together."""

    code = "adapter_mismatch"


class BaseMismatchError(UserInputError):
    """The adapter was made for another base."""

    code, http_status = "base_mismatch", 409


class AssetChecksumError(UserInputError):
    """Downloaded bytes are not the expected ones."""

    code = "asset_checksum"


class RequestError(UserInputError):
    """A field of an HTTP request is wrong."""

    code = "invalid_request"


class ContextTooLongError(RequestError):
    """Prompt plus answer exceed the context of the base."""

    code = "context_length_exceeded"


class UnsupportedFieldError(RequestError):
    """A field or value this server does not support. Refused, never ignored."""

    code = "unsupported_field"


class PortInUseError(UserInputError):
    """The address to listen on is taken."""

    code = "port_in_use"


class NotFoundError(AdapterHubError):
    """A named thing does not exist."""

    code, http_status, exit_code = "not_found", 404, 2


class AdapterNotFoundError(NotFoundError):
    """No published adapter matches a reference."""

    code = "adapter_not_found"

    @classmethod
    def named(cls, name: str, known: Collection[str]) -> Self:
        """Build the error for reference `name` among the `known` references."""
        near = suggest(name, known, otherwise="List them with `hub adapters list`.")
        return cls(f"No adapter {name!r} among {len(known)} published.", near)


class AliasNotFoundError(NotFoundError):
    """A task has no alias of that name."""

    code = "alias_not_found"


class BaseNotPulledError(NotFoundError):
    """The base model is not on this machine."""

    code = "base_not_pulled"


class UnknownAssetError(NotFoundError):
    """Not in the asset catalogue."""

    code = "unknown_asset"


class ConflictError(AdapterHubError):
    """A compare-and-swap lost against another writer."""

    code, http_status = "conflict", 409


class JobFailedError(AdapterHubError):
    """A run ended badly although its input was fine."""

    code = "job_failed"


class QualityGateError(JobFailedError):
    """A trained adapter is not better than the recipe demands."""

    code = "quality_gate"


class TrainingError(JobFailedError):
    """Training did not do what it must."""

    code = "training_failed"


class AssetFetchError(JobFailedError):
    """An asset could not be fetched."""

    code = "asset_fetch"


class StoreCorruptError(JobFailedError):
    """Stored bytes or the log chain differ from what was recorded."""

    code = "store_corrupt"


class AdapterLoadError(JobFailedError):
    """A published adapter cannot be loaded by this server."""

    code, http_status = "adapter_load_failed", 503


class EngineStateError(JobFailedError):
    """A planned step does not fit the slots or blocks it names; a bug of ours, caught before it answers wrongly."""

    code = "engine_state"


class OverloadedError(AdapterHubError):
    """The queue is full or the server is shutting down."""

    code, http_status = "overloaded", 503
