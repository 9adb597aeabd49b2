//! How the host's scheduler is to treat the calling thread, and where.

use std::io;

/// Makes the calling thread a batch task: being woken, it does not take the CPU from whoever runs. A refusal costs latency, nothing else.
pub(crate) fn background() {
    // SAFETY: all zeroes is a valid sched_param (priority 0, the only one that SCHED_BATCH takes).
    let param: libc::sched_param = unsafe { std::mem::zeroed() };
    // SAFETY: acts on the calling thread only; `param` outlives the call.
    unsafe { libc::sched_setscheduler(0, libc::SCHED_BATCH, &param) };
}

/// The CPUs that the calling thread may run on, ascending; empty when the host does not say.
pub(crate) fn cpus() -> Vec<usize> {
    allowed(0).as_ref().map(numbers).unwrap_or_default()
}

/// The CPUs that the process's first thread may run on, which are what it was started with unless somebody bound that thread; empty when
/// the host does not say.
pub(crate) fn process_cpus() -> Vec<usize> {
    allowed(first_thread()).as_ref().map(numbers).unwrap_or_default()
}

/// Binds the calling thread to one CPU.
pub(crate) fn pin(cpu: usize) -> io::Result<()> {
    if cpu >= libc::CPU_SETSIZE as usize {
        let message = format!("CPU {cpu}: numbers end at {}", libc::CPU_SETSIZE - 1);
        return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
    }
    // SAFETY: all zeroes is the empty cpu_set_t.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: `cpu` was tested to be below CPU_SETSIZE.
    unsafe { libc::CPU_SET(cpu, &mut set) };
    run_on(&set)
}

/// Gives the calling thread the CPUs of [`process_cpus`].
pub(crate) fn unpin() -> io::Result<()> {
    run_on(&allowed(first_thread())?)
}

/// The thread that the process began with has the process's number.
fn first_thread() -> libc::pid_t {
    std::process::id() as libc::pid_t
}

/// The affinity of a thread; 0 is the caller.
fn allowed(thread: libc::pid_t) -> io::Result<libc::cpu_set_t> {
    // SAFETY: all zeroes is the empty cpu_set_t.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: reads; `set` outlives the call and is as large as the size given.
    if unsafe { libc::sched_getaffinity(thread, size_of_val(&set), &raw mut set) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(set)
}

fn numbers(set: &libc::cpu_set_t) -> Vec<usize> {
    // SAFETY: each number is below CPU_SETSIZE, as many as the set has bits.
    (0..libc::CPU_SETSIZE as usize).filter(|&cpu| unsafe { libc::CPU_ISSET(cpu, set) }).collect()
}

/// Sets the affinity of the calling thread.
fn run_on(set: &libc::cpu_set_t) -> io::Result<()> {
    // SAFETY: acts on the calling thread only; `set` outlives the call and is as large as the size given.
    if unsafe { libc::sched_setaffinity(0, size_of_val(set), set) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
