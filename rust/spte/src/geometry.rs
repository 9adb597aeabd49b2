//! Levels and spans of the radix tree: 512 entries a table, nine bits a level.
//!
//! Level 1 maps 4 KiB, 2 maps 2 MiB, 3 maps 1 GiB; nothing above 3 is ever a leaf. A root is a table of level 4 or 5.
//! Addresses are guest frame numbers (`gfn`, units of 4 KiB) throughout.

use std::fmt;

/// Entries in one page table.
pub const ENTRIES: usize = 512;
/// Bits of a gfn that one level consumes.
pub const LEVEL_BITS: u32 = 9;
/// Level of an entry that maps 4 KiB.
pub const LEVEL_4K: u8 = 1;
/// Level of an entry that maps 2 MiB.
pub const LEVEL_2M: u8 = 2;
/// Level of an entry that maps 1 GiB, the largest leaf.
pub const LEVEL_1G: u8 = 3;
/// The highest level a root can have.
pub const MAX_LEVEL: u8 = 5;

/// gfns covered by one *entry* at `level` (1..=5): 512^(level-1).
#[inline]
pub const fn span(level: u8) -> u64 {
    1 << ((level as u32 - 1) * LEVEL_BITS)
}

/// gfns covered by one whole *table* of `level` (1..=5): 512 entries.
#[inline]
pub const fn table_span(level: u8) -> u64 {
    1 << (level as u32 * LEVEL_BITS)
}

/// Index (0..512) of the entry that maps `gfn` in a table of `level`.
#[inline]
pub const fn index(gfn: u64, level: u8) -> usize {
    ((gfn >> ((level as u32 - 1) * LEVEL_BITS)) & (ENTRIES as u64 - 1)) as usize
}

/// First gfn of the entry at `level` that maps `gfn`.
#[inline]
pub const fn round_down(gfn: u64, level: u8) -> u64 {
    gfn & !(span(level) - 1)
}

/// First gfn at or after `gfn` where an entry of `level` begins; saturates at the top of the 64-bit space.
#[inline]
pub const fn round_up(gfn: u64, level: u8) -> u64 {
    round_down(gfn.saturating_add(span(level) - 1), level)
}

/// Exclusive end of the gfns a root of `root_level` can map on a CPU with `maxphyaddr` physical address bits.
///
/// 2^36 for four levels and 2^45 for five, less where MAXPHYADDR is smaller. `maxphyaddr` below 12 gives 1.
#[inline]
pub const fn max_gfn(root_level: u8, maxphyaddr: u8) -> u64 {
    let by_tree = table_span(root_level);
    let bits = (maxphyaddr as u32).saturating_sub(12);
    if bits >= 63 {
        return by_tree;
    }
    let by_cpu = 1u64 << bits;
    if by_cpu < by_tree { by_cpu } else { by_tree }
}

/// A page size that no leaf can have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnknownPageSize {
    /// What was given.
    pub text: String,
}

impl fmt::Display for UnknownPageSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "page size {:?}: must be one of 4K, 2M, 1G", self.text)
    }
}

impl std::error::Error for UnknownPageSize {}

/// The leaf level of a page size: `"4K"` is 1, `"2M"` 2, `"1G"` 3 (lower case and a final `iB`/`B` accepted).
pub fn parse_page_size(text: &str) -> Result<u8, UnknownPageSize> {
    let upper = text.trim().to_ascii_uppercase();
    match upper.trim_end_matches('B').trim_end_matches('I') {
        "4K" => Ok(LEVEL_4K),
        "2M" => Ok(LEVEL_2M),
        "1G" => Ok(LEVEL_1G),
        _ => Err(UnknownPageSize { text: text.to_owned() }),
    }
}

/// The size of one entry at `level` as engineers write it (`4K`, `2M`, `1G`, `512G`, `256T`), or `?`.
pub const fn page_size_name(level: u8) -> &'static str {
    match level {
        1 => "4K",
        2 => "2M",
        3 => "1G",
        4 => "512G",
        5 => "256T",
        _ => "?",
    }
}

/// Bytes mapped by one entry at `level` (1..=5).
#[inline]
pub const fn page_bytes(level: u8) -> u64 {
    span(level) << 12
}

/// Page tables, the root not counted, of a tree of `root_level` that maps `[0, gfns)` with leafs at `leaf_level`.
pub const fn tables_below_root(gfns: u64, leaf_level: u8, root_level: u8) -> u64 {
    let mut total = 0;
    let mut level = leaf_level;
    while level < root_level {
        total += gfns.div_ceil(table_span(level));
        level += 1;
    }
    total
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn spans_are_powers_of_512() {
        for level in 1..=5u8 {
            assert_eq!(span(level), 512u64.pow(level as u32 - 1));
            assert_eq!(table_span(level), 512 * span(level));
        }
        assert_eq!(page_bytes(LEVEL_1G), 1 << 30);
    }

    #[test]
    fn the_space_ends_at_the_smaller_of_tree_and_cpu() {
        assert_eq!(max_gfn(4, 52), 1 << 36);
        assert_eq!(max_gfn(5, 57), 1 << 45);
        assert_eq!(max_gfn(5, 52), 1 << 40);
        assert_eq!(max_gfn(4, 40), 1 << 28);
        assert_eq!(max_gfn(4, 255), 1 << 36);
        assert_eq!(max_gfn(4, 3), 1);
    }

    #[test]
    fn table_counts_match_the_fully_populated_guest() {
        // 64 TiB of 4K leafs: 33.6 M tables, 64 TiB / 2 MiB of them leaf tables.
        let gfns = (64u64 << 40) >> 12;
        assert_eq!(tables_below_root(gfns, LEVEL_4K, 4), (1 << 25) + (1 << 16) + 128);
        assert_eq!(tables_below_root(1, LEVEL_4K, 4), 3);
        assert_eq!(tables_below_root(262_144, LEVEL_1G, 4), 1);
    }

    #[test]
    fn page_sizes_parse_and_print() {
        for (text, level) in [("4K", 1), ("2m", 2), ("1G", 3), (" 2MiB ", 2), ("1GB", 3)] {
            assert_eq!(parse_page_size(text), Ok(level));
        }
        for level in 1..=3 {
            assert_eq!(parse_page_size(page_size_name(level)), Ok(level));
        }
        for bad in ["", "8K", "4", "K", "512G", "4KK", "-4K"] {
            let error = parse_page_size(bad).unwrap_err();
            assert!(error.to_string().contains(&format!("{bad:?}")), "{error}");
        }
    }

    proptest! {
        #[test]
        fn indices_rebuild_the_gfn(gfn in 0u64..1 << 45) {
            let mut rebuilt = 0;
            for level in 1..=5 {
                rebuilt += index(gfn, level) as u64 * span(level);
            }
            prop_assert_eq!(rebuilt, gfn);
        }

        #[test]
        fn rounding_brackets_the_gfn(gfn in 0u64..1 << 45, level in 1u8..=5) {
            let down = round_down(gfn, level);
            let up = round_up(gfn, level);
            prop_assert!(down <= gfn && gfn < down + span(level));
            prop_assert!(up >= gfn && up - gfn < span(level));
            prop_assert_eq!(down % span(level), 0);
            prop_assert_eq!(up % span(level), 0);
        }
    }
}
