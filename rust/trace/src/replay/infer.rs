//! Which kernel a recording is of: given, else the folder's name, else what the recording shows.

use crate::error::ReplayError;
use crate::event::{Event, Probe};
use crate::reader::{Item, TraceReader};
use crate::source::Input;
use std::io::{Cursor, Read};
use std::path::Path;
use tdpmmu_spte::{Format, KernelProfile, Spte};

/// Most bytes of a pipe that are held back to look at before the replay begins.
const PEEK: usize = 64 << 20;

/// Where a profile's name came from.
pub(crate) type Source = &'static str;

pub(crate) fn known() -> String {
    KernelProfile::NAMES.join(", ")
}

/// `.../6.12/j_misc/trace.txt.gz`: the folders above, nearest first, if one is a profile's name.
fn from_folder(path: &Path) -> Option<KernelProfile> {
    let above = path.ancestors().skip(1).take(2);
    above.filter_map(|p| p.file_name()?.to_str()).find_map(|name| KernelProfile::named(name).ok())
}

/// The profile for `input`, and the input to replay.
pub(crate) fn choose(
    given: Option<KernelProfile>,
    input: Input,
) -> Result<(KernelProfile, Source, Input), ReplayError> {
    if let Some(profile) = given {
        return Ok((profile, "given", input));
    }
    let path = input.path();
    if let Input::File(ref p) = input
        && let Some(profile) = from_folder(p).or_else(|| from_folder(&p.canonicalize().ok()?))
    {
        return Ok((profile, "folder", input));
    }
    let (scan, input) = match input {
        Input::File(p) => (Input::File(p.clone()), Input::File(p)),
        Input::Open { name, file } => {
            let io = |source| crate::error::TraceError::Io { path: path.clone(), source };
            let again = file.try_clone().map_err(io)?;
            (Input::Open { name: name.clone(), file: again }, Input::Open { name, file })
        }
        other => {
            let (name, mut reader): (String, Box<dyn Read + Send>) = match other {
                Input::Reader { name, reader } => (name, reader),
                _ => ("-".to_owned(), Box::new(std::io::stdin())),
            };
            let mut head = Vec::new();
            let io = |source| crate::error::TraceError::Io { path: path.clone(), source };
            if crate::source::begins_a_dat(&mut reader, &mut head).map_err(io)? {
                let file = crate::source::spool(&mut Cursor::new(head).chain(reader)).map_err(io)?;
                let again = file.try_clone().map_err(io)?;
                return settle(
                    Input::Open { name: name.clone(), file: again },
                    Input::Open { name, file },
                    path,
                );
            }
            reader.by_ref().take(PEEK as u64).read_to_end(&mut head).map_err(io)?;
            let copy = head.clone();
            let scan = Input::Reader { name: name.clone(), reader: Box::new(Cursor::new(copy)) };
            (scan, Input::Reader { name, reader: Box::new(Cursor::new(head).chain(reader)) })
        }
    };
    settle(scan, input, path)
}

/// What the recording itself shows.
fn settle(
    scan: Input,
    input: Input,
    path: std::path::PathBuf,
) -> Result<(KernelProfile, Source, Input), ReplayError> {
    let evidence = Evidence::collect(scan)?;
    match evidence.verdict() {
        Some(profile) => Ok((profile, "inferred", input)),
        None => Err(ReplayError::CannotInfer { path, evidence: evidence.to_string(), known: known() }),
    }
}

#[derive(Debug, Default)]
struct Evidence {
    changes: u64,
    nonpresent: Option<u64>,
    frozen: Option<u64>,
    worker: bool,
    wide_access: Option<bool>,
}

impl std::fmt::Display for Evidence {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let hex = |v: Option<u64>| v.map_or("not seen".to_owned(), |v| format!("{v:#x}"));
        write!(
            f,
            "{} SPTE changes; empty value {}; frozen value {}; access bits in the role {}",
            self.changes,
            hex(self.nonpresent),
            hex(self.frozen),
            match self.wide_access {
                None => "not seen",
                Some(true) => "4",
                Some(false) => "3",
            }
        )
    }
}

impl Evidence {
    fn collect(input: Input) -> Result<Self, ReplayError> {
        let mut reader = TraceReader::open(input, false)?;
        let mut e = Evidence::default();
        // Damage further on is for the replay to report.
        while let Ok(Some(item)) = reader.next() {
            if let Item::Record(_, event) = item {
                e.see(&event);
            }
            if e.complete() {
                break;
            }
        }
        Ok(e)
    }

    fn see(&mut self, event: &Event<'_>) {
        match *event {
            Event::SpteChanged { old, new, .. } => {
                self.changes += 1;
                for value in [old, new] {
                    match value {
                        0 | Format::BIT63 => _ = self.nonpresent.get_or_insert(value),
                        v if !Spte(v).is_present() && v & 0b111 == 0 && v & Spte::PFN_MASK == 0 => {
                            _ = self.frozen.get_or_insert(v);
                        }
                        v if v == 1 << 59 => _ = self.frozen.get_or_insert(v),
                        _ => {}
                    }
                }
            }
            Event::Probe(Probe::ZapRootWork) | Event::ScheduleZapRoot(_) => self.worker = true,
            Event::GetPage { page, .. } | Event::PrepareZapPage(page) => {
                self.wide_access = Some(page.wide_access)
            }
            Event::SpteRequested { access, .. } => _ = self.wide_access.get_or_insert(access.is_some()),
            _ => {}
        }
    }

    /// The worker shows itself only at a zap, so an old kernel's recording is read on.
    fn complete(&self) -> bool {
        self.nonpresent == Some(Format::BIT63) && self.frozen.is_some()
            || self.worker && self.frozen.is_some()
    }

    fn verdict(&self) -> Option<KernelProfile> {
        let name = match (self.nonpresent, self.frozen, self.wide_access) {
            _ if self.changes == 0 => return Some(KernelProfile::default()),
            (Some(0), None | Some(0x5a0), _) if self.worker => "6.1-async",
            (Some(0), None | Some(0x5a0), _) => "6.1",
            (Some(0), Some(_), _) => "5.10",
            (_, Some(0x8000_0000_0000_05a0), _) => "6.12",
            (_, Some(0x8000_0000_0000_01a0), _) => "7.2",
            (_, Some(0x5a0), _) => "6.1",
            (Some(_), None, Some(true)) => "7.2",
            (Some(_), None, Some(false)) => "6.12",
            _ => return None,
        };
        let mut profile = KernelProfile::named(name).ok()?;
        if let Some(frozen) = self.frozen {
            profile.format_frozen = frozen;
        }
        Some(profile)
    }
}
