//! A seed, or the file that a search wrote, becomes a story again.

use serde::Deserialize;
use serde_json::{Value, json};
use tdpmmu_platform::Bug;

use super::{Story, story};
use crate::explore::{Seed, replay};
use crate::program::Program;
use crate::{Control, LabError};

/// What `explain` is asked.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Request {
    /// A seed, or the content of a result file.
    text: String,
    /// The page as well.
    #[serde(default)]
    html: bool,
    /// Of several runs in a file: the one whose `id` or `protocol` this is.
    #[serde(default)]
    which: Option<String>,
}

/// Tells the story of the run that `text` names: a seed (`v1:...`), or JSON that holds one (tdpmmu.explore/1, tdpmmu.bugs/1, tdpmmu.torture/1), or `{"program", "schedule", "bug"}`.
///
/// # Errors
/// [`LabError::Usage`] with what does not fit.
pub fn explain(text: &str, which: Option<&str>) -> Result<(Story, Seed), LabError> {
    let seed = find(text, which)?;
    let outcome = replay(&seed.program, seed.bug, &seed.schedule)?;
    Ok((story(&seed.program, seed.bug, &outcome), seed))
}

/// `{"text", "html"}` to tdpmmu.story/1.
///
/// # Errors
/// As [`explain`].
pub fn command(request: &str, control: &Control) -> Result<String, LabError> {
    let request: Request =
        serde_json::from_str(request).map_err(|error| LabError::Usage(format!("explain: {error}")))?;
    control.check()?;
    let (story, seed) = explain(&request.text, request.which.as_deref())?;
    let html = if request.html { Value::String(story.html) } else { Value::Null };
    let answer = json!({
        "schema": "tdpmmu.story/1",
        "title": story.title,
        "rule": story.rule,
        "text": story.text,
        "html": html,
        "seed": story.seed,
        "header": story.header,
        "columns": story.columns,
        "rows": story.rows,
        "program": seed.program,
    });
    Ok(answer.to_string())
}

fn find(text: &str, which: Option<&str>) -> Result<Seed, LabError> {
    if Seed::looks_like(text) {
        return Ok(text.parse()?);
    }
    let refuse =
        |why: &str| LabError::Usage(format!("explain: neither a seed (v1:...) nor a result with one: {why}"));
    let value: Value = serde_json::from_str(text).map_err(|error| refuse(&error.to_string()))?;
    if let Some(program) = value.get("program").filter(|_| value.get("schedule").is_some()) {
        return spelled_out(program, &value);
    }
    let mut seeds = Vec::new();
    collect(&value, which, which.is_none(), &mut seeds);
    match seeds.first() {
        Some(seed) => Ok(seed.parse()?),
        None => Err(refuse("nothing in it has failed")),
    }
}

/// `{"program", "schedule", "bug"}`.
fn spelled_out(program: &Value, value: &Value) -> Result<Seed, LabError> {
    let program = Program::parse(&program.to_string())?;
    let usage = |what: &str, error: &dyn std::fmt::Display| LabError::Usage(format!("{what}: {error}"));
    let schedule = value["schedule"].as_str().unwrap_or_default();
    let schedule = schedule.parse().map_err(|error| usage("explain", &error))?;
    let bug = match value.get("bug").and_then(Value::as_str) {
        None => None,
        Some(id) => {
            Some(Bug::parse(id).ok_or_else(|| usage("bug", &format!("{id:?}: the museum has no such bug")))?)
        }
    };
    Ok(Seed { program, bug, schedule })
}

/// Every seed in the value, in its order; under `which` alone, if one is named.
fn collect(value: &Value, which: Option<&str>, inside: bool, seeds: &mut Vec<String>) {
    match value {
        Value::Object(fields) => {
            let named = |key: &str| fields.get(key).and_then(Value::as_str);
            let here = inside || which.is_some() && (named("id") == which || named("protocol") == which);
            if let Some(seed) = named("seed").filter(|seed| here && Seed::looks_like(seed)) {
                seeds.push(seed.to_owned());
            }
            fields.values().for_each(|value| collect(value, which, here, seeds));
        }
        Value::Array(values) => values.iter().for_each(|value| collect(value, which, inside, seeds)),
        _ => {}
    }
}
