"""Put the command groups together and turn errors into messages and exit codes."""

from __future__ import annotations

import errno
import importlib
import sys

import typer
from rich.console import Console
from rich.markup import escape

from adapterhub.errors import AdapterHubError

__all__ = ["app", "main"]

# A folder that cannot be written, a full disk: no bug of ours, so a message instead of a traceback.
_USERS_TO_MEND = (errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EROFS, errno.ENOSPC, errno.EDQUOT)
_GROUPS = ("train", "evaluate", "data", "adapters", "alias", "audit", "serve", "base", "config", "doctor")

app = typer.Typer(
    name="hub",
    help="Train many adapters on one frozen base model and serve any mix of them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
for _group in _GROUPS:
    importlib.import_module(f"adapterhub.cli.{_group}").register(app)


def _tell(code: str, what: str, hint: str) -> None:
    stderr = Console(stderr=True, soft_wrap=True)
    stderr.print(f"[bold red]error[/] ({code}): {escape(what)}")
    stderr.print(f"  {escape(hint)}")


def main() -> None:
    """Run the command line. Exit codes: 0 done, 1 the job failed, 2 the input is wrong, 130 interrupted."""
    try:
        app()
    except AdapterHubError as error:
        _tell(error.code, error.what, error.hint)
        sys.exit(error.exit_code)
    except OSError as error:
        if error.errno not in _USERS_TO_MEND:
            raise
        _tell("system", f"{error}.", "Check that path and its permissions; ADAPTERHUB_HOME moves where data is kept.")
        sys.exit(1 if error.errno in (errno.ENOSPC, errno.EDQUOT) else 2)
    except KeyboardInterrupt:
        sys.exit(130)
