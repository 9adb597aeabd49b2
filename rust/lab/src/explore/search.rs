//! The search itself.
//!
//! **Determinism.** Schedule n depends on the seed and n alone, but for the depth-first ones, which follow from each other and come last, one after the other. Schedules run in batches over the threads of a pool; the
//! results of a batch are looked at in order, and nothing that comes after the first failure counts.

use std::sync::Arc;
use std::time::Instant;

use rayon::prelude::*;
use tdpmmu_oracle::Rule;
use tdpmmu_platform::Bug;
use tdpmmu_platform::sim::{self, DfsState, Memory, Schedule, SimConfig, SiteCounts, Strategy};

use super::bound::Bound;
use super::plan::{Known, Mix, Models, Planned, planned};
use super::seed::Seed;
use crate::explain::{Story, story};
use crate::faults::FaultPlan;
use crate::program::{Finding, JudgeSet, Outcome, Program, run_with};
use crate::{Control, LabError};

/// Steps of a run that has become a livelock. The longest protocol has some ten thousand.
const MOST_STEPS: u64 = 80_000;
/// Steps that an act may take on average, in programs with many.
const STEPS_PER_ACT: u64 = 4_000;

/// The limit of a program's runs.
fn most_steps(program: &Program, asked: u64) -> u64 {
    let acts: usize = program.threads.iter().map(|thread| thread.acts.len()).sum();
    asked.max(STEPS_PER_ACT * acts as u64)
}

/// What is searched, and for how long.
#[derive(Clone, Debug)]
pub struct Search {
    /// Most schedules.
    pub schedules: u64,
    /// Most time, in seconds; what is found within it may differ from run to run.
    pub seconds: Option<f64>,
    /// Of every random choice.
    pub seed: u64,
    /// Memory models.
    pub memory: Models,
    /// Strategies.
    pub strategy: Mix,
    /// Depth of the bugs that PCT looks for; `None`: 2 and 3.
    pub depth: Option<u32>,
    /// Most preemptions of the depth-first search.
    pub preemptions: u32,
    /// Threads of this machine; 0: as many as it has CPUs.
    pub jobs: usize,
    /// Of a hundred reschedule checks so many yield by the schedule's own choice; `None`: none, some or many, by the schedule.
    pub yield_percent: Option<u8>,
    /// Faults that strike.
    pub faults: FaultPlan,
    /// Judges that do not listen.
    pub judges: JudgeSet,
    /// Steps after which a run counts as a livelock.
    pub max_steps: u64,
    /// Runs that making a failing schedule shorter may cost.
    pub minimise: u64,
    /// Tell the story of a failure.
    pub story: bool,
}

impl Default for Search {
    fn default() -> Self {
        Self {
            schedules: 2_000,
            seconds: None,
            seed: 0,
            memory: Models::Mix,
            strategy: Mix::Mix,
            depth: None,
            preemptions: 2,
            jobs: 0,
            yield_percent: None,
            faults: FaultPlan::default(),
            judges: JudgeSet::default(),
            max_steps: MOST_STEPS,
            minimise: 4_000,
            story: true,
        }
    }
}

/// A rule was broken.
#[derive(Clone, Debug)]
pub struct Failure {
    /// What was found.
    pub finding: Finding,
    /// The oracle that the rule belongs to, as in the history of bugs; empty where it is the simulation's own.
    pub oracle: String,
    /// Schedules run until then, this one included.
    pub found_after: u64,
    /// The shortest schedule that still fails.
    pub schedule: Schedule,
    /// Turns of the schedule that failed first.
    pub minimised_from: usize,
    /// The CPU was taken from a task that could have gone on, so often.
    pub preemptions: u32,
    /// Of the run.
    pub hash: u64,
    /// Steps of the run.
    pub steps: u64,
    /// The replay was the same run.
    pub replays: bool,
    /// To be pasted.
    pub seed: String,
    /// What happened, if it was asked for.
    pub story: Option<Story>,
}

/// What a search came to.
#[derive(Clone, Debug)]
pub struct Found {
    /// Schedules that were run and looked at.
    pub schedules: u64,
    /// Sites passed and forced in all of them.
    pub sites: SiteCounts,
    /// What the number buys.
    pub bound: Bound,
    /// Steps of all runs.
    pub steps: u64,
    /// Wall time, in seconds.
    pub seconds: f64,
    /// Acts that ended, and of them those that the VM refused.
    pub acts: (u64, u64),
    /// The first failure.
    pub failure: Option<Failure>,
}

/// Schedules between two looks at the results.
const BATCH: u64 = 32;
/// Of ten schedules of a mix so many are depth first.
const SYSTEMATIC: u64 = 2;

/// Seconds that making a schedule shorter may take.
const MINIMISING: f64 = 10.0;

/// One look at a run.
struct Look {
    sites: SiteCounts,
    choices: u64,
    width: u32,
    steps: u64,
    depth: Option<u32>,
    acts: (u64, u64),
    failing: Option<(Finding, Schedule, u64)>,
}

/// Searches the schedules of `program` for one that breaks a rule, with `bug` switched on.
///
/// # Errors
/// [`LabError::Usage`] for a program that cannot be run, [`LabError::Cancelled`], [`LabError::Internal`] for a run that does not replay.
pub fn search(
    program: &Program,
    bug: Option<Bug>,
    search: &Search,
    control: &Control,
) -> Result<Found, LabError> {
    program.check()?;
    let begun = Instant::now();
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(search.jobs)
        .build()
        .map_err(|error| LabError::Internal(error.to_string()))?;
    let mut searcher = Searcher {
        program: Arc::new(program.clone()),
        bug,
        search,
        control,
        begun,
        known: Known::default(),
        sites: SiteCounts::default(),
        schedules: 0,
        steps: 0,
        width: 0,
        depths: Vec::new(),
        systematic: (0, None),
        acts: (0, 0),
    };
    let failing = match searcher.probe()? {
        Some(failing) => Some(failing),
        None => match searcher.drawn(&pool)? {
            Some(failing) => Some(failing),
            None => searcher.depth_first()?,
        },
    };
    let failure = failing.map(|failing| searcher.settle(failing)).transpose()?;
    searcher.depths.sort_unstable();
    let bound = Bound::new(searcher.width, searcher.known.choices, &searcher.depths, searcher.systematic);
    Ok(Found {
        schedules: searcher.schedules,
        sites: searcher.sites,
        bound,
        steps: searcher.steps,
        seconds: begun.elapsed().as_secs_f64(),
        acts: searcher.acts,
        failure,
    })
}

struct Searcher<'a> {
    program: Arc<Program>,
    bug: Option<Bug>,
    search: &'a Search,
    control: &'a Control,
    begun: Instant,
    known: Known,
    sites: SiteCounts,
    schedules: u64,
    steps: u64,
    width: u32,
    depths: Vec<(u32, u64)>,
    systematic: (u64, Option<u32>),
    acts: (u64, u64),
}

type Failing = (Finding, Schedule, u64);

impl Searcher<'_> {
    fn config(&self, strategy: Strategy, memory: Memory, yield_percent: u8) -> SimConfig {
        let faults = (!self.search.faults.is_empty()).then(|| self.search.faults.arm() as _);
        let (bug, max_steps) = (self.bug, most_steps(&self.program, self.search.max_steps));
        SimConfig { strategy, memory, yield_percent, bug, faults, max_steps, ..SimConfig::default() }
    }

    fn run(&self, plan: &Planned) -> Outcome {
        let yields = self.search.yield_percent.unwrap_or(plan.yield_percent);
        let config = self.config(plan.strategy.clone(), plan.memory, yields);
        run_with(&self.program, config, &self.search.judges)
    }

    fn look(outcome: &Outcome, depth: Option<u32>) -> Look {
        let refused = outcome.performed.iter().filter(|done| done.result.is_err()).count();
        let run = &outcome.run;
        Look {
            sites: run.sites.clone(),
            choices: run.choices,
            width: run.width,
            steps: run.steps,
            depth,
            acts: (outcome.performed.len() as u64, refused as u64),
            failing: outcome.finding().map(|finding| (finding, run.schedule.clone(), run.hash)),
        }
    }

    /// Books a run; what failed, if it did.
    fn book(&mut self, look: Look) -> Option<Failing> {
        self.schedules += 1;
        self.sites.add(&look.sites);
        self.known.choices = self.known.choices.max(look.choices);
        self.width = self.width.max(look.width);
        self.steps += look.steps;
        self.acts.0 += look.acts.0;
        self.acts.1 += look.acts.1;
        if let Some(depth) = look.depth {
            match self.depths.iter_mut().find(|(of, _)| *of == depth) {
                Some((_, count)) => *count += 1,
                None => self.depths.push((depth, 1)),
            }
        }
        look.failing
    }

    /// The first schedule says how many points there are, and which sites.
    fn probe(&mut self) -> Result<Option<Failing>, LabError> {
        let plan = planned(Mix::Random, self.search.memory, None, self.search.seed, 0, &self.known);
        let outcome = self.run(&plan);
        if let Some(refused) = outcome.refused {
            return Err(refused.into());
        }
        let failing = self.book(Self::look(&outcome, None));
        self.known.sites =
            outcome.run.sites.iter().filter(|(_, count)| count.passed != 0).map(|(site, _)| site).collect();
        Ok(failing)
    }

    fn out_of_time(&self) -> bool {
        self.search.seconds.is_some_and(|seconds| self.begun.elapsed().as_secs_f64() >= seconds)
    }

    fn tell(&self) -> Result<(), LabError> {
        self.control.check()?;
        let done = match self.search.seconds {
            Some(seconds) => self.begun.elapsed().as_secs_f64() / seconds.max(1e-9),
            None => 0.0,
        };
        let fraction = (self.schedules as f64 / self.search.schedules.max(1) as f64).max(done);
        self.control.report("exploring", fraction);
        Ok(())
    }

    fn drawn(&mut self, pool: &rayon::ThreadPool) -> Result<Option<Failing>, LabError> {
        let last = match self.search.strategy {
            Mix::Dfs => 0,
            Mix::Mix => self.search.schedules - self.search.schedules * SYSTEMATIC / 10,
            _ => self.search.schedules,
        };
        // What plans know does not change from here on: the points of the probe, whatever later runs have.
        let known = self.known.clone();
        let mut next = 1;
        while next < last && !self.out_of_time() {
            self.tell()?;
            let batch = next..(next + BATCH).min(last);
            next = batch.end;
            let (search, control) = (self.search, self.control);
            let looks: Vec<Look> = pool.install(|| {
                batch
                    .into_par_iter()
                    .filter(|_| !control.cancelled())
                    .map(|n| {
                        let plan =
                            planned(search.strategy, search.memory, search.depth, search.seed, n, &known);
                        Self::look(&self.run(&plan), plan.depth)
                    })
                    .collect()
            });
            self.control.check()?;
            for look in looks {
                if let Some(failing) = self.book(look) {
                    return Ok(Some(failing));
                }
            }
        }
        Ok(None)
    }

    fn depth_first(&mut self) -> Result<Option<Failing>, LabError> {
        if !matches!(self.search.strategy, Mix::Mix | Mix::Dfs) {
            return Ok(None);
        }
        let memory = if self.search.memory == Models::Tso { Memory::Tso } else { Memory::Sc };
        let mut state = Some(DfsState::new(self.search.preemptions));
        while self.schedules < self.search.schedules && !self.out_of_time() {
            let Some(next) = state.take().and_then(DfsState::next) else { break };
            if self.systematic.0.is_multiple_of(BATCH) {
                self.tell()?;
            }
            let outcome = run_with(
                &self.program,
                self.config(Strategy::Dfs(next), memory, self.search.yield_percent.unwrap_or(0)),
                &self.search.judges,
            );
            self.systematic.0 += 1;
            let failing = self.book(Self::look(&outcome, None));
            if failing.is_some() {
                return Ok(failing);
            }
            if let Some(after) = &outcome.run.dfs {
                // The tree of each smaller bound is done.
                let done = if after.is_done() { Some(after.bound()) } else { after.bound().checked_sub(1) };
                self.systematic.1 = done;
            }
            state = outcome.run.dfs;
        }
        Ok(None)
    }

    /// Runs the failing schedule again, makes it short, and tells its story.
    fn settle(&mut self, (finding, schedule, hash): Failing) -> Result<Failure, LabError> {
        let again = |schedule: &Schedule, record: bool| {
            let mut config = self.config(Strategy::Replay(schedule.clone()), schedule.memory, 0);
            config.faults = None;
            config.record = record;
            run_with(&self.program, config, &self.search.judges)
        };
        self.control.check()?;
        self.control.report("replaying", 1.0);
        let first = again(&schedule, false);
        if first.run.hash != hash {
            return Err(LabError::Internal(format!(
                "a failing run ({}: {}) did not replay: hash {hash:#x}, then {:#x}; schedule {schedule}",
                finding.rule, finding.what, first.run.hash
            )));
        }
        // A livelock is as long without most of its turns, and each try costs as much as the whole.
        let mut left = if finding.rule == "step-limit" { 0 } else { self.search.minimise };
        let begun = Instant::now();
        self.control.report("making the schedule shorter", 1.0);
        let shortest = sim::minimise(&schedule, &mut |shorter: &Schedule| {
            if left == 0 || self.control.cancelled() || begun.elapsed().as_secs_f64() > MINIMISING {
                return false;
            }
            left -= 1;
            again(shorter, false).finding().is_some_and(|found| found.rule == finding.rule)
        });
        self.control.check()?;
        let last = again(&shortest, true);
        let twice = again(&last.run.schedule, false);
        let finding = last.finding().unwrap_or(finding);
        let oracle = oracle_of(&finding.rule);
        let seed = Seed::of(&self.program, self.bug, &last.run.schedule).to_string();
        let told = self.search.story.then(|| story(&self.program, self.bug, &last));
        Ok(Failure {
            finding,
            oracle,
            found_after: self.schedules,
            minimised_from: schedule.turns.len(),
            preemptions: last.run.preemptions,
            hash: last.run.hash,
            steps: last.run.steps,
            replays: twice.run.hash == last.run.hash,
            schedule: last.run.schedule,
            seed,
            story: told,
        })
    }
}

/// The oracle that a rule belongs to.
pub(crate) fn oracle_of(rule: &str) -> String {
    Rule::ALL.iter().find(|known| known.name() == rule).map_or_else(
        || match rule {
            "touched-after-free" => "O-RCU".to_owned(),
            "deadlock" | "step-limit" | "step-too-long" => "O-PROG".to_owned(),
            "rcu-section-too-long" => "O-RCULEN".to_owned(),
            "unclean-end" => "O-END".to_owned(),
            _ => String::new(),
        },
        |rule| rule.oracle().to_owned(),
    )
}

/// Runs one schedule of a program again, recorded.
///
/// # Errors
/// [`LabError::Usage`] for a program that cannot be run.
pub fn replay(program: &Program, bug: Option<Bug>, schedule: &Schedule) -> Result<Outcome, LabError> {
    program.check()?;
    let config = SimConfig {
        strategy: Strategy::Replay(schedule.clone()),
        memory: schedule.memory,
        bug,
        record: true,
        // As in the search: a run that ended there ends there again.
        max_steps: most_steps(program, MOST_STEPS),
        ..SimConfig::default()
    };
    let outcome = run_with(&Arc::new(program.clone()), config, &JudgeSet::default());
    match outcome.refused {
        Some(refused) => Err(refused.into()),
        None => Ok(outcome),
    }
}
