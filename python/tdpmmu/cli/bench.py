"""`tdpmmu bench`: its options, and how a measurement is run. Heavy imports wait: `--help` stays quick."""

from __future__ import annotations

import contextlib
import functools
import os
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

import tdpmmu
from tdpmmu import _names, errors
from tdpmmu.cli.common import Command, Decorator, common
from tdpmmu.cli.output import PICTURES, RECORDINGS, SUFFIXES, Output, check_free, place_file, progress, say

__all__ = ["bench"]

_MOST_CPUS = 8192  # Linux's largest CONFIG_NR_CPUS


def catalogue_help(*experiments: str) -> str:
    """Return the designs, and the scenes of experiments, a line each, for the end of a help text."""
    rows = []
    for heading, infos in _names.design_groups():
        rows.append((heading, ""))
        rows += [(f"  {_names.marked(info['name'])}", info["mainline"]) for info in infos]
    for experiment in experiments:
        rows.append((f"Scenes of bench {experiment}, its usual one first:", ""))
        for name, summary in _names.scene_summaries(experiment):
            rows.append((f"  {name}", summary))
    return _two_columns(rows)


def reclaim_help() -> str:
    """Return the ways to keep zapped shadow pages for lockless walkers, a line each."""
    infos = _names.catalogue()["reclaim_info"]
    return _two_columns([(f"  {info['name']}", info["summary"]) for info in infos])


def _two_columns(rows: list[tuple[str, str]]) -> str:
    width = max((len(name) for name, summary in rows if summary), default=0) + 2
    lines = []
    for name, summary in rows:
        first, *rest = textwrap.wrap(summary, 78 - width) or [""]
        lines.append(f"{name:<{width}}{first}".rstrip())
        lines += [" " * width + more for more in rest]
    return "\b\n" + "\n".join(lines)


@click.group(epilog=catalogue_help("zap", "drop"))
def bench() -> None:
    """Measure zap designs and single operations.

    The table of zap and drop fits a terminal; --wide shows every column, --json and -o have every field.
    """


def size_option(flag: str, default: str | None, text: str) -> Decorator:
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
            help="Zap design; repeat, or give a comma list; all is every sound one of the TDP MMU, shadow "
            "every one of the shadow MMU. See below.",
        ),
        click.option(
            "--scene",
            multiple=True,
            metavar="NAME",
            help="What happens to the guest; repeat, or give a comma list, or all. See below. [the first]",
        ),
        click.option(
            "--passes",
            multiple=True,
            metavar="LIST",
            help="Zap passes, such as 4K,2M,1G,root; repeat for a run each. Default: the design's.",
        ),
        click.option("--ownership", metavar="WHO", help="Who owns a root's first reference: vcpu or mmu."),
        click.option(
            "--preempt",
            multiple=True,
            default=("full",),
            show_default=True,
            metavar="MODE",
            help="none, voluntary or full; repeat, or give a comma list.",
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
        click.option("--worker-cpus", metavar="LIST", help="CPUs for the workers: 0,1 or 0-3 [any]."),
        click.option(
            "--worker-queue", metavar="KIND", help="per-vm, or system (shared by all VMs) [the design's]."
        ),
        click.option("--vcpu-cpus", metavar="LIST", help="CPUs for the vCPUs: 0,1 or 0-3 [any]."),
        click.option(
            "--sharing", metavar="HOW", help="vCPUs' working sets: local, pipeline or global [local]."
        ),
        click.option("--churns", type=int, metavar="N", help="Cycles of slot-churn [100]."),
        click.option(
            "--paging", metavar="HOW", help="Shadow designs: direct, or guest (its own tables) [direct]."
        ),
        click.option(
            "--quota", type=int, metavar="N", help="Shadow designs: most shadow pages of the VM [no limit]."
        ),
        click.option(
            "--reclaim",
            multiple=True,
            metavar="KIND",
            help="Shadow designs: how pages are kept for lockless walkers; repeat, or a comma list, or "
            "all [ipi].",
        ),
        click.option("--timeline", is_flag=True, help="Keep each thread's phases, for plot --kind timeline."),
        click.option(
            "--perfetto",
            type=click.Path(path_type=Path),
            metavar="FILE",
            help="Write a Perfetto trace: opens in ui.perfetto.dev.",
        ),
        click.option(
            "--hlog", type=click.Path(path_type=Path), metavar="FILE", help="Write HdrHistogram logs."
        ),
        click.option(
            "--wide", is_flag=True, help="The table with every column; --json and -o have everything anyway."
        ),
    ]
    for decorate in reversed(options):
        body = decorate(body)
    return body


def measure(kind: str, out: Output, options: dict[str, Any]) -> int:
    """Run one experiment, show its result, and return the exit code."""
    from tdpmmu import bench as experiments
    from tdpmmu import results

    timeout, wide = options.pop("timeout"), options.pop("wide", False)
    drawn = options["seed"] is None
    if drawn:
        import secrets

        options["seed"] = secrets.randbits(31)
    for name in ("scene", "passes", "protocol", "eager", "reclaim"):
        if name in options:
            options[name] = options[name] or None
    if "density" in options:
        options["density"] = densities(options["density"]) or None
    for name in ("worker_cpus", "vcpu_cpus"):
        if options.get(name) is not None:
            options[name] = cpu_list(options[name], name)
    exports = Exports(out, options)
    request = experiments.config(**options, experiment=kind)
    if drawn and not out.quiet:
        say(f"seed: {options['seed']}")
    if tdpmmu.build_info()["debug_assertions"]:
        say("warning: a debug build; its timings mean nothing")
    if len(os.sched_getaffinity(0)) < 2:
        say("warning: one CPU; whoever waits for a lock here waits for the CPU as well")
    for name in request["designs"]:
        if name in _names.flawed():
            say(f"note: {_names.marked(name)}: its violations are the result, not an error")
    render = renderer(kind, wide)
    with exports:
        try:
            with progress(out.quiet) as report:
                answer = experiments.measure(kind, request, progress=report, timeout=timeout)
        except errors.OracleViolation as error:
            # What was measured until the check failed is shown where it is a whole document.
            partial = None
            if error.partial:
                with contextlib.suppress(errors.InvalidArgument):
                    partial = results.load(error.partial, "the partial result")
            if partial is not None:
                out.emit(partial, render)
            raise
        exports.place(answer)
        out.emit(results.typed(answer, "the result"), render)
    return 0


def renderer(kind: str, wide: bool) -> Callable[[Any], str]:
    """Return what makes an experiment's result a table."""
    from tdpmmu import dirty, reclaim_table, table

    if kind in ("zap", "drop"):
        return functools.partial(table.render_bench, wide=wide)
    if kind == "walk":
        return reclaim_table.render
    return functools.partial(dirty.render, wide=wide) if kind == "dirty" else table.render_micro


def densities(texts: tuple[str, ...]) -> list[int]:
    """Return the counts of `1` and `8,512`.

    Raises:
        InvalidArgument: not a count.
    """
    found = [part.strip() for text in texts for part in text.split(",")]
    for part in found:
        if not (part.isascii() and part.isdecimal()):
            raise errors.InvalidArgument(f"density={part!r}: expected a count, such as 8 for one page in 8")
    return [int(part) for part in found]


def cpu_list(text: str, name: str) -> list[int]:
    """Return the CPUs of `0,2-3`."""
    cpus: list[int] = []
    for part in text.split(","):
        low, dash, high = part.strip().partition("-")
        if not (low.isascii() and low.isdecimal()) or (dash and not (high.isascii() and high.isdecimal())):
            raise errors.InvalidArgument(f"{name}={text!r}: expected CPU numbers such as 0,1 or 0-3")
        first, last = int(low), int(high or low)
        if not first <= last < _MOST_CPUS:
            raise errors.InvalidArgument(
                f"{name}={text!r}: a range of CPUs ascends, and ends below {_MOST_CPUS:,}"
            )
        cpus.extend(range(first, last + 1))
    return cpus


class Exports:
    """The files that the native part writes by itself: beside their place first, moved there at the end."""

    def __init__(self, out: Output, options: dict[str, Any]) -> None:
        self.out = out
        self.moves: list[tuple[str, Path, Path]] = []
        named = {name: options.get(name) for name in ("perfetto", "hlog")}
        if out.path is not None and out.path.suffix.lower() in RECORDINGS:
            name = RECORDINGS[out.path.suffix.lower()]
            if named[name] is not None:
                raise click.UsageError(f"-o {out.path} and --{name} {named[name]}: give one of the two")
            named[name] = out.path
        recorded = out.path is not None and out.path.suffix.lower() in RECORDINGS
        own = None if recorded else out.path
        places = [path.resolve() for path in (*named.values(), own) if path is not None]
        if len(places) > len(set(places)):
            raise click.UsageError("-o, --perfetto and --hlog write a file each: give each its own name")
        for name, path in named.items():
            if path is not None:
                check_free(path, out.force)
                draft = path.with_name(f".{path.name}.{os.getpid()}")
                options[name] = draft
                self.moves.append((name, draft, path))

    def __enter__(self) -> Exports:
        return self

    def place(self, answer: dict[str, Any]) -> None:
        """Move the drafts to their places, and let the result name those."""
        for name, draft, path in self.moves:
            answer["config"][name] = str(path)
            place_file(draft, path, self.out.force)
            if not self.out.quiet:
                say(f"wrote {path}")

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        for _, draft, _ in self.moves:
            draft.unlink(missing_ok=True)
        for _, draft, path in self.moves:
            # A full disk is no bad argument, and the draft's name is nobody's business.
            if isinstance(error, errors.InvalidArgument) and str(error).startswith(f"{draft}: "):
                raise OSError(str(error).replace(str(draft), str(path), 1)) from error


@bench.command("zap", epilog=catalogue_help("zap"))
@machine_options
@zap_options
@common(suffixes=(*SUFFIXES, *PICTURES, *RECORDINGS))
def bench_zap(out: Output, **options: Any) -> int:
    """A memslot update under running vCPUs: a fast zap of every root."""
    return measure("zap", out, options)


@bench.command("drop", epilog=catalogue_help("drop"))
@machine_options
@zap_options
@common(suffixes=(*SUFFIXES, *PICTURES, *RECORDINGS))
def bench_drop(out: Output, **options: Any) -> int:
    """A vCPU drops the last reference to its root: how long is it blocked?"""
    return measure("drop", out, options)


def mmu_options(body: Command) -> Command:
    """Add the options that choose the MMU for a single operation."""
    design = click.option(
        "--design",
        default="all",
        metavar="NAME",
        help="A design of the shadow MMU, such as shadow-gen, to measure that one instead of the TDP MMU.",
    )
    paging = click.option(
        "--paging", metavar="HOW", help="Shadow designs: direct, or guest (its own tables) [direct]."
    )
    return design(paging(body))


def _micro(name: str, text: str, choose: Decorator) -> None:
    @bench.command(name, help=text)
    @machine_options
    @choose
    @common()
    def command(out: Output, **options: Any) -> int:
        return measure(name, out, options)


_micro("populate", "Mapping a guest, in bulk and through faults: ns per SPTE.", mmu_options)
_micro("fault", "One page fault through the complete path: ns.", mmu_options)
_micro("rcu", "An RCU read section, grace periods, deferred freeing: ns.", lambda body: body)


@bench.command("walk", epilog=reclaim_help())
@machine_options
@click.option(
    "--reclaim",
    multiple=True,
    metavar="KIND",
    help="Instead: what keeps zapped shadow pages for lockless walkers, and its price; repeat, or give a "
    "comma list, or all. See below.",
)
@common(suffixes=(*SUFFIXES, *PICTURES))
def bench_walk(out: Output, **options: Any) -> int:
    """A lockless walk, dependent: ns. Or what each way to keep pages for walkers costs whom."""
    return measure("walk", out, options)


@bench.command("dirty")
@machine_options
@click.option(
    "--protocol",
    multiple=True,
    metavar="NAME",
    help="How written pages are found: get, clear-64, clear, init-set, ring, d-bits; repeat, or give a comma "
    "list. [all]",
)
@click.option(
    "--eager", multiple=True, metavar="HOW", help="Split huge pages ahead: on, off, or on,off. [both]"
)
@click.option(
    "--density", multiple=True, metavar="N", help="One page in N is written; or a comma list. [1,8,512]"
)
@click.option("--wide", is_flag=True, help="Every row with its limit as well.")
@common(suffixes=(*SUFFIXES, *PICTURES))
def bench_dirty(out: Output, **options: Any) -> int:
    """Dirty logging, phase by phase: enable, write, harvest, disable; eager split on and off."""
    return measure("dirty", out, options)
