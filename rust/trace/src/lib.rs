//! tdpmmu-trace
