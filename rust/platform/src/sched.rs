//! How the host's scheduler is to treat the calling thread.

/// Makes the calling thread a batch task: being woken, it does not take the CPU from whoever runs. A refusal costs latency, nothing else.
pub(crate) fn background() {
    // SAFETY: all zeroes is a valid sched_param (priority 0, the only one that SCHED_BATCH takes).
    let param: libc::sched_param = unsafe { std::mem::zeroed() };
    // SAFETY: acts on the calling thread only; `param` outlives the call.
    unsafe { libc::sched_setscheduler(0, libc::SCHED_BATCH, &param) };
}
