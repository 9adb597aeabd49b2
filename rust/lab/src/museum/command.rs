//! The museum's door: JSON in, JSON out.

use serde::{Deserialize, Serialize};
use tdpmmu_spte::closest;

use super::{Budget, Card, Entry, cards, demo_of, entries, find};
use crate::{Control, LabError};

/// What `bugs demo` asks for.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Request {
    /// Which exhibits; none: all.
    ids: Vec<String>,
    /// Seeds of each.
    seeds: u32,
    /// Schedules of each seed; `null`: the exhibit's own.
    schedules: Option<u64>,
    /// The first seed.
    seed: u64,
    /// Threads; 0: one a CPU.
    jobs: usize,
    /// Minimise the first finding of each and tell its story.
    story: bool,
}

impl Default for Request {
    fn default() -> Self {
        let Budget { seed, seeds, schedules, story, .. } = Budget::default();
        Self { ids: Vec::new(), seeds, schedules, seed, jobs: 0, story }
    }
}

/// `tdpmmu.museum/1`.
#[derive(Serialize)]
struct List {
    schema: &'static str,
    bugs: Vec<Card>,
}

/// The catalogue, as `tdpmmu.museum/1`.
///
/// # Errors
/// [`LabError::Internal`] if it cannot be written as JSON.
pub fn list_json() -> Result<String, LabError> {
    Ok(serde_json::to_string(&List { schema: "tdpmmu.museum/1", bugs: cards() })?)
}

/// One exhibit as text.
///
/// # Errors
/// [`LabError::Usage`] for an id that no exhibit has.
pub fn show(id: &str) -> Result<String, LabError> {
    Ok(Card::from(named(id)?).to_string())
}

fn named(id: &str) -> Result<&'static Entry, LabError> {
    find(id).ok_or_else(|| {
        let known: Vec<&str> = entries().iter().map(|entry| entry.id()).collect();
        let hint = closest(id, &known).map_or_else(String::new, |near| format!("; did you mean {near}?"));
        LabError::Usage(format!("bug={id:?}: the museum has {}{hint}", known.join(", ")))
    })
}

/// `bugs demo`: a request as JSON (`ids`, `seeds`, `schedules`, `seed`, `jobs`, `story`; each may be left out), the result as `tdpmmu.bugs/1`.
///
/// # Errors
/// [`LabError::Usage`] for a request that breaks a rule; [`LabError::Cancelled`].
pub fn command(config_json: &str, control: &Control) -> Result<String, LabError> {
    let request: Request = serde_json::from_str(config_json)
        .map_err(|error| LabError::Usage(format!("the request of a demonstration: {error}")))?;
    let Request { ids, seeds, schedules, seed, jobs, story } = request;
    let chosen = match ids.as_slice() {
        [] => entries(),
        ids => ids.iter().map(|id| named(id)).collect::<Result<_, _>>()?,
    };
    let budget = Budget { seed, seeds, schedules, story, clean: None };
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(jobs)
        .build()
        .map_err(|error| LabError::Internal(format!("threads for the demonstration: {error}")))?;
    let museum = pool.install(|| demo_of(chosen, &budget, control))?;
    Ok(serde_json::to_string(&museum)?)
}
