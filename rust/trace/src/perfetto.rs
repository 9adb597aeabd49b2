//! Timelines as Perfetto traces: native protobuf of track events, to be opened in the Perfetto UI.
//!
//! **Guarantee.** Slices of a track nest: a slice ends no later than the one that it began in. Times are written to the nanosecond as they are given, so
//! that sums over slices survive. A flow is named on every event that it passes and ended on its last.
//!
//! **Mechanism.** A run is a process, a thread a thread track under it; what overlaps a thread's phases without nesting in them (holds of a
//! lock, read sections) is a child track of the thread. Packets are written one by one: memory does not grow with the file.
//! Names are interned on one packet sequence, each sent before its first use.

use std::{borrow::Cow, collections::HashMap, io};

pub mod schema;

use schema::{
    CounterDescriptor, Data, EventType, Interned, InternedData, ProcessDescriptor, ThreadDescriptor,
    TracePacket, TrackDescriptor, TrackEvent,
};

/// A name: most of them are constants.
pub type Name = Cow<'static, str>;

/// A run.
#[derive(Clone, Debug, Default)]
pub struct Process {
    /// Shown as the process's name.
    pub name: String,
    /// Its threads, in the order in which they are to be shown.
    pub threads: Vec<Thread>,
    /// Its counters.
    pub counters: Vec<Counter>,
}

/// A thread: a lane of its own, and lanes below.
#[derive(Clone, Debug, Default)]
pub struct Thread {
    /// Its name.
    pub name: String,
    /// What it does, as events of the thread's own track.
    pub main: Lane,
    /// Tracks below it. The name of the thread's own lane is not used.
    pub lanes: Vec<Lane>,
}

/// A track of slices and instants.
#[derive(Clone, Debug, Default)]
pub struct Lane {
    /// Its name.
    pub name: Name,
    /// Stretches of time.
    pub spans: Vec<Span>,
    /// Points in time.
    pub instants: Vec<Instant>,
}

/// A stretch of time. `end` is not part of it.
#[derive(Clone, Debug, Default)]
pub struct Span {
    /// Begin in ns.
    pub begin: u64,
    /// End in ns.
    pub end: u64,
    /// Its name.
    pub name: Name,
    /// Its category, by which the UI filters.
    pub category: &'static str,
    /// Flows through its begin.
    pub flows: Flows,
}

/// A point in time.
#[derive(Clone, Debug, Default)]
pub struct Instant {
    /// When, in ns.
    pub at: u64,
    /// Its name.
    pub name: Name,
    /// Its category.
    pub category: &'static str,
    /// Flows through it.
    pub flows: Flows,
}

/// Flows through an event, by ids unique in the file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Flows {
    /// They begin here or pass.
    pub through: Vec<u64>,
    /// They end here.
    pub ending: Vec<u64>,
}

/// A number over time.
#[derive(Clone, Debug, Default)]
pub struct Counter {
    /// Its name.
    pub name: String,
    /// Its unit.
    pub unit: &'static str,
    /// (ns, value) by time.
    pub points: Vec<(u64, i64)>,
}

/// Writes the processes as one trace.
///
/// # Errors
/// What `out` says.
pub fn write(out: &mut impl io::Write, processes: &[Process]) -> io::Result<()> {
    let mut writer = Writer::new(out);
    processes.iter().try_for_each(|process| writer.process(process))
}

/// Reads a trace of ours back.
///
/// # Errors
/// [`io::ErrorKind::InvalidData`]: these bytes are none.
pub fn read(bytes: &[u8]) -> io::Result<schema::Trace> {
    prost::Message::decode(bytes).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

/// The only packet sequence.
const SEQUENCE: u32 = 1;
/// Ids of processes and threads begin here: none that a host's own trace would use is needed.
const FIRST_PID: i32 = 1_000_000;

/// A trace that is being written, process by process.
#[derive(Debug)]
pub struct Writer<W> {
    out: W,
    processes: i32,
    buffer: Vec<u8>,
    begun: bool,
    last_uuid: u64,
    last_id: i32,
    names: HashMap<Name, u64>,
    categories: HashMap<&'static str, u64>,
}

/// What is still to be written of a track's events.
struct Event<'a> {
    at: u64,
    kind: EventType,
    name: Option<&'a Name>,
    category: &'static str,
    flows: Option<&'a Flows>,
}

impl<W: io::Write> Writer<W> {
    /// An empty trace.
    pub fn new(out: W) -> Self {
        Self {
            out,
            processes: 0,
            buffer: Vec::new(),
            begun: false,
            last_uuid: 0,
            last_id: FIRST_PID,
            names: HashMap::new(),
            categories: HashMap::new(),
        }
    }

    fn packet(&mut self, mut packet: TracePacket) -> io::Result<()> {
        packet.trusted_packet_sequence_id = Some(SEQUENCE);
        let begins = !std::mem::replace(&mut self.begun, true);
        packet.sequence_flags =
            Some(if begins { schema::INCREMENTAL_STATE_CLEARED } else { schema::NEEDS_INCREMENTAL_STATE });
        self.buffer.clear();
        // As a field of the message `Trace`.
        prost::encoding::message::encode(1, &packet, &mut self.buffer);
        self.out.write_all(&self.buffer)
    }

    fn track(&mut self, mut track: TrackDescriptor) -> io::Result<u64> {
        self.last_uuid += 1;
        track.uuid = Some(self.last_uuid);
        self.packet(TracePacket { data: Some(Data::TrackDescriptor(track)), ..TracePacket::default() })?;
        Ok(self.last_uuid)
    }

    fn id(&mut self) -> i32 {
        self.last_id += 1;
        self.last_id
    }

    /// What was written to, for the last flush.
    pub fn into_inner(self) -> W {
        self.out
    }

    /// Writes a process with all its tracks; shown below those before it.
    ///
    /// # Errors
    /// What `out` says.
    pub fn process(&mut self, process: &Process) -> io::Result<()> {
        let pid = self.id();
        self.processes += 1;
        let uuid = self.track(TrackDescriptor {
            process: Some(ProcessDescriptor { pid: Some(pid), process_name: Some(process.name.clone()) }),
            child_ordering: Some(schema::EXPLICIT_ORDER),
            sibling_order_rank: Some(self.processes),
            ..TrackDescriptor::default()
        })?;
        for (rank, counter) in process.counters.iter().enumerate() {
            let track = self.track(TrackDescriptor {
                name: Some(counter.name.clone()),
                parent_uuid: Some(uuid),
                counter: Some(CounterDescriptor {
                    unit: Some(schema::UNIT_COUNT),
                    unit_name: Some(counter.unit.to_owned()),
                }),
                sibling_order_rank: i32::try_from(rank).ok(),
                ..TrackDescriptor::default()
            })?;
            for &(at, value) in &counter.points {
                let event = TrackEvent {
                    r#type: Some(EventType::Counter.into()),
                    track_uuid: Some(track),
                    counter_value: Some(value),
                    ..TrackEvent::default()
                };
                self.packet(TracePacket {
                    timestamp: Some(at),
                    data: Some(Data::TrackEvent(event)),
                    ..TracePacket::default()
                })?;
            }
        }
        for (rank, thread) in process.threads.iter().enumerate() {
            let rank = i32::try_from(process.counters.len() + rank).ok();
            self.thread(pid, uuid, rank, thread)?;
        }
        Ok(())
    }

    fn thread(&mut self, pid: i32, process: u64, rank: Option<i32>, thread: &Thread) -> io::Result<()> {
        let tid = self.id();
        let uuid = self.track(TrackDescriptor {
            thread: Some(ThreadDescriptor {
                pid: Some(pid),
                tid: Some(i64::from(tid)),
                thread_name: Some(thread.name.clone()),
            }),
            parent_uuid: Some(process),
            child_ordering: Some(schema::EXPLICIT_ORDER),
            sibling_order_rank: rank,
            ..TrackDescriptor::default()
        })?;
        self.lane(uuid, &thread.main)?;
        for (rank, lane) in thread.lanes.iter().enumerate() {
            let track = self.track(TrackDescriptor {
                name: Some(lane.name.clone().into_owned()),
                parent_uuid: Some(uuid),
                sibling_order_rank: i32::try_from(rank).ok(),
                ..TrackDescriptor::default()
            })?;
            self.lane(track, lane)?;
        }
        Ok(())
    }

    fn lane(&mut self, track: u64, lane: &Lane) -> io::Result<()> {
        for event in events(lane) {
            self.event(track, &event)?;
        }
        Ok(())
    }

    fn event(&mut self, track: u64, event: &Event<'_>) -> io::Result<()> {
        let mut fresh = InternedData::default();
        let mut written =
            TrackEvent { r#type: Some(event.kind.into()), track_uuid: Some(track), ..TrackEvent::default() };
        if let Some(name) = event.name {
            let next = self.names.len() as u64 + 1;
            let iid = *self.names.entry(name.clone()).or_insert_with(|| {
                fresh.event_names.push(Interned { iid: Some(next), name: Some(name.clone().into_owned()) });
                next
            });
            written.name_iid = Some(iid);
            let next = self.categories.len() as u64 + 1;
            let iid = *self.categories.entry(event.category).or_insert_with(|| {
                let name = Some(event.category.to_owned());
                fresh.event_categories.push(Interned { iid: Some(next), name });
                next
            });
            written.category_iids.push(iid);
        }
        if let Some(flows) = event.flows {
            written.flow_ids.clone_from(&flows.through);
            written.terminating_flow_ids.clone_from(&flows.ending);
        }
        let any = !(fresh.event_names.is_empty() && fresh.event_categories.is_empty());
        self.packet(TracePacket {
            timestamp: Some(event.at),
            interned_data: any.then_some(fresh),
            data: Some(Data::TrackEvent(written)),
            ..TracePacket::default()
        })
    }
}

/// A lane's events in the order of a stack: by time, ends before begins. A span that outlasts the one in which it began ends with
/// it.
fn events(lane: &Lane) -> Vec<Event<'_>> {
    let mut spans: Vec<&Span> = lane.spans.iter().filter(|span| span.begin <= span.end).collect();
    spans.sort_by_key(|span| (span.begin, std::cmp::Reverse(span.end)));
    let mut instants: Vec<&Instant> = lane.instants.iter().collect();
    instants.sort_by_key(|instant| instant.at);
    let mut instants = instants.into_iter().peekable();
    let mut all = Vec::with_capacity(2 * spans.len() + lane.instants.len());
    let mut open: Vec<u64> = Vec::new();
    let end = |at| Event { at, kind: EventType::SliceEnd, name: None, category: "", flows: None };
    let mut instants_until = |at: u64, all: &mut Vec<_>| {
        while let Some(instant) = instants.next_if(|instant| instant.at < at) {
            let (name, flows) = (Some(&instant.name), Some(&instant.flows));
            let (at, category) = (instant.at, instant.category);
            all.push(Event { at, kind: EventType::Instant, name, category, flows });
        }
    };
    for span in spans {
        while let Some(at) = open.pop_if(|at| *at <= span.begin) {
            instants_until(at, &mut all);
            all.push(end(at));
        }
        instants_until(span.begin, &mut all);
        let (name, flows) = (Some(&span.name), Some(&span.flows));
        let (at, category) = (span.begin, span.category);
        all.push(Event { at, kind: EventType::SliceBegin, name, category, flows });
        open.push(open.last().map_or(span.end, |outer| span.end.min(*outer)));
    }
    while let Some(at) = open.pop() {
        instants_until(at, &mut all);
        all.push(end(at));
    }
    instants_until(u64::MAX, &mut all);
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(begin: u64, end: u64, name: &'static str) -> Span {
        Span { begin, end, name: name.into(), category: "phase", flows: Flows::default() }
    }

    fn shape(lane: &Lane) -> Vec<(u64, EventType)> {
        events(lane).iter().map(|event| (event.at, event.kind)).collect()
    }

    #[test]
    fn spans_become_a_stack_whatever_their_order() {
        use EventType::{Instant as I, SliceBegin as B, SliceEnd as E};
        let lane = Lane {
            name: "".into(),
            spans: vec![span(5, 9, "b"), span(0, 5, "a"), span(6, 7, "inner"), span(9, 9, "empty")],
            instants: vec![
                Instant { at: 100, ..Instant::default() },
                Instant { at: 6, ..Instant::default() },
            ],
        };
        assert_eq!(
            shape(&lane),
            [(0, B), (5, E), (5, B), (6, B), (6, I), (7, E), (9, E), (9, B), (9, E), (100, I)]
        );
    }

    #[test]
    fn a_span_ends_with_the_one_that_it_began_in() {
        use EventType::{SliceBegin as B, SliceEnd as E};
        let lane = Lane {
            spans: vec![span(0, 10, "outer"), span(4, 15, "late"), span(12, 13, "next")],
            ..Lane::default()
        };
        assert_eq!(shape(&lane), [(0, B), (4, B), (10, E), (10, E), (12, B), (13, E)]);
    }
}
