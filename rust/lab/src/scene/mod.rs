//! The scenes: what happens to the VM, as data.
//!
//! **Guarantee.** A scene is a pure function from the plan to a [`Scenario`]; it runs nothing. Two designs meet the same operations in the same order.
//!
//! **Mechanism.** [`SCENES`] is the table, one file per family holds the builders; what they share (the VM, the guests, the population) is in `parts.rs`. To add a
//! scene: a row here, a builder there. A row says what the scene's memory comes to before anything is built, and which settings make no sense with it.

mod drop;
mod end;
mod memslot;
mod parts;
mod roots;
mod sizes;
mod vcpus;
mod waiting;

use tdpmmu_spte::closest;

pub use drop::{LOOP_SPTES, drop_loop_scenario};

use crate::config::{Case, Plan, ShadowCase};
use crate::memory::Estimate;
use crate::scenario::Scenario;

/// Which experiment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A memslot update.
    Zap,
    /// A vCPU drops its root, or the VM ends.
    Drop,
}

impl Kind {
    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Zap => "zap",
            Kind::Drop => "drop",
        }
    }
}

/// A scene before it is built.
#[derive(Debug)]
pub struct Scene {
    /// What a KVM engineer would call it.
    pub name: &'static str,
    /// The experiment that it belongs to.
    pub kind: Kind,
    /// What happens.
    pub summary: &'static str,
    /// The fields of the result to look at first.
    pub look_at: &'static str,
    /// What its memory comes to.
    pub estimate: fn(&Plan) -> Estimate,
    /// Why these settings make no sense, if they do not.
    pub fits: fn(&Plan) -> Result<(), String>,
    /// Why it makes no sense under the shadow MMU, if it does not.
    pub shadow: fn(&Plan, &ShadowCase) -> Result<(), String>,
    /// The scenario.
    pub build: fn(&Ask<'_>) -> Scenario,
}

/// What a scenario is built from.
#[derive(Clone, Copy)]
pub struct Ask<'a> {
    /// The request.
    pub plan: &'a Plan,
    /// The scene and the design.
    pub case: &'a Case,
    /// What [`Scene::estimate`] said.
    pub estimate: Estimate,
    /// Measure step_ns instead of step_units.
    pub step_ns: bool,
}

/// The scene with a published figure.
pub const SLOT_CHURN_2013: &str = "slot-churn-2013";

/// Every scene; the first of each experiment is its default.
pub const SCENES: &[Scene] = &[
    memslot::DELETE,
    memslot::MOVE,
    memslot::CHURN,
    memslot::CHURN_2013,
    memslot::CHURN_AND_DROP,
    memslot::BOOT,
    sizes::DIRTY_SPLIT,
    roots::TWO_SPACES,
    roots::SEVERAL,
    vcpus::HALTED,
    vcpus::MIGRATING,
    sizes::HUGE_IN_FAULT,
    waiting::UPDATE,
    waiting::NOTIFIER,
    memslot::NX_TOGGLE,
    memslot::ZAP_64T,
    drop::CR0_WP,
    drop::SMM_EXIT,
    end::TEARDOWN,
    end::DYING,
    drop::ZAP_64T,
];

/// The scenes of an experiment.
pub fn of(kind: Kind) -> impl Iterator<Item = &'static Scene> {
    SCENES.iter().filter(move |scene| scene.kind == kind)
}

/// The scene of an experiment by name.
pub fn find(kind: Kind, name: &str) -> Option<&'static Scene> {
    of(kind).find(|scene| scene.name == name)
}

/// What to say about a name that is no scene of `kind`.
pub(crate) fn unknown(kind: Kind, name: &str) -> String {
    let other = match kind {
        Kind::Zap => Kind::Drop,
        Kind::Drop => Kind::Zap,
    };
    if find(other, name).is_some() {
        return format!("scene {name} belongs to bench {}, not to bench {}", other.name(), kind.name());
    }
    let names: Vec<_> = of(kind).map(|scene| scene.name).collect();
    let hint = closest(name, &names).map(|c| format!(" (did you mean {c:?}?)")).unwrap_or_default();
    format!("scene={name:?}: expected all or one of {}{hint}", names.join(", "))
}

impl Scene {
    /// Does the run's largest size carry a fit over smaller ones?
    pub fn scales(&self) -> bool {
        self.name == "zap-64t"
    }

    /// Its guest is what it is, whatever is asked for: never part of `all`, where the others have one guest in common.
    pub fn has_its_own_guest(&self) -> bool {
        self.name == SLOT_CHURN_2013
    }

    /// The plan that it is run with.
    pub fn settled(&self, plan: &Plan) -> Plan {
        let mut plan = plan.clone();
        if self.has_its_own_guest() {
            (plan.config.vcpus, plan.config.memory_bytes) = (6, 2 << 30);
        }
        plan
    }

    /// Is it its experiment's default?
    pub fn is_default(&self) -> bool {
        of(self.kind).next().is_some_and(|first| first.name == self.name)
    }

    /// The scenario of a case of this scene.
    pub fn scenario(&self, plan: &Plan, case: &Case, step_ns: bool) -> Scenario {
        (self.build)(&Ask { plan, case, estimate: case.estimate(plan), step_ns })
    }
}
