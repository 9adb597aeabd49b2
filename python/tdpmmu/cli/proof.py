"""The commands that search: `explore`, `bugs`, `torture`, `explain`, `simulate`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tdpmmu import errors
from tdpmmu.cli.common import BadInput, common
from tdpmmu.cli.output import PICTURES, SUFFIXES, Output, progress, say, write_file

if TYPE_CHECKING:
    from tdpmmu.found import Story

__all__ = ["bugs", "explain", "explore", "simulate", "torture"]

_SEED = click.option("--seed", type=int, metavar="N", help="Repeats the run.")
_JOBS = click.option("--jobs", type=int, metavar="N", help="Threads that search; default: one per CPU.")
_PROFILE = click.option("--profile", metavar="NAME[,SWITCH=VALUE]", help="Kernel profile.")
_FAULTS = click.option(
    "--faults",
    multiple=True,
    metavar="KIND=VALUE",
    help="Faults to inject: alloc=7, alloc=every, cmpxchg=5%, yield=all, gp-delay=inf, worker=die, "
    "tlb-delay=200, pause=lockless, storm=64, ...",
)


@click.command()
@click.argument("protocol", required=False)
@click.option("--list", "listed", is_flag=True, help="Print the protocols instead.")
@click.option("--design", metavar="NAME", help="Zap design; default: the profile's.")
@_PROFILE
@click.option("--passes", metavar="LIST", help="Zap passes, such as 1G,root.")
@click.option("--ownership", type=click.Choice(["vcpu", "mmu"]), help="Owner of a root's first reference.")
@click.option("--schedules", type=int, metavar="N", help="How many to try.")
@click.option("--seconds", type=float, metavar="S", help="Stop after so long, whatever has been tried.")
@_SEED
@click.option("--memory", type=click.Choice(["mix", "sc", "tso"]), help="tso: with store buffers.")
@click.option(
    "--strategy",
    type=click.Choice(["mix", "random", "pct", "dfs", "targeted"]),
    help="How schedules are chosen.",
)
@click.option("--depth", type=int, metavar="D", help="pct: ordering constraints of the bugs to find.")
@click.option("--preemptions", type=int, metavar="N", help="dfs: switches that no thread asked for.")
@_JOBS
@_FAULTS
@click.option("--alloc-failures", is_flag=True, help="Instead: fail each allocation of one run in turn.")
@click.option("--bug", metavar="ID", help="Switch a bug of the museum on.")
@common()
def explore(
    out: Output,
    protocol: str | None,
    listed: bool,
    alloc_failures: bool,
    faults: tuple[str, ...],
    timeout: float | None,
    **options: Any,
) -> int:
    """Search a protocol's interleavings for one that breaks a rule; print the shortest found.

    PROTOCOL is a name (--list), or a .json file with a program of your own: machine, setup, threads. A
    violation is exit code 1, with the schedule that replays it.
    """
    from tdpmmu import found_table, proof

    if listed:
        known = proof.protocols()
        if out.as_json:
            rows = [{"name": p.name, "threads": p.threads, "about": p.about} for p in known]
            sys.stdout.write(json.dumps(rows) + "\n")
        else:
            sys.stdout.write(found_table.render_protocols(known))
        return 0
    if protocol is None:
        raise click.UsageError("missing PROTOCOL; --list prints those there are")
    program = _program(protocol)
    if alloc_failures:
        used = {"design", "profile", "seed"}
        extra = [name for name, value in options.items() if value is not None and name not in used]
        if extra or faults:
            raise click.UsageError(f"--alloc-failures takes no --{(extra or ['faults'])[0]}")
        with progress(out.quiet) as report:
            failed = proof.allocation_failures(
                program,
                **{name: options[name] for name in used},
                progress=report,
                timeout=timeout,
            )
        out.emit(failed, found_table.render_allocations)
        return 0 if failed.ok else 1
    with progress(out.quiet) as report:
        result = proof.explore(program, **options, faults=faults or None, progress=report, timeout=timeout)
    out.emit(result, found_table.render_exploration)
    if result.violation is None:
        return 0
    say(f"check failed: {result.violation.rule}")
    return 1


def _program(given: str) -> Any:
    if not given.endswith(".json"):
        return given
    try:
        program = json.loads(Path(given).read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"{given}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{given} is not JSON: {error}") from error
    if not isinstance(program, dict):
        raise BadInput(f"{given} is not a program: expected an object with machine, setup, threads")
    return program


@click.group()
def bugs() -> None:
    """The museum: bugs that were really in KVM, each of which can be switched on here and must be found."""


@bugs.command("list")
@common(timeout=False, suffixes=(".json", ".txt"))
def bugs_list(out: Output) -> int:
    """Print the bugs that can be switched on."""
    from tdpmmu import found_table, proof

    out.emit(_Catalogue(proof.exhibits()), lambda found: found_table.render_exhibits(found.bugs))
    return 0


@bugs.command("show")
@click.argument("bug", metavar="ID")
@common(timeout=False, suffixes=(".json", ".txt"))
def bugs_show(out: Output, bug: str) -> int:
    """Print what is known of one bug: its history, its cause, how it comes about."""
    from tdpmmu import found_table, proof

    known = proof.exhibits()
    shown = [one for one in known if one.id == bug or one.id.rstrip("abcdefgh") == bug]
    if not shown:
        raise errors.InvalidArgument(f"bug={bug!r}: expected one of {', '.join(one.id for one in known)}")
    out.emit(
        _Catalogue(shown), lambda found: "\n".join(found_table.render_exhibit(one) for one in found.bugs)
    )
    return 0


class _Catalogue:
    """Entries of the museum with the exports of a result."""

    def __init__(self, bugs: list[Any]) -> None:
        self.bugs = bugs

    def to_json(self, indent: int | None = None) -> str:
        return json.dumps(
            {"schema": "tdpmmu.museum/1", "bugs": [dict(bug.raw) for bug in self.bugs]}, indent=indent
        )


@bugs.command("demo")
@click.argument("bug", nargs=-1, metavar="ID...")
@click.option("--all", "every", is_flag=True, help="All of them.")
@click.option("--seeds", type=int, metavar="N", help="Searches per bug, of which the median counts.")
@click.option("--schedules", type=int, metavar="N", help="How many to try per search.")
@click.option("--story", is_flag=True, help="Tell each catch; a single bug is always told.")
@_SEED
@_JOBS
@common()
def bugs_demo(
    out: Output, bug: tuple[str, ...], every: bool, story: bool, timeout: float | None, **options: Any
) -> int:
    """Switch a bug on and search until an oracle fires; then show that nothing fires with it off.

    Exit code 1 where a bug was not found, or something fired without one.
    """
    from tdpmmu import found_table, proof

    if bool(bug) == every:
        raise click.UsageError("give bugs by their numbers, or --all")
    with progress(out.quiet) as report:
        result = proof.demo(
            None if every else bug, **options, story=story or None, progress=report, timeout=timeout
        )
    out.emit(result, found_table.render_museum)
    return 0 if result.ok else 1


@click.command()
@click.option("--seconds", type=float, default=10.0, show_default=True, help="How long.")
@_SEED
@click.option("--threads", type=int, metavar="N", help="Threads that act; default: a few per CPU.")
@_PROFILE
@click.option("--design", metavar="NAME", help="Zap design; default: the sound ones in turn.")
@_FAULTS
@common()
def torture(
    out: Output, seconds: float, faults: tuple[str, ...], timeout: float | None, **options: Any
) -> int:
    """Random operations from many real threads, under every oracle that can listen there.

    Exit code 1 when a rule was broken.
    """
    from tdpmmu import found_table, proof

    with progress(out.quiet) as report:
        result = proof.torture(seconds, **options, faults=faults or None, progress=report, timeout=timeout)
    out.emit(result, found_table.render_torture)
    return 0 if result.ok else 1


@click.command()
@click.argument("failure", metavar="FILE|SEED")
@common(suffixes=(".json", ".txt", ".html"))
def explain(out: Output, failure: str, timeout: float | None) -> int:
    """Tell a failure as a story: columns per thread, SPTE values, reference counts.

    FILE is a result of explore or bugs demo (.json); SEED the text that they print. -o FILE.html writes a
    page for a browser.
    """
    from tdpmmu import proof

    try:
        with progress(out.quiet) as report:
            story = proof.explain(failure, progress=report, timeout=timeout)
    except errors.InvalidArgument as error:
        if failure.lstrip().startswith("v1:"):
            raise
        raise BadInput(f"{failure}: {error}") from error
    except errors.TdpMmuError:
        raise
    except OSError as error:
        raise BadInput(f"{failure}: {error.strerror or error}") from error
    if out.path is not None and out.path.suffix.lower() == ".html":
        write_file(out.path, story.html.encode(), out.force)
        if not out.quiet:
            say(f"wrote {out.path}")
        sys.stdout.write(story.to_json() + "\n" if out.as_json else _told(story))
        return 0
    out.emit(story, _told)
    return 0


def _told(story: Story) -> str:
    return story.text.rstrip() + "\n"


@click.group()
def simulate() -> None:
    """Virtual time: hosts larger than this one."""


@simulate.command("zap")
@click.option("--vcpus", type=int, default=416, show_default=True, help="vCPUs of the guest.")
@click.option("--memory", default="12T", show_default=True, metavar="SIZE", help="Guest memory.")
@click.option("--page", default="4K", show_default=True, metavar="SIZE", help="4K, 2M or 1G.")
@click.option("--cpus", type=int, metavar="N", help="CPUs of the host; default: a few more than vCPUs.")
@click.option(
    "--design", default="sync", show_default=True, metavar="NAMES", help="Zap designs, by commas, or all."
)
@click.option("--passes", metavar="LIST", help="Zap passes, such as 1G,root; default: each design's.")
@click.option("--preempt", type=click.Choice(["none", "voluntary", "full"]), help="Preemption model.")
@_PROFILE
@click.option("--ownership", type=click.Choice(["vcpu", "mmu"]), help="Owner of a root's first reference.")
@click.option("--workers", type=int, metavar="N", help="Workers of designs that have a queue.")
@_SEED
@click.option(
    "--cost", "costs", multiple=True, metavar="NAME=NS", help="A price instead of the calibrated one."
)
@click.option(
    "--error-sizes",
    metavar="SIZES",
    help="Also zap guests of these sizes for real, such as 1G,4G,16G, and print how far off the model is.",
)
@click.option("--error-reps", type=int, metavar="N", help="Repetitions of each of these.")
@common(suffixes=(*SUFFIXES, *PICTURES))
def simulate_zap(
    out: Output,
    design: str,
    costs: tuple[str, ...],
    error_sizes: str | None,
    timeout: float | None,
    **options: Any,
) -> int:
    """A memslot update under running vCPUs, in virtual time: as many vCPUs and CPUs as you like."""
    from tdpmmu import found_table, proof

    with progress(out.quiet) as report:
        result = proof.simulate(
            **options,
            designs=[name.strip() for name in design.split(",")],
            costs=dict(map(_price, costs)) or None,
            error_sizes=[size.strip() for size in error_sizes.split(",")] if error_sizes else (),
            progress=report,
            timeout=timeout,
        )
    out.emit(result, found_table.render_simulation)
    return 0


def _price(text: str) -> tuple[str, float]:
    name, _, ns = text.partition("=")
    try:
        return name, float(ns)
    except ValueError:
        raise click.UsageError(f"--cost {text}: expected NAME=NS") from None
