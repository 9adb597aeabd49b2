//! JSON in, JSON out: what the command line and Python bind to.

use serde::Deserialize;

use super::{TortureConfig, torture};
use crate::faults::FaultPlan;
use crate::{Control, LabError};

/// What is asked; `null` is the default.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Request {
    seconds: Option<f64>,
    seed: Option<u64>,
    threads: Option<usize>,
    profile: Option<String>,
    design: Option<String>,
    faults: Option<Vec<String>>,
    shake: Option<u32>,
    run_ms: Option<u64>,
    rounds: Option<u32>,
    bug: Option<String>,
}

/// Tortures: `{"seconds", "seed", "threads", "profile", "design", "faults": ["yield=all", ...]}` to tdpmmu.torture/1. A violation is a result.
///
/// # Errors
/// As [`torture`], and [`LabError::Usage`] for a request that makes no sense.
pub fn command(request: &str, control: &Control) -> Result<String, LabError> {
    let request: Request =
        serde_json::from_str(request).map_err(|error| LabError::Usage(format!("torture: {error}")))?;
    let usual = TortureConfig::default();
    let faults: FaultPlan = request
        .faults
        .unwrap_or_default()
        .join(",")
        .parse()
        .map_err(|error: crate::faults::FaultError| LabError::Usage(error.to_string()))?;
    let config = TortureConfig {
        seconds: request.seconds.unwrap_or(usual.seconds),
        seed: request.seed,
        threads: request.threads.unwrap_or(usual.threads),
        profile: request.profile,
        design: request.design,
        faults,
        shake: request.shake.unwrap_or(usual.shake),
        run_ms: request.run_ms.unwrap_or(usual.run_ms),
        rounds: request.rounds.unwrap_or(usual.rounds),
        bug: request.bug,
    };
    Ok(serde_json::to_string(&torture(&config, control)?)?)
}
