//! The events of KVM's MMU as types. `parse.rs` reads them from their texts.
//!
//! Three families: the trace points of `kvmmmu` and `kvm`, the kprobe group of the recordings, and the marks a test program
//! writes. An event that is none of these is [`Event::Other`].

/// A root as the kprobes print it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RootArg {
    /// Kernel address of the page's header.
    pub root: u64,
    /// Kernel address of the root table.
    pub spt: u64,
    /// The role word; its layout depends on the kernel.
    pub role: u32,
    /// The reference count before the call.
    pub refs: i64,
}

/// A page-table page as the page trace points print it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageArg {
    /// The shadow MMU's generation, 0 or 1.
    pub valid_gen: u8,
    /// First gfn the table maps.
    pub gfn: u64,
    /// Level of the table's entries.
    pub level: u8,
    /// Access is printed with four bits (`rwux`): the role layout since 6.14 or so (7.2 in the recordings).
    pub wide_access: bool,
    /// `root N`: the pin count.
    pub root_count: u64,
}

/// What a mark says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mark<'a> {
    /// `OP n begin kind {parameters}`
    Begin {
        /// Number of the operation.
        number: u64,
        /// Kind, as in `script.json`.
        kind: &'a [u8],
        /// Parameters as JSON.
        json: &'a [u8],
    },
    /// `OP n end kind {result}`
    End {
        /// Number of the operation.
        number: u64,
        /// Kind, as in `script.json`.
        kind: &'a [u8],
        /// Result as JSON.
        json: &'a [u8],
    },
    /// `STAT n {statistics}`: KVM's own statistics after operation `n`.
    Stat {
        /// Number of the operation.
        number: u64,
        /// Statistics as JSON.
        json: &'a [u8],
    },
    /// Any other text.
    Text(&'a [u8]),
}

/// A probe that carries nothing but its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Probe {
    IterRestart,
    LinkSp,
    WrprotSlot,
    ClearDirtySlot,
    ClearDirtyPtMasked,
    ZapCollapsible,
    RecoverHugePages,
    ZapAll,
    MmuLoad,
    MmuUnload,
    FreeRoots,
    FreeObsoleteRoots,
    AllocRootRet,
    Uninit,
    FlushRemoteTlbs,
    InvStart,
    InvEnd,
    MnRelease,
    MnChangePte,
    MnClearYoung,
    MnTestYoung,
    TrySplit,
    InvalidateAllRoots,
    ZapInvalidatedRoots,
    ZapInvalidatedRootsRet,
    ZapRootWork,
    ZapRootWorkRet,
}

/// One event. Frame numbers are gfns or pfns in units of 4 KiB, addresses in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Event<'a> {
    SpteChanged {
        as_id: u8,
        gfn: u64,
        level: u8,
        old: u64,
        new: u64,
    },
    PrepareZapPage(PageArg),
    GetPage {
        page: PageArg,
        created: bool,
    },
    SyncPage(PageArg),
    UnsyncPage(PageArg),
    SetSpte {
        gfn: u64,
        spte: u64,
        level: u8,
        at: u64,
    },
    SpteRequested {
        gfn: u64,
        pfn: u64,
        level: u8,
        access: Option<u8>,
    },
    PageFault {
        vcpu: Option<u32>,
        rip: Option<u64>,
        address: u64,
        error_code: u64,
    },
    FastPageFault {
        vcpu: u32,
        gpa: u64,
        error_code: &'a [u8],
        old: u64,
        new: u64,
        spurious: bool,
        fixed: bool,
    },
    SplitHugePage {
        gfn: u64,
        spte: u64,
        level: u8,
        errno: i64,
    },
    ZapAllFast {
        valid_gen: u8,
        used_pages: u64,
    },
    MarkMmio {
        gfn: u64,
        access: u64,
        generation: u64,
    },
    CheckMmio {
        spte: u64,
        kvm_generation: u64,
        spte_generation: u64,
        valid: bool,
    },
    HandleMmio {
        address: u64,
        gfn: u64,
        access: u64,
    },
    UnmapHva {
        start: u64,
        end: u64,
    },
    AgeHva {
        start: u64,
        end: u64,
    },
    TestAgeHva {
        hva: u64,
    },
    SetSpteHva {
        hva: u64,
    },
    UserspaceExit {
        reason: &'a [u8],
    },
    SmmTransition {
        vcpu: u32,
        entering: bool,
        smbase: u64,
    },
    DirtyRingPush {
        ring: u64,
        dirty: u64,
        reset: u64,
        slot: u64,
        offset: u64,
        used: u64,
    },
    DirtyRingReset {
        ring: u64,
        dirty: u64,
        reset: u64,
        used: u64,
    },
    DirtyRingExit {
        vcpu: u32,
    },
    PagetableWalk {
        address: u64,
        error: u64,
    },
    PagingElement {
        pte: u64,
        level: u8,
    },
    SetAccessedBit {
        gpa: u64,
    },
    SetDirtyBit {
        gpa: u64,
    },
    WalkerError {
        error: u64,
    },
    Mmio {
        len: u64,
        gpa: u64,
    },
    Mark(Mark<'a>),
    IterStart {
        root: RootArg,
        min_level: u8,
        gfn: u64,
    },
    InitSp {
        sp: u64,
        spt: u64,
        sptep: u64,
        gfn: u64,
        role: u32,
    },
    FreeSp {
        spt: u64,
    },
    RootHpa {
        hpa: u64,
    },
    PutRoot(RootArg),
    ScheduleZapRoot(RootArg),
    ZapRoot {
        root: RootArg,
        shared: bool,
    },
    ZapRootPass {
        root: RootArg,
        shared: bool,
        zap_level: u8,
    },
    ZapLeafs {
        root: RootArg,
        start: u64,
        end: u64,
    },
    SplitRoot {
        root: RootArg,
        start: u64,
        end: u64,
        target_level: u8,
    },
    ZapSp {
        sp: u64,
        spt: u64,
        role: u32,
        gfn: u64,
    },
    FlushRange {
        start: u64,
        pages: u64,
    },
    ChangedEntry {
        gfn: u64,
        level: u8,
        shared: bool,
    },
    Probe(Probe),
    Other,
}

impl Event<'_> {
    /// True for what tells something about KVM's MMU, so that a recording is worth replaying.
    pub fn is_kvm(&self) -> bool {
        !matches!(self, Event::Other | Event::Mark(_))
    }
}
