//! A fault plan as data: what is to go wrong, and how often.
//!
//! The text form is a list of `kind=value` with commas between; `none` and the empty text are the plan without faults. What is printed parses to what was printed.
//!
//! | text | is |
//! | --- | --- |
//! | `alloc=7`, `alloc=7+` | the seventh request for table pages fails; it and all after it |
//! | `alloc=every`, `alloc=5%` | one of them, another in each run; each with that probability |
//! | `tables=600` | the pool ends at so many pages |
//! | `cmpxchg=5%`, `cmpxchg=SpteInstall:5%` | a compare-exchange fails although it found what it expected |
//! | `yield=all`, `yield=SpteZap`, `yield=20%` | a walk gives mmu_lock up at each check; where its last access was of that site (real threads only); at some |
//! | `gp-delay=200`, `gp-delay=2ms`, `gp-delay=inf` | a grace period takes so much longer; never ends while anything else can go on |
//! | `worker=stall`, `worker=panic`, `worker=die` | a worker takes long to begin; panics as it begins an item; ends with items left |
//! | `tlb-delay=200`, `tlb-merge`, `tlb-extra` | a flush is delivered late; shared by those who ask at once; done although nobody asked |
//! | `pause=lockless`, `pause=guest:1` | whoever is in a lockless walk, or vCPU 1 in guest mode (simulated: whichever the dice choose), is taken off its CPU for long |
//! | `storm=64` | so many readers, and one writer, that take mmu_lock and do nothing |
//!
//! A length without a unit is in schedule points (other tasks' steps); on real threads a point is taken for a microsecond, and the other way round.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use tdpmmu_platform::Site;
use tdpmmu_spte::closest;

use crate::program::{Act, Program, ThreadSpec};

/// Which requests for table pages fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Nth {
    /// The k-th, from 1.
    Only(u32),
    /// The k-th and all after it.
    From(u32),
    /// One, another in each run.
    Drawn,
    /// Each with this probability, in percent.
    Percent(u8),
}

/// Where, and how often of a hundred.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// Only there; `None`: everywhere.
    pub site: Option<Site>,
    /// 1 to 100.
    pub percent: u8,
}

/// How long something takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Length {
    /// So many steps of others.
    Points(u32),
    /// So many microseconds.
    Us(u32),
    /// For as long as anything else can go on.
    Endless,
}

impl Length {
    /// In schedule points; [`u32::MAX`] for ever.
    pub const fn points(self) -> u32 {
        match self {
            Length::Points(n) | Length::Us(n) => n,
            Length::Endless => u32::MAX,
        }
    }
}

/// What becomes of a worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WorkerFault {
    /// It takes long to begin an item.
    Stall,
    /// It panics as it begins one.
    Panic,
    /// Its thread ends before it has begun one.
    Die,
}

/// Who is taken off its CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Who {
    /// Whoever is in a lockless walk.
    Lockless,
    /// This vCPU, in guest mode.
    Guest(u16),
}

/// One kind of fault with its measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Injection {
    /// `alloc=`
    Alloc(Nth),
    /// `tables=`
    Tables(u32),
    /// `cmpxchg=`
    Cmpxchg(Rate),
    /// `yield=`
    Yield(Rate),
    /// `gp-delay=`
    GraceDelay(Length),
    /// `worker=`
    Worker(WorkerFault),
    /// `tlb-delay=`
    FlushDelay(Length),
    /// `tlb-merge`
    FlushMerge,
    /// `tlb-extra`
    FlushExtra,
    /// `pause=`
    Pause(Who),
    /// `storm=`
    Storm(u16),
}

/// The kinds, as they are written.
pub const KINDS: &[&str] = &[
    "alloc",
    "tables",
    "cmpxchg",
    "yield",
    "gp-delay",
    "worker",
    "tlb-delay",
    "tlb-merge",
    "tlb-extra",
    "pause",
    "storm",
];

/// A fault plan that cannot be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("fault {part:?}: {rule}{}", .closest.as_ref().map_or(String::new(), |c| format!("; did you mean {c:?}?")))]
pub struct FaultError {
    /// The part of the text.
    pub part: String,
    /// The rule it broke.
    pub rule: String,
    /// The nearest word that would do.
    pub closest: Option<String>,
}

/// A list of faults. Order does not matter, a kind may stand there once ([`Injection::Pause`]: once for each who).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct FaultPlan {
    faults: Vec<Injection>,
}

impl FaultPlan {
    /// A plan of these faults.
    ///
    /// # Errors
    /// [`FaultError`] when a kind stands there twice, or its measure is out of bounds.
    pub fn new(faults: Vec<Injection>) -> Result<Self, FaultError> {
        let text = Self { faults }.to_string();
        text.parse()
    }

    /// The faults.
    pub fn faults(&self) -> &[Injection] {
        &self.faults
    }

    /// Nothing goes wrong?
    pub fn is_empty(&self) -> bool {
        self.faults.is_empty()
    }

    /// The cap that the plan puts on the pool, in pages.
    pub fn max_tables(&self) -> Option<u32> {
        self.faults.iter().find_map(|fault| match fault {
            Injection::Tables(cap) => Some(*cap),
            _ => None,
        })
    }

    /// Readers of a contention storm.
    pub fn storm(&self) -> u16 {
        self.faults
            .iter()
            .find_map(|fault| if let Injection::Storm(n) = fault { Some(*n) } else { None })
            .unwrap_or(0)
    }

    /// What of the plan is the machine's, and no question of the platform: the pool's cap, and the threads of a storm (at most three on a simulated machine, each more costs the search a factor).
    #[must_use]
    pub fn apply(&self, program: &Program) -> Program {
        let mut program = program.clone();
        if let Some(cap) = self.max_tables() {
            program.machine.max_tables = cap;
        }
        for n in 0..usize::from(self.storm().min(3)) {
            // Above whatever the program maps: only the lock is met.
            let empty = |page| {
                if n == 0 {
                    Act::ZapRange { gfn: 0x80_0000, pages: 1 }
                } else {
                    Act::TestAge { hva_page: page, pages: 1 }
                }
            };
            let acts = (0..4).map(|_| empty(0)).collect::<Vec<_>>();
            program.threads.push(ThreadSpec::other(100 + n, &format!("storm-{n}"), acts));
        }
        program
    }

    /// May an operation run out of table pages under this plan?
    pub fn starves(&self) -> bool {
        self.faults.iter().any(|fault| matches!(fault, Injection::Alloc(_) | Injection::Tables(_)))
    }

    /// May a worker panic under this plan? Then the VM is told, and its end is not clean.
    pub fn panics(&self) -> bool {
        self.faults.contains(&Injection::Worker(WorkerFault::Panic))
    }
}

fn wrong(part: &str, rule: impl Into<String>, closest: Option<&str>) -> FaultError {
    FaultError { part: part.to_owned(), rule: rule.into(), closest: closest.map(str::to_owned) }
}

fn site(part: &str, name: &str) -> Result<Site, FaultError> {
    let known: Vec<_> = Site::ALL.iter().map(|site| site.name()).collect();
    let found = Site::ALL.iter().find(|site| site.name().eq_ignore_ascii_case(name));
    found.copied().ok_or_else(|| {
        let close = closest(name, &known).map(|near| part.replace(name, near));
        wrong(part, format!("no site is called {name:?}"), close.as_deref())
    })
}

fn percent(part: &str, text: &str) -> Result<u8, FaultError> {
    match text.strip_suffix('%').and_then(|n| n.parse().ok()) {
        Some(n @ 1..=100) => Ok(n),
        _ => Err(wrong(part, format!("{text:?} is no probability: 1% to 100%"), None)),
    }
}

fn count<N: FromStr + PartialOrd + From<u8>>(part: &str, text: &str, what: &str) -> Result<N, FaultError> {
    let n = text.parse().ok().filter(|n| *n >= N::from(1));
    n.ok_or_else(|| wrong(part, format!("{text:?} is not {what} (at least 1)"), None))
}

fn rate(part: &str, text: &str) -> Result<Rate, FaultError> {
    if text == "all" {
        return Ok(Rate { site: None, percent: 100 });
    }
    match text.split_once(':') {
        Some((name, p)) => Ok(Rate { site: Some(site(part, name)?), percent: percent(part, p)? }),
        None if text.ends_with('%') => Ok(Rate { site: None, percent: percent(part, text)? }),
        None => Ok(Rate { site: Some(site(part, text)?), percent: 100 }),
    }
}

fn length(part: &str, text: &str) -> Result<Length, FaultError> {
    const LONGEST_US: u32 = 10_000_000;
    let us = if text == "inf" {
        return Ok(Length::Endless);
    } else if let Some(ms) = text.strip_suffix("ms") {
        ms.parse::<u32>().ok().and_then(|ms| ms.checked_mul(1000))
    } else if let Some(us) = text.strip_suffix("us") {
        us.parse().ok()
    } else {
        let points = text.parse().ok().filter(|n| (1..=LONGEST_US).contains(n));
        let rule = || format!("{text:?} is no length: points (200), a time (50us, 2ms; at most 10 s) or inf");
        return points.map(Length::Points).ok_or_else(|| wrong(part, rule(), None));
    };
    match us {
        Some(us @ 1..=LONGEST_US) => Ok(Length::Us(us)),
        _ => Err(wrong(part, format!("{text:?} is no time: 1us to 10000ms"), None)),
    }
}

fn word<'w>(part: &str, text: &str, known: &[&'w str]) -> Result<&'w str, FaultError> {
    known.iter().find(|word| **word == text).copied().ok_or_else(|| {
        let kind = part.split('=').next().unwrap_or(part);
        let close = closest(text, known).map(|near| format!("{kind}={near}"));
        wrong(part, format!("{text:?} is none of {}", known.join(", ")), close.as_deref())
    })
}

impl FromStr for Injection {
    type Err = FaultError;

    fn from_str(part: &str) -> Result<Self, FaultError> {
        let (kind, value) =
            part.split_once('=').map_or((part, None), |(kind, value)| (kind.trim_end(), Some(value.trim())));
        let needed = |example: &str| {
            value.filter(|v| !v.is_empty()).ok_or_else(|| wrong(part, "it needs a value", Some(example)))
        };
        let bare = |fault| match value {
            None => Ok(fault),
            Some(value) => {
                Err(wrong(part, format!("it takes no value, and {value:?} was given"), Some(kind)))
            }
        };
        Ok(match kind {
            "alloc" => Injection::Alloc(match needed("alloc=every")? {
                "every" => Nth::Drawn,
                p if p.ends_with('%') => Nth::Percent(percent(part, p)?),
                k => match k.strip_suffix('+') {
                    Some(k) => Nth::From(count(part, k, "the number of a request")?),
                    None if k.starts_with(|c: char| c.is_ascii_digit()) => {
                        Nth::Only(count(part, k, "the number of a request")?)
                    }
                    None => {
                        let close = closest(k, &["every"]).map(|near| format!("alloc={near}"));
                        return Err(wrong(
                            part,
                            format!("{k:?} is neither a number (7, 7+), every, nor a probability (5%)"),
                            close.as_deref(),
                        ));
                    }
                },
            }),
            "tables" => Injection::Tables(count(part, needed("tables=600")?, "a number of pages")?),
            "cmpxchg" => Injection::Cmpxchg(match rate(part, needed("cmpxchg=5%")?)? {
                Rate { percent: 100, .. } => {
                    return Err(wrong(
                        part,
                        "a compare-exchange that always fails ends no loop: 1% to 99%",
                        Some("cmpxchg=50%"),
                    ));
                }
                rate => rate,
            }),
            "yield" => Injection::Yield(rate(part, needed("yield=all")?)?),
            "gp-delay" => Injection::GraceDelay(length(part, needed("gp-delay=200")?)?),
            "tlb-delay" => Injection::FlushDelay(match length(part, needed("tlb-delay=200")?)? {
                Length::Endless => {
                    return Err(wrong(
                        part,
                        "an interrupt that never arrives is a broken machine, not a late one",
                        Some("tlb-delay=200"),
                    ));
                }
                length => length,
            }),
            "worker" => {
                Injection::Worker(match word(part, needed("worker=stall")?, &["stall", "panic", "die"])? {
                    "stall" => WorkerFault::Stall,
                    "panic" => WorkerFault::Panic,
                    _ => WorkerFault::Die,
                })
            }
            "tlb-merge" => bare(Injection::FlushMerge)?,
            "tlb-extra" => bare(Injection::FlushExtra)?,
            "pause" => Injection::Pause(match needed("pause=lockless")? {
                "lockless" => Who::Lockless,
                other => match other.split_once(':') {
                    Some(("guest", n)) => {
                        Who::Guest(n.parse().map_err(|_| wrong(part, format!("{n:?} is no vCPU"), None))?)
                    }
                    _ => {
                        word(part, other, &["lockless", "guest:0"])?;
                        Who::Guest(0)
                    }
                },
            }),
            "storm" => Injection::Storm(match count(part, needed("storm=64")?, "a number of readers")? {
                n @ 1..=1024 => n,
                n => return Err(wrong(part, format!("{n} readers are too many: at most 1024"), None)),
            }),
            _ => {
                let rule = format!("no fault is called {kind:?}; known: {}", KINDS.join(", "));
                return Err(wrong(part, rule, closest(kind, KINDS)));
            }
        })
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.site, self.percent) {
            (None, 100) => f.write_str("all"),
            (None, percent) => write!(f, "{percent}%"),
            (Some(site), 100) => f.write_str(site.name()),
            (Some(site), percent) => write!(f, "{}:{percent}%", site.name()),
        }
    }
}

impl fmt::Display for Length {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Length::Points(n) => write!(f, "{n}"),
            Length::Us(us) if us.is_multiple_of(1000) => write!(f, "{}ms", us / 1000),
            Length::Us(us) => write!(f, "{us}us"),
            Length::Endless => f.write_str("inf"),
        }
    }
}

impl fmt::Display for Injection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Injection::Alloc(Nth::Only(k)) => write!(f, "alloc={k}"),
            Injection::Alloc(Nth::From(k)) => write!(f, "alloc={k}+"),
            Injection::Alloc(Nth::Drawn) => f.write_str("alloc=every"),
            Injection::Alloc(Nth::Percent(p)) => write!(f, "alloc={p}%"),
            Injection::Tables(cap) => write!(f, "tables={cap}"),
            Injection::Cmpxchg(rate) => write!(f, "cmpxchg={rate}"),
            Injection::Yield(rate) => write!(f, "yield={rate}"),
            Injection::GraceDelay(length) => write!(f, "gp-delay={length}"),
            Injection::Worker(WorkerFault::Stall) => f.write_str("worker=stall"),
            Injection::Worker(WorkerFault::Panic) => f.write_str("worker=panic"),
            Injection::Worker(WorkerFault::Die) => f.write_str("worker=die"),
            Injection::FlushDelay(length) => write!(f, "tlb-delay={length}"),
            Injection::FlushMerge => f.write_str("tlb-merge"),
            Injection::FlushExtra => f.write_str("tlb-extra"),
            Injection::Pause(Who::Lockless) => f.write_str("pause=lockless"),
            Injection::Pause(Who::Guest(n)) => write!(f, "pause=guest:{n}"),
            Injection::Storm(n) => write!(f, "storm={n}"),
        }
    }
}

impl FromStr for FaultPlan {
    type Err = FaultError;

    fn from_str(text: &str) -> Result<Self, FaultError> {
        if matches!(text.trim(), "" | "none") {
            return Ok(Self::default());
        }
        let mut faults: Vec<Injection> = Vec::new();
        for part in text.split(',').map(str::trim) {
            let fault: Injection = part.parse()?;
            let twice = faults.iter().any(|there| match (there, &fault) {
                (Injection::Pause(a), Injection::Pause(b)) => a == b,
                (a, b) => std::mem::discriminant(a) == std::mem::discriminant(b),
            });
            if twice {
                return Err(wrong(part, "its kind stands there twice", None));
            }
            faults.push(fault);
        }
        Ok(Self { faults })
    }
}

impl fmt::Display for FaultPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.faults.is_empty() {
            return f.write_str("none");
        }
        for (i, fault) in self.faults.iter().enumerate() {
            let comma = if i == 0 { "" } else { "," };
            write!(f, "{comma}{fault}")?;
        }
        Ok(())
    }
}

impl TryFrom<String> for FaultPlan {
    type Error = FaultError;

    fn try_from(text: String) -> Result<Self, FaultError> {
        text.parse()
    }
}

impl From<FaultPlan> for String {
    fn from(plan: FaultPlan) -> String {
        plan.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plan_reads_as_it_is_written() {
        for text in [
            "none",
            "alloc=7",
            "alloc=7+",
            "alloc=every",
            "alloc=5%",
            "tables=600",
            "cmpxchg=5%",
            "cmpxchg=SpteInstall:5%",
            "yield=all",
            "yield=SpteZap",
            "yield=20%",
            "gp-delay=200",
            "gp-delay=2ms",
            "gp-delay=50us",
            "gp-delay=inf",
            "worker=stall",
            "worker=panic",
            "worker=die",
            "tlb-delay=10,tlb-merge,tlb-extra",
            "pause=lockless,pause=guest:1",
            "storm=64",
        ] {
            let plan: FaultPlan = text.parse().expect(text);
            assert_eq!(plan.to_string(), text);
            assert_eq!(
                serde_json::from_str::<FaultPlan>(&serde_json::to_string(&plan).expect("text")).expect(text),
                plan
            );
        }
        assert_eq!(
            " yield = all , storm=3".parse::<FaultPlan>().expect("spaces").to_string(),
            "yield=all,storm=3"
        );
    }

    #[test]
    fn what_cannot_be_is_refused_by_name_with_the_nearest_word() {
        let refused = |text: &str| text.parse::<FaultPlan>().expect_err(text);
        for (text, near) in [
            ("aloc=7", Some("alloc")),
            ("alloc=evry", Some("alloc=every")),
            ("yield=SpteZapp", Some("yield=SpteZap")),
            ("worker=pannic", Some("worker=panic")),
            ("pause=lockles", Some("pause=lockless")),
            ("cmpxchg=all", Some("cmpxchg=50%")),
            ("tlb-delay=inf", Some("tlb-delay=200")),
            ("tlb-merge=3", Some("tlb-merge")),
            ("gp-delay", Some("gp-delay=200")),
            ("alloc=0", None),
            ("alloc=-1", None),
            ("alloc=99999999999", None),
            ("cmpxchg=0%", None),
            ("cmpxchg=101%", None),
            ("gp-delay=2h", None),
            ("gp-delay=99999999ms", None),
            ("pause=guest:x", None),
            ("storm=0", None),
            ("storm=2000", None),
            ("yield=all,yield=20%", None),
            ("alloc=7,,", None),
            ("zzzzzzzzzzzz=1", None),
        ] {
            let error = refused(text);
            assert_eq!(error.closest.as_deref(), near, "{text}: {error}");
            assert!(error.to_string().contains(&format!("{:?}", error.part)), "{error}");
        }
    }
}
