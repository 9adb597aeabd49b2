//! Random schedules.
//!
//! One chance of switching for all runs would find either what needs many switches or what needs a long undisturbed stretch. So each run draws its
//! own, from 1/2 to 1/64: with few points and many switches, or the other way round. Under TSO it draws too how many stores are held, and for how long.

use super::Moment;
use crate::sim::schedule::Choice;

/// A small generator (splitmix64): the same numbers on every machine.
#[derive(Clone, Debug)]
pub(in crate::sim) struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Self {
        // Neighbouring seeds begin far apart.
        let mut rng = Rng(seed.wrapping_mul(0xD134_2543_DE82_EF95));
        rng.next();
        rng
    }

    #[inline]
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    /// From `0..below`; 0 if there is nothing to draw from.
    #[inline]
    pub fn below(&mut self, below: u32) -> u32 {
        ((u128::from(self.next()) * u128::from(below)) >> 64) as u32
    }
}

#[derive(Debug)]
pub(in crate::sim) struct Random {
    pub seed: u64,
    pub rng: Rng,
    /// A point switches when a 64-bit draw is below this.
    switch: u64,
    /// A store is held back when a 64-bit draw is below this.
    hold: u64,
    /// A held store reaches memory at a point when a 64-bit draw is below this.
    drain: u64,
}

impl Random {
    pub fn new(seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        let mut chance = |most: u32, kinds: u32| u64::MAX >> (most + rng.below(kinds));
        // Half of all stores to nearly all are held, and for long: a missing barrier shows when two tasks have one under way at once.
        let (switch, hold, drain) = (chance(1, 6), u64::MAX - chance(1, 4), chance(2, 4));
        Random { seed, rng, switch, hold, drain }
    }

    #[inline]
    pub(in crate::sim) fn pick(&mut self, at: &Moment<'_>) -> Choice {
        if !at.buffers.is_empty() && self.rng.next() < self.drain {
            let which = self.rng.below(at.buffers.len() as u32);
            return Choice::Drain(at.buffers[which as usize]);
        }
        if at.able && self.rng.next() >= self.switch {
            return Choice::Run(at.task);
        }
        Choice::Run(self.other(at))
    }

    /// Somebody else, if there is one.
    pub fn other(&mut self, at: &Moment<'_>) -> u32 {
        let others = at.ready.len() as u32 - u32::from(at.able);
        if others == 0 {
            return at.task;
        }
        let which = at.ready[self.rng.below(others) as usize];
        // The task itself stands for the last one.
        if at.able && which == at.task { at.ready[others as usize] } else { which }
    }

    pub fn holds(&mut self) -> bool {
        self.rng.next() < self.hold
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draws_cover_their_range_and_no_more() {
        let mut rng = Rng::new(1);
        let mut met = [0u32; 7];
        for _ in 0..7_000 {
            met[rng.below(7) as usize] += 1;
        }
        assert!(met.iter().all(|n| (800..1200).contains(n)), "{met:?}");
        assert_eq!(rng.below(0), 0);
    }
}
