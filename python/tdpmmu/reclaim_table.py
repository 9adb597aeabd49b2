"""What `bench walk` measured, as a table: walks, or what each way to keep pages for walkers costs."""

from __future__ import annotations

from tdpmmu.results import MicroResult
from tdpmmu.table import render_micro

__all__ = ["render"]


def render(result: MicroResult) -> str:
    """Return a row a way to keep pages where the result is of `--reclaim`, else a row a walk. Times in ns."""
    return render_micro(result)
