//! What the predictor may see of a recording.
//!
//! **Guarantee.** No SPTE value passes through here but bit 9 (host-writable) of the one that a fault installed, which is the host's answer and stands nowhere else. The types
//! make it so: [`Seen`] has no field for another. [`blank`] does the same to files, so that a test can compare predictions from an
//! original and from its blanked copy byte by byte.

use std::fs::File;
use std::io::{BufWriter, Read, Write};
use std::path::Path;

use flate2::Compression;
use flate2::read::MultiGzDecoder;
use flate2::write::GzEncoder;
use serde_json::Value;
use tdpmmu_trace::{Event, Head, Mark, Probe};

use super::ConformError;
use super::inputs::AccessKind;

/// Host-writable, as NPT keeps it in an SPTE.
const HOST_WRITABLE: u64 = 1 << 9;
const PFERR_PRESENT: u64 = 1;
const PFERR_WRITE: u64 = 1 << 1;
const PFERR_RSVD: u64 = 1 << 3;
const PFERR_FETCH: u64 = 1 << 4;

/// A line of the recording, without what KVM computed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Seen<'a> {
    /// Operation `number` begins.
    Begin(u64),
    /// Operation `number` ends.
    End(u64),
    /// Statistics were read after operation `number`.
    Stat(u64),
    /// A guest's fault.
    Fault { vcpu: Option<u32>, gfn: u64, access: AccessKind, present: bool, reserved: bool },
    /// A fault with mmu_lock held.
    Requested { gfn: u64, pfn: u64, level: u8 },
    /// A fault installed a leaf.
    Installed { host_writable: bool },
    /// A fault installed an MMIO entry.
    MmioMade,
    /// The host announces that a range goes.
    Unmap { start: u64, end: u64 },
    /// A notification begins.
    UnmapBegin,
    /// A notification ended.
    UnmapEnd,
    /// The host ages a range.
    Age { start: u64, end: u64 },
    /// A vCPU changes between address spaces.
    Smm { vcpu: u32, entering: bool },
    /// A walk begins.
    Walk { gfn: u64, min_level: u8 },
    /// A walk begins, or goes on after a yield.
    Restart { gfn: Option<u64> },
    /// Some entry changed (its level and gfn), or something else happened with mmu_lock held.
    Locked { entry: Option<(u8, u64)> },
    /// A vCPU loads a root, or drops obsolete ones.
    Roots,
    /// The recovery worker takes a table.
    NxZap,
    /// A worker begins an item.
    Work,
    /// The VM's memory goes.
    Release,
    /// Anything else; the name.
    Other(&'a [u8]),
}

/// Blanks one event.
pub fn see<'a>(head: &Head<'a>, event: &Event<'a>) -> Seen<'a> {
    match *event {
        Event::Mark(Mark::Begin { number, .. }) => Seen::Begin(number),
        Event::Mark(Mark::End { number, .. }) => Seen::End(number),
        Event::Mark(Mark::Stat { number, .. }) => Seen::Stat(number),
        Event::PageFault { vcpu, address, error_code, .. } => Seen::Fault {
            vcpu,
            gfn: address >> 12,
            access: AccessKind { write: error_code & PFERR_WRITE != 0, exec: error_code & PFERR_FETCH != 0 },
            present: error_code & PFERR_PRESENT != 0,
            reserved: error_code & PFERR_RSVD != 0,
        },
        Event::SpteRequested { gfn, pfn, level, .. } => Seen::Requested { gfn, pfn, level },
        Event::SetSpte { spte, .. } => Seen::Installed { host_writable: spte & HOST_WRITABLE != 0 },
        Event::MarkMmio { .. } => Seen::MmioMade,
        Event::UnmapHva { start, end } => Seen::Unmap { start, end },
        Event::AgeHva { start, end } => Seen::Age { start, end },
        Event::SmmTransition { vcpu, entering, .. } => Seen::Smm { vcpu, entering },
        Event::IterStart { gfn, min_level, .. } => Seen::Walk { gfn, min_level },
        Event::SpteChanged { level, gfn, .. } => Seen::Locked { entry: Some((level, gfn)) },
        Event::ZapSp { .. } => Seen::NxZap,
        Event::ZapAllFast { .. }
        | Event::ZapRootPass { .. }
        | Event::ZapLeafs { .. }
        | Event::SplitRoot { .. } => Seen::Locked { entry: None },
        Event::Probe(probe) => match probe {
            Probe::IterRestart => Seen::Restart { gfn: keyed_gfn(head.text) },
            Probe::InvStart => Seen::UnmapBegin,
            Probe::InvEnd => Seen::UnmapEnd,
            Probe::MmuLoad | Probe::FreeObsoleteRoots => Seen::Roots,
            Probe::MnRelease => Seen::Release,
            Probe::ZapRootWork => Seen::Work,
            Probe::InvalidateAllRoots
            | Probe::ZapInvalidatedRoots
            | Probe::TrySplit
            | Probe::WrprotSlot
            | Probe::ClearDirtySlot
            | Probe::ClearDirtyPtMasked
            | Probe::ZapCollapsible
            | Probe::RecoverHugePages => Seen::Locked { entry: None },
            _ => Seen::Other(head.event),
        },
        _ => Seen::Other(head.event),
    }
}

/// `gfn=0x...` in a probe's text.
fn keyed_gfn(text: &[u8]) -> Option<u64> {
    let text = std::str::from_utf8(text).ok()?;
    let value = text.split_ascii_whitespace().find_map(|word| word.strip_prefix("gfn="))?;
    u64::from_str_radix(value.strip_prefix("0x")?, 16).ok()
}

/// Events that only tell what KVM did; their lines stay, without their texts.
const OUTCOMES: &[&str] = &[
    "fast_page_fault",
    "hcs",
    "kvm_mmu_get_page",
    "kvm_mmu_prepare_zap_page",
    "kvm_mmu_split_huge_page",
    "init_sp",
    "link_sp",
    "free_sp",
    "put_root",
    "schedule_zap_root",
    "zap_root",
    "check_mmio_spte",
    "handle_mmio_page_fault",
    "get_vcpu_root_hpa_ret",
    "alloc_root_ret",
    "kvm_dirty_ring_push",
    "kvm_dirty_ring_reset",
];

/// Writes a copy of the recording in `dir` to `out` (a new or empty folder) with everything blanked that the predictor must not need.
///
/// # Errors
/// [`ConformError::Io`]; [`ConformError::Malformed`] for a script that is no JSON.
pub fn blank(dir: &Path, out: &Path) -> Result<(), ConformError> {
    std::fs::create_dir_all(out).map_err(|source| ConformError::Io { path: out.to_path_buf(), source })?;
    let io = |path: &Path| {
        let path = path.to_path_buf();
        move |source| ConformError::Io { path: path.clone(), source }
    };
    let from = dir.join("params.txt");
    std::fs::copy(&from, out.join("params.txt")).map_err(io(&from))?;
    blank_script(&dir.join("script.json"), &out.join("script.json"))?;

    let (from, to) = (super::load::trace_of(dir), out.join("trace.txt.gz"));
    let mut text = Vec::new();
    let mut file = File::open(&from).map_err(io(&from))?;
    let mut head = [0u8; 2];
    let n = file.read(&mut head).map_err(io(&from))?;
    let whole = std::io::Cursor::new(head[..n].to_vec()).chain(file);
    if head == [0x1f, 0x8b] {
        MultiGzDecoder::new(whole).read_to_end(&mut text).map_err(io(&from))?;
    } else {
        let mut whole = whole;
        whole.read_to_end(&mut text).map_err(io(&from))?;
    }
    let file = File::create(&to).map_err(io(&to))?;
    let mut gz = GzEncoder::new(BufWriter::new(file), Compression::fast());
    for line in text.split_inclusive(|&b| b == b'\n') {
        gz.write_all(&blank_line(line)).map_err(io(&to))?;
    }
    gz.finish().and_then(|mut file| file.flush()).map_err(io(&to))
}

fn blank_script(from: &Path, to: &Path) -> Result<(), ConformError> {
    let io = |path: &Path, source| ConformError::Io { path: path.to_path_buf(), source };
    let text = std::fs::read_to_string(from).map_err(|e| io(from, e))?;
    let mut script: Value = serde_json::from_str(&text).map_err(|e| ConformError::Malformed {
        path: from.to_path_buf(),
        line: e.line() as u64,
        rule: "script.json must be JSON",
        got: e.to_string(),
    })?;
    for op in script.get_mut("ops").and_then(Value::as_array_mut).into_iter().flatten() {
        if let Some(result) = op.get_mut("result").and_then(Value::as_object_mut) {
            result.retain(|key, _| key == "errno");
        }
        if let Some(stat) = op.get_mut("stat") {
            *stat = Value::Null;
        }
        if let Some(params) = op.get_mut("params").and_then(Value::as_object_mut) {
            for (key, value) in params.iter_mut() {
                if key.starts_with("pages_") {
                    *value = Value::from(0);
                }
            }
        }
    }
    std::fs::write(to, script.to_string()).map_err(|e| io(to, e))
}

/// One line, with its end.
fn blank_line(line: &[u8]) -> Vec<u8> {
    let Ok(text) = std::str::from_utf8(line) else { return line.to_vec() };
    if text.trim_start().starts_with('#') {
        return line.to_vec();
    }
    // `... 5.161735: event: text`: the stamp's colon, then the event's.
    let Some(stamp) = text.find(": ") else { return line.to_vec() };
    let rest = &text[stamp + 2..];
    let Some((event, body)) = rest.split_once(": ") else { return line.to_vec() };
    let head = &text[..stamp + 2];
    let rewritten = match event {
        "kvm_tdp_mmu_spte_changed" => {
            body.find(" old_spte ").map(|at| format!("{event}: {} old_spte 0 new_spte 0", &body[..at]))
        }
        "kvm_mmu_set_spte" => {
            let spte = body.split_ascii_whitespace().skip_while(|word| *word != "spte").nth(1);
            let spte = spte.and_then(|hex| u64::from_str_radix(hex, 16).ok()).unwrap_or(0);
            Some(format!("{event}: gfn 0 spte {:x} (----) level 1 at 0", spte & HOST_WRITABLE))
        }
        "mark_mmio_spte" => Some(format!("{event}: sptep:0 gfn 0 access 0 gen 0")),
        "kvm_mmu_zap_all_fast" => Some(format!("{event}: kvm-mmu-valid-gen 0 used_pages 0")),
        "tracing_mark_write" if body.starts_with("STAT ") => {
            let number = body.split_ascii_whitespace().nth(1).unwrap_or("0");
            Some(format!("{event}: STAT {number} {{}}"))
        }
        "tracing_mark_write" if body.starts_with("OP ") => {
            // The parameters and results are read from script.json.
            let head: Vec<&str> = body.split_ascii_whitespace().take(4).collect();
            Some(format!("{event}: {} {{}}", head.join(" ")))
        }
        "iter_start" | "zap_leafs" | "zap_root_pass" | "split_root" | "zap_sp" => {
            Some(zero_keys(event, body))
        }
        _ if OUTCOMES.contains(&event) => Some("blanked: ".to_owned()),
        _ => None,
    };
    match rewritten {
        Some(body) => format!("{head}{body}\n").into_bytes(),
        None => line.to_vec(),
    }
}

/// Zeroes what names or counts KVM's own objects.
fn zero_keys(event: &str, body: &str) -> String {
    let words = body.trim_end().split(' ').map(|word| match word.split_once('=') {
        Some((key @ ("root" | "spt" | "sp" | "role"), _)) => format!("{key}=0x0"),
        Some(("refs", _)) => "refs=0".to_owned(),
        _ => word.to_owned(),
    });
    format!("{event}: {}", words.collect::<Vec<_>>().join(" "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn blanked(line: &str) -> String {
        String::from_utf8(blank_line(format!("   t-1  [000] .....     5.161735: {line}\n").as_bytes()))
            .expect("text in, text out")
            .trim_start()
            .trim_start_matches("t-1  [000] .....     5.161735: ")
            .trim_end()
            .to_owned()
    }

    #[test]
    fn values_go_and_places_stay() {
        assert_eq!(
            blanked("kvm_tdp_mmu_spte_changed: as id 0 gfn 2 level 1 old_spte 0 new_spte 103d21e67"),
            "kvm_tdp_mmu_spte_changed: as id 0 gfn 2 level 1 old_spte 0 new_spte 0"
        );
        assert_eq!(
            blanked("kvm_mmu_set_spte: gfn 2 spte 103d21e67 (rwxu) level 1 at 1042b5010"),
            "kvm_mmu_set_spte: gfn 0 spte 200 (----) level 1 at 0"
        );
        assert_eq!(blanked("STAT"), "STAT");
        assert_eq!(blanked("tracing_mark_write: STAT 3 {\"pages_4k\":4}"), "tracing_mark_write: STAT 3 {}");
        assert_eq!(blanked("hcs: (f+0x0/0x1) as=0 gfn=0x0 level=4 shared=1"), "blanked:");
        assert_eq!(
            blanked(
                "iter_start: (f+0x0/0x50 [kvm]) root=0xffff spt=0x12 role=0x3784 refs=2 min_level=1 gfn=0x2"
            ),
            "iter_start: (f+0x0/0x50 [kvm]) root=0x0 spt=0x0 role=0x0 refs=0 min_level=1 gfn=0x2"
        );
        let kept = "kvm_mmu_spte_requested: gfn 2 pfn 103d21 level 1";
        assert_eq!(blanked(kept), kept);
    }
}
