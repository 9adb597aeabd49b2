//! A recording becomes a list of inputs, and, apart from it, what KVM was recorded to do.
//!
//! **Guarantee.** The inputs are made from [`Seen`] lines alone, which carry no SPTE value; the comparator's half ([`Recorded`]) reads the same lines and is never shown to the
//! driver. Every input stands at the line at which it takes effect.
//!
//! **Mechanism.** One pass, one small state per thread: the operation that is open in it, a fault whose end is not known yet, a notification that was announced and has not
//! taken mmu_lock yet.
//!
//! | input | stands at |
//! | --- | --- |
//! | fault, lockless part | `kvm_page_fault` |
//! | fault, mapping part | `kvm_mmu_spte_requested`, which is printed with mmu_lock held |
//! | notification | the first thing that its thread does after the announcement |
//! | operation | the first thing that its thread does under the lock, else its end |
//! | guest entry | `mmu_load`, `free_obsolete_roots`, else the thread's first line after the operation began |
//! | yield | counted in entries that the thread had changed; goes on at `iter_restart` |

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use tdpmmu_trace::{Input as Source, Item, TraceReader};

use super::ConformError;
use super::blank::{Seen, see};
use super::inputs::{AccessKind, Input, Landed, NO_OP, What};
use super::order::{Place, interleave};
use super::recorded::Recorded;
use super::script::{Params, Script};

/// A recording, read.
pub struct Case {
    /// The folder's name.
    pub name: String,
    /// The name of the folder above: the kernel.
    pub kernel: String,
    /// The script.
    pub script: Script,
    /// Module parameters at the start.
    pub params: Params,
    /// Names of threads, `comm-pid`.
    pub threads: Vec<String>,
    /// What the engine is told, by line.
    pub inputs: Vec<Input>,
    /// Faults are recorded as such, with their frames. Without, frames are invented and compared up to a renaming.
    pub has_faults: bool,
    /// Guest entries are recorded as such.
    pub has_entries: bool,
    /// What KVM did; the comparator's.
    pub recorded: Recorded,
    /// Operations that cannot be carried out, and why.
    pub skipped: Vec<(u32, String)>,
    /// Numbers of operations that the trace has and the script has not.
    pub strangers: Vec<u64>,
}

/// The trace of the recording in `dir`.
pub fn trace_of(dir: &Path) -> PathBuf {
    let packed = dir.join("trace.txt.gz");
    if packed.exists() || !dir.join("trace.txt").exists() { packed } else { dir.join("trace.txt") }
}

/// What is known of one thread.
#[derive(Default)]
struct Thread {
    /// Operations open in it, outermost first.
    ops: Vec<u32>,
    /// The operation has not taken effect yet.
    waiting: bool,
    /// It runs a vCPU: no line of it was seen since it began to.
    enters: bool,
    /// A guest's fault that has not ended.
    fault: Option<Fault>,
    /// Index of the input of a fault in its mapping part.
    mapping: Option<usize>,
    /// Announced, and not known to have begun: index of its input.
    notice: Option<usize>,
    /// Invalidations that it is inside of.
    notified: u32,
    /// A walk was begun and its own restart is still to be printed.
    begun: bool,
    /// Entries changed since the last input that was no restart.
    changed: u32,
}

#[derive(Clone, Copy)]
struct Fault {
    vcpu: Option<u32>,
    access: AccessKind,
}

struct Loader {
    script: Script,
    ids: HashMap<u32, u32>,
    /// Operations of the trace that the script does not know.
    strangers: Vec<u64>,
    /// Operations without an end.
    unended: Vec<u32>,
    names: Vec<String>,
    threads: Vec<Thread>,
    inputs: Vec<Input>,
    has_faults: bool,
    has_entries: bool,
    begun: Vec<bool>,
    /// Where entries changed, without what they held.
    changes: Vec<Place>,
}

/// Reads the recording in `dir`. `cancelled` is asked now and then.
///
/// # Errors
/// [`ConformError::NoScript`], [`ConformError::Malformed`], [`ConformError::Trace`], [`ConformError::Cancelled`].
pub fn load(dir: &Path, cancelled: &dyn Fn() -> bool) -> Result<Case, ConformError> {
    let script = Script::read(dir)?;
    let params = Params::read(dir)?;
    let whole = dir.canonicalize().map_err(|source| ConformError::Io { path: dir.to_path_buf(), source })?;
    let part = |path: Option<&Path>| {
        path.and_then(Path::file_name).map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
    };
    let mut loader = Loader::new(script);
    let mut recorded = Recorded::default();
    let mut reader = TraceReader::open(Source::File(trace_of(dir)), true)?;
    let mut lines = 0u64;
    while let Some(item) = reader.next()? {
        let Item::Record(head, event) = item else {
            recorded.lost += 1;
            continue;
        };
        lines += 1;
        if lines.is_multiple_of(1 << 16) && cancelled() {
            return Err(ConformError::Cancelled);
        }
        let thread = loader.thread(head.pid, head.comm);
        let seen = see(&head, &event);
        loader.take(thread, head.line, &seen);
        recorded.take(thread, loader.op_of(thread), &head, &event);
    }
    reader.finish()?;
    if loader.inputs.is_empty() || loader.script.operations.is_empty() {
        return Err(ConformError::Malformed {
            path: dir.join("script.json"),
            line: 0,
            rule: "a recording has operations, and its trace their marks",
            got: format!("{} operations, {} inputs", loader.script.operations.len(), loader.inputs.len()),
        });
    }
    recorded.close();
    let skipped = loader.never_began();
    let (has_faults, has_entries) = (loader.has_faults, loader.has_entries);
    if has_faults {
        loader.inputs.retain(|input| !matches!(input.what, What::Walk { .. }));
    }
    loader.inputs.retain(|input| input.what != What::Nothing);
    interleave(&loader.script, &mut loader.inputs, &loader.changes, loader.names.len(), has_entries);
    Ok(Case {
        name: part(Some(&whole)),
        kernel: part(whole.parent()),
        params,
        threads: loader.names,
        inputs: loader.inputs,
        script: loader.script,
        has_faults,
        has_entries,
        recorded,
        skipped,
        strangers: loader.strangers,
    })
}

impl Loader {
    fn new(script: Script) -> Self {
        let begun = vec![false; script.operations.len()];
        Self {
            script,
            ids: HashMap::new(),
            strangers: Vec::new(),
            unended: Vec::new(),
            names: Vec::new(),
            threads: Vec::new(),
            inputs: Vec::new(),
            has_faults: false,
            has_entries: false,
            begun,
            changes: Vec::new(),
        }
    }

    fn thread(&mut self, pid: u32, comm: &[u8]) -> u32 {
        // By its number: a thread may rename itself.
        if let Some(&id) = self.ids.get(&pid) {
            return id;
        }
        let id = self.threads.len() as u32;
        self.ids.insert(pid, id);
        self.names.push(format!("{}-{pid}", String::from_utf8_lossy(comm)));
        self.threads.push(Thread::default());
        id
    }

    fn op_of(&self, thread: u32) -> u32 {
        self.threads[thread as usize].ops.last().copied().unwrap_or(NO_OP)
    }

    fn kind(&self, op: u32) -> &str {
        self.script.operations.get(op as usize).map_or("", |op| &op.kind)
    }

    fn never_began(&self) -> Vec<(u32, String)> {
        let missing = self.begun.iter().enumerate().filter(|(_, begun)| !**begun);
        // One that was open when the recording stopped may have done its part; one that waits has not.
        let open = self.threads.iter().filter(|thread| thread.waiting).filter_map(|thread| thread.ops.last());
        let open = self.unended.iter().chain(open);
        missing
            .map(|(at, _)| (at as u32, "the trace has no begin of it".to_owned()))
            .chain(open.map(|&op| (op, "the trace has no end of it".to_owned())))
            .collect()
    }

    fn push(&mut self, thread: u32, line: u64, what: What) -> usize {
        let op = self.op_of(thread);
        if !matches!(what, What::Restart { .. }) {
            self.threads[thread as usize].changed = 0;
        }
        self.inputs.push(Input { line, thread, op, what });
        self.inputs.len() - 1
    }

    fn take(&mut self, thread: u32, line: u64, seen: &Seen<'_>) {
        let t = thread as usize;
        self.before(thread, line, seen);
        match *seen {
            Seen::Begin(number) => self.begin(thread, line, number),
            Seen::End(number) => self.end(thread, line, number),
            Seen::Stat(number) => {
                if let Some(op) = self.script.index(number) {
                    self.threads[t].changed = 0;
                    self.inputs.push(Input { line, thread, op, what: What::Stat });
                }
            }
            Seen::Fault { vcpu, gfn, access, present, reserved } => {
                self.has_faults = true;
                self.threads[t].mapping = None;
                self.threads[t].fault = Some(Fault { vcpu, access });
                let vcpu = vcpu.or_else(|| self.vcpu_of(thread)).unwrap_or(0);
                self.push(thread, line, What::Fault { vcpu, gfn, access, present: present && !reserved });
            }
            Seen::Requested { gfn, pfn, level } => {
                self.has_faults = true;
                let fault = self.threads[t].fault.take();
                let what = What::Map {
                    vcpu: fault.and_then(|fault| fault.vcpu),
                    gfn,
                    pfn,
                    level,
                    access: fault.map(|fault| fault.access).unwrap_or_default(),
                    prefetch: fault.is_none(),
                    landed: Landed::Lost,
                };
                self.threads[t].mapping = Some(self.push(thread, line, what));
            }
            Seen::Installed { host_writable } => {
                self.land(thread, Landed::Page { writable: host_writable });
            }
            Seen::MmioMade => self.land(thread, Landed::Mmio),
            Seen::Unmap { start, end } => {
                let writes =
                    matches!(self.kind(self.op_of(thread)), "touch" | "pre_fault_memory" | "host_write");
                let inner = writes || self.threads[t].notified > 1;
                let at = self.push(thread, line, What::Unmap { start, end, inner });
                self.threads[t].notice = Some(at);
            }
            Seen::UnmapBegin => self.threads[t].notified += 1,
            Seen::UnmapEnd => self.threads[t].notified = self.threads[t].notified.saturating_sub(1),
            Seen::Age { start, end } => {
                let at = self.push(thread, line, What::Age { start, end });
                self.threads[t].notice = Some(at);
            }
            Seen::Smm { vcpu, entering } => {
                if self.kind(self.op_of(thread)) == "set_smm" {
                    self.threads[t].waiting = false;
                }
                self.push(thread, line, What::Smm { vcpu, entering });
            }
            Seen::Walk { gfn, min_level } => {
                self.threads[t].begun = true;
                let kind = self.kind(self.op_of(thread));
                if min_level == 1 && kind == "touch" && self.threads[t].notified == 0 && !self.has_faults {
                    self.push(thread, line, What::Walk { gfn });
                }
            }
            Seen::Restart { gfn } => {
                if !std::mem::take(&mut self.threads[t].begun) {
                    let after = self.threads[t].changed;
                    self.push(thread, line, What::Restart { after, gfn });
                }
            }
            Seen::Locked { entry } => {
                if let Some((level, gfn)) = entry {
                    self.threads[t].begun = false;
                    self.threads[t].changed += 1;
                    self.changes.push(Place { thread, line, level, gfn });
                }
            }
            Seen::Roots => {
                self.has_entries = true;
                if matches!(self.kind(self.op_of(thread)), "touch" | "pre_fault_memory") {
                    self.push(thread, line, What::Enter);
                }
            }
            Seen::NxZap => {
                self.push(thread, line, What::NxZap);
            }
            Seen::Work => {
                self.push(thread, line, What::Work);
            }
            Seen::Release => {
                if self.kind(self.op_of(thread)) == "destroy_vm" {
                    self.threads[t].waiting = false;
                }
                self.push(thread, line, What::Release);
            }
            Seen::Other(_) => {}
        }
    }

    /// What this line proves to have begun.
    fn before(&mut self, thread: u32, line: u64, seen: &Seen<'_>) {
        let t = thread as usize;
        let acts = matches!(seen, Seen::Locked { .. } | Seen::Walk { .. });
        let mut noticed = false;
        if let Some(at) = self.threads[t].notice.take()
            && acts
        {
            // It has the lock now; what others did since the announcement came before it.
            let notice = std::mem::replace(&mut self.inputs[at].what, What::Nothing);
            self.push(thread, line, notice);
            noticed = true;
        }
        if self.threads[t].enters && !matches!(seen, Seen::Begin(_)) {
            self.threads[t].enters = false;
            self.push(thread, line, What::Enter);
        }
        if acts
            && (!noticed || self.kind(self.op_of(thread)) == "destroy_vm")
            && self.threads[t].waiting
            && self.threads[t].notified == 0
            && self.locks(self.op_of(thread))
        {
            self.threads[t].waiting = false;
            self.push(thread, line, What::Script);
        }
    }

    /// May the first thing under the lock that a thread does during `op` be taken for the operation itself?
    fn locks(&self, op: u32) -> bool {
        matches!(
            self.kind(op),
            "set_memslot"
                | "get_dirty_log"
                | "clear_dirty_log"
                | "reset_dirty_rings"
                | "write_file"
                | "enable_cap"
                | "destroy_vm"
        )
    }

    fn vcpu_of(&self, thread: u32) -> Option<u32> {
        let op = self.script.operations.get(self.op_of(thread) as usize)?;
        op.number_of("vcpu").and_then(|vcpu| u32::try_from(vcpu).ok())
    }

    fn begin(&mut self, thread: u32, line: u64, number: u64) {
        let Some(op) = self.script.index(number) else {
            self.strangers.push(number);
            return;
        };
        self.begun[op as usize] = true;
        // The one before has no end, and did nothing under the lock: it is over.
        if std::mem::take(&mut self.threads[thread as usize].waiting) {
            self.push(thread, line, What::Script);
        }
        let t = &mut self.threads[thread as usize];
        // Operations of one thread follow each other.
        self.unended.append(&mut t.ops);
        t.ops.push(op);
        t.fault = None;
        t.mapping = None;
        t.waiting = true;
        let kind = self.kind(op).to_owned();
        let runs = matches!(kind.as_str(), "touch" | "pre_fault_memory");
        self.threads[thread as usize].enters = runs;
        if runs || kind == "create_vm" {
            self.threads[thread as usize].waiting = false;
        }
        if kind == "create_vm" {
            self.push(thread, line, What::Script);
        }
    }

    fn end(&mut self, thread: u32, line: u64, number: u64) {
        let Some(op) = self.script.index(number) else { return };
        let t = thread as usize;
        if !self.threads[t].ops.contains(&op) {
            return;
        }
        if matches!(self.kind(op), "touch" | "pre_fault_memory") {
            self.push(thread, line, What::Leave);
        }
        if std::mem::take(&mut self.threads[t].waiting) {
            self.push(thread, line, What::Script);
        }
        let state = &mut self.threads[t];
        state.ops.retain(|&open| open != op);
        state.fault = None;
        state.mapping = None;
    }

    fn land(&mut self, thread: u32, how: Landed) {
        if let Some(at) = self.threads[thread as usize].mapping.take()
            && let What::Map { landed, .. } = &mut self.inputs[at].what
        {
            *landed = how;
        }
    }
}
