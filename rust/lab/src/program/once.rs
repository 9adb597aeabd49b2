//! One run of a program on the simulated platform, under one schedule, before the judges.
//!
//! **Guarantee.** Equal programs under equal configurations make equal runs, step by step; [`Run::hash`] tells. What is found names a rule.
//!
//! **Mechanism.** The run's main task builds the VM and does the set-up in quiet, starts the threads, waits for them, and lets the judges look in quiet. Each finding is told to the simulation at once, so that a
//! run stops where it went wrong. With [`SimConfig::record`] every event is kept with its step, for a story.

use std::sync::{Arc, Mutex, PoisonError};

use tdpmmu_oracle::{Judge, Rule, Rules, Violation};
use tdpmmu_platform::sim::{self, End, Limits, Run, Sim, SimConfig};
use tdpmmu_platform::{Event, Observer};
use tdpmmu_shadow::ShadowDesign;
use tdpmmu_spte::geometry::ENTRIES;
use tdpmmu_vm::CloseReport;

use super::drive::Stage;
use super::{Performed, Program, ProgramError};

/// Which judges listen.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct JudgeSet {
    /// Rules whose breach is not heard: what shows that an oracle is needed.
    pub silenced: Vec<Rule>,
}

/// Something that a task told.
#[derive(Clone, Debug, PartialEq)]
pub enum Told {
    /// To the observers.
    Event(Event),
    /// It begins an act of the program.
    Begins(String),
    /// The act has ended like this.
    Ended(String),
    /// A judge found this.
    Violation(String),
}

/// When, who, what.
#[derive(Clone, Debug, PartialEq)]
pub struct Line {
    /// The step after which it was told.
    pub at: u64,
    /// The task: index into [`Run::tasks`].
    pub task: u32,
    /// What.
    pub told: Told,
}

/// What was found first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// The rule's name.
    pub rule: String,
    /// In words, with the values.
    pub what: String,
    /// The task that showed it: index into [`Run::tasks`].
    pub task: Option<u32>,
    /// The root concerned.
    pub root: Option<u32>,
    /// The gfn concerned.
    pub gfn: Option<u64>,
}

/// What a run came to.
#[derive(Debug)]
pub struct Outcome {
    /// The schedule's side of it.
    pub run: Run,
    /// What the judges found, oldest first.
    pub violations: Vec<Violation>,
    /// Acts, in the order in which they ended.
    pub performed: Vec<Performed>,
    /// The end of the VM, if the run came to it.
    pub close: Option<CloseReport>,
    /// The program could not be set up.
    pub refused: Option<ProgramError>,
    /// With [`SimConfig::record`]: what was told, in order.
    pub lines: Vec<Line>,
}

impl Outcome {
    /// What was found first, if anything.
    pub fn finding(&self) -> Option<Finding> {
        let plain = |rule: &str, what: &str, task| {
            Some(Finding { rule: rule.to_owned(), what: what.to_owned(), task, root: None, gfn: None })
        };
        if let Some(first) = self.run.violations.first() {
            let judged = self.violations.iter().find(|v| v.rule.name() == first.rule);
            return Some(Finding {
                rule: first.rule.to_owned(),
                what: judged.map_or_else(|| first.what.clone(), |v| v.what.clone()),
                task: first.task,
                root: judged.and_then(|v| v.root),
                gfn: judged.and_then(|v| v.gfn),
            });
        }
        if let Some(first) = self.violations.first() {
            return Some(Finding {
                rule: first.rule.name().to_owned(),
                what: first.what.clone(),
                task: None,
                root: first.root,
                gfn: first.gfn,
            });
        }
        match &self.run.end {
            End::Finished | End::Stopped => {}
            End::Deadlock(who) => return plain("deadlock", who, None),
            End::StepLimit => {
                let what =
                    format!("no end after {} steps: a livelock, or nobody makes progress", self.run.steps);
                return plain("step-limit", &what, None);
            }
            End::Panicked(what) => return plain("panic", what, None),
        }
        if self.run.leaked_tasks != 0 {
            let what = format!("{} tasks never came to their end", self.run.leaked_tasks);
            return plain("leaked-task", &what, None);
        }
        let close = self.close.as_ref().filter(|close| !close.is_clean())?;
        let what = format!(
            "{} tables leaked, {} freed twice, {:?} left, frames' owners broken {} times; {}",
            close.tables_leaked,
            close.double_frees,
            close.leftovers,
            close.frames.violations,
            close.violations.join("; ")
        );
        plain("unclean-end", &what, None)
    }
}

/// Keeps what is told, and tells the judge.
struct Teller {
    judge: Arc<Judge>,
    lines: Option<Arc<Mutex<Vec<Line>>>>,
}

fn keep(lines: &Mutex<Vec<Line>>, told: Told) {
    if let Some(task) = sim::current() {
        let line = Line { at: sim::now(), task, told };
        lines.lock().unwrap_or_else(PoisonError::into_inner).push(line);
    }
}

impl Observer for Teller {
    fn event(&self, task: u32, event: &Event) {
        if let Some(lines) = &self.lines {
            keep(lines, Told::Event(*event));
        }
        self.judge.event(task, event);
    }

    fn wants_detail(&self) -> bool {
        self.judge.wants_detail()
    }
}

impl Program {
    /// How long a stretch without a reschedule check may be, by the passes that hold: one step of the coarsest of them that meets something still there.
    ///
    /// # Errors
    /// [`ProgramError::Machine`].
    pub fn limits(&self) -> Result<Limits, ProgramError> {
        let config = self.machine.config(1, None)?;
        let (passes, _) = config.check().map_err(|error| ProgramError::Machine {
            field: "machine",
            value: String::new(),
            rule: error.to_string(),
        })?;
        // A step tears one table down, whose entries are read, frozen and settled, or all below one where no finer pass has been before it.
        let mut finest = 1;
        while finest < self.machine.levels && !passes.contains(finest) {
            finest += 1;
        }
        let table = 4 * ENTRIES as u64;
        let units = table.saturating_mul((ENTRIES as u64).saturating_pow(u32::from(finest) - 1));
        // The shadow MMU checks after a batch of pages, and a page may take others along; one of its designs does not check at all, and is judged by nobody for that.
        let units = match config.has_shadow().then_some(ShadowDesign::named(config.design_name())) {
            Some(Some(ShadowDesign::Walk)) => u64::MAX,
            Some(_) => units.max(64 * table),
            None => units,
        };
        // A check that does not yield stays in its read section, and here no clock asks for a yield: the stretch between checks bounds both.
        Ok(Limits { step_units: units, ..Limits::default() })
    }
}

/// Runs `program` once on the simulated platform. The program has been checked ([`Program::check`]).
pub fn run_once(program: &Program, config: SimConfig, judges: &JudgeSet) -> Outcome {
    run_with(&Arc::new(program.clone()), config, judges)
}

/// What the main task leaves behind.
#[derive(Default)]
struct Left {
    performed: Arc<Mutex<Vec<Performed>>>,
    close: Option<CloseReport>,
    refused: Option<ProgramError>,
}

/// As [`run_once`], for a program that is run often.
pub fn run_with(program: &Arc<Program>, mut config: SimConfig, judges: &JudgeSet) -> Outcome {
    config.hot.extend(program.hot.iter().copied());
    if config.limits == Limits::default()
        && let Ok(limits) = program.limits()
    {
        config.limits = limits;
    }
    let lines = config.record.then(Arc::<Mutex<Vec<Line>>>::default);
    let left = Arc::new(Mutex::new(Left::default()));
    let judge = match judge(program, judges, lines.clone()) {
        Ok(judge) => judge,
        Err(error) => return refused(error),
    };
    let main = {
        let (program, judge, lines, left) =
            (Arc::clone(program), Arc::clone(&judge), lines.clone(), Arc::clone(&left));
        Box::new(move || main_task(&program, &judge, lines, &left))
    };
    let run = sim::run(config, main);
    let left = std::mem::take(&mut *left.lock().unwrap_or_else(PoisonError::into_inner));
    let performed = std::mem::take(&mut *left.performed.lock().unwrap_or_else(PoisonError::into_inner));
    let lines = lines.map(|lines| std::mem::take(&mut *lines.lock().unwrap_or_else(PoisonError::into_inner)));
    Outcome {
        run,
        violations: judge.violations(),
        performed,
        close: left.close,
        refused: left.refused,
        lines: lines.unwrap_or_default(),
    }
}

fn refused(error: ProgramError) -> Outcome {
    let run = sim::run(SimConfig::default(), Box::new(|| ()));
    let (violations, performed, lines) = (Vec::new(), Vec::new(), Vec::new());
    Outcome { run, violations, performed, close: None, refused: Some(error), lines }
}

fn judge(
    program: &Program,
    judges: &JudgeSet,
    lines: Option<Arc<Mutex<Vec<Line>>>>,
) -> Result<Arc<Judge>, ProgramError> {
    let mut rules: Rules = program.rules()?.on::<Sim>();
    for rule in &judges.silenced {
        rules = rules.silence(*rule);
    }
    let judge = Judge::new(rules);
    judge.on_violation(move |violation: &Violation| {
        if let Some(lines) = &lines {
            keep(lines, Told::Violation(violation.to_string()));
        }
        sim::violation(violation.rule.name(), violation.what.clone());
    });
    Ok(judge)
}

/// Task 0 of the world.
fn main_task(
    program: &Arc<Program>,
    judge: &Arc<Judge>,
    lines: Option<Arc<Mutex<Vec<Line>>>>,
    left: &Mutex<Left>,
) {
    let note = |body: &dyn Fn(&mut Left)| body(&mut left.lock().unwrap_or_else(PoisonError::into_inner));
    let teller = Arc::new(Teller { judge: Arc::clone(judge), lines: lines.clone() });
    let stage = match sim::quiet(|| Stage::<Sim>::new(program, Some(teller))) {
        Ok(stage) => stage,
        Err(error) => return note(&|left| left.refused = Some(error.clone())),
    };
    note(&|left| left.performed = stage.log());
    let handles = stage.start(program, move |act, result| {
        if let Some(lines) = &lines {
            keep(
                lines,
                match result {
                    None => Told::Begins(act.title()),
                    Some(Ok(done)) => Told::Ended(done.to_string()),
                    Some(Err(error)) => Told::Ended(format!("refused: {error}")),
                },
            );
        }
    });
    let panics = match handles {
        Ok(handles) => stage.join(handles),
        Err(error) => vec![error.to_string()],
    };
    if let Some(what) = panics.first() {
        sim::violation("panic", what.clone());
        return;
    }
    let unmet = program.unmet(&stage.log().lock().unwrap_or_else(PoisonError::into_inner));
    if let Some(what) = unmet.into_iter().next() {
        sim::violation("expectation", what);
    }
    let looks = !stage.was_closed();
    if program.end_races {
        let close = stage.end(None).ok();
        sim::quiet(|| stage.judge_the_end(judge));
        note(&|left| left.close.clone_from(&close));
    } else {
        if looks {
            stage.settle();
            sim::quiet(|| stage.quiet_check(judge));
        }
        let close = sim::quiet(|| stage.end(Some(judge)).ok());
        note(&|left| left.close.clone_from(&close));
    }
}
