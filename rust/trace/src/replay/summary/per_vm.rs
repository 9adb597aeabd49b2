//! Which VM a root, a thread, a zap belongs to.
//!
//! **Guarantee.** Two VMs of different processes are never mixed where the recording names processes (or a test program
//! names its VMs in marks). Within one process, or where no process is named, roots tell: a thread that serves a guest's
//! fault on a root is a vCPU of that root's VM, so two roots that one vCPU uses are of one VM. What this can't decide is
//! counted as ambiguous, not given to somebody.
//!
//! **Mechanism.** Roots and vCPU threads are nodes of a forest; a fault of a thread on a root joins the two. A thread that
//! does other things (ioctls, notifiers, workers) joins nothing.

use serde::Serialize;
use std::collections::HashMap;

/// Most thread ids that are listed of a VM.
const LISTED_PIDS: usize = 64;

/// A virtual machine.
#[derive(Clone, Debug, Default, Serialize, PartialEq, Eq)]
pub struct PerVm {
    /// Number within the recording, from 0, by the first root.
    pub id: u64,
    /// The number that the marks of a test program give it.
    pub script: Option<u64>,
    /// Process, where it is recorded.
    pub tgid: Option<u32>,
    /// Name of the first thread that served a fault of it, or that made its root.
    pub comm: String,
    /// Threads that served its faults, or else made its roots.
    pub pids: Vec<u32>,
    /// Roots, by address and generation.
    pub roots: u64,
    /// SPTE changes.
    pub transitions: u64,
    /// Guest faults.
    pub faults: u64,
    /// Zaps.
    pub zaps: u64,
    /// Leafs of 4 KiB at the end of the recording.
    pub pages_4k: u64,
    /// Leafs of 2 MiB.
    pub pages_2m: u64,
    /// Leafs of 1 GiB.
    pub pages_1g: u64,
    /// How it was told from others: `marks`, `process`, `roots`.
    pub told_by: &'static str,
}

/// What could not be given to a VM.
#[derive(Clone, Debug, Default, Serialize, PartialEq, Eq)]
pub struct Ambiguous {
    /// SPTE changes whose root could be one of several VMs'.
    pub transitions: u64,
    /// Why, in words; null when there are none.
    pub why: Option<String>,
}

/// Identity of a VM as far as process and marks tell it.
type Key = (Option<u32>, Option<u64>);

#[derive(Default)]
struct RootBook {
    transitions: u64,
    faults: u64,
    zaps: u64,
    leafs: [i64; 4],
    key: Key,
    creator: u32,
    comm: String,
}

#[derive(Default)]
struct ThreadBook {
    pid: u32,
    comm: String,
    /// Faults whose root is not known yet.
    pending: u64,
    /// The root of its last fault.
    last_root: Option<usize>,
}

#[derive(Default)]
pub(crate) struct VmBook {
    roots: Vec<RootBook>,
    threads: Vec<ThreadBook>,
    /// Union-find over roots.
    above: Vec<usize>,
    pub(crate) unplaced: u64,
}

impl VmBook {
    /// Root number `root` (rising from 0) has come to life.
    pub(crate) fn root(&mut self, root: usize, key: Key, pid: u32, comm: &str) {
        while self.roots.len() <= root {
            self.above.push(self.roots.len());
            self.roots.push(RootBook::default());
        }
        let book = &mut self.roots[root];
        (book.key, book.creator) = (key, pid);
        comm.clone_into(&mut book.comm);
    }

    fn top(&self, mut root: usize) -> usize {
        while self.above[root] != root {
            root = self.above[root];
        }
        root
    }

    /// Are these two roots known to be of one VM?
    pub(crate) fn one_vm(&self, a: usize, b: usize) -> bool {
        a.max(b) < self.roots.len() && self.top(a) == self.top(b)
    }

    fn join(&mut self, a: usize, b: usize) {
        let (a, b) = (self.top(a), self.top(b));
        // The older one stays on top: VMs are numbered by it.
        self.above[a.max(b)] = a.min(b);
    }

    /// Thread number `thread` changes SPTEs of this root to serve a guest's fault.
    #[inline]
    pub(crate) fn serves(&mut self, thread: usize, root: usize) {
        let Some(book) = self.threads.get_mut(thread) else { return };
        let Some(of_root) = self.roots.get_mut(root) else { return };
        of_root.faults += std::mem::take(&mut book.pending);
        if book.last_root == Some(root) {
            return;
        }
        let before = book.last_root.replace(root);
        // A test program runs the vCPUs of one VM after another in one thread; its marks tell them apart.
        if let Some(before) = before
            && self.roots[before].key == self.roots[root].key
        {
            self.join(before, root);
        }
    }

    pub(crate) fn fault(&mut self, thread: usize, pid: u32, comm: &str) {
        if self.threads.len() <= thread {
            self.threads.resize_with(thread + 1, ThreadBook::default);
        }
        let book = &mut self.threads[thread];
        book.pending += 1;
        if book.comm.is_empty() {
            book.pid = pid;
            comm.clone_into(&mut book.comm);
        }
    }

    #[inline]
    pub(crate) fn transition(&mut self, root: usize) {
        if let Some(book) = self.roots.get_mut(root) {
            book.transitions += 1;
        }
    }

    pub(crate) fn zap(&mut self, root: usize) {
        if let Some(book) = self.roots.get_mut(root) {
            book.zaps += 1;
        }
    }

    #[inline]
    pub(crate) fn leaf(&mut self, root: usize, level: u8, by: i64) {
        if let Some(book) = self.roots.get_mut(root) {
            book.leafs[level as usize] += by;
        }
    }

    /// The VM of each thread that served a fault, by the numbers that [`VmBook::finish`] gives to roots.
    pub(crate) fn of_thread(&self, thread: usize) -> Option<usize> {
        self.threads.get(thread)?.last_root
    }

    /// The VMs, and the number of each root's VM.
    pub(crate) fn finish(mut self) -> (Vec<PerVm>, Vec<u64>) {
        // What marks name is one VM, whoever's faults were seen. Without any fault nothing tells the VMs of a process apart.
        let no_faults = self.threads.is_empty();
        let mut first_of: HashMap<Key, usize> = HashMap::new();
        for root in 0..self.roots.len() {
            let key = self.roots[root].key;
            if key.1.is_none() && !no_faults {
                continue;
            }
            let first = *first_of.entry(key).or_insert(root);
            self.join(first, root);
        }
        let mut id_of = vec![u64::MAX; self.roots.len()];
        let mut vms: Vec<PerVm> = Vec::new();
        for root in 0..self.roots.len() {
            let top = self.top(root);
            let book = &self.roots[root];
            if id_of[top] == u64::MAX {
                id_of[top] = vms.len() as u64;
                let (tgid, script) = book.key;
                let told_by = match (script, tgid) {
                    (Some(_), _) => "marks",
                    (None, Some(_)) => "process",
                    (None, None) => "roots",
                };
                vms.push(PerVm { id: id_of[top], script, tgid, told_by, ..PerVm::default() });
            }
            id_of[root] = id_of[top];
            let vm = &mut vms[id_of[top] as usize];
            vm.roots += 1;
            vm.transitions += book.transitions;
            vm.zaps += book.zaps;
            vm.faults += book.faults;
            let leaf = |level: usize| u64::try_from(book.leafs[level]).unwrap_or(0);
            vm.pages_4k += leaf(1);
            vm.pages_2m += leaf(2);
            vm.pages_1g += leaf(3);
        }
        for thread in &self.threads {
            let Some(root) = thread.last_root else { continue };
            let vm = &mut vms[id_of[root] as usize];
            vm.faults += thread.pending;
            if vm.comm.is_empty() {
                vm.comm.clone_from(&thread.comm);
            }
            if vm.pids.len() < LISTED_PIDS && !vm.pids.contains(&thread.pid) {
                vm.pids.push(thread.pid);
            }
        }
        for (root, book) in self.roots.iter().enumerate() {
            let vm = &mut vms[id_of[root] as usize];
            if vm.comm.is_empty() {
                vm.comm.clone_from(&book.comm);
            }
            if vm.pids.is_empty() {
                vm.pids.push(book.creator);
            }
        }
        // Two VMs of one process that only roots told apart.
        for k in 0..vms.len() {
            let same = |other: &PerVm| other.script.is_none() && other.tgid == vms[k].tgid;
            if vms[k].told_by == "process" && vms.iter().filter(|vm| same(vm)).count() > 1 {
                vms[k].told_by = "roots";
            }
        }
        (vms, id_of)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two vCPUs of one VM and one of another, of the same process, none of them named by marks.
    fn two(tgid: Option<u32>) -> Vec<PerVm> {
        let mut book = VmBook::default();
        for root in 0..4 {
            book.root(root, (tgid, None), 9, "vmm");
        }
        for (thread, root) in [(0, 0), (1, 0), (1, 2), (2, 1), (2, 3), (2, 3)] {
            book.fault(thread, 10 + thread as u32, "vcpu");
            book.serves(thread, root);
            book.transition(root);
        }
        book.finish().0
    }

    #[test]
    fn roots_tell_two_vms_of_one_process_apart() {
        for tgid in [None, Some(5)] {
            let vms = two(tgid);
            let told: Vec<_> = vms
                .iter()
                .map(|v| (v.id, v.roots, v.transitions, v.faults, v.pids.clone(), v.told_by))
                .collect();
            assert_eq!(told, [(0, 2, 3, 3, vec![10, 11], "roots"), (1, 2, 3, 3, vec![12], "roots")]);
        }
    }

    #[test]
    fn a_thread_that_runs_one_vm_after_another_joins_no_two_that_marks_name() {
        let mut book = VmBook::default();
        for (root, script) in [(0, 1), (1, 1), (2, 2)] {
            book.root(root, (None, Some(script)), 9, "vmm");
            book.fault(0, 9, "vmm");
            book.serves(0, root);
        }
        let vms = book.finish().0;
        assert_eq!(vms.iter().map(|v| (v.script, v.roots)).collect::<Vec<_>>(), [(Some(1), 2), (Some(2), 1)]);
        assert!(vms.iter().all(|v| v.told_by == "marks"));
    }
}
