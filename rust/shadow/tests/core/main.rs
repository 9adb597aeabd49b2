//! The heart of the shadow MMU, by its behaviour: one binary, as each more costs a link.

mod books;
mod common;
mod nested;
mod quota;
mod rmap;
mod zap;
