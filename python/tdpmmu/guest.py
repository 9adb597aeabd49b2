"""The guest's own page tables, where the shadow MMU shadows them: processes, and what they map.

A virtual page number counts 4 KiB pages of a process's address space, as a gfn counts those of guest memory.
The guest changes its tables by stores of a vCPU, as an operating system does: these fault, find the table
write-protected, and are emulated. It forgets no translation by itself: `invalidate` and `flush` are its
business.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, SupportsIndex

from tdpmmu import units
from tdpmmu.bench import between
from tdpmmu.errors import InvalidArgument

if TYPE_CHECKING:
    from tdpmmu import _native
    from tdpmmu.machine import VMConfig

__all__ = ["Guest", "GuestMapping", "GuestProcess"]

Size = str | SupportsIndex


@dataclass(frozen=True, slots=True)
class GuestMapping:
    """What a process's tables say of a virtual page: the gfn behind it (4 KiB pages), its size as text."""

    gva: int
    gfn: int
    page: str
    writable: bool


@dataclass(frozen=True, slots=True)
class GuestProcess:
    """An address space of the guest: `cr3` is the gfn (4 KiB pages) of its top table, and its name."""

    cr3: int
    _native: _native.Vm = field(repr=False, compare=False)
    _config: VMConfig = field(repr=False, compare=False)

    def map(self, gva: int, gfn: int, *, page: Size = "4K", writable: bool = True, vcpu: int = 0) -> None:
        """Map a virtual page to a guest frame, by stores of a vCPU; both count 4 KiB pages.

        Args:
            gva: the virtual page number.
            gfn: the guest frame.
            page: the size of the guest's page, 4K, 2M or 1G; both numbers are aligned to it.
            writable: the guest lets itself write there.
            vcpu: which vCPU makes the stores; it runs some process already.

        Raises:
            InvalidArgument: a number beyond its limit, or not aligned; a larger page is in the way.
            Busy: another thread uses the vCPU.
            Closed, ForkedError: the VM was closed, or made before a fork.
        """
        level = units.LEVELS[units.parse_page(page)]
        span = 1 << 9 * (level - 1)
        virtual, frame = _page(self._config, gva, "gva"), _page(self._config, gfn, "gfn")
        for name, number in (("gva", virtual), ("gfn", frame)):
            if number % span:
                raise InvalidArgument(
                    f"{name}={number:#x}: a page of {page} begins at a multiple of {span:#x}"
                )
        self._native.guest_map(_vcpu(self._config, vcpu), self.cr3, virtual, frame, level, bool(writable))

    def unmap(self, gva: int, *, vcpu: int = 0) -> bool:
        """Take the page of a virtual page number out, of whatever size; return whether one was. No units.

        Raises:
            InvalidArgument, Busy, Closed, ForkedError: see `map`.
        """
        number = _page(self._config, gva, "gva")
        return self._native.guest_unmap(_vcpu(self._config, vcpu), self.cr3, number)

    def switch(self, *, vcpu: int = 0) -> None:
        """Let a vCPU run this process from now on: it loads CR3. No units.

        Raises:
            InvalidArgument, Busy, Closed, ForkedError: see `map`.
        """
        self._native.guest_switch(_vcpu(self._config, vcpu), self.cr3)

    def translate(self, gva: int) -> GuestMapping | None:
        """Return what the process's tables say of a virtual page number, or None. 4 KiB pages.

        Raises:
            InvalidArgument, Closed, ForkedError: see `map`.
        """
        number = _page(self._config, gva, "gva")
        found = self._native.guest_translate(self.cr3, number)
        if found is None:
            return None
        gfn, level, writable = found
        return GuestMapping(number, gfn, ("4K", "2M", "1G")[level - 1], writable)


@dataclass(frozen=True, slots=True)
class Guest:
    """A VM's guest as far as page tables go: its processes, and what its vCPUs have cached. No units."""

    _native: _native.Vm = field(repr=False, compare=False)
    _config: VMConfig = field(repr=False, compare=False)

    @property
    def boot(self) -> GuestProcess:
        """The process that every vCPU runs at first: virtual page n is gfn n, all over `memory` bytes."""
        return GuestProcess(self._native.guest_boot(), self._native, self._config)

    def process(self) -> GuestProcess:
        """Return a new process, with nothing mapped but what the guest's kernel needs. No units.

        Raises:
            InvalidArgument: the guest has no page left for its tables.
            Closed, ForkedError: the VM was closed, or made before a fork.
        """
        return GuestProcess(self._native.guest_process(), self._native, self._config)

    def invalidate(self, gva: int, *, vcpu: int = 0) -> None:
        """Let a vCPU forget the translation of one virtual page number (`invlpg`); 4 KiB pages.

        Raises:
            InvalidArgument, Busy, Closed, ForkedError: see `GuestProcess.map`.
        """
        number = _page(self._config, gva, "gva")
        self._native.guest_invalidate(_vcpu(self._config, vcpu), number)

    def flush(self, *, vcpu: int = 0) -> None:
        """Let a vCPU forget every translation of the process that it runs. No units.

        Raises:
            InvalidArgument, Busy, Closed, ForkedError: see `GuestProcess.map`.
        """
        self._native.guest_invalidate(_vcpu(self._config, vcpu), None)


def _page(config: VMConfig, value: object, name: str) -> int:
    number = units.as_int(value, name, "a page number as a whole number")
    # The upper half of each address space is the guest's kernel's.
    limit = config.max_gfn // 2 if name == "gva" else config.max_gfn
    if not 0 <= number < limit:
        shown = hex(number) if abs(number) < 1 << 80 else "a number"
        raise InvalidArgument(f"{name}={shown}: must be at least 0 and below {limit:#x}")
    return number


def _vcpu(config: VMConfig, value: object) -> int:
    return between(value, 0, config.vcpus - 1, "vcpu")
