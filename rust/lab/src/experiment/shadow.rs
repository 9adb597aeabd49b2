//! What only designs of the shadow MMU have, and the one figure that was published about them.

use tdpmmu_shadow::ShadowDesign;

use crate::config::Case;
use crate::outcome::Outcome;
use crate::result::{Published, Run, ShadowResult};
use crate::scene::SLOT_CHURN_2013;

/// Points of a series.
const POINTS: usize = 512;

/// `shadow` of a run.
pub(super) fn result(case: &Case, outcome: &Outcome) -> Option<ShadowResult> {
    let (case, books) = (case.shadow.as_ref()?, outcome.shadow.clone().unwrap_or_default());
    let peak = books.retained.iter().map(|point| point.1).chain([books.retained_at_return]).max();
    let since_t0 = |at: u64| (outcome.to_ns)(at.saturating_sub(outcome.t0));
    Some(ShadowResult {
        paging: case.paging.name().into(),
        reclaim: case.reclaim.name().into(),
        quota: case.quota,
        guest_table_pages: books.guest_table_pages,
        pages_at_t0: books.pages_at_t0,
        toggles: books.toggles,
        zapped: books.zapped,
        batches: books.batches,
        longest_batch: books.longest_batch,
        restarts: books.restarts,
        reclaimed: books.reclaimed,
        retained_peak: peak.unwrap_or(0),
        retained_at_return: books.retained_at_return,
        retained_at_end: books.retained_at_end,
        retained_series: thinned(&books.retained).map(|(at, pages)| (since_t0(at), pages)).collect(),
        waiting_peak: books.waiting_peak,
        page_bytes: books.page_bytes,
        gfn_bytes: books.gfn_bytes,
        list_bytes: books.list_bytes,
        slot_bytes: books.slot_bytes,
    })
}

/// Obsolete pages stay, with what they map, until somebody wants their memory.
pub(super) fn keeps_obsolete(case: &Case) -> bool {
    case.shadow.is_some_and(|shadow| shadow.design == ShadowDesign::GenKept)
}

/// As many points as a series has, first and last among them.
fn thinned(points: &[(u64, u64)]) -> impl Iterator<Item = (u64, u64)> + '_ {
    let step = points.len().div_ceil(POINTS - 1).max(1);
    let last = points.len().saturating_sub(1);
    points.iter().enumerate().filter(move |(n, _)| n % step == 0 || *n == last).map(|(_, point)| *point)
}

/// The series of 2013 reported 46.1 ms before and 21.6 ms after for deleting and adding a slot.
const BEFORE_MS: f64 = 46.1;
const AFTER_MS: f64 = 21.6;

/// Gives the runs of the scene of 2013 the published figure, and what this result has to say to it.
pub fn publish(runs: &mut [Run]) {
    let median = |design: &str| {
        let of = runs.iter().filter(|r| r.scene == SLOT_CHURN_2013 && r.design == design);
        let mut all: Vec<u64> = of.filter_map(|r| r.cycle_ns.as_ref()?.0.p50).collect();
        all.sort_unstable();
        all.get(all.len() / 2).map(|&ns| ns as f64 / 1e6)
    };
    let (before, after) = (median("shadow-walk"), median("shadow-gen"));
    for run in runs.iter_mut().filter(|r| r.scene == SLOT_CHURN_2013) {
        run.published = Some(Published {
            source: "Xiao Guangrong, fast zap of all shadow pages, March 2013 (v1)",
            what: "a memslot deleted and added, 6 vCPUs, 2 GiB",
            before_ms: BEFORE_MS,
            after_ms: AFTER_MS,
            ratio: AFTER_MS / BEFORE_MS,
            our_before_ms: before,
            our_after_ms: after,
            our_ratio: before.zip(after).map(|(before, after)| after / before),
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_series_keeps_its_ends_and_few_points() {
        let long: Vec<_> = (0..10_000).map(|n| (n, 10_000 - n)).collect();
        let thin: Vec<_> = thinned(&long).collect();
        assert!(thin.len() <= POINTS, "{}", thin.len());
        assert_eq!((thin.first(), thin.last()), (long.first(), long.last()));
        assert_eq!(thinned(&long[..5]).count(), 5);
        assert_eq!(thinned(&[]).count(), 0);
    }

    #[test]
    fn the_published_figure_stands_beside_the_medians_of_its_own_scene_only() {
        let run = |scene: &str, design: &str, ms: u64| {
            let mut histogram = tdpmmu_platform::Histogram::new();
            (0..20).for_each(|_| histogram.record(ms * 1_000_000));
            Run {
                scene: scene.into(),
                design: design.into(),
                cycle_ns: Some((&histogram).into()),
                ..Run::default()
            }
        };
        let mut runs = vec![
            run(SLOT_CHURN_2013, "shadow-walk", 40),
            run(SLOT_CHURN_2013, "shadow-gen", 10),
            run("slot-churn", "shadow-gen", 1),
        ];
        publish(&mut runs);
        assert!(runs[2].published.is_none());
        for run in &runs[..2] {
            let p = run.published.as_ref().expect("the scene's own");
            assert_eq!((p.before_ms, p.after_ms), (46.1, 21.6));
            assert!((0.24..0.26).contains(&p.our_ratio.expect("both ran")), "{p:?}");
        }
        publish(&mut runs[1..2]);
        let alone = runs[1].published.as_ref().expect("the scene's own");
        assert_eq!((alone.our_before_ms, alone.our_ratio), (None, None));
    }
}
