//! A program on any platform: set-up, threads, the quiet point, the end.
//!
//! **Guarantee.** Every thread is joined and the VM closed, whatever the acts came to. The judges look twice: when nothing moves any more, and when nothing is left.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tdpmmu_oracle::{Judge, Rules};
use tdpmmu_platform::{JoinHandle, Observer, Platform, Real, Role as TaskRole};
use tdpmmu_vm::{CloseReport, Vm, VmError};

use super::perform::region;
use super::{Act, Done, Flags, Guests, Hands, Program, ProgramError, Who, perform};
use crate::LabError;

/// One act of a run, and what it came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Performed {
    /// Thread, by its place in the program.
    pub thread: usize,
    /// Act, by its place in the thread.
    pub act: usize,
    /// What it came to; an error is what KVM would have returned.
    pub result: Result<Done, VmError>,
}

/// What a run came to, beside its judges' findings.
#[derive(Debug, Default)]
pub struct Ended {
    /// Acts in the order in which they ended.
    pub performed: Vec<Performed>,
    /// The end of the VM.
    pub close: Option<CloseReport>,
    /// Threads that panicked, with what they said.
    pub panics: Vec<String>,
}

/// Hears of an act before it begins, and with what it came to after it has ended.
type Hear = dyn Fn(&Act, Option<&Result<Done, VmError>>);

/// A VM with its program's memory, and what its threads share.
pub(super) struct Stage<P: Platform> {
    pub(super) vm: Vm<P>,
    pub(super) flags: Flags,
    guests: Option<Guests<P>>,
    host: u64,
    performed: Arc<Mutex<Vec<Performed>>>,
}

impl<P: Platform> Stage<P> {
    /// The VM, its memory, its memslots and the program's set-up.
    pub(super) fn new(
        program: &Program,
        observer: Option<Arc<dyn Observer>>,
    ) -> Result<Arc<Self>, ProgramError> {
        let machine = &program.machine;
        let pages = machine.host_pages(program.created());
        let refused = |field: &'static str| {
            move |error: VmError| ProgramError::Machine {
                field,
                value: String::new(),
                rule: error.to_string(),
            }
        };
        let vm = Vm::<P>::new(machine.config(pages, observer)?).map_err(refused("vm"))?;
        let tables = machine.tables(pages);
        let behind = pages + tables.as_ref().map_or(0, |slot| slot.pages);
        let host = vm.side().primary.region(behind, 0, machine.host_level, true).map_err(refused("slots"))?;
        let task = vm.task("setup", TaskRole::Caller);
        vm.side().invalidation.start_at::<P>(machine.start_seq);
        for slot in machine.slots.iter().chain(&tables) {
            vm.set_memslot(&task, &region(slot, host)).map_err(refused("slots"))?;
        }
        if machine.smm {
            vm.share_memory_with_smm(&task).map_err(refused("smm"))?;
        }
        drop(task);
        let guests = match tables {
            Some(_) => Some(Guests::build(&vm, &machine.processes).map_err(refused("processes"))?),
            None => None,
        };
        let stage = Arc::new(Self { vm, flags: Flags::default(), guests, host, performed: Arc::default() });
        for (at, (who, act)) in program.setup.iter().enumerate() {
            stage.hands(*who, "setup").and_then(|mut hands| perform(&stage.vm, &mut hands, act)).map_err(
                |error| ProgramError::Setup { act: at, what: act.title(), error: error.to_string() },
            )?;
        }
        Ok(stage)
    }

    fn hands(&self, who: Who, name: &str) -> Result<Hands<'_, P>, VmError> {
        Ok(Hands::new(&self.vm, who, name, self.host, &self.flags)?.with_guests(self.guests.as_ref()))
    }

    fn performed(&self) -> MutexGuard<'_, Vec<Performed>> {
        self.performed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The acts of thread `thread`, in order. `told` hears of each before it begins and after it has ended.
    pub(super) fn thread(&self, program: &Program, thread: usize, told: &Hear) {
        let spec = &program.threads[thread];
        let mut hands = match self.hands(spec.who, &spec.name) {
            Ok(hands) => hands,
            Err(error) => {
                self.performed().push(Performed { thread, act: 0, result: Err(error) });
                return;
            }
        };
        for (act, what) in spec.acts.iter().enumerate() {
            if self.flags.given_up() {
                break;
            }
            told(what, None);
            let result = perform(&self.vm, &mut hands, what);
            told(what, Some(&result));
            self.performed().push(Performed { thread, act, result });
        }
    }

    /// Starts every thread.
    pub(super) fn start(
        self: &Arc<Self>,
        program: &Arc<Program>,
        told: impl Fn(&Act, Option<&Result<Done, VmError>>) + Clone + Send + 'static,
    ) -> std::io::Result<Vec<JoinHandle>> {
        let start = |thread: usize| {
            let (stage, program, told) = (Arc::clone(self), Arc::clone(program), told.clone());
            let name = program.threads[thread].name.clone();
            P::spawn(&name, Box::new(move || stage.thread(&program, thread, &told)))
        };
        (0..program.threads.len()).map(start).collect()
    }

    /// Waits for every thread; what those said that panicked.
    pub(super) fn join(&self, handles: Vec<JoinHandle>) -> Vec<String> {
        let mut panics = Vec::new();
        for handle in handles {
            if let Err(payload) = handle.join() {
                self.flags.give_up::<P>();
                panics.push(said(&*payload));
            }
        }
        panics
    }

    /// Waits until the workers have nothing left.
    pub(super) fn settle(&self) {
        if let Some(queue) = self.vm.mmu().design().queue() {
            queue.flush();
        }
    }

    /// Nothing moves any more: the judge compares everything with everything.
    pub(super) fn quiet_check(&self, judge: &Judge) {
        judge.check_vm(&self.vm, &self.vm.task("judge", TaskRole::Observer));
    }

    /// The end of the VM, and of what the judge hears.
    pub(super) fn end(&self, judge: Option<&Judge>) -> Result<CloseReport, VmError> {
        let report = self.vm.close()?;
        if let Some(judge) = judge {
            self.judge_the_end(judge);
        }
        Ok(report)
    }

    pub(super) fn judge_the_end(&self, judge: &Judge) {
        judge.finish(self.vm.mmu(), &self.vm.task("judge", TaskRole::Observer));
    }

    /// What was done, for who looks at it when the stage is gone.
    pub(super) fn log(&self) -> Arc<Mutex<Vec<Performed>>> {
        Arc::clone(&self.performed)
    }

    pub(super) fn take_performed(&self) -> Vec<Performed> {
        std::mem::take(&mut *self.performed())
    }

    /// The VM was closed by an act.
    pub(super) fn was_closed(&self) -> bool {
        self.performed().iter().any(|done| matches!(done.result, Ok(Done::Closed { .. })))
    }
}

/// The words of a panic.
pub(crate) fn said(payload: &(dyn std::any::Any + Send)) -> String {
    let text = payload.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| payload.downcast_ref::<String>().cloned()).unwrap_or_else(|| "a panic".to_owned())
}

impl Program {
    /// The rules by which a judge of this program judges.
    ///
    /// # Errors
    /// [`ProgramError::Machine`].
    pub fn rules(&self) -> Result<Rules, ProgramError> {
        let config = self.machine.config(self.machine.host_pages(self.created()), None)?;
        let (passes, _) = config.check().map_err(|error| ProgramError::Machine {
            field: "machine",
            value: String::new(),
            rule: error.to_string(),
        })?;
        let rules = Rules::of(&config.profile, config.format, config.design_name()).passes(passes);
        Ok(rules.virtual_gfns(self.machine.has_virtual_gfns()))
    }
}

/// Runs `program` on real threads, once; `judge` (by [`Program::rules`]) listens to everything.
///
/// # Errors
/// [`LabError::Usage`] for a program that cannot be run, [`LabError::Internal`] where the host refuses a thread or the VM does not close.
pub fn run_real(program: &Program, judge: Option<Arc<Judge>>) -> Result<Ended, LabError> {
    run_on::<Real>(program, judge)
}

/// As [`run_real`], on any platform whose threads run by themselves.
///
/// # Errors
/// As [`run_real`].
pub fn run_on<P: Platform>(program: &Program, judge: Option<Arc<Judge>>) -> Result<Ended, LabError> {
    program.check()?;
    let program = Arc::new(program.clone());
    let stage = Stage::<P>::new(&program, judge.clone().map(|judge| judge as Arc<dyn Observer>))?;
    let internal = |what: &str, error: &dyn std::fmt::Display| LabError::Internal(format!("{what}: {error}"));
    let handles = stage.start(&program, |_, _| ()).map_err(|error| internal("a thread", &error))?;
    let panics = stage.join(handles);
    if let Some(judge) = judge.as_deref().filter(|_| panics.is_empty() && !stage.was_closed()) {
        stage.settle();
        stage.quiet_check(judge);
    }
    let close = stage.end(judge.as_deref()).map_err(|error| internal("the end of the VM", &error))?;
    Ok(Ended { performed: stage.take_performed(), close: Some(close), panics })
}
