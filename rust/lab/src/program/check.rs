//! The rules of a program, tested before anything runs.

use tdpmmu_spte::geometry::max_gfn;
use tdpmmu_vm::{all_design_names, design_info};

use super::{Act, Program, SlotSpec, Who};

/// A program that cannot be run. Threads are told by name, acts by their place, from 0.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProgramError {
    /// Not the JSON of a program.
    #[error("not a program: {0}")]
    Json(String),
    /// An act of a thread breaks a rule.
    #[error("thread {thread}, act {act} ({what}): {rule}")]
    Act {
        /// The thread, or `setup`.
        thread: String,
        /// Its place.
        act: usize,
        /// The act.
        what: String,
        /// The rule.
        rule: String,
    },
    /// A thread breaks a rule.
    #[error("thread {thread}: {rule}")]
    Thread {
        /// The thread.
        thread: String,
        /// The rule.
        rule: String,
    },
    /// The VM cannot be built.
    #[error("machine.{field} = {value}: {rule}")]
    Machine {
        /// The field.
        field: &'static str,
        /// Its value.
        value: String,
        /// The rule.
        rule: String,
    },
    /// A step of the set-up was refused.
    #[error("setup, act {act} ({what}): {error}")]
    Setup {
        /// Its place.
        act: usize,
        /// The act.
        what: String,
        /// What the VM said.
        error: String,
    },
}

impl From<ProgramError> for crate::LabError {
    fn from(error: ProgramError) -> Self {
        crate::LabError::Usage(error.to_string())
    }
}

/// Most threads, most acts of a thread, most vCPUs, most pages of host memory.
const MOST_THREADS: usize = 64;
const MOST_ACTS: usize = 1 << 20;
const MOST_VCPUS: usize = 512;
const MOST_PAGES: u64 = 1 << 34;

impl Program {
    /// Tests every rule that does not depend on what happens.
    ///
    /// # Errors
    /// [`ProgramError`], naming the first thing that is wrong.
    pub fn check(&self) -> Result<(), ProgramError> {
        self.check_machine()?;
        self.check_threads()?;
        self.check_expectations()?;
        let raised: Vec<u8> = self
            .acts()
            .filter_map(|act| if let Act::Raise { flag } = act { Some(*flag) } else { None })
            .collect();
        for (at, (who, act)) in self.setup.iter().enumerate() {
            self.check_act("setup", at, *who, act, &raised)?;
            if matches!(act, Act::WaitFor { .. } | Act::Close) {
                return Err(refuse("setup", at, act, "the set-up neither waits nor ends the VM"));
            }
        }
        for thread in &self.threads {
            for (at, act) in thread.acts.iter().enumerate() {
                self.check_act(&thread.name, at, thread.who, act, &raised)?;
            }
        }
        Ok(())
    }

    fn check_machine(&self) -> Result<(), ProgramError> {
        let machine = &self.machine;
        let bad = |field, value: String, rule: &str| {
            Err(ProgramError::Machine { field, value, rule: rule.to_owned() })
        };
        let name = machine.design_name()?;
        if design_info(&name).is_none() {
            let rule = format!("no zap design has that name; known: {}", all_design_names().join(", "));
            return bad("design", name, &rule);
        }
        if machine.vcpus > MOST_VCPUS {
            return bad("vcpus", machine.vcpus.to_string(), "at most 512 vCPUs in a program");
        }
        if !(1..=3).contains(&machine.host_level) {
            return bad(
                "host_level",
                machine.host_level.to_string(),
                "the host maps by 4K (1), 2M (2) or 1G (3)",
            );
        }
        if let Some(slot) = machine.slots.iter().find(|slot| self.slot_rule(slot).is_some()) {
            let rule = self.slot_rule(slot).unwrap_or_default();
            return bad("slots", format!("slot {} of address space {}", slot.id, slot.as_id), &rule);
        }
        for (n, process) in machine.processes.iter().enumerate() {
            let one = format!("process {n}");
            if process.over.is_some_and(|below| below >= n || machine.processes[below].over.is_some()) {
                return bad(
                    "processes",
                    one,
                    "it stands over a process of a lower number, which stands over none",
                );
            }
            if process.over.is_some() && !machine.nested {
                return bad("processes", one, "a process over another is an L2 of a nested machine");
            }
            if process.linear > 4096 {
                return bad("processes", one, "at most 4096 pages are mapped before anything runs");
            }
        }
        if machine.processes.is_empty() == machine.has_virtual_gfns() {
            let rule = "processes are for machines whose guests' own tables are shadowed (paging guest, or nested), which need one";
            return bad("processes", machine.processes.len().to_string(), rule);
        }
        if let Some(index) = self.hot.iter().find(|&&index| index >= 512) {
            return Err(ProgramError::Machine {
                field: "hot",
                value: index.to_string(),
                rule: "a table has entries 0 to 511".into(),
            });
        }
        machine.config(machine.host_pages(self.created()), None).map(drop)
    }

    fn check_threads(&self) -> Result<(), ProgramError> {
        let bad = |thread: &str, rule: &str| {
            Err(ProgramError::Thread { thread: thread.to_owned(), rule: rule.to_owned() })
        };
        if self.threads.is_empty() || self.threads.len() > MOST_THREADS {
            return bad(&self.name, "a program has 1 to 64 threads");
        }
        for (at, thread) in self.threads.iter().enumerate() {
            let before = &self.threads[..at];
            if thread.name.is_empty() || before.iter().any(|other| other.name == thread.name) {
                return bad(&thread.name, "each thread has a name of its own");
            }
            if let Who::Vcpu(id) = thread.who {
                if id >= self.machine.vcpus {
                    return bad(&thread.name, &format!("the VM has {} vCPUs", self.machine.vcpus));
                }
                if before.iter().any(|other| other.who == thread.who) {
                    return bad(&thread.name, "a vCPU runs in one thread at a time");
                }
            }
            if thread.acts.len() > MOST_ACTS {
                return bad(&thread.name, "a thread has at most 2^20 acts");
            }
        }
        Ok(())
    }

    fn check_act(
        &self,
        thread: &str,
        at: usize,
        who: Who,
        act: &Act,
        raised: &[u8],
    ) -> Result<(), ProgramError> {
        match self.act_rule(who, act, raised) {
            Some(rule) => Err(refuse(thread, at, act, &rule)),
            None => Ok(()),
        }
    }

    fn act_rule(&self, who: Who, act: &Act, raised: &[u8]) -> Option<String> {
        let machine = &self.machine;
        match who {
            Who::Vcpu(id) if id >= machine.vcpus => {
                return Some(format!("the VM has {} vCPUs", machine.vcpus));
            }
            Who::Caller | Who::Other(_) if act.needs_vcpu() => {
                return Some("only the thread of a vCPU does that".into());
            }
            _ => {}
        }
        let end = max_gfn(machine.levels, if machine.levels == 5 { 52 } else { 48 });
        let host = machine.host_pages(self.created());
        let gfns = |gfn: u64, pages: u64| {
            (pages == 0 || gfn.checked_add(pages).is_none_or(|last| last > end))
                .then(|| format!("gfns 0 to {end:#x} exist, and a range is not empty"))
        };
        let hvas = |at: u64, pages: u64| {
            (pages == 0 || at.checked_add(pages).is_none_or(|last| last > host))
                .then(|| format!("the program's host memory has {host:#x} pages, and a range is not empty"))
        };
        match *act {
            Act::Access { gfn, .. } | Act::Speculate { gfn } | Act::LookUp { gfn } => gfns(gfn, 1),
            Act::WriteProtect { gfn, .. } | Act::MoveSlot { gfn, .. } => gfns(gfn, 1),
            Act::PreFault { gfn, pages } | Act::ZapRange { gfn, pages } => gfns(gfn, pages),
            Act::GuestMap { process, gva, gfn, .. } => {
                self.process_rule(process).or_else(|| gfns(gva, 1)).or_else(|| gfns(gfn, 1))
            }
            Act::GuestUnmap { process, gva } => self.process_rule(process).or_else(|| gfns(gva, 1)),
            Act::Invlpg { gva } | Act::WalkShadow { gva } => gfns(gva, 1),
            Act::SetCr3 { .. } if machine.paging != "guest" => Some(
                "CR3 is of interest only where the guest's own tables are shadowed (machine.paging)".into(),
            ),
            Act::EnterL2 { .. } | Act::LeaveL2 if !machine.nested => {
                Some("an L2 needs a nested machine (machine.nested)".into())
            }
            Act::SetCr3 { process } | Act::EnterL2 { process } => self.process_rule(process),
            Act::SetHostLevel { level, .. } if !(2..=3).contains(&level) => {
                Some("the host maps huge pages of 2M (level 2) or 1G (3)".into())
            }
            Act::SetHostLevel { gfn, pages, .. } => gfns(gfn, pages),
            Act::SwitchRole { variant } if variant > 7 => Some("role variants are 0 to 7".into()),
            Act::EnterSmm | Act::ExitSmm if !machine.smm => {
                Some("the machine has no memory in SMM (machine.smm)".into())
            }
            Act::CreateSlot(ref slot) => self.slot_rule(slot),
            Act::Unmap { hva_page, pages, .. }
            | Act::Age { hva_page, pages }
            | Act::AgeFlush { hva_page, pages }
            | Act::TestAge { hva_page, pages } => hvas(hva_page, pages),
            Act::ReplacePage { hva_page, .. } | Act::ChangePte { hva_page, .. } => hvas(hva_page, 1),
            Act::CollectRings | Act::ResetRings if machine.ring.is_none() => {
                Some("the machine collects dirty pages in bitmaps (machine.ring)".into())
            }
            Act::GetDirtyLog { .. } | Act::ClearDirtyLog { .. } if machine.ring.is_some() => {
                Some("the machine collects dirty pages in rings (machine.ring)".into())
            }
            Act::ClearDirtyLog { first, .. } if !first.is_multiple_of(64) => {
                Some("the first page is a multiple of 64".into())
            }
            Act::WaitFor { flag } | Act::Raise { flag } if flag >= Act::FLAGS => {
                Some(format!("flags are 0 to {}", Act::FLAGS - 1))
            }
            Act::WaitFor { flag } if !raised.contains(&flag) => {
                Some("nobody raises that flag: it would wait for ever".into())
            }
            _ => None,
        }
    }

    fn process_rule(&self, process: usize) -> Option<String> {
        let count = self.machine.processes.len();
        (process >= count).then(|| format!("the machine has {count} processes (machine.processes)"))
    }

    fn slot_rule(&self, slot: &SlotSpec) -> Option<String> {
        let end = max_gfn(self.machine.levels, if self.machine.levels == 5 { 52 } else { 48 });
        if slot.pages == 0 {
            return Some("a slot has pages".into());
        }
        if slot.as_id > 1 {
            return Some("address spaces are 0, and 1 for SMM".into());
        }
        if slot.gfn.checked_add(slot.pages).is_none_or(|last| last > end) {
            return Some(format!("gfns 0 to {end:#x} exist"));
        }
        slot.hva_page
            .checked_add(slot.pages)
            .is_none_or(|last| last > MOST_PAGES)
            .then(|| "a program's host memory has at most 2^34 pages".into())
    }

    /// Slots that are created later.
    pub(super) fn created(&self) -> impl Iterator<Item = &SlotSpec> {
        self.acts().filter_map(|act| if let Act::CreateSlot(slot) = act { Some(slot) } else { None })
    }
}

fn refuse(thread: &str, act: usize, what: &Act, rule: &str) -> ProgramError {
    ProgramError::Act { thread: thread.to_owned(), act, what: what.title(), rule: rule.to_owned() }
}
