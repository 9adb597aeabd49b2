//! JSON in, JSON out: what the command line and Python bind to.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::json;
use tdpmmu_platform::Bug;
use tdpmmu_platform::sim::SiteCounts;

use super::bound::Bound;
use super::plan::{Mix, Models, unknown};
use super::protocols::{natural_profile, protocol, protocols};
use super::search::{Failure, Found, Search, search};
use crate::faults::{FaultPlan, Injection};
use crate::program::Program;
use crate::{Control, LabError};

/// What `explore` is asked.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Request {
    protocol: Option<String>,
    program: Option<Program>,
    design: Option<String>,
    profile: Option<String>,
    passes: Option<String>,
    ownership: Option<String>,
    schedules: Option<u64>,
    seconds: Option<f64>,
    seed: Option<u64>,
    memory: Option<String>,
    strategy: Option<String>,
    depth: Option<u32>,
    preemptions: Option<u32>,
    jobs: Option<usize>,
    faults: Vec<String>,
    bug: Option<String>,
    minimise: Option<u64>,
    story: Option<bool>,
}

/// tdpmmu.explore/1.
#[derive(Serialize)]
struct Answer<'a> {
    schema: &'static str,
    protocol: &'a str,
    about: &'a str,
    design: String,
    profile: &'a str,
    bug: Option<&'static str>,
    faults: String,
    memory: Models,
    strategy: Mix,
    seed: u64,
    schedules: u64,
    schedules_per_second: f64,
    steps: u64,
    points: u64,
    threads: u32,
    acts: u64,
    acts_refused: u64,
    sites_passed: BTreeMap<&'static str, u64>,
    sites_forced: BTreeMap<&'static str, u64>,
    sites_never_forced: Vec<&'static str>,
    bound: &'a Bound,
    seconds: f64,
    violation: Option<Violation<'a>>,
    program: &'a Program,
}

/// What was found.
#[derive(Serialize)]
struct Violation<'a> {
    rule: &'a str,
    oracle: &'a str,
    what: &'a str,
    root: Option<u32>,
    gfn: Option<u64>,
    seed: &'a str,
    schedule: String,
    memory: String,
    preemptions: u32,
    turns: usize,
    minimised_from: usize,
    found_after: u64,
    steps: u64,
    hash: String,
    replays: bool,
    story: Option<&'a str>,
}

impl<'a> Violation<'a> {
    fn of(failure: &'a Failure) -> Self {
        Self {
            rule: &failure.finding.rule,
            oracle: &failure.oracle,
            what: &failure.finding.what,
            root: failure.finding.root,
            gfn: failure.finding.gfn,
            seed: &failure.seed,
            schedule: failure.schedule.to_string(),
            memory: format!("{:?}", failure.schedule.memory).to_ascii_lowercase(),
            preemptions: failure.preemptions,
            turns: failure.schedule.turns.len(),
            minimised_from: failure.minimised_from,
            found_after: failure.found_after,
            steps: failure.steps,
            hash: format!("{:016x}", failure.hash),
            replays: failure.replays,
            story: failure.story.as_ref().map(|story| story.text.as_str()),
        }
    }
}

/// Every protocol, as JSON.
pub fn protocols_json() -> String {
    let all: Vec<_> = protocols()
        .iter()
        .map(|p| {
            let program = p.program("sync", natural_profile("sync")).ok();
            let threads = program.map_or(0, |program| program.threads.len());
            json!({ "name": p.name, "about": p.about, "threads": threads })
        })
        .collect();
    json!({ "schema": "tdpmmu.protocols/1", "protocols": all }).to_string()
}

/// Explores: `{"protocol" | "program", "design", "profile", "schedules", "seconds", "seed", "memory", "strategy", ...}` to tdpmmu.explore/1. A violation is a result.
///
/// # Errors
/// [`LabError::Usage`] for a request that makes no sense; as [`search`].
pub fn command(request: &str, control: &Control) -> Result<String, LabError> {
    let request: Request =
        serde_json::from_str(request).map_err(|error| LabError::Usage(format!("explore: {error}")))?;
    let (program, about) = request.what()?;
    let bug = request.bug.as_deref().map(named_bug).transpose()?;
    let how = request.how()?;
    let program = how.faults.apply(&program);
    let found = search(&program, bug, &how, control)?;
    answer(&program, about, bug, &how, &found)
}

/// The bug of that number.
fn named_bug(id: &str) -> Result<Bug, LabError> {
    Bug::parse(id).ok_or_else(|| {
        let known: Vec<_> = Bug::ALL.iter().map(|bug| bug.id()).collect();
        unknown("bug", id, &known)
    })
}

fn by_site(
    sites: &SiteCounts,
    count: impl Fn(tdpmmu_platform::sim::SiteCount) -> u64,
) -> BTreeMap<&'static str, u64> {
    let counted = sites.iter().map(|(site, counts)| (site.name(), count(counts)));
    counted.filter(|(_, count)| *count != 0).collect()
}

/// The answer to a search.
fn answer(
    program: &Program,
    about: &str,
    bug: Option<Bug>,
    how: &Search,
    found: &Found,
) -> Result<String, LabError> {
    Ok(serde_json::to_string(&Answer {
        schema: "tdpmmu.explore/1",
        protocol: &program.name,
        about,
        design: program.machine.design_name()?,
        profile: &program.machine.profile,
        bug: bug.map(Bug::id),
        faults: how.faults.to_string(),
        memory: how.memory,
        strategy: how.strategy,
        seed: how.seed,
        schedules: found.schedules,
        schedules_per_second: found.schedules as f64 / found.seconds.max(1e-9),
        steps: found.steps,
        points: found.bound.points,
        threads: found.bound.threads,
        acts: found.acts.0,
        acts_refused: found.acts.1,
        sites_passed: by_site(&found.sites, |count| count.passed),
        sites_forced: by_site(&found.sites, |count| count.forced),
        sites_never_forced: found.sites.never_forced().into_iter().map(|site| site.name()).collect(),
        bound: &found.bound,
        seconds: found.seconds,
        violation: found.failure.as_ref().map(Violation::of),
        program,
    })?)
}

/// The program of a request: a protocol by its name, or one of the asker's own; under this design and profile where they are given. Also what is told of the protocol.
///
/// # Errors
/// [`LabError::Usage`] for a name that is not known, and for both or neither; `who` asks.
pub(crate) fn asked_for(
    who: &str,
    (name, own): (Option<&str>, Option<&Program>),
    design: Option<&str>,
    profile: Option<&str>,
) -> Result<(Program, &'static str), LabError> {
    match (name, own) {
        (Some(name), None) => {
            let names: Vec<_> = protocols().iter().map(|protocol| protocol.name).collect();
            let known = protocol(name).ok_or_else(|| unknown("protocol", name, &names))?;
            let profile = profile.unwrap_or_else(|| design.map_or("6.12", natural_profile));
            Ok((known.program(design.unwrap_or_default(), profile)?, known.about))
        }
        (None, Some(program)) => {
            let mut program = program.clone();
            if let Some(design) = design {
                design.clone_into(&mut program.machine.design);
            }
            if let Some(profile) = profile {
                profile.clone_into(&mut program.machine.profile);
            }
            Ok((program, ""))
        }
        _ => Err(LabError::Usage(format!("{who}: name a protocol or give a program, one of them"))),
    }
}

impl Request {
    fn what(&self) -> Result<(Program, &'static str), LabError> {
        let which = (self.protocol.as_deref(), self.program.as_ref());
        let (mut program, about) =
            asked_for("explore", which, self.design.as_deref(), self.profile.as_deref())?;
        if self.passes.is_some() {
            program.machine.passes.clone_from(&self.passes);
        }
        if self.ownership.is_some() {
            program.machine.ownership.clone_from(&self.ownership);
        }
        program.check()?;
        Ok((program, about))
    }

    fn how(&self) -> Result<Search, LabError> {
        let faults: Vec<Injection> = self
            .faults
            .iter()
            .map(|text| text.parse::<Injection>().map_err(|error| LabError::Usage(error.to_string())))
            .collect::<Result<_, _>>()?;
        let usual = Search::default();
        if self.seconds.is_some_and(|seconds| !(seconds > 0.0 && seconds.is_finite())) {
            return Err(LabError::Usage(format!("seconds={:?}: more than none", self.seconds)));
        }
        if self.schedules == Some(0) {
            return Err(LabError::Usage("schedules=0: at least one".into()));
        }
        if self.depth.is_some_and(|depth| !(1..=16).contains(&depth)) {
            return Err(LabError::Usage(format!("depth={:?}: 1 to 16 ordering constraints", self.depth)));
        }
        Ok(Search {
            // With a time and no number, the time decides.
            schedules: self.schedules.unwrap_or(if self.seconds.is_some() {
                u64::MAX / 16
            } else {
                usual.schedules
            }),
            seconds: self.seconds,
            seed: self.seed.unwrap_or(usual.seed),
            memory: self.memory.as_deref().map_or(Ok(usual.memory), Models::parse)?,
            strategy: self.strategy.as_deref().map_or(Ok(usual.strategy), Mix::parse)?,
            depth: self.depth,
            preemptions: self.preemptions.unwrap_or(usual.preemptions),
            jobs: self.jobs.unwrap_or(usual.jobs),
            faults: FaultPlan::new(faults).map_err(|error| LabError::Usage(error.to_string()))?,
            minimise: self.minimise.unwrap_or(usual.minimise),
            story: self.story.unwrap_or(usual.story),
            ..usual
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_that_makes_no_sense_is_refused_with_what_would() {
        let told = |json: &str| command(json, &Control::silent()).expect_err("refused").to_string();
        assert!(told("{}").contains("name a protocol or give a program"));
        assert!(told(r#"{"protocol":"root-lifecycl"}"#).contains("did you mean root-lifecycle"));
        assert!(told(r#"{"protocol":"fault-zap","design":"snc"}"#).contains("no zap design has that name"));
        assert!(
            told(r#"{"protocol":"fault-zap","design":"sync","profile":"5.10"}"#).contains("stale root")
                || told(r#"{"protocol":"fault-zap","design":"sync","profile":"5.10"}"#).contains("obsolete")
        );
        assert!(told(r#"{"protocol":"fault-zap","strategy":"pca"}"#).contains("did you mean pct"));
        assert!(told(r#"{"protocol":"fault-zap","memory":"weak"}"#).contains("mix, sc, tso"));
        assert!(told(r#"{"protocol":"fault-zap","bug":"45"}"#).contains("bug=\"45\""));
        assert!(told(r#"{"protocol":"fault-zap","schedules":0}"#).contains("at least one"));
        assert!(told(r#"{"protocol":"fault-zap","colour":1}"#).contains("unknown field"));
        assert!(told(r#"{"protocol":"fault-zap","faults":["alloc=sometimes"]}"#).contains("alloc"));
    }
}
