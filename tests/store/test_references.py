"""References: every way to name a version, and what is said when none has that name."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapterhub.base.identity import Base
from adapterhub.errors import AdapterNotFoundError, AliasNotFoundError, InvalidNameError
from adapterhub.store import Store
from adapterhub.store.names import check_digest, parse_reference


@pytest.fixture
def filled(store: Store, base: Base, new_folder: Callable[[int], Path]) -> Store:
    for seed in (1, 2):
        store.publish(new_folder(seed), task="summarize", base=base)
    store.publish(new_folder(1), task="other", base=base)
    store.set_alias("summarize", "canary", "v2", expected_generation=None, actor="test", reason="try")
    return store


def test_a_version_has_many_names(filled: Store) -> None:
    first, second = filled.versions("summarize")
    digest = second.serving_digest
    names = [
        "summarize@v2",
        "summarize@canary",
        f"summarize@sha256:{digest}",
        f"sha256:{digest}",
        f"sha256:{digest[:8]}",
    ]
    assert {filled.get_version(name) for name in names} == {second}
    assert {filled.get_version(name) for name in ("summarize", "summarize@v1", "summarize@stable")} == {first}
    assert filled.get_version(f"other@sha256:{first.serving_digest}").label == "other@v1"


@pytest.mark.parametrize(
    ("ref", "message"),
    [
        ("sumarize", "No adapter 'sumarize' among 2 published. Did you mean 'summarize'?"),
        ("unlike", "No adapter 'unlike' among 2 published. List them with `hub adapters list`."),
        ("summarize@v7", "No adapter 'summarize@v7' among 2 published. Did you mean 'summarize@v2'?"),
        ("sumarize@canary", "No adapter 'sumarize@canary' among 2 published. Did you mean 'summarize'?"),
        ("sha256:" + "0" * 64, "among 3 published."),
        ("other@sha256:00000000", "No adapter 'other@sha256:00000000' among 1 published."),
    ],
)
def test_an_unknown_version_gets_near_names(ref: str, message: str, filled: Store) -> None:
    with pytest.raises(AdapterNotFoundError) as caught:
        filled.get_version(ref)
    assert message in str(caught.value)


def test_an_unknown_alias_gets_the_known_ones(filled: Store) -> None:
    with pytest.raises(AliasNotFoundError) as caught:
        filled.get_version("summarize@beta")
    assert str(caught.value) == (
        "Task 'summarize' has no alias 'beta'; it has: canary, stable. "
        "Set it with `hub alias set summarize@beta summarize@v1`."
    )


@pytest.mark.parametrize(
    ("ref", "message"),
    [
        ("", "'' cannot name a task."),
        ("a/b", "'a/b' cannot name a task."),
        ("summarize@", "'' cannot name an alias."),
        ("summarize@v0", "'summarize@v0' names no version. Versions are `@v1`, `@v2` and so on."),
        ("summarize@v01", "'summarize@v01' names no version."),
        ("summarize@sha256:abc", "'sha256:abc' is not a digest reference."),
        ("sha256:" + "A" * 8, "Allowed: `sha256:` and 8 to 64 characters of 0-9 and a-f."),
        ("sha256:%%%%%%%%", "is not a digest reference."),
        ("summarize@" + "x" * 200, "xxx'... cannot name an alias."),
    ],
)
def test_a_reference_that_does_not_parse_is_refused(ref: str, message: str) -> None:
    with pytest.raises(InvalidNameError) as caught:
        parse_reference(ref)
    assert message in str(caught.value)


@given(st.text(max_size=80) | st.text(alphabet="av1@:./-_%#\0\\~", max_size=12))
def test_no_text_leads_out_of_the_store(text: str) -> None:
    try:
        reference = parse_reference(text)
    except InvalidNameError:
        return
    for part in (reference.task, reference.alias, reference.digest_prefix):
        assert part is None or not set(part) & set("/\\\0%#@: \n")


@given(st.text(max_size=70) | st.text(alphabet="0123456789abcdef/.", min_size=60, max_size=66))
def test_only_sha256_becomes_a_path(text: str) -> None:
    if re.fullmatch("[0-9a-f]{64}", text):
        assert check_digest(text) == text
        return
    with pytest.raises(InvalidNameError) as caught:
        check_digest(text)
    assert caught.value.hint == "Allowed: 64 characters of 0-9 and a-f."


def test_a_view_is_named_by_a_full_digest(filled: Store) -> None:
    with pytest.raises(InvalidNameError, match=r"'\.\./x' is not a sha256 digest"):
        filled.view("../x")
    with pytest.raises(AdapterNotFoundError, match=f"No adapter 'sha256:{'0' * 64}'"):
        filled.view("0" * 64)


def test_a_prefix_of_two_digests_is_ambiguous(store: Store, base: Base, new_folder: Callable[[int], Path]) -> None:
    version = store.publish(new_folder(1), task="summarize", base=base)
    twin = version.serving_digest[:10] + "f" * 54
    _insert_twin(store, twin)
    with pytest.raises(InvalidNameError, match=r"matches 2 digests: .* Give more digits."):
        store.get_version(f"sha256:{twin[:8]}")


def _insert_twin(store: Store, digest: str) -> None:
    """Two real digests that share 8 digits cannot be found in a test's time, so one is written into the catalogue."""
    with store._catalogue.write() as connection:
        connection.exec_driver_sql(
            "INSERT INTO versions (task, number, serving_digest, manifest_digest, base_digest, method, created_at) "
            "SELECT task, 2, ?, ?, base_digest, method, created_at FROM versions",
            (digest, "0" * 64),
        )
