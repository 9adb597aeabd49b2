"""What every part of `VM` leans on: the native handle, and arguments checked before they reach it."""

from __future__ import annotations

import json

import numpy as np
import numpy.typing as npt

from tdpmmu import _native, units
from tdpmmu.bench import between
from tdpmmu.errors import InvalidArgument
from tdpmmu.machine import Memslot, VMConfig, ZapReport

__all__ = ["MAX_SLOT", "Checked", "GfnArray", "zap_report"]

GfnArray = npt.NDArray[np.uint64]

MAX_SLOT = 32_763  # KVM_USER_MEM_SLOTS - 1 on x86


class Checked:
    """A VM's configuration and native handle, and the checks of what comes in."""

    __slots__ = ("_config", "_native")

    _config: VMConfig
    _native: _native.Vm

    def _gfn(self, value: object, name: str = "gfn") -> int:
        number = units.as_int(value, name, "a gfn as a whole number")
        if not 0 <= number < self._config.max_gfn:
            shown = hex(number) if abs(number) < 1 << 80 else "a number"
            raise InvalidArgument(
                f"{name}={shown}: must be at least 0 and below {self._config.max_gfn:#x}, the limit of "
                f"{self._config.levels} levels"
            )
        return number

    def _vcpu(self, value: object) -> int:
        return between(value, 0, self._config.vcpus - 1, "vcpu")

    def _space(self, value: object) -> int:
        return between(value, 0, 1, "as_id")

    def _named(self, slot: object, as_id: object) -> tuple[int, int]:
        """Return (address space, id) of a memslot that is named by itself or by its id."""
        if isinstance(slot, Memslot):
            return self._space(slot.as_id), between(slot.slot, 0, MAX_SLOT, "slot")
        return self._space(as_id), between(slot, 0, MAX_SLOT, "slot")

    def _range(self, gfns: object, name: str = "gfns") -> range:
        if not isinstance(gfns, range):
            raise TypeError(f"{name}={gfns!r}: expected a range, not {type(gfns).__name__}")
        if len(gfns) == 0:
            return range(0)
        if gfns.step != 1:
            raise InvalidArgument(f"{name}={gfns!r}: the step must be 1")
        self._gfn(gfns.start, name)
        self._gfn(gfns.stop - 1, name)
        return gfns

    def _gfns(self, gfns: npt.ArrayLike) -> GfnArray:
        given = np.asarray(gfns)
        if given.ndim != 1 or given.dtype.kind not in "iu":
            if given.size == 0 and given.ndim == 1:
                return np.empty(0, dtype=np.uint64)
            raise InvalidArgument(
                f"gfns: expected one dimension of whole numbers, not {given.ndim} of {given.dtype}"
            )
        if given.size and (given.min() < 0 or given.max() >= self._config.max_gfn):
            worst = int(given.min() if given.min() < 0 else given.max())
            self._gfn(worst, "gfns")
        return np.ascontiguousarray(given, dtype=np.uint64)


def zap_report(text: str) -> ZapReport:
    """Return what a zap took from the native side's JSON text; times in ns."""
    raw = json.loads(text)
    return ZapReport(raw["wall_ns"], raw["sptes"], raw["table_pages_before"], raw["table_pages_after"], raw)
