//! O-LIST, and work items: what is on an intrusive list is alive and there once; who works on a VM has it.
//!
//! **Guarantee.** A table is a candidate of the NX recovery once, while it is linked, and is off the list before it is freed (I15). A table is accounted for as linked before
//! anybody can unlink it (bug-history 9). No work item runs after its VM is gone; and once the last user reference was given back, none begins in a
//! design whose items hold one.
//!
//! **Mechanism.** Both sides of the NX list are told under pages_lock, so their order is true. A table's link and unlink are told by two tasks: which came first is judged in true order only.
//! That the root list is the set of referenced roots, and that headers say where tables are, is judged by `judge.rs` and `tree.rs`.
//!
//! **What it cannot see.** The pointers themselves: a list whose links are wrong and whose reports are right is found by the full read at quiet points.

use std::collections::{BTreeMap, HashMap};

use tdpmmu_platform::Event;

use crate::rule::Rule;
use crate::rules::Rules;
use crate::verdict::Verdict;

/// See the module text.
pub struct Lists {
    true_order: bool,
    /// NX candidates, and who listed them.
    nx: BTreeMap<u32, u32>,
    /// Tables allocated and not linked, unlinked or become a root since, with the allocating task.
    unlinked: HashMap<u32, u32>,
    gone: Option<u32>,
    users: Option<u32>,
    users_hold: bool,
}

impl Lists {
    /// Empty lists.
    pub fn new(rules: Rules) -> Self {
        Self {
            true_order: rules.in_true_order(),
            nx: BTreeMap::new(),
            unlinked: HashMap::new(),
            gone: None,
            users: None,
            users_hold: false,
        }
    }

    /// Takes an event of `task` in.
    pub fn event(&mut self, task: u32, event: &Event, verdict: &mut Verdict) {
        match *event {
            Event::NxListed { table } => {
                if let Some(by) = self.nx.insert(table, task) {
                    let what = format!("table {table} became an NX candidate twice");
                    let owed = format!("table {table} leaves the list before it comes again");
                    verdict.unmet(Rule::NxList, None, None, what, by, owed);
                }
            }
            Event::NxUnlisted { table } => self.unlisted(table, verdict),
            Event::TableFree { table } => {
                self.unlinked.remove(&table);
                if let Some(by) = self.nx.remove(&table) {
                    let what = format!("table {table} was freed as an NX candidate");
                    let owed = format!("table {table} leaves the list before its teardown");
                    verdict.unmet(Rule::NxList, None, None, what, by, owed);
                }
            }
            Event::TableAlloc { table, .. } => {
                self.unlinked.insert(table, task);
            }
            Event::TableLink { table, .. } | Event::RootAlloc { root: table, .. } => {
                self.unlinked.remove(&table);
            }
            Event::TableUnlink { table, gfn, .. } => {
                if let Some(by) = self.unlinked.remove(&table)
                    && self.true_order
                {
                    let what = format!("table {table} was unlinked before it was accounted for as linked");
                    let owed = format!("table {table} is accounted for before anybody else can find it");
                    verdict.unmet(Rule::UnlinkedEarly, None, Some(gfn), what, by, owed);
                }
            }
            Event::Users { users } => {
                // An item that takes a reference of its own: the system's queue, or a user that comes and goes.
                self.users_hold |= users > 1;
                self.users = Some(users);
            }
            Event::VmGone => self.gone = Some(task),
            Event::WorkBegin { root, .. } => self.work(root, verdict),
            _ => {}
        }
    }

    fn unlisted(&mut self, table: u32, verdict: &mut Verdict) {
        if self.nx.remove(&table).is_none() {
            let what = format!("table {table} left the list of NX candidates and was not on it");
            verdict.broken(Rule::NxList, None, None, what);
        }
    }

    fn work(&self, root: u32, verdict: &mut Verdict) {
        if let Some(by) = self.gone {
            let what = format!("a work item for root {root} began when the VM was gone");
            let owed = "the queue is empty before the VM's tables go".to_owned();
            verdict.unmet(Rule::WorkAfterEnd, Some(root), None, what, by, owed);
        } else if self.users_hold && self.users == Some(0) {
            let what = format!("an item for root {root} runs, and nobody holds the VM");
            verdict.broken(Rule::WorkUnreferenced, Some(root), None, what);
        }
    }
}
