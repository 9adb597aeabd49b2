"""`conform`: the engine held against recordings of real KVM."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from tdpmmu import errors, units
from tdpmmu.cli.common import BadInput, common
from tdpmmu.cli.output import Output, progress, say, write_file

__all__ = ["conform"]


@click.command()
@click.argument("folders", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="DIR...")
@click.option(
    "--profile",
    metavar="NAME[,SWITCH=VALUE]",
    help="Kernel profile; default: the name of the folder above each recording.",
)
@click.option(
    "--predict", is_flag=True, help="Only say what the engine does; nothing is compared. One recording."
)
@click.option(
    "--blank",
    type=click.Path(path_type=Path),
    metavar="OUT",
    help="Copy one recording to the folder OUT without what a prediction must not need, and stop.",
)
@common()
def conform(
    out: Output,
    folders: tuple[Path, ...],
    profile: str | None,
    predict: bool,
    blank: Path | None,
    timeout: float | None,
) -> int:
    """Run recordings' operations through the engine and compare every SPTE transition with what KVM did.

    DIR holds trace.txt.gz, script.json and params.txt, or folders that do. Taken from it are operations, the
    host's answers and the order of events; every value is computed. Exit 1 when something differs: the first
    differences are shown with both sequences. A recording without a script is refused (exit 3) after the
    others have run.
    """
    if (predict or blank is not None) and len(folders) != 1:
        raise click.UsageError("--predict and --blank take one recording")
    if predict and blank is not None:
        raise click.UsageError("--predict and --blank: give one of the two")
    if predict and out.path is not None and out.path.suffix.lower() != ".json":
        raise click.UsageError(f"-o {out.path}: a prediction is written as .json")
    try:
        return _run(out, folders, profile, predict, blank, timeout)
    except errors.TdpMmuError:
        raise
    except OSError as error:
        if blank is not None and error.filename and Path(error.filename).is_relative_to(blank):
            raise
        raise BadInput(f"{error.filename or folders[0]}: {error.strerror or error}") from error


def _run(
    out: Output,
    folders: tuple[Path, ...],
    profile: str | None,
    predict: bool,
    blank: Path | None,
    timeout: float | None,
) -> int:
    from tdpmmu import recorded_table, recording

    if blank is not None:
        if blank.exists() and (not blank.is_dir() or any(blank.iterdir())):
            raise click.UsageError(f"{blank} exists and is not an empty folder")
        recording.blank(folders[0], blank)
        if not out.quiet:
            say(f"wrote {blank}")
        return 0
    if predict:
        with progress(out.quiet) as report:
            found = recording.predict(folders[0], profile=profile, progress=report, timeout=timeout)
        text = json.dumps(found, indent=1) + "\n"
        if out.path is not None:
            write_file(out.path, text.encode(), out.force)
            if not out.quiet:
                say(f"wrote {out.path}")
        if out.as_json or out.path is None:
            sys.stdout.write(text)
        return 0
    scripted, bare = recording.recordings_in(folders)
    for folder in bare:
        say(f"note: {folder} has no script.json; replay --check can verify it")
    refused = [folder for folder in scripted if folder.is_dir() and not (folder / "script.json").exists()]
    if len(refused) < len(scripted):
        scripted = [folder for folder in scripted if folder not in refused]
    with progress(out.quiet) as report:
        result = recording.conform(scripted, profile=profile, progress=report, timeout=timeout)
    out.emit(result, recorded_table.render_conform)
    for folder in refused:
        say(f"error: {folder}: script.json is missing; a recording without its script cannot be predicted")
    if result.ok:
        return 3 if refused else 0
    wrong = [case for case in result.cases if not case.ok]
    say(
        f"check failed: {units.format_count(len(wrong))} of {units.format_count(len(result.cases))} "
        "recordings differ"
    )
    return 1
