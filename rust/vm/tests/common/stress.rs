//! What stress tests share: how long they go on, and repeatable choices.

/// `n` rounds, or as many times more as the environment asks for.
pub fn rounds(n: u64) -> u64 {
    n * std::env::var("TDPMMU_STRESS").ok().and_then(|v| v.parse().ok()).unwrap_or(1)
}

/// xorshift64; the seed is not 0.
pub struct Random(pub u64);

impl Random {
    pub fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % n
    }
}
