//! What is known of each thread: the root it works on, what it is removing, what it has just allocated.

use super::tree::{RootId, TableId};
use super::zaps::Stretch;

/// A page-table page that was allocated and is not linked yet.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Birth {
    pub(crate) gfn: u64,
    pub(crate) level: u8,
    /// Kernel address of the table, where it is recorded.
    pub(crate) spt: Option<u64>,
}

pub(crate) struct Thread {
    pub(crate) pid: u32,
    pub(crate) comm: String,
    /// A kernel thread or worker: it belongs to no VM.
    pub(crate) kernel: bool,
    pub(crate) vm: usize,
    pub(crate) root: Option<RootId>,
    /// Chosen by old values, where no event names the root.
    pub(crate) guessed_root: Option<RootId>,
    /// Tables being removed by this thread, outermost first.
    pub(crate) removal: Vec<TableId>,
    pub(crate) birth: Option<Birth>,
    /// The root that it has made since it began to load one.
    pub(crate) made_root: Option<RootId>,
    /// Announced changes: gfn, level, shared; outermost first.
    pub(crate) announced: Vec<(u64, u8, bool)>,
    /// Last change: table, index, new value.
    pub(crate) last: Option<(TableId, usize, u64)>,
    /// `zap_root_pass` says so until the thread does something else.
    pub(crate) shared: Option<bool>,
    /// Has served a guest's fault.
    pub(crate) faults: bool,
    /// gfn of the guest's fault that the thread serves.
    pub(crate) fault: Option<u64>,
    pub(crate) stretch: Option<Stretch>,
    /// Events were lost since its root was last named: what it changes can't be placed.
    pub(crate) adrift: bool,
    /// Begin of the fault that it serves.
    pub(crate) fault_since: Option<u64>,
    /// Begin of the notifier call that it is in.
    pub(crate) notifier_since: Option<u64>,
    /// It has a page to map and has not mapped it yet.
    pub(crate) has_page: bool,
    /// Operations of a test program that are open in this thread.
    pub(crate) ops: Vec<OpenOp>,
}

/// An operation that a mark has begun.
#[derive(Clone, Debug)]
pub(crate) struct OpenOp {
    pub(crate) number: u64,
    pub(crate) kind: String,
    pub(crate) detail: String,
    pub(crate) t0: u64,
}

impl Thread {
    pub(crate) fn new(pid: u32, comm: &[u8], vm: usize) -> Self {
        const KERNEL: [&[u8]; 9] = [
            b"kworker",
            b"ksoftirqd",
            b"ksmd",
            b"kdamond",
            b"kvm-nx-lpage",
            b"khugepaged",
            b"kswapd",
            b"migration/",
            b"<idle>",
        ];
        Self {
            pid,
            comm: String::from_utf8_lossy(comm).into_owned(),
            kernel: KERNEL.iter().any(|k| comm.starts_with(k)),
            vm,
            root: None,
            guessed_root: None,
            removal: Vec::new(),
            birth: None,
            made_root: None,
            announced: Vec::new(),
            last: None,
            shared: None,
            faults: false,
            fault: None,
            stretch: None,
            adrift: false,
            fault_since: None,
            notifier_since: None,
            has_page: false,
            ops: Vec::new(),
        }
    }

    pub(crate) fn vm_if_user(&self) -> Option<usize> {
        (!self.kernel).then_some(self.vm)
    }

    /// An entry was zapped; without a stretch a new one begins, its cause taken from what the thread is.
    pub(crate) fn zap_entry(&mut self, level: u8, ns: u64, replaced: bool, leaf: bool, root: RootId) {
        let stretch = self.zapping(ns, replaced);
        stretch.removed(level, ns, leaf, root);
    }

    /// The stretch that a removal belongs to.
    pub(crate) fn zapping(&mut self, ns: u64, replaced: bool) -> &mut Stretch {
        let cause = match () {
            () if self.comm.starts_with("kvm-nx-lpage") => "nx_recovery",
            () if self.comm.starts_with("kworker") => "worker",
            () if replaced || self.fault.is_some() => "replace",
            () => "other",
        };
        self.stretch.get_or_insert_with(|| Stretch::new(cause, ns, false))
    }

    pub(crate) fn zap_table(&mut self) {
        if let Some(stretch) = &mut self.stretch {
            stretch.table();
        }
    }
}
