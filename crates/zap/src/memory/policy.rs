//! Memory policies of ranges (`mbind(2)`): on which nodes their pages are to be. The kernel tells only the process, address
//! by address.

use std::collections::HashMap;

use serde::{Deserialize, Serialize};

use super::layout::{Mapping, Nature};
use super::state::MemoryState;
use crate::tracee::{Batch, Call, Output, Results};

/// Where the pages of a mapping are to be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PolicyState {
    /// `MPOL_*`, with flags.
    pub mode: i32,
    /// Nodes, as bits.
    pub nodes: Vec<u64>,
}

/// Bytes of a batch that a question takes.
pub const QUESTION: usize = 80;
/// Words of a mask of nodes.
const NODES: usize = 16;
const MPOL_DEFAULT: i32 = 0;
const MPOL_F_ADDR: i32 = 1 << 1;

/// The mappings, by their first addresses, that may have a policy which matters: memory of no file, and shared memory.
pub fn worth_asking(layout: &[Mapping]) -> Vec<u64> {
    const SHARED_MEMORY: [&[u8]; 4] = [b"/dev/zero ", b"/memfd:", b"/SYSV", b"/dev/shm/"];
    let is_shared_memory = |path: &[u8]| SHARED_MEMORY.iter().any(|start| path.starts_with(start));
    let worth_it = |mapping: &&Mapping| match mapping.nature() {
        Nature::Anonymous => !mapping.shared && mapping.protection != libc::PROT_NONE,
        Nature::Kernel => false,
        Nature::SystemV | Nature::File => mapping.shared && is_shared_memory(&mapping.path),
    };
    layout.iter().filter(worth_it).map(|mapping| mapping.start).collect()
}

/// Questions about addresses.
#[derive(Debug)]
pub struct Asked(Vec<(u64, Call, Output)>);

/// Asks for the mode at each of these addresses.
pub fn ask(addresses: &[u64], batch: &mut Batch) -> Asked {
    let ask = |address: &u64| {
        let mode = batch.output(8);
        let args = [mode.into(), 0u64.into(), 0u64.into(), (*address).into(), MPOL_F_ADDR.into()];
        (*address, batch.attempt(libc::SYS_get_mempolicy, args), mode)
    };
    Asked(addresses.iter().map(ask).collect())
}

impl Asked {
    /// The addresses at which there is a policy.
    pub fn unusual(&self, results: &Results) -> Vec<u64> {
        let has_one = |(_, asked, mode): &&(u64, Call, Output)| {
            results.get(*asked) == 0 && number(results.output(*mode)) != MPOL_DEFAULT
        };
        self.0.iter().filter(has_one).map(|(address, ..)| *address).collect()
    }
}

fn number(bytes: &[u8]) -> i32 {
    bytes.first_chunk().map_or(0, |word| i32::from_ne_bytes(*word))
}

/// Questions for whole policies.
#[derive(Debug)]
pub struct AskedWhole(Vec<(u64, Call, Output, Output)>);

/// Asks for the policies at some addresses.
pub fn ask_whole(addresses: &[u64], batch: &mut Batch) -> AskedWhole {
    let ask = |address: &u64| {
        let (mode, nodes) = (batch.output(8), batch.output(8 * NODES));
        let args = [mode.into(), nodes.into(), (64 * NODES).into(), (*address).into(), MPOL_F_ADDR.into()];
        (*address, batch.attempt(libc::SYS_get_mempolicy, args), mode, nodes)
    };
    AskedWhole(addresses.iter().map(ask).collect())
}

impl AskedWhole {
    /// The policies, by address.
    pub fn answers(&self, results: &Results) -> HashMap<u64, PolicyState> {
        let answered = self.0.iter().filter(|(_, asked, ..)| results.get(*asked) == 0);
        let policy = |(address, _, mode, nodes): &(u64, Call, Output, Output)| {
            let words = results.output(*nodes).as_chunks::<8>().0.iter().map(|word| u64::from_ne_bytes(*word));
            (*address, PolicyState { mode: number(results.output(*mode)), nodes: words.collect() })
        };
        answered.map(policy).collect()
    }
}

impl MemoryState {
    /// Notes the policies of its mappings, by their first addresses.
    pub fn note_policies(&mut self, policies: &HashMap<u64, PolicyState>) {
        if policies.is_empty() {
            return;
        }
        for vma in &mut self.vmas {
            vma.policy = policies.get(&vma.start).cloned();
        }
    }
}

/// Gives a range a policy; `None` is that of the thread which touches it.
pub(super) fn bind(range: std::ops::Range<u64>, policy: Option<&PolicyState>, batch: &mut Batch) {
    let nodes = policy.map_or(&[][..], |policy| &policy.nodes);
    let is_empty = nodes.iter().all(|word| *word == 0);
    let bytes: Vec<u8> = nodes.iter().flat_map(|word| word.to_ne_bytes()).collect();
    let mask = if is_empty { 0u64.into() } else { batch.bytes(&bytes) };
    // The kernel takes one off.
    let most = if is_empty { 0 } else { 64 * nodes.len() + 1 };
    let mode = policy.map_or(MPOL_DEFAULT, |policy| policy.mode);
    let (start, length) = (range.start, range.end - range.start);
    let args = [start.into(), length.into(), mode.into(), mask, most.into(), 0u64.into()];
    batch.call(libc::SYS_mbind, args, format!("setting the memory policy at {start:#x}"));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_of_files_is_not_asked_about() {
        let mapping = |start, path: &[u8], inode, shared, protection| Mapping {
            start,
            end: start + 0x1000,
            protection,
            path: path.into(),
            inode,
            shared,
            ..Mapping::default()
        };
        let layout = [
            mapping(0x1000, b"/bin/true", 7, false, libc::PROT_READ),
            mapping(0x2000, b"", 0, false, libc::PROT_READ),
            mapping(0x3000, b"", 0, false, libc::PROT_NONE),
            mapping(0x4000, b"/dev/zero (deleted)", 8, true, libc::PROT_READ),
            mapping(0x5000, b"[vdso]", 0, false, libc::PROT_READ),
            mapping(0x6000, b"/data", 9, true, libc::PROT_READ),
            mapping(0x7000, b"/dev/shm/name", 10, true, libc::PROT_READ),
        ];
        assert_eq!(worth_asking(&layout), [0x2000, 0x4000, 0x7000]);
    }
}
