//! The demonstration: with the bug on an oracle fires; with the bug off, over the same budget, none.
//!
//! **Guarantee.** Both searches run the same program with the same seeds and as many schedules; they differ in the bug alone. No oracle is told what to look for. What is found replays: its seed and schedule are in the
//! result.
//!
//! **Mechanism.** One search a seed, until the first failure. The count of schedules is what the bug cost to find; over several seeds its median is told.

use std::sync::atomic::{AtomicUsize, Ordering};

use rayon::prelude::*;
use serde::Serialize;

use super::{Catcher, Entry, entries};
use crate::explore::{Failure, Models, Search, search};
use crate::{Control, LabError};

/// What a demonstration may cost.
#[derive(Clone, Debug)]
pub struct Budget {
    /// The first seed; the others follow it.
    pub seed: u64,
    /// Seeds, at least 1.
    pub seeds: u32,
    /// Schedules a seed; `None`: as many as the exhibit asks for.
    pub schedules: Option<u64>,
    /// Schedules a seed with the bug off; `None`: as many as with it on.
    pub clean: Option<u64>,
    /// The first seed's failure is minimised and told as a story.
    pub story: bool,
}

impl Default for Budget {
    fn default() -> Self {
        Self { seed: 1, seeds: 5, schedules: None, clean: None, story: false }
    }
}

/// What a demonstration came to: a row of `tdpmmu.bugs/1`, and what goes with it.
#[derive(Clone, Debug, Serialize)]
pub struct Demo {
    /// The exhibit.
    pub id: &'static str,
    /// What it is.
    pub title: &'static str,
    /// Every seed found it.
    pub caught: bool,
    /// Something fired with the bug off.
    pub false_alarm: bool,
    /// Schedules until something fired, the median over the seeds; `None` where half of them or more found nothing.
    pub schedules_median: Option<u64>,
    /// The rule that was broken, by the first seed that found something.
    pub oracle: Option<String>,
    /// What caught it: simulation, tso.
    pub catcher: &'static str,
    /// The seed of that finding.
    pub seed: Option<u64>,
    /// The run as a text that replays: program, bug and schedule.
    pub schedule: Option<String>,
    /// Forced switches in it.
    pub preemptions: Option<u32>,
    /// Schedules until something fired, seed by seed.
    pub schedules: Vec<Option<u64>>,
    /// Schedules that ran with the bug off.
    pub schedules_clean: u64,
    /// What the oracle said.
    pub what: Option<String>,
    /// Who did what when: columns of the threads, SPTE values, reference counts.
    pub story: Option<String>,
    /// What fired with the bug off.
    pub alarm: Option<String>,
}

/// `tdpmmu.bugs/1`.
#[derive(Clone, Debug, Serialize)]
pub struct Museum {
    /// Its name.
    pub schema: &'static str,
    /// Exhibits caught.
    pub caught: usize,
    /// Exhibits.
    pub total: usize,
    /// Exhibits at which something fired with the bug off.
    pub false_alarms: usize,
    /// How long it took.
    pub seconds: f64,
    /// One row an exhibit.
    pub bugs: Vec<Demo>,
}

/// Shows one exhibit.
///
/// # Errors
/// [`LabError::Cancelled`]; [`LabError::Usage`] for a budget without seeds or schedules; what the search says.
pub fn demo(entry: &Entry, budget: &Budget, control: &Control) -> Result<Demo, LabError> {
    if budget.seeds == 0 || budget.schedules == Some(0) {
        return Err(LabError::Usage("a demonstration has at least one seed and one schedule".into()));
    }
    let mut demo = Demo {
        id: entry.id(),
        title: entry.title,
        caught: false,
        false_alarm: false,
        schedules_median: None,
        oracle: None,
        catcher: entry.catcher.name(),
        seed: None,
        schedule: None,
        preemptions: None,
        schedules: Vec::new(),
        schedules_clean: 0,
        what: None,
        story: None,
        alarm: None,
    };
    for seed in (budget.seed..).take(budget.seeds as usize) {
        demo.search(entry, budget, seed, control)?;
        control.check()?;
    }
    demo.caught = demo.schedules.iter().all(Option::is_some);
    let mut counts: Vec<u64> = demo.schedules.iter().map(|n| n.unwrap_or(u64::MAX)).collect();
    counts.sort_unstable();
    demo.schedules_median = Some(counts[counts.len() / 2]).filter(|&n| n != u64::MAX);
    Ok(demo)
}

impl Demo {
    fn search(
        &mut self,
        entry: &Entry,
        budget: &Budget,
        seed: u64,
        control: &Control,
    ) -> Result<(), LabError> {
        let (program, hints) = (&(entry.program)(), entry.hints);
        let memory = if entry.catcher == Catcher::Tso { Models::Tso } else { Models::Sc };
        let quick = Search {
            seed,
            schedules: budget.schedules.unwrap_or(hints.schedules),
            memory,
            jobs: 1,
            max_steps: hints.max_steps.unwrap_or(Search::default().max_steps),
            minimise: 0,
            story: false,
            ..Search::default()
        };
        let thorough = Search { minimise: Search::default().minimise, story: true, ..quick.clone() };
        let first = self.oracle.is_none();
        let found = search(
            program,
            Some(entry.bug),
            if budget.story && first { &thorough } else { &quick },
            control,
        )?;
        self.schedules.push(found.failure.as_ref().map(|failure| failure.found_after));
        if let Some(failure) = found.failure.filter(|_| first) {
            self.took(seed, failure);
        }
        let clean = Search { schedules: budget.clean.unwrap_or(quick.schedules), ..quick };
        let clean = search(program, None, &clean, control)?;
        self.schedules_clean += clean.schedules;
        if let Some(failure) = clean.failure {
            self.false_alarm = true;
            let Failure { finding, seed: text, .. } = &failure;
            self.alarm.get_or_insert(format!("{}: {} ({text})", finding.rule, finding.what));
        }
        Ok(())
    }

    fn took(&mut self, seed: u64, failure: Failure) {
        self.oracle = Some(match failure.oracle.as_str() {
            "" => failure.finding.rule.to_string(),
            oracle => format!("{oracle}: {}", failure.finding.rule),
        });
        self.seed = Some(seed);
        self.what = Some(failure.finding.what);
        self.preemptions = Some(failure.preemptions);
        self.schedule = Some(failure.seed);
        self.story = failure.story.map(|story| story.text);
    }
}

/// Shows every exhibit.
///
/// # Errors
/// As [`demo`].
pub fn demo_all(budget: &Budget, control: &Control) -> Result<Museum, LabError> {
    demo_of(entries(), budget, control)
}

/// Shows these exhibits, as many at once as there are threads in the pool of the caller.
///
/// # Errors
/// As [`demo`].
pub fn demo_of(
    exhibits: Vec<&'static Entry>,
    budget: &Budget,
    control: &Control,
) -> Result<Museum, LabError> {
    let began = std::time::Instant::now();
    let total = exhibits.len();
    let done = AtomicUsize::new(0);
    let bugs = exhibits
        .into_par_iter()
        .map(|entry| {
            let shown = demo(entry, budget, &Control::new(control.flag().clone(), |_, _| {}));
            let done = done.fetch_add(1, Ordering::Relaxed) + 1;
            control.report(&format!("bug {}", entry.id()), done as f64 / total as f64);
            shown
        })
        .collect::<Result<Vec<_>, _>>()?;
    Ok(Museum {
        schema: "tdpmmu.bugs/1",
        caught: bugs.iter().filter(|bug| bug.caught).count(),
        total,
        false_alarms: bugs.iter().filter(|bug| bug.false_alarm).count(),
        seconds: began.elapsed().as_secs_f64(),
        bugs,
    })
}
