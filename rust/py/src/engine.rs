//! What the bindings call below: the one place that names the crates of the house.
//!
//! Everything crosses as JSON text or plain values, so that nothing here depends on the layout of a result.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde_json::json;

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
        "profiles": ["5.10", "5.15", "5.18", "6.1-async", "6.1", "6.12", "7.2"],
        "experiments": ["zap", "drop", "populate", "fault", "walk", "rcu"],
    })
    .to_string()
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
