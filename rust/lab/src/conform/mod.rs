//! # Conformance: the engine against recordings of real KVM
//!
//! **Guarantee.** The engine is told what was done to a VM and what the host answered, never what KVM made of it; every SPTE transition that KVM was recorded to make is then compared with what
//! the engine did, one by one, with births and deaths of tables, statistics and results. With every value in the recording blanked the prediction is the same, byte for byte.
//!
//! **Mechanism.** A recording is a trace, the script of operations, the module parameters. [`load`] makes of them a list of *inputs*, each at the line at which it takes effect against mmu_lock,
//! and keeps apart what KVM did. [`driver`] carries the inputs out on a [`tdpmmu_vm::Vm`], one OS thread per recorded thread and one at a time ([`thread`]); the
//! engine's observer writes down what happens ([`predict`]); [`compare`] judges.
//!
//! | file | idea |
//! | --- | --- |
//! | `script.rs` | what was done |
//! | `blank.rs` | what of a line the predictor may see |
//! | `load.rs`, `inputs.rs` | a recording becomes inputs |
//! | `order.rs` | where walks and faults fall between each other |
//! | `recorded.rs`, `names.rs` | what KVM did, with names for tables and roots |
//! | `machine.rs`, `driver.rs`, `host.rs` | inputs become operations; the host's unspoken answers |
//! | `thread.rs` | the baton |
//! | `predict.rs` | what the engine did |
//! | `compare/` | the judge |
//! | `report.rs` | the result |
//!
//! What is compared how, and what nothing in a recording decides, stands in the essay of `compare/mod.rs`.

mod blank;
mod compare;
mod driver;
mod error;
mod host;
mod inputs;
mod load;
mod machine;
mod names;
mod order;
mod predict;
mod recorded;
mod report;
mod script;
mod thread;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use tdpmmu_spte::KernelProfile;

pub use blank::blank;
pub use error::ConformError;
pub use predict::{Outcome, Prediction};
pub use report::{CaseReport, Conform, KindCount, LifeCount, Mismatch, NumberCount, Skipped};

use crate::Control;
use driver::Actor;
use load::Case;
use machine::World;
use predict::Book;
use thread::Stage;

/// What a run is asked for.
#[derive(Clone)]
pub struct ConformOptions {
    /// The kernel whose rules hold, as `NAME[,switch=value]`; `None`: the name of the folder above the recording.
    pub profile: Option<String>,
    /// Progress and cancellation.
    pub control: Control,
}

impl Default for ConformOptions {
    fn default() -> Self {
        Self { profile: None, control: Control::silent() }
    }
}

/// Runs the recordings in `paths` (folders with `trace.txt.gz`, `script.json`, `params.txt`) through the engine and compares.
///
/// # Errors
/// [`ConformError`]; a difference is a result.
pub fn conform(paths: &[PathBuf], options: &ConformOptions) -> Result<Conform, ConformError> {
    if paths.is_empty() {
        return Err(ConformError::Usage("conform needs at least one recording".to_owned()));
    }
    let mut cases = Vec::with_capacity(paths.len());
    for (at, path) in paths.iter().enumerate() {
        let name = path.display().to_string();
        options.control.report(&name, at as f64 / paths.len() as f64);
        let (mut case, profile, book) = run(path, options)?;
        cases.push(compare::compare(&mut case, profile, book));
    }
    options.control.report("done", 1.0);
    Ok(Conform { schema: "tdpmmu.conform/1", cases })
}

/// Runs one recording through the engine and tells what the engine did, without looking at what KVM did.
///
/// # Errors
/// [`ConformError`].
pub fn predict(path: &Path, options: &ConformOptions) -> Result<Prediction, ConformError> {
    let (case, profile, book) = run(path, options)?;
    Ok(Prediction::new(&case, profile.0, &book))
}

fn run(path: &Path, options: &ConformOptions) -> Result<(Case, (String, &'static str), Book), ConformError> {
    let control = options.control.clone();
    let case = load::load(path, &|| control.cancelled())?;
    let (profile, from) = profile_of(&case, options.profile.as_deref())?;
    let book = carry_out(&case, profile, &options.control)?;
    Ok((case, (profile.to_string(), from), book))
}

/// The profile asked for; else that of the folder's name; else, where that is a version, the newest that is not newer.
fn profile_of(case: &Case, asked: Option<&str>) -> Result<(KernelProfile, &'static str), ConformError> {
    if let Some(asked) = asked {
        let named = KernelProfile::named(asked).map_err(|e| ConformError::Usage(e.to_string()))?;
        return Ok((named, "option"));
    }
    let refused = match KernelProfile::named(&case.kernel) {
        Ok(profile) => return Ok((profile, "folder")),
        Err(refused) => refused,
    };
    let wanted = version(&case.kernel);
    let known = KernelProfile::ALL.iter().filter_map(|profile| Some((version(profile.name)?, profile)));
    // Of two profiles with one version the plain one.
    let nearest = known
        .filter(|(known, _)| wanted.is_some_and(|wanted| *known <= wanted))
        .max_by_key(|(known, profile)| (*known, !profile.name.contains('-')));
    match nearest {
        Some((_, profile)) => Ok((*profile, "nearest")),
        None => Err(ConformError::Usage(format!(
            "{}: the folder above it is named {:?}, which is no profile; give one with --profile ({refused})",
            case.name, case.kernel
        ))),
    }
}

/// Major and minor number at the beginning of a name.
fn version(name: &str) -> Option<(u32, u32)> {
    let (major, rest) = name.split_once('.')?;
    let minor = rest.split(|c: char| !c.is_ascii_digit()).next()?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// Lets the stage's threads play the inputs.
fn carry_out(case: &Case, profile: KernelProfile, control: &Control) -> Result<Book, ConformError> {
    let stage = Arc::new(Stage::new(case.inputs.clone().into(), case.threads.len()));
    let world = World::new(profile, case.params, stage.clone());
    let mut acts = vec![false; case.threads.len()];
    for input in &case.inputs {
        acts[input.thread as usize] = true;
    }
    let engine = |what: String| ConformError::Engine { name: case.name.clone(), what };
    std::thread::scope(|scope| {
        let mut started = Vec::new();
        for thread in (0..case.threads.len() as u32).filter(|&thread| acts[thread as usize]) {
            let (world, shared) = (&world, &*stage);
            let actor = Actor::new(case, world, shared, thread);
            let name = format!("conform-{thread}");
            let spawned = std::thread::Builder::new().name(name).spawn_scoped(scope, move || {
                let run = std::panic::AssertUnwindSafe(|| actor.run());
                if let Err(panic) = std::panic::catch_unwind(run) {
                    let what = panic.downcast_ref::<String>().map(String::as_str);
                    let what = what.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("?");
                    shared.stop(Some(format!("the engine panicked: {what}")));
                }
            });
            match spawned {
                Ok(handle) => started.push(handle),
                Err(error) => {
                    stage.stop(Some(format!("the host refused a thread: {error}")));
                    break;
                }
            }
        }
        while started.iter().any(|handle| !handle.is_finished()) {
            if control.cancelled() {
                stage.stop(Some("cancelled".to_owned()));
            }
            std::thread::park_timeout(std::time::Duration::from_millis(1));
        }
    });
    // Works that are held back would hold up the end of VMs that the recording left alive, or that a failure did.
    world.scribe.free_works(true);
    if control.cancelled() {
        return Err(ConformError::Cancelled);
    }
    if let Some(failure) = stage.failure() {
        return Err(engine(failure));
    }
    let mut book = world.scribe.take_book();
    book.yields = stage.yields();
    Ok(book)
}
