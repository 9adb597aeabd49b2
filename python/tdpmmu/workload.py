"""A simple guest: every vCPU a thread, random accesses to a working set. What `VM.run` does.

Python draws the gfns and starts the threads; the accesses themselves run in the native part, in batches,
without the GIL. For latencies under an open loop use `bench`: here only outcomes are counted.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from tdpmmu.errors import StallError
from tdpmmu.machine import FaultOutcome

if TYPE_CHECKING:
    from tdpmmu.vm import VM

__all__ = ["RunReport", "drive"]

_BATCH = 4096
_POLL_SECONDS = 0.02


@dataclass(frozen=True, slots=True)
class RunReport:
    """What the guest did: accesses in all and by outcome (counts), wall-clock time in ns.

    Attributes:
        per_vcpu: accesses of each vCPU, in order.
        during: what the callable given as `during` returned.
    """

    accesses: int
    outcomes: Mapping[FaultOutcome, int]
    per_vcpu: tuple[int, ...]
    wall_ns: int
    during: object = field(repr=False)


@dataclass
class _Guest:
    """One vCPU's thread and what it has counted."""

    vm: VM
    vcpu: int
    gfns: range
    write: float
    limit: int | None
    stop: threading.Event
    counts: np.ndarray = field(default_factory=lambda: np.zeros(len(FaultOutcome), dtype=np.int64))
    error: BaseException | None = None

    def run(self) -> None:
        """Access until told to stop, or until the limit: batches of writes and of reads, by the fraction."""
        rng = np.random.default_rng([self.vm.config.seed, self.vcpu])
        left = self.limit
        try:
            while not self.stop.is_set() and left != 0:
                size = _BATCH if left is None else min(_BATCH, left)
                gfns = rng.integers(self.gfns.start, self.gfns.stop, size, dtype=np.uint64)
                cut = int(rng.binomial(size, self.write))
                for part, write in ((gfns[:cut], True), (gfns[cut:], False)):
                    outcomes = self.vm.fault_batch(part, vcpu=self.vcpu, write=write)
                    self.counts += np.bincount(outcomes, minlength=len(FaultOutcome))
                left = None if left is None else left - size
        except BaseException as error:  # carried to the thread that asked
            self.error = error
            self.stop.set()


def drive(
    vm: VM,
    *,
    gfns: range,
    vcpus: int,
    seconds: float | None,
    accesses: int | None,
    write: float,
    during: Callable[[], object] | None,
    progress: Callable[[str, float], object] | None,
    timeout: float | None,
) -> RunReport:
    """Run the guest; the arguments are those of `VM.run`, checked. Times in seconds, the result in ns.

    Raises:
        StallError: not finished within `timeout` seconds. The vCPUs have stopped.
    """
    stop = threading.Event()
    guests = [_Guest(vm, vcpu, gfns, write, accesses, stop) for vcpu in range(vcpus)]
    threads = [threading.Thread(target=guest.run, name=f"vcpu-{guest.vcpu}") for guest in guests]
    begin = time.monotonic()
    result: object = None
    try:
        for thread in threads:
            thread.start()
        if during is not None:
            result = during()
        while any(thread.is_alive() for thread in threads):
            spent = time.monotonic() - begin
            if seconds is not None and spent >= seconds:
                break
            if timeout is not None and spent >= timeout:
                raise StallError(f"not finished within timeout={timeout} s")
            if progress is not None:
                done = sum(int(guest.counts.sum()) for guest in guests)
                whole = accesses * vcpus if accesses is not None else None
                progress("run", spent / seconds if seconds else done / whole if whole else float("nan"))
            stop.wait(_POLL_SECONDS)
            if stop.is_set():
                break
    finally:
        stop.set()
        for thread in threads:
            if thread.ident is not None:
                thread.join()
    for guest in guests:
        if guest.error is not None:
            raise guest.error
    total = np.sum([guest.counts for guest in guests], axis=0)
    return RunReport(
        accesses=int(total.sum()),
        outcomes={outcome: int(total[outcome]) for outcome in FaultOutcome},
        per_vcpu=tuple(int(guest.counts.sum()) for guest in guests),
        wall_ns=int((time.monotonic() - begin) * 1e9),
        during=result,
    )
