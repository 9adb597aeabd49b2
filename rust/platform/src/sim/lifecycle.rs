//! The beginning and the end of a run.
//!
//! **Guarantee.** Whatever happens in a run, [`run`] returns, and nothing of the run is left: every task has ended or has been unwound, so that what it owned was dropped.
//!
//! **Mechanism.** A violation, a panic, a deadlock or the step limit ends the run where it stands. Each task is then resumed, the youngest first: the call of the platform that
//! it is in, or makes next, raises a panic that the bottom of its stack catches. Destructors run with `P::abandoned()`: no point is a choice, every lock is free. A
//! destructor that has to wait for another task is resumed again after that has been unwound. A task whose destructor waits for what never comes is leaked and counted
//! ([`Run::leaked_tasks`]); that is a defect of the destructor.

use super::{
    config::SimConfig,
    coroutine::Stack,
    report::{End, Run},
    scheduler::{LEAKED, spawn},
    world::{self, World},
};
use crate::fault::InjectedPanic;

/// Panics inside of a run end it and are told by the run, not on stderr.
fn install_hook() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            let ours = world::with(|world| {
                if info.payload().is::<InjectedPanic>() {
                    return;
                }
                let text = info.payload_as_str().unwrap_or("a panic without words");
                let place = info.location().map(ToString::to_string).unwrap_or_default();
                let id = world.current as usize;
                let name = world.tasks.get(id).map_or_else(String::new, |task| format!("{}: ", task.name));
                world.abandon(End::Panicked(format!("{name}{text} ({place})")));
                if let Some(task) = world.tasks.get_mut(id) {
                    task.unwinding = true;
                }
            });
            if ours.is_none() {
                before(info);
            }
        }));
    });
}

/// Runs `main` as task 0 until every task has ended or the run is abandoned.
pub(super) fn run(config: SimConfig, main: Box<dyn FnOnce()>) -> Run {
    install_hook();
    let world = world::enter(World::new(config));
    let started = spawn("main", main);
    if let Err(error) = started {
        world::leave(world);
        let end = End::Panicked(format!("no stack for main: {error}"));
        return report(World::new(SimConfig::default()), Some(end));
    }
    loop {
        let over = world::with(|world| {
            let id = world.current;
            if world.abandoned.is_some() || world.alive == 0 { None } else { Some(id) }
        });
        let Some(Some(id)) = over else { break };
        resume(id);
    }
    unwind();
    report(*world::leave(world), None)
}

/// Runs a task until it switches; false if it has no stack any more.
fn resume(id: u32) -> bool {
    let stack = world::with(|world| {
        world.current = id;
        world.tasks[id as usize].stack.take()
    });
    let Some(mut stack) = stack.flatten() else { return false };
    if stack.resume() {
        stack.recycle();
    } else {
        world::with(|world| world.tasks[id as usize].stack = Some(stack));
    }
    true
}

/// Unwinds what is left, the youngest first; those that wait in a destructor get their turn again as long as others end.
fn unwind() {
    let count =
        || world::with(|world| world.tasks.iter().filter(|task| task.stack.is_some()).count()).unwrap_or(0);
    let mut left = count();
    let mut rounds = 0;
    while left != 0 {
        for id in (0..world::with(|world| world.tasks.len() as u32).unwrap_or(0)).rev() {
            resume(id);
        }
        let now = count();
        rounds = if now < left { 0 } else { rounds + 1 };
        left = now;
        if rounds > 16 {
            let stuck: Vec<Stack> = world::with(|world| {
                world.leaked = left as u32;
                world.tasks.iter_mut().filter_map(|task| task.stack.take()).collect()
            })
            .unwrap_or_default();
            LEAKED.set(true);
            stuck.into_iter().for_each(Stack::leak);
            return;
        }
    }
}

fn report(mut world: World, end: Option<End>) -> Run {
    let schedule = world.schedule();
    let end =
        end.or(world.abandoned.take()).unwrap_or(if world.stopping { End::Stopped } else { End::Finished });
    Run {
        end,
        schedule,
        steps: world.steps,
        choices: world.choices,
        width: world.width,
        hash: world.hash,
        preemptions: world.preemptions,
        sites: world.sites,
        violations: world.violations,
        log: world.log,
        longest_rcu: world.longest_rcu,
        longest_step: world.longest_step,
        tasks: world.tasks.into_iter().map(|task| task.name).collect(),
        dfs: world.chooser.into_dfs(),
        leaked_tasks: world.leaked,
    }
}
