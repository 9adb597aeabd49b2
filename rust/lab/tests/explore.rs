//! Exploration: sound designs stand, flawed ones fall, what is found is found again.

use std::collections::BTreeSet;
use std::sync::OnceLock;

use serde_json::Value;
use tdpmmu_lab::Control;
use tdpmmu_lab::explain::explain;
use tdpmmu_lab::explore::{
    Found, Mix, Models, Protocol, Search, Seed, command, flawed_designs, is_shadow, natural_profile,
    protocol, protocols, search, sound_designs,
};
use tdpmmu_lab::program::{Act, Program, ProgramError, ThreadSpec, Who, run_real};
use tdpmmu_oracle::Judge;
use tdpmmu_platform::Site;
use tdpmmu_platform::sim::SiteCounts;

fn silent() -> Control {
    Control::silent()
}

fn program(name: &str, design: &str) -> Program {
    protocol(name).expect("a protocol").program(design, natural_profile(design)).expect("fits")
}

/// Which protocol is searched under which design: those of the TDP MMU under all of its own, and under one of the shadow MMU; those of the shadow MMU under all of its own, and under two whose L2s run on shadow pages.
fn met(protocol: &Protocol, design: &str) -> bool {
    let about_shadow = protocol.name.starts_with("shadow-") || protocol.name.starts_with("nested-");
    match (about_shadow, is_shadow(design)) {
        (true, true) => protocol.fits(design),
        (true, false) => matches!(design, "sync" | "async-worker"),
        (false, true) => design == "shadow-gen",
        (false, false) => true,
    }
}

/// One search of each protocol under each sound design that it is searched under, for all tests that look at them.
fn survey() -> &'static [(String, Found)] {
    static SURVEY: OnceLock<Vec<(String, Found)>> = OnceLock::new();
    SURVEY.get_or_init(|| {
        let schedules = if std::env::var_os("TDPMMU_STRESS").is_some() { 2_000 } else { 40 };
        let how = Search { schedules, seed: 5, minimise: 500, ..Search::default() };
        let mut all = Vec::new();
        for design in sound_designs() {
            for protocol in protocols().iter().filter(|protocol| met(protocol, design)) {
                let program = program(protocol.name, design);
                let found = search(&program, None, &how, &silent()).expect("searched");
                all.push((format!("{} under {design}", protocol.name), found));
            }
        }
        all
    })
}

#[test]
fn no_schedule_breaks_a_sound_design_in_its_kernel() {
    let mut broken = Vec::new();
    for (name, found) in survey() {
        assert!(found.failure.is_some() || found.acts.0 > 0, "{name}: nothing was done");
        if let Some(failure) = &found.failure {
            broken.push(format!(
                "{name}: {}: {}\n  {}",
                failure.finding.rule, failure.finding.what, failure.seed
            ));
        }
    }
    assert!(broken.is_empty(), "{}", broken.join("\n"));
}

/// Sites that no protocol can force on the simulated platform, and why.
const NEVER_FORCED: &[(Site, &str)] =
    &[(Site::AllocBulk, "bulk population prepares measurements; no act of a program does it")];

#[test]
fn each_site_is_forced_by_some_protocol() {
    let mut sites = SiteCounts::default();
    for (_, found) in survey() {
        sites.add(&found.sites);
    }
    // A site that few schedules come to gets more of them.
    for site in Site::ALL {
        let passed = |found: &Found| found.sites.of(*site).passed != 0;
        for (name, _) in survey().iter().filter(|(_, found)| passed(found)).take(3) {
            if sites.of(*site).forced != 0 {
                break;
            }
            let (protocol, design) = name.split_once(" under ").expect("both");
            let how = Search { seed: 23, schedules: 400, strategy: Mix::Random, ..Search::default() };
            sites.add(&search(&program(protocol, design), None, &how, &silent()).expect("searched").sites);
        }
    }
    let forced: BTreeSet<&str> =
        sites.iter().filter(|(_, count)| count.forced != 0).map(|(site, _)| site.name()).collect();
    let excused: BTreeSet<&str> = NEVER_FORCED.iter().map(|(site, _)| site.name()).collect();
    let missing: Vec<&str> = Site::ALL
        .iter()
        .map(|site| site.name())
        .filter(|site| !forced.contains(site) && !excused.contains(site))
        .collect();
    assert!(missing.is_empty(), "never forced: {missing:?}");
    let needless: Vec<_> = excused.intersection(&forced).collect();
    assert!(needless.is_empty(), "excused and forced: {needless:?}");
}

#[test]
fn the_worker_of_v3_is_robbed_of_its_reference_without_being_told_where_to_look() {
    let program = program("root-lifecycle", "system-workqueue");
    let how = Search { seed: 3, schedules: 1_000, ..Search::default() };
    let found = search(&program, None, &how, &silent()).expect("searched");
    let failure = found.failure.expect("v3 underflows");
    assert_eq!((failure.finding.rule.as_str(), failure.oracle.as_str()), ("put-by-non-owner", "O-REF"));
    assert!(failure.preemptions <= 3, "{} preemptions: {}", failure.preemptions, failure.schedule);
    assert!(failure.replays && failure.schedule.turns.len() <= failure.minimised_from);
    let story = failure.story.expect("told");
    assert!(story.text.contains("gift -1") && story.text.contains("put-by-non-owner"), "{}", story.text);
}

#[test]
fn a_fast_zap_that_waits_for_nobody_leaves_what_it_met() {
    let program = program("root-lifecycle", "no-second-phase");
    let found = search(&program, None, &Search::default(), &silent()).expect("searched");
    let failure = found.failure.expect("P-FZ does not hold");
    assert_eq!((failure.finding.rule.as_str(), failure.oracle.as_str()), ("fast-zap-left", "O-FZ"));
    assert!(failure.preemptions <= 3, "{}", failure.schedule);
}

#[test]
fn each_flawed_design_is_known_and_no_sound_one_is_called_so() {
    assert_eq!(flawed_designs(), ["system-workqueue", "no-second-phase"]);
    assert_eq!(sound_designs().len(), 8 + 5);
    assert_eq!(sound_designs().into_iter().filter(|design| is_shadow(design)).count(), 5);
}

#[test]
fn the_same_request_finds_the_same_whatever_the_number_of_threads() {
    let program = program("fastzap-defunct", "system-workqueue");
    let look = |jobs| {
        let how = Search { seed: 11, jobs, schedules: 400, ..Search::default() };
        let found = search(&program, None, &how, &silent()).expect("searched");
        let failure = found.failure.expect("v3 underflows");
        (found.schedules, found.steps, found.sites, failure.seed, failure.hash, failure.story.map(|s| s.text))
    };
    let (one, three) = (look(1), look(3));
    assert_eq!(one, three);
    // And another seed takes another way.
    let other = Search { seed: 12, schedules: 40, memory: Models::Sc, ..Search::default() };
    let calm = self::program("dirtylog-zap", "sync");
    let steps = |how: &Search| search(&calm, None, how, &silent()).expect("searched").steps;
    assert_ne!(steps(&other), steps(&Search { seed: 13, ..other.clone() }));
    assert_eq!(steps(&other), steps(&other));
}

#[test]
fn a_pasted_seed_and_a_result_file_tell_the_story_that_the_search_told() {
    let request = r#"{"protocol":"root-lifecycle","design":"system-workqueue","seed":3,"schedules":1000}"#;
    let answer: Value = serde_json::from_str(&command(request, &silent()).expect("explored")).expect("JSON");
    assert_eq!(answer["schema"], "tdpmmu.explore/1");
    let violation = &answer["violation"];
    let seed = violation["seed"].as_str().expect("a seed");
    assert!(seed.starts_with("v1:root-lifecycle:system-workqueue:5.18:-:"), "{seed}");
    let (told, _) = explain(seed, None).expect("a seed");
    assert_eq!(told.text, violation["story"].as_str().expect("a story"));
    let (again, parsed) = explain(&answer.to_string(), None).expect("a result");
    assert_eq!((&again, parsed.to_string().as_str()), (&told, seed));
    for thread in ["vcpu-0", "vcpu-1", "caller"] {
        assert!(told.columns.iter().any(|column| column == thread), "{:?}", told.columns);
    }
    // As wide as a page, with three threads, a worker and RCU.
    let widest = told.text.lines().skip(16).map(|line| line.chars().count()).max();
    assert!(widest <= Some(120), "{widest:?}\n{}", told.text);
    for needed in ["FAST ZAP begins", "INVALID", "preempted at", "refs (", "->table", "RWX A D"] {
        assert!(told.text.contains(needed), "no {needed:?} in\n{}", told.text);
    }
    assert!(!told.html.contains("http") && !told.html.contains("<script"), "not self-contained");
    assert_eq!(told.html.matches("<tr>").count(), told.rows.len() + 1);
    let bound = &answer["bound"];
    assert!(bound["points"].as_u64() > Some(50) && bound["text"].as_str().expect("text").contains("depth 2"));
    assert!(answer["sites_forced"].as_object().expect("sites").len() > 10);
    let calm = explain(r#"{"violation":null}"#, None).expect_err("nothing to tell");
    assert!(calm.to_string().contains("nothing in it has failed"), "{calm}");
}

#[test]
fn each_act_is_done_by_some_protocol() {
    // The reader of acts lists what it knows.
    let told = serde_json::from_str::<Act>(r#"{"act":"?"}"#).expect_err("no act").to_string();
    let known: BTreeSet<String> = told.split('`').skip(3).step_by(2).map(str::to_owned).collect();
    assert!(known.len() > 40 && known.contains("fast-zap"), "{told}");
    let mut done = BTreeSet::new();
    for design in sound_designs().into_iter().chain(["sync"]) {
        for protocol in protocols().iter().filter(|protocol| protocol.fits(design)) {
            for act in program(protocol.name, design).acts() {
                let name = serde_json::to_value(act).expect("JSON")["act"].as_str().map(str::to_owned);
                done.insert(name.expect("a name"));
            }
        }
    }
    let missing: Vec<_> = known.difference(&done).collect();
    assert!(missing.is_empty(), "{missing:?}");
}

#[test]
fn protocols_run_on_real_threads_too() {
    for (name, design) in [
        ("root-lifecycle", "sync"),
        ("fault-zap", "async-worker"),
        ("teardown-worker", "inline"),
        ("shadow-quota", "shadow-gen"),
        ("shadow-unsync", "shadow-walk-break"),
        ("nested-quota", "sync"),
    ] {
        let program = program(name, design);
        let judge = Judge::new(program.rules().expect("rules"));
        let ended = run_real(&program, Some(judge.clone())).expect("ran");
        assert_eq!(ended.panics, [] as [&str; 0], "{name}");
        assert_eq!(judge.violations(), [], "{name} under {design}");
        for (at, thread) in program.threads.iter().enumerate() {
            let done: Vec<_> = ended.performed.iter().filter(|done| done.thread == at).collect();
            // Whoever begins when the VM has been closed already is refused, once.
            let too_late = done.len() == 1 && done[0].result.is_err();
            assert!(done.len() == thread.acts.len() || too_late, "{name}, {}: {done:?}", thread.name);
        }
        assert!(ended.close.is_some_and(|close| close.is_clean()), "{name}");
    }
}

#[test]
fn a_protocol_about_an_l2_is_none_of_a_shadow_design() {
    let shown = protocol("nested-quota").expect("a protocol").program("shadow-gen", "6.12");
    assert!(shown.expect_err("refused").to_string().contains("nested-quota is about an L2"));
    for protocol in protocols() {
        assert_eq!(protocol.fits("shadow-gen"), protocol.name != "nested-quota");
    }
}

#[test]
fn a_program_that_makes_no_sense_is_refused_with_thread_act_and_rule() {
    let with =
        |threads: Vec<ThreadSpec>| Program::new("p", threads).check().map_err(|error| error.to_string());
    let vcpu = |acts: Vec<Act>| vec![ThreadSpec::vcpu(0, acts)];
    let told = |threads| with(threads).expect_err("refused");
    let text = told(vec![ThreadSpec::caller([Act::FastZap, Act::write(0)])]);
    assert_eq!(text, "thread caller, act 1 (access gfn=0x0 write): only the thread of a vCPU does that");
    assert!(told(vcpu(vec![Act::read(1 << 60)])).contains("act 0"));
    assert!(told(vcpu(vec![Act::WaitFor { flag: 3 }])).contains("nobody raises that flag"));
    assert!(told(vcpu(vec![Act::Unmap { hva_page: 0, pages: 0, may_block: true }])).contains("not empty"));
    assert!(told(vcpu(vec![Act::EnterSmm])).contains("machine.smm"));
    assert!(told(vcpu(vec![Act::CollectRings])).contains("machine.ring"));
    assert!(told(vcpu(vec![Act::SetCr3 { process: 0 }])).contains("machine.paging"));
    assert!(told(vcpu(vec![Act::EnterL2 { process: 0 }])).contains("machine.nested"));
    assert!(told(vcpu(vec![Act::GuestUnmap { process: 2, gva: 0 }])).contains("machine.processes"));
    assert!(told(vec![ThreadSpec::vcpu(7, [])]).contains("the VM has 2 vCPUs"));
    assert!(
        told(vec![ThreadSpec::vcpu(0, []), ThreadSpec { name: "b".into(), ..ThreadSpec::vcpu(0, []) }])
            .contains("one thread at a time")
    );
    let setup =
        Program { setup: vec![(Who::Caller, Act::Close)], ..Program::new("p", vcpu(vec![Act::read(0)])) };
    assert!(setup.check().expect_err("refused").to_string().contains("setup, act 0 (close)"));
    let error = Program::parse(r#"{"name":"p","threads":[],"colour":1}"#).expect_err("refused");
    assert!(matches!(error, ProgramError::Json(_)) && error.to_string().contains("colour"), "{error}");
    let late = Program::new("late", vcpu(vec![Act::read(0), Act::PreFault { gfn: 0, pages: 2 }]));
    let json = serde_json::to_string(&late).expect("JSON");
    assert_eq!(Program::parse(&json), Ok(late.clone()));
    let seed = Seed::of(&late, None, &"sc 0@1>2".parse().expect("a schedule")).to_string();
    assert_eq!(seed.parse::<Seed>().expect("fits").program, late);
}
