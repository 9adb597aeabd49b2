//! The loops behind the memory limits: every operation, in every width the CPU has.
//!
//! A loop does its operation on each entry of a slice and nothing else. What it read it folds, so that no load can be
//! dropped and a test can tell whether an entry was skipped.

use std::sync::atomic::{AtomicU64, Ordering};

/// Most that one round covers per thread. A few milliseconds: long beside a thread's wake-up, short beside the
/// budget, so that the minimum is over many rounds.
const WINDOW_BYTES: usize = 32 << 20;
/// The same for the locked operations, which are ten times slower.
const LOCKED_WINDOW_BYTES: usize = 8 << 20;
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Op {
    Swap,
    Cmpxchg,
    Read,
    Write,
    WriteNt,
}

impl Op {
    pub(super) const ALL: [Op; 5] = [Op::Swap, Op::Cmpxchg, Op::Read, Op::Write, Op::WriteNt];

    pub(super) fn name(self) -> &'static str {
        match self {
            Op::Swap => "swap",
            Op::Cmpxchg => "cmpxchg",
            Op::Read => "read",
            Op::Write => "write",
            Op::WriteNt => "write_nt",
        }
    }

    fn locked(self) -> bool {
        matches!(self, Op::Swap | Op::Cmpxchg)
    }

    pub(super) fn weight(self) -> u32 {
        if self.locked() { 2 } else { 1 }
    }

    pub(super) fn window_bytes(self) -> usize {
        if self.locked() { LOCKED_WINDOW_BYTES } else { WINDOW_BYTES }
    }

    /// The loops this CPU can run for the operation.
    pub(super) fn candidates(self) -> Vec<Loop> {
        let mut list: Vec<Loop> = match self {
            Op::Swap => vec![Loop { name: "xchg", run: swap_loop }],
            Op::Cmpxchg => vec![Loop { name: "cmpxchg", run: cmpxchg_loop }],
            Op::Read => vec![Loop { name: "scalar", run: read_scalar }],
            Op::Write => vec![Loop { name: "scalar", run: write_scalar }],
            Op::WriteNt if cfg!(target_arch = "x86_64") => Vec::new(),
            Op::WriteNt => vec![Loop { name: "scalar", run: write_scalar }],
        };
        #[cfg(target_arch = "x86_64")]
        x86::add_candidates(self, &mut list);
        list
    }
}

/// A loop over every entry of a slice whose length is a multiple of 512. Returns a fold of what it read.
#[derive(Clone, Copy)]
pub(super) struct Loop {
    pub(super) name: &'static str,
    /// Unsafe to call without the CPU features that the variant is compiled for.
    pub(super) run: unsafe fn(&mut [u64], u64) -> u64,
}

fn swap_loop(part: &mut [u64], value: u64) -> u64 {
    let mut acc = [0u64; 8];
    for line in atomics(part).as_chunks::<8>().0 {
        for (acc, cell) in acc.iter_mut().zip(line) {
            *acc ^= cell.swap(value, Ordering::SeqCst);
        }
    }
    acc.iter().fold(0, |a, b| a ^ b)
}

fn cmpxchg_loop(part: &mut [u64], value: u64) -> u64 {
    let mut acc = [0u64; 8];
    for line in atomics(part).as_chunks::<8>().0 {
        for (acc, cell) in acc.iter_mut().zip(line) {
            let old = cell.load(Ordering::Acquire);
            let (Ok(seen) | Err(seen)) =
                cell.compare_exchange(old, value, Ordering::SeqCst, Ordering::Acquire);
            *acc ^= seen;
        }
    }
    acc.iter().fold(0, |a, b| a ^ b)
}

fn read_scalar(part: &mut [u64], _: u64) -> u64 {
    let mut acc = [0u64; 8];
    for line in atomics(part).as_chunks::<8>().0 {
        // Relaxed atomic loads are plain moves that the compiler will not merge into vectors.
        for (acc, cell) in acc.iter_mut().zip(line) {
            *acc ^= cell.load(Ordering::Relaxed);
        }
    }
    acc.iter().fold(0, |a, b| a ^ b)
}

fn write_scalar(part: &mut [u64], value: u64) -> u64 {
    for line in atomics(part).as_chunks::<8>().0 {
        for cell in line {
            cell.store(value, Ordering::Release);
        }
    }
    0
}

fn atomics(part: &mut [u64]) -> &[AtomicU64] {
    // SAFETY: AtomicU64 has the size, alignment and bit validity of u64, and the exclusive borrow is given up for
    // the life of the result, so every access in that time is atomic.
    unsafe { &*(std::ptr::from_mut(part) as *const [AtomicU64]) }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{Loop, Op};
    use std::arch::x86_64::*;

    /// Entries ahead of the access that the prefetching variants ask for: one table.
    const AHEAD: usize = 512;

    pub(super) fn add_candidates(op: Op, list: &mut Vec<Loop>) {
        let avx2 = is_x86_feature_detected!("avx2");
        let avx512 = is_x86_feature_detected!("avx512f");
        match op {
            Op::Swap | Op::Cmpxchg => {}
            Op::Read => {
                if avx2 {
                    list.push(Loop { name: "avx2", run: read_avx2::<false> });
                    list.push(Loop { name: "avx2+prefetch", run: read_avx2::<true> });
                }
                if avx512 {
                    list.push(Loop { name: "avx512", run: read_avx512::<false> });
                    list.push(Loop { name: "avx512+prefetch", run: read_avx512::<true> });
                }
            }
            Op::Write => {
                if avx2 {
                    list.push(Loop { name: "avx2", run: write_avx2::<false> });
                    list.push(Loop { name: "avx2+prefetch", run: write_avx2::<true> });
                }
                if avx512 {
                    list.push(Loop { name: "avx512", run: write_avx512::<false> });
                    list.push(Loop { name: "avx512+prefetch", run: write_avx512::<true> });
                }
            }
            Op::WriteNt => {
                list.push(Loop { name: "movnti", run: write_nt_scalar });
                if avx512 {
                    list.push(Loop { name: "avx512-nt", run: write_nt_avx512 });
                }
            }
        }
    }

    /// A prefetch is a hint: the address need not be mapped, and may lie past the end of the slice.
    #[inline(always)]
    fn prefetch(line: &[u64; 8]) {
        // SAFETY: prefetch instructions never fault, whatever the address.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().wrapping_add(AHEAD).cast()) }
    }

    #[target_feature(enable = "avx2")]
    fn read_avx2<const PREFETCH: bool>(part: &mut [u64], _: u64) -> u64 {
        let mut acc = [_mm256_setzero_si256(); 4];
        for [even, odd] in part.as_chunks::<8>().0.as_chunks::<2>().0 {
            if PREFETCH {
                prefetch(even);
                prefetch(odd);
            }
            // SAFETY: each pointer is to four entries within its line of eight.
            let halves = unsafe {
                [
                    _mm256_loadu_si256(even.as_ptr().cast()),
                    _mm256_loadu_si256(even[4..].as_ptr().cast()),
                    _mm256_loadu_si256(odd.as_ptr().cast()),
                    _mm256_loadu_si256(odd[4..].as_ptr().cast()),
                ]
            };
            for (acc, half) in acc.iter_mut().zip(halves) {
                *acc = _mm256_xor_si256(*acc, half);
            }
        }
        let all = _mm256_xor_si256(_mm256_xor_si256(acc[0], acc[1]), _mm256_xor_si256(acc[2], acc[3]));
        let mut out = [0u64; 4];
        // SAFETY: `out` holds 32 bytes.
        unsafe { _mm256_storeu_si256(out.as_mut_ptr().cast(), all) };
        out.iter().fold(0, |a, b| a ^ b)
    }

    #[target_feature(enable = "avx512f")]
    fn read_avx512<const PREFETCH: bool>(part: &mut [u64], _: u64) -> u64 {
        let mut acc = [_mm512_setzero_si512(); 4];
        for lines in part.as_chunks::<8>().0.as_chunks::<4>().0 {
            for (acc, line) in acc.iter_mut().zip(lines) {
                if PREFETCH {
                    prefetch(line);
                }
                // SAFETY: a line is eight entries, 64 bytes.
                *acc = _mm512_xor_si512(*acc, unsafe { _mm512_loadu_si512(line.as_ptr().cast()) });
            }
        }
        let all = _mm512_xor_si512(_mm512_xor_si512(acc[0], acc[1]), _mm512_xor_si512(acc[2], acc[3]));
        let mut out = [0u64; 8];
        // SAFETY: `out` holds 64 bytes.
        unsafe { _mm512_storeu_si512(out.as_mut_ptr().cast(), all) };
        out.iter().fold(0, |a, b| a ^ b)
    }

    #[target_feature(enable = "avx2")]
    fn write_avx2<const PREFETCH: bool>(part: &mut [u64], value: u64) -> u64 {
        let vector = _mm256_set1_epi64x(value.cast_signed());
        for line in part.as_chunks_mut::<8>().0 {
            if PREFETCH {
                prefetch_write(line);
            }
            let at: *mut __m256i = line.as_mut_ptr().cast();
            // SAFETY: a line is eight entries, two vectors of 32 bytes, borrowed exclusively.
            unsafe {
                _mm256_storeu_si256(at, vector);
                _mm256_storeu_si256(at.add(1), vector);
            }
        }
        0
    }

    #[target_feature(enable = "avx512f")]
    fn write_avx512<const PREFETCH: bool>(part: &mut [u64], value: u64) -> u64 {
        let vector = _mm512_set1_epi64(value.cast_signed());
        for line in part.as_chunks_mut::<8>().0 {
            if PREFETCH {
                prefetch_write(line);
            }
            // SAFETY: a line is eight entries, 64 bytes, borrowed exclusively.
            unsafe { _mm512_storeu_si512(line.as_mut_ptr().cast(), vector) };
        }
        0
    }

    #[inline(always)]
    fn prefetch_write(line: &[u64; 8]) {
        // SAFETY: prefetch instructions never fault, whatever the address.
        unsafe { _mm_prefetch::<_MM_HINT_ET0>(line.as_ptr().wrapping_add(AHEAD).cast()) }
    }

    #[target_feature(enable = "sse2")]
    fn write_nt_scalar(part: &mut [u64], value: u64) -> u64 {
        for entry in part.iter_mut() {
            // SAFETY: the entry is aligned and borrowed exclusively, and the fence below orders it.
            unsafe { _mm_stream_si64(std::ptr::from_mut(entry).cast(), value.cast_signed()) };
        }
        _mm_sfence();
        0
    }

    #[target_feature(enable = "avx512f")]
    fn write_nt_avx512(part: &mut [u64], value: u64) -> u64 {
        let vector = _mm512_set1_epi64(value.cast_signed());
        // A non-temporal vector store wants an aligned line.
        // SAFETY: eight u64 are an __m512i of any bit pattern, and the middle part is aligned for it.
        let (head, lines, tail) = unsafe { part.align_to_mut::<__m512i>() };
        for line in lines {
            // SAFETY: the line is aligned to 64 bytes and borrowed exclusively; the fence below orders the store.
            unsafe { _mm512_stream_si512(line, vector) };
        }
        head.fill(value);
        tail.fill(value);
        _mm_sfence();
        0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_loop_touches_every_entry() {
        for op in Op::ALL {
            for Loop { name, run } in op.candidates() {
                let mut part: Vec<u64> =
                    (0..1024u64).map(|i| i.wrapping_mul(0x9e37_79b9_7f4a_7c15)).collect();
                let fold = part.iter().fold(0, |a, b| a ^ b);
                // SAFETY: candidates lists what the CPU has.
                let got = unsafe { run(&mut part, 7) };
                if matches!(op, Op::Read | Op::Swap | Op::Cmpxchg) {
                    assert_eq!(got, fold, "{op:?} {name} did not read every entry");
                }
                if op != Op::Read {
                    assert!(part.iter().all(|&entry| entry == 7), "{op:?} {name} left an entry");
                }
            }
        }
    }
}
