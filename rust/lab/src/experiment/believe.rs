//! A result that cannot be true is an error, not a result.

use tdpmmu_platform::MeterSnapshot;

use super::tears_down;
use crate::LabError;
use crate::attribution;
use crate::config::{Case, Plan};
use crate::outcome::Outcome;
use crate::result::Run;
use crate::scene::Kind;

/// Refuses what cannot be true, with the row as far as it goes.
pub(super) fn believable(
    plan: &Plan,
    case: &Case,
    outcome: &Outcome,
    paying: &MeterSnapshot,
    run: &Run,
) -> Result<(), LabError> {
    let fail = |message: String| {
        let partial = serde_json::to_string(run).unwrap_or_default();
        Err(LabError::Check { message, partial })
    };
    if let Some(expected) = outcome.expected
        && run.sptes != expected
    {
        return fail(format!("{}: {} SPTEs counted where {expected} were to be", run.design, run.sptes));
    }
    // What a flawed design leaves behind is its result.
    let sound = !case.info.flawed;
    if sound && !outcome.close.is_clean() {
        return fail(format!("{}: the VM did not end clean: {:?}", run.design, outcome.close));
    }
    if let Some(doubt) = attribution::doubted(outcome, &run.attribution) {
        return fail(format!("{}: {doubt}", run.design));
    }
    let switched_out: u64 =
        outcome.threads.iter().filter(|t| tears_down(outcome, t)).map(|t| t.switched_out).sum();
    let work = Worked {
        cpu_ns: run.teardown.as_ref().map_or(0, |t| t.cpu_ns.caller),
        tick_ns: plan.config.tick_ns,
        yields: paying.yields,
        contended: paying.contended,
        switched_out,
    };
    // P-FZ. Kernels whose faults do not test whether their root is stale may map under it again at once; the last put zaps that.
    if sound && plan.profile.stale_root_check && run.sptes_mapped_at_return.is_some_and(|n| n > 0) {
        return fail(format!(
            "{}: {} SPTEs were mapped under invalid roots when the fast zap returned",
            run.design, outcome.mapped_at_return
        ));
    }
    if case.scene.kind == Kind::Zap && work.should_have_yielded() {
        return fail(format!(
            "{}: {work:?}: a long zap beside running vCPUs never gave way to anybody",
            run.design
        ));
    }
    Ok(())
}

/// What a zapping task did beside running vCPUs.
#[derive(Clone, Copy, Debug)]
struct Worked {
    cpu_ns: u64,
    tick_ns: u64,
    yields: u64,
    contended: u64,
    switched_out: u64,
}

impl Worked {
    /// More than four ticks of CPU without a yield, a wait for the lock, or the host taking the CPU away (which
    /// begins a new tick): it did not check as it claims.
    fn should_have_yielded(&self) -> bool {
        self.cpu_ns > 4 * self.tick_ns && self.yields == 0 && self.contended == 0 && self.switched_out == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_zap_that_never_gave_way_is_no_result() {
        let lazy =
            Worked { cpu_ns: 17_000_000, tick_ns: 4_000_000, yields: 0, contended: 0, switched_out: 0 };
        assert!(lazy.should_have_yielded());
        for honest in [
            Worked { yields: 1, ..lazy },
            Worked { contended: 1, ..lazy },
            Worked { switched_out: 1, ..lazy },
            Worked { cpu_ns: 15_000_000, ..lazy },
        ] {
            assert!(!honest.should_have_yielded(), "{honest:?}");
        }
    }
}
