//! `script.json` and `params.txt`: what was done to the VM, with which module parameters.
//!
//! **Guarantee.** What is read here are requests and the kernel's yes or no to them. Results that KVM computed (statistics, bitmap sizes) are read as well, but kept apart in
//! [`Operation::outcome`] and [`Operation::stat`]: the comparator's alone.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::{Map, Value};

use super::ConformError;

/// One operation.
#[derive(Clone, Debug)]
pub struct Operation {
    /// Its number, as in the marks.
    pub number: u64,
    /// Kind, as in the marks.
    pub kind: String,
    /// Begin on the recording's clock.
    pub t0_ns: u64,
    /// Parameters.
    pub params: Map<String, Value>,
    /// The kernel refused it.
    pub errno: i64,
    /// The rest of the result; the comparator's.
    pub outcome: Map<String, Value>,
    /// KVM's statistics afterwards; the comparator's.
    pub stat: Option<Map<String, Value>>,
}

impl Operation {
    /// A whole number among the parameters, as a number or in hex.
    pub fn number_of(&self, key: &str) -> Option<u64> {
        number(self.params.get(key)?)
    }

    /// A text among the parameters.
    pub fn text_of(&self, key: &str) -> &str {
        self.params.get(key).and_then(Value::as_str).unwrap_or("")
    }

    /// The VM it names.
    pub fn vm(&self) -> Option<u64> {
        self.number_of("vm")
    }
}

/// A number, or a text with one (`0x` allowed).
pub fn number(value: &Value) -> Option<u64> {
    match value {
        Value::Number(n) => n.as_u64(),
        Value::String(text) => match text.strip_prefix("0x") {
            Some(hex) => u64::from_str_radix(hex, 16).ok(),
            None => text.parse().ok(),
        },
        _ => None,
    }
}

#[derive(Deserialize)]
struct RawOperation {
    op: u64,
    kind: String,
    t0_ns: u64,
    #[serde(default)]
    params: Map<String, Value>,
    #[serde(default)]
    result: Option<Map<String, Value>>,
    #[serde(default)]
    stat: Option<Map<String, Value>>,
}

#[derive(Deserialize)]
struct RawScript {
    #[serde(default)]
    scenario: String,
    ops: Vec<RawOperation>,
}

/// All operations, in the order in which they began.
#[derive(Clone, Debug)]
pub struct Script {
    /// Name of the scenario.
    pub scenario: String,
    /// The operations.
    pub operations: Vec<Operation>,
    by_number: BTreeMap<u64, u32>,
}

impl Script {
    /// Reads `script.json`.
    ///
    /// # Errors
    /// [`ConformError::NoScript`] without one, [`ConformError::Malformed`] with the line that is wrong.
    pub fn read(dir: &Path) -> Result<Self, ConformError> {
        let path = dir.join("script.json");
        let text = read_beside(dir, &path, "script.json")?;
        let raw: RawScript = serde_json::from_str(&text).map_err(|e| ConformError::Malformed {
            path: path.clone(),
            line: e.line() as u64,
            rule: "script.json must be {\"ops\": [{\"op\", \"kind\", \"t0_ns\", \"params\", \"result\"}]}",
            got: e.to_string(),
        })?;
        if let Some(op) = raw.ops.iter().find(|op| {
            let errno = op.result.as_ref().and_then(|result| result.get("errno"));
            errno.is_some_and(|errno| errno.as_i64().is_none())
        }) {
            return Err(ConformError::Malformed {
                path,
                line: 0,
                rule: "an operation's errno is a whole number",
                got: format!("another value in operation {}", op.op),
            });
        }
        let mut operations: Vec<Operation> = raw.ops.into_iter().map(operation).collect();
        // Listed by completion; several can be open at once.
        operations.sort_by_key(|op| (op.t0_ns, op.number));
        let mut by_number = BTreeMap::new();
        for (index, op) in operations.iter().enumerate() {
            if by_number.insert(op.number, index as u32).is_some() {
                return Err(ConformError::Malformed {
                    path,
                    line: 0,
                    rule: "an operation's number must be unique",
                    got: op.number.to_string(),
                });
            }
        }
        Ok(Self { scenario: raw.scenario, operations, by_number })
    }

    /// Index of the operation with this number.
    pub fn index(&self, number: u64) -> Option<u32> {
        self.by_number.get(&number).copied()
    }
}

fn operation(raw: RawOperation) -> Operation {
    let mut outcome = raw.result.unwrap_or_default();
    let errno = outcome.remove("errno").and_then(|v| v.as_i64()).unwrap_or(0);
    Operation {
        number: raw.op,
        kind: raw.kind,
        t0_ns: raw.t0_ns,
        params: raw.params,
        errno,
        outcome,
        stat: raw.stat,
    }
}

fn read_beside(dir: &Path, path: &Path, missing: &'static str) -> Result<String, ConformError> {
    std::fs::read_to_string(path).map_err(|source| match source.kind() {
        std::io::ErrorKind::NotFound => ConformError::NoScript { path: dir.to_path_buf(), missing },
        std::io::ErrorKind::InvalidData => ConformError::Malformed {
            path: path.to_path_buf(),
            line: 0,
            rule: "the file must be UTF-8 text",
            got: "other bytes".to_owned(),
        },
        _ => ConformError::Io { path: path.to_path_buf(), source },
    })
}

/// The module parameters that the MMU's behaviour depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Params {
    /// Huge pages are split when dirty logging is turned on.
    pub eager_page_split: bool,
    /// The iTLB-multihit mitigation is on.
    pub nx_huge_pages: bool,
    /// The recovery worker takes back one in so many; 0: it is off.
    pub recovery_ratio: u64,
    /// MMIO SPTEs are made.
    pub mmio_caching: bool,
}

impl Default for Params {
    fn default() -> Self {
        Self { eager_page_split: true, nx_huge_pages: false, recovery_ratio: 60, mmio_caching: true }
    }
}

impl Params {
    /// Reads `params.txt`: lines `path:value`.
    ///
    /// # Errors
    /// [`ConformError::NoScript`] without the file, [`ConformError::Malformed`] for a line without a colon or a value that is none.
    pub fn read(dir: &Path) -> Result<Self, ConformError> {
        let path = dir.join("params.txt");
        let text = read_beside(dir, &path, "params.txt")?;
        let mut params = Self::default();
        for (at, line) in text.lines().enumerate() {
            let bad = |rule| ConformError::Malformed {
                path: PathBuf::from(&path),
                line: at as u64 + 1,
                rule,
                got: format!("{line:?}"),
            };
            if line.trim().is_empty() {
                continue;
            }
            let (name, value) = line.split_once(':').ok_or_else(|| bad("a line must be `path:value`"))?;
            params.set(name, value.trim()).map_err(bad)?;
        }
        Ok(params)
    }

    /// Sets the parameter behind `path`; `Ok(false)`: not one of these.
    ///
    /// # Errors
    /// The rule that the value breaks.
    pub fn set(&mut self, path: &str, value: &str) -> Result<bool, &'static str> {
        let name = path.rsplit('/').next().unwrap_or(path);
        if !path.contains("/kvm/parameters/") {
            return Ok(false);
        }
        let flag = "a module parameter of this name is Y or N";
        match name {
            "eager_page_split" => self.eager_page_split = boolean(value).ok_or(flag)?,
            "mmio_caching" => self.mmio_caching = boolean(value).ok_or(flag)?,
            "nx_huge_pages" => {
                // `auto` looks for a bug that no AMD CPU has, and these recordings are NPT.
                self.nx_huge_pages = match value {
                    "force" => true,
                    "off" | "auto" | "never" => false,
                    other => boolean(other).ok_or("nx_huge_pages is off, force, auto, never, Y or N")?,
                };
            }
            "nx_huge_pages_recovery_ratio" => {
                self.recovery_ratio = value.parse().map_err(|_| "a recovery ratio is a whole number")?;
            }
            _ => return Ok(false),
        }
        Ok(true)
    }
}

fn boolean(value: &str) -> Option<bool> {
    match value {
        "Y" | "y" | "1" | "on" | "true" => Some(true),
        "N" | "n" | "0" | "off" | "false" => Some(false),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_are_read_by_their_path_and_refused_by_their_value() {
        let mut params = Params::default();
        let at = |name: &str| format!("/sys/module/kvm/parameters/{name}");
        assert_eq!(params.set(&at("nx_huge_pages"), "force"), Ok(true));
        assert_eq!(params.set(&at("eager_page_split"), "N"), Ok(true));
        assert_eq!(params.set(&at("nx_huge_pages_recovery_ratio"), "1"), Ok(true));
        assert_eq!(params.set("/sys/kernel/mm/ksm/run", "2"), Ok(false));
        assert!(params.nx_huge_pages && !params.eager_page_split && params.recovery_ratio == 1);
        assert!(params.set(&at("nx_huge_pages"), "maybe").is_err());
        assert!(params.set(&at("nx_huge_pages_recovery_ratio"), "-1").is_err());
    }

    #[test]
    fn numbers_may_be_written_in_hex() {
        assert_eq!(number(&Value::from("0x1f")), Some(31));
        assert_eq!(number(&Value::from(7)), Some(7));
        assert_eq!(number(&Value::from("ten")), None);
    }
}
