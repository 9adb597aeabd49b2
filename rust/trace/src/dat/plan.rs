//! From a record to an event: the fields that each event needs are looked up once, by name.

use super::header::Ring;
use super::layout::{Field, Layout};
use crate::event::{Event, Mark, PageArg, Probe, RootArg};
use crate::parse::{parse_event, parse_mark};
use tdpmmu_spte::Role;

/// Most fields that an event needs.
const FIELDS: usize = 8;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    SpteChanged,
    SetSpte,
    SpteRequested,
    PageFault,
    FastPageFault,
    SplitHugePage,
    ZapAllFast,
    MarkMmio,
    CheckMmio,
    HandleMmio,
    GetPage,
    PrepareZapPage,
    SyncPage,
    UnsyncPage,
    UnmapHva,
    AgeHva,
    TestAgeHva,
    SetSpteHva,
    UserspaceExit,
    SmmTransition,
    RingPush,
    RingReset,
    RingExit,
    PagetableWalk,
    PagingElement,
    SetAccessedBit,
    SetDirtyBit,
    WalkerError,
    Mmio,
    Print,
    ChangedEntry,
    IterStart,
    PutRoot,
    ScheduleZapRoot,
    ZapRoot,
    ZapRootPass,
    ZapLeafs,
    SplitRoot,
    ZapSp,
    InitSp,
    FreeSp,
    RootHpa,
    FlushRange,
    Probe(Probe),
    Other,
}

/// Which fields an event needs; a name with `?` may be missing.
fn needs(name: &str) -> (Kind, &'static [&'static str]) {
    use Kind::*;
    match name {
        "kvm_tdp_mmu_spte_changed" => (SpteChanged, &["as_id", "gfn", "level", "old_spte", "new_spte"]),
        "kvm_mmu_set_spte" => (SetSpte, &["gfn", "spte", "level", "sptep"]),
        "kvm_mmu_spte_requested" => (SpteRequested, &["gfn", "pfn", "level", "access?"]),
        "kvm_page_fault" => (PageFault, &["fault_address", "error_code", "vcpu_id?", "guest_rip?"]),
        "fast_page_fault" => {
            (FastPageFault, &["vcpu_id", "cr2_or_gpa", "error_code", "old_spte", "new_spte", "ret"])
        }
        "kvm_mmu_split_huge_page" => (SplitHugePage, &["gfn", "spte", "level", "errno"]),
        "kvm_mmu_zap_all_fast" => (ZapAllFast, &["mmu_valid_gen", "mmu_used_pages"]),
        "mark_mmio_spte" => (MarkMmio, &["gfn", "access", "gen"]),
        "check_mmio_spte" => (CheckMmio, &["spte", "kvm_gen", "spte_gen"]),
        "handle_mmio_page_fault" => (HandleMmio, &["addr", "gfn", "access"]),
        "kvm_mmu_get_page" => (GetPage, &["mmu_valid_gen", "gfn", "role", "root_count", "created"]),
        "kvm_mmu_prepare_zap_page" => (PrepareZapPage, &["mmu_valid_gen", "gfn", "role", "root_count"]),
        "kvm_mmu_sync_page" => (SyncPage, &["mmu_valid_gen", "gfn", "role", "root_count"]),
        "kvm_mmu_unsync_page" => (UnsyncPage, &["mmu_valid_gen", "gfn", "role", "root_count"]),
        "kvm_unmap_hva_range" => (UnmapHva, &["start", "end"]),
        "kvm_age_hva" => (AgeHva, &["start", "end"]),
        "kvm_test_age_hva" => (TestAgeHva, &["hva"]),
        "kvm_set_spte_hva" => (SetSpteHva, &["hva"]),
        "kvm_userspace_exit" => (UserspaceExit, &["reason", "errno"]),
        "kvm_smm_transition" => (SmmTransition, &["vcpu_id", "entering", "smbase"]),
        "kvm_dirty_ring_push" => (RingPush, &["index", "dirty_index", "reset_index", "slot", "offset"]),
        "kvm_dirty_ring_reset" => (RingReset, &["index", "dirty_index", "reset_index"]),
        "kvm_dirty_ring_exit" => (RingExit, &["vcpu_id"]),
        "kvm_mmu_pagetable_walk" => (PagetableWalk, &["addr", "pferr"]),
        "kvm_mmu_paging_element" => (PagingElement, &["pte", "level"]),
        "kvm_mmu_set_accessed_bit" => (SetAccessedBit, &["gpa"]),
        "kvm_mmu_set_dirty_bit" => (SetDirtyBit, &["gpa"]),
        "kvm_mmu_walker_error" => (WalkerError, &["pferr"]),
        "kvm_mmio" => (Mmio, &["len", "gpa"]),
        "print" => (Print, &["buf"]),
        "hcs" => (ChangedEntry, &["gfn", "level", "shared"]),
        "iter_start" => (IterStart, &["root", "spt", "role", "refs?", "min_level", "gfn"]),
        "put_root" => (PutRoot, &["root", "spt", "role", "refs?"]),
        "schedule_zap_root" => (ScheduleZapRoot, &["root", "spt", "role", "refs?"]),
        "zap_root" => (ZapRoot, &["root", "spt", "role", "refs?", "shared?"]),
        "zap_root_pass" => (ZapRootPass, &["root", "spt", "role", "refs?", "shared?", "zap_level"]),
        "zap_leafs" => (ZapLeafs, &["root", "spt", "role", "refs?", "start", "end"]),
        "split_root" => (SplitRoot, &["root", "spt", "role", "refs?", "start", "end", "target_level"]),
        "zap_sp" => (ZapSp, &["sp", "spt", "role", "gfn"]),
        "init_sp" => (InitSp, &["sp", "spt", "sptep", "gfn", "role"]),
        "free_sp" => (FreeSp, &["spt"]),
        "get_vcpu_root_hpa_ret" => (RootHpa, &["hpa"]),
        "flush_remote_tlbs_range" => (FlushRange, &["start", "n"]),
        _ => match parse_event(name.as_bytes(), b"") {
            Ok(Event::Probe(probe)) => (Probe(probe), &[]),
            _ => (Other, &[]),
        },
    }
}

/// Room for texts that are made from numbers.
#[derive(Default)]
pub(crate) struct Scratch {
    text: String,
}

pub(crate) struct Plan {
    name: Box<[u8]>,
    kind: Kind,
    fields: [Option<Field>; FIELDS],
    /// A field that the event must have is missing in this kernel's description.
    missing: bool,
    /// Values of `ret` that mean spurious and fixed (fast page fault); wide access bits (page events).
    constants: (i64, i64),
    wide: bool,
    /// Names of numbers: reasons of a userspace exit.
    symbols: Vec<(i64, String)>,
}

impl Plan {
    pub(crate) fn unknown() -> Self {
        let layout = Layout { name: "(an event that is not described)".to_owned(), ..Layout::default() };
        Self::new(&layout)
    }

    pub(crate) fn new(layout: &Layout) -> Self {
        let (kind, names) = needs(&layout.name);
        let mut fields = [None; FIELDS];
        let mut missing = false;
        for (slot, name) in fields.iter_mut().zip(names) {
            let (name, optional) = name.strip_suffix('?').map_or((*name, false), |n| (n, true));
            *slot = layout.field(name);
            missing |= slot.is_none() && !optional;
        }
        Self {
            name: layout.name.as_bytes().into(),
            kind,
            fields,
            missing,
            constants: results(&layout.print),
            wide: layout.print.contains("\"rwux\""),
            symbols: if kind == Kind::UserspaceExit { symbols(&layout.print) } else { Vec::new() },
        }
    }

    pub(crate) fn name(&self) -> &[u8] {
        &self.name
    }

    /// Reads the record; `Err` is the rule that it breaks.
    pub(crate) fn event<'a>(
        &'a self,
        ring: &Ring,
        data: &'a [u8],
        scratch: &'a mut Scratch,
    ) -> Result<Event<'a>, &'static str> {
        if self.missing {
            return Err("the description of this event lacks a field that it has in every known kernel");
        }
        self.read(ring, data, scratch)
            .ok_or("a record must be as long as its event's description says, with levels from 1 to 5")
    }

    fn read<'a>(&'a self, ring: &Ring, data: &'a [u8], scratch: &'a mut Scratch) -> Option<Event<'a>> {
        let get = |i: usize| -> Option<u64> {
            let f = self.fields[i]?;
            let value = ring.number(data, f.offset as usize, (f.size as usize).min(8))?;
            Some(if f.signed && f.size < 8 && f.size > 0 {
                let shift = 64 - 8 * f.size;
                ((value << shift) as i64 >> shift) as u64
            } else {
                value
            })
        };
        let maybe = |i: usize| get(i).unwrap_or(0);
        let level = |i: usize| get(i).filter(|l| (1..=5).contains(l)).map(|l| l as u8);
        let root =
            || Some(RootArg { root: get(0)?, spt: get(1)?, role: get(2)? as u32, refs: maybe(3) as i64 });
        let page = || {
            let role = Role(get(2)? as u32);
            Some(PageArg {
                valid_gen: get(0)? as u8,
                gfn: get(1)?,
                level: Some(role.level()).filter(|l| (1..=5).contains(l))?,
                wide_access: self.wide,
                root_count: get(3)?,
            })
        };
        Some(match self.kind {
            Kind::SpteChanged => Event::SpteChanged {
                as_id: get(0)? as u8,
                gfn: get(1)?,
                level: level(2)?,
                old: get(3)?,
                new: get(4)?,
            },
            Kind::SetSpte => Event::SetSpte { gfn: get(0)?, spte: get(1)?, level: level(2)?, at: get(3)? },
            Kind::SpteRequested => Event::SpteRequested {
                gfn: get(0)?,
                pfn: get(1)?,
                level: level(2)?,
                access: get(3).map(|a| a as u8),
            },
            Kind::PageFault => Event::PageFault {
                address: get(0)?,
                error_code: get(1)?,
                vcpu: get(2).map(|v| v as u32),
                rip: get(3),
            },
            Kind::FastPageFault => {
                let ret = get(5)? as i64;
                flags(get(2)?, &mut scratch.text);
                Event::FastPageFault {
                    vcpu: get(0)? as u32,
                    gpa: get(1)?,
                    error_code: scratch.text.as_bytes(),
                    old: get(3)?,
                    new: get(4)?,
                    spurious: ret == self.constants.0,
                    fixed: ret == self.constants.1,
                }
            }
            Kind::SplitHugePage => {
                Event::SplitHugePage { gfn: get(0)?, spte: get(1)?, level: level(2)?, errno: get(3)? as i64 }
            }
            Kind::ZapAllFast => Event::ZapAllFast { valid_gen: get(0)? as u8, used_pages: get(1)? },
            Kind::MarkMmio => Event::MarkMmio { gfn: get(0)?, access: get(1)?, generation: get(2)? },
            Kind::CheckMmio => {
                let (spte, kvm_generation, spte_generation) = (get(0)?, get(1)?, get(2)?);
                Event::CheckMmio {
                    spte,
                    kvm_generation,
                    spte_generation,
                    valid: kvm_generation == spte_generation,
                }
            }
            Kind::HandleMmio => Event::HandleMmio { address: get(0)?, gfn: get(1)?, access: get(2)? },
            Kind::GetPage => Event::GetPage { page: page()?, created: get(4)? != 0 },
            Kind::PrepareZapPage => Event::PrepareZapPage(page()?),
            Kind::SyncPage => Event::SyncPage(page()?),
            Kind::UnsyncPage => Event::UnsyncPage(page()?),
            Kind::UnmapHva => Event::UnmapHva { start: get(0)?, end: get(1)? },
            Kind::AgeHva => Event::AgeHva { start: get(0)?, end: get(1)? },
            Kind::TestAgeHva => Event::TestAgeHva { hva: get(0)? },
            Kind::SetSpteHva => Event::SetSpteHva { hva: get(0)? },
            Kind::UserspaceExit => {
                self.exit_reason(get(0)? as i64, get(1)? as i64, &mut scratch.text);
                Event::UserspaceExit { reason: scratch.text.as_bytes() }
            }
            Kind::SmmTransition => {
                Event::SmmTransition { vcpu: get(0)? as u32, entering: get(1)? != 0, smbase: get(2)? }
            }
            Kind::RingPush => {
                let (dirty, reset) = (get(1)?, get(2)?);
                Event::DirtyRingPush {
                    ring: get(0)?,
                    dirty,
                    reset,
                    slot: get(3)?,
                    offset: get(4)?,
                    used: u64::from((dirty as u32).wrapping_sub(reset as u32)),
                }
            }
            Kind::RingReset => {
                let (dirty, reset) = (get(1)?, get(2)?);
                let used = u64::from((dirty as u32).wrapping_sub(reset as u32));
                Event::DirtyRingReset { ring: get(0)?, dirty, reset, used }
            }
            Kind::RingExit => Event::DirtyRingExit { vcpu: get(0)? as u32 },
            Kind::PagetableWalk => Event::PagetableWalk { address: get(0)?, error: get(1)? },
            Kind::PagingElement => Event::PagingElement { pte: get(0)?, level: level(1)? },
            Kind::SetAccessedBit => Event::SetAccessedBit { gpa: get(0)? },
            Kind::SetDirtyBit => Event::SetDirtyBit { gpa: get(0)? },
            Kind::WalkerError => Event::WalkerError { error: get(0)? },
            Kind::Mmio => Event::Mmio { len: get(0)?, gpa: get(1)? },
            Kind::Print => {
                let text = data.get(self.fields[0]?.offset as usize..)?;
                let text = &text[..text.iter().position(|&b| b == 0).unwrap_or(text.len())];
                let text = text.strip_suffix(b"\n").unwrap_or(text);
                Event::Mark(parse_mark(text).unwrap_or(Mark::Text(text)))
            }
            Kind::ChangedEntry => {
                Event::ChangedEntry { gfn: get(0)?, level: level(1)?, shared: get(2)? & 1 == 1 }
            }
            Kind::IterStart => Event::IterStart { root: root()?, min_level: level(4)?, gfn: get(5)? },
            Kind::PutRoot => Event::PutRoot(root()?),
            Kind::ScheduleZapRoot => Event::ScheduleZapRoot(root()?),
            Kind::ZapRoot => Event::ZapRoot { root: root()?, shared: maybe(4) == 1 },
            Kind::ZapRootPass => {
                Event::ZapRootPass { root: root()?, shared: maybe(4) == 1, zap_level: get(5)? as u8 }
            }
            Kind::ZapLeafs => Event::ZapLeafs { root: root()?, start: get(4)?, end: get(5)? },
            Kind::SplitRoot => {
                Event::SplitRoot { root: root()?, start: get(4)?, end: get(5)?, target_level: get(6)? as u8 }
            }
            Kind::ZapSp => Event::ZapSp { sp: get(0)?, spt: get(1)?, role: get(2)? as u32, gfn: get(3)? },
            Kind::InitSp => Event::InitSp {
                sp: get(0)?,
                spt: get(1)?,
                sptep: get(2)?,
                gfn: get(3)?,
                role: get(4)? as u32,
            },
            Kind::FreeSp => Event::FreeSp { spt: get(0)? },
            Kind::RootHpa => Event::RootHpa { hpa: get(0)? },
            Kind::FlushRange => Event::FlushRange { start: get(0)?, pages: get(1)? },
            Kind::Probe(probe) => Event::Probe(probe),
            Kind::Other => Event::Other,
        })
    }

    /// As the kernel prints it: `KVM_EXIT_IO (2)`, `restart (4)`.
    fn exit_reason(&self, reason: i64, errno: i64, text: &mut String) {
        use std::fmt::Write;
        text.clear();
        let name = match errno {
            -4 => Some("restart"),
            e if e < 0 => Some("error"),
            _ => self.symbols.iter().find(|s| s.0 == reason).map(|s| s.1.as_str()),
        };
        let number = if errno < 0 { -errno } else { reason };
        let _ = match name {
            Some(name) => write!(text, "{name} ({number})"),
            None => write!(text, "{reason:#x} ({number})"),
        };
    }
}

/// `P|W|U`, as the kernel prints an error code; nothing is printed for bits without a name.
fn flags(error: u64, text: &mut String) {
    text.clear();
    for (bit, name) in
        [(0, "P"), (1, "W"), (2, "U"), (5, "PK"), (6, "SS"), (15, "SGX"), (3, "RSVD"), (4, "F")]
    {
        if error >> bit & 1 != 0 {
            if !text.is_empty() {
                text.push('|');
            }
            text.push_str(name);
        }
    }
}

/// The two values that `ret` is compared with in a fast page fault's text: spurious, then fixed. They differ by kernel.
fn results(print: &str) -> (i64, i64) {
    let mut found = print.split("REC->ret ==").skip(1).filter_map(|rest| {
        let rest = rest.trim_start();
        rest[..rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len())].parse().ok()
    });
    (found.next().unwrap_or(-1), found.next().unwrap_or(-1))
}

/// `{ 2, "KVM_EXIT_" "IO" }` in a text: number and name.
fn symbols(print: &str) -> Vec<(i64, String)> {
    print
        .split('{')
        .skip(1)
        .filter_map(|part| {
            let (number, rest) = part.split_once(',')?;
            let quoted: String = rest.split('}').next()?.split('"').skip(1).step_by(2).collect();
            Some((number.trim().parse().ok()?, quoted))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn constants_and_names_are_read_from_the_kernels_own_description() {
        let print = r#""...", REC->ret == 5, REC->ret == 4"#;
        assert_eq!(results(print), (5, 4));
        assert_eq!(results("nothing"), (-1, -1));
        let print =
            r#"__print_symbolic(REC->reason, { 0, "KVM_EXIT_" "UNKNOWN" }, { 2, "KVM_EXIT_" "IO" }), x"#;
        assert_eq!(symbols(print), [(0, "KVM_EXIT_UNKNOWN".to_owned()), (2, "KVM_EXIT_IO".to_owned())]);
    }

    #[test]
    fn an_error_code_reads_as_the_kernel_prints_it() {
        let mut text = String::new();
        flags(0b10111, &mut text);
        assert_eq!(text, "P|W|U|F");
    }
}
