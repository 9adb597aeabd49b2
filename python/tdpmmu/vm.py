"""A live virtual machine: memslots, faults, lookups and zaps on real page tables, by real threads.

A `VM` may be used from many threads at once; a vCPU is one thread at a time. Guest memory is not there: host
frames are numbers from a model of the host's memory management, so that only the tables take space.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from types import TracebackType
from typing import Any, Literal, NoReturn, SupportsIndex

import numpy as np
import numpy.typing as npt

from tdpmmu import _names, _native, units
from tdpmmu._checked import zap_report
from tdpmmu.bench import between, check_timeout
from tdpmmu.errors import InvalidArgument, OutOfTableMemory, Unsupported
from tdpmmu.guest import Guest
from tdpmmu.machine import (
    MAPPING_DTYPE,
    CloseReport,
    FaultOutcome,
    FaultResult,
    LeafMapping,
    PopulateStats,
    VMConfig,
    VMStats,
    ZapReport,
)
from tdpmmu.slots import SlotOperations
from tdpmmu.upkeep import UpkeepOperations
from tdpmmu.workload import RunReport, drive

__all__ = ["VM"]

Progress = Callable[[str, float], object]
Size = str | SupportsIndex

MODES = ("bulk", "fault")


class VM(SlotOperations, UpkeepOperations):
    """A machine with page tables of its own: a context manager, thread-safe, not picklable (see `VMConfig`).

    With `memory` it has that much from gfn 0 on, in memslots as large as KVM allows. All other
    arguments are those of `VMConfig.make`, or one `config`.

    Raises:
        InvalidArgument: a value breaks a rule, or values contradict each other.
        OutOfTableMemory: the host refuses the address space, or the cap cannot hold a root.

    >>> with VM("1G", design="sync", seed=1) as vm:
    ...     vm.populate().sptes
    262144
    """

    __slots__ = ("__weakref__",)

    def __init__(self, memory: Size | None = None, *, config: VMConfig | None = None, **options: Any) -> None:
        if config is not None and (options or memory is not None):
            raise InvalidArgument("config: give either a VMConfig or its arguments, not both")
        self._config = config if config is not None else VMConfig.make(memory, **options)
        raw = {name: getattr(self._config, name) for name in VMConfig.__slots__}
        self._native = _native.Vm(json.dumps(raw))

    @property
    def config(self) -> VMConfig:
        """The configuration, with the seed that was drawn. Sizes in bytes, times in ns."""
        return self._config

    @property
    def closed(self) -> bool:
        """True after `close` was called."""
        return self._native.closed

    def __repr__(self) -> str:
        state = "closed" if self.closed else "open"
        return f"<tdpmmu.VM {self._config.design} under {self._config.kernel_profile}, {state}>"

    def __enter__(self) -> VM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        native = getattr(self, "_native", None)
        if native is not None and not native.closed and not native.forked:
            warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=2)

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "VM handles cannot be pickled or copied; pass a VMConfig and make the VM where it is used"
        )

    @property
    def guest(self) -> Guest:
        """The guest's own page tables and processes; only where `paging` is `guest`. No units.

        Raises:
            Unsupported: the VM's guest has no tables that matter here.
        """
        if self._config.paging != "guest":
            raise Unsupported(
                f"guest: this VM has design {self._config.design!r} and paging {self._config.paging!r}; the "
                'guest\'s own tables are shadowed under a shadow design with paging="guest"'
            )
        return Guest(self._native, self._config)

    def populate(
        self,
        gfns: range | None = None,
        *,
        page: Size | None = None,
        threads: int | None = None,
        mode: str = "bulk",
        progress: Progress | None = None,
        timeout: float | None = None,
    ) -> PopulateStats:
        """Map a range of gfns, or all memslots, with pages of one size where alignment allows, else smaller.

        Args:
            gfns: a range with step 1, in 4 KiB pages; None is every memslot of address space 0.
            page: the largest page size to use, in bytes or as text; None is the VM's.
            threads: how many threads map; None takes all CPUs in bulk mode, all vCPUs in fault mode.
            mode: `bulk` fills tables before they are linked; `fault` lets vCPUs fault in every page, racing.
            progress: called as `progress(phase, fraction)` on the calling thread.
            timeout: seconds; None is for ever.

        Raises:
            InvalidArgument: a range with a step, beyond the last gfn, or partly without a memslot; pages
                larger than the VM's, or smaller in `fault` mode: a fault maps what the host backs.
            OutOfTableMemory: the tables do not fit; what was mapped stays mapped.
            StallError: not finished in time; what was mapped stays mapped.
            Busy: `fault` mode, while a vCPU is in use.
            Closed, ForkedError: see `close`.
        """
        by_fault = _names.one_of(mode, MODES, "mode") == "fault"
        text_page = self._config.page if page is None else units.parse_page(page)
        level, most = units.LEVELS[text_page], units.LEVELS[self._config.page]
        if level > most or (by_fault and level < most):
            raise InvalidArgument(
                f"page={page!r}: this VM's memory is backed by pages of {self._config.page}; "
                + ("faults map those" if by_fault else "larger leafs cannot map it")
            )
        span = None if gfns is None else self._range(gfns)
        self._fits(span, text_page)
        text = self._native.populate(
            None if span is None else span.start,
            None if span is None else span.stop,
            level=level,
            threads=0 if threads is None else between(threads, 1, 1024, "threads"),
            by_fault=by_fault,
            progress=progress,
            timeout=check_timeout(timeout),
        )
        raw = json.loads(text)
        return PopulateStats(raw["sptes"], raw["table_pages"], raw["wall_ns"])

    def fault(
        self, gfn: SupportsIndex, *, vcpu: int = 0, write: bool = False, exec: bool = False
    ) -> FaultResult:
        """Let a vCPU access one page, as the guest would: TLB, hardware walk, then the fault path.

        With `paging="guest"` the page is a virtual one of the process that the vCPU runs; what its own tables
        do not allow is the outcome GUEST_FAULT.

        Raises:
            InvalidArgument: a gfn beyond the limit, or no such vCPU.
            Busy: another thread uses the vCPU.
            DirtyRingFull: the vCPU's dirty ring is full.
            OutOfTableMemory: no page-table page is left; or the quota of shadow pages is used up by roots.
            Closed, ForkedError: see `close`.
        """
        number = self._gfn(gfn)
        code, level, pfn = self._native.fault(number, self._vcpu(vcpu), bool(write), bool(exec))
        mapped = level > 0
        page = ("4K", "2M", "1G")[level - 1] if mapped else None
        return FaultResult(number, FaultOutcome(code), page, pfn if mapped else None)

    def fault_batch(
        self,
        gfns: npt.ArrayLike,
        *,
        vcpu: int = 0,
        write: bool = False,
        exec: bool = False,
        timeout: float | None = None,
    ) -> npt.NDArray[np.uint8]:
        """Let a vCPU access many pages in order; return the `FaultOutcome` of each. `timeout` is in seconds.

        Raises:
            InvalidArgument: not a one-dimensional array of gfns below the limit, or no such vCPU.
            Busy, OutOfTableMemory, StallError, Closed, ForkedError: see `fault` and `populate`.
        """
        array = self._gfns(gfns)
        answer = self._native.fault_batch(
            array, self._vcpu(vcpu), bool(write), bool(exec), timeout=check_timeout(timeout)
        )
        return np.frombuffer(answer, dtype=np.uint8)

    def lookup(self, gfn: SupportsIndex, *, as_id: int = 0) -> LeafMapping | None:
        """Return the leaf that maps a gfn, by a lockless walk, or None. Units: 4 KiB pages.

        On shadow pages it is a vCPU that walks, under the root and process that it has: one that nobody uses,
        and that is in use meanwhile.

        Raises:
            InvalidArgument: a gfn beyond the limit.
            Busy: on shadow pages, while every vCPU is in use.
            Closed, ForkedError: see `close`.
        """
        row = self.lookup_batch(np.array([self._gfn(gfn)], dtype=np.uint64), as_id=as_id)[0]
        return _mapping(row) if row["level"] else None

    def lookup_batch(self, gfns: npt.ArrayLike, *, as_id: int = 0) -> npt.NDArray[np.void]:
        """Return the leafs that map many gfns, by lockless walks: a structured array, see `MAPPING_DTYPE`.

        `gfn` and `pfn` are those of the gfn asked for, in 4 KiB pages; `level` is 0 where nothing is mapped.

        Raises:
            InvalidArgument: not a one-dimensional array of gfns below the limit.
            Busy: see `lookup`.
            Closed, ForkedError: see `close`.
        """
        found = self._native.lookup_batch(self._gfns(gfns), self._space(as_id))
        return np.frombuffer(found, dtype=MAPPING_DTYPE)

    def mappings(self, gfns: range | None = None, *, as_id: int = 0) -> npt.NDArray[np.void]:
        """Return every present leaf in a range of gfns, or in all: a structured array, see `MAPPING_DTYPE`.

        Raises:
            InvalidArgument: a range with a step or beyond the last gfn.
            Busy: see `lookup`.
            Closed, ForkedError: see `close`.
        """
        whole = range(self._config.max_gfn) if gfns is None else self._range(gfns)
        found = self._native.mappings(whole.start, whole.stop, self._space(as_id))
        return np.frombuffer(found, dtype=MAPPING_DTYPE)

    def unmap(self, gfns: range, *, timeout: float | None = None) -> ZapReport:
        """Take host memory away from a range of gfns, as an mmu notifier does. `timeout` in s, times in ns.

        Raises:
            InvalidArgument: a range with a step or beyond the last gfn.
            StallError, Closed, ForkedError: see `populate` and `close`.
        """
        span = self._range(gfns)
        return zap_report(self._native.unmap(span.start, span.stop, timeout=check_timeout(timeout)))

    def zap(self, target: Literal["all"] | range = "all", *, timeout: float | None = None) -> ZapReport:
        """Zap everything by the VM's design, as a memslot update does, or unmap a range. Times in ns.

        Raises:
            InvalidArgument: any other target.
            StallError, Closed, ForkedError: see `populate` and `close`.
        """
        if isinstance(target, range):
            return self.unmap(target, timeout=timeout)
        _names.one_of(target, ("all",), "target")
        return self.fast_zap(timeout=timeout)

    def fast_zap(self, *, timeout: float | None = None) -> ZapReport:
        """Zap every root by the VM's design (`kvm_mmu_zap_all_fast`). `timeout` in seconds, times in ns.

        Raises:
            StallError, Closed, ForkedError: see `populate` and `close`.
        """
        return zap_report(self._native.fast_zap(timeout=check_timeout(timeout)))

    def drop_root(self, vcpu: int = 0, *, timeout: float | None = None) -> ZapReport:
        """Let a vCPU drop its root: what the last reference's put does is the design's choice. Times in ns.

        Raises:
            InvalidArgument: no such vCPU.
            Busy: another thread uses the vCPU.
            StallError, Closed, ForkedError: see `populate` and `close`.
        """
        return zap_report(self._native.drop_root(self._vcpu(vcpu), timeout=check_timeout(timeout)))

    def run(
        self,
        *,
        seconds: float | None = None,
        accesses: int | None = None,
        gfns: range | None = None,
        write: float = 0.3,
        vcpus: int | None = None,
        during: Callable[[], object] | None = None,
        progress: Progress | None = None,
        timeout: float | None = None,
    ) -> RunReport:
        """Let vCPUs access random pages, each on a thread of its own, and count the outcomes.

        Args:
            seconds: how long; or
            accesses: how many each vCPU makes. One of the two.
            gfns: the pages to choose from, in 4 KiB pages; None is the first memslot.
            write: the fraction of accesses that are writes, 0 to 1.
            vcpus: how many run; None is all.
            during: called on the calling thread while they run; what it returns is in the report.
            progress: called as `progress(phase, fraction)` on the calling thread.
            timeout: seconds; None is for ever.

        Raises:
            InvalidArgument: neither or both of `seconds` and `accesses`, or a value out of range.
            Busy: a vCPU is in use.
            StallError: not finished within `timeout` seconds.
            OutOfTableMemory, Closed, ForkedError: see `fault` and `close`.
        """
        if (seconds is None) == (accesses is None):
            raise InvalidArgument("seconds, accesses: give one of the two")
        if isinstance(write, bool) or not 0 <= write <= 1:
            raise InvalidArgument(f"write={write!r}: must be a fraction from 0 to 1")
        slots = self.memslots()
        if gfns is None and not slots:
            raise InvalidArgument("gfns: the VM has no memslot to choose pages from")
        span = slots[0].gfns if gfns is None else self._range(gfns)
        if len(span) == 0:
            raise InvalidArgument(f"gfns={gfns!r}: no pages to choose from")
        return drive(
            self,
            gfns=span,
            vcpus=self._config.vcpus if vcpus is None else between(vcpus, 1, self._config.vcpus, "vcpus"),
            seconds=check_timeout(seconds),
            accesses=None if accesses is None else between(accesses, 0, 1 << 62, "accesses"),
            write=float(write),
            during=during,
            progress=progress,
            timeout=check_timeout(timeout),
        )

    def stats(self) -> VMStats:
        """Return counts of leafs by size, table pages, roots, and KVM's own statistics, in one moment.

        Raises:
            Closed, ForkedError: see `close`.
        """
        return VMStats.from_raw(json.loads(self._native.stats()))

    def verify(self, *, timeout: float | None = None) -> tuple[str, ...]:
        """Compare the tables with the books: counters, memslots, frames. Return violations as text.

        Other threads should rest meanwhile: a count that moves is not a violation, but cannot be compared.

        Raises:
            StallError, Closed, ForkedError: see `populate` and `close`.
        """
        return tuple(self._native.verify(timeout=check_timeout(timeout)))

    def close(self, timeout: float | None = 30.0) -> CloseReport | None:
        """Tear down: wait for those inside, zap everything, free every table, stop the threads.

        Returns:
            What it found, times in ns; None where the VM was closed already.

        Raises:
            StallError: somebody is inside after `timeout` seconds; the message names the calls.
            ForkedError: called in a child of the process that made the VM.

        Every other method raises `Closed` afterwards.
        """
        text = self._native.close(timeout=check_timeout(timeout))
        if text is None:
            return None
        raw = json.loads(text)
        return CloseReport(raw["wall_ns"], raw["table_pages_leaked"], tuple(raw["violations"]))

    def _fits(self, span: range | None, page: str) -> None:
        """Refuse a populate that cannot end well, before anything is allocated."""
        sizes = [slot.npages for slot in self.memslots()] if span is None else [len(span)]
        need = sum(units.table_bytes(size * 4096, page, self._config.levels) for size in sizes)
        cap = self._config.max_table_bytes
        have = _native.available_bytes() if cap is None else cap
        if need > have:
            raise OutOfTableMemory(
                f"{units.format_size(sum(sizes) * 4096)} of {page} pages needs {units.format_size(need)} of "
                f"page tables ({units.format_size(have)} {'available' if cap is None else 'allowed'}); use a "
                "larger page, a smaller range" + ("" if cap is None else ", or a larger max_table_bytes"),
                needed_bytes=need,
                available_bytes=have,
            )


def _mapping(row: np.void) -> LeafMapping:
    return LeafMapping(int(row["gfn"]), int(row["pfn"]), int(row["level"]), int(row["spte"]))
