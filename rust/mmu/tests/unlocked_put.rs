//! A put by who holds no lock: nobody sees a root that is off the list, or counted zero, and still mapped (P-RCH).

#[path = "common/staged.rs"]
mod staged;
#[path = "common/world.rs"]
mod world;

use std::sync::Arc;

use staged::{stage, unstage};
use tdpmmu_mmu::{DESIGNS, Held};
use tdpmmu_platform::{Owner, Role, Site};
use world::{Terms, World};

#[test]
fn a_notifier_that_comes_before_the_lock_of_a_put_finds_the_root() {
    for design in DESIGNS.iter().filter(|design| !design.flawed) {
        let mut world = World::new(design.name, &Terms::default());
        let root = world.vcpu.populated();
        let mmu = Arc::clone(&world.mmu);
        stage(0, Site::LockAcquire, move || {
            let task = mmu.task("notifier in the gap", Role::Caller);
            let mut guard = mmu.lock.write(&task);
            let mut debt = mmu.unmap(&mut guard, 0, 0..mmu.max_gfn(), true);
            mmu.pay(&task, &mut debt);
            assert_eq!(mmu.count(&task, root).sptes(), 0, "{}", mmu.design().name());
        });
        world.mmu.put_root(&world.caller, root, Owner::Vcpu, Held::No);
        // Who needs no lock for it has left the root valid and listed.
        assert_eq!(
            unstage(Site::LockAcquire),
            world.mmu.valid_roots(&world.caller) == [root],
            "{}",
            design.name
        );
        world.end_well(&[]);
    }
}
