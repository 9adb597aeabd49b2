//! RCU: a read section, deferred freeing, grace periods.

use std::sync::Arc;
use std::sync::atomic::AtomicU32;

use tdpmmu_platform::{NIL, Platform, RcuConfig, RcuDomain, Reclaim, Role as TaskRole, Task, TaskConfig};

use super::{Bench, P};
use crate::LabError;

impl Bench<'_> {
    pub(super) fn rcu(&mut self) -> Result<(), LabError> {
        const SECTIONS: u64 = 1 << 22;
        const CHAIN: usize = 1 << 16;
        let links: Arc<Links> = Arc::new(Links((0..CHAIN).map(|_| AtomicU32::new(NIL)).collect()));
        let rcu = <P as Platform>::Rcu::new(links.clone(), RcuConfig::default());
        let task = Task::<P>::new(&rcu, "reader", TaskRole::Observer, TaskConfig::default());
        self.best("read section, enter + leave", None, Some(0.5), || {
            let begin = P::ticks();
            for _ in 0..SECTIONS {
                let guard = task.rcu_read();
                // What is read inside must not move out; the guard itself may stay in registers.
                std::sync::atomic::compiler_fence(std::sync::atomic::Ordering::SeqCst);
                drop(guard);
            }
            Ok((P::ticks_to_ns(P::ticks() - begin), SECTIONS))
        })?;
        self.best("defer, one at a time, until reclaimed", None, None, || {
            let begin = P::ticks();
            for id in 0..CHAIN {
                rcu.defer(id as u32, &links.0[id], 1);
            }
            rcu.barrier();
            Ok((P::ticks_to_ns(P::ticks() - begin), CHAIN as u64))
        })?;
        self.best("synchronize, no reader inside", None, None, || {
            let begin = P::ticks();
            for _ in 0..100 {
                rcu.synchronize();
            }
            Ok((P::ticks_to_ns(P::ticks() - begin), 100))
        })?;
        let flavour = rcu.stats().flavour.name();
        for row in &mut self.rows {
            row.name = format!("{} ({flavour})", row.name);
        }
        rcu.stop();
        Ok(())
    }
}

struct Links(Vec<AtomicU32>);

impl Reclaim for Links {
    fn reclaim(&self, head: u32) -> usize {
        let (mut at, mut n) = (head, 0);
        while at != NIL {
            at = self.0[at as usize].load(std::sync::atomic::Ordering::Acquire);
            n += 1;
        }
        n
    }
}
