//! tdpmmu beside its peers on the same work in the same run.

#[path = "../../rust/lab/src/limits/mod.rs"]
pub mod limits;
