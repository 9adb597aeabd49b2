//! Lost events: what they may have touched is unknown, not wrong; what they did not touch stays checked.

mod common;

use common::{Random, all, check, field, kernel, lines, shipped, with_field};
use std::collections::HashMap;

/// `TDPMMU_TIMES=50` makes a long run of it, `TDPMMU_SEED` another one.
fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|n| n.parse().ok()).unwrap_or(default)
}

fn times() -> usize {
    setting("TDPMMU_TIMES", 1) as usize
}

fn seed() -> u64 {
    setting("TDPMMU_SEED", 0)
}

/// One line's CPU, time in us and thread, where it has them.
fn place(line: &str) -> Option<(u32, u64, u32)> {
    let open = line.find(" [")? + 2;
    let cpu = line.get(open..open + 3)?.parse().ok()?;
    let rest = &line[open + 4..];
    let stamp = rest.split_whitespace().nth(1)?.trim_end_matches(':');
    let (seconds, micros) = stamp.split_once('.')?;
    let us = seconds.parse::<u64>().ok()? * 1_000_000 + micros.parse::<u64>().ok()?;
    let pid = line[..open - 2].trim_end().rsplit('-').next()?.parse().ok()?;
    Some((cpu, us, pid))
}

fn is_change(line: &str) -> bool {
    line.contains(" kvm_tdp_mmu_spte_changed: ")
}

/// `as`, gfn and level of a change.
fn entry(line: &str) -> String {
    let text = line.split("as id ").nth(1).unwrap_or("");
    text.split(" old_spte").next().unwrap_or("").to_owned()
}

/// What was dropped, and the lines that are left, with the mark where the CPU goes on.
struct Cut {
    text: Vec<String>,
    /// Number of the line after the mark, in `text`.
    goes_on: usize,
    dropped: Vec<String>,
}

/// Drops up to `count` lines of one CPU from line `at` on, as a ring buffer that was overrun would.
fn cut(text: &[String], at: usize, count: usize, counted: bool) -> Option<Cut> {
    let (cpu, ..) = place(&text[at])?;
    let mine = |line: &String| place(line).is_some_and(|p| p.0 == cpu);
    let (mut left, mut dropped, mut goes_on) = (text[..at].to_vec(), Vec::new(), None);
    for line in &text[at..] {
        if dropped.len() < count && mine(line) {
            dropped.push(line.clone());
            continue;
        }
        if goes_on.is_none() && dropped.len() == count && mine(line) {
            let shown = if counted { format!("{count} ") } else { String::new() };
            left.push(format!("CPU:{cpu} [LOST {shown}EVENTS]"));
            goes_on = Some(left.len());
        }
        left.push(line.clone());
    }
    Some(Cut { text: left, goes_on: goes_on?, dropped })
}

fn kernels_own(text: &[String]) -> Vec<String> {
    let own = |line: &String| {
        let event = line.split_once(": ").map_or("", |(_, rest)| rest);
        ["kvm_", "fast_page_fault:", "mark_mmio", "check_mmio"].iter().any(|e| event.starts_with(e))
            || line.split_whitespace().any(|w| {
                w.starts_with("kvm_") && w.ends_with(':')
                    || w == "fast_page_fault:"
                    || w.starts_with("mark_mmio")
            })
    };
    text.iter().filter(|l| own(l)).cloned().collect()
}

fn no_mismatch(name: &str, text: &[String], tries: usize, seed: u64, what: &str) {
    let mut random = Random(seed);
    let mut done = 0;
    for _ in 0..20 * tries {
        let at = random.below(text.len());
        let count = [1, 2, 3, 10, 100, 1000, 20_000][random.below(7)];
        let Some(cut) = cut(text, at, count, random.below(2) == 0) else { continue };
        let r = check(name, &cut.text).expect("replays");
        assert_eq!(r.losses.len(), 1);
        assert_eq!(
            r.checked.mismatch,
            0,
            "{what}: {count} events lost from line {} on: {:#?}",
            at + 1,
            &r.mismatches[..r.mismatches.len().min(3)]
        );
        let c = r.checked;
        let sum = c.same + c.hw_ad + c.fast_pf + c.silent_unfreeze + c.split_child + c.reordered + c.unknown;
        assert_eq!(sum, r.transitions, "{what}: each transition is counted once");
        done += 1;
        if done == tries {
            return;
        }
    }
    assert!(done > 0, "{what}: nothing could be dropped");
}

#[test]
fn whatever_is_lost_nothing_is_called_wrong() {
    for (n, path) in shipped().into_iter().enumerate() {
        no_mismatch(
            &kernel(&path),
            &lines(&path),
            4 * times(),
            seed() + n as u64,
            &path.display().to_string(),
        );
    }
}

#[test]
fn whatever_is_lost_of_a_recording_without_kprobes_nothing_is_called_wrong() {
    for (n, path) in shipped().into_iter().enumerate() {
        let own = kernels_own(&lines(&path));
        no_mismatch(&kernel(&path), &own, 3 * times(), seed() + 100 + n as u64, &path.display().to_string());
    }
}

#[test]
fn losses_in_all_recordings_call_nothing_wrong() {
    // A long run takes each of them; the largest says nothing that the others do not.
    let step = if times() > 1 { 1 } else { 5 };
    let some = all().into_iter().filter(|p| !p.ends_with("i_teardown/trace.txt.gz")).step_by(step);
    for (n, path) in some.enumerate() {
        no_mismatch(
            &kernel(&path),
            &lines(&path),
            times(),
            seed() + 1000 + n as u64,
            &path.display().to_string(),
        );
    }
}

#[test]
fn several_losses_on_several_cpus_call_nothing_wrong() {
    for path in shipped() {
        let mut random = Random(seed() + 5);
        let mut text = lines(&path);
        let mut losses = 0;
        for _ in 0..30 {
            let (at, count) = (random.below(text.len()), 1 + random.below(300));
            if let Some(cut) = cut(&text, at, count, true)
                && !cut.dropped.iter().any(|l| l.contains("LOST"))
            {
                text = cut.text;
                losses += 1;
            }
        }
        let r = check(&kernel(&path), &text).expect("replays");
        assert!(losses > 10 && r.losses.len() == losses);
        assert_eq!(r.checked.mismatch, 0, "{}: {:#?}", path.display(), r.mismatches);
    }
}

#[test]
fn what_was_not_touched_stays_checked() {
    for path in shipped() {
        let text = lines(&path);
        let mut random = Random(seed() + 11);
        let mut compared = 0;
        for _ in 0..5 * times() {
            let at = random.below(text.len());
            let Some(cut) = cut(&text, at, 200, true) else { continue };
            let r = check(&kernel(&path), &cut.text).expect("replays");
            // An unknown is owed to: a change that was dropped, 512 silent children of a dropped split or table, a fast
            // fault that was dropped, and what threads did until an event named their root again.
            let dropped = |what: &str| cut.dropped.iter().filter(|l| l.contains(what)).count();
            let changes = dropped(" kvm_tdp_mmu_spte_changed: ");
            let tables = cut.dropped.iter().filter(|l| is_change(l) && l.contains("827")).count();
            let mut roots = HashMap::new();
            let mut adrift = 0;
            for line in &cut.text[cut.goes_on..] {
                let Some((_, _, pid)) = place(line) else { continue };
                if line.contains(" iter_start: ") {
                    roots.insert(pid, ());
                } else if is_change(line) && !roots.contains_key(&pid) {
                    adrift += 1;
                }
            }
            let owed = 2 * changes + 512 * tables + 2 * dropped("fast_page_fault") + 513 * adrift;
            assert!(
                r.checked.unknown <= owed as u64,
                "{} line {}: {} unknown, {owed} owed ({changes} changes, {tables} tables, {adrift} adrift)",
                path.display(),
                at + 1,
                r.checked.unknown
            );
            compared += 1;
        }
        assert!(compared > 0, "{}", path.display());
    }
}

#[test]
fn a_corruption_after_a_loss_is_caught() {
    for path in shipped() {
        let text = lines(&path);
        let mut random = Random(seed() + 17);
        let mut done = 0;
        for _ in 0..400 {
            let at = random.below(text.len());
            let Some(mut cut) = cut(&text, at, 50, true) else { continue };
            // A change whose entry had one already, long enough after the loss to be certain of.
            let Some((_, start, _)) = place(&cut.text[cut.goes_on]) else { continue };
            let (mut seen, mut hit, mut roots) = (HashMap::new(), None, HashMap::new());
            for (n, line) in cut.text.iter().enumerate().skip(cut.goes_on) {
                let Some((_, us, pid)) = place(line) else { continue };
                if let Some((_, root)) = line.split_once(" spt=").filter(|_| line.contains(" iter_start: ")) {
                    roots.insert(pid, root.split(' ').next().unwrap_or("").to_owned());
                }
                let Some(root) = roots.get(&pid).filter(|_| is_change(line)) else { continue };
                let sure = us > start + 2_000;
                let known: &mut u32 = seen.entry((root.clone(), entry(line))).or_default();
                if *known >= 2 && sure {
                    hit = Some(n);
                    break;
                }
                *known += u32::from(sure);
            }
            let Some(hit) = hit else { continue };
            let (_, _, old) = field(&cut.text[hit], "old_spte");
            cut.text[hit] = with_field(&cut.text[hit], "old_spte", old ^ 1 << 20);
            let r = check(&kernel(&path), &cut.text).expect("replays");
            assert!(r.checked.mismatch > 0, "{}: line {} {}", path.display(), hit + 1, cut.text[hit]);
            done += 1;
            if done == 2 * times() {
                break;
            }
        }
        assert!(
            done > 0 || path.to_string_lossy().contains("selftest"),
            "{}: nothing to corrupt",
            path.display()
        );
    }
}
