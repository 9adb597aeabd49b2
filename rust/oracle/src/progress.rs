//! O-PROG, the part that is not about long steps: a fault that begins again for nothing.
//!
//! **Guarantee.** A fault that begins again does so because something has changed, or is about to. Eight times in a row with nothing told by any other task, no other task inside mmu_lock, no
//! invalidation under way, no slot going, and nothing changed by the task itself: the ninth will be like the eighth, for ever (bug-history 12, 16, 29).
//!
//! **Mechanism.** A count per task, begun anew by each event that could be a reason. Needs the true order, and a scheduler that is the only clock: on the real platform another task may be in the middle of
//! something that it has not told.
//!
//! **What it cannot see.** Livelocks of two tasks that undo each other's work: the simulation's limit of steps ends these.

use std::collections::HashMap;

use tdpmmu_platform::Event;

use crate::rule::Rule;
use crate::rules::Rules;
use crate::verdict::Verdict;

/// Retries without a cause that are too many.
const MOST: u32 = 8;

#[derive(Clone, Copy, Debug)]
struct Storm {
    as_id: u8,
    gfn: u64,
    count: u32,
}

/// See the module text.
pub struct Progress {
    on: bool,
    storms: HashMap<u32, Storm>,
    last: Option<u32>,
    going: u32,
}

impl Progress {
    /// Nobody retries.
    pub fn new(rules: Rules) -> Self {
        Self { on: rules.in_true_order(), storms: HashMap::new(), last: None, going: 0 }
    }

    /// Takes an event of `task` in; `busy`: another task holds mmu_lock, or an invalidation is under way.
    pub fn event(&mut self, task: u32, event: &Event, busy: impl FnOnce() -> bool, verdict: &mut Verdict) {
        if !self.on {
            return;
        }
        if self.last.replace(task) != Some(task) {
            self.storms.clear();
        }
        match *event {
            Event::SlotPublish { going, .. } => {
                self.going = if going { self.going + 1 } else { self.going.saturating_sub(1) };
            }
            Event::SpteChanged { .. }
            | Event::SpteMarked { .. }
            | Event::ShadowAlloc { .. }
            | Event::ShadowLink { .. }
            | Event::ShadowLeaf { .. }
            | Event::ShadowZap { .. }
            | Event::ShadowRoot { .. }
            | Event::RootAlloc { .. }
            | Event::RootGet { .. }
            | Event::RootPut { .. }
            | Event::NotifierBegin { .. }
            | Event::NotifierEnd { .. }
            | Event::GuestAccess { .. }
            | Event::TlbFlush { .. } => {
                self.storms.remove(&task);
            }
            Event::FaultRetry { as_id, gfn } => {
                if self.going != 0 || busy() {
                    self.storms.remove(&task);
                    return;
                }
                let storm = self.storms.entry(task).or_insert(Storm { as_id, gfn, count: 0 });
                if (storm.as_id, storm.gfn) != (as_id, gfn) {
                    *storm = Storm { as_id, gfn, count: 0 };
                }
                storm.count += 1;
                if storm.count == MOST {
                    let what = format!("the fault has begun again {MOST} times though nothing has changed");
                    let owed = "a retry follows a change".to_owned();
                    verdict.unmet(Rule::RetryWithoutCause, None, Some(gfn), what, task, owed);
                }
            }
            _ => {}
        }
    }
}
