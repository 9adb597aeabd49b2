"""Where results go: stdout, or a file whose suffix picks the format; and the progress line on stderr."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from tdpmmu.errors import InvalidArgument

__all__ = [
    "PICTURES",
    "RECORDINGS",
    "SUFFIXES",
    "Output",
    "check_free",
    "place_file",
    "progress",
    "say",
    "write_file",
]

SUFFIXES = (".json", ".jsonl", ".csv", ".parquet", ".txt")
#: Of a bench result.
PICTURES = (".svg", ".png", ".pdf")
#: Written by the native part while it runs, and the option that names such a file.
RECORDINGS = {".pftrace": "perfetto", ".hlog": "hlog"}
_QUIET_SECONDS = 3.0


def say(text: str) -> None:
    """Print a line of talk on stderr, unless it is closed."""
    with contextlib.suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


def write_file(path: Path, data: bytes, force: bool) -> None:
    """Write a whole file or none: a temporary file beside it, synced, then renamed over.

    Raises:
        click.UsageError: it exists and `force` is false.
        OSError: it cannot be written.
    """
    check_free(path, force)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        Path(temporary).chmod(0o666 & ~mask)
        place_file(Path(temporary), path, force)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(temporary).unlink()
        raise


def place_file(draft: Path, path: Path, force: bool) -> None:
    """Give a finished file its name, in the same folder.

    Raises:
        click.UsageError: somebody made a file of that name meanwhile and `force` is false.
        OSError: it cannot be renamed.
    """
    if force:
        draft.replace(path)
        return
    # Link and not rename: fails if the file is there.
    try:
        os.link(draft, path)
    except FileExistsError:
        check_free(path, force)
    draft.unlink()


def check_free(path: Path, force: bool) -> None:
    """Refuse a path that is there already: asked before the work, so that hours are not lost to it."""
    if path.is_dir():
        raise click.UsageError(f"{path} is a directory")
    if not force and path.exists():
        raise click.UsageError(f"{path} exists; --force overwrites it")
    if not path.parent.is_dir():
        raise click.UsageError(f"{path.parent} is not a directory")


class Output:
    """One command's output options, checked before the work starts."""

    def __init__(
        self,
        *,
        as_json: bool,
        path: Path | None,
        force: bool,
        quiet: bool,
        suffixes: tuple[str, ...] = SUFFIXES,
    ) -> None:
        self.as_json, self.path, self.force, self.quiet = as_json, path, force, quiet
        if path is not None:
            if path.suffix.lower() not in suffixes:
                raise click.UsageError(
                    f"-o {path}: unknown suffix {path.suffix!r}; it picks the format: {' '.join(suffixes)}"
                )
            check_free(path, force)

    def emit(self, result: Any, render: Callable[[Any], str]) -> None:
        """Write the result to the file, if one was named, and to stdout as a table or as JSON."""
        if self.path is not None and self.path.suffix.lower() not in RECORDINGS:
            write_file(self.path, encode(result, self.path.suffix.lower(), render), self.force)
            if not self.quiet:
                say(f"wrote {self.path}")
        sys.stdout.write(result.to_json() + "\n" if self.as_json else render(result))
        sys.stdout.flush()


def encode(result: Any, suffix: str, render: Callable[[Any], str]) -> bytes:
    """Return the result in the format of a suffix of `SUFFIXES`."""
    if suffix == ".json":
        return bytes(result.to_json(indent=1) + "\n", "utf-8")
    if suffix == ".txt":
        return render(result).encode()
    if suffix == ".parquet":
        table = result.to_arrow()
        import pyarrow.parquet as pq

        sink = io.BytesIO()
        pq.write_table(table, sink)
        return sink.getvalue()
    if suffix in PICTURES:
        from tdpmmu import plot

        return plot.draw(result, suffix[1:])
    rows = result.to_rows()
    if suffix == ".jsonl":
        return "".join(json.dumps(row) + "\n" for row in rows).encode()
    if suffix == ".csv":
        text = io.StringIO()
        writer = csv.DictWriter(
            text, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n"
        )
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue().encode()
    raise InvalidArgument(f"suffix={suffix!r}: expected one of {' '.join(SUFFIXES)}")


@contextlib.contextmanager
def progress(quiet: bool) -> Iterator[Callable[[str, float], None] | None]:
    """Give a `progress` callable: a bar on a terminal that has rich, else a line every few seconds."""
    if quiet:
        yield None
        return
    if sys.stderr.isatty() and "NO_COLOR" not in os.environ:
        try:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
        except ImportError:
            pass
        else:
            columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
            with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
                task = bar.add_task("starting", total=1.0)

                def draw(phase: str, fraction: float) -> None:
                    known = not math.isnan(fraction)
                    bar.update(
                        task,
                        description=phase,
                        completed=fraction if known else 0,
                        total=1.0 if known else None,
                    )

                yield draw
            return
    start = last = time.monotonic()

    def line(phase: str, fraction: float) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _QUIET_SECONDS:
            last = now
            part = "" if math.isnan(fraction) else f" {fraction:.0%}"
            say(f"[{now - start:6.1f} s] {phase}{part}")

    yield line
