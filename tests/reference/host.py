"""The host's memory behind memslots: which page is there, mapped by which size, writable or not.

A region is what one `mmap` made. Its addresses count pages and are congruent to the gfns that it was made
for, modulo 1 GiB. Frames are names; the tests learn what number the engine gave each.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

RUN = 512
GIG = RUN * RUN
SPAN = {1: 1, 2: RUN, 3: GIG, 4: GIG * RUN}

_names = itertools.count()


class HostRefuses(Exception):
    """The host has no page that may be written there."""


@dataclass
class Page:
    frame: int
    level: int
    writable: bool


@dataclass(eq=False)
class Region:
    """Backed by runs of 2 MiB on first touch, where a whole aligned run is inside, else page by page."""

    like: int
    pages: int
    level: int
    writable: bool
    #: Runs that are mapped as one: the level. Runs that were cut up are in `mixed`, their pages in `single`.
    runs: dict[int, int] = field(default_factory=dict)
    frames: dict[int, int] = field(default_factory=dict)
    mixed: set[int] = field(default_factory=set)
    single: dict[int, bool] = field(default_factory=dict)

    @property
    def first(self) -> int:
        return self.like % GIG

    @property
    def end(self) -> int:
        return self.first + self.pages

    def _inside(self, base: int, span: int) -> bool:
        return self.first <= base and base + span <= self.end

    def lookup(self, hva: int) -> Page | None:
        run = hva // RUN
        if run in self.runs:
            return Page(self.frames[hva], self.runs[run], self.writable)
        if run in self.mixed and hva in self.single:
            return Page(self.frames[hva], 1, self.single[hva])
        return None

    def fault_in(self, hva: int, write: bool) -> Page:
        """The page, made if it is not there; a write may find one that has to be copied first."""
        page = self.lookup(hva)
        if page is not None and (page.writable or not write):
            return page
        if write and not self.writable:
            raise HostRefuses
        if page is None:
            self._back(hva)
            page = self.lookup(hva)
        assert page is not None
        return page

    def _back(self, hva: int) -> None:
        run = hva // RUN
        if run in self.mixed or not self._inside(run * RUN, RUN):
            self.mixed.add(run)
            self.single[hva] = self.writable
            self.frames[hva] = next(_names)
            return
        gig = hva // GIG * GIG
        if (
            self.level == 3
            and self._inside(gig, GIG)
            and not any(n in self.runs or n in self.mixed for n in range(gig // RUN, gig // RUN + RUN))
        ):
            for n in range(gig // RUN, gig // RUN + RUN):
                self._run(n, 3)
        else:
            self._run(run, min(self.level, 2))

    def _run(self, run: int, level: int) -> None:
        self.runs[run] = level
        for hva in range(run * RUN, run * RUN + RUN):
            self.frames[hva] = next(_names)

    def announced(self, start: int, end: int) -> tuple[int, int]:
        """What the host announces when it takes `start..end` away: huge mappings that it cuts, whole."""

        def unit(hva: int) -> int:
            run = hva // RUN
            if run in self.mixed:
                return 1
            # What is not there yet may become as large as the region allows.
            return SPAN[self.runs.get(run, self.level if self.first <= hva < self.end else 1)]

        low, high = unit(start), unit(end - 1)
        return start // low * low, (end - 1) // high * high + high

    def unmap(self, start: int, end: int) -> int:
        gone = 0
        for run in range(start // RUN, (end - 1) // RUN + 1):
            low, high = max(start, run * RUN), min(end, run * RUN + RUN)
            if run in self.runs:
                if self.runs[run] == 3:
                    self._demote(run)
                if high - low == RUN:
                    del self.runs[run]
                    gone += RUN
                    continue
                del self.runs[run]
                self.mixed.add(run)
                self.single |= dict.fromkeys(range(run * RUN, run * RUN + RUN), self.writable)
            if run in self.mixed:
                gone += sum(self.single.pop(hva, None) is not None for hva in range(low, high))
        return gone

    def _demote(self, run: int) -> None:
        gig = run // RUN * RUN
        for n in range(gig, gig + RUN):
            if self.runs.get(n) == 3:
                self.runs[n] = 2

    def replace(self, hva: int, writable: bool) -> None:
        self.unmap(hva, hva + 1)
        self.mixed.add(hva // RUN)
        self.single[hva] = writable
        self.frames[hva] = next(_names)

    def promote(self, start: int, end: int) -> int:
        """2 MiB pages from now on, in whole runs of this region; a run that was cut up gets new frames."""
        done = 0
        for run in range(-(-start // RUN), end // RUN):
            if not self._inside(run * RUN, RUN):
                continue
            if run in self.runs:
                self.runs[run] = max(self.runs[run], 2)
            else:
                self.unmap(run * RUN, run * RUN + RUN)
                self.mixed.discard(run)
                self._run(run, 2)
            done += RUN
        return done
