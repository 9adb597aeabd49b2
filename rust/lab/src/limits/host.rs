//! What the host's own machinery costs, and the mapping that everything is measured on.

use std::hint::{black_box, spin_loop};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

use super::{LimitsError, PAGE};

/// Bytes of a huge page on x86-64; mappings are sized and aligned in it.
const HUGE: usize = 2 << 20;
/// Host mapping behind the `munmap_ns` figure, in 4 KiB pages.
pub(super) const MUNMAP_PAGES: usize = 32_768;
/// The price of the host kernel's own second: (munmap, populate) per zero-page 4K PTE.
pub(super) fn host_prices() -> Result<(f64, f64), LimitsError> {
    let (mut unmap, mut populate) = (f64::INFINITY, f64::INFINITY);
    for _ in 0..5 {
        let mut pages = Mapping::new(MUNMAP_PAGES * PAGE, false)?;
        let start = Instant::now();
        pages.populate_read();
        populate = populate.min(start.elapsed().as_nanos() as f64 / MUNMAP_PAGES as f64);
        let start = Instant::now();
        drop(pages);
        unmap = unmap.min(start.elapsed().as_nanos() as f64 / MUNMAP_PAGES as f64);
    }
    Ok((unmap, populate))
}

pub(super) fn fence_price() -> f64 {
    const FENCES: u32 = 10_000;
    // Between two fences stands a store: a fence with nothing to order is merged with the next.
    let cell = AtomicU64::new(0);
    let rounds = (0..10).map(|_| {
        let start = Instant::now();
        for i in 0..FENCES {
            cell.store(u64::from(i), Ordering::Relaxed);
            std::sync::atomic::fence(Ordering::SeqCst);
        }
        black_box(&cell);
        start.elapsed().as_nanos() as f64 / f64::from(FENCES)
    });
    rounds.fold(f64::INFINITY, f64::min)
}

/// Median price of a private expedited membarrier: siblings off CPU, then one spinning.
pub(super) fn membarrier_prices() -> (Option<f64>, Option<f64>) {
    if !membarrier(libc::MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED) {
        return (None, None);
    }
    let median = |calls: usize| {
        let mut samples = Vec::with_capacity(calls);
        for _ in 0..calls {
            let start = Instant::now();
            if !membarrier(libc::MEMBARRIER_CMD_PRIVATE_EXPEDITED) {
                return None;
            }
            samples.push(start.elapsed().as_nanos() as f64);
        }
        samples.sort_unstable_by(f64::total_cmp);
        samples.get(calls / 2).copied()
    };
    let quiet = median(1000);
    if std::thread::available_parallelism().map_or(1, |n| n.get()) < 2 {
        return (quiet, None);
    }
    let (running, stop) = (AtomicBool::new(false), AtomicBool::new(false));
    let busy = std::thread::scope(|scope| {
        let spinner = std::thread::Builder::new().name("limits-spin".into()).spawn_scoped(scope, || {
            running.store(true, Ordering::Release);
            while !stop.load(Ordering::Relaxed) {
                spin_loop();
            }
        });
        let figure = spinner.is_ok().then(|| {
            while !running.load(Ordering::Acquire) {
                std::thread::yield_now();
            }
            median(1000)
        });
        stop.store(true, Ordering::Relaxed);
        figure.flatten()
    });
    (quiet, busy)
}

fn membarrier(command: libc::c_int) -> bool {
    // SAFETY: membarrier takes three integers and touches no memory of ours.
    unsafe { libc::syscall(libc::SYS_membarrier, command, 0, 0) == 0 }
}

/// An anonymous private mapping, aligned to 2 MiB, unmapped on drop.
pub(super) struct Mapping {
    base: *mut libc::c_void,
    pub(super) bytes: usize,
}

impl Mapping {
    pub(super) fn new(bytes: usize, hugepages: bool) -> Result<Self, LimitsError> {
        let refused = |source| LimitsError::Map { bytes, source };
        let too_big = || refused(std::io::ErrorKind::OutOfMemory.into());
        let rounded = bytes.checked_next_multiple_of(HUGE).ok_or_else(too_big)?;
        let with_slack = rounded.checked_add(HUGE).ok_or_else(too_big)?;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new anonymous mapping at an address of the kernel's choice overlaps nothing.
        let raw = unsafe { libc::mmap(std::ptr::null_mut(), with_slack, protection, flags, -1, 0) };
        if raw == libc::MAP_FAILED {
            return Err(refused(std::io::Error::last_os_error()));
        }
        let head = raw.align_offset(HUGE);
        let tail = HUGE - head;
        let base = raw.wrapping_byte_add(head);
        // Trimmed, so that the timed munmap is of the populated range and nothing else.
        // SAFETY: head and tail lie in the mapping just made, outside the part that is kept.
        unsafe {
            if head > 0 {
                libc::munmap(raw, head);
            }
            if tail > 0 {
                libc::munmap(base.wrapping_byte_add(rounded), tail);
            }
        }
        let advice = if hugepages { libc::MADV_HUGEPAGE } else { libc::MADV_NOHUGEPAGE };
        // A kernel without transparent huge pages refuses the advice; `huge_bytes` then tells.
        // SAFETY: the range is ours, and this advice does not change contents.
        unsafe { libc::madvise(base, rounded, advice) };
        Ok(Self { base, bytes: rounded })
    }

    pub(super) fn entries(&mut self) -> &mut [u64] {
        // SAFETY: `base` is a live, page-aligned, zero-initialised mapping of `bytes` bytes that only we know.
        unsafe { std::slice::from_raw_parts_mut(self.base.cast(), self.bytes / 8) }
    }

    /// Maps the zero page everywhere, in one call where the kernel has it (5.14), else by reading.
    fn populate_read(&mut self) {
        // SAFETY: the range is ours, and populating for reading does not change contents.
        if unsafe { libc::madvise(self.base, self.bytes, libc::MADV_POPULATE_READ) } != 0 {
            for entry in self.entries().iter().step_by(PAGE / 8) {
                // SAFETY: a valid reference; volatile so that the read is made.
                black_box(unsafe { std::ptr::read_volatile(entry) });
            }
        }
    }

    /// How much of the mapping the kernel put on huge pages; 0 where it does not say.
    pub(super) fn huge_bytes(&self) -> usize {
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap_or_default();
        huge_bytes_in(&smaps, self.base as usize, self.bytes)
    }
}

/// Sums `AnonHugePages` of the areas in an smaps text that start within the range.
fn huge_bytes_in(smaps: &str, base: usize, bytes: usize) -> usize {
    let (mut inside, mut sum) = (false, 0);
    for line in smaps.lines() {
        if let Some(kib) = line.strip_prefix("AnonHugePages:") {
            let kib: usize = kib.trim().trim_end_matches("kB").trim().parse().unwrap_or(0);
            sum += if inside { kib << 10 } else { 0 };
        } else if let Some((start, _)) = line.split_once('-')
            && let Ok(start) = usize::from_str_radix(start, 16)
        {
            inside = (base..base.saturating_add(bytes)).contains(&start);
        }
    }
    sum
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range was mapped in `new`, and borrows of it cannot outlive `self`.
        unsafe { libc::munmap(self.base, self.bytes) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn huge_pages_are_counted_within_the_range_only() {
        let smaps = "1000-2000 rw-p 00000000 00:00 0 \nSize: 4 kB\nAnonHugePages:      2048 kB\n\
                     400000-800000 rw-p 00000000 00:00 0 \nAnonHugePages:      4096 kB\n\
                     800000-a00000 rw-p 00000000 00:00 0 [heap]\nAnonHugePages:      6144 kB\n";
        assert_eq!(huge_bytes_in(smaps, 0x40_0000, 0x40_0000), 4096 << 10);
        assert_eq!(huge_bytes_in(smaps, 0x40_0000, 0x60_0000), 10240 << 10);
        assert_eq!(huge_bytes_in("", 0, 1 << 40), 0);
    }
}
