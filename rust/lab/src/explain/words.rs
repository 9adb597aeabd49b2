//! An event in words.

use tdpmmu_platform::{Event, LockClass};
use tdpmmu_spte::{Format, Spte};

use super::books::{Books, owner};

/// How much an event says to somebody who does not look for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Weight {
    /// Nothing: only its number is told.
    Noise,
    /// Told while there is room.
    Detail,
    /// Told.
    Step,
}

/// An entry: `0`, `FROZEN`, `mmio`, `->table 5`, `pfn 0x200 RWX A D`.
pub(super) fn spte(format: &Format, value: u64, level: u8) -> String {
    let s = Spte(value);
    if format.is_empty(s) {
        return "0".into();
    }
    if format.is_frozen(s) {
        return "FROZEN".into();
    }
    if format.is_mmio(s) {
        return "mmio".into();
    }
    if !s.is_present() {
        return format!("{value:#x} (not present)");
    }
    if s.is_table(level) {
        return format!("->table {}", s.pfn());
    }
    let mut text = format!("pfn {:#x} ", s.pfn());
    text += "R";
    if format.is_writable(s) {
        text += "W";
    } else if format.is_mmu_writable(s) {
        text += "(W)";
    }
    if format.is_executable(s) {
        text += "X";
    }
    if format.is_accessed(s) {
        text += " A";
    }
    if format.is_dirty(s) {
        text += " D";
    }
    match level {
        2 => text += " 2M",
        3 => text += " 1G",
        _ => {}
    }
    text
}

fn mode(shared: bool) -> &'static str {
    if shared { "shared" } else { "exclusive" }
}

fn span(start: u64, end: u64) -> String {
    match end {
        u64::MAX => "everything".into(),
        _ if end == start + 1 => format!("gfn {start:#x}"),
        _ => format!("gfns {start:#x}..{end:#x}"),
    }
}

/// What the event says, and how much.
pub(super) fn event(books: &Books, format: &Format, event: &Event) -> (Weight, String) {
    use Weight::{Detail, Noise, Step};
    let change = |root: u32, gfn: u64, level: u8, old: u64, new: u64| {
        let place = books.place(root, gfn, level).unwrap_or_else(|| format!("root {root}"));
        let (old, new) = (spte(format, old, level), spte(format, new, level));
        format!("{place} L{level} gfn {gfn:#x}: {old} -> {new}")
    };
    match *event {
        Event::SpteChanged { root, gfn, level, old, new, .. } => {
            let sweep = format.is_empty(Spte(old)) && format.is_frozen(Spte(new));
            (if sweep { Noise } else { Step }, change(root, gfn, level, old, new))
        }
        Event::SpteMarked { root, gfn, level, old, new, .. } => {
            (Step, format!("unlocked: {}", change(root, gfn, level, old, new)))
        }
        Event::TableAlloc { table, level, gfn } => {
            (Noise, format!("table {table} for L{level} gfn {gfn:#x}"))
        }
        Event::TableLink { table, parent, index } => {
            (Noise, format!("table {table} linked at {parent}[{index}]"))
        }
        Event::TableUnlink { table, level, gfn } => {
            (Step, format!("table {table} unlinked (L{level} gfn {gfn:#x})"))
        }
        Event::TableFree { table } => (Step, format!("table {table} back in the pool")),
        Event::RootAlloc { root, .. } => (Step, format!("root {root} made: {}", books.refs(root))),
        Event::RootGet { root, owner: by, .. } => {
            (Step, format!("root {root}: {} +1, {}", owner(by), books.refs(root)))
        }
        Event::RootPut { root, owner: by, .. } => {
            (Step, format!("root {root}: {} -1, {}", owner(by), books.refs(root)))
        }
        Event::RootPass { root, from, to } => (
            Step,
            format!(
                "root {root}: {} gives its reference to {}, {}",
                owner(from),
                owner(to),
                books.refs(root)
            ),
        ),
        Event::RootInvalidate { root } => (Step, format!("root {root} INVALID")),
        Event::RootSchedule { root } => (Step, format!("root {root} scheduled for its zap")),
        Event::RootZapBegin { root } => (Step, format!("zap of root {root} begins")),
        Event::RootZapEnd { root } => (Step, format!("zap of root {root} ends")),
        Event::RootFree { root } => (Step, format!("root {root} given to RCU")),
        Event::FastZapBegin => (Step, "FAST ZAP begins".into()),
        Event::FastZapEnd => (Step, "FAST ZAP returns".into()),
        Event::Lock { shared } => (Detail, format!("mmu_lock taken, {}", mode(shared))),
        Event::Unlock { shared, debt } => {
            let owed = if debt { ", A FLUSH OWED" } else { "" };
            (if debt { Step } else { Detail }, format!("mmu_lock released, {}{owed}", mode(shared)))
        }
        Event::Flush { start, end, .. } => (Step, format!("flush of {} done", span(start, end))),
        Event::NotifierBegin { start, end } => (Step, format!("host takes {} away: begin", span(start, end))),
        Event::NotifierEnd { start, end } => (Step, format!("host has taken {} away: end", span(start, end))),
        Event::FrameRelease { pfn, count } => (Step, format!("host frees pfn {pfn:#x}{}", times(count))),
        Event::Kick { vcpu } => (Step, format!("kicks vCPU {vcpu}")),
        Event::WorkBegin { root, .. } => (Step, format!("work item of root {root} begins")),
        Event::WorkEnd { root } => (Step, format!("work item of root {root} ends")),
        Event::Stall { reader, .. } => (Detail, format!("a grace period waits for reader {reader}")),
        Event::FlushBegin { start, end } => (Detail, format!("flush of {} asked for", span(start, end))),
        Event::FlushEnd { .. } => (Noise, "flush delivered".into()),
        Event::NotifierActive { start, end } => {
            (Detail, format!("faults in {} are held off", span(start, end)))
        }
        Event::NotifierEnding { .. } => (Noise, "the host's change is complete".into()),
        Event::LookUp { gfn, .. } => (Detail, format!("fault at gfn {gfn:#x}: sequence sampled")),
        Event::Resolved { gfn, pfn, level, .. } => {
            (Step, format!("fault at gfn {gfn:#x}: the host says pfn {pfn:#x}, L{level}"))
        }
        Event::FaultRetry { gfn, .. } => (Step, format!("fault at gfn {gfn:#x} begins again")),
        Event::FrameStale { pfn, what } => {
            (Step, format!("{what} REACHES pfn {pfn:#x}, WHICH HAS ANOTHER OWNER"))
        }
        Event::WriteBack { pfn, count, dirty } => {
            let bit = if dirty { "Dirty" } else { "Accessed" };
            (Step, format!("{bit} of pfn {pfn:#x}{} written back", times(count)))
        }
        Event::LogBegin { start, end, .. } => (Step, format!("{} logged from here on", span(start, end))),
        Event::LogEnd { start, end, .. } => (Step, format!("{} logged no more", span(start, end))),
        Event::DirtyMark { gfn, .. } => (Step, format!("gfn {gfn:#x} marked dirty")),
        Event::DirtyTake { base, mask, .. } => (Step, format!("marks {mask:#b} from gfn {base:#x} on taken")),
        Event::LogReturn { start, end, .. } => {
            (Detail, format!("the log of {} is returned", span(start, end)))
        }
        Event::WriteProtected { gfn, .. } => (Step, format!("gfn {gfn:#x} is write-protected")),
        Event::NxListed { table } => (Step, format!("table {table} is an NX candidate")),
        Event::NxUnlisted { table } => (Step, format!("table {table} is no NX candidate any more")),
        Event::SlotPublish { start, end, going, .. } => {
            (Step, format!("memslot of {} {}", span(start, end), if going { "INVALID" } else { "settled" }))
        }
        Event::VmBegin { .. } => (Noise, "the VM begins".into()),
        Event::VmEnd => (Step, "no vCPU runs any more".into()),
        Event::VmGone => (Step, "the VM's tables are gone".into()),
        Event::Users { users } => (Step, format!("the VM has {users} users")),
        Event::Acquire { lock: LockClass::Slots, .. } => (Detail, "slots_lock taken".into()),
        Event::Release { lock: LockClass::Slots } => (Detail, "slots_lock released".into()),
        Event::GuestEnter { vcpu, root } => (Step, format!("vCPU {vcpu} enters the guest on root {root}")),
        Event::GuestExit { vcpu } => (Step, format!("vCPU {vcpu} leaves the guest")),
        Event::TlbFlush { vcpu } => (Step, format!("vCPU {vcpu} empties its TLB")),
        Event::TlbFlushRoot { vcpu, root } => (Detail, format!("vCPU {vcpu} flushes the tag of root {root}")),
        Event::TlbFill { vcpu, gfn, level, spte: value, .. } => {
            (Step, format!("TLB of vCPU {vcpu}: gfn {gfn:#x} = {}", spte(format, value, level)))
        }
        Event::StructureFill { vcpu, table, level, .. } => {
            (Detail, format!("vCPU {vcpu} caches table {table} (L{level})"))
        }
        Event::StructureUse { vcpu, table, level, .. } => {
            (Detail, format!("vCPU {vcpu} walks from its cached table {table} (L{level})"))
        }
        Event::GuestAccess { gfn, pfn, write, .. } => {
            (Step, format!("guest {} gfn {gfn:#x}: pfn {pfn:#x}", if write { "WRITES" } else { "reads" }))
        }
        Event::ShadowAlloc { table, gfn, level, .. } => {
            (Step, format!("shadow page {table} made: L{level} gfn {gfn:#x}"))
        }
        Event::ShadowLink { parent, index, child } => {
            (Step, format!("shadow page {child} linked at {parent}[{index}]"))
        }
        Event::ShadowUnlink { parent, index, child } => {
            (Step, format!("shadow page {child} unlinked from {parent}[{index}]"))
        }
        Event::ShadowLeaf { table, index, gfn, level, old, new, .. } => {
            let (old, new) = (spte(format, old, level), spte(format, new, level));
            (Step, format!("{table}[{index}] L{level} gfn {gfn:#x}: {old} -> {new}"))
        }
        Event::ShadowZap { table } => (Step, format!("shadow page {table} zapped: INVALID")),
        Event::ShadowFree { table } => (Step, format!("shadow page {table} to be freed")),
        Event::ShadowToggle { generation } => {
            (Step, format!("generation {generation}: all shadow pages OBSOLETE"))
        }
        Event::ShadowRoot { root, count } => (Step, format!("shadow root {root}: {count} vCPUs")),
        Event::ShadowUnsync { table, on } => {
            (Step, format!("shadow page {table} {}", if on { "UNSYNC" } else { "in step again" }))
        }
        Event::ReadingBegin { vcpu } => (Step, format!("vCPU {vcpu} reads shadow pages")),
        Event::ReadingEnd { vcpu } => (Step, format!("vCPU {vcpu} reads no more")),
        Event::ShadowWalked { table } => (Detail, format!("stands on shadow page {table}")),
        // RCU sections, checks, other locks: what they say is in what they protect.
        ref other => (Noise, format!("{other:?}")),
    }
}

fn times(count: u64) -> String {
    if count == 1 { String::new() } else { format!(" and {} more", count - 1) }
}

/// What should have been done, by the rule that tells that it was not.
pub(super) fn obligation(rule: &str) -> &'static str {
    match rule {
        "put-by-non-owner" => {
            "a reference is put by who holds it: each get, gift and hand-over gives one put (I4, O-REF)"
        }
        "refs-differ" => {
            "the count of a root is the sum of what its owners hold, whenever nobody is in the middle of a change (O-REF)"
        }
        "resurrected" => {
            "a count that has reached zero is raised again by nobody but the one who re-arms it for its zap (I2)"
        }
        "fast-zap-left" => {
            "when a fast zap returns, nothing is mapped under any root that was there when it began (P-FZ)"
        }
        "gift-kept" => {
            "who invalidates a root gives a reference to who zaps it, and that one puts it before the fast zap returns"
        }
        "created-under-invalid" => {
            "a fault that takes mmu_lock after a root was invalidated maps nothing under it (I5)"
        }
        "scheduled-twice" => "each valid -> invalid transition makes one obligation to zap, not two (P-1)",
        "never-scheduled" => "each valid -> invalid transition makes one obligation to zap (P-1)",
        "root-leaked" => "at the end of the VM no root is left (O-END)",
        "table-leaked" | "pool-count" => "each table that is taken from the pool comes back, once (O-END)",
        "flush-owed" => "who took a translation away flushes before giving mmu_lock up (O-DEBT)",
        "tree-differs" => "what is in the tables is what was reported, and nothing else",
        "broken-history" => "the changes of one entry join into one history",
        "frozen-changed" => "a frozen entry is changed by its owner alone (I8)",
        "frozen-left" => "who freezes an entry replaces it",
        "leaf-moved" => "a present leaf never changes its frame without having been empty (R5)",
        "freed-referenced" => "a root is freed when nobody holds it",
        "freed-unzapped" => "a root is freed when it is empty",
        "freed-while-linked" => "a table is unlinked before it is freed (I7)",
        "freed-twice" => "a table is freed once (I9)",
        "touched-after-free" => {
            "a table that went back to the pool is not touched any more: its readers were inside an RCU section, and it waited for them (O-RCU)"
        }
        "zap-unreferenced" => {
            "while a zap may give mmu_lock up its root is held, so that a notifier reaches its entries too (P-RCH)"
        }
        "shadow-life" => {
            "a shadow page is made, zapped, handed to reclamation after a flush, and freed, each once (O-LIST)"
        }
        "freed-unflushed" => "between the zap of a shadow page and its reclamation lies a flush (O-TLB)",
        "freed-under-reader" => "a page is freed when every walk that may stand on it has ended (O-RCU)",
        "walked-freed" => "no walk comes to a page that was freed (O-TLB)",
        "zap-progress" => "a zap of everything comes ten pages further between two yields (O-PROG)",
        "wrong-lock-mode" => "an entry changes in the mode of mmu_lock that its change needs (O-LOCK)",
        "rmap-differs" | "parents-differ" | "pages-differ" | "unsync-differs" => {
            "reverse maps, parents, lists and unsync marks say what the tables hold (O-LIST)"
        }
        "tracked-writable" => {
            "a guest's table that is shadowed is not written unseen, unless its page is unsync (O-INV)"
        }
        "lpage-differs" => "lpage_info counts the shadowed tables of its slot (O-STAT)",
        "slot-books-gone" => "a memslot's books outlive every shadow page that refers to them (O-RCU)",
        "obsolete-reachable" => "no way leads from a valid root to an obsolete or invalid page (O-INV)",
        "list-differs" => "the root list holds the roots that are counted (O-LIST)",
        "stats-differ" => "the statistics are what a recount gives (O-STAT)",
        "deadlock" => "whoever waits is woken in the end",
        "step-limit" => "every operation ends after a bounded number of steps (O-PROG)",
        "step-too-long" => {
            "a task with mmu_lock held checks for a yield after a bounded stretch of work (O-PROG)"
        }
        "rcu-section-too-long" => "an RCU read section is bounded (O-RCULEN)",
        "panic" => "the engine does not panic",
        "unclean-end" => "a VM that ends leaves nothing behind",
        "engine" => "the engine's own invariants hold",
        _ => "the rule that its name tells (docs/rules.md)",
    }
}
