//! A run as a text that can be pasted: `v1:PROGRAM:DESIGN:PROFILE:BUG:SCHEDULE#CHECK`.
//!
//! **Guarantee.** A text that is accepted names exactly one run of this build: the program, the defect that was on, and every choice that was not the default. One that does not fit is refused with the part that does
//! not, and why; also one whose protocol has been changed since it was made ([`SeedError::Differs`]).
//!
//! **Mechanism.** PROGRAM is the name of a protocol, `bug-` and a number for the museum's program of that bug, or `@` and the program itself (JSON, deflated, base64url). BUG is `-` or the number of a bug of the museum. SCHEDULE is the printed schedule in characters that a shell
//! leaves alone: `0@12>1` is `0.12-1`, `~` is `=`, a space is `_`. CHECK is a checksum of the program.

use std::fmt;
use std::io::{Read, Write};
use std::str::FromStr;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use flate2::Compression;
use flate2::read::DeflateDecoder;
use flate2::write::DeflateEncoder;
use tdpmmu_platform::Bug;
use tdpmmu_platform::sim::Schedule;

use super::protocols::{protocol, protocols};
use crate::program::Program;
use crate::{LabError, museum};

/// Most bytes of a program inside a seed.
const MOST_BYTES: u64 = 1 << 22;

/// A run: what, with which defect, under which schedule.
#[derive(Clone, Debug, PartialEq)]
pub struct Seed {
    /// The program.
    pub program: Program,
    /// The defect that was on.
    pub bug: Option<Bug>,
    /// The choices.
    pub schedule: Schedule,
}

/// A text that names no run of this build.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SeedError {
    /// Another version of the text.
    #[error("seed: version {0:?}; this build reads v1")]
    Version(String),
    /// A part is missing.
    #[error("seed: {found} parts; expected v1:PROGRAM:DESIGN:PROFILE:BUG:SCHEDULE#CHECK")]
    Parts {
        /// How many there are.
        found: usize,
    },
    /// A part does not fit.
    #[error("seed: {part} = {value:?}: {rule}")]
    Part {
        /// Which.
        part: &'static str,
        /// Its value.
        value: String,
        /// Why.
        rule: String,
    },
    /// The program of that name is another one in this build.
    #[error(
        "seed: {name} is another program in this build (check {found:08x}, the seed was made with {made:08x}): the schedule would mean nothing"
    )]
    Differs {
        /// Its name.
        name: String,
        /// The checksum of the seed.
        made: u32,
        /// This build's.
        found: u32,
    },
}

impl From<SeedError> for LabError {
    fn from(error: SeedError) -> Self {
        LabError::Usage(error.to_string())
    }
}

fn part(part: &'static str, value: &str, rule: impl fmt::Display) -> SeedError {
    SeedError::Part { part, value: value.to_owned(), rule: rule.to_string() }
}

/// FNV-1a of the program's JSON.
fn check(program: &Program) -> u32 {
    let json = serde_json::to_vec(program).unwrap_or_default();
    json.iter().fold(0x811c_9dc5, |hash, byte| (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193))
}

fn packed(program: &Program) -> String {
    let json = serde_json::to_vec(program).unwrap_or_default();
    let mut encoder = DeflateEncoder::new(Vec::new(), Compression::best());
    // Into memory: it cannot fail.
    let packed = encoder.write_all(&json).and_then(|()| encoder.finish()).unwrap_or_default();
    format!("@{}", URL_SAFE_NO_PAD.encode(packed))
}

fn unpacked(text: &str) -> Result<Program, SeedError> {
    let bad = |rule: String| part("program", &shortened(text), rule);
    let packed = URL_SAFE_NO_PAD.decode(text).map_err(|error| bad(error.to_string()))?;
    let mut json = String::new();
    DeflateDecoder::new(packed.as_slice())
        .take(MOST_BYTES)
        .read_to_string(&mut json)
        .map_err(|error| bad(error.to_string()))?;
    Program::parse(&json).map_err(|error| bad(error.to_string()))
}

fn shortened(text: &str) -> String {
    match text.char_indices().nth(24) {
        Some((at, _)) => format!("{}...", &text[..at]),
        None => text.to_owned(),
    }
}

impl Seed {
    /// The seed of a run.
    pub fn of(program: &Program, bug: Option<Bug>, schedule: &Schedule) -> Self {
        Self { program: program.clone(), bug, schedule: schedule.clone() }
    }

    /// Is the program the protocol of that name, under its own design and profile?
    fn is_protocol(&self) -> bool {
        let machine = &self.program.machine;
        protocol(&self.program.name)
            .and_then(|known| known.program(&machine.design, &machine.profile).ok())
            .is_some_and(|known| known == self.program)
    }

    /// The name that this build knows the program by.
    fn name(&self) -> Option<String> {
        let id = self.bug.map(Bug::id);
        let shown = id.filter(|id| museum::program_named(id).as_ref() == Some(&self.program));
        match shown {
            Some(id) => Some(format!("bug-{id}")),
            None => self.is_protocol().then(|| self.program.name.clone()),
        }
    }

    /// Does the text look like a seed, of whatever version?
    pub fn looks_like(text: &str) -> bool {
        let head = text.trim_start().split(':').next().unwrap_or_default();
        head.strip_prefix('v').is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()))
    }
}

/// What a shell leaves alone, for what it does not.
const SPELLING: [(char, char); 4] = [(' ', '_'), ('@', '.'), ('>', '-'), ('~', '=')];

impl fmt::Display for Seed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let machine = &self.program.machine;
        let program = self.name().unwrap_or_else(|| packed(&self.program));
        let design = machine.design_name().unwrap_or_default();
        let bug = self.bug.map_or("-", |bug| bug.id());
        let mut schedule = self.schedule.to_string();
        for (from, to) in SPELLING {
            schedule = schedule.replace(from, &to.to_string());
        }
        let check = check(&self.program);
        write!(f, "v1:{program}:{design}:{}:{bug}:{schedule}#{check:08x}", machine.profile)
    }
}

impl FromStr for Seed {
    type Err = SeedError;

    fn from_str(text: &str) -> Result<Self, SeedError> {
        let text = text.trim();
        let (version, rest) = text.split_once(':').unwrap_or((text, ""));
        if version != "v1" {
            return Err(SeedError::Version(shortened(version)));
        }
        let parts: Vec<&str> = rest.splitn(5, ':').collect();
        let [name, design, profile, bug, tail] = parts[..] else {
            return Err(SeedError::Parts { found: 1 + parts.len() });
        };
        let (schedule, made) = tail.rsplit_once('#').ok_or(SeedError::Parts { found: 6 })?;
        let made = u32::from_str_radix(made, 16).map_err(|error| part("check", made, error))?;
        let program = match (name.strip_prefix('@'), name.strip_prefix("bug-")) {
            (Some(packed), _) => unpacked(packed)?,
            (None, Some(id)) => museum::program_named(id)
                .ok_or_else(|| part("program", name, "the museum has no bug of that number"))?,
            (None, None) => {
                let known = protocol(name).ok_or_else(|| {
                    let names: Vec<_> = protocols().iter().map(|protocol| protocol.name).collect();
                    part("program", name, format!("no such protocol; there are {}", names.join(", ")))
                })?;
                known.program(design, profile).map_err(|error| part("program", name, error))?
            }
        };
        let machine = &program.machine;
        if machine.design_name().as_deref() != Ok(design) {
            return Err(part("design", design, format!("the program in it is for {}", machine.design)));
        }
        if machine.profile != profile {
            return Err(part("profile", profile, format!("the program in it is for {}", machine.profile)));
        }
        let found = check(&program);
        if found != made {
            return Err(SeedError::Differs { name: program.name, made, found });
        }
        let bug = match bug {
            "-" => None,
            id => {
                Some(Bug::parse(id).ok_or_else(|| part("bug", id, "the museum has no bug of that number"))?)
            }
        };
        let mut spelled = schedule.to_owned();
        for (to, from) in SPELLING {
            spelled = spelled.replace(from, &to.to_string());
        }
        let schedule = spelled.parse().map_err(|error| part("schedule", schedule, error))?;
        Ok(Self { program, bug, schedule })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::program::{Act, ThreadSpec};

    fn schedule() -> Schedule {
        "tso:77 0@12>1 0@12~1 3@0h 10@4y 2@7f42".parse().expect("a schedule")
    }

    #[test]
    fn a_seed_reads_as_it_is_written_and_needs_no_quotes() {
        let named = protocol("root-lifecycle").expect("known").program("sync", "6.12").expect("fits");
        let own = Program::new("mine", vec![ThreadSpec::vcpu(0, [Act::write(0)])]);
        for (program, bug) in [(&named, None), (&own, None), (&named, Some(Bug::B11))] {
            let seed = Seed::of(program, bug, &schedule());
            let text = seed.to_string();
            assert_eq!(text.parse::<Seed>().as_ref(), Ok(&seed), "{text}");
            assert!(!text.contains([' ', '>', '<', '~', '!', '$', '*', '&', '|', ';', '\'', '"']), "{text}");
        }
        let shown = museum::program_named("21").expect("bug 21 is shown");
        let seed = Seed::of(&shown, Some(Bug::B21), &schedule());
        assert!(seed.to_string().starts_with("v1:bug-21:"), "{seed}");
        assert_eq!(seed.to_string().parse::<Seed>(), Ok(seed));
        let text = Seed::of(&named, None, &schedule()).to_string();
        assert!(
            text.starts_with("v1:root-lifecycle:sync:6.12:-:tso:77_0.12-1_0.12=1_3.0h_10.4y_2.7f42#"),
            "{text}"
        );
    }

    #[test]
    fn a_seed_that_does_not_fit_is_refused_with_the_part_that_does_not() {
        let program = protocol("root-lifecycle").expect("known").program("sync", "6.12").expect("fits");
        let text = Seed::of(&program, None, &schedule()).to_string();
        let told = |text: &str| text.parse::<Seed>().expect_err("refused").to_string();
        assert!(told(&text.replace("v1:", "v2:")).contains("version \"v2\""));
        assert!(told("v1:root-lifecycle").contains("2 parts"));
        assert!(told(&text.replace("root-lifecycle", "root-life")).contains("no such protocol"));
        assert!(told(&text.replace(":-:", ":99:")).contains("no bug of that number"));
        assert!(told(&text.replace("0.12-1", "0.12-")).contains("schedule"));
        assert!(told(&text.replace(":sync:", ":inline:")).contains("another program"));
        assert!(told(&text.replace(":6.12:", ":6.13:")).contains("6.13"));
        assert!(told("v1:bug-99:sync:6.12:-:sc#00000000").contains("museum"));
        assert!(told("v1:@!!:sync:6.12:-:sc#00000000").contains("program"));
    }
}
