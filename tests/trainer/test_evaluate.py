from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from adapterhub.base import Base
from adapterhub.base.loading import load_model, load_tokenizer
from adapterhub.recipes import DataSource
from adapterhub.records import EvaluationRecord
from adapterhub.settings import load_settings
from tests.support.tiny_models import build_base
from tests.support.training import echo_rows, tiny_recipe
from trainer.console import print_evaluation
from trainer.data import data_file
from trainer.evaluate import base_answers
from trainer.generate import Answers

Ask = Callable[..., Answers]


class AskedError(Exception):
    """The base was asked although its answers are on disk."""


def asked() -> Any:
    raise AskedError


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return build_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def ask(base: Base, tmp_path: Path) -> Ask:
    """Ask the base about three rows, with answers kept in tmp_path/answers; the first call fills them."""
    tokenizer = load_tokenizer(base)
    options: dict[str, Any] = {
        "base": base,
        "recipe": tiny_recipe(generation__max_new_tokens=4),
        "tokenizer": tokenizer,
        "cache_folder": tmp_path / "answers",
        "device": "cpu",
    }
    rows = echo_rows(tokenizer, num_rows=3)

    def call(load: Callable[[], Any], **changes: Any) -> Answers:
        return base_answers(load, rows, **(options | changes))

    return call


def test_kept_answers_are_those_given_and_nothing_else_stays_on_disk(ask: Ask, base: Base, tmp_path: Path) -> None:
    given = ask(lambda: load_model(base))
    assert len(given.texts) == 3
    assert ask(asked) == given
    assert [path.suffix for path in (tmp_path / "answers").iterdir()] == [".json"]


def test_answers_of_another_device_layout_stop_token_or_library_are_not_reused(
    ask: Ask, base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask(lambda: load_model(base))
    other = load_tokenizer(base)
    other.eos_token = "a"
    for change in ({"device": "cuda"}, {"keep_quantized": True}, {"tokenizer": other}):
        with pytest.raises(AskedError):
            ask(asked, **change)
    monkeypatch.setattr("importlib.metadata.version", lambda _: "0")
    with pytest.raises(AskedError):
        ask(asked)


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff", b"[]", b'{"texts": 3, "num_unfinished": 0}', b'{"texts": ["a"], "num_unfinished": 0}'],
)
def test_a_damaged_or_short_file_of_answers_is_asked_again_and_replaced(
    ask: Ask, base: Base, tmp_path: Path, content: bytes
) -> None:
    given = ask(lambda: load_model(base))
    (path,) = (tmp_path / "answers").iterdir()
    path.write_bytes(content)
    assert ask(lambda: load_model(base)) == given
    assert json.loads(path.read_text())["texts"] == list(given.texts)


def test_a_hub_data_set_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Rows:
        is_broken = True

        def to_json(self, path: Path, **_: Any) -> None:
            path.write_text('{"prompt": "a"', encoding="utf-8")
            if self.is_broken:
                raise OSError("disk full")

    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: Rows())
    settings, source = load_settings(home=tmp_path), DataSource(hub="org/name")
    with pytest.raises(OSError, match="disk full"):
        data_file(source, settings)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    Rows.is_broken = False
    assert data_file(source, settings).read_text() == '{"prompt": "a"'
    assert sum(path.is_file() for path in tmp_path.rglob("*")) == 1


def test_answers_cut_off_by_the_limit_are_told_under_the_table() -> None:
    record = EvaluationRecord(
        metric="rouge_l",
        num_rows=96,
        base_score=0.1,
        adapter_score=0.2,
        difference=0.1,
        interval_low=0.05,
        interval_high=0.15,
        num_base_unfinished=61,
        seed=0,
        data_digest="0",
    )
    console = Console(width=100)
    with console.capture() as capture:
        print_evaluation(console, record, max_new_tokens=40)
    assert capture.get().splitlines()[-1] == "base ran into the limit of 40 tokens on 61 of 96 rows"
