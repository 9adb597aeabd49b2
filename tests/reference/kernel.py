"""In what the kernels differ, as far as a single thread can see it at the end of an operation."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Kernel:
    """One kernel. `design` and who owns a root's first reference decide when an unused root goes."""

    name: str
    design: str
    mmu_owns_roots: bool = True
    #: A write to a page that only logging protects is fixed without the slow path (5.15).
    fast_fault: bool = True
    #: Huge leafs are split when logging starts (5.18), and in a fault that needs small ones (6.6).
    eager_split: bool = True
    fault_splits: bool = True
    #: CLEAR of an initially-all-set log splits up to and with its last page (6.12).
    clear_splits_last: bool = True
    #: Enabling an initially-all-set log protects huge leafs at once, and CLEAR does not (5.10).
    all_set_protects: bool = False
    #: D is set whenever W is granted (6.13), not only over an entry without W.
    dirty_always: bool = False
    #: A fault on a leaf that allows the access changes nothing, and a prefetch over any leaf neither (6.14).
    leaves_alone: bool = False
    #: What the end of logging takes: leafs (5.10), tables (6.1); or it makes huge leafs in place (6.13).
    collapse: str = "recover"
    #: Any table makes a huge fault step down under the NX mitigation (6.1), not only a forced one.
    any_table_steps_down: bool = False
    #: Recovery leaves tables of logging slots alone (6.2).
    recovery_skips_logged: bool = True
    #: A fault on a page that logs marks it whenever it makes the leaf writable (6.1), also over one that was.
    marks_again: bool = True
    #: Aging for reclaim flushes what was young (up to 6.12).
    aging_flushes: bool = False
    change_pte: bool = False
    #: An unmap takes the tables along that lie inside its range (up to 5.17).
    unmap_frees_tables: bool = False
    #: A gfn is protected only if its leaf can be written as it is (up to 5.16), not if it could be made so.
    protects_what_is_writable: bool = False
    slot_zap_quirk: bool = True
    #: Per-size counts of leafs (5.15).
    counts_pages: bool = True
    #: A vCPU drops all its roots when a zap asks it to (before 5.18), not only obsolete ones.
    drops_all_roots: bool = False
    #: Its fast zap leaves the roots valid and empties them (5.10).
    keeps_roots: bool = False


V7_2 = Kernel("7.2", "sync", dirty_always=True, leaves_alone=True)
V6_18 = replace(V7_2, name="6.18")
V6_12 = replace(
    V6_18, name="6.12", dirty_always=False, leaves_alone=False, collapse="tables", aging_flushes=True
)
V6_9 = replace(V6_12, name="6.9", clear_splits_last=False, slot_zap_quirk=False, change_pte=True)
V6_6 = replace(V6_9, name="6.6")
V6_1 = replace(V6_6, name="6.1", fault_splits=False, any_table_steps_down=True, recovery_skips_logged=False)
V6_1_ASYNC = replace(V6_1, name="6.1-async", design="async-worker", mmu_owns_roots=False)
V5_18 = replace(V6_1_ASYNC, name="5.18", collapse="leafs", marks_again=False)
V5_15 = replace(
    V5_18,
    name="5.15",
    design="inline",
    eager_split=False,
    drops_all_roots=True,
    unmap_frees_tables=True,
    protects_what_is_writable=True,
)
V5_10 = replace(
    V5_15,
    name="5.10",
    design="in-place",
    fast_fault=False,
    all_set_protects=True,
    counts_pages=False,
    keeps_roots=True,
)

KERNELS = {k.name: k for k in (V5_10, V5_15, V5_18, V6_1_ASYNC, V6_1, V6_6, V6_9, V6_12, V6_18, V7_2)}
