"""`record-help`: the commands that make a recording on one's own host."""

from __future__ import annotations

import click

from tdpmmu import errors
from tdpmmu.cli.common import common
from tdpmmu.cli.output import Output

__all__ = ["record_help"]


@click.command("record-help")
@click.option("--kernel", metavar="X", help="Version, such as 6.12 or what uname -r prints [this kernel's].")
@click.option(
    "--format",
    "tool",
    default="trace-cmd",
    show_default=True,
    metavar="TOOL",
    help="trace-cmd, perf or ftrace (plain tracefs).",
)
@click.option(
    "--memory",
    default="16G",
    show_default=True,
    metavar="SIZE",
    help="Guest memory: sizes the buffers for a zap of all of it.",
)
@click.option("--all", "everything", is_flag=True, help="Also the events that only sometimes help.")
@common(timeout=False)
def record_help(out: Output, kernel: str | None, tool: str, memory: str, everything: bool) -> int:
    """How to record KVM's TDP MMU on your own host: trace points, kprobes, buffers, checks.

    Prints a shell script to read and run step by step as root. Which functions can be probed depends on the
    kernel: those that a version inlines or does not have are listed with the reason.
    """
    from tdpmmu import recorder

    try:
        result = recorder.record_help(kernel, tool, memory=memory, everything=everything)
    except errors.InvalidArgument as error:
        if kernel is None and "kernel=" in str(error):
            raise errors.InvalidArgument(f"{error}; name one with --kernel") from error
        raise
    out.emit(result, lambda shown: shown.text)
    return 0
