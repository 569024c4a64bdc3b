"""The documents name things that exist: functions, files, commands, options, links, and the version of the package."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import adapterhub
from adapterhub.cli import app

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "adapters").glob("*/README.md")])
PACKAGES = ("adapterhub", "trainer", "server")


def names_in(path: Path) -> set[str]:
    """Functions, classes and Class.method of a module."""
    found: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            methods = (n for n in node.body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))
            found.update(f"{node.name}.{method.name}" for method in methods)
    return found


def c_functions_in(path: Path) -> set[str]:
    """Functions defined in a C source."""
    return set(re.findall(r"^(?!#)\w[\w *]*?(\w+)\(", path.read_text(), flags=re.MULTILINE))


def test_every_function_the_architecture_walks_through_exists() -> None:
    named = re.findall(r"`([\w/]+\.(?:py|c)):([\w.]+)`", (ROOT / "ARCHITECTURE.md").read_text())
    assert len(named) > 20
    for file, name in named:
        found = names_in(ROOT / file) if file.endswith(".py") else c_functions_in(ROOT / file)
        assert name in found, f"{file}:{name}"


def test_the_architecture_names_every_file_of_the_engine_and_no_other() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text()
    table = text.partition("The engine in files")[2].partition("\n\nThe kernel")[0]
    named = re.findall(r"`(\w+\.py)`", table)
    files = {path.name for path in (ROOT / "server" / "engine").glob("*.py")} - {"__init__.py"}
    assert sorted(named) == sorted(files)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_of_ours_that_a_document_names_exists(document: Path) -> None:
    named = re.findall(r"`((?:adapterhub|trainer|server|tests|benchmarks)/[\w/]+\.\w+)[:`]", document.read_text())
    missing = [path for path in named if not (ROOT / path).exists()]
    assert missing == []


def words_in(text: str) -> list[str]:
    """The words of a help text, whatever box it is drawn in."""
    return re.sub(r"\x1b\[[\d;]*m|[─│╭╮╰╯]", " ", text).split()


def test_the_help_of_serve_in_the_guide_is_what_the_command_prints() -> None:
    guide = (ROOT / "docs" / "guide.md").read_text()
    shown = guide.partition("$ hub serve --help\n")[2].partition("```")[0]
    printed = CliRunner().invoke(app, ["serve", "--help"], prog_name="hub", env={"COLUMNS": "100"}).output
    assert words_in(shown) == words_in(printed)


def commands_in(text: str) -> list[list[str]]:
    """Arguments of each `hub ...` line inside code blocks."""
    blocks = re.findall(r"```[a-z]*\n(.*?)```", text, flags=re.DOTALL)
    lines = [line.removeprefix("$ ").strip() for block in blocks for line in block.splitlines()]
    lines = [line.removeprefix(".venv/bin/") for line in lines]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("hub ")]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_in_a_document_is_one_the_command_line_knows(document: Path) -> None:
    root = typer.main.get_command(app)
    for arguments in commands_in(document.read_text()):
        command, rest = root, list(arguments)
        while rest and rest[0] in getattr(command, "commands", {}):
            command = command.commands[rest.pop(0)]  # pyright: ignore[reportAttributeAccessIssue]  # A group, see above.
        assert not getattr(command, "commands", {}), f"hub {' '.join(arguments)}"
        known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        unknown = {word.partition("=")[0] for word in rest if word.startswith("--")} - known - {"--help"}
        assert not unknown, f"hub {' '.join(arguments)}: {unknown}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_relative_link_in_a_document_leads_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", document.read_text()):
        assert (document.parent / target).exists(), target


def test_the_changelog_begins_with_the_version_of_the_package() -> None:
    match = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert match is not None
    assert match[1] == adapterhub.__version__


@pytest.mark.parametrize("package", PACKAGES)
def test_public_names_are_listed_sorted_and_exist(package: str) -> None:
    for path in sorted((ROOT / package).rglob("*.py")):
        tree = ast.parse(path.read_text())
        lists = [
            node.value
            for node in tree.body
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__"
        ]
        defined = [
            node.name
            for node in tree.body
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            and not node.name.startswith("_")
            # A route or command is reached through what registers it, not by its name.
            and (isinstance(node, ast.ClassDef) or not node.decorator_list)
        ]
        if not lists:
            assert not defined, f"{path} has public names but no __all__"
            continue
        listed = ast.literal_eval(lists[0])
        assert listed == sorted(listed, key=lambda name: (not name.isupper(), not name[:1].isupper(), name)), path
        assert set(defined) - set(listed) <= {path.stem}, f"{path}: {set(defined) - set(listed)}"


def test_no_file_is_longer_than_its_readers_patience() -> None:
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            assert len(path.read_text().splitlines()) <= 400, path
