//! The texts of events, read.
//!
//! Trace points differ by kernel version; each version's text is accepted. Kprobes read
//! `(symbol+0x0/0x90 [kvm]) key=value ...`, marks `OP n begin kind {json}`, `OP n end ...`, `STAT n {json}`.
//! A known event with a text that breaks its format is refused, and the rule it broke is named.

use crate::bytes::{Cursor, keyed};
use crate::event::{Event, Mark, PageArg, Probe, RootArg};

/// Parses the text of the event `name`; `Err` names the rule that was broken.
#[inline]
pub fn parse_event<'a>(name: &[u8], text: &'a [u8]) -> Result<Event<'a>, &'static str> {
    if name == b"kvm_tdp_mmu_spte_changed" {
        return spte_changed(text)
            .ok_or("kvm_tdp_mmu_spte_changed must be `as id N gfn X level N old_spte X new_spte X`");
    }
    match name {
        b"hcs" => changed_entry(text).ok_or("hcs must carry gfn=, level= and shared="),
        b"iter_start" => {
            iter_start(text).ok_or("iter_start must carry root=, spt=, role=, min_level= and gfn=")
        }
        _ if name.starts_with(b"kvm_") => kvm_event(name, text),
        _ => other_event(name, text),
    }
}

fn kvm_event<'a>(name: &[u8], text: &'a [u8]) -> Result<Event<'a>, &'static str> {
    match name {
        b"kvm_mmu_set_spte" => {
            set_spte(text).ok_or("kvm_mmu_set_spte must be `gfn X spte X (rwxu) level N at X`")
        }
        b"kvm_mmu_spte_requested" => {
            requested(text).ok_or("kvm_mmu_spte_requested must be `gfn X pfn X level N`")
        }
        b"kvm_page_fault" => page_fault(text).ok_or("kvm_page_fault must give address and error_code"),
        b"kvm_mmu_get_page" => page(text)
            .map(|(page, rest)| Event::GetPage { page, created: rest.ends_with(b" new") })
            .ok_or("kvm_mmu_get_page must be `sp gen N gfn X lN ...`"),
        b"kvm_mmu_prepare_zap_page" => page(text)
            .map(|(page, _)| Event::PrepareZapPage(page))
            .ok_or("kvm_mmu_prepare_zap_page must be `sp gen N gfn X lN ...`"),
        b"kvm_mmu_sync_page" => page(text)
            .map(|(page, _)| Event::SyncPage(page))
            .ok_or("kvm_mmu_sync_page must be `sp gen N gfn X lN ...`"),
        b"kvm_mmu_unsync_page" => page(text)
            .map(|(page, _)| Event::UnsyncPage(page))
            .ok_or("kvm_mmu_unsync_page must be `sp gen N gfn X lN ...`"),
        b"kvm_mmu_split_huge_page" => {
            split_huge_page(text).ok_or("kvm_mmu_split_huge_page must be `gfn X spte X level N errno N`")
        }
        b"kvm_mmu_zap_all_fast" => {
            zap_all_fast(text).ok_or("kvm_mmu_zap_all_fast must be `kvm-mmu-valid-gen N used_pages X`")
        }
        b"kvm_unmap_hva_range" => range(text, b"mmu notifier unmap range: ")
            .map(|(start, end)| Event::UnmapHva { start, end })
            .ok_or("kvm_unmap_hva_range must be `mmu notifier unmap range: X -- X`"),
        b"kvm_age_hva" => range(text, b"mmu notifier age hva: ")
            .map(|(start, end)| Event::AgeHva { start, end })
            .ok_or("kvm_age_hva must be `mmu notifier age hva: X -- X`"),
        b"kvm_test_age_hva" => address(text, b"mmu notifier test age hva: ")
            .map(|hva| Event::TestAgeHva { hva })
            .ok_or("kvm_test_age_hva must be `mmu notifier test age hva: X`"),
        b"kvm_set_spte_hva" => address(text, b"mmu notifier set pte hva: ")
            .map(|hva| Event::SetSpteHva { hva })
            .ok_or("kvm_set_spte_hva must be `mmu notifier set pte hva: X`"),
        b"kvm_userspace_exit" => text
            .strip_prefix(b"reason ")
            .map(|reason| Event::UserspaceExit { reason })
            .ok_or("kvm_userspace_exit must be `reason ...`"),
        b"kvm_smm_transition" => {
            smm(text).ok_or("kvm_smm_transition must be `vcpu N: entering|leaving SMM, smbase X`")
        }
        b"kvm_dirty_ring_push" => {
            ring_push(text).ok_or("kvm_dirty_ring_push must be `ring N: dirty X reset X slot N ...`")
        }
        b"kvm_dirty_ring_reset" => {
            ring_reset(text).ok_or("kvm_dirty_ring_reset must be `ring N: dirty X reset X (used N)`")
        }
        b"kvm_dirty_ring_exit" => after(text, b"vcpu ")
            .and_then(|mut c| Some(Event::DirtyRingExit { vcpu: u32::try_from(c.dec()?).ok()? }))
            .ok_or("kvm_dirty_ring_exit must be `vcpu N`"),
        b"kvm_mmu_pagetable_walk" => walk(text).ok_or("kvm_mmu_pagetable_walk must be `addr X pferr X`"),
        b"kvm_mmu_paging_element" => {
            paging_element(text).ok_or("kvm_mmu_paging_element must be `pte X level N`")
        }
        b"kvm_mmu_set_accessed_bit" => after(text, b"gpa ")
            .and_then(|mut c| c.hex_any())
            .map(|gpa| Event::SetAccessedBit { gpa })
            .ok_or("kvm_mmu_set_accessed_bit must be `gpa X`"),
        b"kvm_mmu_set_dirty_bit" => after(text, b"gpa ")
            .and_then(|mut c| c.hex_any())
            .map(|gpa| Event::SetDirtyBit { gpa })
            .ok_or("kvm_mmu_set_dirty_bit must be `gpa X`"),
        b"kvm_mmu_walker_error" => after(text, b"pferr ")
            .and_then(|mut c| c.hex_any())
            .map(|error| Event::WalkerError { error })
            .ok_or("kvm_mmu_walker_error must be `pferr X`"),
        b"kvm_mmio" => mmio(text).ok_or("kvm_mmio must be `mmio kind len N gpa X val X`"),
        _ => Ok(Event::Other),
    }
}

fn other_event<'a>(name: &[u8], text: &'a [u8]) -> Result<Event<'a>, &'static str> {
    let probe = |p| Ok(Event::Probe(p));
    match name {
        b"fast_page_fault" => fast_page_fault(text).ok_or(
            "fast_page_fault must be `vcpu N gva X error_code F sptep P old X new X spurious N fixed N`",
        ),
        b"mark_mmio_spte" => mark_mmio(text).ok_or("mark_mmio_spte must be `sptep:P gfn X access X gen X`"),
        b"check_mmio_spte" => {
            check_mmio(text).ok_or("check_mmio_spte must be `spte X kvm_gen X spte-gen X valid N`")
        }
        b"handle_mmio_page_fault" => {
            handle_mmio(text).ok_or("handle_mmio_page_fault must be `addr:X gfn X access X`")
        }
        b"tracing_mark_write" => {
            mark(text).map(Event::Mark).ok_or("a mark must be `OP n begin|end ...` or `STAT n {...}`")
        }
        // `print: tracing_mark_write: text` is trace-cmd's spelling.
        b"print" | b"bprint" => match text.strip_prefix(b"tracing_mark_write:") {
            Some(rest) => mark(rest.trim_ascii_start())
                .map(Event::Mark)
                .ok_or("a mark must be `OP n begin|end ...` or `STAT n {...}`"),
            None => Ok(Event::Mark(Mark::Text(text))),
        },
        b"put_root" => root(text).map(Event::PutRoot).ok_or("put_root must carry root=, spt= and role="),
        b"schedule_zap_root" => {
            root(text).map(Event::ScheduleZapRoot).ok_or("schedule_zap_root must carry root=, spt= and role=")
        }
        b"zap_root" => root(text)
            .map(|root| Event::ZapRoot { root, shared: keyed(text, b"shared") == Some(1) })
            .ok_or("zap_root must carry root=, spt= and role="),
        b"zap_root_pass" => (|| {
            let zap_level = u8::try_from(keyed(text, b"zap_level")?).ok()?;
            Some(Event::ZapRootPass {
                root: root(text)?,
                shared: keyed(text, b"shared") == Some(1),
                zap_level,
            })
        })()
        .ok_or("zap_root_pass must carry root=, spt=, role= and zap_level="),
        b"zap_leafs" => (|| {
            Some(Event::ZapLeafs {
                root: root(text)?,
                start: keyed(text, b"start")?,
                end: keyed(text, b"end")?,
            })
        })()
        .ok_or("zap_leafs must carry root=, spt=, role=, start= and end="),
        b"split_root" => (|| {
            Some(Event::SplitRoot {
                root: root(text)?,
                start: keyed(text, b"start")?,
                end: keyed(text, b"end")?,
                target_level: u8::try_from(keyed(text, b"target_level")?).ok()?,
            })
        })()
        .ok_or("split_root must carry root=, spt=, role=, start=, end= and target_level="),
        b"zap_sp" => (|| {
            Some(Event::ZapSp {
                sp: keyed(text, b"sp")?,
                spt: keyed(text, b"spt")?,
                role: keyed(text, b"role")? as u32,
                gfn: keyed(text, b"gfn")?,
            })
        })()
        .ok_or("zap_sp must carry sp=, spt=, role= and gfn="),
        b"init_sp" => (|| {
            Some(Event::InitSp {
                sp: keyed(text, b"sp")?,
                spt: keyed(text, b"spt")?,
                sptep: keyed(text, b"sptep")?,
                gfn: keyed(text, b"gfn")?,
                role: u32::try_from(keyed(text, b"role")?).ok()?,
            })
        })()
        .ok_or("init_sp must carry sp=, spt=, sptep=, gfn= and role="),
        b"free_sp" => keyed(text, b"spt").map(|spt| Event::FreeSp { spt }).ok_or("free_sp must carry spt="),
        b"get_vcpu_root_hpa_ret" => keyed(text, b"hpa")
            .map(|hpa| Event::RootHpa { hpa })
            .ok_or("get_vcpu_root_hpa_ret must carry hpa="),
        b"flush_remote_tlbs_range" => {
            (|| Some(Event::FlushRange { start: keyed(text, b"start")?, pages: keyed(text, b"n")? }))()
                .ok_or("flush_remote_tlbs_range must carry start= and n=")
        }
        b"link_sp" => probe(Probe::LinkSp),
        b"iter_restart" => probe(Probe::IterRestart),
        b"wrprot_slot" => probe(Probe::WrprotSlot),
        b"clear_dirty_slot" => probe(Probe::ClearDirtySlot),
        b"clear_dirty_pt_masked" => probe(Probe::ClearDirtyPtMasked),
        b"zap_collapsible" => probe(Probe::ZapCollapsible),
        b"recover_huge_pages" => probe(Probe::RecoverHugePages),
        b"zap_all" => probe(Probe::ZapAll),
        b"mmu_load" => probe(Probe::MmuLoad),
        b"mmu_unload" => probe(Probe::MmuUnload),
        b"free_roots" => probe(Probe::FreeRoots),
        b"free_obsolete_roots" => probe(Probe::FreeObsoleteRoots),
        b"alloc_root_ret" => probe(Probe::AllocRootRet),
        b"uninit" => probe(Probe::Uninit),
        b"flush_remote_tlbs" | b"flush_remote_tlbs_memslot" => probe(Probe::FlushRemoteTlbs),
        b"inv_start" => probe(Probe::InvStart),
        b"inv_end" => probe(Probe::InvEnd),
        b"mn_release" => probe(Probe::MnRelease),
        b"mn_change_pte" => probe(Probe::MnChangePte),
        b"mn_clear_young" | b"mn_clear_flush_young" => probe(Probe::MnClearYoung),
        b"mn_test_young" => probe(Probe::MnTestYoung),
        b"try_split" => probe(Probe::TrySplit),
        b"invalidate_all_roots" => probe(Probe::InvalidateAllRoots),
        b"zap_invalidated_roots" => probe(Probe::ZapInvalidatedRoots),
        b"zap_invalidated_roots_ret" => probe(Probe::ZapInvalidatedRootsRet),
        b"zap_root_work" => probe(Probe::ZapRootWork),
        b"zap_root_work_ret" => probe(Probe::ZapRootWorkRet),
        _ => Ok(Event::Other),
    }
}

/// Both `as id 0 gfn 5 level 1 old_spte 0 new_spte 103d44e67` and the raw fields of a trace-cmd that is older than the
/// kernel: `[FAILED TO PARSE] gfn=5 old_spte=0 new_spte=... level=1 as_id=0`.
#[inline]
fn spte_changed(text: &[u8]) -> Option<Event<'_>> {
    let mut c = Cursor::new(text);
    if !c.eat(b"as id ") {
        return raw_spte_changed(text);
    }
    let as_id = u8::try_from(c.dec()?).ok()?;
    c.lit(b" gfn ")?;
    let gfn = c.hex()?;
    c.lit(b" level ")?;
    let level = level(c.dec()?)?;
    c.lit(b" old_spte ")?;
    let old = c.hex()?;
    c.lit(b" new_spte ")?;
    let new = c.hex()?;
    end(c)?;
    Some(Event::SpteChanged { as_id, gfn, level, old, new })
}

fn raw_spte_changed(text: &[u8]) -> Option<Event<'_>> {
    let text = text.strip_prefix(b"[FAILED TO PARSE]")?;
    Some(Event::SpteChanged {
        as_id: u8::try_from(keyed(text, b"as_id")?).ok()?,
        gfn: keyed(text, b"gfn")?,
        level: level(keyed(text, b"level")?)?,
        old: keyed(text, b"old_spte")?,
        new: keyed(text, b"new_spte")?,
    })
}

fn level(value: u64) -> Option<u8> {
    (1..=5).contains(&value).then_some(value as u8)
}

fn end(mut c: Cursor<'_>) -> Option<()> {
    c.skip_spaces();
    c.rest().is_empty().then_some(())
}

fn after<'a>(text: &'a [u8], prefix: &[u8]) -> Option<Cursor<'a>> {
    text.strip_prefix(prefix).map(Cursor::new)
}

fn changed_entry(text: &[u8]) -> Option<Event<'_>> {
    Some(Event::ChangedEntry {
        gfn: keyed(text, b"gfn")?,
        level: level(keyed(text, b"level")?)?,
        shared: keyed(text, b"shared")? & 1 == 1,
    })
}

fn root(text: &[u8]) -> Option<RootArg> {
    Some(RootArg {
        root: keyed(text, b"root")?,
        spt: keyed(text, b"spt")?,
        role: u32::try_from(keyed(text, b"role")?).ok()?,
        refs: keyed(text, b"refs").unwrap_or(0) as i64,
    })
}

fn iter_start(text: &[u8]) -> Option<Event<'_>> {
    Some(Event::IterStart {
        root: root(text)?,
        min_level: level(keyed(text, b"min_level")?)?,
        gfn: keyed(text, b"gfn")?,
    })
}

fn page(text: &[u8]) -> Option<(PageArg, &[u8])> {
    let mut c = after(text, b"sp gen ")?;
    let valid_gen = u8::try_from(c.dec()?).ok()?;
    c.lit(b" gfn ")?;
    let gfn = c.hex()?;
    c.lit(b" l")?;
    let level = level(c.dec()?)?;
    c.lit(b" ")?;
    let rest = c.rest();
    let wide_access =
        rest.split(|&b| b == b' ').any(|w| w.len() == 4 && w.ends_with(b"x") && matches!(w[0], b'r' | b'-'));
    c.past(b"root ")?;
    let root_count = c.dec()?;
    Some((PageArg { valid_gen, gfn, level, wide_access, root_count }, text))
}

fn set_spte(text: &[u8]) -> Option<Event<'_>> {
    let mut c = after(text, b"gfn ")?;
    let gfn = c.hex()?;
    c.lit(b" spte ")?;
    let spte = c.hex()?;
    c.lit(b" (")?;
    c.past(b") level ")?;
    let level = level(c.dec()?)?;
    c.lit(b" at ")?;
    let at = c.hex()?;
    end(c)?;
    Some(Event::SetSpte { gfn, spte, level, at })
}

fn requested(text: &[u8]) -> Option<Event<'_>> {
    let mut c = after(text, b"gfn ")?;
    let gfn = c.hex()?;
    c.lit(b" pfn ")?;
    let pfn = c.hex()?;
    c.lit(b" level ")?;
    let level = level(c.dec()?)?;
    let access = if c.eat(b" access ") { Some(u8::try_from(c.hex()?).ok()?) } else { None };
    end(c)?;
    Some(Event::SpteRequested { gfn, pfn, level, access })
}

/// `vcpu 0 rip 0x1000 address 0x0000000000002000 error_code 0x200000006`, or the older `address 2000 error_code 6`.
fn page_fault(text: &[u8]) -> Option<Event<'_>> {
    let mut c = Cursor::new(text);
    let (mut vcpu, mut rip) = (None, None);
    if c.eat(b"vcpu ") {
        vcpu = Some(u32::try_from(c.dec()?).ok()?);
        c.lit(b" rip ")?;
        rip = Some(c.hex_any()?);
        c.lit(b" ")?;
    }
    c.lit(b"address ")?;
    let address = c.hex_any()?;
    c.lit(b" error_code ")?;
    let error_code = c.hex_any()?;
    Some(Event::PageFault { vcpu, rip, address, error_code })
}

fn fast_page_fault(text: &[u8]) -> Option<Event<'_>> {
    let mut c = after(text, b"vcpu ")?;
    let vcpu = u32::try_from(c.dec()?).ok()?;
    c.lit(b" gva ")?;
    let gpa = c.hex_any()?;
    c.lit(b" error_code ")?;
    let error_code = c.word();
    c.lit(b"sptep ")?;
    c.past(b" old ")?;
    let old = c.hex_any()?;
    c.lit(b" new ")?;
    let new = c.hex_any()?;
    c.lit(b" spurious ")?;
    let spurious = c.dec()? != 0;
    c.lit(b" fixed ")?;
    let fixed = c.dec()? != 0;
    Some(Event::FastPageFault { vcpu, gpa, error_code, old, new, spurious, fixed })
}

fn split_huge_page(text: &[u8]) -> Option<Event<'_>> {
    let mut c = after(text, b"gfn ")?;
    let gfn = c.hex()?;
    c.lit(b" spte ")?;
    let spte = c.hex()?;
    c.lit(b" level ")?;
    let level = level(c.dec()?)?;
    c.lit(b" errno ")?;
    let errno = c.number()? as i64;
    Some(Event::SplitHugePage { gfn, spte, level, errno })
}

/// `used_pages` is hexadecimal without `0x`.
fn zap_all_fast(text: &[u8]) -> Option<Event<'_>> {
    let mut c = after(text, b"kvm-mmu-valid-gen ")?;
    let valid_gen = u8::try_from(c.dec()?).ok()?;
    c.lit(b" used_pages ")?;
    let used_pages = c.hex()?;
    Some(Event::ZapAllFast { valid_gen, used_pages })
}

fn range(text: &[u8], prefix: &[u8]) -> Option<(u64, u64)> {
    let mut c = after(text, prefix)?;
    let start = c.hex_any()?;
    c.lit(b" -- ")?;
    Some((start, c.hex_any()?))
}

fn address(text: &[u8], prefix: &[u8]) -> Option<u64> {
    after(text, prefix)?.hex_any()
}

fn smm(text: &[u8]) -> Option<Event<'_>> {
    let mut c = after(text, b"vcpu ")?;
    let vcpu = u32::try_from(c.dec()?).ok()?;
    c.lit(b": ")?;
    let entering = match c.word() {
        b"entering" => true,
        b"leaving" => false,
        _ => return None,
    };
    c.lit(b"SMM, smbase ")?;
    Some(Event::SmmTransition { vcpu, entering, smbase: c.hex_any()? })
}

fn ring_push(text: &[u8]) -> Option<Event<'_>> {
    let mut c = after(text, b"ring ")?;
    let ring = c.dec()?;
    c.lit(b": dirty ")?;
    let dirty = c.hex_any()?;
    c.lit(b" reset ")?;
    let reset = c.hex_any()?;
    c.lit(b" slot ")?;
    let slot = c.dec()?;
    c.lit(b" offset ")?;
    let offset = c.hex_any()?;
    c.lit(b" (used ")?;
    Some(Event::DirtyRingPush { ring, dirty, reset, slot, offset, used: c.dec()? })
}

fn ring_reset(text: &[u8]) -> Option<Event<'_>> {
    let mut c = after(text, b"ring ")?;
    let ring = c.dec()?;
    c.lit(b": dirty ")?;
    let dirty = c.hex_any()?;
    c.lit(b" reset ")?;
    let reset = c.hex_any()?;
    c.lit(b" (used ")?;
    Some(Event::DirtyRingReset { ring, dirty, reset, used: c.dec()? })
}

fn walk(text: &[u8]) -> Option<Event<'_>> {
    let mut c = after(text, b"addr ")?;
    let address = c.hex_any()?;
    c.lit(b" pferr ")?;
    Some(Event::PagetableWalk { address, error: c.hex_any()? })
}

fn paging_element(text: &[u8]) -> Option<Event<'_>> {
    let mut c = after(text, b"pte ")?;
    let pte = c.hex_any()?;
    c.lit(b" level ")?;
    Some(Event::PagingElement { pte, level: level(c.dec()?)? })
}

fn mmio(text: &[u8]) -> Option<Event<'_>> {
    let mut c = Cursor::new(text);
    c.past(b"len ")?;
    let len = c.dec()?;
    c.lit(b" gpa ")?;
    Some(Event::Mmio { len, gpa: c.hex_any()? })
}

fn mark_mmio(text: &[u8]) -> Option<Event<'_>> {
    let mut c = after(text, b"sptep:")?;
    c.past(b" gfn ")?;
    let gfn = c.hex_any()?;
    c.lit(b" access ")?;
    let access = c.hex_any()?;
    c.lit(b" gen ")?;
    Some(Event::MarkMmio { gfn, access, generation: c.hex_any()? })
}

fn check_mmio(text: &[u8]) -> Option<Event<'_>> {
    let mut c = after(text, b"spte ")?;
    let spte = c.hex_any()?;
    c.lit(b" kvm_gen ")?;
    let kvm_generation = c.hex_any()?;
    c.lit(b" spte-gen ")?;
    let spte_generation = c.hex_any()?;
    c.lit(b" valid ")?;
    Some(Event::CheckMmio { spte, kvm_generation, spte_generation, valid: c.dec()? != 0 })
}

fn handle_mmio(text: &[u8]) -> Option<Event<'_>> {
    let mut c = after(text, b"addr:")?;
    let address = c.hex_any()?;
    c.lit(b" gfn ")?;
    let gfn = c.hex_any()?;
    c.lit(b" access ")?;
    Some(Event::HandleMmio { address, gfn, access: c.hex_any()? })
}

/// The text of a mark.
pub(crate) fn parse_mark(text: &[u8]) -> Option<Mark<'_>> {
    mark(text)
}

fn mark(text: &[u8]) -> Option<Mark<'_>> {
    let mut c = Cursor::new(text);
    if c.eat(b"OP ") {
        let Some(number) = c.dec() else { return Some(Mark::Text(text)) };
        c.skip_spaces();
        let begin = match c.word() {
            b"begin" => true,
            b"end" => false,
            _ => return Some(Mark::Text(text)),
        };
        let kind = c.word();
        let json = c.rest();
        return Some(if begin {
            Mark::Begin { number, kind, json }
        } else {
            Mark::End { number, kind, json }
        });
    }
    if c.eat(b"STAT ") {
        let Some(number) = c.dec() else { return Some(Mark::Text(text)) };
        c.skip_spaces();
        return Some(Mark::Stat { number, json: c.rest() });
    }
    Some(Mark::Text(text))
}
