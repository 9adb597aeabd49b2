"""What the host and the kernel do to a `VM`'s mappings between zaps: aging, huge pages, NX, single gfns."""

from __future__ import annotations

import json
from typing import SupportsIndex

import numpy as np
import numpy.typing as npt

from tdpmmu import units
from tdpmmu._checked import Checked, zap_report
from tdpmmu.bench import between, check_timeout
from tdpmmu.errors import InvalidArgument
from tdpmmu.machine import ZapReport

__all__ = ["UpkeepOperations"]

Size = str | SupportsIndex


class UpkeepOperations(Checked):
    """The part of `VM` that ages, collapses, recovers and protects. Ranges are gfns, in 4 KiB pages."""

    __slots__ = ()

    def set_smm(self, vcpu: int, on: bool) -> None:
        """Put a vCPU into system management mode, or back: its accesses go to address space 1 or 0. No units.

        Each change drops the vCPU's roots, as every kernel does.

        Raises:
            InvalidArgument: no such vCPU.
            Busy, Closed, ForkedError: see `fault` and `close`.
        """
        self._native.set_smm(self._vcpu(vcpu), bool(on))

    def in_smm(self, vcpu: int = 0) -> bool:
        """Tell whether a vCPU is in system management mode. No units.

        Raises:
            InvalidArgument: no such vCPU.
            Busy, Closed, ForkedError: see `fault` and `close`.
        """
        return self._native.in_smm(self._vcpu(vcpu))

    def promote(self, gfns: range, page: Size = "2M") -> int:
        """Let the host map what is behind gfns of space 0 by larger pages (khugepaged, MADV_COLLAPSE).

        Args:
            gfns: a range with step 1; whole aligned pieces of it are promoted.
            page: `2M` or `1G`.

        Returns:
            How many 4 KiB pages the host maps so now.

        Raises:
            InvalidArgument: another page size, or a range that is partly without a memslot.
            Closed, ForkedError: see `close`.
        """
        level = units.LEVELS[units.parse_page(page)]
        if level < 2:
            raise InvalidArgument(f"page={page!r}: expected 2M or 1G")
        span = self._range(gfns)
        return self._native.promote(span.start, span.stop, level)

    def replace_page(self, gfn: SupportsIndex, *, as_id: int = 0, writable: bool = True) -> int:
        """Let the host put another page behind a gfn (KSM, migration, a fork): unmapped, then a new frame.

        Args:
            gfn: the page, in 4 KiB pages.
            as_id: the address space whose memslot leads to it.
            writable: False is a page that the host copies at the next write.

        Returns:
            The number of the new frame.

        Raises:
            InvalidArgument: a gfn beyond the limit or without a memslot; a writable page of read-only memory.
            OutOfTableMemory: the host has no frame left.
            Closed, ForkedError: see `close`.
        """
        return self._native.replace_page(self._gfn(gfn), self._space(as_id), bool(writable))

    def age(self, gfns: range, *, as_id: int = 0, flush: bool = False) -> bool:
        """Take the Accessed bit from leafs, as reclaim, MGLRU or DAMON do; tell whether some leaf had it.

        Args:
            gfns: a range with step 1, in 4 KiB pages.
            as_id: whose memslots translate the range to host memory; all that map that memory are aged.
            flush: as reclaim does it: TLBs are flushed where a leaf was young (kernels up to 6.12). Without
                a flush a vCPU may go on and not set the bit again.

        Raises:
            InvalidArgument: a range with a step, beyond the last gfn, or partly without a memslot.
            Closed, ForkedError: see `close`.
        """
        span = self._range(gfns)
        return self._native.age(span.start, span.stop, self._space(as_id), bool(flush))

    def test_age(self, gfns: range, *, as_id: int = 0) -> bool:
        """Tell whether a leaf of a range of gfns has the Accessed bit. Changes nothing. In 4 KiB pages.

        Raises:
            InvalidArgument: see `age`.
            Closed, ForkedError: see `close`.
        """
        span = self._range(gfns)
        return self._native.test_age(span.start, span.stop, self._space(as_id))

    def age_batch(self, gfns: npt.ArrayLike, *, as_id: int = 0, clear: bool = True) -> npt.NDArray[np.bool_]:
        """Age (or with `clear=False` only test) many gfns one by one; return which were young, a bool each.

        Raises:
            InvalidArgument: not a one-dimensional array of gfns that memslots cover.
            Closed, ForkedError: see `close`.
        """
        young = self._native.age_batch(self._gfns(gfns), self._space(as_id), bool(clear))
        return np.frombuffer(young, dtype=np.uint8).astype(np.bool_)

    def change_pte(self, gfn: SupportsIndex, *, writable: bool = False) -> bool:
        """Tell KVM that the host maps the page behind a gfn read-only, or writable (change_pte, up to 6.9).

        Returns:
            Whether a leaf of 4 KiB changed: it is taken out, and a read-only one put in its place.

        Raises:
            Unsupported: the profile's kernel has no change_pte.
            InvalidArgument: a gfn beyond the limit, or without a memslot.
            Closed, ForkedError: see `close`.
        """
        return self._native.change_pte(self._gfn(gfn), bool(writable))

    def set_nx_huge_pages(self, on: bool, *, timeout: float | None = None) -> ZapReport | None:
        """Turn the NX huge-page mitigation on or off, with a fast zap. `timeout` in s, times in ns.

        Returns:
            What the zap took; None where it was so already.

        Raises:
            StallError, Closed, ForkedError: see `populate` and `close`.
        """
        text = self._native.set_nx_huge_pages(bool(on), timeout=check_timeout(timeout))
        return zap_report(text) if json.loads(text)["changed"] else None

    @property
    def nx_huge_pages(self) -> bool:
        """True while huge leafs are made without the right to execute. No units."""
        return self._native.nx_huge_pages()

    def recover_nx(self, ratio: int = 60) -> int:
        """Run one period of NX recovery: zap one in `ratio` of the tables that a fetch forced, oldest first.

        Args:
            ratio: one in how many, rounded up; 0 is none (nx_huge_pages_recovery_ratio).

        Returns:
            How many tables were zapped, a count.

        Raises:
            InvalidArgument: a ratio that is not a number from 0 to 2^32 - 1.
            Closed, ForkedError: see `close`.
        """
        return self._native.recover_nx(between(ratio, 0, (1 << 32) - 1, "ratio"))

    def zap_gfn_range(self, gfns: range, *, timeout: float | None = None) -> ZapReport:
        """Zap the leafs of a range of gfns in both address spaces (`kvm_zap_gfn_range`). Times in ns.

        Host memory stays as it is. `timeout` is in seconds.

        Raises:
            InvalidArgument: an empty range, one with a step, or beyond the last gfn.
            StallError, Closed, ForkedError: see `populate` and `close`.
        """
        span = self._range(gfns)
        return zap_report(self._native.zap_gfn_range(span.start, span.stop, timeout=check_timeout(timeout)))

    def write_protect_gfn(self, gfn: SupportsIndex, *, as_id: int = 0) -> bool:
        """Take write permission from the leaf of a gfn for good: only a slow fault gives it back.

        Returns:
            Whether some leaf (of 4 KiB or larger) could be written, or made so without the lock.

        Raises:
            InvalidArgument: a gfn beyond the limit, or without a memslot.
            Closed, ForkedError: see `close`.
        """
        return self._native.write_protect_gfn(self._gfn(gfn), self._space(as_id))

    def pre_fault(self, gfns: range, *, vcpu: int = 0, timeout: float | None = None) -> int:
        """Map a range of gfns before the guest asks (KVM_PRE_FAULT_MEMORY): as a read does, without Accessed.

        Args:
            gfns: a range with step 1, in 4 KiB pages.
            vcpu: whose root and address space.
            timeout: seconds; None is for ever.

        Returns:
            How many pages are left undone, 0 when all are; an error after the first page ends the call.

        Raises:
            InvalidArgument: an empty range, one with a step or beyond the last gfn, no such vCPU, or a first
                page without a memslot.
            DirtyRingFull: the vCPU's dirty ring is full.
            Busy, OutOfTableMemory, StallError, Closed, ForkedError: see `fault` and `populate`.
        """
        span = self._range(gfns)
        number = self._vcpu(vcpu)
        return self._native.pre_fault(span.start, span.stop, number, timeout=check_timeout(timeout))
