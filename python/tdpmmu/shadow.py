"""What a run says of the shadow MMU: its pages, its zap's batches, what obsolete pages held in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["PAGINGS", "ShadowRun"]

#: How guest addresses become the host's: by hardware's second stage, or by shadows of the guest's tables.
PAGINGS = ("direct", "guest")


@dataclass(frozen=True, slots=True)
class ShadowRun:
    """The `shadow` block of a run: None there under a design of the TDP MMU. Counts of shadow pages (4 KiB).

    Attributes:
        paging: one of `PAGINGS`.
        reclaim: how zapped pages are kept from lockless walkers, by name.
        pages_at_t0: shadow pages when the zap began.
        zapped: pages that it zapped.
        batches: between two offers to give mmu_lock up.
        longest_batch: pages of the longest one.
        restarts: walks of the page list that began anew.
        obsolete_peak: most pages that were obsolete at one time, and still in memory.
        retained: what obsolete and zapped pages held: (ns since t0, pages), in order.
        raw: the whole JSON object.
    """

    paging: str
    reclaim: str
    pages_at_t0: int | None
    zapped: int | None
    batches: int | None
    longest_batch: int | None
    restarts: int | None
    obsolete_peak: int | None
    retained: tuple[tuple[int, int], ...] = field(repr=False)
    raw: Mapping[str, Any] = field(repr=False)

    @classmethod
    def from_raw(cls, raw: object) -> ShadowRun | None:
        """Return the typed view of a JSON object, or None where there is none."""
        if not isinstance(raw, Mapping):
            return None
        counts = ("pages_at_t0", "zapped", "batches", "longest_batch", "restarts", "obsolete_peak")
        return cls(
            paging=str(raw.get("paging", "?")),
            reclaim=str(raw.get("reclaim", "?")),
            **{name: raw.get(name) for name in counts},
            retained=tuple((int(at), int(pages)) for at, pages in raw.get("retained_series") or ()),
            raw=raw,
        )
