//! vCPU mode, requests and kicks: how anybody makes all vCPUs leave the guest.
//!
//! **Guarantee.** When [`make_all_cpus_request`] with [`WAIT`] returns, each vCPU has either left the guest entry in which the request found it, or was not
//! in the guest; and none can enter before it has serviced the request. It has *not* been serviced yet, and a halted vCPU was not
//! woken ([`NO_WAKEUP`]): waiting for service would wait for ever on a paused one.
//!
//! **Mechanism.** One word per vCPU: the number of the guest entry and the mode. The pair of barriers:
//!
//! | requester | vCPU |
//! | --- | --- |
//! | set the request bit | mode := IN_GUEST |
//! | full barrier | full barrier |
//! | read the mode; if IN_GUEST: kick and wait | read the requests; if any: back out |
//!
//! One of the two sees the other's write. A vCPU that reads shadow pages without mmu_lock says so by the fourth mode (`READING_SHADOW_PAGE_TABLES`, Linux 3.5): outside of the guest, but
//! with interrupts off. Who only wants it out of the guest passes it by; who waits for delivery ([`WAIT`]: a flush, a reload) waits for it too, because whoever flushes before it frees shadow pages waits for just
//! that (`kvm_request_needs_ipi`). Nobody marks it: a real one takes the IPI when it turns interrupts on again, this one by writing OUTSIDE, and each reading is an entry with a number of its own.
//!
//! The kick turns IN_GUEST into EXITING (only one kicker need send it); the vCPU polls its mode
//! where a real one would take the interrupt. The wait is over when the word no longer names that entry: the next guest entry is a new number, so
//! a vCPU that re-enters at once is not waited for twice. A vCPU thread that the host preempts while in the guest has not acknowledged; a real one
//! would have exited. That wait is measured, not hidden.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use tdpmmu_platform::{Bug, Fault, Phase, Platform, Site, Task};
use tdpmmu_shadow::ModeWord;

/// Not in the guest.
pub const OUTSIDE: u64 = 0;
/// In the guest: translations are in use.
pub const IN_GUEST: u64 = 1;
/// In the guest, and kicked.
pub const EXITING: u64 = 2;
/// Outside of the guest, in a lockless walk of shadow pages.
pub const READING: u64 = 3;

const MODE_MASK: u64 = 3;
const ENTRY: u64 = 4;

/// Empty the TLB before the next entry (KVM_REQ_TLB_FLUSH).
pub const TLB_FLUSH: u64 = 1 << 0;
/// Free the cached roots that are obsolete (5.18 and later).
pub const FREE_OBSOLETE_ROOTS: u64 = 1 << 1;
/// Free every cached root (KVM_REQ_MMU_RELOAD, up to 5.17).
pub const RELOAD: u64 = 1 << 2;
/// Leave the run loop.
pub const STOP: u64 = 1 << 3;
/// Only leave the guest once.
pub const OUTSIDE_GUEST: u64 = 1 << 4;

/// Wait until no vCPU is in the guest entry in which the request found it.
pub const WAIT: u64 = 1 << 62;
/// Do not wake halted vCPUs.
pub const NO_WAKEUP: u64 = 1 << 63;

/// Spins before a waiting kicker sleeps: about as long as a vCPU needs to its next poll.
const SPINS: u32 = 200;
/// Sleep slice of a waiting kicker, against a lost hint.
const NAP_NS: u64 = 1_000_000;

/// What others may touch of a vCPU. Cache-line sized so that polling vCPUs do not disturb each other.
#[repr(align(128))]
#[derive(Debug, Default)]
pub struct VcpuState {
    mode: AtomicU64,
    requests: AtomicU64,
    /// Sleepers: kickers that wait for an exit.
    waiters: AtomicU32,
    exits: AtomicU32,
    /// Futex of the halted vCPU: odd while it sleeps.
    halt: AtomicU32,
}

impl VcpuState {
    /// The number of the current or last guest entry, and the mode.
    pub fn mode<P: Platform>(&self) -> (u64, u64) {
        let word = P::load(&self.mode, Site::VcpuMode);
        (word / ENTRY, word & MODE_MASK)
    }

    /// Is the vCPU in the guest (kicked or not)?
    pub fn in_guest<P: Platform>(&self) -> bool {
        matches!(self.mode::<P>().1, IN_GUEST | EXITING)
    }

    /// Is the vCPU in a lockless walk of shadow pages?
    pub fn reading<P: Platform>(&self) -> bool {
        self.mode::<P>().1 == READING
    }

    /// Tries to enter the guest: false when a request is pending, which must be serviced first. Only the vCPU's own thread calls it.
    pub fn enter_guest<P: Platform>(&self) -> bool {
        let word = P::load(&self.mode, Site::VcpuMode);
        P::store(&self.mode, (word & !MODE_MASK) + ENTRY + IN_GUEST, Site::VcpuMode);
        if !P::bug(Bug::B44a) {
            P::fence(Site::VcpuMode);
        }
        if P::load(&self.requests, Site::VcpuRequest) == 0 {
            return true;
        }
        self.exit_guest::<P>();
        false
    }

    /// Must the vCPU leave the guest now? One load of its own line.
    #[inline(always)]
    pub fn kicked<P: Platform>(&self) -> bool {
        P::load(&self.mode, Site::VcpuMode) & MODE_MASK != IN_GUEST
    }

    /// Leaves the guest. Everything that the guest did through its translations happens before.
    pub fn exit_guest<P: Platform>(&self) {
        let word =
            P::swap(&self.mode, P::load(&self.mode, Site::VcpuMode) & !MODE_MASK | OUTSIDE, Site::VcpuMode);
        if word & MODE_MASK == EXITING {
            P::locked(Site::VcpuKick);
            self.exits.fetch_add(1, Ordering::SeqCst);
            P::point(Site::VcpuKick);
            if self.waiters.load(Ordering::SeqCst) != 0 {
                P::futex_wake(&self.exits, u32::MAX);
            }
        }
    }

    /// Sets request bits without a kick.
    pub fn request<P: Platform>(&self, bits: u64) {
        let bits = bits & !(WAIT | NO_WAKEUP);
        if P::bug(Bug::B44c) {
            // Whatever is locked would be the freer's barrier.
            P::store(&self.requests, P::load(&self.requests, Site::VcpuRequest) | bits, Site::VcpuRequest);
            return;
        }
        P::fetch_or(&self.requests, bits, Site::VcpuRequest);
    }

    /// Is anything requested?
    #[inline]
    pub fn pending<P: Platform>(&self) -> bool {
        P::load(&self.requests, Site::VcpuRequest) != 0
    }

    /// Is one of `bits` requested?
    #[inline]
    pub fn is_requested<P: Platform>(&self, bits: u64) -> bool {
        P::load(&self.requests, Site::VcpuRequest) & bits != 0
    }

    /// Takes the requests of `bits`, to be serviced by the vCPU's own thread.
    pub fn take<P: Platform>(&self, bits: u64) -> u64 {
        if !self.is_requested::<P>(bits) {
            return 0;
        }
        P::fetch_and(&self.requests, !bits, Site::VcpuRequest) & bits
    }

    /// Sends the kick if the vCPU is in the guest; returns the entry that must end, if any. One that reads shadow pages counts for who `waits`, and is not marked.
    fn kick<P: Platform>(&self, waits: bool) -> Option<u64> {
        let word = P::load(&self.mode, Site::VcpuKick);
        match word & MODE_MASK {
            OUTSIDE => None,
            READING => waits.then_some(word / ENTRY),
            IN_GUEST => match P::cmpxchg(&self.mode, word, word - IN_GUEST + EXITING, Site::VcpuKick) {
                Ok(_) => Some(word / ENTRY),
                // It left, or another kicker was first; in either case the word says so now.
                Err(now) => {
                    (now & MODE_MASK == EXITING && now / ENTRY == word / ENTRY).then_some(word / ENTRY)
                }
            },
            _ => Some(word / ENTRY),
        }
    }

    /// Waits until the vCPU has ended the reading `entry`. It has interrupts off and waits for nothing, so the waiter stays awake, as who has sent an IPI does: the reader pays for no wake-up.
    fn wait_reading<P: Platform>(&self, entry: u64) {
        let mut looks = 0;
        while self.mode::<P>() == (entry, READING) {
            looks += 1;
            if P::SPINS && looks < SPINS {
                P::relax(Site::ReadingMode);
            } else {
                P::yield_cpu(Site::ReadingMode);
            }
        }
    }

    /// Waits until the vCPU is no longer in guest entry `entry`.
    fn wait_exit<P: Platform>(&self, entry: u64) {
        let gone = || {
            let word = P::load(&self.mode, Site::VcpuKick);
            word & MODE_MASK == OUTSIDE || word / ENTRY != entry
        };
        for _ in 0..if P::SPINS { SPINS } else { 0 } {
            if gone() {
                return;
            }
            P::relax(Site::VcpuKick);
        }
        P::locked(Site::VcpuKick);
        self.waiters.fetch_add(1, Ordering::SeqCst);
        loop {
            P::point(Site::VcpuKick);
            let exits = self.exits.load(Ordering::SeqCst);
            if gone() {
                break;
            }
            P::futex_wait(&self.exits, exits, Some(NAP_NS));
        }
        P::locked(Site::VcpuKick);
        self.waiters.fetch_sub(1, Ordering::SeqCst);
    }

    /// HLT: sleeps until woken, at most `timeout_ns`. True: woken. Requests alone do not wake, [`VcpuState::wake`] does.
    pub fn halt<P: Platform>(&self, timeout_ns: Option<u64>) -> bool {
        P::locked(Site::VcpuKick);
        let asleep = self.halt.fetch_add(1, Ordering::SeqCst).wrapping_add(1);
        if self.is_requested::<P>(STOP) {
            self.halt.fetch_add(1, Ordering::SeqCst);
            return true;
        }
        P::futex_wait(&self.halt, asleep, timeout_ns);
        P::locked(Site::VcpuKick);
        let woken = self.halt.load(Ordering::SeqCst) != asleep;
        if !woken {
            // Even again; a waker that comes in between makes it odd and is corrected by the next halt's compare.
            let _ = self.halt.compare_exchange(
                asleep,
                asleep.wrapping_add(1),
                Ordering::SeqCst,
                Ordering::SeqCst,
            );
        }
        woken
    }

    /// Is the vCPU halted?
    pub fn halted(&self) -> bool {
        self.halt.load(Ordering::SeqCst) & 1 == 1
    }

    /// Wakes a halted vCPU.
    pub fn wake<P: Platform>(&self) {
        P::locked(Site::VcpuKick);
        let now = self.halt.load(Ordering::SeqCst);
        if now & 1 == 1
            && self
                .halt
                .compare_exchange(now, now.wrapping_add(1), Ordering::SeqCst, Ordering::SeqCst)
                .is_ok()
        {
            P::futex_wake(&self.halt, 1);
        }
    }
}

/// The walker's half of the protocol; its barriers stand where they are argued, in the shadow MMU's reclamation.
impl ModeWord for VcpuState {
    fn begin_reading<P: Platform>(&self) {
        let word = P::load(&self.mode, Site::ReadingMode);
        debug_assert_eq!(
            word & MODE_MASK,
            OUTSIDE,
            "a lockless walk begins outside of the guest and of another walk"
        );
        P::store(&self.mode, (word & !MODE_MASK) + ENTRY + READING, Site::ReadingMode);
    }

    fn end_reading<P: Platform>(&self) {
        let word = P::load(&self.mode, Site::ReadingMode);
        P::store(&self.mode, word & !MODE_MASK | OUTSIDE, Site::ReadingMode);
    }
}

/// Fault injection: the caller stands still for as long as the fault says. Nothing on a platform without faults.
#[inline(always)]
pub(crate) fn pause<P: Platform>(fault: Fault, site: Site) {
    for _ in 0..P::inject_for(fault, site) {
        P::yield_cpu(site);
    }
}

/// What a request to all vCPUs met.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Kicks {
    /// vCPUs kicked or waited for because they were in the guest, or waited for because they read shadow pages.
    pub kicked: u32,
    /// Time from the first request bit to the last exit waited for, in nanoseconds.
    pub wait_ns: u64,
}

/// Makes request `bits` of every vCPU and kicks those in the guest; `bits` may carry [`WAIT`] and [`NO_WAKEUP`].
pub fn make_all_cpus_request<P: Platform, V: AsRef<VcpuState>>(
    task: &Task<P>,
    vcpus: &[V],
    bits: u64,
) -> Kicks {
    // Those of a flush are part of the flush.
    let _phase = (task.meter().phase() != Phase::Flush).then(|| task.phase(Phase::KickWait));
    let begin = P::ticks();
    let mut kicks = Kicks::default();
    if P::bug(Bug::C01) {
        for vcpu in vcpus {
            let _ = vcpu.as_ref().kick::<P>(true);
        }
    }
    for vcpu in vcpus {
        vcpu.as_ref().request::<P>(bits);
    }
    // Those who come now find their bit set, and are served by the same flush.
    if bits & TLB_FLUSH != 0 {
        pause::<P>(Fault::FlushMerge, Site::TlbFlush);
    }
    if !P::bug(Bug::B44c) {
        P::fence(Site::VcpuRequest);
    }
    if P::bug(Bug::C01) {
        return kicks;
    }
    for vcpu in vcpus {
        let vcpu = vcpu.as_ref();
        if bits & NO_WAKEUP == 0 {
            vcpu.wake::<P>();
        }
        kicks.kicked += u32::from(vcpu.kick::<P>(bits & WAIT != 0).is_some());
    }
    if kicks.kicked != 0 && bits & WAIT != 0 && !P::bug(Bug::C14) {
        // Second round: every kick is on its way before the first wait. Who is in the guest unkicked has entered since then,
        // saw its request first, and is neither kicked again nor waited for.
        for vcpu in vcpus {
            let vcpu = vcpu.as_ref();
            match vcpu.mode::<P>() {
                (entry, EXITING) => vcpu.wait_exit::<P>(entry),
                (entry, READING) => vcpu.wait_reading::<P>(entry),
                _ => {}
            }
        }
    }
    kicks.wait_ns = P::ticks_to_ns(P::ticks().saturating_sub(begin));
    kicks
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::sync::Arc;

    use tdpmmu_platform::{RcuConfig, RcuDomain, Real, Reclaim, Role, TaskConfig};

    use super::*;

    struct Nothing;

    impl Reclaim for Nothing {
        fn reclaim(&self, _head: u32) -> usize {
            0
        }
    }

    /// A vCPU that acts between the kicks and the waits: at the third look at it.
    struct Scripted {
        state: VcpuState,
        looks: Cell<u32>,
        re_enters: bool,
    }

    impl AsRef<VcpuState> for Scripted {
        fn as_ref(&self) -> &VcpuState {
            self.looks.set(self.looks.get() + 1);
            if self.looks.get() == 3 {
                self.state.exit_guest::<Real>();
                if self.re_enters {
                    self.state.take::<Real>(TLB_FLUSH);
                    assert!(self.state.enter_guest::<Real>());
                }
            }
            &self.state
        }
    }

    #[test]
    fn a_reader_of_shadow_pages_is_passed_by_unless_the_caller_waits_for_delivery() {
        let rcu =
            <Real as Platform>::Rcu::try_new(Arc::new(Nothing), RcuConfig::default()).expect("a thread");
        let task = Task::<Real>::new(&rcu, "kicker", Role::Caller, TaskConfig::default());
        let state = Arc::new(VcpuState::default());
        state.begin_reading::<Real>();
        assert!(state.reading::<Real>() && !state.in_guest::<Real>());
        let kicks = make_all_cpus_request(&task, std::slice::from_ref(&state), OUTSIDE_GUEST);
        assert_eq!((kicks.kicked, state.mode::<Real>()), (0, (1, READING)), "not waited for, not marked");
        let reader = {
            let state = Arc::clone(&state);
            std::thread::spawn(move || {
                // The request is there before anybody waits; the reading ends behind it, and another one begins.
                while !state.is_requested::<Real>(TLB_FLUSH) {
                    std::thread::yield_now();
                }
                state.end_reading::<Real>();
                state.begin_reading::<Real>();
                state.end_reading::<Real>();
            })
        };
        make_all_cpus_request(&task, std::slice::from_ref(&state), TLB_FLUSH | WAIT | NO_WAKEUP);
        assert_ne!(state.mode::<Real>(), (1, READING), "the reading that was met has ended");
        reader.join().expect("no panic");
        assert_eq!(state.mode::<Real>(), (2, OUTSIDE));
        assert!(!state.enter_guest::<Real>(), "the flush is still to be served");
    }

    #[test]
    fn a_kick_counts_though_the_vcpu_left_before_the_wait_and_its_next_entry_is_left_alone() {
        let rcu =
            <Real as Platform>::Rcu::try_new(Arc::new(Nothing), RcuConfig::default()).expect("a thread");
        let task = Task::<Real>::new(&rcu, "kicker", Role::Caller, TaskConfig::default());
        for re_enters in [false, true] {
            let vcpu = Scripted { state: VcpuState::default(), looks: Cell::new(0), re_enters };
            assert!(vcpu.state.enter_guest::<Real>());
            let kicks =
                make_all_cpus_request(&task, std::slice::from_ref(&vcpu), TLB_FLUSH | WAIT | NO_WAKEUP);
            assert_eq!(kicks.kicked, 1);
            let expected = if re_enters { (2, IN_GUEST) } else { (1, OUTSIDE) };
            assert_eq!(vcpu.state.mode::<Real>(), expected);
        }
    }
}
