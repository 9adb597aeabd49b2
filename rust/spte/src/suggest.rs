//! "Did you mean": the nearest known name, for errors that name the value and the rule.

/// The entry of `known` that is closest to `name` by edit distance (case ignored), if any is close enough to be a
/// typing error: at most a third of the longer name, and never everything. Of equals, one of the same length wins.
pub fn closest<'a>(name: &str, known: &[&'a str]) -> Option<&'a str> {
    let wanted = name.to_ascii_lowercase();
    known
        .iter()
        .map(|k| (distance(&wanted, &k.to_ascii_lowercase()), *k))
        .filter(|(d, k)| *d <= (wanted.chars().count().max(k.len()) / 3).max(1) && *d < k.len())
        .min_by_key(|(d, k)| (*d, k.len().abs_diff(name.len())))
        .map(|(_, k)| k)
}

/// Levenshtein distance with two rows. Inputs longer than 64 characters count as far from everything.
fn distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    if a.len() > 64 || b.len() > 64 {
        return usize::MAX;
    }
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.iter().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, cb) in b.iter().enumerate() {
            let substitute = diagonal + usize::from(ca != cb);
            diagonal = row[j + 1];
            row[j + 1] = substitute.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_typing_error_finds_its_name() {
        let designs = ["inline", "async-worker", "sync"];
        assert_eq!(closest("inlin", &designs), Some("inline"));
        assert_eq!(closest("ASYNC_worker", &designs), Some("async-worker"));
        assert_eq!(closest("6.13", &["6.1", "6.12"]), Some("6.12"));
        assert_eq!(closest("snyc", &["sync"]), None);
        assert_eq!(closest("synk", &["sync"]), Some("sync"));
    }

    #[test]
    fn what_is_far_from_everything_finds_nothing() {
        assert_eq!(closest("zebra", &["inline", "sync"]), None);
        assert_eq!(closest("", &["a", "sync"]), None);
        assert_eq!(closest(&"x".repeat(100_000), &["sync"]), None);
    }

    #[test]
    fn distance_counts_edits() {
        assert_eq!(distance("kitten", "sitting"), 3);
        assert_eq!(distance("", "abc"), 3);
        assert_eq!(distance("abc", "abc"), 0);
    }
}
