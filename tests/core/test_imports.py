"""Importing the core stays cheap: no torch behind its back, and `hub --help` loads nothing heavy."""

from __future__ import annotations

import pkgutil
import subprocess
import sys

import adapterhub

HEAVY = ("torch", "transformers", "peft", "trl", "bitsandbytes", "datasets")


def imported_by(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint(*sorted(set(sys.modules) & set({HEAVY!r})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_no_module_of_the_core_imports_torch() -> None:
    modules = [info.name for info in pkgutil.walk_packages(adapterhub.__path__, "adapterhub.")]
    assert len(modules) > 20
    assert imported_by(f"import {', '.join(modules)}") == set()


def test_the_http_layer_imports_no_torch() -> None:
    assert imported_by("import server.http.app") == set()


def test_help_loads_neither_torch_nor_the_web_framework_nor_the_database_layer() -> None:
    code = (
        "import sys\nfrom adapterhub.cli import app\n"
        "try:\n    app(['--help'])\nexcept SystemExit:\n    pass\n"
        "print('LOADED', *sorted(set(sys.modules) & {'torch', 'fastapi', 'sqlalchemy', 'pydantic', 'yaml'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "LOADED"
    for command in ("train", "eval", "serve", "adapters", "alias", "audit", "base", "config", "data", "doctor"):
        assert f" {command} " in done.stdout
