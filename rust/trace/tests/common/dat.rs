//! A writer of trace.dat, for tests: recordings in text become the ring-buffer pages that a kernel would have written.

use super::lines;
use std::collections::{BTreeMap, BTreeSet};
use std::io::Write as _;
use std::path::Path;
use tdpmmu_trace::{Event, Input, Item, Mark, PageArg, Probe, RootArg, TraceReader};

/// What kind of file.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub version: u8,
    /// `none`, `zlib` or `zstd`; version 7.
    pub codec: &'static str,
    pub big_endian: bool,
    pub page: usize,
}

impl Shape {
    pub const V6: Shape = Shape { version: 6, codec: "none", big_endian: false, page: 4096 };
    pub const V7: Shape = Shape { version: 7, ..Shape::V6 };
    pub const ZLIB: Shape = Shape { codec: "zlib", ..Shape::V7 };
    pub const ZSTD: Shape = Shape { codec: "zstd", ..Shape::V7 };
}

/// The recording with a time stamp of its own for each line, in ns: as text, and as what a trace.dat is made of.
pub struct Recording {
    pub text: String,
    records: Vec<Record>,
    names: BTreeMap<u32, String>,
}

struct Record {
    cpu: u32,
    ns: u64,
    pid: u32,
    event: String,
    fields: Vec<(&'static str, u64)>,
    mark: Option<Vec<u8>>,
    /// Events lost before it: `Some(None)` where nobody knows how many.
    lost: Option<Option<u64>>,
}

pub fn recording(path: &Path) -> Recording {
    recording_of(&lines(path))
}

pub fn recording_of(lines: &[String]) -> Recording {
    let (mut text, mut records, mut names) = (String::new(), Vec::new(), BTreeMap::new());
    let (mut last, mut lost) = (0u64, BTreeMap::new());
    let joined = Box::new(std::io::Cursor::new(lines.join("\n").into_bytes()));
    let input = Input::Reader { name: "lines".to_owned(), reader: joined };
    let mut reader = TraceReader::open(input, true).expect("opens");
    loop {
        let item = match reader.next().expect("a well-formed line") {
            Some(Item::Lost(count)) => {
                let cpu = reader.lost_cpu().expect("a loss names its CPU");
                let shown = count.map_or(String::new(), |n| format!("{n} "));
                text.push_str(&format!("CPU:{cpu} [LOST {shown}EVENTS]\n"));
                lost.insert(cpu, count);
                continue;
            }
            item => item,
        };
        match item {
            None => break,
            Some(Item::Lost(_)) => unreachable!("handled above"),
            Some(Item::Record(head, event)) => {
                let ns = head.ns.max(last + 1);
                last = ns;
                let comm = String::from_utf8_lossy(head.comm).into_owned();
                let (name, body) = (String::from_utf8_lossy(head.event), String::from_utf8_lossy(head.text));
                text.push_str(&format!(
                    "{comm}-{} [{:03}] ..... {}.{:09}: {name}: {body}\n",
                    head.pid,
                    head.cpu,
                    ns / 1_000_000_000,
                    ns % 1_000_000_000
                ));
                names.entry(head.pid).or_insert(comm);
                let marks = matches!(event, Event::Mark(_));
                records.push(Record {
                    cpu: head.cpu,
                    ns,
                    pid: head.pid,
                    event: if marks { "print".to_owned() } else { name.into_owned() },
                    fields: fields(&event),
                    mark: marks.then(|| head.text.to_vec()),
                    lost: lost.remove(&head.cpu),
                });
            }
        }
    }
    Recording { text, records, names }
}

fn root(r: &RootArg) -> Vec<(&'static str, u64)> {
    vec![("root", r.root), ("spt", r.spt), ("role", u64::from(r.role)), ("refs", r.refs as u64)]
}

fn page(p: &PageArg) -> Vec<(&'static str, u64)> {
    vec![
        ("mmu_valid_gen", u64::from(p.valid_gen)),
        ("gfn", p.gfn),
        ("role", u64::from(p.level)),
        ("root_count", p.root_count),
    ]
}

fn with(mut all: Vec<(&'static str, u64)>, more: &[(&'static str, u64)]) -> Vec<(&'static str, u64)> {
    all.extend_from_slice(more);
    all
}

fn error_bits(text: &[u8]) -> u64 {
    let names = [("P", 0), ("W", 1), ("U", 2), ("RSVD", 3), ("F", 4)];
    let text = String::from_utf8_lossy(text);
    text.split('|').filter_map(|n| names.iter().find(|k| k.0 == n)).map(|k| 1 << k.1).sum()
}

fn fields(event: &Event<'_>) -> Vec<(&'static str, u64)> {
    match *event {
        Event::SpteChanged { as_id, gfn, level, old, new } => vec![
            ("as_id", u64::from(as_id)),
            ("gfn", gfn),
            ("level", u64::from(level)),
            ("old_spte", old),
            ("new_spte", new),
        ],
        Event::SetSpte { gfn, spte, level, at } => {
            vec![("gfn", gfn), ("spte", spte), ("level", u64::from(level)), ("sptep", at)]
        }
        Event::SpteRequested { gfn, pfn, level, access } => vec![
            ("gfn", gfn),
            ("pfn", pfn),
            ("level", u64::from(level)),
            ("access", u64::from(access.unwrap_or(0))),
        ],
        Event::PageFault { vcpu, rip, address, error_code } => vec![
            ("vcpu_id", u64::from(vcpu.unwrap_or(0))),
            ("guest_rip", rip.unwrap_or(0)),
            ("fault_address", address),
            ("error_code", error_code),
        ],
        Event::FastPageFault { vcpu, gpa, error_code, old, new, spurious, fixed } => vec![
            ("vcpu_id", u64::from(vcpu)),
            ("cr2_or_gpa", gpa),
            ("error_code", error_bits(error_code)),
            ("old_spte", old),
            ("new_spte", new),
            ("ret", if fixed { 4 } else { 5 * u64::from(spurious) }),
        ],
        Event::SplitHugePage { gfn, spte, level, errno } => {
            vec![("gfn", gfn), ("spte", spte), ("level", u64::from(level)), ("errno", errno as u64)]
        }
        Event::ZapAllFast { valid_gen, used_pages } => {
            vec![("mmu_valid_gen", u64::from(valid_gen)), ("mmu_used_pages", used_pages)]
        }
        Event::MarkMmio { gfn, access, generation } => {
            vec![("gfn", gfn), ("access", access), ("gen", generation)]
        }
        Event::CheckMmio { spte, kvm_generation, spte_generation, .. } => {
            vec![("spte", spte), ("kvm_gen", kvm_generation), ("spte_gen", spte_generation)]
        }
        Event::HandleMmio { address, gfn, access } => {
            vec![("addr", address), ("gfn", gfn), ("access", access)]
        }
        Event::GetPage { page: p, created } => with(page(&p), &[("created", u64::from(created))]),
        Event::PrepareZapPage(p) | Event::SyncPage(p) | Event::UnsyncPage(p) => page(&p),
        Event::UnmapHva { start, end } | Event::AgeHva { start, end } => vec![("start", start), ("end", end)],
        Event::TestAgeHva { hva } | Event::SetSpteHva { hva } => vec![("hva", hva)],
        Event::UserspaceExit { reason } => {
            let text = String::from_utf8_lossy(reason);
            let number = text.split(['(', ')']).nth(1).and_then(|n| n.parse().ok()).unwrap_or(0);
            if text.starts_with("restart") || text.starts_with("error") {
                vec![("reason", 0), ("errno", (-(number as i64)) as u64)]
            } else {
                vec![("reason", number), ("errno", 0)]
            }
        }
        Event::SmmTransition { vcpu, entering, smbase } => {
            vec![("vcpu_id", u64::from(vcpu)), ("entering", u64::from(entering)), ("smbase", smbase)]
        }
        Event::DirtyRingPush { ring, dirty, reset, slot, offset, .. } => vec![
            ("index", ring),
            ("dirty_index", dirty),
            ("reset_index", reset),
            ("slot", slot),
            ("offset", offset),
        ],
        Event::DirtyRingReset { ring, dirty, reset, .. } => {
            vec![("index", ring), ("dirty_index", dirty), ("reset_index", reset)]
        }
        Event::DirtyRingExit { vcpu } => vec![("vcpu_id", u64::from(vcpu))],
        Event::PagetableWalk { address, error } => vec![("addr", address), ("pferr", error)],
        Event::PagingElement { pte, level } => vec![("pte", pte), ("level", u64::from(level))],
        Event::SetAccessedBit { gpa } | Event::SetDirtyBit { gpa } => vec![("gpa", gpa)],
        Event::WalkerError { error } => vec![("pferr", error)],
        Event::Mmio { len, gpa } => vec![("len", len), ("gpa", gpa)],
        Event::IterStart { root: r, min_level, gfn } => {
            with(root(&r), &[("min_level", u64::from(min_level)), ("gfn", gfn)])
        }
        Event::InitSp { sp, spt, sptep, gfn, role } => {
            vec![("sp", sp), ("spt", spt), ("sptep", sptep), ("gfn", gfn), ("role", u64::from(role))]
        }
        Event::FreeSp { spt } => vec![("spt", spt)],
        Event::RootHpa { hpa } => vec![("hpa", hpa)],
        Event::PutRoot(r) | Event::ScheduleZapRoot(r) => root(&r),
        Event::ZapRoot { root: r, shared } => with(root(&r), &[("shared", u64::from(shared))]),
        Event::ZapRootPass { root: r, shared, zap_level } => {
            with(root(&r), &[("shared", u64::from(shared)), ("zap_level", u64::from(zap_level))])
        }
        Event::ZapLeafs { root: r, start, end } => with(root(&r), &[("start", start), ("end", end)]),
        Event::SplitRoot { root: r, start, end, target_level } => {
            with(root(&r), &[("start", start), ("end", end), ("target_level", u64::from(target_level))])
        }
        Event::ZapSp { sp, spt, role, gfn } => {
            vec![("sp", sp), ("spt", spt), ("role", u64::from(role)), ("gfn", gfn)]
        }
        Event::FlushRange { start, pages } => vec![("start", start), ("n", pages)],
        Event::ChangedEntry { gfn, level, shared } => {
            vec![("gfn", gfn), ("level", u64::from(level)), ("shared", u64::from(shared))]
        }
        Event::Probe(Probe::LinkSp) => vec![("sp", 1), ("spt", 2)],
        Event::Probe(_) | Event::Mark(Mark::Text(_)) | Event::Mark(_) | Event::Other => Vec::new(),
    }
}

/// Size of a field in bytes, as the kernel has it; the rest has 8.
fn size_of(event: &str, field: &str) -> usize {
    match (event, field) {
        (_, "level" | "as_id" | "access" | "mmu_valid_gen" | "created" | "entering")
            if event.starts_with("kvm_") && event != "kvm_mmu_split_huge_page" =>
        {
            1
        }
        (
            _,
            "role" | "refs" | "root_count" | "vcpu_id" | "min_level" | "zap_level" | "errno" | "reason"
            | "ret",
        ) => 4,
        ("kvm_mmu_split_huge_page", "level") => 4,
        _ => 8,
    }
}

type Place = (usize, usize);

/// An event's description in the kernel's words, and where its fields are.
struct Described {
    id: u16,
    text: String,
    places: BTreeMap<String, Place>,
    size: usize,
}

fn describe(event: &str, id: u16, names: &[&'static str], wide: bool) -> Described {
    let mut text = format!("name: {event}\nID: {id}\nformat:\n");
    let (mut at, mut places) = (8, BTreeMap::new());
    for (name, offset, size) in
        [("common_type", 0, 2), ("common_flags", 2, 1), ("common_preempt_count", 3, 1), ("common_pid", 4, 4)]
    {
        text.push_str(&format!("\tfield:int {name};\toffset:{offset};\tsize:{size};\tsigned:0;\n"));
    }
    text.push('\n');
    for name in names {
        let size = size_of(event, name);
        at = usize::next_multiple_of(at, size);
        let signed = u8::from(matches!(*name, "refs" | "errno"));
        text.push_str(&format!(
            "\tfield:u{} {name};\toffset:{at};\tsize:{size};\tsigned:{signed};\n",
            size * 8
        ));
        places.insert((*name).to_owned(), (at, size));
        at += size;
    }
    if event == "print" {
        text.push_str("\tfield:unsigned long ip;\toffset:8;\tsize:8;\tsigned:0;\n\tfield:char buf[];\toffset:16;\tsize:0;\tsigned:0;\n");
        at = 16;
    }
    let print = match event {
        "fast_page_fault" => r#""...", REC->ret == 5, REC->ret == 4"#,
        "kvm_userspace_exit" => {
            r#"__print_symbolic(REC->reason, { 2, "KVM_EXIT_" "IO" }, { 6, "KVM_EXIT_" "MMIO" })"#
        }
        _ if wide => r#""rwux""#,
        _ => r#""""#,
    };
    text.push_str(&format!("\nprint fmt: {print}\n"));
    Described { id, text, places, size: at }
}

/// The kernel's own description, from a folder of format files.
fn real(event: &str, folder: Option<&Path>) -> Option<Described> {
    let folder = folder?;
    let text = ["kvm_", "kvmmmu_"]
        .iter()
        .find_map(|system| std::fs::read_to_string(folder.join(format!("{system}{event}.format"))).ok())?;
    let (mut places, mut size, mut id) = (BTreeMap::new(), 8, 0);
    for line in text.lines().map(str::trim) {
        if let Some(n) = line.strip_prefix("ID: ") {
            id = n.parse().expect("a number");
        }
        let Some(rest) = line.strip_prefix("field:") else { continue };
        let parts: Vec<&str> = rest.split(';').map(str::trim).collect();
        let name = parts[0].rsplit([' ', '*']).next().expect("a name").to_owned();
        let number = |p: &str| p.split(':').nth(1).and_then(|n| n.parse::<usize>().ok()).expect("a number");
        let (at, len) = (number(parts[1]), number(parts[2]));
        size = size.max(at + len);
        places.insert(name, (at, len));
    }
    Some(Described { id, text, places, size: size.next_multiple_of(4) })
}

struct Writer {
    big: bool,
    out: Vec<u8>,
}

impl Writer {
    fn new(shape: &Shape) -> Self {
        Self { big: shape.big_endian, out: Vec::new() }
    }

    fn number(&mut self, value: u64, size: usize) {
        let bytes = number(self.big, value, size);
        self.out.extend_from_slice(&bytes);
    }

    fn bytes(&mut self, bytes: &[u8]) {
        self.out.extend_from_slice(bytes);
    }

    fn sized(&mut self, size: usize, text: &[u8]) {
        self.number(text.len() as u64, size);
        self.bytes(text);
    }

    fn align(&mut self, to: usize) {
        self.out.resize(self.out.len().next_multiple_of(to), 0);
    }
}

fn number(big: bool, value: u64, size: usize) -> Vec<u8> {
    if big { value.to_be_bytes()[8 - size..].to_vec() } else { value.to_le_bytes()[..size].to_vec() }
}

const HEADER_EVENT: &[u8] = b"# compressed entry header\n\ttype_len    :    5 bits\n\ttime_delta  :   27 bits\n\tarray       :   32 bits\n";

impl Recording {
    /// The file; `formats` is a folder with the kernel's own descriptions of its events.
    pub fn dat(&self, shape: Shape, formats: Option<&Path>) -> Vec<u8> {
        let mut described: BTreeMap<&str, Described> = BTreeMap::new();
        let mut next = 2000;
        for record in &self.records {
            described.entry(&record.event).or_insert_with(|| {
                next += 1;
                let names: Vec<&'static str> = record.fields.iter().map(|f| f.0).collect();
                let wide = self.text.contains("rwux");
                let id = if record.event == "print" { 5 } else { next };
                real(&record.event, formats).unwrap_or_else(|| describe(&record.event, id, &names, wide))
            });
        }
        let cpus: BTreeSet<u32> = self.records.iter().map(|r| r.cpu).collect();
        let count = cpus.iter().max().map_or(1, |c| c + 1);
        let pages: Vec<Vec<u8>> = (0..count).map(|cpu| self.pages(cpu, &shape, &described)).collect();
        if shape.version == 6 {
            self.version_6(&shape, &described, &pages)
        } else {
            self.version_7(&shape, &described, &pages)
        }
    }

    fn pages(&self, cpu: u32, shape: &Shape, described: &BTreeMap<&str, Described>) -> Vec<u8> {
        let (mut pages, mut page, mut first, mut last, mut flags, mut stored) =
            (Vec::new(), Vec::<u8>::new(), None, 0u64, 0u64, None);
        let mut flush =
            |page: &mut Vec<u8>, first: &mut Option<u64>, flags: &mut u64, stored: &mut Option<u64>| {
                let Some(at) = first.take() else { return };
                let mut whole = number(shape.big_endian, at, 8);
                whole.extend(number(shape.big_endian, page.len() as u64 | *flags, 8));
                whole.append(page);
                if let Some(count) = stored.take() {
                    whole.extend(number(shape.big_endian, count, 8));
                }
                assert!(whole.len() <= shape.page);
                whole.resize(shape.page, 0);
                pages.append(&mut whole);
                *flags = 0;
            };
        for record in self.records.iter().filter(|r| r.cpu == cpu) {
            let d = &described[record.event.as_str()];
            let mut data = vec![0u8; d.size];
            let mut put = |place: Place, value: u64| {
                data[place.0..place.0 + place.1].copy_from_slice(&number(shape.big_endian, value, place.1));
            };
            put((0, 2), u64::from(d.id));
            put((4, 4), u64::from(record.pid));
            for (name, value) in &record.fields {
                if let Some(&place) = d.places.get(*name) {
                    put(place, *value);
                }
            }
            if let Some(mark) = &record.mark {
                data.extend_from_slice(mark);
                data.extend_from_slice(b"\n\0");
            }
            data.resize(data.len().next_multiple_of(4), 0);
            if let Some(count) = record.lost {
                flush(&mut page, &mut first, &mut flags, &mut stored);
                flags = 1 << 31 | u64::from(count.is_some()) << 30;
                stored = count;
            }
            // Room for the longest form of the record, a time before it, a padding behind it, a count of what was lost.
            if page.len() + data.len() + 8 + 8 + 4 + 24 > shape.page {
                flush(&mut page, &mut first, &mut flags, &mut stored);
            }
            let delta = record.ns - if first.is_some() { last } else { record.ns };
            first.get_or_insert(record.ns);
            last = record.ns;
            let word = |page: &mut Vec<u8>, kind: u64, delta: u64| {
                let word = if shape.big_endian { kind << 27 | delta } else { kind | delta << 5 };
                page.extend(number(shape.big_endian, word, 4));
            };
            let mut delta = delta;
            if delta >> 27 != 0 {
                word(&mut page, 30, delta & ((1 << 27) - 1));
                page.extend(number(shape.big_endian, delta >> 27, 4));
                delta = 0;
            }
            if data.len() <= 112 {
                word(&mut page, (data.len() / 4) as u64, delta);
            } else {
                word(&mut page, 0, delta);
                page.extend(number(shape.big_endian, data.len() as u64 + 4, 4));
            }
            page.extend(data);
        }
        flush(&mut page, &mut first, &mut flags, &mut stored);
        pages
    }

    fn header_info(shape: &Shape, w: &mut Writer) {
        let page = format!(
            "\tfield: u64 timestamp;\toffset:0;\tsize:8;\tsigned:0;\n\tfield: local_t commit;\toffset:8;\tsize:8;\tsigned:1;\n\tfield: int overwrite;\toffset:8;\tsize:1;\tsigned:1;\n\tfield: char data;\toffset:16;\tsize:{};\tsigned:1;\n",
            shape.page - 16
        );
        w.bytes(b"header_page\0");
        w.sized(8, page.as_bytes());
        w.bytes(b"header_event\0");
        w.sized(8, HEADER_EVENT);
    }

    fn ftrace_events(w: &mut Writer, described: &BTreeMap<&str, Described>) {
        let own: Vec<_> = described.iter().filter(|d| *d.0 == "print").collect();
        w.number(own.len() as u64, 4);
        own.iter().for_each(|d| w.sized(8, d.1.text.as_bytes()));
    }

    fn event_formats(w: &mut Writer, described: &BTreeMap<&str, Described>) {
        let own: Vec<_> = described.iter().filter(|d| *d.0 != "print").collect();
        w.number(1, 4);
        w.bytes(b"kvmmmu\0");
        w.number(own.len() as u64, 4);
        own.iter().for_each(|d| w.sized(8, d.1.text.as_bytes()));
    }

    fn names(&self) -> Vec<u8> {
        let mut text = String::new();
        for (pid, name) in &self.names {
            text.push_str(&format!("{pid} {name}\n"));
        }
        text.into_bytes()
    }

    fn version_6(&self, shape: &Shape, described: &BTreeMap<&str, Described>, pages: &[Vec<u8>]) -> Vec<u8> {
        let mut w = Writer::new(shape);
        w.bytes(b"\x17\x08\x44tracing6\0");
        w.number(u64::from(shape.big_endian), 1);
        w.number(8, 1);
        w.number(shape.page as u64, 4);
        Self::header_info(shape, &mut w);
        Self::ftrace_events(&mut w, described);
        Self::event_formats(&mut w, described);
        w.sized(4, b"ffffffff81000000 T _text\n");
        w.sized(4, b"");
        w.sized(8, &self.names());
        w.number(pages.len() as u64, 4);
        w.bytes(b"options  \0");
        w.number(5, 2);
        w.sized(4, b"Linux test\0");
        w.number(0, 2);
        w.bytes(b"flyrecord\0");
        let table = w.out.len();
        let mut at = (table + 16 * pages.len()).next_multiple_of(shape.page);
        for page in pages {
            w.number(at as u64, 8);
            w.number(page.len() as u64, 8);
            at += page.len();
        }
        w.align(shape.page);
        pages.iter().for_each(|p| w.bytes(p));
        w.out
    }

    fn version_7(&self, shape: &Shape, described: &BTreeMap<&str, Described>, pages: &[Vec<u8>]) -> Vec<u8> {
        let mut w = Writer::new(shape);
        w.bytes(b"\x17\x08\x44tracing7\0");
        w.number(u64::from(shape.big_endian), 1);
        w.number(8, 1);
        w.number(shape.page as u64, 4);
        w.bytes(shape.codec.as_bytes());
        w.bytes(b"\x001\0");
        let options_at = w.out.len();
        w.number(0, 8);
        let mut options: Vec<(u64, Vec<u8>)> = vec![(5, b"Linux test\0".to_vec()), (99, vec![1, 2, 3])];
        let section = |w: &mut Writer, id: u64, fill: &dyn Fn(&mut Writer)| {
            let at = w.out.len() as u64;
            let mut body = Writer::new(shape);
            fill(&mut body);
            w.number(id, 2);
            w.number(u64::from(shape.codec != "none"), 2);
            w.number(0, 4);
            if shape.codec == "none" {
                w.number(body.out.len() as u64, 8);
                w.bytes(&body.out);
            } else {
                let packed = pack(shape.codec, &body.out);
                w.number(packed.len() as u64 + 8, 8);
                w.number(packed.len() as u64, 4);
                w.number(body.out.len() as u64, 4);
                w.bytes(&packed);
            }
            at
        };
        let offset = |at: u64| number(shape.big_endian, at, 8);
        let at = section(&mut w, 16, &|w| Self::header_info(shape, w));
        options.push((16, offset(at)));
        let at = section(&mut w, 17, &|w| Self::ftrace_events(w, described));
        options.push((17, offset(at)));
        let at = section(&mut w, 18, &|w| Self::event_formats(w, described));
        options.push((18, offset(at)));
        let at = section(&mut w, 21, &|w| w.sized(8, &self.names()));
        options.push((21, offset(at)));
        // The buffer's section, then its CPUs, each at the beginning of a page.
        let buffer = w.out.len() as u64;
        w.number(3, 2);
        w.number(u64::from(shape.codec != "none"), 2);
        w.number(0, 4);
        w.number(0, 8);
        let mut table = Writer::new(shape);
        table.number(buffer, 8);
        table.bytes(b"\0mono\0");
        table.number(shape.page as u64, 4);
        table.number(pages.len() as u64, 4);
        for (cpu, data) in pages.iter().enumerate() {
            w.align(shape.page);
            let at = w.out.len();
            if shape.codec == "none" {
                w.bytes(data);
            } else if !data.is_empty() {
                let chunks: Vec<&[u8]> = data.chunks(10 * shape.page).collect();
                w.number(chunks.len() as u64, 4);
                for chunk in chunks {
                    let packed = pack(shape.codec, chunk);
                    w.number(packed.len() as u64, 4);
                    w.number(chunk.len() as u64, 4);
                    w.bytes(&packed);
                }
            }
            table.number(cpu as u64, 4);
            table.number(at as u64, 8);
            table.number((w.out.len() - at) as u64, 8);
        }
        options.push((3, table.out));
        // Two options sections: the first leads to the second.
        let rest = options.split_off(2);
        let second = section(&mut w, 0, &|w| write_options(w, &rest, 0));
        let first = section(&mut w, 0, &|w| write_options(w, &options, second));
        w.out[options_at..options_at + 8].copy_from_slice(&number(shape.big_endian, first, 8));
        w.out
    }
}

fn write_options(w: &mut Writer, options: &[(u64, Vec<u8>)], next: u64) {
    for (id, data) in options {
        w.number(*id, 2);
        w.sized(4, data);
    }
    w.number(0, 2);
    let next = number(w.big, next, 8);
    w.sized(4, &next);
}

fn pack(codec: &str, data: &[u8]) -> Vec<u8> {
    if codec == "zstd" {
        return ruzstd::encoding::compress_to_vec(data, ruzstd::encoding::CompressionLevel::Fastest);
    }
    let mut encoder = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(data).expect("into memory");
    encoder.finish().expect("into memory")
}
