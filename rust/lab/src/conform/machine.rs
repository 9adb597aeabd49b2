//! The machines of a case: which VM an input means, and what the script says about it.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tdpmmu_platform::{Pace, Preempt, Real, TaskConfig};
use tdpmmu_spte::KernelProfile;
use tdpmmu_vm::{Vm, VmConfig};

use super::host::HostMemory;
use super::predict::{Ear, Scribe};
use super::script::Params;

/// One VM of the recording.
pub struct Machine {
    /// Its number in the script.
    pub id: u64,
    /// The engine.
    pub vm: Vm<Real>,
}

/// Everything that operations share. Only the thread with the baton uses it.
pub struct Machines {
    /// Live VMs, by number.
    pub live: BTreeMap<u64, Arc<Machine>>,
    /// Module parameters now.
    pub params: Params,
    /// Per (VM, address space, slot): the words that the last GET returned.
    pub bitmaps: HashMap<(u64, u8, u16), Vec<u64>>,
    /// Zaps of tables that the last recovery has already done, and its input.
    pub recovered: (u64, u32),
    /// A recovery has run in the operation that asked for one.
    pub recovery_ran: bool,
}

/// Shared by all threads of a case.
pub struct World {
    /// See there.
    pub machines: Mutex<Machines>,
    /// The host's memory.
    pub host: Arc<Mutex<HostMemory>>,
    /// The observer.
    pub scribe: Arc<Scribe>,
    /// The kernel's rules.
    pub profile: KernelProfile,
    pace: Arc<dyn Pace>,
}

impl World {
    /// A world without VMs.
    pub fn new(profile: KernelProfile, params: Params, pace: Arc<dyn Pace>) -> Self {
        Self {
            machines: Mutex::new(Machines {
                live: BTreeMap::new(),
                params,
                bitmaps: HashMap::new(),
                recovered: (0, 0),
                recovery_ran: false,
            }),
            host: Arc::default(),
            scribe: Arc::default(),
            profile,
            pace,
        }
    }

    /// The books of the world.
    pub fn machines(&self) -> MutexGuard<'_, Machines> {
        self.machines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The host's memory.
    pub fn host(&self) -> MutexGuard<'_, HostMemory> {
        self.host.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A task that yields where the recording says, and nowhere else.
    pub fn task_config(&self) -> TaskConfig {
        TaskConfig {
            preempt: Preempt::None,
            tick_ns: u64::MAX,
            attribute: false,
            pace: Some(Arc::clone(&self.pace)),
            ..TaskConfig::default()
        }
    }

    /// The VM with this number, or the only one there is.
    pub fn machine(&self, id: Option<u64>) -> Option<Arc<Machine>> {
        let machines = self.machines();
        match id {
            Some(id) => machines.live.get(&id).cloned(),
            None if machines.live.len() == 1 => machines.live.values().next().cloned(),
            None => None,
        }
    }

    /// The VM made last: the first of which an exiting process takes leave.
    pub fn newest(&self) -> Option<Arc<Machine>> {
        self.machines().live.values().next_back().cloned()
    }

    /// Every live VM.
    pub fn all(&self) -> Vec<Arc<Machine>> {
        self.machines().live.values().cloned().collect()
    }

    /// KVM_CREATE_VM and its vCPUs.
    ///
    /// # Errors
    /// The engine's words.
    pub fn create(&self, id: u64, vcpus: usize, ring_bytes: u64) -> Result<(), String> {
        let params = self.machines().params;
        let host = Arc::clone(&self.host);
        let mut config = VmConfig::new(self.profile);
        config.vcpus = vcpus.max(1);
        config.hugepages = false;
        config.batch = 1;
        config.write_back = false;
        config.host_pages = 1 << 18;
        config.max_tables = 1 << 18;
        config.task = self.task_config();
        config.observer = Some(Arc::new(Ear { scribe: self.scribe.clone(), vm: id }));
        config.eager_page_split = params.eager_page_split;
        config.nx_huge_pages = params.nx_huge_pages;
        config.host_level =
            Some(Arc::new(move |page| host.lock().unwrap_or_else(PoisonError::into_inner).level(page)));
        // Entries of sixteen bytes.
        config.dirty_ring = (ring_bytes != 0).then_some(u32::try_from(ring_bytes / 16).unwrap_or(u32::MAX));
        let vm = Vm::new(config).map_err(|e| e.to_string())?;
        self.machines().live.insert(id, Arc::new(Machine { id, vm }));
        Ok(())
    }
}
