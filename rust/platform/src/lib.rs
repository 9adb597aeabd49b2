//! tdpmmu-platform
