//! tdpmmu-mmu
