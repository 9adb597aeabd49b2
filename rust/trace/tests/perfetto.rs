//! A trace that was written is what was to be written, packet by packet.

use std::collections::HashMap;

use tdpmmu_trace::perfetto::{
    self, Counter, Flows, Instant, Lane, Process, Span, Thread,
    schema::{Data, EventType, Trace, TrackDescriptor},
};

fn run(name: &str, flow: u64) -> Process {
    let main = Lane {
        spans: vec![
            Span { begin: 10, end: 30, name: "spte_work".into(), category: "phase", ..Span::default() },
            Span { begin: 30, end: 35, name: "yield".into(), category: "phase", ..Span::default() },
            Span {
                begin: 35,
                end: 1_000_000_007,
                name: "spte_work".into(),
                category: "phase",
                ..Span::default()
            },
        ],
        ..Lane::default()
    };
    let root = |at, name: &'static str, flows| Instant { at, name: name.into(), category: "root", flows };
    let lanes = vec![
        Lane {
            name: "mmu_lock".into(),
            spans: vec![Span {
                begin: 12,
                end: 31,
                name: "shared".into(),
                category: "lock",
                ..Span::default()
            }],
            ..Lane::default()
        },
        Lane {
            name: "roots".into(),
            instants: vec![
                root(11, "root 5 invalidated", Flows { through: vec![flow], ending: vec![] }),
                root(90, "root 5 freed", Flows { through: vec![], ending: vec![flow] }),
            ],
            ..Lane::default()
        },
    ];
    Process {
        name: name.to_owned(),
        threads: vec![Thread { name: "vmm".into(), main, lanes }],
        counters: vec![Counter { name: "waiting".into(), unit: "pages", points: vec![(10, 0), (20, 512)] }],
    }
}

fn decoded(processes: &[Process]) -> Trace {
    let mut bytes = Vec::new();
    perfetto::write(&mut bytes, processes).unwrap();
    perfetto::read(&bytes).unwrap()
}

/// (name of the track, its events as (type, at, name)), names resolved as a reader resolves them.
fn tracks(trace: &Trace) -> HashMap<u64, (TrackDescriptor, Vec<(EventType, u64, String)>)> {
    let mut names = HashMap::new();
    let mut tracks: HashMap<u64, (TrackDescriptor, Vec<_>)> = HashMap::new();
    for packet in &trace.packet {
        for name in packet.interned_data.iter().flat_map(|data| &data.event_names) {
            assert!(names.insert(name.iid(), name.name().to_owned()).is_none(), "interned twice");
        }
        match packet.data.as_ref().unwrap() {
            Data::TrackDescriptor(track) => {
                if let Some(parent) = track.parent_uuid {
                    assert!(tracks.contains_key(&parent), "a parent comes first");
                }
                assert!(tracks.insert(track.uuid(), (track.clone(), Vec::new())).is_none());
            }
            Data::TrackEvent(event) => {
                let name = event.name_iid.map(|iid| names[&iid].clone()).unwrap_or_default();
                tracks.get_mut(&event.track_uuid()).unwrap().1.push((
                    event.r#type(),
                    packet.timestamp(),
                    name,
                ));
            }
        }
    }
    tracks
}

#[test]
fn the_slices_of_each_track_come_back_with_their_times_and_names() {
    let trace = decoded(&[run("async-worker", 1), run("sync", 2)]);
    let tracks = tracks(&trace);
    let processes: Vec<&str> = {
        let mut all: Vec<_> = tracks.values().filter_map(|(track, _)| track.process.as_ref()).collect();
        all.sort_by_key(|process| process.pid());
        all.iter().map(|process| process.process_name()).collect()
    };
    assert_eq!(processes, ["async-worker", "sync"]);
    let threads: Vec<_> = tracks.values().filter(|(track, _)| track.thread.is_some()).collect();
    assert_eq!(threads.len(), 2);
    let (begin, end) = (EventType::SliceBegin, EventType::SliceEnd);
    for (track, events) in threads {
        assert_eq!(track.thread.as_ref().unwrap().thread_name(), "vmm");
        let expected = [
            (begin, 10, "spte_work"),
            (end, 30, ""),
            (begin, 30, "yield"),
            (end, 35, ""),
            (begin, 35, "spte_work"),
            (end, 1_000_000_007, ""),
        ];
        assert!(events.iter().map(|(kind, at, name)| (*kind, *at, &**name)).eq(expected));
    }
    let ids: Vec<_> = tracks.values().filter_map(|(track, _)| track.thread.as_ref()).collect();
    assert_ne!(ids[0].tid, ids[1].tid);
    assert_ne!(ids[0].pid, ids[1].pid);
}

#[test]
fn a_flow_passes_its_events_and_ends_once() {
    let trace = decoded(&[run("async-worker", 7)]);
    let events: Vec<_> = trace
        .packet
        .iter()
        .filter_map(|packet| match &packet.data {
            Some(Data::TrackEvent(event))
                if !(event.flow_ids.is_empty() && event.terminating_flow_ids.is_empty()) =>
            {
                Some((packet.timestamp(), event.flow_ids.clone(), event.terminating_flow_ids.clone()))
            }
            _ => None,
        })
        .collect();
    assert_eq!(events, [(11, vec![7], vec![]), (90, vec![], vec![7])]);
}

#[test]
fn a_counter_keeps_its_points() {
    let trace = decoded(&[run("async-worker", 1)]);
    let points: Vec<_> = trace
        .packet
        .iter()
        .filter_map(|packet| match &packet.data {
            Some(Data::TrackEvent(event)) => event.counter_value.map(|value| (packet.timestamp(), value)),
            _ => None,
        })
        .collect();
    assert_eq!(points, [(10, 0), (20, 512)]);
}

#[test]
fn the_first_packet_clears_what_a_reader_interned_and_all_are_of_one_sequence() {
    let trace = decoded(&[run("async-worker", 1)]);
    let flags: Vec<u32> = trace.packet.iter().map(|packet| packet.sequence_flags()).collect();
    assert_eq!(flags[0], 1);
    assert!(flags[1..].iter().all(|flags| *flags == 2));
    assert!(trace.packet.iter().all(|packet| packet.trusted_packet_sequence_id() == 1));
}
