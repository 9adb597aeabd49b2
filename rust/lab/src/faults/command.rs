//! JSON in, JSON out: what the command line and Python bind to.

use serde::Deserialize;

use super::enumerate;
use crate::explore::asked_for;
use crate::program::Program;
use crate::{Control, LabError};

/// What is asked.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Request {
    protocol: Option<String>,
    program: Option<Program>,
    design: Option<String>,
    profile: Option<String>,
    seed: Option<u64>,
}

/// Fails each allocation of a program in turn: `{"protocol" | "program", "design", "profile", "seed"}` to tdpmmu.faults/1.
///
/// # Errors
/// [`LabError::Usage`] for a request that makes no sense; as [`enumerate`].
pub fn command(request: &str, control: &Control) -> Result<String, LabError> {
    let request: Request =
        serde_json::from_str(request).map_err(|error| LabError::Usage(format!("faults: {error}")))?;
    let which = (request.protocol.as_deref(), request.program.as_ref());
    let (program, _) = asked_for("faults", which, request.design.as_deref(), request.profile.as_deref())?;
    Ok(serde_json::to_string(&enumerate(&program, request.seed, control)?)?)
}
