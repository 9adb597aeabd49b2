"""`tdpmmu versus`: the TDP MMU against the shadow MMU, the same guests in one process."""

from __future__ import annotations

import os
from pathlib import Path

import click

import tdpmmu
from tdpmmu.cli.common import common
from tdpmmu.cli.files import own_places, picture_format, wrote
from tdpmmu.cli.output import PICTURES, SUFFIXES, Output, progress, say, write_file

__all__ = ["versus"]


@click.command()
@click.option(
    "--memory",
    multiple=True,
    default=("1G,4G",),
    show_default=True,
    metavar="SIZE",
    help="Guest sizes, such as 4G,16G,64G; repeat, or give a comma list.",
)
@click.option(
    "--vcpus",
    multiple=True,
    default=("1,2",),
    show_default=True,
    metavar="N",
    help="Numbers of vCPUs, each with each size; repeat, or give a comma list.",
)
@click.option("--page", default="4K", show_default=True, metavar="SIZE", help="4K, 2M or 1G.")
@click.option(
    "--reps",
    type=int,
    default=3,
    show_default=True,
    metavar="N",
    help="Repetitions, in turns; medians count.",
)
@click.option(
    "--profile", default="6.12", show_default=True, metavar="NAME[,SWITCH=VALUE]", help="Kernel profile."
)
@click.option("--seed", type=int, metavar="S", help="Make the run repeatable; drawn and printed if absent.")
@click.option("--max-memory", metavar="SIZE", help="Refuse to use more than this.")
@click.option(
    "--plot",
    "picture",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Draw it: cost of a zap, memory, faults, by guest size and vCPUs: .svg .png .pdf",
)
@common(suffixes=(*SUFFIXES, *PICTURES))
def versus(
    out: Output,
    memory: tuple[str, ...],
    vcpus: tuple[str, ...],
    page: str,
    reps: int,
    profile: str,
    seed: int | None,
    max_memory: str | None,
    picture: Path | None,
    timeout: float | None,
) -> int:
    """TDP MMU against shadow MMU for the same guests: memory, faults, what a zap of everything costs.

    \b
    tdp            the TDP MMU
    shadow-direct  the shadow MMU, guest addresses translated by hardware (tdp_mmu=N)
    shadow-guest   the shadow MMU without two-dimensional paging: the guest's own tables are shadowed

    The zap is a memslot update under running vCPUs. Below the table: by how much each measure grows from the
    smallest guest to the largest.
    """
    from tdpmmu import mmus, mmus_table

    own_places(out, plot=picture)
    if picture is not None:
        picture_format(picture, "--plot")
    drawn = seed is None
    if seed is None:
        import secrets

        seed = secrets.randbits(31)
    config = mmus.versus_config(
        memory=_parts(memory),
        vcpus=[_count(part) for part in _parts(vcpus)],
        page=page,
        reps=reps,
        profile=profile,
        seed=seed,
        max_memory=max_memory,
    )
    if drawn and not out.quiet:
        say(f"seed: {seed}")
    if tdpmmu.build_info()["debug_assertions"]:
        say("warning: a debug build; its timings mean nothing")
    cpus = len(os.sched_getaffinity(0))
    if max(config["vcpus"]) >= cpus:
        most = max(config["vcpus"])
        say(f"note: {most} vCPUs and who zaps, on {cpus} CPUs: times contain the host's scheduling")
    with progress(out.quiet) as report:
        result = mmus.measure(config, progress=report, timeout=timeout)
    if picture is not None:
        from tdpmmu import plot

        write_file(picture, plot.draw(result, picture.suffix.lower()[1:]), out.force)
        wrote(out, picture)
    out.emit(result, mmus_table.render_versus)
    return 0


def _parts(texts: tuple[str, ...]) -> list[str]:
    return [part.strip() for text in texts for part in text.split(",")]


def _count(text: str) -> int:
    if not (text.isascii() and text.isdecimal()):
        raise tdpmmu.InvalidArgument(f"vcpus={text!r}: expected numbers such as 1,2,4")
    return int(text)
