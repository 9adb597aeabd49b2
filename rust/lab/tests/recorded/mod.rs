//! Recordings for the tests of conformance: those of real KVM, and small ones written by hand.
#![allow(dead_code)] // each test binary uses its own part

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use tdpmmu_lab::conform::{CaseReport, Conform, ConformError, ConformOptions, conform};

/// A recording of the repository.
pub fn shipped(case: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/data").join(case)
}

/// Every recording with a script below `dir`, kernel by kernel.
pub fn with_scripts(dir: &Path) -> Vec<PathBuf> {
    let kernels = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let cases = kernels.filter_map(|kernel| std::fs::read_dir(kernel.path()).ok()).flatten().flatten();
    let mut found: Vec<PathBuf> =
        cases.map(|case| case.path()).filter(|case| case.join("script.json").is_file()).collect();
    found.sort();
    found
}

/// A folder for a test's own files; `name` is unique among tests.
pub fn folder(name: &str) -> PathBuf {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("conform").join(name);
    let _ = std::fs::remove_dir_all(&dir);
    std::fs::create_dir_all(&dir).expect("the folder for test files can be made");
    dir
}

/// Runs one recording.
pub fn run(dir: &Path, profile: Option<&str>) -> Result<CaseReport, ConformError> {
    let options = ConformOptions { profile: profile.map(str::to_owned), ..ConformOptions::default() };
    conform(&[dir.to_path_buf()], &options).map(|Conform { mut cases, .. }| cases.remove(0))
}

/// A recording being written: the lines of a trace and the operations of its script.
#[derive(Default)]
pub struct Tape {
    trace: String,
    ops: Vec<String>,
    line: u64,
}

impl Tape {
    /// A line of `thread`, as ftrace prints it.
    pub fn line(&mut self, thread: &str, event: &str, text: &str) -> &mut Self {
        self.line += 1;
        let at = self.line;
        let _ = writeln!(self.trace, "    {thread:>16}     [000] .....     5.{at:06}: {event}: {text}");
        self
    }

    /// Operation `number` begins; it succeeds.
    pub fn begin(&mut self, thread: &str, number: u64, kind: &str, params: &str) -> &mut Self {
        let t0 = 5_000_000_000 + (self.line + 1) * 1000;
        self.ops.push(format!(
            r#"{{"op":{number},"kind":"{kind}","t0_ns":{t0},"t1_ns":{t0},"params":{{{params}}},"result":{{"errno":0}},"stat":null}}"#
        ));
        self.line(thread, "tracing_mark_write", &format!("OP {number} begin {kind} {{{params}}}"))
    }

    /// Operation `number` ends.
    pub fn end(&mut self, thread: &str, number: u64, kind: &str) -> &mut Self {
        self.line(thread, "tracing_mark_write", &format!("OP {number} end {kind} {{}}"))
    }

    /// An operation without events.
    pub fn op(&mut self, thread: &str, number: u64, kind: &str, params: &str) -> &mut Self {
        self.begin(thread, number, kind, params).end(thread, number, kind)
    }

    /// A guest's fault that maps `gfn` to `pfn`: up to `set_spte`, with `changes` in between.
    pub fn fault(&mut self, thread: &str, gfn: u64, error: u64, pfn: u64, changes: &[&str]) -> &mut Self {
        let address = gfn << 12;
        self.line(
            thread,
            "kvm_page_fault",
            &format!("vcpu 0 rip 0x1000 address 0x{address:016x} error_code 0x{error:x}"),
        );
        self.line(thread, "kvm_mmu_spte_requested", &format!("gfn {gfn:x} pfn {pfn:x} level 1"));
        for change in changes {
            self.changed(thread, change);
        }
        self.line(
            thread,
            "kvm_mmu_set_spte",
            &format!("gfn {gfn:x} spte {pfn:x}e67 (rwxu) level 1 at 1042b5010"),
        )
    }

    /// `as gfn level old new`, in hex but for the level.
    pub fn changed(&mut self, thread: &str, change: &str) -> &mut Self {
        let w: Vec<&str> = change.split(' ').collect();
        let text = format!("as id {} gfn {} level {} old_spte {} new_spte {}", w[0], w[1], w[2], w[3], w[4]);
        self.line(thread, "kvm_tdp_mmu_spte_changed", &text)
    }

    /// Writes the recording below `dir`, as one of `kernel`.
    pub fn write(&self, dir: &Path, kernel: &str) -> PathBuf {
        let dir = dir.join(kernel).join("case");
        std::fs::create_dir_all(&dir).expect("the folder can be made");
        let script = format!("{{\"scenario\":\"case\",\"ops\":[\n{}\n]}}", self.ops.join(",\n"));
        for (name, text) in
            [("script.json", &script), ("trace.txt", &self.trace), ("params.txt", &String::new())]
        {
            std::fs::write(dir.join(name), text).expect("the file can be written");
        }
        dir
    }
}

/// Parameters of a memslot.
pub fn memslot(as_id: u8, slot: u16, gfn: u64, pages: u64, flags: u64, hva: u64) -> String {
    let (gpa, size) = (gfn << 12, pages << 12);
    format!(
        r#""vm":1,"as":{as_id},"slot":{slot},"gpa":"0x{gpa:x}","gfn":"0x{gfn:x}","size":{size},"flags":{flags},"backing":"anon4k","hva":"0x{hva:x}""#
    )
}

/// A VM with one vCPU and one slot of 16 pages at gfn 0x1000, whose first page is mapped by a write (values of 6.1). Its touch, operation 3, is open.
pub fn small_vm() -> Tape {
    small_vm_with(&[])
}

/// [`small_vm`] with more memslots, made by operations 20 and up.
pub fn small_vm_with(slots: &[&str]) -> Tape {
    let mut tape = Tape::default();
    tape.op("main-100", 1, "create_vm", r#""vm":1,"nvcpus":1,"dirty_ring_bytes":0"#).op(
        "main-100",
        2,
        "set_memslot",
        &memslot(0, 1, 0x1000, 16, 0, 0x7f00_0000_0000),
    );
    for (number, slot) in (20..).zip(slots) {
        tape.op("main-100", number, "set_memslot", slot);
    }
    tape.begin("vcpu-101", 3, "touch", r#""vm":1,"vcpu":0,"slot":1,"mode":"write""#).fault(
        "vcpu-101",
        0x1000,
        0x1_0000_0006,
        0x5000,
        &["0 0 4 0 900827", "0 0 3 0 901827", "0 1000 2 0 902827", "0 1000 1 0 5000e67"],
    );
    tape
}

/// A line's thread, event and text.
fn parts(line: &str) -> Option<(&str, &str, &str)> {
    let (head, rest) = line.split_once(": ")?;
    let (event, text) = rest.split_once(": ")?;
    Some((head.split(" [").next()?.trim(), event, text))
}

/// A level-1 change of a present leaf that is not torn down: its gfn.
fn walked(event: &str, text: &str) -> Option<u64> {
    let w: Vec<&str> = text.split(' ').collect();
    let hex = |at: usize| u64::from_str_radix(w.get(at)?, 16).ok();
    let frozen = [0x5a0, 0x8000_0000_0000_05a0, 0x8000_0000_0000_01a0];
    let present = event == "kvm_tdp_mmu_spte_changed" && w.get(6) == Some(&"1") && hex(8)? & 0x800 != 0;
    (present && !frozen.contains(&hex(10)?)).then(|| hex(4)).flatten()
}

/// Copies a recording and lets its walks give mmu_lock up at places drawn from `seed`, as the kernel would print it; `places`: with the gfn. Returns the copy and the number of yields.
pub fn with_yields(case: &str, name: &str, seed: u64, places: bool) -> (PathBuf, u64) {
    use std::io::Read;
    let (from, to) = (shipped(case), folder(name).join(case));
    std::fs::create_dir_all(&to).expect("the folder can be made");
    for file in ["script.json", "params.txt"] {
        let text = std::fs::read(from.join(file)).expect("the recording is there");
        std::fs::write(to.join(file), text).expect("the copy can be written");
    }
    let mut text = String::new();
    let file = std::fs::File::open(from.join("trace.txt.gz")).expect("the recording is there");
    flate2::read::MultiGzDecoder::new(file).read_to_string(&mut text).expect("gzip text");
    let lines: Vec<&str> =
        text.lines().filter(|line| parts(line).is_none_or(|(_, event, _)| event != "hcs")).collect();
    let (mut out, mut yields, mut dice, mut op) = (String::new(), 0, seed, String::new());
    for (at, line) in lines.iter().enumerate() {
        let _ = writeln!(out, "{line}");
        let Some((thread, event, text)) = parts(line) else { continue };
        let head = &line[..line.find(": ").expect("a head")];
        if let Some(begun) = text.strip_prefix("OP ").filter(|text| text.contains(" begin ")) {
            op = begun.split(' ').nth(2).unwrap_or("").to_owned();
        }
        if event == "iter_start" {
            let _ = writeln!(out, "{head}: iter_restart: (tdp_iter_restart+0x0/0x80 [kvm])");
            continue;
        }
        let next = lines.get(at + 1).and_then(|line| parts(line)).filter(|next| next.0 == thread);
        let (Some(here), Some(there)) = (walked(event, text), next.and_then(|next| walked(next.1, next.2)))
        else {
            continue;
        };
        // Walks that may yield; those of CLEAR and GET may not.
        if here >= there
            || matches!(op.as_str(), "get_dirty_log" | "clear_dirty_log" | "touch" | "reset_dirty_rings")
        {
            continue;
        }
        dice = dice.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        if dice >> 33 & 31 == 0 {
            yields += 1;
            let place = if places { format!(" gfn=0x{there:x}") } else { String::new() };
            let _ = writeln!(out, "{head}: iter_restart: (tdp_iter_restart+0x0/0x80 [kvm]){place}");
        }
    }
    std::fs::write(to.join("trace.txt"), out).expect("the copy can be written");
    (to, yields)
}
