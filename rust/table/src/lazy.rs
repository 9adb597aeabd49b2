//! Arrays of atomics that cost nothing until touched.
//!
//! **Guarantee.** A reserved array reads as zero, never moves, and commits a page of memory on the first touch of that page. What is kept
//! per frame or per gfn (an owner tag, a dirty bit, a reverse map) is indexed by number over a whole address space, so the size
//! reserved says nothing about the size used.

use std::io;
use std::marker::PhantomData;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64};

/// Element types for which all-zero bytes are a value and `&T` may be shared between threads.
///
/// # Safety
/// The implementor is an atomic integer.
pub unsafe trait ZeroAtomic: Sync {}
// SAFETY: an atomic integer.
unsafe impl ZeroAtomic for AtomicU8 {}
// SAFETY: an atomic integer.
unsafe impl ZeroAtomic for AtomicU32 {}
// SAFETY: an atomic integer.
unsafe impl ZeroAtomic for AtomicU64 {}

/// `len` zeroed atomics in an anonymous mapping without reservation of memory.
pub struct Lazy<T: ZeroAtomic> {
    base: NonNull<T>,
    len: usize,
    element: PhantomData<T>,
}

// SAFETY: the mapping is owned and its elements are `Sync` atomics.
unsafe impl<T: ZeroAtomic> Send for Lazy<T> {}
// SAFETY: only `&T` is handed out.
unsafe impl<T: ZeroAtomic> Sync for Lazy<T> {}

impl<T: ZeroAtomic> Lazy<T> {
    /// Reserves room for `len` elements (at least one).
    ///
    /// # Errors
    /// What the host says when it refuses the address space.
    pub fn new(len: usize) -> io::Result<Self> {
        let len = len.max(1);
        let bytes =
            len.checked_mul(size_of::<T>()).ok_or_else(|| io::Error::from_raw_os_error(libc::ENOMEM))?;
        // SAFETY: a fresh anonymous mapping at an address of the kernel's choice touches nothing that exists.
        let map = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if map == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: advice on our own mapping. Small pages: the arrays are touched sparsely.
        unsafe { libc::madvise(map, bytes, libc::MADV_NOHUGEPAGE) };
        let base = NonNull::new(map.cast::<T>()).ok_or_else(|| io::Error::from_raw_os_error(libc::EFAULT))?;
        Ok(Self { base, len, element: PhantomData })
    }

    /// Elements reserved.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.len
    }

    /// The element at `index`, or `None` beyond the end.
    #[inline(always)]
    pub fn get(&self, index: usize) -> Option<&T> {
        if index < self.len {
            // SAFETY: in bounds by the line above; the mapping lives as long as `self`; zero bytes are a valid atomic.
            Some(unsafe { self.base.add(index).as_ref() })
        } else {
            None
        }
    }

    /// The elements `[from, to)`, cut to what exists.
    #[inline]
    pub fn slice(&self, from: usize, to: usize) -> &[T] {
        let to = to.min(self.len);
        if from >= to {
            return &[];
        }
        // SAFETY: `from < to <= len`, so the range lies in the mapping, which lives as long as `self`; zero bytes are valid.
        unsafe { std::slice::from_raw_parts(self.base.add(from).as_ptr(), to - from) }
    }
}

impl<T: ZeroAtomic> Drop for Lazy<T> {
    fn drop(&mut self) {
        // SAFETY: the exact mapping made in `new`; borrows of it ended with the borrow of `self`.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.len * size_of::<T>()) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::Ordering::Relaxed;

    #[test]
    fn a_huge_array_reads_zero_and_keeps_what_is_written() {
        let array: Lazy<AtomicU64> = Lazy::new(1 << 32).expect("32 GiB of address space");
        let far = array.get((1 << 32) - 1).expect("in bounds");
        assert_eq!(far.load(Relaxed), 0);
        far.store(7, Relaxed);
        assert_eq!(array.slice((1 << 32) - 2, 1 << 33).iter().map(|w| w.load(Relaxed)).sum::<u64>(), 7);
        assert!(array.get(1 << 32).is_none());
    }
}
