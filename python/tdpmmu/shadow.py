"""What a run says of the shadow MMU: its pages, its zap's batches, what obsolete pages held in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["COUNTS", "PAGINGS", "ShadowRun"]

#: How guest addresses become the host's: by hardware's second stage, or by shadows of the guest's tables.
PAGINGS = ("direct", "guest")
#: What a run counts of the shadow MMU, in pages unless the name says otherwise.
COUNTS = (
    "quota",
    "pages_at_t0",
    "guest_table_pages",
    "zapped",
    "batches",
    "longest_batch",
    "restarts",
    "reclaimed",
    "retained_peak",
    "retained_at_return",
    "retained_at_end",
    "waiting_peak",
)


@dataclass(frozen=True, slots=True)
class ShadowRun:
    """The `shadow` block of a run: None there under a design of the TDP MMU. Counts of shadow pages (4 KiB).

    Attributes:
        paging: one of `PAGINGS`.
        reclaim: how zapped pages are kept from lockless walkers, by name.
        quota: most pages that there may be; None is no limit.
        pages_at_t0: shadow pages when the zap began.
        guest_table_pages: the guest's own tables, where they are shadowed.
        zapped: pages that were zapped.
        batches: between two offers to give mmu_lock up.
        longest_batch: pages of the longest one.
        restarts: walks of the page list that began anew.
        reclaimed: pages that went for the quota, or for want of memory.
        retained_peak: most pages at one time that were obsolete or zapped, and not free.
        retained_at_return: the same when the last fast zap had returned.
        retained_at_end: the same when the teardown was over.
        retained: the same over time: (ns since t0, pages), in order.
        waiting_peak: most pages at one time that waited for lockless walkers.
        raw: the whole JSON object.
    """

    paging: str
    reclaim: str
    quota: int | None
    pages_at_t0: int | None
    guest_table_pages: int | None
    zapped: int | None
    batches: int | None
    longest_batch: int | None
    restarts: int | None
    reclaimed: int | None
    retained_peak: int | None
    retained_at_return: int | None
    retained_at_end: int | None
    waiting_peak: int | None
    retained: tuple[tuple[int, int], ...] = field(repr=False)
    raw: Mapping[str, Any] = field(repr=False)

    @classmethod
    def from_raw(cls, raw: object) -> ShadowRun | None:
        """Return the typed view of a JSON object, or None where there is none."""
        if not isinstance(raw, Mapping):
            return None
        return cls(
            paging=str(raw.get("paging", "?")),
            reclaim=str(raw.get("reclaim", "?")),
            **{name: raw.get(name) for name in COUNTS},
            retained=tuple((int(at), int(pages)) for at, pages in raw.get("retained_series") or ()),
            raw=raw,
        )
