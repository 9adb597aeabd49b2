//! The shadow MMU under exploration: its protocols stand under every design that can have them, and every kind of reclamation.

use tdpmmu_lab::Control;
use tdpmmu_lab::explore::{Search, is_shadow, natural_profile, protocol, protocols, search, sound_designs};
use tdpmmu_lab::program::Program;

/// What a search of `program` finds, in words.
fn found(program: &Program, schedules: u64) -> Option<String> {
    let how = Search { schedules, seed: 11, minimise: 200, ..Search::default() };
    let found = search(program, None, &how, &Control::silent()).expect("searched");
    assert!(found.failure.is_some() || found.acts.0 > 0, "{}: nothing was done", program.name);
    let failure = found.failure?;
    Some(format!("{}: {}\n  {}", failure.finding.rule, failure.finding.what, failure.seed))
}

fn stands(name: &str, designs: &[&str], schedules: u64) {
    let protocol = protocol(name).expect("a protocol");
    let mut broken = Vec::new();
    for design in designs {
        let program = protocol.program(design, natural_profile(design)).expect("fits");
        if let Some(what) = found(&program, schedules) {
            broken.push(format!("{name} under {design}: {what}"));
        }
    }
    assert!(broken.is_empty(), "{}", broken.join("\n"));
}

fn shadow_designs() -> Vec<&'static str> {
    sound_designs().into_iter().filter(|design| is_shadow(design)).collect()
}

macro_rules! stand {
    ($($test:ident = $name:literal),+ $(,)?) => {
        $(
            #[test]
            fn $test() {
                let mut designs = shadow_designs();
                designs.push("sync");
                stands($name, &designs, 30);
            }
        )+
    };
}

stand! {
    faults_through_guest_tables_stand_against_a_deleted_slot = "shadow-fault-zap",
    shadow_roots_stand_against_fast_zaps = "shadow-reload",
    guests_that_change_their_tables_find_them_changed = "shadow-unsync",
    a_quota_that_is_full_breaks_nothing = "shadow-quota",
    lockless_walks_stand_against_freed_shadow_pages = "shadow-lockless-free",
    reverse_maps_serve_notifiers_while_slots_come_and_go = "shadow-slot-notifier",
}

#[test]
fn an_l1_and_its_l2s_share_a_quota() {
    stands("nested-quota", &["sync", "in-place", "async-worker"], 30);
}

#[test]
fn protocols_of_the_tdp_mmu_stand_under_direct_shadow_pages() {
    let names =
        ["root-lifecycle", "fault-zap", "notifier-invalid", "dirtylog-zap", "lockless-free", "aging-zap"];
    for name in names {
        stands(name, &["shadow-gen"], 20);
    }
}

#[test]
fn a_protocol_of_an_l2_is_none_of_a_shadow_design() {
    for protocol in protocols() {
        assert_eq!(protocol.fits("shadow-gen"), protocol.name != "nested-quota");
    }
}
