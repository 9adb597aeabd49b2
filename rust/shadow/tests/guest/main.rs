//! A guest with page tables of its own on shadow pages: faults, unsync pages, write tracking, walks without the lock.

mod lockless;
mod machine;
mod map;
mod sync;
mod track;
