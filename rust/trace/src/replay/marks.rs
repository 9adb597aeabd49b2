//! The marks of a test program: which operations are open, and KVM's own leaf counts at quiet points.
//!
//! A `STAT` line is compared when nothing can have moved: no operation is open in any thread, no leaf count has changed
//! since the last operation ended, no removal or worker is under way, and it is clear which VM is meant.

use super::engine::{Change, Engine};
use super::threads::OpenOp;
use crate::event::Mark;
use serde_json::Value;
use std::collections::{BTreeSet, HashMap};

#[derive(Default)]
pub(crate) struct Marks {
    open: u64,
    /// VM named by each operation.
    vm_of_op: HashMap<u64, u64>,
    alive: BTreeSet<u64>,
    /// `leaf_moves` when the last operation ended.
    moves_at_end: u64,
    /// Mismatches other than statistics that were known at the last comparison.
    mismatches: u64,
    /// Recorded minus rebuilt, after a difference that was reported once.
    offset: [i64; 4],
    pub(crate) works: u64,
}

impl Marks {
    pub(crate) fn take(&mut self, e: &mut Engine, mark: Mark<'_>, c: &Change) {
        match mark {
            Mark::Begin { number, kind, json } => {
                let vm = vm_of(json);
                if let Some(vm) = vm {
                    self.vm_of_op.insert(number, vm);
                    if kind == b"create_vm" {
                        self.alive.insert(vm);
                        e.seen.create_vm = true;
                        self.offset = [0; 4];
                    }
                    e.enter_script_vm(c.thread, vm);
                }
                let (kind, detail) = (name_of(kind, json), String::from_utf8_lossy(json).into_owned());
                e.threads[c.thread].ops.push(OpenOp { number, kind, detail, t0: c.ns });
                e.threads[c.thread].fault = None;
                self.open += 1;
            }
            Mark::End { number, kind, .. } => {
                let thread = &mut e.threads[c.thread];
                if let Some(at) = thread.ops.iter().rposition(|op| op.number == number) {
                    let op = thread.ops.remove(at);
                    self.open -= 1;
                    e.operation_ended(op, c);
                }
                let thread = &mut e.threads[c.thread];
                thread.fault = None;
                self.moves_at_end = e.leaf_moves;
                if kind == b"destroy_vm"
                    && let Some(vm) = self.vm_of_op.get(&number).copied()
                {
                    self.alive.remove(&vm);
                    self.check_gone(e, vm, c);
                }
                self.vm_of_op.retain(|&n, _| n + 4096 > number);
            }
            Mark::Stat { number, json } => self.compare(e, number, json, c),
            Mark::Text(_) => {}
        }
    }

    /// A destroyed VM has no leafs left.
    fn check_gone(&mut self, e: &mut Engine, vm: u64, c: &Change) {
        e.expire(u64::MAX);
        if e.seen.lost || e.seen.blind || self.works > 0 {
            return;
        }
        for index in 0..e.vms.len() {
            if e.vms[index].script != Some(vm) {
                continue;
            }
            for level in 1..=3u8 {
                let left = e.vms[index].leafs[level as usize];
                if left != 0 && e.checked.mismatch == 0 {
                    let at = Change { level, gfn: 0, ..*c };
                    e.complain(
                        &at,
                        "statistics",
                        0,
                        left as u64,
                        "the VM was destroyed with leafs still mapped",
                    );
                }
            }
            e.vms[index].leafs = [0; 4];
        }
    }

    fn compare(&mut self, e: &mut Engine, number: u64, json: &[u8], c: &Change) {
        e.expire(u64::MAX);
        let vm = match self.vm_of_op.get(&number) {
            Some(&vm) => Some(vm),
            None if self.alive.len() == 1 => self.alive.first().copied(),
            None => None,
        };
        let busy = self.open > 0 || self.works > 0 || e.leaf_moves != self.moves_at_end;
        let removing = e.threads.iter().any(|t| !t.removal.is_empty());
        let counts = serde_json::from_slice::<Value>(json).ok().and_then(|v| {
            let get = |key: &str| v.get(key).and_then(Value::as_i64);
            Some([0, get("pages_4k")?, get("pages_2m")?, get("pages_1g")?])
        });
        let (Some(recorded), Some(vm), false) = (counts, vm, busy || removing || e.seen.lost || e.seen.blind)
        else {
            e.stats.skipped += 1;
            return;
        };
        let mut rebuilt = [0i64; 4];
        for v in e.vms.iter().filter(|v| v.script == Some(vm)) {
            (1..4).for_each(|l| rebuilt[l] += v.leafs[l]);
        }
        let others = e.checked.mismatch - e.kinds.get("statistics").copied().unwrap_or(0);
        let disturbed = others != self.mismatches;
        self.mismatches = others;
        let differs = (1..4).find(|&l| recorded[l] != rebuilt[l] + self.offset[l]);
        match differs {
            None => e.stats.matched += 1,
            Some(l) => {
                // A mismatch that was reported already shifts the counts; from here on only new shifts are told.
                if disturbed {
                    e.stats.skipped += 1;
                } else {
                    e.stats.mismatched += 1;
                    let at = Change { level: l as u8, gfn: 0, ..*c };
                    let (want, got) = (rebuilt[l] + self.offset[l], recorded[l]);
                    let rule = format!(
                        "KVM counts {got} leafs of level {l} after operation {number}, rebuilt are {want}"
                    );
                    e.complain(&at, "statistics", want as u64, got as u64, rule);
                }
                (1..4).for_each(|l| self.offset[l] = recorded[l] - rebuilt[l]);
            }
        }
    }
}

/// The kind, and for a memslot whether it is made or deleted.
fn name_of(kind: &[u8], json: &[u8]) -> String {
    let kind = String::from_utf8_lossy(kind).into_owned();
    if kind != "set_memslot" {
        return kind;
    }
    let size = serde_json::from_slice::<Value>(json).ok().and_then(|v| v.get("size")?.as_u64());
    // A fast zap with a size is a move: creation and flags zap nothing.
    match size {
        Some(0) => kind + ":delete",
        Some(_) => kind + ":move",
        None => kind,
    }
}

fn vm_of(json: &[u8]) -> Option<u64> {
    serde_json::from_slice::<Value>(json).ok()?.get("vm")?.as_u64()
}
