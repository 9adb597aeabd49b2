//! # The shadow MMU

mod design;
mod guest;
mod host;
mod lpage;
pub mod reclaim;
mod slot;

pub use design::{SHADOW_DESIGNS, ShadowDesign, ShadowDesignInfo};
pub use guest::{GuestFault, GuestPte, GuestWalk, walk_guest};
pub use host::ShadowHost;
pub use lpage::LpageInfo;
pub use reclaim::{ModeWord, NoMode, ReclaimKind, Reclamation, Section, WalkError, Walker};
pub use slot::{BookSet, SlotBooks};
