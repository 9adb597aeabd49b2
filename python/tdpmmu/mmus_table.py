"""The two MMUs as a table: a row a guest size, number of vCPUs and MMU; then what grows with the guest."""

from __future__ import annotations

from collections.abc import Callable

from tdpmmu.mmus import MMUS, Versus, VersusCell
from tdpmmu.table import WIDTH, render
from tdpmmu.units import format_count, format_ns, format_size

__all__ = ["render_versus"]

Take = Callable[[VersusCell], float | None]


def _of(measure: str) -> Take:
    return lambda cell: cell.median(measure)


def _size(value: float | None) -> str:
    return "-" if value is None else format_size(round(value))


#: Heading, value, how it is written, and how early it goes for lack of room (0: never).
_COLUMNS: list[tuple[str, Take, Callable[[float | None], str], int]] = [
    ("tables", _of("tables_bytes"), _size, 0),
    ("kept\nbeside them", lambda cell: cell.books_bytes, _size, 0),
    ("a fault", _of("fault_ns"), format_ns, 0),
    ("zap-all:\nvisible", _of("zap_visible_ns"), format_ns, 0),
    ("first\nhold", _of("zap_hold_ns"), format_ns, 0),
    ("longest\nhold", _of("zap_longest_hold_ns"), format_ns, 2),
    ("in\ntotal", _of("zap_total_ns"), format_ns, 0),
    ("CPU\ntime", _of("zap_cpu_ns"), format_ns, 1),
    ("mapped\nagain", _of("refault_ns"), format_ns, 3),
]
#: What is followed from the smallest guest to the largest.
_GROWTH: list[tuple[str, Take]] = [
    ("visible", _of("zap_visible_ns")),
    ("first\nhold", _of("zap_hold_ns")),
    ("total", _of("zap_total_ns")),
    ("CPU time", _of("zap_cpu_ns")),
    ("tables", _of("tables_bytes")),
    ("beside\nthem", lambda cell: cell.books_bytes),
    ("a fault", _of("fault_ns")),
]


def render_versus(result: Versus) -> str:
    """Return the medians by guest and MMU, then how each measure grows with the guest. All scaled."""
    cells = result.cells()
    if not cells:
        return "no rows\n"
    columns = [c for c in _COLUMNS if any(c[1](cell) is not None for cell in cells)]
    text = _table(result, cells, columns)
    while max(map(len, text.splitlines())) > WIDTH and any(c[3] for c in columns):
        worst = max(c[3] for c in columns)
        columns = [c for c in columns if c[3] != worst]
        text = _table(result, cells, columns)
    grown = _growth(cells)
    return text + (f"\n{grown}" if grown else "")


def _table(
    result: Versus,
    cells: tuple[VersusCell, ...],
    columns: list[tuple[str, Take, Callable[[float | None], str], int]],
) -> str:
    rows, last = [], (0, 0)
    for cell in cells:
        guest = (cell.memory_bytes, cell.vcpus)
        head = ["", ""] if guest == last else [format_size(guest[0]), str(guest[1])]
        if guest[0] == last[0]:
            head[0] = ""
        last = guest
        rows.append([*head, cell.mmu, *(write(take(cell)) for _, take, write, _ in columns)])
    reps = max(len(cell.rows) for cell in cells)
    first = cells[0].rows[0]
    designs = {cell.mmu: cell.rows[0].design for cell in cells}
    title = (
        f"The same guest under two MMUs: {first.page} pages, "
        f"kernel {result.config.get('kernel_profile', '?')}"
        + (f"; medians of {format_count(reps)} repetitions" if reps > 1 else "")
        + "\n"
        + "zap designs: "
        + ", ".join(f"{mmu} {designs[mmu]}" for mmu in MMUS if mmu in designs)
    )
    heads = ["guest", "vCPUs", "MMU", *(heading for heading, _, _, _ in columns)]
    return f"{title}\n\n" + render(heads, rows, left=(0, 2))


def _growth(cells: tuple[VersusCell, ...]) -> str:
    """Return a row a number of vCPUs and MMU: the largest guest's value over the smallest one's."""
    sizes = sorted({cell.memory_bytes for cell in cells})
    if len(sizes) < 2:
        return ""
    low, high = sizes[0], sizes[-1]
    by = {(cell.vcpus, cell.mmu, cell.memory_bytes): cell for cell in cells}
    rows = []
    for vcpus, mmu in dict.fromkeys((cell.vcpus, cell.mmu) for cell in cells):
        small, large = by.get((vcpus, mmu, low)), by.get((vcpus, mmu, high))
        if small is not None and large is not None:
            rows.append([str(vcpus), mmu, *(_times(take(small), take(large)) for _, take in _GROWTH)])
    if not rows:
        return ""
    span = f"From {format_size(low)} to {format_size(high)}, {high / low:.4g} times the guest, each grows by:"
    return f"{span}\n\n" + render(["vCPUs", "MMU", *(heading for heading, _ in _GROWTH)], rows, left=(1,))


def _times(small: float | None, large: float | None) -> str:
    if small is None or large is None or small <= 0:
        return "-"
    ratio = large / small
    return f"{ratio:.2g} x" if ratio < 0.095 else f"{ratio:.2f} x" if ratio < 9.995 else f"{ratio:.1f} x"
