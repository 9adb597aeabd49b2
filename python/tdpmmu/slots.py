"""Memslots of a `VM`, and the logs of what is written to them."""

from __future__ import annotations

from typing import SupportsIndex

import numpy as np
import numpy.typing as npt

from tdpmmu import units
from tdpmmu._checked import MAX_SLOT, Checked, zap_report
from tdpmmu.bench import between, check_timeout
from tdpmmu.errors import InvalidArgument
from tdpmmu.machine import RING_DTYPE, DirtyLog, Memslot, ZapReport

__all__ = ["SlotOperations"]

Size = str | SupportsIndex


class SlotOperations(Checked):
    """The part of `VM` that changes memslots and collects dirty pages. Lengths in 4 KiB pages."""

    __slots__ = ()

    def add_memslot(
        self,
        base_gfn: int,
        npages: int,
        *,
        slot: int | None = None,
        as_id: int = 0,
        readonly: bool = False,
        dirty_log: bool = False,
        page: Size | None = None,
        host_writable: bool = True,
        shares: Memslot | None = None,
    ) -> Memslot:
        """Add guest memory at `base_gfn`, `npages` pages of 4 KiB long.

        Args:
            base_gfn: its first gfn.
            npages: its length in 4 KiB pages.
            slot: its id; None takes the first that is free.
            as_id: the address space; 1 is system management mode.
            readonly: the guest's writes are emulated (KVM_MEM_READONLY).
            dirty_log: it logs what is written (KVM_MEM_LOG_DIRTY_PAGES).
            page: the largest page that the host backs it with, in bytes or as text; None is the VM's.
            host_writable: the host's pages may be written. A write fault to others is an error of the host's.
            shares: the memslot whose host memory this one maps, too, from its first page on.

        Raises:
            InvalidArgument: an id in use, an overlap (both ranges are named), no pages, beyond the last gfn;
                more pages than the memslot that it shares.
            Closed, ForkedError: see `close`.
        """
        first = self._gfn(base_gfn, "base_gfn")
        count = between(npages, 1, self._config.max_gfn, "npages")
        if first + count > self._config.max_gfn:
            raise InvalidArgument(
                f"base_gfn={first:#x}, npages={count:#x}: ends beyond gfn {self._config.max_gfn:#x}, "
                f"the limit of {self._config.levels} levels"
            )
        space = self._space(as_id)
        if slot is None:
            used = {known.slot for known in self.memslots() if known.as_id == space}
            slot = next(number for number in range(MAX_SLOT + 1) if number not in used)
        made = Memslot(
            between(slot, 0, MAX_SLOT, "slot"), space, first, count, bool(readonly), bool(dirty_log)
        )
        self._native.add_memslot(
            (made.slot, space, first, count, made.readonly, made.dirty_log),
            level=None if page is None else units.LEVELS[units.parse_page(page)],
            writable=bool(host_writable),
            share=None if shares is None else (shares.as_id, shares.slot),
        )
        return made

    def delete_memslot(
        self, slot: Memslot | int, *, as_id: int = 0, timeout: float | None = None
    ) -> ZapReport:
        """Delete a memslot, with the zap that this is in KVM. `timeout` in seconds, times in ns.

        It is a zap of everything, or after `set_slot_zap_all(False)` of the slot's leafs.

        Raises:
            InvalidArgument: no such memslot.
            Closed, ForkedError, StallError: see `close` and `populate`.
        """
        space, number = self._named(slot, as_id)
        return zap_report(self._native.delete_memslot(space, number, timeout=check_timeout(timeout)))

    def move_memslot(
        self, slot: Memslot | int, base_gfn: int, *, as_id: int = 0, timeout: float | None = None
    ) -> ZapReport:
        """Put a memslot at other gfns, with the same host memory; its dirty log goes along. Times in ns.

        The same place is nothing at all: `raw["update"]` says `nothing`, else `moved`. `timeout` in seconds.

        Raises:
            InvalidArgument: no such memslot, an overlap, or beyond the last gfn.
            Closed, ForkedError, StallError: see `close` and `populate`.
        """
        space, number = self._named(slot, as_id)
        base = self._gfn(base_gfn, "base_gfn")
        return zap_report(
            self._native.update_memslot(space, number, base=base, timeout=check_timeout(timeout))
        )

    def set_memslot_flags(
        self,
        slot: Memslot | int,
        *,
        dirty_log: bool | None = None,
        readonly: bool | None = None,
        as_id: int = 0,
        timeout: float | None = None,
    ) -> Memslot:
        """Turn dirty logging of a memslot on or off; None leaves a flag as it is. `timeout` is in seconds.

        Turning it on splits or protects what is mapped, turning it off makes huge pages huge again, as the
        profile's kernel does it.

        Returns:
            The memslot as it is now; lengths in 4 KiB pages.

        Raises:
            InvalidArgument: no such memslot, or a change of `readonly`, which KVM refuses.
            Closed, ForkedError, StallError: see `close` and `populate`.
        """
        space, number = self._named(slot, as_id)
        self._native.update_memslot(
            space,
            number,
            log_dirty=None if dirty_log is None else bool(dirty_log),
            readonly=None if readonly is None else bool(readonly),
            timeout=check_timeout(timeout),
        )
        return next(now for now in self.memslots() if (now.as_id, now.slot) == (space, number))

    def share_memory_with_smm(self) -> tuple[Memslot, ...]:
        """Give system management mode (address space 1) the memslots of space 0, same host memory.

        Returns:
            The new memslots; those that space 1 had stay. Lengths in 4 KiB pages.

        Raises:
            InvalidArgument: a memslot of space 1 is in the way.
            Closed, ForkedError: see `close`.
        """
        made = set(self._native.share_memory_with_smm())
        return tuple(slot for slot in self.memslots() if slot.as_id == 1 and slot.slot in made)

    def memslots(self) -> tuple[Memslot, ...]:
        """Return the memslots, by address space and first gfn. Lengths in 4 KiB pages."""
        return tuple(Memslot(*row) for row in self._native.memslots())

    def memslot_generation(self, as_id: int = 0) -> int:
        """Return the memslot generation of an address space: a count that grows by 2 with each publication.

        Raises:
            InvalidArgument: no such address space.
            Closed, ForkedError: see `close`.
        """
        return self._native.generation(self._space(as_id))

    def set_slot_zap_all(self, on: bool) -> None:
        """Choose what a deletion or a move zaps: everything, or with False the slot's leafs. No units.

        This is KVM_X86_QUIRK_SLOT_ZAP_ALL: on by default.

        Raises:
            Unsupported: the profile's kernel has no such quirk (it came with 6.12).
            Closed, ForkedError: see `close`.
        """
        self._native.set_slot_zap_all(bool(on))

    def enable_dirty_log_protect(self, *, manual: bool = True, initially_set: bool = False) -> None:
        """Choose how dirty logs are taken (KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2). No units.

        Args:
            manual: `get_dirty_log` only reads; `clear_dirty_log` takes.
            initially_set: a log begins with every page dirty and nothing protected.

        Raises:
            InvalidArgument: `initially_set` without `manual`.
            Closed, ForkedError: see `close`.
        """
        self._native.enable_dirty_log_protect(bool(manual), bool(initially_set))

    def set_eager_page_split(self, on: bool) -> None:
        """Set the module parameter `eager_page_split` from now on. No units.

        Raises:
            Closed, ForkedError: see `close`.
        """
        self._native.set_eager_page_split(bool(on))

    def get_dirty_log(self, slot: Memslot | int, *, as_id: int = 0) -> DirtyLog:
        """Return which pages of a memslot were written (KVM_GET_DIRTY_LOG), one bool a 4 KiB page.

        Without manual protection they are taken for clean by this call; with it nothing changes.

        Raises:
            InvalidArgument: no such memslot, one that does not log, or a VM with rings.
            Closed, ForkedError: see `close`.
        """
        space, number = self._named(slot, as_id)
        base, npages, bits = self._native.get_dirty_log(space, number)
        packed = np.frombuffer(bits, dtype=np.uint8)
        dirty = np.unpackbits(packed, bitorder="little")[:npages].astype(np.bool_)
        return DirtyLog(number, space, base, npages, dirty)

    def clear_dirty_log(
        self,
        slot: Memslot | int,
        dirty: npt.ArrayLike | None = None,
        *,
        first_page: int = 0,
        npages: int | None = None,
        as_id: int = 0,
    ) -> int:
        """Take dirty pages of a memslot for clean (KVM_CLEAR_DIRTY_LOG); return how many of them were dirty.

        Args:
            slot: the memslot.
            dirty: which pages, one bool each, counted from `first_page`; None is all.
            first_page: the first page of the call, in 4 KiB pages from the slot's first: a multiple of 64.
            npages: how many pages; None goes to the end of the slot, or as far as `dirty` does. A multiple of
                64, or up to the end of the slot.
            as_id: the address space of a slot that is named by its id.

        Raises:
            InvalidArgument: what `get_dirty_log` refuses; pages that are not aligned or beyond the slot; an
                array that is not one bool a page.
            Closed, ForkedError: see `close`.
        """
        space, number = self._named(slot, as_id)
        first = between(first_page, 0, self._config.max_gfn, "first_page")
        wanted = None if dirty is None else np.asarray(dirty)
        if wanted is not None and (wanted.ndim != 1 or wanted.dtype != np.bool_):
            raise InvalidArgument(
                f"dirty: expected one dimension of bool, not {wanted.ndim} of {wanted.dtype}"
            )
        if npages is not None:
            count = between(npages, 0, self._config.max_gfn, "npages")
        elif wanted is not None:
            count = wanted.size
        else:
            known = {(now.as_id, now.slot): now.npages for now in self.memslots()}
            count = max(known.get((space, number), first) - first, 0)
        if wanted is None:
            wanted = np.ones(count if count <= self._config.max_gfn else 0, dtype=np.bool_)
        if wanted.size != count:
            raise InvalidArgument(f"dirty: {wanted.size} pages, and npages={count}: one bool a page")
        bits = np.zeros(-(-count // 64) * 64, dtype=np.bool_)
        bits[:count] = wanted
        words = np.packbits(bits, bitorder="little").view(np.uint64)
        return self._native.clear_dirty_log(space, number, first, count, words)

    def dirty_ring(self, vcpu: int = 0) -> npt.NDArray[np.void]:
        """Return what a vCPU wrote since the last call, oldest first: a structured array, see `RING_DTYPE`.

        They are harvested then, and free after `reset_dirty_rings`. Offsets count 4 KiB pages.

        Raises:
            InvalidArgument: no such vCPU, or a VM without rings.
            Closed, ForkedError: see `close`.
        """
        return np.frombuffer(self._native.dirty_ring(self._vcpu(vcpu)), dtype=RING_DTYPE)

    def reset_dirty_rings(self) -> int:
        """Protect the harvested pages again and free their entries (KVM_RESET_DIRTY_RINGS); return the count.

        Raises:
            InvalidArgument: a VM without rings.
            Closed, ForkedError: see `close`.
        """
        return self._native.reset_dirty_rings()
