//! `Vm`: the frozen class around a [`Machine`].
//!
//! Short calls run on the calling thread without the GIL; what may take long is a [`job`]. A job owns a reference
//! to the machine, so that a zap, which cannot be cut short, may be left to finish by itself after Ctrl-C: the
//! caller has its thread back, the machine stays whole, and `close` waits for the zap.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use pyo3::buffer::PyBuffer;
use pyo3::prelude::*;
use pyo3::types::PyByteArray;
use tdpmmu_vm::GuestAccess;

use crate::error::Fault;
use crate::job::{self, Control, Limits};
use crate::machine::{self, Access, Machine, Populate, Row, Slot};
use crate::ops::Backing;

/// Batches up to this size are done on the calling thread: starting another would cost more than they do.
const SMALL_BATCH: usize = 4096;

/// How long a caller who has given up waits for a zap to end.
const ZAP_PATIENCE: Duration = Duration::from_millis(100);

/// The same for loops that look at the cancel flag every few thousand pages: they have stopped long before.
const LOOP_PATIENCE: Duration = Duration::from_secs(5);

/// A live machine. Private: `tdpmmu.VM` is the face, and checks what comes in.
#[pyclass(frozen, module = "tdpmmu._native")]
pub struct Vm {
    // Taken only by `Drop`.
    machine: Option<Arc<Machine>>,
}

impl Vm {
    fn machine(&self) -> &Arc<Machine> {
        self.machine.as_ref().expect("the machine is there until the object is dropped")
    }

    /// A short call, on this thread.
    fn now<T: Send>(
        &self,
        py: Python<'_>,
        work: impl FnOnce(&Machine) -> Result<T, Fault> + Send,
    ) -> PyResult<T> {
        let machine = self.machine();
        py.detach(|| work(machine)).map_err(|fault| fault.into_pyerr(py))
    }

    /// A long call, on a thread of its own.
    fn long<T: Send + 'static>(
        &self,
        py: Python<'_>,
        limits: Limits,
        progress: Option<Py<PyAny>>,
        work: impl FnOnce(&Machine, &Control) -> Result<T, Fault> + Send + 'static,
    ) -> PyResult<T> {
        let machine = Arc::clone(self.machine());
        job::run(py, limits, progress, move |control| work(&machine, control))
    }

    fn zap(
        &self,
        py: Python<'_>,
        timeout: Option<f64>,
        work: impl FnOnce(&Machine) -> Result<String, Fault> + Send + 'static,
    ) -> PyResult<String> {
        self.long(py, Limits { timeout, patience: Some(ZAP_PATIENCE) }, None, |machine, _| work(machine))
    }
}

#[pymethods]
impl Vm {
    /// `config` is the JSON text of a `VMConfig`.
    #[new]
    fn new(py: Python<'_>, config: &str) -> PyResult<Vm> {
        let machine = py.detach(|| Machine::new(config)).map_err(|fault| fault.into_pyerr(py))?;
        Ok(Vm { machine: Some(Arc::new(machine)) })
    }

    /// Has `close` been called?
    #[getter]
    fn closed(&self) -> bool {
        self.machine().gate().closed()
    }

    /// Is this a child of the process that made it?
    #[getter]
    fn forked(&self) -> bool {
        self.machine().gate().forked()
    }

    /// Adds a memslot: id, address space, first gfn, pages, read-only, dirty log. `level` is that of the host's pages (`None`: the machine's), `share` the
    /// slot (address space, id) whose host memory it shares.
    #[pyo3(signature = (slot, *, level=None, writable=true, share=None))]
    fn add_memslot(
        &self,
        py: Python<'_>,
        slot: Slot,
        level: Option<u8>,
        writable: bool,
        share: Option<(u8, u16)>,
    ) -> PyResult<()> {
        self.now(py, |machine| machine.add_memslot(slot, Backing { level, writable, share }))
    }

    /// Deletes a memslot; JSON text of times in ns.
    #[pyo3(signature = (as_id, slot, *, timeout=None))]
    fn delete_memslot(&self, py: Python<'_>, as_id: u8, slot: u16, timeout: Option<f64>) -> PyResult<String> {
        self.zap(py, timeout, move |machine| machine.delete_memslot(as_id, slot))
    }

    /// Moves a memslot or changes its flags; what is `None` stays. JSON text: `update` and times in ns.
    #[pyo3(signature = (as_id, slot, *, base=None, log_dirty=None, readonly=None, timeout=None))]
    #[allow(clippy::too_many_arguments)]
    fn update_memslot(
        &self,
        py: Python<'_>,
        as_id: u8,
        slot: u16,
        base: Option<u64>,
        log_dirty: Option<bool>,
        readonly: Option<bool>,
        timeout: Option<f64>,
    ) -> PyResult<String> {
        self.zap(py, timeout, move |machine| machine.update_memslot((as_id, slot), base, log_dirty, readonly))
    }

    /// Gives address space 1 the memslots of address space 0; the ids of the new ones.
    fn share_memory_with_smm(&self, py: Python<'_>) -> PyResult<Vec<u16>> {
        self.now(py, Machine::share_memory_with_smm)
    }

    /// The memslot generation of an address space.
    fn generation(&self, py: Python<'_>, as_id: u8) -> PyResult<u64> {
        self.now(py, |machine| machine.generation(as_id))
    }

    /// Puts a vCPU into system management mode, or back.
    fn set_smm(&self, py: Python<'_>, vcpu: usize, on: bool) -> PyResult<()> {
        self.now(py, |machine| machine.set_smm(vcpu, on))
    }

    /// Is a vCPU in system management mode?
    fn in_smm(&self, py: Python<'_>, vcpu: usize) -> PyResult<bool> {
        self.now(py, |machine| machine.in_smm(vcpu))
    }

    /// The memslots, in the form `add_memslot` takes.
    fn memslots(&self, py: Python<'_>) -> PyResult<Vec<Slot>> {
        self.now(py, Machine::memslots)
    }

    /// Maps gfns `start..stop` (`None`: all memslots) with leaves up to `level`; JSON text.
    #[pyo3(signature = (start, stop, *, level, threads, by_fault, progress=None, timeout=None))]
    #[allow(clippy::too_many_arguments)]
    fn populate(
        &self,
        py: Python<'_>,
        start: Option<u64>,
        stop: Option<u64>,
        level: u8,
        threads: usize,
        by_fault: bool,
        progress: Option<Py<PyAny>>,
        timeout: Option<f64>,
    ) -> PyResult<String> {
        let gfns: Option<Range<u64>> = start.zip(stop).map(|(start, stop)| start..stop);
        let how = Populate { level, threads, by_fault };
        let limits = Limits { timeout, patience: Some(LOOP_PATIENCE) };
        self.long(py, limits, progress, move |machine, control| machine.populate(gfns, how, control))
    }

    /// One access of a vCPU: outcome, level (0: not mapped), frame.
    fn fault(&self, py: Python<'_>, gfn: u64, vcpu: usize, write: bool, exec: bool) -> PyResult<Access> {
        self.now(py, |machine| machine.fault(vcpu, GuestAccess { gfn, write, exec }))
    }

    /// Many accesses of a vCPU, from an array of u64; the outcomes, a byte each.
    #[pyo3(signature = (gfns, vcpu, write, exec, *, progress=None, timeout=None))]
    #[allow(clippy::too_many_arguments)]
    fn fault_batch<'py>(
        &self,
        py: Python<'py>,
        gfns: PyBuffer<u64>,
        vcpu: usize,
        write: bool,
        exec: bool,
        progress: Option<Py<PyAny>>,
        timeout: Option<f64>,
    ) -> PyResult<Bound<'py, PyByteArray>> {
        // A copy: others may write to the array while the GIL is free.
        let gfns = gfns.to_vec(py)?;
        let outcomes = if gfns.len() <= SMALL_BATCH && progress.is_none() {
            let control = Control::default();
            self.now(py, |machine| machine.fault_batch(vcpu, &gfns, (write, exec), &control))?
        } else {
            let limits = Limits { timeout, patience: Some(LOOP_PATIENCE) };
            self.long(py, limits, progress, move |machine, control| {
                machine.fault_batch(vcpu, &gfns, (write, exec), control)
            })?
        };
        Ok(PyByteArray::new(py, &outcomes))
    }

    /// The leaf of each gfn of an array of u64: rows of gfn, SPTE, frame, level.
    fn lookup_batch<'py>(
        &self,
        py: Python<'py>,
        gfns: PyBuffer<u64>,
        as_id: u8,
    ) -> PyResult<Bound<'py, PyByteArray>> {
        let gfns = gfns.to_vec(py)?;
        let rows = self.now(py, |machine| machine.lookup_batch(as_id, &gfns))?;
        rows_out(py, &rows)
    }

    /// Every present leaf of gfns `start..stop`: rows of gfn, SPTE, frame, level.
    fn mappings<'py>(
        &self,
        py: Python<'py>,
        start: u64,
        stop: u64,
        as_id: u8,
    ) -> PyResult<Bound<'py, PyByteArray>> {
        let limits = Limits { timeout: None, patience: Some(ZAP_PATIENCE) };
        let rows = self.long(py, limits, None, move |machine, _| machine.mappings(as_id, start..stop))?;
        rows_out(py, &rows)
    }

    /// Takes host memory away from gfns `start..stop`; JSON text of times in ns.
    #[pyo3(signature = (start, stop, *, timeout=None))]
    fn unmap(&self, py: Python<'_>, start: u64, stop: u64, timeout: Option<f64>) -> PyResult<String> {
        self.zap(py, timeout, move |machine| machine.unmap(start..stop))
    }

    /// The host maps gfns `start..stop` by pages of `level` from now on, where it can; how many pages it does.
    fn promote(&self, py: Python<'_>, start: u64, stop: u64, level: u8) -> PyResult<u64> {
        let limits = Limits { timeout: None, patience: Some(ZAP_PATIENCE) };
        self.long(py, limits, None, move |machine, _| machine.promote(start..stop, level))
    }

    /// The host puts another page behind a gfn; its frame.
    fn replace_page(&self, py: Python<'_>, gfn: u64, as_id: u8, writable: bool) -> PyResult<u64> {
        self.now(py, |machine| machine.replace_page(as_id, gfn, writable))
    }

    /// Takes Accessed away from gfns `start..stop`; whether some leaf had it.
    fn age(&self, py: Python<'_>, start: u64, stop: u64, as_id: u8, flush: bool) -> PyResult<bool> {
        self.now(py, |machine| machine.age(as_id, start..stop, flush))
    }

    /// Has a leaf of gfns `start..stop` the Accessed bit?
    fn test_age(&self, py: Python<'_>, start: u64, stop: u64, as_id: u8) -> PyResult<bool> {
        self.now(py, |machine| machine.test_age(as_id, start..stop))
    }

    /// `age` (or `test_age`) of each gfn of an array of u64; a byte each.
    fn age_batch<'py>(
        &self,
        py: Python<'py>,
        gfns: PyBuffer<u64>,
        as_id: u8,
        clear: bool,
    ) -> PyResult<Bound<'py, PyByteArray>> {
        let gfns = gfns.to_vec(py)?;
        let young = self.now(py, |machine| machine.age_batch(as_id, &gfns, clear))?;
        Ok(PyByteArray::new(py, &young))
    }

    /// change_pte of one gfn; whether a leaf changed.
    fn change_pte(&self, py: Python<'_>, gfn: u64, writable: bool) -> PyResult<bool> {
        self.now(py, |machine| machine.change_pte(gfn, writable))
    }

    /// KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2.
    fn enable_dirty_log_protect(&self, py: Python<'_>, manual: bool, initially_set: bool) -> PyResult<()> {
        self.now(py, |machine| machine.enable_dirty_log_protect(manual, initially_set))
    }

    /// The module parameter eager_page_split.
    fn set_eager_page_split(&self, py: Python<'_>, on: bool) -> PyResult<()> {
        self.now(py, |machine| machine.set_eager_page_split(on))
    }

    /// KVM_GET_DIRTY_LOG: first gfn, pages, and the bitmap as bytes, the first page in the lowest bit of the first.
    fn get_dirty_log<'py>(
        &self,
        py: Python<'py>,
        as_id: u8,
        slot: u16,
    ) -> PyResult<(u64, u64, Bound<'py, PyByteArray>)> {
        let limits = Limits { timeout: None, patience: Some(ZAP_PATIENCE) };
        let (base, pages, words) =
            self.long(py, limits, None, move |machine, _| machine.get_dirty_log(as_id, slot))?;
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        Ok((base, pages, PyByteArray::new(py, &bytes)))
    }

    /// KVM_CLEAR_DIRTY_LOG: `words` is an array of u64; how many pages were taken for clean.
    fn clear_dirty_log(
        &self,
        py: Python<'_>,
        as_id: u8,
        slot: u16,
        first: u64,
        pages: u64,
        words: PyBuffer<u64>,
    ) -> PyResult<u64> {
        let words = words.to_vec(py)?;
        let limits = Limits { timeout: None, patience: Some(ZAP_PATIENCE) };
        self.long(py, limits, None, move |machine, _| {
            machine.clear_dirty_log((as_id, slot), first, pages, &words)
        })
    }

    /// What a vCPU's dirty ring has: rows of slot, address space, offset, as bytes of u64.
    fn dirty_ring<'py>(&self, py: Python<'py>, vcpu: usize) -> PyResult<Bound<'py, PyByteArray>> {
        let rows = self.now(py, |machine| machine.dirty_ring(vcpu))?;
        let bytes: Vec<u8> = rows.iter().flatten().flat_map(|word| word.to_le_bytes()).collect();
        Ok(PyByteArray::new(py, &bytes))
    }

    /// KVM_RESET_DIRTY_RINGS; how many entries there were.
    fn reset_dirty_rings(&self, py: Python<'_>) -> PyResult<u64> {
        self.now(py, Machine::reset_dirty_rings)
    }

    /// The module parameter nx_huge_pages; JSON text: `changed` and times in ns.
    #[pyo3(signature = (on, *, timeout=None))]
    fn set_nx_huge_pages(&self, py: Python<'_>, on: bool, timeout: Option<f64>) -> PyResult<String> {
        self.zap(py, timeout, move |machine| machine.set_nx_huge_pages(on))
    }

    /// Is it on?
    fn nx_huge_pages(&self, py: Python<'_>) -> PyResult<bool> {
        self.now(py, Machine::nx_huge_pages)
    }

    /// One period of NX recovery: one candidate in `ratio`; how many tables went.
    fn recover_nx(&self, py: Python<'_>, ratio: u32) -> PyResult<u64> {
        self.now(py, |machine| machine.recover_nx(ratio))
    }

    /// KVM_X86_QUIRK_SLOT_ZAP_ALL.
    fn set_slot_zap_all(&self, py: Python<'_>, on: bool) -> PyResult<()> {
        self.now(py, |machine| machine.set_slot_zap_all(on))
    }

    /// kvm_zap_gfn_range of gfns `start..stop`, both address spaces; JSON text of times in ns.
    #[pyo3(signature = (start, stop, *, timeout=None))]
    fn zap_gfn_range(&self, py: Python<'_>, start: u64, stop: u64, timeout: Option<f64>) -> PyResult<String> {
        self.zap(py, timeout, move |machine| machine.zap_gfn_range(start..stop))
    }

    /// Takes write permission from the leaf of a gfn; whether some leaf could be written.
    fn write_protect_gfn(&self, py: Python<'_>, gfn: u64, as_id: u8) -> PyResult<bool> {
        self.now(py, |machine| machine.write_protect_gfn(as_id, gfn))
    }

    /// KVM_PRE_FAULT_MEMORY of gfns `start..stop`; the pages left undone.
    #[pyo3(signature = (start, stop, vcpu, *, timeout=None))]
    fn pre_fault(
        &self,
        py: Python<'_>,
        start: u64,
        stop: u64,
        vcpu: usize,
        timeout: Option<f64>,
    ) -> PyResult<u64> {
        let limits = Limits { timeout, patience: Some(ZAP_PATIENCE) };
        self.long(py, limits, None, move |machine, _| machine.pre_fault(vcpu, start..stop))
    }

    /// Zaps every root by the design; JSON text of times in ns.
    #[pyo3(signature = (*, timeout=None))]
    fn fast_zap(&self, py: Python<'_>, timeout: Option<f64>) -> PyResult<String> {
        self.zap(py, timeout, Machine::fast_zap)
    }

    /// A vCPU drops its roots and loads another; JSON text of times in ns.
    #[pyo3(signature = (vcpu, *, timeout=None))]
    fn drop_root(&self, py: Python<'_>, vcpu: usize, timeout: Option<f64>) -> PyResult<String> {
        self.zap(py, timeout, move |machine| machine.drop_root(vcpu))
    }

    /// CR3 of the process that every vCPU runs at first.
    fn guest_boot(&self, py: Python<'_>) -> PyResult<u64> {
        self.now(py, Machine::guest_boot)
    }

    /// CR3 of a new process.
    fn guest_process(&self, py: Python<'_>) -> PyResult<u64> {
        self.now(py, Machine::guest_process)
    }

    /// Stores of a vCPU map a virtual page of a process to a gfn by a page of `level`.
    #[allow(clippy::too_many_arguments)]
    fn guest_map(
        &self,
        py: Python<'_>,
        vcpu: usize,
        cr3: u64,
        gva: u64,
        gfn: u64,
        level: u8,
        writable: bool,
    ) -> PyResult<()> {
        self.now(py, |machine| machine.guest_map(vcpu, cr3, (gva, gfn, level), writable))
    }

    /// A store of a vCPU takes a page out of a process; whether there was one.
    fn guest_unmap(&self, py: Python<'_>, vcpu: usize, cr3: u64, gva: u64) -> PyResult<bool> {
        self.now(py, |machine| machine.guest_unmap(vcpu, cr3, gva))
    }

    /// A vCPU loads CR3.
    fn guest_switch(&self, py: Python<'_>, vcpu: usize, cr3: u64) -> PyResult<()> {
        self.now(py, |machine| machine.guest_switch(vcpu, cr3))
    }

    /// A vCPU forgets one translation; `None`: all of its process.
    fn guest_invalidate(&self, py: Python<'_>, vcpu: usize, gva: Option<u64>) -> PyResult<()> {
        self.now(py, |machine| machine.guest_invalidate(vcpu, gva))
    }

    /// What a process's tables say of a virtual page: gfn, level, writable.
    fn guest_translate(&self, py: Python<'_>, cr3: u64, gva: u64) -> PyResult<Option<(u64, u8, bool)>> {
        self.now(py, |machine| machine.guest_translate(cr3, gva))
    }

    /// Counts, as JSON text.
    fn stats(&self, py: Python<'_>) -> PyResult<String> {
        self.now(py, Machine::stats)
    }

    /// Compares the tables with the books; the violations.
    #[pyo3(signature = (*, timeout=None))]
    fn verify(&self, py: Python<'_>, timeout: Option<f64>) -> PyResult<Vec<String>> {
        self.long(py, Limits { timeout, patience: Some(ZAP_PATIENCE) }, None, |machine, _| machine.verify())
    }

    /// Waits `timeout` seconds for those inside, then tears down. JSON text; `None` if it was closed already.
    #[pyo3(signature = (*, timeout=None))]
    fn close(&self, py: Python<'_>, timeout: Option<f64>) -> PyResult<Option<String>> {
        let wait = timeout.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
        if self.machine().gate().finished() {
            return self.now(py, |machine| machine.close(wait, &Control::default()));
        }
        let limits = Limits { timeout: None, patience: Some(ZAP_PATIENCE) };
        self.long(py, limits, None, move |machine, control| machine.close(wait, control))
    }
}

fn rows_out<'py>(py: Python<'py>, rows: &[Row]) -> PyResult<Bound<'py, PyByteArray>> {
    PyByteArray::new_with(py, size_of_val(rows), |bytes| {
        for (out, word) in bytes.chunks_exact_mut(8).zip(rows.as_flattened()) {
            out.copy_from_slice(&word.to_le_bytes());
        }
        Ok(())
    })
}

impl Drop for Vm {
    fn drop(&mut self) {
        if let Some(machine) = self.machine.take() {
            machine::abandon(machine);
        }
    }
}
