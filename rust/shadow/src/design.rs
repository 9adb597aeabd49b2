//! The zap designs of the shadow MMU by name.

/// How everything is zapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ShadowDesign {
    /// S0: every page is zapped by the caller in one exclusive hold.
    Walk,
    /// S0 with lock-break: as [`ShadowDesign::Walk`], giving the lock up where somebody waits, and starting over. No end is promised while vCPUs make new pages.
    WalkBreak,
    /// S1 as merged: the generation is toggled and a reload requested in one hold; obsolete pages are zapped from the oldest, in batches of at least ten between two yields.
    Gen,
    /// S1 as the fourth version of the series had it: obsolete pages are kept until reclaim; the reverse maps of a dying slot are zapped with lock-break, lpage_info is cleared in bulk.
    GenKept,
    /// S2: only what maps or accounts for the slot is zapped; roots stay valid.
    Slot,
}

/// What is known about a design before one is built.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ShadowDesignInfo {
    /// The design.
    pub design: ShadowDesign,
    /// Its name.
    pub name: &'static str,
    /// Kernels that had it.
    pub mainline: &'static str,
    /// One line for tables and help.
    pub summary: &'static str,
    /// Everything is zapped, not a slot alone: roots turn obsolete.
    pub zaps_all: bool,
}

/// The designs, oldest first.
pub const SHADOW_DESIGNS: &[ShadowDesignInfo] = &[
    ShadowDesignInfo {
        design: ShadowDesign::Walk,
        name: "shadow-walk",
        mainline: "up to 3.10",
        summary: "shadow MMU: every shadow page is zapped in one exclusive hold",
        zaps_all: true,
    },
    ShadowDesignInfo {
        design: ShadowDesign::WalkBreak,
        name: "shadow-walk-break",
        mainline: "3.11+, where the VM is dying",
        summary: "shadow MMU: as shadow-walk, with lock-break, starting over after each",
        zaps_all: true,
    },
    ShadowDesignInfo {
        design: ShadowDesign::GenKept,
        name: "shadow-gen-kept",
        mainline: "v4 of the 2013 series, never merged",
        summary: "shadow MMU: generation number; obsolete pages stay until reclaim, only the dying slot's reverse maps are zapped",
        zaps_all: true,
    },
    ShadowDesignInfo {
        design: ShadowDesign::Gen,
        name: "shadow-gen",
        mainline: "3.11-5.0, 5.4+",
        summary: "shadow MMU: generation number; obsolete pages are zapped from the oldest, in batches, with lock-break",
        zaps_all: true,
    },
    ShadowDesignInfo {
        design: ShadowDesign::Slot,
        name: "shadow-slot",
        mainline: "5.1-5.2",
        summary: "shadow MMU: only what maps or accounts for the slot is zapped",
        zaps_all: false,
    },
];

impl ShadowDesign {
    /// The design of that name.
    pub fn named(name: &str) -> Option<Self> {
        SHADOW_DESIGNS.iter().find(|info| info.name == name).map(|info| info.design)
    }

    /// What is known about it.
    pub fn info(self) -> &'static ShadowDesignInfo {
        match SHADOW_DESIGNS.iter().find(|info| info.design == self) {
            Some(info) => info,
            None => unreachable!(),
        }
    }
}
