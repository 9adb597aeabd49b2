//! tdpmmu-lab
