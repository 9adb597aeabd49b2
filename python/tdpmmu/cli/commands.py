"""The commands and their options. Heavy imports happen inside the commands: `--help` stays quick."""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

import tdpmmu
from tdpmmu import _names, errors, units
from tdpmmu.cli.output import Output, check_free, progress, say, write_file

__all__ = ["run"]

Command = Callable[..., int | None]
Decorator = Callable[[Command], Command]


class BadInput(Exception):
    """An input file cannot be opened or read: exit code 3."""


def run(arguments: list[str], debug: bool) -> int:
    """Run a command and return the exit code; what went wrong is one message on stderr."""
    try:
        # Not `cli.main`: it turns a closed pipe into exit code 1, which here says that a check failed.
        with cli.make_context("tdpmmu", arguments) as context:
            code = cli.invoke(context)
        return code if isinstance(code, int) else 0
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except click.Abort:
        say("interrupted")
        return 130
    except (BrokenPipeError, KeyboardInterrupt):
        raise
    except (errors.TdpMmuError, MemoryError, OSError, TypeError, BadInput) as error:
        code = exit_code(error)
        if debug or code is None:
            raise
        say(f"error: {error}")
        if isinstance(error, errors.TraceError) and "kvmmmu" in str(error):
            from tdpmmu.recording import RECORDING_RECIPE

            say(f"To record:\n{RECORDING_RECIPE}")
        return code


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


def common(timeout: bool = True) -> Callable[[Command], Command]:
    """Add the options that every command has, and hand an `Output` to it."""

    def wrap(body: Command) -> Command:
        @functools.wraps(body)
        def inner(
            as_json: bool, output: Path | None, force: bool, quiet: bool, debug: bool, **options: Any
        ) -> int | None:
            del debug  # acted upon where errors are shown
            out = Output(as_json=as_json, path=output, force=force, quiet=quiet)
            return body(out, **options)

        decorators = [
            click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table."),
            click.option(
                "-o",
                "--output",
                type=click.Path(path_type=Path),
                metavar="FILE",
                help="Also write FILE; the suffix picks the format: .json .jsonl .csv .parquet .txt.",
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


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(tdpmmu.__version__, prog_name="tdpmmu")
@click.option("--debug", is_flag=True, help="Show a Python traceback of an error.")
def cli(debug: bool) -> None:
    """Teardown of second-stage page tables: KVM's TDP MMU in a process, measured and checked.

    \b
    stdout is data, stderr is talk. Exit codes: 0 ok, 1 a check failed, 2 usage,
    3 bad input file, 4 not enough memory or resources, 5 internal error,
    124 timeout, 130 interrupted.
    """


@cli.group()
def bench() -> None:
    """Measure zap designs and single operations."""


def size_option(flag: str, default: str | None, text: str) -> Callable[[Command], Command]:
    """Make an option that takes a size, checked where configurations are checked."""
    return click.option(flag, default=default, show_default=default is not None, metavar="SIZE", help=text)


def machine_options(body: Command) -> Command:
    """Add the options that say which guest is measured."""
    options: list[Decorator] = [
        size_option("--memory", "1G", "Guest memory: 4K, 2M, 64G, 1T ..."),
        size_option("--page", "4K", "Page size of the mappings: 4K, 2M or 1G."),
        click.option("--vcpus", type=int, default=2, show_default=True, metavar="N", help="vCPU threads."),
        click.option(
            "--profile",
            default="6.12",
            show_default=True,
            metavar="NAME[,SWITCH=VALUE]",
            help="Kernel profile: " + ", ".join(_names.catalogue()["profiles"]) + ".",
        ),
        click.option("--reps", type=int, default=1, show_default=True, metavar="N", help="Repetitions."),
        click.option(
            "--seed", type=int, metavar="S", help="Make the run repeatable; drawn and printed if absent."
        ),
        size_option("--max-memory", None, "Refuse to use more than this."),
    ]
    for decorate in reversed(options):
        body = decorate(body)
    return body


def zap_options(body: Command) -> Command:
    """Add the options that say how the teardown is done and watched."""
    options: list[Decorator] = [
        click.option(
            "--design",
            multiple=True,
            default=("all",),
            show_default=True,
            metavar="NAME",
            help="Zap design; "
            "repeat, or give a comma list: all, " + ", ".join(_names.catalogue()["designs"]) + ".",
        ),
        click.option(
            "--passes", metavar="LIST", help="Zap passes, such as 4K,2M,1G,root. Default: the design's."
        ),
        click.option("--ownership", metavar="WHO", help="Who owns a root's first reference: vcpu or mmu."),
        click.option(
            "--preempt",
            default="full",
            show_default=True,
            metavar="MODE",
            help="none, voluntary or full.",
        ),
        click.option(
            "--tick",
            default="4ms",
            show_default=True,
            metavar="TIME",
            help="CPU time until need_resched.",
        ),
        size_option("--working-set", None, "What each vCPU touches [64M]."),
        click.option("--arrival-ns", type=int, metavar="NS", help="Interval of a vCPU's accesses [20000]."),
        click.option("--populate", default="bulk", show_default=True, metavar="HOW", help="bulk or fault."),
        click.option("--writeback", metavar="HOW", help="A/D of removed leafs: none or bitmap [bitmap]."),
        click.option(
            "--ad-mix", metavar="MIX", help="A/D of the leafs at t0: clean, accessed or dirty [dirty]."
        ),
        click.option(
            "--check/--no-check", default=True, show_default=True, help="Verify in an untimed repetition."
        ),
        click.option("--drop-loop", type=int, metavar="N", help="Drops of small roots, bench drop [10000]."),
        click.option("--workers", type=int, metavar="N", help="Workers of designs with a queue [1]."),
    ]
    for decorate in reversed(options):
        body = decorate(body)
    return body


def measure(kind: str, out: Output, options: dict[str, Any]) -> int:
    """Run one experiment, show its result, and return the exit code."""
    from tdpmmu import bench as experiments
    from tdpmmu import results, table

    timeout = options.pop("timeout")
    drawn = options["seed"] is None
    if drawn:
        import secrets

        options["seed"] = secrets.randbits(31)
    text = json.dumps(experiments.config(**options))
    if drawn and not out.quiet:
        say(f"seed: {options['seed']}")
    if tdpmmu.build_info()["debug_assertions"]:
        say("warning: a debug build; its timings mean nothing")
    if len(os.sched_getaffinity(0)) < 2:
        say("warning: one CPU; whoever waits for a lock here waits for the CPU as well")
    render = table.render_bench if kind in ("zap", "drop") else table.render_micro
    from tdpmmu import _native

    try:
        with progress(out.quiet) as report:
            answer = _native.bench(kind, text, progress=report, timeout=experiments.check_timeout(timeout))
    except errors.OracleViolation as error:
        # What was measured until the check failed is shown where it is a whole document.
        partial = None
        if error.partial:
            with contextlib.suppress(errors.InvalidArgument):
                partial = results.load(error.partial, "the partial result")
        if partial is not None:
            out.emit(partial, render)
        raise
    out.emit(results.load(answer, "the result"), render)
    return 0


@bench.command("zap")
@machine_options
@zap_options
@common()
def bench_zap(out: Output, **options: Any) -> int:
    """A memslot update under running vCPUs: a fast zap of every root."""
    return measure("zap", out, options)


@bench.command("drop")
@machine_options
@zap_options
@common()
def bench_drop(out: Output, **options: Any) -> int:
    """A vCPU drops the last reference to its root: how long is it blocked?"""
    return measure("drop", out, options)


def _micro(name: str, text: str) -> None:
    @bench.command(name, help=text)
    @machine_options
    @common()
    def command(out: Output, **options: Any) -> int:
        return measure(name, out, options)


_micro("populate", "Mapping a guest, in bulk and through faults: ns per SPTE.")
_micro("fault", "One page fault through the complete path: ns.")
_micro("walk", "A lockless walk, dependent: ns.")
_micro("rcu", "An RCU read section, grace periods, deferred freeing: ns.")


@cli.command()
@click.argument("file", metavar="FILE")
@click.option("--check", is_flag=True, help="Verify every old value; exit 1 where one does not chain.")
@click.option("--strict", is_flag=True, help="A malformed line is an error. --check implies it.")
@click.option(
    "--profile", metavar="NAME[,SWITCH=VALUE]", help="Kernel profile; default: folder's name, or inferred."
)
@click.option("--vm-of", type=int, metavar="PID", help="Only the VM of this process.")
@common()
def replay(
    out: Output,
    file: str,
    check: bool,
    strict: bool,
    profile: str | None,
    vm_of: int | None,
    timeout: float | None,
) -> int:
    """Rebuild the tables of a recording of real KVM (ftrace, trace-cmd or perf text; - is stdin)."""
    from tdpmmu import recording, table

    with progress(out.quiet) as report:
        try:
            result = recording.replay(
                file,
                profile=profile,
                check=check,
                strict=strict,
                vm_of=vm_of,
                progress=report,
                timeout=timeout,
            )
        except errors.TdpMmuError:
            raise
        except OSError as error:
            raise BadInput(f"{file}: {error.strerror or error}") from error
    out.emit(result, table.render_replay)
    if result.ok:
        return 0
    say(f"check failed: {units.format_count(int(result.checked.get('mismatch', 0)))} old values do not chain")
    return 1


@cli.command()
@common(timeout=False)
def info(out: Output) -> int:
    """This host and this build: what a result depends on."""
    out.emit(_Info(tdpmmu.info()), _Info.render)
    return 0


class _Info:
    """What `info` prints, with the exports of a result."""

    def __init__(self, raw: dict[str, Any]) -> None:
        self.raw = raw

    def to_json(self, indent: int | None = None) -> str:
        return json.dumps(self.raw, indent=indent)

    def to_rows(self) -> list[dict[str, Any]]:
        from tdpmmu.results import flatten

        return [{"name": name, "value": value} for name, value in flatten(self.raw)]

    def to_arrow(self) -> Any:
        import pyarrow as pa

        rows = [{"name": row["name"], "value": str(row["value"])} for row in self.to_rows()]
        return pa.Table.from_pylist(rows)

    def render(self) -> str:
        rows = self.to_rows()
        width = max((len(row["name"]) for row in rows), default=0)
        return "".join(f"{row['name']:<{width}}  {row['value']}\n" for row in rows)


@cli.command()
@click.argument("result", type=click.Path(path_type=Path), metavar="RESULT.json")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, metavar="FILE", help=".svg .png .pdf"
)
@click.option("--force", is_flag=True, help="Overwrite FILE.")
@click.option("-q", "--quiet", is_flag=True, help="Say nothing on stderr but errors.")
@click.option("--debug", is_flag=True, help="Show a Python traceback of an error.")
def plot(result: Path, output: Path, force: bool, quiet: bool, debug: bool) -> int:
    """Draw a chart of what `bench -o RESULT.json` wrote."""
    del debug
    from tdpmmu import plot as drawing
    from tdpmmu import results

    kind = output.suffix.lower().lstrip(".")
    if kind not in drawing.FORMATS:
        raise click.UsageError(
            f"-o {output}: expected a suffix of {', '.join('.' + f for f in drawing.FORMATS)}"
        )
    check_free(output, force)
    try:
        text = result.read_bytes()
    except OSError as error:
        raise BadInput(f"{result}: {error.strerror}") from error
    try:
        loaded = results.load(text, str(result))
    except errors.InvalidArgument as error:
        raise BadInput(str(error)) from error
    write_file(output, drawing.draw(loaded, kind), force)
    if not quiet:
        say(f"wrote {output}")
    return 0
