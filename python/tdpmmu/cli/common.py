"""What the commands share: their common options, and which exit code an error has."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tdpmmu import errors
from tdpmmu.cli.output import SUFFIXES, Output

if TYPE_CHECKING:
    from tdpmmu.results import Document

__all__ = ["BadInput", "Command", "Decorator", "common", "exit_code", "load_input"]

Command = Callable[..., int | None]
Decorator = Callable[[Command], Command]


class BadInput(Exception):
    """An input file cannot be opened or read: exit code 3."""


def exit_code(error: BaseException) -> int | None:
    """Return the exit code of an error, None for one that is nobody's fault but ours."""
    table: list[tuple[type[BaseException], int]] = [
        (errors.OracleViolation, 1),
        (errors.InvalidArgument, 2),
        (errors.TraceError, 3),
        (BadInput, 3),
        (errors.StallError, 124),
        (errors.InternalError, 5),
        (errors.Unsupported, 4),
        (errors.Busy, 4),
        (MemoryError, 4),
        (OSError, 4),
    ]
    return next((code for kind, code in table if isinstance(error, kind)), None)


def common(timeout: bool = True, suffixes: tuple[str, ...] = SUFFIXES) -> Callable[[Command], Command]:
    """Add the options that every command has, and hand an `Output` to it."""

    def wrap(body: Command) -> Command:
        @functools.wraps(body)
        def inner(
            as_json: bool, output: Path | None, force: bool, quiet: bool, debug: bool, **options: Any
        ) -> int | None:
            del debug  # acted upon where errors are shown
            out = Output(as_json=as_json, path=output, force=force, quiet=quiet, suffixes=suffixes)
            return body(out, **options)

        decorators = [
            click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table."),
            click.option(
                "-o",
                "--output",
                type=click.Path(path_type=Path),
                metavar="FILE",
                help=f"Also write FILE; the suffix picks the format: {' '.join(suffixes)}.",
            ),
            click.option("--force", is_flag=True, help="Overwrite FILE."),
            click.option("-q", "--quiet", is_flag=True, help="Say nothing on stderr but errors."),
            click.option("--debug", is_flag=True, help="Show a Python traceback of an error."),
        ]
        if timeout:
            decorators.append(
                click.option(
                    "--timeout", type=float, metavar="SECONDS", help="Stop after this long (exit code 124)."
                )
            )
        for decorate in reversed(decorators):
            inner = decorate(inner)
        return inner

    return wrap


def load_input(path: Path) -> Document:
    """Return the result in a file that the user named.

    Raises:
        BadInput: it cannot be read, or is no result.
    """
    from tdpmmu import results

    try:
        return results.load_file(path)
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror or error}") from error
    except errors.InvalidArgument as error:
        raise BadInput(str(error)) from error
