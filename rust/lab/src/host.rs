//! The host that a result was measured on, and how much memory it can give.

use serde::Serialize;
use serde_json::{Value, json};
use tdpmmu_platform::{Flavour, clock};

/// What a reader of a result needs to know about the machine.
#[derive(Clone, Debug, Serialize)]
pub struct HostInfo {
    /// CPU model.
    pub cpu: String,
    /// CPUs that this process may use.
    pub cpus: usize,
    /// Kernel release.
    pub kernel: String,
    /// Virtualised, as far as the CPU says.
    pub hypervisor: bool,
    /// MemTotal in bytes.
    pub memory_bytes: u64,
    /// MemAvailable in bytes.
    pub available_bytes: u64,
    /// Transparent huge pages.
    pub thp: String,
    /// CPU frequency governor, where there is one.
    pub governor: Option<String>,
    /// Clock of all times.
    pub clock: &'static str,
    /// TSC frequency in Hz.
    pub tsc_hz: u64,
    /// RCU's asymmetric barrier.
    pub rcu_flavour: &'static str,
    /// Best vector unit.
    pub vector: &'static str,
}

fn read(path: &str) -> Option<String> {
    std::fs::read_to_string(path).ok().map(|s| s.trim().to_owned())
}

fn meminfo(key: &str) -> u64 {
    let text = read("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|l| l.strip_prefix(key)).unwrap_or("");
    line.trim_start_matches(':').split_whitespace().next().and_then(|n| n.parse().ok()).unwrap_or(0) * 1024
}

/// What a control group still grants, where one limits us.
fn cgroup_left() -> Option<u64> {
    let max: u64 = read("/sys/fs/cgroup/memory.max")?.parse().ok()?;
    let used: u64 = read("/sys/fs/cgroup/memory.current")?.parse().ok()?;
    Some(max.saturating_sub(used))
}

/// Bytes that may be used now without swapping.
pub fn available_bytes() -> u64 {
    let free = meminfo("MemAvailable");
    cgroup_left().map_or(free, |left| left.min(free))
}

impl HostInfo {
    /// Looks at the machine.
    pub fn collect() -> Self {
        let cpuinfo = read("/proc/cpuinfo").unwrap_or_default();
        let field = |key: &str| {
            cpuinfo
                .lines()
                .find(|l| l.starts_with(key))
                .and_then(|l| l.split_once(':'))
                .map(|(_, v)| v.trim())
        };
        let thp = read("/sys/kernel/mm/transparent_hugepage/enabled").unwrap_or_default();
        let clock = clock::info();
        Self {
            cpu: field("model name").unwrap_or("unknown").to_owned(),
            cpus: std::thread::available_parallelism().map_or(1, usize::from),
            kernel: read("/proc/sys/kernel/osrelease").unwrap_or_default(),
            hypervisor: field("flags").is_some_and(|f| f.split(' ').any(|w| w == "hypervisor")),
            memory_bytes: meminfo("MemTotal"),
            available_bytes: available_bytes(),
            thp: thp.split(['[', ']']).nth(1).unwrap_or("unknown").to_owned(),
            governor: read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
            clock: clock.source,
            tsc_hz: clock.hz,
            rcu_flavour: Flavour::detect().name(),
            vector: vector(),
        }
    }
}

fn vector() -> &'static str {
    #[cfg(target_arch = "x86_64")]
    {
        if std::arch::is_x86_feature_detected!("avx512f") {
            return "avx512";
        }
        if std::arch::is_x86_feature_detected!("avx2") {
            return "avx2";
        }
    }
    "scalar"
}

/// The answer of `tdpmmu info`, as JSON.
pub fn info(build: &Value) -> Value {
    json!({
        "schema": "tdpmmu.info/1",
        "host": HostInfo::collect(),
        "build": build,
        "designs": tdpmmu_mmu::DESIGNS.iter().map(|d| json!({
            "name": d.name, "mainline": d.mainline, "summary": d.summary, "flawed": d.flawed,
            "ownership": d.ownership.to_string(), "passes": d.passes.map(|p| p.to_string()),
        })).collect::<Vec<_>>(),
        "profiles": tdpmmu_spte::KernelProfile::NAMES,
        "memory_overhead_bytes_per_table": tdpmmu_table::TablePool::overhead_bytes_per_table(),
    })
}
