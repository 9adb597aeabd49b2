//! When is a predicted transition the recorded one?
//!
//! **Guarantee.** Everything is compared, Accessed and Dirty too, in one direction: hardware sets these bits on its own in a present leaf, and never clears them. So a recorded old value
//! may have more of them than the predicted one, never fewer, and the new value exactly those more; where a table gives way to a leaf, the
//! leaf inherits what hardware did to the children.

use crate::conform::names::{Change, NO_ROOT, is_leaf, is_table};

const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;

/// Is `recorded` what `predicted` says?
pub fn agrees(recorded: &Change, predicted: &Change) -> bool {
    let (r, p) = (recorded, predicted);
    if (r.as_id, r.level, r.gfn) != (p.as_id, p.level, p.gfn)
        || r.root != NO_ROOT && p.root != NO_ROOT && r.root != p.root
    {
        return false;
    }
    let Some(added) = added(r.old, p.old, p.level) else { return false };
    let Some(more) = self::added(r.new, p.new, p.level) else { return false };
    if is_table(p.old, p.level) { true } else { more & !added == 0 }
}

/// The bits that hardware has added to `predicted` so that it is `recorded`; `None`: something else differs.
fn added(recorded: u64, predicted: u64, level: u8) -> Option<u64> {
    if recorded == predicted {
        return Some(0);
    }
    let differ = recorded ^ predicted;
    let hardware = differ & !(ACCESSED | DIRTY) == 0 && differ & predicted == 0;
    (hardware && is_leaf(predicted, level)).then_some(differ)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn change(old: u64, new: u64) -> Change {
        Change { root: 0, as_id: 0, level: 1, gfn: 7, old, new }
    }

    #[test]
    fn hardware_adds_bits_and_never_takes_them() {
        assert!(agrees(&change(0x5e67, 0), &change(0x5e27, 0)), "D was set by hardware");
        assert!(!agrees(&change(0x5e27, 0), &change(0x5e67, 0)), "nobody clears D silently");
        assert!(agrees(&change(0x5e67, 0x5e65), &change(0x5e27, 0x5e25)), "and is carried along");
        assert!(
            !agrees(&change(0x5e27, 0x5e65), &change(0x5e27, 0x5e25)),
            "D in the new value alone is KVM's"
        );
        assert!(!agrees(&change(0, 0x5e27), &change(0, 0x5e67)), "surprise 2");
        assert!(!agrees(&change(0x5e65, 0), &change(0x5e67, 0)), "W is KVM's");
    }

    #[test]
    fn a_rebuilt_leaf_inherits_what_hardware_did_to_its_children() {
        let at = |new| Change { level: 2, ..change(0x827, new) };
        assert!(agrees(&at(0x200ee7), &at(0x200ea7)));
        assert!(!agrees(&at(0x200ea7), &at(0x200ee7)));
    }

    #[test]
    fn places_and_roots_must_be_the_same_where_they_are_known() {
        let one = change(0, 0x5e67);
        assert!(!agrees(&Change { gfn: 8, ..one }, &one));
        assert!(!agrees(&Change { root: 1, ..one }, &one));
        assert!(agrees(&Change { root: NO_ROOT, ..one }, &one));
    }
}
