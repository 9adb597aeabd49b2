from collections.abc import Callable
from os import PathLike
from typing import final

import numpy as np
import numpy.typing as npt

__all__ = [
    "Vm",
    "_idle",
    "_panic",
    "available_bytes",
    "bench",
    "build_info",
    "catalogue",
    "info",
    "passes",
    "profile",
    "replay",
]

def available_bytes() -> int: ...
def build_info() -> str: ...
def info() -> str: ...
def catalogue() -> str: ...
def profile(text: str) -> str: ...
def passes(text: str) -> str: ...
def bench(
    kind: str,
    config: str,
    *,
    progress: Callable[[str, float], object] | None = None,
    timeout: float | None = None,
) -> str: ...
def replay(
    path: str | PathLike[str],
    *,
    profile: str | None = None,
    check: bool = False,
    strict: bool = False,
    vm_of: int | None = None,
    progress: Callable[[str, float], object] | None = None,
    timeout: float | None = None,
) -> str: ...
def _panic(message: str) -> None: ...
def _idle(
    seconds: float,
    *,
    progress: Callable[[str, float], object] | None = None,
    timeout: float | None = None,
) -> int: ...

_Slot = tuple[int, int, int, int, bool, bool]
_Gfns = npt.NDArray[np.uint64]

@final
class Vm:
    def __new__(cls, config: str) -> Vm: ...
    @property
    def closed(self) -> bool: ...
    @property
    def forked(self) -> bool: ...
    def add_memslot(self, slot: _Slot) -> None: ...
    def delete_memslot(self, as_id: int, slot: int, *, timeout: float | None = None) -> str: ...
    def memslots(self) -> list[_Slot]: ...
    def populate(
        self,
        start: int | None,
        stop: int | None,
        *,
        level: int,
        threads: int,
        by_fault: bool,
        progress: Callable[[str, float], object] | None = None,
        timeout: float | None = None,
    ) -> str: ...
    def fault(self, gfn: int, vcpu: int, write: bool, exec: bool) -> tuple[int, int, int]: ...
    def fault_batch(
        self,
        gfns: _Gfns,
        vcpu: int,
        write: bool,
        exec: bool,
        *,
        progress: Callable[[str, float], object] | None = None,
        timeout: float | None = None,
    ) -> bytearray: ...
    def lookup_batch(self, gfns: _Gfns) -> bytearray: ...
    def mappings(self, start: int, stop: int) -> bytearray: ...
    def unmap(self, start: int, stop: int, *, timeout: float | None = None) -> str: ...
    def fast_zap(self, *, timeout: float | None = None) -> str: ...
    def drop_root(self, vcpu: int, *, timeout: float | None = None) -> str: ...
    def stats(self) -> str: ...
    def verify(self, *, timeout: float | None = None) -> list[str]: ...
    def close(self, *, timeout: float | None = None) -> str | None: ...
