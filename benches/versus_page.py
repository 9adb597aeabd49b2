"""Measures what docs/tdp-against-shadow.md shows, and puts it there: four tables and two pictures.

    python benches/versus_page.py                          # 4, 16 and 64 GiB, on a quiet machine
    python benches/versus_page.py --memory 1G,4G --reps 1  # a rehearsal
    python benches/versus_page.py --only versus            # one block of the page
    python benches/versus_page.py --from results/versus    # the page again, from results that are there

Needs an installed release build of tdpmmu with the extra `plot`. Results are kept as JSON in `--results`;
what stands in the page between `<!-- NAME -->` and `<!-- end of NAME -->` is replaced.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "tdp-against-shadow.md"
IMAGES = ROOT / "docs" / "img"
DESIGNS = "shadow-walk,shadow-gen,shadow-gen-kept,sync,async-worker"


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    asked.add_argument("--memory", default="4G,16G,64G", help="guest sizes [%(default)s]")
    asked.add_argument("--vcpus", default="1,2", help="numbers of vCPUs [%(default)s]")
    asked.add_argument("--reps", type=int, default=3, help="repetitions [%(default)s]")
    asked.add_argument("--seed", type=int, default=1, help="of the guests' accesses [%(default)s]")
    asked.add_argument(
        "--results", type=Path, default=ROOT / "results" / "versus", help="where results are kept"
    )
    asked.add_argument("--from", dest="old", type=Path, help="take results from here instead of measuring")
    asked.add_argument("--only", choices=["versus", "zap", "churn", "reclaim"], help="one block")
    given = asked.parse_args()
    folder = given.old or given.results
    folder.mkdir(parents=True, exist_ok=True)
    for name, commands in plan(given).items():
        if given.only in (None, name):
            block = []
            for label, command in commands:
                path = folder / f"{label}.json"
                if given.old is None:
                    run([*command, "--seed", str(given.seed), "-o", str(path), "--force"])
                block.append((command, path))
            write(name, block)
    pictures(folder)


def plan(given: argparse.Namespace) -> dict[str, list[tuple[str, list[str]]]]:
    """Return the commands behind each block of the page, each with the name of its result."""
    reps = ["--reps", str(given.reps)]
    sizes = given.memory.split(",")
    most = given.vcpus.split(",")[-1]
    zap = ["bench", "zap", "--design", DESIGNS, "--vcpus", most, *reps]
    return {
        "versus": [("versus", ["versus", "--memory", given.memory, "--vcpus", given.vcpus, *reps])],
        "zap": [(f"zap-{size}", [*zap, "--memory", size]) for size in sizes],
        "churn": [
            (
                "churn",
                ["bench", "zap", "--scene", "slot-churn-2013", "--design", "shadow-walk,shadow-gen", *reps],
            )
        ],
        "reclaim": [("reclaim", ["bench", "walk", "--reclaim", "all", "--memory", "1G"])],
    }


def run(command: list[str]) -> None:
    print("tdpmmu " + " ".join(command), file=sys.stderr, flush=True)
    subprocess.run([sys.executable, "-m", "tdpmmu", *command], stdout=subprocess.DEVNULL, check=True)


def write(name: str, block: list[tuple[list[str], Path]]) -> None:
    """Put the tables of a block between its two marks."""
    from tdpmmu import mmus, mmus_table, reclaim_table, results, table

    parts = []
    for command, path in block:
        result: Any = results.load_file(path)
        if isinstance(result, mmus.Versus):
            text = mmus_table.render_versus(result)
        elif isinstance(result, results.BenchResult):
            text = table.render_bench(result)
        else:
            text = reclaim_table.render(result)
        parts.append(f"```\n$ tdpmmu {' '.join(command)}\n\n{text}```")
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    page = PAGE.read_text()
    head, _, rest = page.partition(begin)
    _, found, tail = rest.partition(end)
    if not found:
        sys.exit(f"{PAGE.name} has no {begin} ... {end}")
    PAGE.write_text(f"{head}{begin}\n" + "\n\n".join(parts) + f"\n{end}{tail}")


def pictures(folder: Path) -> None:
    """Draw the two MMUs, and what obsolete pages retain in the largest guest that was zapped."""
    from tdpmmu import plot, results

    versus = folder / "versus.json"
    if versus.exists():
        (IMAGES / "tdp-against-shadow.png").write_bytes(plot.draw(results.load_file(versus), "png"))
    zaps: list[Any] = [results.load_file(path) for path in folder.glob("zap-*.json")]
    if zaps:
        largest = max(zaps, key=lambda result: result.runs[0].memory_bytes)
        (IMAGES / "shadow-retained.png").write_bytes(plot.draw(largest, "png", kind="retained"))


if __name__ == "__main__":
    main()
