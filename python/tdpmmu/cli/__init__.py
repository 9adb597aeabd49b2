"""The command line. stdout is data, stderr is talk.

Exit codes: 0 ok, 1 a check failed, 2 usage, 3 bad input file, 4 not enough memory or resources, 5 internal
error, 124 timeout, 130 interrupted. No traceback is shown without `--debug`.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

__all__ = ["main", "run"]


def main() -> NoReturn:
    """Run the command line with the process's arguments and exit with its code."""
    code = run(sys.argv[1:])
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        code = _pipe_closed()
    except OSError as error:
        print(f"error: writing standard output: {error.strerror}", file=sys.stderr)
        code = code or 4
        _silence()
    sys.exit(code)


def run(arguments: Sequence[str]) -> int:
    """Run the command line with `arguments`, talk on stderr, and return the exit code."""
    debug = "--debug" in arguments
    try:
        # Inside the try: an interrupt during the imports is an interrupt like any other.
        from tdpmmu.cli import commands

        return commands.run(list(arguments), debug)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return _pipe_closed()
    except Exception as error:
        if debug:
            raise
        print(f"internal error: {type(error).__name__}: {error} (--debug shows where)", file=sys.stderr)
        return 5


def _pipe_closed() -> int:
    """Whoever read our output has gone: nothing to say, and nothing more to flush at exit."""
    _silence()
    return 141


def _silence() -> None:
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
