//! What the bindings call below: the one place that names the crates of the house.
//!
//! Everything crosses as JSON text or plain values, so that nothing here depends on the layout of a result.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde_json::json;
use tdpmmu_spte::{KernelProfile, Passes};

use crate::error::Fault;
use crate::job::Control;

/// What `replay` was asked.
pub struct ReplayRequest {
    pub path: PathBuf,
    pub profile: Option<String>,
    pub check: bool,
    pub strict: bool,
    pub vm_of: Option<u32>,
}

pub fn build_info() -> String {
    json!({
        "version": env!("CARGO_PKG_VERSION"),
        "profile": env!("TDPMMU_PROFILE"),
        "git": env!("TDPMMU_GIT"),
        "target": env!("TDPMMU_TARGET"),
        "debug_assertions": cfg!(debug_assertions),
    })
    .to_string()
}

pub fn info() -> Result<String, Fault> {
    Err(Fault::Unsupported("this build has no lab".into()))
}

pub fn catalogue() -> String {
    json!({
        "designs": ["inline", "async-worker", "sync"],
        "profiles": KernelProfile::NAMES,
        "switches": KernelProfile::SWITCHES,
        "experiments": ["zap", "drop", "populate", "fault", "walk", "rcu"],
    })
    .to_string()
}

/// The profile as it prints itself: its name, then the switches that differ.
pub fn profile(text: &str) -> Result<String, Fault> {
    KernelProfile::named(text).map(|p| p.to_string()).map_err(|e| Fault::Invalid(e.to_string()))
}

pub fn passes(text: &str) -> Result<String, Fault> {
    Passes::parse(text).map(|p| p.to_string()).map_err(|e| Fault::Invalid(e.to_string()))
}

pub fn bench(kind: &str, _config: &str, _control: &Control) -> Result<String, Fault> {
    Err(Fault::Unsupported(format!("this build has no experiment {kind:?}")))
}

pub fn replay(request: &ReplayRequest, _control: &Control) -> Result<String, Fault> {
    Err(Fault::Unsupported(format!("this build cannot replay {}", request.path.display())))
}

/// Sleeps in short steps, so that it ends soon after it is cancelled. Returns the milliseconds idled.
pub fn idle(seconds: f64, control: &Control) -> Result<u64, Fault> {
    let Ok(whole) = Duration::try_from_secs_f64(seconds) else {
        return Err(Fault::Invalid(format!("seconds={seconds}: must be finite and not negative")));
    };
    let start = Instant::now();
    while start.elapsed() < whole {
        if control.cancelled() {
            return Err(Fault::Cancelled);
        }
        control.report("idle", start.elapsed().as_secs_f64() / whole.as_secs_f64());
        std::thread::sleep(Duration::from_millis(2).min(whole));
    }
    Ok(start.elapsed().as_millis() as u64)
}
