"""The functions of KVM that a kprobe can sit on, by the name that `replay` reads, oldest kernel first.

A function without a name is one that the compiler inlines, or that is not there yet, or not any more: `why`
says which. Arguments are registers of the x86-64 calling convention; `$SPT` and its like are offsets in the
host's own `struct kvm_mmu_page`. Nothing here has a unit.
"""

from __future__ import annotations

from tdpmmu.recorder.catalogue import Function, Probe, Version

__all__ = ["CALLBACKS", "OFFSETS", "PROBES"]

#: Fields of `struct kvm_mmu_page` that probes print; the layout is the build's, so it is asked of its BTF.
OFFSETS: tuple[tuple[str, str], ...] = (
    ("SPT", "spt"),
    ("ROLE", "role"),
    ("GFN", "gfn"),
    ("REFS", "tdp_mmu_root_count"),
    ("RCU", "rcu_head"),
)


def _absent(since: Version, why: str, sure: str = "source") -> Function:
    return Function(since, None, (), sure, why)


def _plain(
    name: str, need: str, function: str, buys: str, *arguments: str, since: Version = (5, 10)
) -> Probe:
    """Return a probe whose function never changed; arguments as `name=place`."""
    split = tuple((text.split("=")[0], text.split("=")[1]) for text in arguments)
    return Probe(name, need, buys, (Function(since, function, split),))


# How a root is printed: address, its table, its role word, its references.
_ROOT = (
    ("root", "%si:x64"),
    ("spt", "+$SPT(%si):x64"),
    ("role", "+$ROLE(%si):x32"),
    ("refs", "+$REFS(%si):s32"),
)
_RANGE = (("start", "%dx:x64"), ("end", "%cx:x64"))
_SPLIT = (*_RANGE, ("target_level", "%r8:s32"), ("shared", "%r9:u8"))
_CHANGE = (("as", "%si:s32"), ("gfn", "%dx:x64"))
_MODE = (("level", "%r9:s32"), ("shared", "+8(%sp):u8"))

PROBES: tuple[Probe, ...] = (
    Probe(
        "iter_start",
        "should",
        "which root the next changes of this thread belong to: without it two roots (SMM, a new root beside "
        "one "
        "that is zapped) are told apart by their old values only",
        (
            _absent(
                (5, 10), "before 5.18 tdp_iter_start is given the table, not the root: nothing to print it by"
            ),
            Function((5, 18), "tdp_iter_start", (*_ROOT, ("min_level", "%dx:s32"), ("gfn", "%cx:x64"))),
        ),
    ),
    Probe(
        "iter_restart",
        "may",
        "a walk gave mmu_lock up and starts again: yields can be counted (one a walk is its start)",
        (_absent((5, 10), "5.10 has tdp_iter_refresh_walk"), Function((5, 16), "tdp_iter_restart")),
    ),
    Probe(
        "init_sp",
        "should",
        "the address of a new table: its later free is recognised",
        (
            _absent((5, 10), "tables are made inline in kvm_tdp_mmu_map"),
            Function(
                (5, 18),
                "tdp_mmu_init_sp",
                (
                    ("sp", "%di:x64"),
                    ("spt", "+$SPT(%di):x64"),
                    ("sptep", "%si:x64"),
                    ("gfn", "%dx:x64"),
                    ("role", "%cx:x32"),
                ),
            ),
        ),
    ),
    Probe(
        "free_sp",
        "should",
        "a table's memory is freed, after its grace period: deaths are checked, leaks are seen",
        (
            _absent((5, 10), "5.10 frees at once, inside the walk"),
            Function((5, 15), "tdp_mmu_free_sp_rcu_callback", (("spt", "$SPT_OF_RCU(%di):x64"),)),
        ),
    ),
    Probe(
        "put_root",
        "should",
        "references of roots: which put was the last, and whose",
        (
            _absent((5, 10), "kvm_tdp_mmu_put_root is an inline function"),
            Function((5, 15), "kvm_tdp_mmu_put_root", _ROOT),
        ),
    ),
    Probe(
        "zap_root",
        "may",
        "a zap of a root, with the lock mode",
        (
            _absent((5, 10), "5.10 to 5.17 zap a root by zap_gfn_range"),
            _absent((5, 18), "inlined into its callers in the builds that were looked at (recorded: 6.1)"),
            Function((6, 12), "tdp_mmu_zap_root", (*_ROOT, ("shared", "%dx:u8"))),
        ),
    ),
    Probe(
        "zap_root_pass",
        "should",
        "one pass of a root's zap: its level, its lock mode, how long it took",
        (
            _absent((5, 10), "before 5.18 a root is zapped in one pass"),
            Function((5, 18), "__tdp_mmu_zap_root", (*_ROOT, ("shared", "%dx:u8"), ("zap_level", "%cx:s32"))),
        ),
    ),
    Probe(
        "zap_leafs",
        "should",
        "leafs go under mmu_lock held exclusive (notifier, range): the range, the cause",
        (
            _absent((5, 10), "5.10 to 5.17 have zap_gfn_range, which removes tables, too"),
            Function((5, 18), "tdp_mmu_zap_leafs", (*_ROOT, *_RANGE, ("can_yield", "%r8:u8"))),
        ),
    ),
    Probe(
        "zap_sp",
        "should",
        "NX recovery takes a table",
        (
            _absent((5, 10), "5.10 to 5.17 recover by kvm_tdp_mmu_zap_gfn_range"),
            Function(
                (5, 18),
                "kvm_tdp_mmu_zap_sp",
                (
                    ("sp", "%si:x64"),
                    ("spt", "+$SPT(%si):x64"),
                    ("role", "+$ROLE(%si):x32"),
                    ("gfn", "+$GFN(%si):x64"),
                ),
            ),
            _absent(
                (6, 18),
                "renamed when recovery went under the shared lock; no recording has its name",
                "memory",
            ),
        ),
    ),
    Probe(
        "hcs",
        "may",
        "`shared` of each change before its event: an atomic zap is told from an exclusive one. A line a "
        "change",
        (
            Function((5, 10), "__handle_changed_spte", (*_CHANGE, ("level", "%r9:s32")), "source"),
            Function((6, 1), "__handle_changed_spte", (*_CHANGE, *_MODE)),
            Function((6, 6), "handle_changed_spte", (*_CHANGE, *_MODE)),
            # 7.2 has the table in the place of the address space: as= is then no number of a space.
            Function((6, 18), "__handle_changed_spte", (*_CHANGE, *_MODE)),
        ),
    ),
    Probe(
        "invalidate_all_roots",
        "should",
        "the roots are invalidated: from here on nothing new comes under them",
        (
            _absent((5, 10), "roots are not invalidated before 5.13"),
            Function((5, 13), "kvm_tdp_mmu_invalidate_all_roots", (("kvm", "%di:x64"),)),
            Function((6, 14), "kvm_tdp_mmu_invalidate_roots", (("kvm", "%di:x64"), ("type", "%si:x32"))),
        ),
    ),
    Probe(
        "zap_invalidated_roots",
        "should",
        "the zap that a memslot update waits for begins",
        (
            _absent((5, 10), "roots are not invalidated before 5.13"),
            Function((5, 13), "kvm_tdp_mmu_zap_invalidated_roots", (("kvm", "%di:x64"),)),
        ),
    ),
    Probe(
        "zap_invalidated_roots_ret",
        "should",
        "and ends: how long the caller was blocked",
        (
            _absent((5, 10), "roots are not invalidated before 5.13"),
            Function((5, 13), "kvm_tdp_mmu_zap_invalidated_roots"),
        ),
        at_return=True,
    ),
    Probe(
        "zap_root_work",
        "should",
        "a worker zaps a root",
        (
            _absent((5, 10), "no worker before 5.18"),
            Function((5, 18), "tdp_mmu_zap_root_work", (("work", "%di:x64"),)),
            _absent((6, 6), "no worker from 6.6 on (nor in stable 6.1.y and 6.5.y)"),
        ),
    ),
    Probe(
        "schedule_zap_root",
        "may",
        "a root is queued for the worker",
        (
            _absent((5, 10), "no worker before 5.18"),
            Function((5, 18), "tdp_mmu_schedule_zap_root", _ROOT),
            _absent((6, 6), "no worker from 6.6 on (nor in stable 6.1.y and 6.5.y)"),
        ),
    ),
    _plain("zap_all", "should", "kvm_tdp_mmu_zap_all", "everything goes: the end of a VM"),
    Probe(
        "zap_collapsible",
        "should",
        "dirty logging ends: tables give way to huge pages",
        (
            Function((5, 10), "kvm_tdp_mmu_zap_collapsible_sptes"),
            _absent((6, 13), "replaced by recover_huge_pages"),
        ),
    ),
    Probe(
        "recover_huge_pages",
        "should",
        "dirty logging ends: tables give way to huge pages, in place",
        (
            _absent((5, 10), "up to 6.12: zap_collapsible"),
            Function((6, 13), "kvm_tdp_mmu_recover_huge_pages"),
        ),
    ),
    _plain(
        "wrprot_slot",
        "should",
        "kvm_tdp_mmu_wrprot_slot",
        "a slot is write-protected for dirty logging",
        "min_level=%dx:s32",
    ),
    _plain("clear_dirty_slot", "may", "kvm_tdp_mmu_clear_dirty_slot", "D bits of a slot are cleared (PML)"),
    _plain(
        "clear_dirty_pt_masked",
        "should",
        "kvm_tdp_mmu_clear_dirty_pt_masked",
        "KVM_GET_DIRTY_LOG or KVM_CLEAR_DIRTY_LOG takes up to 64 pages",
        "gfn=%dx:x64",
        "mask=%cx:x64",
        "wrprot=%r8:u8",
    ),
    Probe(
        "try_split",
        "may",
        "an eager split begins",
        (
            _absent((5, 10), "eager split came with 5.18"),
            Function((5, 18), "kvm_tdp_mmu_try_split_huge_pages", _SPLIT),
        ),
    ),
    Probe(
        "split_root",
        "should",
        "an eager split of one root, with its range",
        (
            _absent((5, 10), "eager split came with 5.18"),
            Function((5, 18), "tdp_mmu_split_huge_pages_root", (*_ROOT, *_SPLIT)),
        ),
    ),
    _plain("mmu_load", "should", "kvm_mmu_load", "a vCPU loads a root", "vcpu=%di:x64"),
    _plain("mmu_unload", "may", "kvm_mmu_unload", "and gives its roots up", "vcpu=%di:x64"),
    _plain(
        "free_roots",
        "should",
        "kvm_mmu_free_roots",
        "a vCPU drops cached roots: the put that may be the last",
    ),
    Probe(
        "free_obsolete_roots",
        "may",
        "a vCPU drops its roots because a fast zap asked it to",
        (
            _absent((5, 10), "before 5.18 such a request drops all roots"),
            Function((5, 18), "kvm_mmu_free_obsolete_roots", (("vcpu", "%di:x64"),)),
        ),
    ),
    _plain("uninit", "may", "kvm_mmu_uninit_tdp_mmu", "the VM's MMU ends"),
)

#: Callbacks of the host, and flushes.
CALLBACKS: tuple[Probe, ...] = (
    _plain(
        "inv_start",
        "should",
        "kvm_mmu_notifier_invalidate_range_start",
        "the host invalidates: what this thread zaps next is for it",
    ),
    _plain("inv_end", "should", "kvm_mmu_notifier_invalidate_range_end", "and is done"),
    _plain("mn_release", "should", "kvm_mmu_notifier_release", "the VMM's memory goes: a teardown's cause"),
    _plain(
        "mn_clear_young",
        "may",
        "kvm_mmu_notifier_clear_young",
        "aging, by DAMON or MGLRU",
        "start=%dx:x64",
        "end=%cx:x64",
    ),
    _plain(
        "mn_clear_flush_young",
        "may",
        "kvm_mmu_notifier_clear_flush_young",
        "aging, by reclaim",
        "start=%dx:x64",
        "end=%cx:x64",
    ),
    _plain(
        "mn_test_young", "may", "kvm_mmu_notifier_test_young", "a look at A, without a change", "addr=%dx:x64"
    ),
    Probe(
        "mn_change_pte",
        "may",
        "COW or KSM put another page in place",
        (
            Function((5, 10), "kvm_mmu_notifier_change_pte", (("addr", "%dx:x64"),)),
            _absent((6, 10), "the callback is gone"),
        ),
    ),
    _plain(
        "flush_remote_tlbs",
        "should",
        "kvm_flush_remote_tlbs",
        "vCPUs are kicked to flush: how often, and in which operation",
    ),
    Probe(
        "flush_remote_tlbs_range",
        "may",
        "the same for a range",
        (
            Function((5, 10), "kvm_flush_remote_tlbs_with_address", (("start", "%si:x64"), ("n", "%dx:x64"))),
            Function((6, 6), "kvm_flush_remote_tlbs_range", (("start", "%si:x64"), ("n", "%dx:x64"))),
        ),
    ),
)
