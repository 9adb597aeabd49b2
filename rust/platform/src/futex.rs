//! The futex system call, private to the process.

use std::{ptr, sync::atomic::AtomicU32};

/// Sleeps while `cell` holds `expected`, at most `timeout_ns`. May return early: callers check and loop.
pub(crate) fn wait(cell: &AtomicU32, expected: u32, timeout_ns: Option<u64>) {
    let limit = timeout_ns.map(|ns| libc::timespec {
        tv_sec: (ns / 1_000_000_000) as libc::time_t,
        tv_nsec: (ns % 1_000_000_000) as libc::c_long,
    });
    let limit_ptr = limit.as_ref().map_or(ptr::null(), ptr::from_ref);
    // SAFETY: FUTEX_WAIT reads the aligned u32 behind `cell` and the timespec behind `limit_ptr`; both outlive the
    // call, and the kernel writes to neither. Every error (EAGAIN, EINTR, ETIMEDOUT) means "look again".
    unsafe {
        libc::syscall(
            libc::SYS_futex,
            cell.as_ptr(),
            libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG,
            expected,
            limit_ptr,
        );
    }
}

/// Wakes up to `count` sleepers of `cell`; returns how many were woken.
pub(crate) fn wake(cell: &AtomicU32, count: u32) -> u32 {
    // SAFETY: FUTEX_WAKE uses the address as a key only; the kernel takes an int, so the count is capped.
    let woken = unsafe {
        libc::syscall(
            libc::SYS_futex,
            cell.as_ptr(),
            libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG,
            count.min(i32::MAX as u32),
        )
    };
    woken.max(0) as u32
}
