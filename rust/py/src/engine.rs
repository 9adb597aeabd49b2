//! What the bindings call below: the one place that names the crates of the house.
//!
//! Everything crosses as JSON text or plain values, so that nothing here depends on the layout of a result.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tdpmmu_lab::LabError;
use tdpmmu_lab::conform::{self, ConformError, ConformOptions};
use tdpmmu_lab::what_if::{WhatIfOptions, what_if};
use tdpmmu_shadow::{ReclaimKind, SHADOW_DESIGNS};
use tdpmmu_spte::{KernelProfile, Passes};
use tdpmmu_trace::{Input, ReplayError, ReplayOptions, TraceError};

use crate::error::Fault;
use crate::job::Control;

/// What `replay` was asked.
pub struct ReplayRequest {
    pub path: PathBuf,
    pub profile: Option<String>,
    pub check: bool,
    pub strict: bool,
    pub vm_of: Option<u32>,
    /// The design to run the recorded zaps through.
    pub what_if: Option<String>,
    /// Where the Perfetto trace goes.
    pub perfetto: Option<PathBuf>,
}

fn build() -> Value {
    json!({
        "version": env!("CARGO_PKG_VERSION"),
        "profile": env!("TDPMMU_PROFILE"),
        "git": env!("TDPMMU_GIT"),
        "target": env!("TDPMMU_TARGET"),
        "debug_assertions": cfg!(debug_assertions),
    })
}

pub fn build_info() -> String {
    build().to_string()
}

pub fn info() -> Result<String, Fault> {
    Ok(tdpmmu_lab::bench::info(&build()))
}

pub fn catalogue() -> String {
    let design = |info: &tdpmmu_mmu::DesignInfo| {
        json!({
            "name": info.name,
            "mainline": info.mainline,
            "summary": info.summary,
            "passes": info.passes.map(|passes| passes.to_string()),
            "ownership": info.ownership.to_string(),
            "flawed": info.flawed,
            "mmu": "tdp",
        })
    };
    // The shadow MMU has neither passes nor a first reference that somebody could own.
    let shadow = |info: &tdpmmu_shadow::ShadowDesignInfo| {
        json!({
            "name": info.name,
            "mainline": info.mainline,
            "summary": info.summary,
            "passes": null,
            "ownership": null,
            "flawed": false,
            "mmu": "shadow",
        })
    };
    let reclaim = |kind: &ReclaimKind| json!({ "name": kind.name(), "summary": kind.summary() });
    let scene = |scene: &tdpmmu_lab::scene::Scene| {
        json!({
            "name": scene.name,
            "experiment": scene.kind.name(),
            "summary": scene.summary,
            "look_at": scene.look_at,
        })
    };
    json!({
        "scene_info": tdpmmu_lab::scene::SCENES.iter().map(scene).collect::<Vec<_>>(),
        "design_info": tdpmmu_mmu::DESIGNS.iter().map(design).chain(SHADOW_DESIGNS.iter().map(shadow)).collect::<Vec<_>>(),
        "designs": tdpmmu_mmu::DESIGNS.iter().map(|d| d.name).chain(shadow_names()).collect::<Vec<_>>(),
        "shadow_designs": shadow_names().collect::<Vec<_>>(),
        "reclaim_info": ReclaimKind::ALL.iter().map(reclaim).collect::<Vec<_>>(),
        "sound_designs": tdpmmu_mmu::DESIGNS.iter().filter(|d| !d.flawed).map(|d| d.name).collect::<Vec<_>>(),
        "profiles": KernelProfile::NAMES,
        "profile_designs": KernelProfile::ALL.iter().map(|profile| profile.design).collect::<Vec<_>>(),
        "switches": KernelProfile::SWITCHES,
        "experiments": ["zap", "drop", "populate", "fault", "walk", "rcu"],
    })
    .to_string()
}

fn shadow_names() -> impl Iterator<Item = &'static str> {
    SHADOW_DESIGNS.iter().map(|info| info.name)
}

/// The profile as it prints itself: its name, then the switches that differ.
pub fn profile(text: &str) -> Result<String, Fault> {
    KernelProfile::named(text).map(|p| p.to_string()).map_err(|e| Fault::Invalid(e.to_string()))
}

pub fn passes(text: &str) -> Result<String, Fault> {
    Passes::parse(text).map(|p| p.to_string()).map_err(|e| Fault::Invalid(e.to_string()))
}

/// The result as JSON text.
pub fn bench(kind: &str, config: &str, control: &Control) -> Result<String, Fault> {
    tdpmmu_lab::bench::run(kind, config, &build(), &watched(control)).map_err(lab_fault)
}

/// A search, a demonstration, a story or a simulation, as JSON text.
pub fn prove(kind: &str, config: &str, control: &Control) -> Result<String, Fault> {
    tdpmmu_lab::proof::run(kind, config, &watched(control)).map_err(lab_fault)
}

/// The job's control as the lab knows it.
fn watched(control: &Control) -> tdpmmu_lab::Control {
    let told = control.clone();
    tdpmmu_lab::Control::new(control.cancel_flag(), move |phase, fraction| told.report(phase, fraction))
}

fn lab_fault(error: LabError) -> Fault {
    match error {
        LabError::Usage(message) => Fault::Invalid(message),
        LabError::Memory { needed_bytes, available_bytes, message } => {
            Fault::Memory { message, needed_bytes, available_bytes }
        }
        LabError::Check { message, partial } => Fault::Violation { message, partial },
        LabError::Cancelled => Fault::Cancelled,
        LabError::Internal(message) => Fault::Internal(message),
    }
}

/// Recordings held against the engine; the report as JSON text.
pub fn conform(paths: &[PathBuf], profile: Option<String>, control: &Control) -> Result<String, Fault> {
    let options = ConformOptions { profile, control: watched(control) };
    let report = conform::conform(paths, &options).map_err(conform_fault)?;
    serde_json::to_string(&report).map_err(|e| Fault::Internal(e.to_string()))
}

/// What the engine does for one recording's operations, as JSON text.
pub fn predict(path: &Path, profile: Option<String>, control: &Control) -> Result<String, Fault> {
    let options = ConformOptions { profile, control: watched(control) };
    let prediction = conform::predict(path, &options).map_err(conform_fault)?;
    serde_json::to_string(&prediction).map_err(|e| Fault::Internal(e.to_string()))
}

/// A copy of a recording without what the predictor must not need.
pub fn blank(path: &Path, out: &Path) -> Result<(), Fault> {
    conform::blank(path, out).map_err(conform_fault)
}

fn conform_fault(error: ConformError) -> Fault {
    let message = error.to_string();
    match error {
        ConformError::Usage(message) => Fault::Invalid(message),
        ConformError::Cancelled => Fault::Cancelled,
        ConformError::Io { path, source } => Fault::Os { error: source, path: path.display().to_string() },
        ConformError::Trace(trace) => unreadable(ReplayError::Trace(trace), Path::new("")),
        ConformError::NoScript { path, .. } => trace_fault(message, &path, 0),
        ConformError::Malformed { path, line, .. } => trace_fault(message, &path, line),
        ConformError::Engine { .. } => Fault::Internal(message),
    }
}

fn trace_fault(message: String, path: &Path, line: u64) -> Fault {
    let path = path.display().to_string();
    Fault::Trace { message, path, line, offset: 0, column: None, text: String::new() }
}

/// In what the kernels differ: every switch with its text and source, and its value in every profile.
pub fn policies() -> String {
    let profiles: Vec<KernelProfile> =
        KernelProfile::NAMES.iter().filter_map(|name| KernelProfile::named(name).ok()).collect();
    let values: Vec<_> = profiles.iter().map(KernelProfile::switches).collect();
    let row = |(n, (switch, text)): (usize, &(&str, &str))| {
        let by_name: serde_json::Map<String, Value> = profiles
            .iter()
            .zip(&values)
            .map(|(profile, values)| (profile.name.to_owned(), json!(values[n].1)))
            .collect();
        json!({ "switch": switch, "text": text.trim(), "values": by_name })
    };
    json!({
        "schema": "tdpmmu.profiles/1",
        "profiles": KernelProfile::NAMES,
        "switches": KernelProfile::EXPLAINED.iter().enumerate().map(row).collect::<Vec<_>>(),
    })
    .to_string()
}

/// The report as JSON text.
pub fn replay(request: &ReplayRequest, control: &Control) -> Result<String, Fault> {
    let profile = request.profile.as_deref().map(KernelProfile::named).transpose();
    let profile = profile.map_err(|e| Fault::Invalid(e.to_string()))?;
    let stdin = request.path.as_os_str() == "-";
    // Compressed input is longer than its file: the fraction is then only known to be unknown.
    let size = if stdin { None } else { std::fs::metadata(&request.path).ok().map(|m| m.len()) };
    let told = |bytes: u64| {
        let part = size.map_or(f64::NAN, |size| bytes as f64 / size.max(1) as f64);
        control.report(
            &format!("replay: {} MiB of text", bytes >> 20),
            if part > 1.0 { f64::NAN } else { part },
        );
        !control.cancelled()
    };
    let options = ReplayOptions {
        profile,
        check: request.check,
        strict: request.strict,
        vm_of: request.vm_of,
        record: request.perfetto.is_some(),
        shapes: request.what_if.is_some(),
        progress: Some(&told),
    };
    let input = if stdin { Input::Stdin } else { Input::File(request.path.clone()) };
    let mut report =
        tdpmmu_trace::replay(input, &options).map_err(|error| unreadable(error, &request.path))?;
    if let Some(design) = &request.what_if {
        let options = WhatIfOptions { profile: request.profile.clone(), ..WhatIfOptions::new(design) };
        let found = what_if(&report, &options, &watched(control)).map_err(lab_fault)?;
        report.what_if = Some(serde_json::to_value(found).map_err(|e| Fault::Internal(e.to_string()))?);
    }
    if let Some(path) = &request.perfetto {
        let wrong = |error| Fault::Os { error, path: path.display().to_string() };
        let mut file = std::io::BufWriter::new(std::fs::File::create(path).map_err(wrong)?);
        tdpmmu_trace::perfetto_of(&report, &mut file).map_err(wrong)?;
        file.into_inner().map_err(|e| wrong(e.into_error()))?.sync_all().map_err(wrong)?;
    }
    serde_json::to_string(&report).map_err(|e| Fault::Internal(e.to_string()))
}

fn unreadable(error: ReplayError, path: &Path) -> Fault {
    let message = error.to_string();
    match error {
        ReplayError::Trace(TraceError::Io { path, source }) => {
            Fault::Os { error: source, path: path.display().to_string() }
        }
        ReplayError::Trace(trace) => {
            let path = path.display().to_string();
            let (line, offset, column, text) = match trace {
                TraceError::Malformed { line, offset, column, text, .. } => {
                    (line, offset, column.map(|c| c + 1), text)
                }
                TraceError::Gzip { line, offset, .. } => (line, offset, None, String::new()),
                TraceError::Dat { offset, .. } => (0, offset, None, String::new()),
                TraceError::TooManyBadLines { first, .. } => (first, 0, None, String::new()),
                _ => (0, 0, None, String::new()),
            };
            Fault::Trace { message, path, line, offset, column, text }
        }
        ReplayError::Cancelled { .. } => Fault::Cancelled,
        _ => Fault::Invalid(message),
    }
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
