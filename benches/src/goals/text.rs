//! Reading a recording of real KVM: MB of text a second on one core.
//!
//! The text is a recording that this repository carries (Linux 6.1, `f_concurrent`), unpacked once and given to the reader
//! over and over from memory, at least 256 MB of it: no disk and no decompression in the time.

use std::io::Read;
use std::sync::Arc;
use std::time::Instant;

use tdpmmu_trace::{Input, Item, TraceReader};

use super::{Figure, Goal};
use crate::harness::BenchError;

const RECORDING: &[u8] = include_bytes!("../../../tests/data/6.1/f_concurrent/trace.txt.gz");
const LEAST_BYTES: u64 = 256_000_000;

/// The same bytes again and again.
struct Again {
    text: Arc<[u8]>,
    at: usize,
    turns: u64,
}

impl Read for Again {
    fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
        if self.at == self.text.len() {
            self.turns = self.turns.saturating_sub(1);
            self.at = 0;
        }
        if self.turns == 0 {
            return Ok(0);
        }
        let n = (&self.text[self.at..]).read(buf)?;
        self.at += n;
        Ok(n)
    }
}

pub(super) fn reading(reps: u32) -> Result<Figure, BenchError> {
    let mut text = Vec::new();
    flate2::read::MultiGzDecoder::new(RECORDING).read_to_end(&mut text).map_err(BenchError::engine)?;
    let text: Arc<[u8]> = text.into();
    let turns = LEAST_BYTES.div_ceil(text.len() as u64);
    let mut best: f64 = 0.0;
    let mut bytes = 0;
    for _ in 0..reps.min(3) {
        let reader = Box::new(Again { text: text.clone(), at: 0, turns });
        let start = Instant::now();
        let input = Input::Reader { name: "f_concurrent".into(), reader };
        let mut reader = TraceReader::open(input, true).map_err(BenchError::engine)?;
        let mut events = 0u64;
        while let Some(item) = reader.next().map_err(BenchError::engine)? {
            events += u64::from(matches!(item, Item::Record(_, event) if event.is_kvm()));
        }
        let stats = reader.finish().map_err(BenchError::engine)?;
        let seconds = start.elapsed().as_secs_f64();
        if stats.bytes != turns * text.len() as u64 || events == 0 || !events.is_multiple_of(turns) {
            let what = format!("{events} KVM events in {} bytes of trace text", stats.bytes);
            return Err(BenchError::Engine { what });
        }
        bytes = stats.bytes;
        best = best.max(bytes as f64 / 1e6 / seconds);
    }
    Ok(Figure::ns("trace text, one core", best, bytes).unit("MB/s").goal(Goal::AtLeast(300.0)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_comes_as_often_as_asked() {
        let mut out = String::new();
        let mut reader = Again { text: (*b"ab").into(), at: 0, turns: 3 };
        reader.read_to_string(&mut out).unwrap();
        assert_eq!(out, "ababab");
    }
}
