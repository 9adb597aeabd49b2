//! One door to everything that searches: a kind and a JSON request in, a JSON result out.
//!
//! A violation that was found is a result, not an error: who asked decides what it means.

use crate::{Control, LabError, explain, explore, faults, museum, simulate, torture};

/// The kinds that [`run`] knows.
pub const KINDS: &[&str] =
    &["protocols", "explore", "faults", "museum", "demo", "torture", "explain", "simulate"];

/// Does what `kind` asks, with its own configuration.
///
/// # Errors
/// [`LabError`], by the exit code it deserves; [`LabError::Usage`] names the value and the rule.
pub fn run(kind: &str, config_json: &str, control: &Control) -> Result<String, LabError> {
    match kind {
        "protocols" => Ok(explore::protocols_json()),
        "explore" => explore::command(config_json, control),
        "faults" => faults::command(config_json, control),
        "museum" => museum::list_json(),
        "demo" => museum::command(config_json, control),
        "torture" => torture::command(config_json, control),
        "explain" => explain::command(config_json, control),
        "simulate" => simulate::command(config_json, control),
        other => Err(LabError::Usage(format!("kind={other:?}: expected one of {}", KINDS.join(", ")))),
    }
}
