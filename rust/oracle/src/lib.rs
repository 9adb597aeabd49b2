//! tdpmmu-oracle
