//! Page-table crates: map, translate, unmap and tear down the same pages in the same order.
//!
//! Guest page `i` is at `i * 4096` and is mapped to frame number `FRAME_BASE + i`: four levels of the x86-64 format,
//! 4 KiB leaves, tables out of an [`Arena`]. Both crates work on `&mut`: no locked instruction, no concurrent reader,
//! nothing deferred. Each phase is checked: a wrong frame, a page that survives, or a table that does not come back
//! is an error and not a row.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::{Duration, Instant};

use crate::arena::{Arena, PAGE};
use crate::harness::{BenchError, Sample, Work};

/// Physical address of guest page 0's frame; above any table, so that a mix-up shows.
const FRAME_BASE: u64 = 1 << 48;
/// An odd stride visits every page of a power of two once, far apart from the one before.
pub const STRIDE: u64 = 0x9e37_79b9;

/// What every page-table implementation here can be asked.
pub trait PageTables: Sized {
    const NAME: &'static str;
    /// An empty tree of four levels.
    fn new(arena: Rc<Arena>) -> Result<Self, BenchError>;
    /// Maps pages `0..pages` ascending; how many were mapped.
    fn map(&mut self, pages: u64) -> u64;
    /// The physical address behind a guest address, or 0.
    fn translate(&self, address: u64) -> u64;
    /// Unmaps pages `0..pages` ascending and keeps the tables; how many were mapped.
    fn unmap(&mut self, pages: u64) -> u64;
    /// Gives every table back to the arena. Pages are unmapped before.
    fn free_tables(self);
}

/// The five rows of one implementation over `pages` pages, which must be a power of two.
///
/// # Errors
/// [`BenchError::WorkNotDone`], [`BenchError::NoMemory`].
pub fn samples<T: PageTables>(pages: u64, reps: u32) -> Result<Vec<Sample>, BenchError> {
    let leaf_tables = pages.div_ceil(512) as usize;
    let arena = Rc::new(Arena::new(leaf_tables + leaf_tables.div_ceil(512) + 512)?);
    let mut best = [Duration::MAX; 5];
    for _ in 0..reps {
        let times = one_life::<T>(&arena, pages)?;
        for (best, time) in best.iter_mut().zip(times) {
            *best = time.min(*best);
        }
        arena.reset();
    }
    let works = [Work::Map, Work::Translate, Work::TranslateRandom, Work::Unmap, Work::Teardown];
    let sample = |(work, time): (Work, Duration)| Sample {
        work,
        name: T::NAME,
        ns: time.as_nanos() as f64 / pages as f64,
        count: pages,
    };
    Ok(works.into_iter().zip(best).map(sample).collect())
}

/// A tree from empty to freed, each phase timed and checked.
fn one_life<T: PageTables>(arena: &Rc<Arena>, pages: u64) -> Result<[Duration; 5], BenchError> {
    let check = |work, what, got: u64, expected: u64| {
        if got == expected {
            return Ok(());
        }
        Err(BenchError::WorkNotDone { work, name: T::NAME, what, got, expected })
    };
    let sum_of_frames = (0..pages).fold(0u64, |sum, page| sum.wrapping_add(FRAME_BASE + page * PAGE as u64));
    let mut tree = T::new(Rc::clone(arena))?;

    let start = Instant::now();
    let mapped = tree.map(pages);
    let map = start.elapsed();
    check(Work::Map, "pages mapped", mapped, pages)?;

    let start = Instant::now();
    let sum = (0..pages).fold(0u64, |sum, page| sum.wrapping_add(tree.translate(page * PAGE as u64)));
    let translate = start.elapsed();
    check(Work::Translate, "sum of frames", sum, sum_of_frames)?;

    let start = Instant::now();
    let scattered = (0..pages).map(|i| i.wrapping_mul(STRIDE) & (pages - 1));
    let sum = scattered.fold(0u64, |sum, page| sum.wrapping_add(tree.translate(page * PAGE as u64)));
    let random = start.elapsed();
    check(Work::TranslateRandom, "sum of frames", sum, sum_of_frames)?;

    let start = Instant::now();
    let unmapped = tree.unmap(pages);
    let unmap = start.elapsed();
    check(Work::Unmap, "pages unmapped", unmapped, pages)?;
    let left = (0..pages).filter(|page| tree.translate(page * PAGE as u64) != 0).count();
    check(Work::Unmap, "pages left", left as u64, 0)?;

    let start = Instant::now();
    tree.free_tables();
    let free = start.elapsed();
    check(Work::Teardown, "tables freed", arena.freed(), arena.allocated())?;
    Ok([map, translate, random, unmap, unmap + free])
}

/// `x86_64`: `OffsetPageTable`, a typed call per page.
pub mod x86_64_crate {
    use super::*;
    use ::x86_64::structures::paging::mapper::CleanUp;
    use ::x86_64::structures::paging::{
        FrameAllocator, FrameDeallocator, Mapper, OffsetPageTable, Page, PageTable, PageTableFlags,
        PhysFrame, Size4KiB, Translate,
    };
    use ::x86_64::{PhysAddr, VirtAddr};

    /// The crate's tree over an arena.
    pub struct Tree {
        mapper: OffsetPageTable<'static>,
        root: usize,
        frames: Frames,
    }

    struct Frames(Rc<Arena>);

    // SAFETY: the arena hands out each frame once between two resets.
    unsafe impl FrameAllocator<Size4KiB> for Frames {
        fn allocate_frame(&mut self) -> Option<PhysFrame> {
            self.0.alloc().map(|at| PhysFrame::containing_address(PhysAddr::new(at as u64)))
        }
    }

    impl FrameDeallocator<Size4KiB> for Frames {
        unsafe fn deallocate_frame(&mut self, frame: PhysFrame) {
            self.0.free(frame.start_address().as_u64() as usize);
        }
    }

    fn page(index: u64) -> Page {
        Page::containing_address(VirtAddr::new_truncate(index * PAGE as u64))
    }

    impl PageTables for Tree {
        const NAME: &'static str = "x86_64";

        fn new(arena: Rc<Arena>) -> Result<Self, BenchError> {
            let root = arena.alloc().ok_or_else(|| out_of_frames(&arena))?;
            // SAFETY: a fresh frame of the arena, aligned to 4096, which `Tree` keeps alive and nobody else uses.
            let table = unsafe { &mut *std::ptr::with_exposed_provenance_mut::<PageTable>(root) };
            table.zero();
            // SAFETY: a frame's physical address is its virtual one, so the offset is zero for every table.
            let mapper = unsafe { OffsetPageTable::new(table, VirtAddr::new(0)) };
            Ok(Self { mapper, root, frames: Frames(arena) })
        }

        fn map(&mut self, pages: u64) -> u64 {
            let flags = PageTableFlags::PRESENT | PageTableFlags::WRITABLE;
            let mut mapped = 0;
            for index in 0..pages {
                let frame = PhysFrame::containing_address(PhysAddr::new(FRAME_BASE + index * PAGE as u64));
                // SAFETY: no CPU walks this tree, so no mapping in it gives access to anything.
                match unsafe { self.mapper.map_to(page(index), frame, flags, &mut self.frames) } {
                    Ok(flush) => flush.ignore(),
                    Err(_) => break,
                }
                mapped += 1;
            }
            mapped
        }

        fn translate(&self, address: u64) -> u64 {
            self.mapper.translate_addr(VirtAddr::new_truncate(address)).map_or(0, PhysAddr::as_u64)
        }

        fn unmap(&mut self, pages: u64) -> u64 {
            let mut unmapped = 0;
            for index in 0..pages {
                if let Ok((_, flush)) = self.mapper.unmap(page(index)) {
                    flush.ignore();
                    unmapped += 1;
                }
            }
            unmapped
        }

        fn free_tables(mut self) {
            // SAFETY: every table of the tree came from the arena, and is linked once.
            unsafe { self.mapper.clean_up(&mut self.frames) };
            self.frames.0.free(self.root);
        }
    }
}

/// `page_table_multiarch`: one call for the whole region.
pub mod multiarch {
    use super::*;
    use page_table_multiarch::x86_64::X64PageTable;
    use page_table_multiarch::{MappingFlags, PagingHandler};

    type PhysAddr = memory_addr::PhysAddr;
    type VirtAddr = memory_addr::VirtAddr;

    thread_local! {
        /// The crate's handler has no `self`: the arena of the tree this thread works on.
        static ARENA: RefCell<Option<Rc<Arena>>> = const { RefCell::new(None) };
    }

    struct Frames;

    impl PagingHandler for Frames {
        fn alloc_frames(num: usize, align: usize) -> Option<PhysAddr> {
            if num != 1 || align != PAGE {
                return None;
            }
            ARENA.with_borrow(|arena| arena.as_ref()?.alloc()).map(PhysAddr::from)
        }

        fn dealloc_frames(at: PhysAddr, _num: usize) {
            ARENA.with_borrow(|arena| {
                if let Some(arena) = arena {
                    arena.free(at.into());
                }
            });
        }

        fn phys_to_virt(at: PhysAddr) -> VirtAddr {
            VirtAddr::from(usize::from(at))
        }
    }

    /// The crate's tree over an arena.
    pub struct Tree(X64PageTable<Frames>);

    impl PageTables for Tree {
        const NAME: &'static str = "page_table_multiarch";

        fn new(arena: Rc<Arena>) -> Result<Self, BenchError> {
            ARENA.set(Some(Rc::clone(&arena)));
            X64PageTable::try_new().map(Self).map_err(|_| out_of_frames(&arena))
        }

        fn map(&mut self, pages: u64) -> u64 {
            let flags = MappingFlags::READ | MappingFlags::WRITE;
            let frame = |at: VirtAddr| PhysAddr::from(FRAME_BASE as usize + usize::from(at));
            let size = pages as usize * PAGE;
            let done = self.0.cursor().map_region(VirtAddr::from(0), frame, size, flags, false);
            if done.is_ok() { pages } else { 0 }
        }

        fn translate(&self, address: u64) -> u64 {
            self.0.query(VirtAddr::from(address as usize)).map_or(0, |(at, ..)| usize::from(at) as u64)
        }

        fn unmap(&mut self, pages: u64) -> u64 {
            let done = self.0.cursor().unmap_region(VirtAddr::from(0), pages as usize * PAGE);
            if done.is_ok() { pages } else { 0 }
        }

        fn free_tables(self) {
            drop(self);
        }
    }
}

fn out_of_frames(arena: &Arena) -> BenchError {
    let bytes = arena.allocated() as usize * PAGE;
    BenchError::NoMemory { bytes, source: std::io::ErrorKind::OutOfMemory.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lives<T: PageTables>() {
        let rows = samples::<T>(1 << 12, 2).unwrap();
        assert_eq!(rows.len(), 5);
        assert!(rows.iter().all(|row| row.ns > 0.0 && row.count == 1 << 12));
    }

    #[test]
    fn x86_64_does_the_work() {
        lives::<x86_64_crate::Tree>();
    }

    #[test]
    fn page_table_multiarch_does_the_work() {
        lives::<multiarch::Tree>();
    }

    /// A tree that forgets: each of its shortcuts must be refused.
    struct Lazy<const FAULT: u8>(Rc<Arena>, u64);

    impl<const FAULT: u8> PageTables for Lazy<FAULT> {
        const NAME: &'static str = "lazy";
        fn new(arena: Rc<Arena>) -> Result<Self, BenchError> {
            arena.alloc();
            Ok(Self(arena, 0))
        }
        fn map(&mut self, pages: u64) -> u64 {
            self.1 = pages;
            pages - u64::from(FAULT == 0)
        }
        fn translate(&self, address: u64) -> u64 {
            let there = address / (PAGE as u64) < self.1;
            if there { FRAME_BASE + address * u64::from(FAULT != 1) } else { 0 }
        }
        fn unmap(&mut self, pages: u64) -> u64 {
            self.1 = u64::from(FAULT == 2);
            pages
        }
        fn free_tables(self) {
            if FAULT != 3 {
                self.0.free(0);
            }
        }
    }

    #[test]
    fn work_that_was_not_done_is_no_row() {
        let what = |result: Result<Vec<Sample>, BenchError>| match result {
            Err(BenchError::WorkNotDone { what, .. }) => what,
            other => panic!("{other:?}"),
        };
        assert_eq!(what(samples::<Lazy<0>>(64, 1)), "pages mapped");
        assert_eq!(what(samples::<Lazy<1>>(64, 1)), "sum of frames");
        assert_eq!(what(samples::<Lazy<2>>(64, 1)), "pages left");
        assert_eq!(what(samples::<Lazy<3>>(64, 1)), "tables freed");
        assert!(samples::<Lazy<4>>(64, 1).is_ok());
    }
}
