"""The commands that read files: `replay`, `plot`, `compare`."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tdpmmu import errors, units
from tdpmmu.cli.common import BadInput, common, load_input
from tdpmmu.cli.output import Output, check_free, place_file, progress, say, write_file
from tdpmmu.comparison import FACTOR, THRESHOLD

if TYPE_CHECKING:
    from tdpmmu.recorded import Replay

__all__ = ["compare", "own_places", "picture_format", "plot", "replay", "wrote"]


@click.command()
@click.argument("file", metavar="FILE")
@click.option("--check", is_flag=True, help="Verify every old value; exit 1 where one does not chain.")
@click.option("--strict", is_flag=True, help="A malformed line is an error. --check implies it.")
@click.option(
    "--profile", metavar="NAME[,SWITCH=VALUE]", help="Kernel profile; default: folder's name, or inferred."
)
@click.option("--vm-of", type=int, metavar="PID", help="Only the VM of this process.")
@click.option(
    "--what-if",
    metavar="DESIGN",
    help="Run the recorded zaps through this design, here, and tell whom they would have blocked.",
)
@click.option(
    "--plot",
    "picture",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Draw what was mapped when, the zaps and their causes: .svg .png .pdf",
)
@click.option(
    "--perfetto",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write a Perfetto trace: opens in ui.perfetto.dev.",
)
@common()
def replay(
    out: Output,
    file: str,
    check: bool,
    strict: bool,
    profile: str | None,
    vm_of: int | None,
    what_if: str | None,
    picture: Path | None,
    perfetto: Path | None,
    timeout: float | None,
) -> int:
    """Rebuild the tables of a recording of real KVM (trace.dat, or text; - is stdin).

    Shows what was mapped when, who zapped and for how long, storms of zaps, faults by kind, the longest
    operations; --check holds every old value against the rebuilt tables. `tdpmmu record-help` tells how to
    record.
    """
    from tdpmmu import recorded_table

    own_places(out, plot=picture, perfetto=perfetto)
    if picture is not None:
        picture_format(picture, "--plot")
    draft = None if perfetto is None else perfetto.with_name(f".{perfetto.name}.{os.getpid()}")
    with contextlib.ExitStack() as stack:
        if draft is not None:
            stack.callback(draft.unlink, missing_ok=True)
        result = _replay(out, file, profile, check, strict, vm_of, what_if, draft, timeout)
        if check and not result.events:
            raise BadInput(f"{file}: no kvmmmu events, so there is nothing that --check could verify")
        if draft is not None and perfetto is not None:
            place_file(draft, perfetto, out.force)
            wrote(out, perfetto)
    if picture is not None:
        from tdpmmu import plot as drawing

        write_file(picture, drawing.draw(result, picture.suffix.lower()[1:]), out.force)
        wrote(out, picture)
    out.emit(result, recorded_table.render_replay)
    if result.ok:
        return 0
    say(f"check failed: {units.format_count(int(result.checked.get('mismatch', 0)))} old values do not chain")
    return 1


def _replay(
    out: Output,
    file: str,
    profile: str | None,
    check: bool,
    strict: bool,
    vm_of: int | None,
    what_if: str | None,
    perfetto: Path | None,
    timeout: float | None,
) -> Replay:
    from tdpmmu import recording

    with progress(out.quiet) as report:
        try:
            return recording.replay(
                file,
                profile=profile,
                check=check,
                strict=strict,
                vm_of=vm_of,
                what_if=what_if,
                perfetto=perfetto,
                progress=report,
                timeout=timeout,
            )
        except errors.TdpMmuError:
            raise
        except OSError as error:
            # The output is no input: a full disk under it is no bad recording.
            if perfetto is not None and str(error.filename) == str(perfetto):
                raise
            raise BadInput(f"{file}: {error.strerror or error}") from error


def own_places(out: Output, **places: Path | None) -> None:
    """Refuse files that exist, and one name for two outputs."""
    named = [path for path in (out.path, *places.values()) if path is not None]
    if len({path.resolve() for path in named}) < len(named):
        raise click.UsageError(f"-o, --{' and --'.join(places)} write a file each: give each its own name")
    for path in places.values():
        if path is not None:
            check_free(path, out.force)


def picture_format(path: Path, option: str) -> str:
    """Return the format that a picture's suffix names."""
    from tdpmmu import plot as drawing

    suffix = path.suffix.lower().lstrip(".")
    if suffix not in drawing.FORMATS:
        known = ", ".join("." + f for f in drawing.FORMATS)
        raise click.UsageError(f"{option} {path}: expected a suffix of {known}")
    return suffix


def wrote(out: Output, path: Path) -> None:
    """Say that a file was written."""
    if not out.quiet:
        say(f"wrote {path}")


@click.command()
@click.argument("result", type=click.Path(path_type=Path), metavar="RESULT")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, metavar="FILE", help=".svg .png .pdf"
)
@click.option(
    "--kind",
    metavar="KIND",
    help="bars, percentiles, timeline, scaling, attribution, backlog or retained; of a replay recording, "
    "pages, causes or storms [the first].",
)
@click.option("--field", metavar="NAME", help="percentiles: which distribution [the experiment's own].")
@click.option("--scene", metavar="NAME", help="Only the runs of this scene [the first that can be drawn].")
@click.option("--design", metavar="NAME,...", help="Only the runs of these designs.")
@click.option("--force", is_flag=True, help="Overwrite FILE.")
@click.option("-q", "--quiet", is_flag=True, help="Say nothing on stderr but errors.")
@click.option("--debug", is_flag=True, help="Show a Python traceback of an error.")
def plot(
    result: Path,
    output: Path,
    kind: str | None,
    field: str | None,
    scene: str | None,
    design: str | None,
    force: bool,
    quiet: bool,
    debug: bool,
) -> int:
    """Draw a chart of what `bench -o RESULT.json` (or .parquet) or `replay -o RESULT.json` wrote.

    \b
    bars          what a KVM engineer compares, a group a design
    percentiles   a whole distribution, a curve a design (HdrHistogram's axis)
    timeline      a track a thread: what it did, which lock it held (bench --timeline)
    scaling       zap-64t: the sizes that were built, the line, the extrapolated point
    attribution   where each thread's time went, and who paid
    backlog       table pages that wait for a grace period, over time
    retained      shadow pages that are obsolete and still in memory, over time
    \b
    recording     a replay: the next three on a page
    pages         what was mapped when, by leaf size, and the memory of the tables
    causes        who zapped, how often and for how long
    storms        each zap at its time and length, storms shaded
    """
    del debug
    from tdpmmu import plot as drawing

    suffix = picture_format(output, "-o")
    check_free(output, force)
    designs = None if design is None else [part.strip() for part in design.split(",")]
    picture = drawing.draw(load_input(result), suffix, kind=kind, field=field, scene=scene, designs=designs)
    write_file(output, picture, force)
    if not quiet:
        say(f"wrote {output}")
    return 0


@click.command()
@click.argument("a", type=click.Path(path_type=Path), metavar="A")
@click.argument("b", type=click.Path(path_type=Path), metavar="B")
@click.option(
    "--threshold",
    type=float,
    default=THRESHOLD,
    show_default=True,
    metavar="PART",
    help="Worse: the ratio lies above 1 + PART beyond doubt.",
)
@click.option(
    "--factor",
    type=float,
    default=FACTOR,
    show_default=True,
    metavar="F",
    help="With fewer than 3 repetitions on a side: a headline figure is worse above F.",
)
@click.option(
    "--per-limit", is_flag=True, help="Divide times by --limit of the same file: for results of two hosts."
)
@click.option("--limit", default="swap_ns", show_default=True, metavar="NAME", help="Which limit.")
@click.option("--all", "everything", is_flag=True, help="Show the rows that do not differ, too.")
@common(timeout=False)
def compare(
    out: Output,
    a: Path,
    b: Path,
    threshold: float,
    factor: float,
    per_limit: bool,
    limit: str,
    everything: bool,
) -> int:
    """Hold result B against result A, run by run; exit 1 when something is worse.

    Ratios are of geometric means over the repetitions, B over A, with 95 % intervals (Welch's t on
    logarithms). Everything compared is better when it is lower. What is worse is Holm-corrected: of 20
    comparisons of equals, one has a row that is worse by chance. With fewer than 3 repetitions only the
    headline figures are judged, by a plain factor.
    """
    from tdpmmu import comparison, table

    for path in (a, b):
        load_input(path)
    found = comparison.compare(
        a, b, threshold=threshold, factor=factor, per_limit=limit if per_limit else None
    )
    if not out.quiet:
        for note in found.notes:
            say(f"note: {note}")
    out.emit(found, lambda result: table.render_comparison(result, everything))
    if not found.worse:
        return 0
    say(f"worse: {units.format_count(len(found.worse))} of {units.format_count(len(found.rows))} rows")
    return 1
