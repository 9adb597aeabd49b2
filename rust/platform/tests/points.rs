//! Schedule points, the museum's bugs, faults and the schedule's yields compile to nothing on the real platform: the machine code of a function
//! that is full of them is that of the same function without.
#![cfg(target_arch = "x86_64")]

use std::{
    hint::black_box,
    sync::atomic::{AtomicU64, Ordering},
};

use tdpmmu_platform::{Bug, Fault, Platform, Real, Site};

// The attribute only fixes the name by which the test finds the code.
#[inline(never)]
#[unsafe(no_mangle)]
extern "C" fn tdpmmu_test_with_points(cell: &AtomicU64) -> u64 {
    Real::point(Site::LockAcquire);
    let mut old = Real::load(cell, Site::SpteRead);
    if Real::bug(Bug::B01) {
        old |= black_box(8);
    }
    Real::point(Site::RcuEnter);
    Real::locked(Site::RootRef);
    if Real::asked_to_yield() || Real::abandoned() || Real::world() != 0 {
        Real::yield_cpu(Site::LockYield);
    }
    let seen = Real::swap(cell, old | 1, Site::SpteZap);
    if Real::inject(Fault::Alloc, Site::TableAlloc) || Real::inject_for(Fault::FlushDelay, Site::TlbFlush) > 3
    {
        return black_box(99);
    }
    Real::violation("rule", "what");
    Real::point(Site::RcuLeave);
    Real::settle(Site::Mutex);
    Real::store(cell, seen, Site::SpteInstall);
    Real::point(Site::LockRelease);
    if Real::SPINS { seen } else { black_box(0) }
}

// The attribute only fixes the name by which the test finds the code.
#[inline(never)]
#[unsafe(no_mangle)]
extern "C" fn tdpmmu_test_without_points(cell: &AtomicU64) -> u64 {
    let old = cell.load(Ordering::Acquire);
    let seen = cell.swap(old | 1, Ordering::SeqCst);
    cell.store(seen, Ordering::Release);
    seen
}

/// The address and machine code of a function of this very executable, from its ELF symbol table.
fn code<'a>(elf: &'a [u8], symbol: &str) -> (u64, &'a [u8]) {
    let u16_at = |at: usize| u16::from_le_bytes(elf[at..at + 2].try_into().unwrap()) as usize;
    let u32_at = |at: usize| u32::from_le_bytes(elf[at..at + 4].try_into().unwrap()) as usize;
    let u64_at = |at: usize| u64::from_le_bytes(elf[at..at + 8].try_into().unwrap()) as usize;
    assert_eq!(&elf[..5], b"\x7fELF\x02", "a 64-bit ELF file");
    let section = |i: usize| u64_at(0x28) + i * u16_at(0x3a);
    const SYMTAB: usize = 2;
    let symtab = (0..u16_at(0x3c)).map(section).find(|s| u32_at(s + 4) == SYMTAB).expect("a symbol table");
    let names = u64_at(section(u32_at(symtab + 0x28)) + 0x18);
    let (start, size) = (u64_at(symtab + 0x18), u64_at(symtab + 0x20));
    for entry in (start..start + size).step_by(24) {
        let name = names + u32_at(entry);
        if elf[name..].starts_with(symbol.as_bytes()) && elf[name + symbol.len()] == 0 {
            let (address, length) = (u64_at(entry + 8), u64_at(entry + 16));
            let home = section(u16_at(entry + 6));
            let offset = address - u64_at(home + 0x10) + u64_at(home + 0x18);
            return (address as u64, &elf[offset..offset + length]);
        }
    }
    panic!("no symbol {symbol}");
}

#[test]
fn points_bugs_and_faults_leave_no_instruction_behind() {
    let cell = AtomicU64::new(4);
    assert_eq!(black_box(tdpmmu_test_with_points as extern "C" fn(&AtomicU64) -> u64)(&cell), 4);
    assert_eq!(black_box(tdpmmu_test_without_points as extern "C" fn(&AtomicU64) -> u64)(&cell), 4);
    let elf = std::fs::read("/proc/self/exe").unwrap();
    let (with_at, with) = code(&elf, "tdpmmu_test_with_points");
    let (without_at, without) = code(&elf, "tdpmmu_test_without_points");
    // An optimiser that merges identical functions leaves one of them as an alias of the other, or as a jump to it.
    let jumps_to = |code: &[u8], from: u64, to: u64| {
        code.len() >= 5
            && code[0] == 0xe9
            && from
                .wrapping_add(5)
                .wrapping_add_signed(i32::from_le_bytes(code[1..5].try_into().unwrap()).into())
                == to
    };
    assert!(
        with_at == without_at
            || with == without
            || jumps_to(with, with_at, without_at)
            || jumps_to(without, without_at, with_at),
        "with points {with:02x?}, without {without:02x?}"
    );
}
