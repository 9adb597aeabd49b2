//! JSON in, JSON out: what the command line and Python bind to.

use serde::Deserialize;
use tdpmmu_spte::closest;

use super::enumerate;
use crate::explore::{natural_profile, protocol, protocols};
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

impl Request {
    fn program(&self) -> Result<Program, LabError> {
        let mut program = match (&self.protocol, &self.program) {
            (Some(name), None) => {
                let names: Vec<_> = protocols().iter().map(|protocol| protocol.name).collect();
                let known = protocol(name).ok_or_else(|| {
                    let near = closest(name, &names)
                        .map_or(String::new(), |near| format!("; did you mean {near:?}?"));
                    LabError::Usage(format!(
                        "protocol={name:?}: no protocol is called that{near} (known: {})",
                        names.join(", ")
                    ))
                })?;
                let design = self.design.as_deref().unwrap_or_default();
                let natural = if design.is_empty() { "6.12" } else { natural_profile(design) };
                known.program(design, self.profile.as_deref().unwrap_or(natural))?
            }
            (None, Some(program)) => program.clone(),
            _ => {
                return Err(LabError::Usage("faults: name a protocol or give a program, one of them".into()));
            }
        };
        if let Some(design) = &self.design {
            program.machine.design.clone_from(design);
        }
        if let Some(profile) = &self.profile {
            program.machine.profile.clone_from(profile);
        }
        Ok(program)
    }
}

/// Fails each allocation of a program in turn: `{"protocol" | "program", "design", "profile", "seed"}` to tdpmmu.faults/1.
///
/// # Errors
/// [`LabError::Usage`] for a request that makes no sense; as [`enumerate`].
pub fn command(request: &str, control: &Control) -> Result<String, LabError> {
    let request: Request =
        serde_json::from_str(request).map_err(|error| LabError::Usage(format!("faults: {error}")))?;
    Ok(serde_json::to_string(&enumerate(&request.program()?, request.seed, control)?)?)
}
