"""What of KVM can be recorded, kernel by kernel: the trace points; and what a probe is (`probes` lists them).

A row says what `replay` gains by it. `sure` tells where a row is from: `recorded` (recordings of 6.1, 6.12
or 7.2 have it; for kernels between them it is read in sources), `source` (read in sources of that time),
`memory` (neither: look before you rely on it). Versions are pairs. Nothing here has a unit.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["KERNELS", "TRACE_POINTS", "Function", "Probe", "TracePoint", "Version"]

Version = tuple[int, int]

#: The kernels whose functions are listed; between two of them the older one's row is taken.
KERNELS: tuple[Version, ...] = ((5, 10), (5, 15), (5, 18), (6, 1), (6, 6), (6, 12), (6, 18), (7, 2))


@dataclass(frozen=True, slots=True)
class TracePoint:
    """A trace point: `system:name`, the kernels that have it, what it buys, how many lines to expect."""

    system: str
    name: str
    since: Version
    until: Version | None
    need: str  # must, should, may
    buys: str
    rate: str
    sure: str = "recorded"

    def there(self, kernel: Version) -> bool:
        """Tell whether a kernel has it."""
        return self.since <= kernel and (self.until is None or kernel <= self.until)


@dataclass(frozen=True, slots=True)
class Function:
    """One kernel's function behind a probe; `arguments` None where the compiler leaves nothing to probe."""

    since: Version
    name: str | None
    arguments: tuple[tuple[str, str], ...] = ()
    sure: str = "recorded"
    why: str = ""


@dataclass(frozen=True, slots=True)
class Probe:
    """A kprobe that `replay` reads: the name it must have, its functions oldest first, what it buys."""

    name: str
    need: str
    buys: str
    functions: tuple[Function, ...]
    at_return: bool = False

    def function(self, kernel: Version) -> Function | None:
        """Return what to probe in a kernel; None where it has nothing of the kind."""
        found = None
        for function in self.functions:
            if function.since <= kernel:
                found = function
        return found


_M, _K = "kvmmmu", "kvm"
TRACE_POINTS: tuple[TracePoint, ...] = (
    TracePoint(
        _M,
        "kvm_tdp_mmu_spte_changed",
        (5, 11),
        None,
        "must",
        "every SPTE change with its old and new value: without it there is nothing to replay",
        "one a changed entry, and up to 512 a removed table",
    ),
    TracePoint(
        _M,
        "kvm_mmu_prepare_zap_page",
        (5, 11),
        None,
        "must",
        "a table goes: its children's events belong to a removal, not to a live table",
        "one a removed table",
    ),
    TracePoint(
        _M,
        "kvm_mmu_get_page",
        (5, 11),
        None,
        "should",
        "a table is born: births are checked instead of inferred",
        "one a new table",
    ),
    TracePoint(
        _M,
        "kvm_mmu_zap_all_fast",
        (5, 10),
        None,
        "should",
        "where a fast zap begins: zaps of memslot updates have their cause",
        "one a fast zap",
    ),
    TracePoint(
        _M,
        "kvm_mmu_spte_requested",
        (5, 10),
        None,
        "should",
        "what the host gave a fault: page and mapping level",
        "one a slow fault",
    ),
    TracePoint(
        _M,
        "kvm_mmu_set_spte",
        (5, 10),
        None,
        "should",
        "what a fault installed, and where: an independent look at the rebuilt entry",
        "one a slow fault",
    ),
    TracePoint(
        _M,
        "fast_page_fault",
        (5, 10),
        None,
        "should",
        "W given back without mmu_lock (TDP MMU: 5.15 and later), which changes an entry without an event",
        "one a write to a protected page",
    ),
    TracePoint(
        _M,
        "kvm_mmu_split_huge_page",
        (5, 18),
        None,
        "should",
        "512 children were filled in without an event: their first old values can be checked",
        "one a split huge page",
    ),
    TracePoint(
        _M,
        "mark_mmio_spte",
        (5, 10),
        None,
        "may",
        "an entry for a gfn without memory, with its generation",
        "one a first MMIO access",
    ),
    TracePoint(
        _M,
        "check_mmio_spte",
        (5, 10),
        None,
        "may",
        "an MMIO entry was looked at: is it current?",
        "one an MMIO exit",
    ),
    TracePoint(
        _K,
        "kvm_page_fault",
        (5, 10),
        None,
        "should",
        "the guest's faults by kind; from 5.19 or so also the vCPU (older lines have no vCPU number)",
        "one a fault",
    ),
    TracePoint(
        _K,
        "kvm_unmap_hva_range",
        (5, 10),
        None,
        "should",
        "the host takes pages away: zaps of the notifier have their cause and their range",
        "one an invalidation",
    ),
    TracePoint(
        _K,
        "kvm_age_hva",
        (5, 10),
        None,
        "should",
        "reclaim or DAMON ages pages: events that clear A are explained",
        "many under DAMON or MGLRU",
    ),
    TracePoint(
        _K,
        "kvm_test_age_hva",
        (5, 10),
        None,
        "may",
        "as kvm_age_hva, without a change",
        "many under DAMON",
    ),
    TracePoint(
        _K,
        "kvm_set_spte_hva",
        (5, 10),
        (6, 9),
        "may",
        "the change_pte notifier, gone in 6.10",
        "one a COW",
        "source",
    ),
    TracePoint(
        _K,
        "kvm_smm_transition",
        (5, 16),
        None,
        "may",
        "the guest enters or leaves SMM: address space 1 has roots of its own",
        "two an SMI",
        "source",
    ),
    TracePoint(
        _K,
        "kvm_dirty_ring_push",
        (5, 11),
        None,
        "may",
        "a page enters a dirty ring",
        "one a dirtied page",
    ),
    TracePoint(
        _K,
        "kvm_dirty_ring_reset",
        (5, 11),
        None,
        "may",
        "a harvested ring is reset",
        "one a reset",
    ),
    TracePoint(
        _K,
        "kvm_dirty_ring_exit",
        (5, 11),
        None,
        "may",
        "a vCPU left because its ring is full",
        "rare",
    ),
    TracePoint(
        _K,
        "kvm_userspace_exit",
        (5, 10),
        None,
        "may",
        "when a vCPU went back to the VMM",
        "one an exit",
    ),
)
