//! tdpmmu-table
