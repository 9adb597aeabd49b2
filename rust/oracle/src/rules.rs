//! By which rules an MMU is judged: what its kernel and its design promise, how far the order of reports can be trusted, how much is looked at.

use tdpmmu_mmu::design::effective_passes;
use tdpmmu_mmu::{Obligations, design};
use tdpmmu_platform::Platform;
use tdpmmu_shadow::ShadowDesign;
use tdpmmu_spte::geometry::ENTRIES;
use tdpmmu_spte::{Format, KernelProfile, Passes, RoleLayout, RootSet, WriteBack};

use crate::rule::{Rule, RuleSet};

/// In which order events arrive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// As they happened: an operation and its report are one step (the simulated platform).
    True,
    /// Each task's own in order; those of two tasks as a lock, a reference or a grace period makes them (the real platform).
    Loose,
}

/// How much is looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Check {
    /// What costs nothing per SPTE: references, debts, tables, frames, notifier, work items; each changed SPTE for its form. See the crate's text for the price.
    Cheap,
    /// Also a model of every entry and the ledger of flushes.
    Books,
    /// Also what is reported in detail: read sections, checks, lock classes, guest entries, translations, accesses.
    Full,
}

/// In what the rules of kernels, designs and platforms differ.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    /// The entries' format.
    pub format: Format,
    /// Page statistics are kept.
    pub page_stats: bool,
    /// What the design promises, and which freedoms it takes.
    pub design: Obligations,
    /// How far the order of arrival can be trusted.
    pub order: Order,
    /// How much is looked at.
    pub check: Check,
    /// Rules that are not judged.
    pub silenced: RuleSet,
    /// SPTE changes that may lie between two reschedule checks of a zap of a root; `None`: a design that zaps without checks.
    pub zap_step: Option<u64>,
    /// The notifier's unmap visits invalid roots too (5.18 on; before, bug-history 13 is the kernel's own).
    pub unmaps_invalid: bool,
    /// A fault asks whether its root has turned invalid (5.16 on; before, bug-history 11 is the kernel's own).
    pub checks_stale_root: bool,
    /// Write protection of a gfn passes over what lacks W (up to 5.16: bug-history 17 is the kernel's own).
    pub protects_by_w: bool,
    /// Write protection of a gfn visits invalid roots too.
    pub protects_invalid: bool,
    /// Dirty reaches the host when a leaf is removed (up to 6.12).
    pub writes_back: bool,
    /// How the shadow MMU zaps everything, if there is one.
    pub shadow: ShadowDesign,
    /// What a raw role says.
    pub role_layout: RoleLayout,
    /// What hardware translates, and TLBs are told of, are the guest's virtual pages (a shadow MMU without TDP).
    pub virtual_gfns: bool,
    /// Who reports where a reporter does not say, if the platform knows.
    pub who: fn() -> Option<u32>,
}

/// SPTE changes that one step may make outside of the zap of a root: the table of 1 GiB that a leaf replaces, and what the step had done before.
pub(crate) const OTHER_STEP: u64 = 2 * units(3);

/// Entries written when one entry of `level` is removed with all below it.
pub(crate) const fn units(level: u8) -> u64 {
    let (mut units, mut at) = (1, 1);
    while at < level {
        units = 1 + ENTRIES as u64 * units;
        at += 1;
    }
    units
}

impl Rules {
    /// The rules of `profile` with `format` under the zap design named `design`, for the real platform. A design that is not known is judged without
    /// any freedom: invalidate first, schedule once, wait for everybody.
    pub fn of(profile: &KernelProfile, format: Format, design: &str) -> Self {
        let info = design::info(design);
        let obligations = info.as_ref().map_or(Obligations::STRICT, |info| info.obligations);
        let passes = info.as_ref().map_or(profile.passes, |info| effective_passes(None, info, profile));
        let rules = Self {
            format,
            page_stats: profile.page_stats,
            design: obligations,
            order: Order::Loose,
            check: Check::Books,
            silenced: RuleSet::default(),
            zap_step: None,
            unmaps_invalid: profile.unmap_invalid_roots,
            checks_stale_root: profile.stale_root_check,
            protects_by_w: profile.protect_gfn_needs_w,
            protects_invalid: profile.clear_dirty_roots == RootSet::All,
            writes_back: profile.write_back == WriteBack::AtZap,
            shadow: ShadowDesign::named(design).unwrap_or(ShadowDesign::Gen),
            role_layout: profile.role_layout,
            virtual_gfns: false,
            who: || None,
        };
        rules.passes(passes)
    }

    /// As run on `P`: where that is no real platform, events arrive in true order, and everything is looked at.
    #[must_use]
    pub fn on<P: Platform>(self) -> Self {
        let simulated = matches!(P::NAME, "sim" | "timed");
        Self {
            order: if simulated { Order::True } else { Order::Loose },
            check: if simulated { Check::Full } else { self.check },
            who: P::task_id,
            ..self
        }
    }

    /// With other zap passes than the design's.
    #[must_use]
    pub fn passes(self, passes: Passes) -> Self {
        // What a step may do: empty a leaf table, or remove one entry of the first pass; after it only empty tables are left.
        let first = passes.iter(4).next().unwrap_or(4);
        let step = ENTRIES as u64 + if first > 1 { units(first) } else { units(2) };
        Self { zap_step: (!self.design.last_put_zaps).then_some(step), ..self }
    }

    /// Where TLBs hold the guest's virtual pages, not its frames.
    #[must_use]
    pub fn virtual_gfns(self, virtual_gfns: bool) -> Self {
        Self { virtual_gfns, ..self }
    }

    /// Looking at more, or less.
    #[must_use]
    pub fn check(self, check: Check) -> Self {
        Self { check, ..self }
    }

    /// Without judging `rule`.
    #[must_use]
    pub fn silence(self, rule: Rule) -> Self {
        Self { silenced: self.silenced.with(rule), ..self }
    }

    pub(crate) fn in_true_order(&self) -> bool {
        self.order == Order::True
    }
}
