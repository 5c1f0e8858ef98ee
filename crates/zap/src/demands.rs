//! What a pod uses of its host that another host may lack: of the processor, and of the kernel.

use std::collections::{BTreeSet, HashMap};

use serde::{Deserialize, Serialize};

use crate::error::RebuildError;
use crate::ids::PodPid;
use crate::memory::{self, Mapping, MemoryState, flag};
use crate::process::sharing;
use crate::process::state::ProcessState;
use crate::processor::{Beginnings, Processor};
use crate::record::HostFacts;
use crate::sys::probe;

/// Something of the kernel's that not every one has, and that a restart cannot do without if it was used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum KernelFeature {
    /// `MADV_GUARD_INSTALL` (Linux 6.13).
    Guards,
    /// `mseal(2)` (Linux 6.10).
    Sealing,
    /// `MAP_DROPPABLE` (Linux 6.11).
    Droppable,
    /// `pkey_alloc(2)`: of the processor's, too.
    Keys,
}

impl KernelFeature {
    const ALL: [KernelFeature; 4] =
        [KernelFeature::Guards, KernelFeature::Sealing, KernelFeature::Droppable, KernelFeature::Keys];

    /// What it is called.
    pub fn name(self) -> &'static str {
        match self {
            KernelFeature::Guards => "guard pages (MADV_GUARD_INSTALL)",
            KernelFeature::Sealing => "sealed mappings (mseal)",
            KernelFeature::Droppable => "memory that may be dropped (MAP_DROPPABLE)",
            KernelFeature::Keys => "protection keys",
        }
    }

    fn is_here(self) -> bool {
        match self {
            KernelFeature::Guards => probe::guards().is_ok(),
            KernelFeature::Sealing => probe::has_call(probe::MSEAL).is_ok(),
            KernelFeature::Droppable => probe::droppable().is_ok(),
            KernelFeature::Keys => memory::keys::are_offered(),
        }
    }

    /// Those that a restart of this address space needs.
    fn of(state: &MemoryState) -> impl Iterator<Item = KernelFeature> {
        let any = |flag: u32| state.vmas.iter().any(|vma| vma.has(flag));
        let found = [
            (!state.guards.is_empty(), KernelFeature::Guards),
            (any(flag::SEALED), KernelFeature::Sealing),
            (any(flag::DROPPABLE), KernelFeature::Droppable),
            (state.keys != 0, KernelFeature::Keys),
        ];
        found.into_iter().filter_map(|(is_used, feature)| is_used.then_some(feature))
    }

    /// Whether mappings of a process use it. Guards do not show there, nor keys that no mapping has.
    pub fn is_among(self, mappings: &[Mapping]) -> bool {
        let any = |flag: u32| mappings.iter().any(|mapping| mapping.flags.known & flag != 0);
        match self {
            KernelFeature::Guards => false,
            KernelFeature::Sealing => any(flag::SEALED),
            KernelFeature::Droppable => any(flag::DROPPABLE),
            KernelFeature::Keys => mappings.iter().any(|mapping| mapping.key != 0),
        }
    }
}

/// What a host has of all that.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offer {
    /// Its kernel's release.
    pub kernel: String,
    /// Its processor.
    pub processor: Processor,
    /// What its kernel has.
    pub features: BTreeSet<KernelFeature>,
}

impl Offer {
    /// That of this host.
    pub fn here() -> Offer {
        let release = nix::sys::utsname::uname().map(|uname| uname.release().to_string_lossy().into_owned());
        Offer {
            kernel: release.unwrap_or_default(),
            processor: Processor::here().clone(),
            features: KernelFeature::ALL.into_iter().filter(|feature| feature.is_here()).collect(),
        }
    }
}

/// Fits processes of an image taken on `host` for this one, or says what this one lacks.
pub fn fit(processes: &mut [ProcessState], host: &HostFacts, beginnings: &Beginnings) -> Result<(), RebuildError> {
    let mut memories: Vec<&mut MemoryState> = processes.iter_mut().map(|process| &mut process.memory).collect();
    memory::adapt(&mut memories, host.vdso.as_ref().map(|code| &code[..]))?;
    refuse_jumps(processes)?;
    refuse_kernel(processes)?;
    fit_registers(processes, &host.processor, Processor::here())?;
    refuse_instructions(processes, beginnings)
}

fn of_process(process: &ProcessState) -> String {
    format!("which process {} uses", process.place.pid)
}

fn refuse_kernel(processes: &[ProcessState]) -> Result<(), RebuildError> {
    let used = processes.iter().flat_map(|p| KernelFeature::of(&p.memory).map(move |feature| (feature, p)));
    let mut known = std::collections::BTreeMap::new();
    for (feature, process) in used {
        if !*known.entry(feature).or_insert_with(|| feature.is_here()) {
            return Err(RebuildError::Lacks(format!("{}, {}", feature.name(), of_process(process))));
        }
    }
    Ok(())
}

fn refuse_instructions(processes: &[ProcessState], beginnings: &Beginnings) -> Result<(), RebuildError> {
    for process in processes.iter().filter(|process| !process.sharing.memory) {
        if let Some(what) = lacking_instructions(beginnings, &process.memory.fields.auxv, Processor::here()) {
            let pid = process.place.pid;
            return Err(RebuildError::Lacks(format!("{what}, which process {pid} found where it began, and may use")));
        }
    }
    Ok(())
}

/// A thread that stands where a jump has been put in the place of what it was to do next.
fn refuse_jumps(processes: &[ProcessState]) -> Result<(), RebuildError> {
    let owners = sharing::owners(processes);
    let patched = processes.iter().filter(|process| !process.memory.patches.is_empty());
    let memories: HashMap<PodPid, &MemoryState> = patched.map(|process| (process.place.pid, &process.memory)).collect();
    for process in processes {
        let Some(memory) = owners.get(&process.place.pid).and_then(|owner| memories.get(owner)) else { continue };
        let address = |words: &[u64; 27]| crate::sys::ptrace::registers_from_words(words).rip;
        let caught = |rip: u64| memory::is_in_a_jump(memory, rip);
        if let Some(thread) = process.threads.iter().find(|thread| caught(address(&thread.registers))) {
            let what =
                format!("the vDSO of another kernel, at the very beginning of which thread {} stands", thread.tid);
            return Err(RebuildError::Lacks(what));
        }
    }
    Ok(())
}

fn fit_registers(processes: &mut [ProcessState], theirs: &Processor, ours: &Processor) -> Result<(), RebuildError> {
    if theirs.is_unknown() || theirs.components == ours.components {
        return Ok(());
    }
    for process in processes {
        for thread in &mut process.threads {
            if let Some(registers) = theirs.registers_beyond(ours, &thread.extended).next() {
                let (tid, pid) = (thread.tid, process.place.pid);
                return Err(RebuildError::Lacks(format!("{registers}, which thread {tid} of process {pid} uses")));
            }
            thread.extended = theirs.translated(&thread.extended, ours, ours.area_or_legacy());
        }
    }
    Ok(())
}

/// Instructions that a program may use that began where they are, and that another processor lacks.
pub fn lacking_instructions(beginnings: &Beginnings, auxv: &[u8], other: &Processor) -> Option<String> {
    let missing = beginnings.lacking(auxv, other);
    (!missing.is_empty()).then(|| format!("{} on its processor", missing.join(", ")))
}
