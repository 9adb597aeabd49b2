//! tdpmmu-spte
