//! # The shadow MMU

mod design;
mod host;
mod lpage;
mod slot;

pub use design::{SHADOW_DESIGNS, ShadowDesign, ShadowDesignInfo};
pub use host::ShadowHost;
pub use lpage::LpageInfo;
pub use slot::{BookSet, SlotBooks};
