//! Reserved address space: elements that are zero until touched and never move.

use std::io;
use std::marker::PhantomData;
use std::ptr::NonNull;

/// An element type that may be read when all its bytes are zero, and shared between threads: only atomics inside.
///
/// # Safety
/// The implementor is made of atomics only, so zero bytes are a valid value and `&T` from several threads is sound.
pub(crate) unsafe trait ZeroAtomic: Sync {}

// SAFETY: an array of atomics; zero is a valid u64.
unsafe impl ZeroAtomic for crate::Entries {}
// SAFETY: `TableMeta` consists of atomics only (meta.rs).
unsafe impl ZeroAtomic for crate::TableMeta {}

/// `len` elements in one anonymous private mapping, aligned to 2 MiB, committed page by page on first touch.
pub(crate) struct Arena<T: ZeroAtomic> {
    base: NonNull<T>,
    len: usize,
    map: NonNull<libc::c_void>,
    map_bytes: usize,
    element: PhantomData<T>,
}

// SAFETY: the mapping is owned by the arena and its elements are `Sync` atomics.
unsafe impl<T: ZeroAtomic> Send for Arena<T> {}
// SAFETY: as above; only `&T` is ever handed out.
unsafe impl<T: ZeroAtomic> Sync for Arena<T> {}

const HUGE: usize = 2 << 20;

/// By value and out of line: a formatted assertion would force the index to memory on every walk step.
#[cold]
#[inline(never)]
fn outside(index: u32) -> ! {
    panic!("table index {index} is outside the pool");
}

impl<T: ZeroAtomic> Arena<T> {
    /// Reserves room for `len` elements. No memory is committed.
    pub(crate) fn reserve(len: usize, huge: bool) -> io::Result<Self> {
        let bytes = len
            .checked_mul(size_of::<T>())
            .and_then(|b| b.max(1).checked_next_multiple_of(HUGE))
            .ok_or_else(|| io::Error::from_raw_os_error(libc::ENOMEM))?;
        let map_bytes = bytes.checked_add(HUGE).ok_or_else(|| io::Error::from_raw_os_error(libc::ENOMEM))?;
        // SAFETY: a fresh anonymous mapping at an address of the kernel's choice touches nothing that exists.
        let map = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                map_bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if map == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let map = NonNull::new(map).ok_or_else(|| io::Error::from_raw_os_error(libc::EFAULT))?;
        let skip = map.as_ptr().align_offset(HUGE);
        // SAFETY: `skip` < HUGE and the mapping is HUGE longer than `bytes`, so the pointer stays inside it.
        let base = unsafe { map.byte_add(skip) }.cast::<T>();
        if huge {
            // SAFETY: advice on our own mapping; it changes no contents. A refusal costs speed only.
            unsafe { libc::madvise(base.as_ptr().cast(), bytes, libc::MADV_HUGEPAGE) };
        }
        // A child after fork shares nothing with our threads; spare it the copy.
        // SAFETY: advice on our own mapping.
        unsafe { libc::madvise(map.as_ptr(), map_bytes, libc::MADV_DONTFORK) };
        Ok(Self { base, len, map, map_bytes, element: PhantomData })
    }

    /// The element at `index`; panics beyond the end (an index never comes from user input unchecked).
    #[inline(always)]
    pub(crate) fn get(&self, index: u32) -> &T {
        if index as usize >= self.len {
            outside(index);
        }
        // SAFETY: in bounds by the line above; the mapping lives as long as `self`; zero bytes are a valid T.
        unsafe { self.base.add(index as usize).as_ref() }
    }

    /// The element that begins `offset` bytes into the arena; panics beyond the end and in the middle of an element.
    #[inline(always)]
    pub(crate) fn at_offset(&self, offset: u64) -> &T {
        let size = size_of::<T>() as u64;
        if offset >= self.len as u64 * size || !offset.is_multiple_of(size) {
            outside((offset / size) as u32);
        }
        // SAFETY: an element boundary inside the mapping, by the line above; otherwise as in `get`.
        unsafe { self.base.byte_add(offset as usize).as_ref() }
    }

    /// Address of element `index`, for prefetch hints; may be out of bounds and is never dereferenced.
    #[inline(always)]
    pub(crate) fn address(&self, index: u32) -> *const T {
        self.base.as_ptr().wrapping_add(index as usize)
    }

    /// Element 0.
    pub(crate) fn base(&self) -> NonNull<T> {
        self.base
    }

    /// Elements there is room for.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Commits elements `[from, to)` now, so that no first touch falls into a measurement.
    pub(crate) fn commit(&self, from: usize, to: usize) -> io::Result<()> {
        let to = to.min(self.len);
        if from >= to {
            return Ok(());
        }
        let page = 4096;
        let begin = from * size_of::<T>() / page * page;
        let end = (to * size_of::<T>()).next_multiple_of(page);
        // SAFETY: the range lies inside our mapping (its length is a multiple of 2 MiB); MADV_POPULATE_WRITE prefaults
        // without changing contents.
        let rc = unsafe {
            libc::madvise(self.base.as_ptr().byte_add(begin).cast(), end - begin, libc::MADV_POPULATE_WRITE)
        };
        if rc == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        match error.raw_os_error() {
            // Before Linux 5.14 there is no such advice: the first touch stays where it falls.
            Some(libc::EINVAL) => Ok(()),
            _ => Err(error),
        }
    }
}

impl<T: ZeroAtomic> Drop for Arena<T> {
    fn drop(&mut self) {
        // SAFETY: the exact mapping made in `reserve`; `&T` borrows of it ended with the borrow of `self`.
        unsafe { libc::munmap(self.map.as_ptr(), self.map_bytes) };
    }
}
