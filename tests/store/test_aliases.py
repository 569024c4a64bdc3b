"""Aliases against a simple model, compare-and-swap, and a log that shows tampering."""

from __future__ import annotations

import sqlite3
import tempfile
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from adapterhub.base.identity import Base
from adapterhub.errors import AdapterNotFoundError, ConflictError, InvalidNameError, StoreCorruptError, UserInputError
from adapterhub.store import Store
from tests.support.peft_folders import small_base, write_folder

NUM_VERSIONS = 3


@pytest.fixture
def filled(store: Store, base: Base, tmp_path: Path) -> Store:
    for seed in range(NUM_VERSIONS):
        store.publish(write_folder(tmp_path / f"{seed}", seed=seed), task="summarize", base=base)
    return store


def _set(store: Store, name: str, ref: str, generation: int | None) -> None:
    store.set_alias("summarize", name, ref, expected_generation=generation, actor="ann", reason="because")


class AliasMachine(RuleBasedStateMachine):
    """Random moves by people who know the current generation and by people who do not."""

    def __init__(self) -> None:
        super().__init__()
        self.scratch = tempfile.TemporaryDirectory()
        self.expected: dict[str, tuple[int, int]] = {"stable": (1, 1)}
        self.num_moves = 1

    @initialize()
    def publish(self) -> None:
        root = Path(self.scratch.name)
        self.store = Store.open(root / "store")
        for seed in range(NUM_VERSIONS):
            self.store.publish(write_folder(root / str(seed), seed=seed), task="summarize", base=small_base())

    @rule(
        name=st.sampled_from(["stable", "canary", "x.y"]),
        number=st.integers(1, NUM_VERSIONS),
        generation=st.none() | st.integers(1, 4),
    )
    def move(self, name: str, number: int, generation: int | None) -> None:
        current = self.expected.get(name, (None, 0))[0]
        if generation != current:
            with pytest.raises(ConflictError):
                _set(self.store, name, f"v{number}", generation)
            return
        _set(self.store, name, f"summarize@v{number}", generation)
        self.expected[name] = ((current or 0) + 1, number)
        self.num_moves += 1

    @invariant()
    def aliases_and_log_agree_with_the_model(self) -> None:
        found = {alias.name: (alias.generation, alias.number) for alias in self.store.aliases("summarize")}
        assert found == self.expected
        assert self.store.log_head() == self.store.verify_log() == self.num_moves
        for name, (_, number) in self.expected.items():
            assert self.store.get_version(f"summarize@{name}").number == number

    def teardown(self) -> None:
        self.store.close()
        self.scratch.cleanup()


TestAliasMachine = AliasMachine.TestCase
TestAliasMachine.settings = settings(max_examples=10, stateful_step_count=12, deadline=None)


def test_a_lost_race_is_told_the_current_state(filled: Store) -> None:
    _set(filled, "stable", "v2", 1)
    with pytest.raises(ConflictError) as caught:
        _set(filled, "stable", "v3", 1)
    assert str(caught.value) == (
        "Alias 'summarize@stable' was expected to be at generation 1; it is at generation 2 and points to v2, set by "
        "'ann' ('because'). Look again with `hub alias list` and repeat with generation 2 if you still want the move."
    )
    with pytest.raises(
        ConflictError, match="Alias 'summarize@stable' was expected not to exist yet; it is at generation 2"
    ):
        _set(filled, "stable", "v3", None)
    with pytest.raises(ConflictError) as caught:
        _set(filled, "new", "v3", 4)
    assert str(caught.value) == (
        "Alias 'summarize@new' does not exist, so it is not at generation 4. Expect no generation to create it."
    )


@pytest.mark.parametrize("name", ["v1", "v007", "", "Stable", "a b", "../x"])
def test_a_bad_alias_name_is_refused(name: str, filled: Store) -> None:
    with pytest.raises(InvalidNameError, match="cannot name an alias"):
        _set(filled, name, "v1", None)


def test_an_alias_stays_within_its_task(filled: Store, base: Base, tmp_path: Path) -> None:
    filled.publish(write_folder(tmp_path / "o", seed=9), task="other", base=base)
    with pytest.raises(UserInputError) as caught:
        _set(filled, "stable", "other@v1", 1)
    assert str(caught.value) == (
        "An alias of 'summarize' cannot point to other@v1: that belongs to another task. "
        "Name a version of 'summarize'; see `hub adapters list`."
    )
    with pytest.raises(AdapterNotFoundError, match="No adapter 'summarize@v9'"):
        _set(filled, "stable", "v9", 1)


def test_people_point_an_alias_without_counting_generations(filled: Store) -> None:
    move = {"actor": "ann", "reason": "r"}
    assert filled.point_alias("summarize@stable", "v3", **move).generation == 2
    assert filled.point_alias("summarize@new", "summarize@stable", generation=0, **move).version_label == "summarize@v3"
    with pytest.raises(ConflictError, match="was expected not to exist yet"):
        filled.point_alias("summarize@new", "v1", generation=0, **move)
    with pytest.raises(ConflictError, match="was expected to be at generation 7"):
        filled.point_alias("summarize@new", "v1", generation=7, **move)
    with pytest.raises(InvalidNameError, match=r"'stable' names no alias. Write task@alias"):
        filled.point_alias("stable", "v1", **move)


def test_the_log_tells_who_moved_what_and_when(filled: Store) -> None:
    _set(filled, "stable", "v2", 1)
    first, second = filled.log("summarize")
    assert (first.actor, first.previous_number, first.number) == ("cli", None, 1)
    assert (second.actor, second.reason, second.previous_number, second.number) == ("ann", "because", 1, 2)
    assert second.previous_hash == first.hash
    assert second.serving_digest == filled.get_version("summarize@v2").serving_digest
    assert filled.log("other") == []


TAMPERING = [
    ("UPDATE alias_log SET actor = 'bob' WHERE id = 2", "Row 2 of the alias log was changed after it was written."),
    ("UPDATE alias_log SET reason = 'x', hash = '1' WHERE id = 3", "Row 3 of the alias log was changed after it was"),
    ("DELETE FROM alias_log WHERE id = 2", "Row 2 of the alias log is missing."),
    ("DELETE FROM alias_log WHERE id = 3", "Alias 'summarize@stable' is not where the log of 2 rows left it."),
    ("UPDATE aliases SET number = 1", "Alias 'summarize@stable' is not where the log of 3 rows left it."),
    ("UPDATE aliases SET generation = 9", "Alias 'summarize@stable' is not where the log of 3 rows left it."),
    ("DELETE FROM aliases", "Alias 'summarize@stable' is not where the log of 3 rows left it."),
    (
        f"UPDATE versions SET serving_digest = '{'0' * 64}' WHERE number = 2",
        "Row 2 of the alias log names summarize@v2",
    ),
]


@pytest.mark.parametrize(("statement", "message"), TAMPERING)
def test_tampering_with_the_catalogue_is_found(statement: str, message: str, filled: Store, tmp_path: Path) -> None:
    _set(filled, "stable", "v2", 1)
    _set(filled, "stable", "v3", 2)
    assert filled.verify_log() == 3
    with closing(sqlite3.connect(tmp_path / "store" / "catalogue.sqlite")) as connection:
        for table in ("versions", "alias_log"):
            for verb in ("update", "delete"):
                connection.execute(f"DROP TRIGGER {table}_no_{verb}")
        connection.execute(statement)
        connection.commit()
    with pytest.raises(StoreCorruptError) as caught:
        filled.verify_log()
    assert message in caught.value.what
    assert "backup" in caught.value.hint


@pytest.mark.usefixtures("filled")
@pytest.mark.parametrize("table", ["versions", "alias_log"])
@pytest.mark.parametrize("statement", ["UPDATE {} SET task = 'x'", "DELETE FROM {}"])
def test_history_cannot_be_edited_by_accident(table: str, statement: str, tmp_path: Path) -> None:
    with (
        closing(sqlite3.connect(tmp_path / "store" / "catalogue.sqlite")) as connection,
        pytest.raises(sqlite3.IntegrityError, match=f"{table} is append-only"),
    ):
        connection.execute(statement.format(table))
