//! A root that is loaded while it is lost: what happens between the two steps of a look-up.

#[path = "common/staged.rs"]
mod staged;
#[path = "common/world.rs"]
mod world;

use std::sync::Arc;

use staged::{stage, unstage};
use tdpmmu_platform::{Role, Site};
use world::{Terms, World};

/// 6.12 loads and puts roots under the shared lock, where async-worker's last put re-arms the count of a root that it has invalidated.
#[test]
fn a_load_that_loses_to_the_last_put_never_gets_the_invalid_root() {
    let mut world = World::new("async-worker", &Terms::default());
    let first = world.vcpu.load(0);

    // The vCPU has compared the role and not taken its reference yet: another one drops the last.
    let mmu = Arc::clone(&world.mmu);
    stage(0, Site::RootRef, move || {
        let dropped =
            std::thread::spawn(move || mmu.put_roots(&mmu.task("vcpu-1", Role::Vcpu), &[first])).join();
        dropped.expect("the other vCPU drops the root");
    });
    let second = world.vcpu.load(0);
    assert!(!unstage(Site::RootRef), "the schedule point was reached");
    assert_ne!(second, first);
    let mmu = &world.mmu;
    assert!(mmu.is_obsolete(first) && !mmu.is_obsolete(second));
    assert_eq!((mmu.refs(first), mmu.refs(second)), (1, 1), "the worker's, and the vCPU's");
    world.end_well(&[second]);
}
