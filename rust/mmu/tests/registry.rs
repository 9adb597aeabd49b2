//! Designs by name: the table, and those that are added to it.

mod common;

use std::sync::Arc;

use tdpmmu_mmu::design::{self, RegisterError, Sync};
use tdpmmu_mmu::{DESIGNS, DesignInfo, DesignOptions, OtherOwnership};
use tdpmmu_platform::Real;

#[test]
fn every_design_of_the_table_is_built_under_its_name() {
    for info in DESIGNS {
        let design = design::build::<Real>(info.name, &DesignOptions::default()).expect("known");
        assert_eq!(design.name(), info.name);
        assert_eq!(design.queue().map(|queue| queue.kind()), info.queue, "{}", info.name);
        if let OtherOwnership::Refused(why) = info.other_ownership {
            assert!(why.len() > 20, "{}: {why}", info.name);
        }
    }
    let sound: Vec<_> = DESIGNS.iter().filter(|d| !d.flawed).map(|d| d.name).collect();
    assert_eq!(sound.len(), DESIGNS.len() - 2);
    assert!(!sound.contains(&"system-workqueue") && !sound.contains(&"no-second-phase"));
}

#[test]
fn a_name_is_registered_once_and_an_unknown_one_is_answered_with_the_known_ones() {
    let sync = *design::info("sync").expect("known");
    let mine = DesignInfo { name: "registered-once", ..sync };
    assert_eq!(design::register::<Real>(mine, |_| Arc::new(Sync)), Ok(()));
    assert_eq!(design::register::<Real>(mine, |_| Arc::new(Sync)), Err(RegisterError::Duplicate(mine.name)));
    assert_eq!(design::register::<Real>(sync, |_| Arc::new(Sync)), Err(RegisterError::Duplicate("sync")));
    assert_eq!(design::info("registered-once"), Some(&mine));
    assert!(design::build::<Real>("registered-once", &DesignOptions::default()).is_ok());
    assert!(design::names().contains(&"registered-once"));
    let error = design::build::<Real>("registered-twice", &DesignOptions::default()).err().expect("unknown");
    let text = error.to_string();
    assert!(
        text.contains("registered-twice") && text.contains("registered-once") && text.contains("sync"),
        "{text}"
    );
}
