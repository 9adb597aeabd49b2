//! The granularity of a root's teardown: an ordered list of levels.
//!
//! A pass at level Z empties every present entry at Z, so one step tears down at most a subtree below one such
//! entry. Finer passes first make the later steps cheap, at the price of writing entries twice. Mainline: `root` up
//! to 5.17; `1G,root` in 5.18-6.8 (and under `CONFIG_KVM_PROVE_MMU` later); `4K,2M,1G,root` from 6.9 on.

use std::fmt;
use std::str::FromStr;

use crate::geometry::{LEVEL_1G, LEVEL_2M, LEVEL_4K};

/// Levels in rising order; the last one is always the root's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Passes {
    /// Bit n: a pass at level n (1..=3) before the pass at the root's level.
    below_root: u8,
}

impl Passes {
    /// One pass, at the root's level.
    pub const ROOT: Passes = Passes { below_root: 0 };
    /// 1 GiB, then the root.
    pub const ROOT_1G: Passes = Passes { below_root: 1 << LEVEL_1G };
    /// Every level in turn.
    pub const ALL: Passes = Passes { below_root: 1 << LEVEL_4K | 1 << LEVEL_2M | 1 << LEVEL_1G };

    /// The levels to zap for a root of `root_level` (4 or 5), in order; the last is `root_level`.
    pub fn iter(&self, root_level: u8) -> impl Iterator<Item = u8> + use<> {
        let set = self.below_root;
        (LEVEL_4K..=LEVEL_1G).filter(move |l| set & (1 << l) != 0 && *l < root_level).chain([root_level])
    }

    /// Is there a pass at `level` (1..=3)?
    pub const fn contains(&self, level: u8) -> bool {
        level <= LEVEL_1G && self.below_root & (1 << level) != 0
    }

    /// How many passes, the root's included.
    pub const fn count(&self) -> usize {
        self.below_root.count_ones() as usize + 1
    }

    /// Parse `4K,2M,1G,root`; `+` separates as well, for use inside a profile.
    pub fn parse(text: &str) -> Result<Passes, PassesError> {
        const ROOT_RANK: u8 = u8::MAX;
        let error = |rule| Err(PassesError { text: text.to_owned(), rule });
        let (mut below_root, mut last) = (0, 0);
        for word in text.split([',', '+']).map(str::trim) {
            let level = match word.to_ascii_lowercase().as_str() {
                "4k" => LEVEL_4K,
                "2m" => LEVEL_2M,
                "1g" => LEVEL_1G,
                "root" => ROOT_RANK,
                _ => return error(PassesRule::Unknown(word.to_owned())),
            };
            if level == last {
                return error(PassesRule::Twice(word.to_owned()));
            }
            if level < last {
                return error(PassesRule::Order(word.to_owned()));
            }
            last = level;
            if level != ROOT_RANK {
                below_root |= 1 << level;
            }
        }
        if last != ROOT_RANK {
            return error(PassesRule::NoRoot);
        }
        Ok(Passes { below_root })
    }
}

impl fmt::Display for Passes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (level, name) in [(LEVEL_4K, "4K,"), (LEVEL_2M, "2M,"), (LEVEL_1G, "1G,")] {
            if self.contains(level) {
                f.write_str(name)?;
            }
        }
        f.write_str("root")
    }
}

impl FromStr for Passes {
    type Err = PassesError;

    fn from_str(text: &str) -> Result<Passes, PassesError> {
        Passes::parse(text)
    }
}

/// A list of passes that cannot be run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PassesError {
    /// What was given.
    pub text: String,
    /// The rule it breaks.
    pub rule: PassesRule,
}

/// What is wrong with a list of passes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PassesRule {
    /// Not one of the four names.
    Unknown(String),
    /// The same level a second time.
    Twice(String),
    /// Finer than the one before it.
    Order(String),
    /// Does not end with `root`: entries of the root would stay.
    NoRoot,
}

impl fmt::Display for PassesError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "passes {:?}: ", self.text)?;
        match &self.rule {
            PassesRule::Unknown(word) => write!(f, "{word:?} is not one of 4K, 2M, 1G, root"),
            PassesRule::Twice(word) => write!(f, "{word:?} appears twice"),
            PassesRule::Order(word) => {
                write!(f, "{word:?} comes after a coarser pass; order is 4K,2M,1G,root")
            }
            PassesRule::NoRoot => write!(f, "the last pass must be root, or the root's entries stay"),
        }
    }
}

impl std::error::Error for PassesError {}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_kernels_lists_give_their_levels() {
        let levels = |p: Passes, root| p.iter(root).collect::<Vec<_>>();
        assert_eq!(levels(Passes::ROOT, 4), [4]);
        assert_eq!(levels(Passes::ROOT_1G, 5), [3, 5]);
        assert_eq!(levels(Passes::ALL, 4), [1, 2, 3, 4]);
        assert_eq!(levels(Passes::ALL, 3), [1, 2, 3], "a pass at the root's level is the root's");
        assert_eq!(Passes::ALL.count(), 4);
    }

    #[test]
    fn every_valid_list_survives_printing() {
        for below_root in (0..16u8).step_by(2) {
            let passes = Passes { below_root };
            assert_eq!(passes.to_string().parse(), Ok(passes));
            assert_eq!(passes.to_string().replace(',', "+").parse(), Ok(passes));
            assert_eq!(passes.iter(4).count(), passes.count());
        }
    }

    #[test]
    fn a_bad_list_names_its_rule() {
        let rule = |text: &str| Passes::parse(text).unwrap_err().rule;
        assert_eq!(rule(""), PassesRule::Unknown(String::new()));
        assert_eq!(rule("4K,8K,root"), PassesRule::Unknown("8K".into()));
        assert_eq!(rule("2M,4K,root"), PassesRule::Order("4K".into()));
        assert_eq!(rule("root,4K"), PassesRule::Order("4K".into()));
        assert_eq!(rule("1G,1G,root"), PassesRule::Twice("1G".into()));
        assert_eq!(rule("4K,1G"), PassesRule::NoRoot);
        assert!(Passes::parse("4K,8K").unwrap_err().to_string().contains("\"8K\""));
    }

    proptest! {
        #[test]
        fn no_text_panics(text in ".{0,40}") {
            if let Ok(passes) = Passes::parse(&text) {
                prop_assert_eq!(Passes::parse(&passes.to_string()), Ok(passes));
            }
        }
    }
}
