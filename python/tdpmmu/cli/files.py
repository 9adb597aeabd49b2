"""The commands that read files: `replay`, `plot`, `compare`."""

from __future__ import annotations

from pathlib import Path

import click

from tdpmmu import errors, units
from tdpmmu.cli.common import BadInput, common, load_input
from tdpmmu.cli.output import Output, check_free, progress, say, write_file
from tdpmmu.comparison import FACTOR, THRESHOLD

__all__ = ["compare", "plot", "replay"]


@click.command()
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
    if check and not result.events:
        raise BadInput(f"{file}: no kvmmmu events, so there is nothing that --check could verify")
    out.emit(result, table.render_replay)
    if result.ok:
        return 0
    say(f"check failed: {units.format_count(int(result.checked.get('mismatch', 0)))} old values do not chain")
    return 1


@click.command()
@click.argument("result", type=click.Path(path_type=Path), metavar="RESULT")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, metavar="FILE", help=".svg .png .pdf"
)
@click.option(
    "--kind",
    default="bars",
    show_default=True,
    metavar="KIND",
    help="bars, percentiles, timeline, scaling, attribution or backlog.",
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
    kind: str,
    field: str | None,
    scene: str | None,
    design: str | None,
    force: bool,
    quiet: bool,
    debug: bool,
) -> int:
    """Draw a chart of what `bench -o RESULT.json` (or .parquet) wrote.

    \b
    bars          what a KVM engineer compares, a group a design
    percentiles   a whole distribution, a curve a design (HdrHistogram's axis)
    timeline      a track a thread: what it did, which lock it held (bench --timeline)
    scaling       zap-64t: the sizes that were built, the line, the extrapolated point
    attribution   where each thread's time went, and who paid
    backlog       table pages that wait for a grace period, over time
    """
    del debug
    from tdpmmu import plot as drawing

    suffix = output.suffix.lower().lstrip(".")
    if suffix not in drawing.FORMATS:
        raise click.UsageError(
            f"-o {output}: expected a suffix of {', '.join('.' + f for f in drawing.FORMATS)}"
        )
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
