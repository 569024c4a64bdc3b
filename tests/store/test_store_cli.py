"""The commands of the store: what people see, what scripts read, and exit codes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from click.testing import Result
from typer.testing import CliRunner

from adapterhub.base.identity import Base
from adapterhub.cli import adapters, alias, audit
from adapterhub.errors import AdapterHubError, AdapterNotFoundError, BaseMismatchError, ConflictError
from adapterhub.records import EvaluationRecord, TrainingRecord
from adapterhub.settings import load_settings
from adapterhub.store import Store
from tests.support.adapters import METHODS, write_adapter
from tests.support.peft_folders import LORA_CONFIG, small_base, write_folder
from tests.support.tiny_models import build_base

app = typer.Typer()
for module in (adapters, alias, audit):
    module.register(app)


@pytest.fixture(autouse=True)
def _home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ADAPTERHUB_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "220")


@pytest.fixture
def opened() -> Iterator[Store]:
    with Store.open(load_settings().store_dir) as store:
        yield store


@pytest.fixture
def filled(opened: Store, tmp_path: Path) -> Store:
    for seed in (1, 2):
        opened.publish(write_folder(tmp_path / f"{seed}", seed=seed), task="summarize", base=small_base())
    return opened


def _run(*args: str, exit_code: int = 0) -> Result:
    result = CliRunner().invoke(app, args)
    if isinstance(result.exception, AdapterHubError):
        raise result.exception  # `hub` prints these and picks the exit code, see adapterhub/cli/main.py.
    assert result.exit_code == exit_code, (result.output, result.exception)
    return result


def _json(*args: str) -> Any:
    return json.loads(_run(*args, "--json").stdout)


def test_an_empty_store_says_what_to_do(opened: Store) -> None:
    assert opened.versions() == []
    result = _run("adapters", "list")
    assert (result.stdout, _json("adapters", "list")) == ("", [])
    assert "Nothing is published yet: `hub train --task T` or `hub adapters import FOLDER`." in result.stderr


def test_list_shows_versions_with_their_aliases(filled: Store) -> None:
    first, second = filled.versions()
    lines = _run("adapters", "list").stdout.splitlines()
    assert any("summarize@v1" in line and "stable" in line and first.serving_digest[:12] in line for line in lines)
    rows = _json("adapters", "list", "summarize")
    assert [(row["label"], row["aliases"]) for row in rows] == [("summarize@v1", ["stable"]), ("summarize@v2", [])]
    assert rows[1]["serving_digest"] == second.serving_digest
    with pytest.raises(AdapterNotFoundError, match="Did you mean 'summarize'"):
        _run("adapters", "list", "sumarize")


def test_show_prints_the_facts_of_the_manifest(opened: Store, tmp_path: Path) -> None:
    training = TrainingRecord(
        code_revision="abc-dirty", recipe={}, data_digests={"train.jsonl": "d" * 64}, token_digest="e" * 64, seed=7,
        packages={}, hardware={}, wall_time_s=288.4, num_train_tokens=53_000, num_trainable_parameters=4_900,
        metrics=(), parents=("9" * 64,),
    )  # fmt: skip
    evaluation = EvaluationRecord(
        metric="rouge_l", num_rows=96, base_score=0.104, adapter_score=0.164, difference=0.06, interval_low=0.038,
        interval_high=0.082, seed=1, data_digest="f" * 64,
    )  # fmt: skip
    folder = write_folder(tmp_path / "a", config=LORA_CONFIG | {"target_modules": r".*\.[qv]_proj"})
    opened.publish(folder, task="summarize", base=small_base(), training=training, evaluation=evaluation)
    shown = _run("adapters", "show", "summarize@v1").stdout
    for fact in (
        "lora, rank 2, alpha 4", r".*\.[qv]_proj", f"small, none, sha256:{'b' * 64}", f"train.jsonl sha256:{'d' * 64}",
        "rouge_l on 96 held-out rows: base 0.1040, adapter 0.1640",
        "+0.0600, 95% confidence interval [+0.0380, +0.0820]",
        "53,000 tokens, 4,900 trainable parameters, 288 s, seed 7", "abc-dirty", f"sha256:{'9' * 64}",
    ):  # fmt: skip
        assert fact in shown
    assert _json("adapters", "show", "summarize")["manifest"]["evaluation"]["num_rows"] == 96


def test_show_says_what_an_imported_adapter_lacks(filled: Store) -> None:
    shown = _run("adapters", "show", f"sha256:{filled.versions()[1].serving_digest[:10]}").stdout
    assert "summarize@v2" in shown
    assert "unknown: the adapter was imported" in shown


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return build_base(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize("method", METHODS)
def test_import_publishes_a_folder_of_every_method(method: str, tiny: Base, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "adapter", tiny, method=method, rank=4)
    options = ["--task", "summarize", "--base", str(tiny.folder), "--quantization", "none"]
    result = _run("adapters", "import", str(folder), *options)
    assert result.stdout == "summarize@v1\n"
    assert f"{method} adapter, serving digest sha256:" in result.stderr
    assert "aliases: stable" in result.stderr
    assert _json("adapters", "import", str(folder), *options)["label"] == "summarize@v1"


def test_import_of_an_adapter_that_names_another_base_needs_trust(tiny: Base, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "adapter", tiny, method="ia3")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "org/other"}))
    options = ["--task", "summarize", "--base", str(tiny.folder), "--quantization", "none"]
    with pytest.raises(BaseMismatchError, match="says the adapter was made for 'org/other'"):
        _run("adapters", "import", str(folder), *options)
    assert _run("adapters", "import", str(folder), *options, "--trust-base").stdout == "summarize@v1\n"


def test_a_later_import_says_how_to_serve_it(tiny: Base, tmp_path: Path) -> None:
    options = ["--task", "summarize", "--base", str(tiny.folder), "--quantization", "none"]
    for seed in (0, 1):
        folder = write_adapter(tmp_path / f"{seed}", tiny, method="ia3", seed=seed)
        result = _run("adapters", "import", str(folder), *options)
    assert "Serve it with `hub alias set summarize@stable summarize@v2`." in result.stderr


def test_export_writes_a_peft_folder(filled: Store, tmp_path: Path) -> None:
    assert filled.tasks()
    target = tmp_path / "out"
    assert _run("adapters", "export", "summarize", str(target)).stdout == f"{target}\n"
    assert (target / "adapter_model.safetensors").is_file()


def test_verify_names_what_is_damaged_and_exits_with_1(filled: Store) -> None:
    assert "2 of 2 versions are intact." in _run("adapters", "verify").stderr
    digest = filled.manifest(filled.versions()[1]).files["adapter_model.safetensors"]
    (blob,) = load_settings().store_dir.rglob(f"{digest[:2]}/{digest}")
    blob.chmod(0o644)
    blob.write_bytes(blob.read_bytes()[:-1] + b"x")
    result = _run("adapters", "verify", exit_code=1)
    assert "damaged summarize@v2: File 'adapter_model.safetensors' of summarize@v2" in result.stderr
    assert "1 of 2 versions are intact." in result.stderr
    rows = json.loads(_run("adapters", "verify", "--json", exit_code=1).stdout)
    assert [row["error"] is None for row in rows] == [True, False]
    assert _json("adapters", "verify", "summarize@v1") == [{"label": "summarize@v1", "error": None}]


def test_alias_set_and_list(filled: Store) -> None:
    assert filled.tasks()
    moved = _run("alias", "set", "summarize@stable", "v2", "--reason", "better [ROUGE]", "--generation", "1")
    assert moved.stdout == "summarize@stable -> summarize@v2 (generation 2)\n"
    assert _json("alias", "set", "summarize@canary", "summarize@v1")["generation"] == 1
    listed = _run("alias", "list").stdout
    assert "better [ROUGE]" in listed
    assert [(row["label"], row["version"]) for row in _json("alias", "list", "summarize")] == [
        ("summarize@canary", 1),
        ("summarize@stable", 2),
    ]
    with pytest.raises(ConflictError, match="it is at generation 2"):
        _run("alias", "set", "summarize@stable", "v1", "--generation", "1")
    with pytest.raises(AdapterNotFoundError):
        _run("alias", "list", "nothing")


def test_audit_shows_and_checks_the_log(filled: Store) -> None:
    assert _run("audit", "verify").stdout.startswith("1 rows, unbroken, last hash ")
    filled.point_alias("summarize@stable", "v2", actor="ann", reason="canary won")
    shown = _run("audit", "log").stdout
    assert "v1 -> v2" in shown
    assert "canary won" in shown
    rows = _json("audit", "log", "summarize")
    assert [row["actor"] for row in rows] == ["cli", "ann"]
    assert _json("audit", "verify") == {"rows": 2, "last_hash": rows[-1]["hash"]}


def test_an_empty_log_is_sound(opened: Store) -> None:
    assert opened.log_head() == 0
    assert _json("audit", "verify") == {"rows": 0, "last_hash": None}
    assert _run("audit", "verify").stdout == "0 rows, unbroken\n"
