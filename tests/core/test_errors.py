"""The error tree: every leaf is complete, listed and travels between processes."""

from __future__ import annotations

import pickle

import pytest

from adapterhub import errors
from adapterhub.errors import AdapterHubError, AdapterNotFoundError, UnknownMethodError, UnknownTaskError


def all_errors() -> list[type[AdapterHubError]]:
    found = [AdapterHubError]
    for cls in found:
        found.extend(cls.__subclasses__())
    return found


@pytest.mark.parametrize("cls", all_errors(), ids=lambda cls: cls.__name__)
def test_every_error_pickles_has_an_exit_code_and_stands_in_the_tree(cls: type[AdapterHubError]) -> None:
    error = pickle.loads(pickle.dumps(cls("It broke.", "Fix it.")))
    assert type(error) is cls
    assert (error.what, error.hint, str(error)) == ("It broke.", "Fix it.", "It broke. Fix it.")
    assert error.exit_code in (1, 2)
    assert 400 <= error.http_status < 600
    assert cls.__name__ in (errors.__doc__ or "")
    assert cls.__name__ in errors.__all__


def test_unknown_names_get_the_choices_and_the_near_match() -> None:
    assert str(UnknownTaskError.named("sumarize", ["summarize", "math"])) == (
        "No recipe for task 'sumarize'; there are recipes for: math, summarize. Did you mean 'summarize'?"
    )
    assert str(UnknownMethodError.named("qqq", ["lora", "ia3"])) == (
        "Unknown adapter method 'qqq'; allowed: ia3, lora. Choose one with `--method`."
    )
    assert (
        str(AdapterNotFoundError.named("mathx", ["math"]))
        == "No adapter 'mathx' among 1 published. Did you mean 'math'?"
    )
