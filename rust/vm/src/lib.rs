//! tdpmmu-vm
