//! State → state: address spaces with another kernel's vDSO become ones with this kernel's.
//!
//! What a program knows of the other stays where it is, as a [face]. This kernel's own goes where a face of
//! the same code is, if there is one (the pod comes back to a kernel that it has been on), or where nothing is.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use serde::{Deserialize, Serialize};

use super::layout::{Mapping, Nature, flag};
use super::state::{Backing, MemoryState, VdsoState, VmaState};
use super::vdso::{self, Code};
use super::{PAGE, face, ranges};
use crate::error::{CaptureError, Context, RebuildError};
use crate::ids::HostPid;

/// No vDSO is longer.
const LONGEST: u64 = 64 << 10;
/// How far from a face this kernel's vDSO may be, so that a short jump leads there.
const NEAR: u64 = 0x7000_0000;
/// Distance to what is mapped below and above, and to a stack that may grow.
const MARGIN: u64 = 64 << 10;
const GROWTH: u64 = 64 << 20;

/// A face in an address space.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FaceState {
    /// Its address.
    pub start: u64,
    /// What is there, whole.
    #[serde(with = "serde_bytes")]
    pub code: Vec<u8>,
}

impl FaceState {
    fn range(&self) -> Range<u64> {
        self.start..self.start.saturating_add(self.code.len() as u64)
    }

    /// Whether an image can say so.
    fn can_be(&self) -> bool {
        let length = self.code.len() as u64;
        self.start.is_multiple_of(PAGE) && length.is_multiple_of(PAGE) && length <= LONGEST && self.start < 1 << 47
    }
}

/// What is to be written to an address space once it is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Patch {
    at: u64,
    bytes: Vec<u8>,
}

/// The faces in a process: kernel → state.
pub(super) fn faces(process: HostPid, mappings: &[Mapping]) -> Result<Vec<FaceState>, CaptureError> {
    let wanted = libc::PROT_READ | libc::PROT_EXEC;
    let could_be = |m: &&Mapping| {
        !m.shared && m.protection == wanted && m.nature() == Nature::Anonymous && m.end - m.start <= LONGEST
    };
    let mut candidates = mappings.iter().filter(could_be).peekable();
    if candidates.peek().is_none() {
        return Ok(Vec::new());
    }
    let object = || format!("the memory of process {process}");
    let memory = File::open(process.proc("mem")).capturing("opening", object())?;
    let read = |range: Range<u64>| {
        let mut bytes = vec![0; (range.end - range.start) as usize];
        memory.read_exact_at(&mut bytes, range.start).map(|()| bytes)
    };
    let mut found = Vec::new();
    for mapping in candidates {
        // What cannot be read is none.
        let Ok(end) = read(mapping.end - face::TELLING as u64..mapping.end) else { continue };
        if face::told(&end).is_some() {
            let code = read(mapping.start..mapping.end).capturing("reading", object())?;
            found.push(FaceState { start: mapping.start, code });
        }
    }
    Ok(found)
}

/// Writes what was planned for a process that is held.
pub fn write_patches(patches: &[Patch], memory: &File) -> io::Result<()> {
    patches.iter().try_for_each(|patch| memory.write_all_at(&patch.bytes, patch.at))
}

/// Whether the vDSO of an image's process is this kernel's.
pub fn is_at_home(state: &MemoryState) -> bool {
    state.vdso.as_ref().is_none_or(vdso::fits)
}

/// Whether a thread that goes on at `address` would be in the middle of a jump that was something else when it got there.
pub fn is_in_a_jump(state: &MemoryState, address: u64) -> bool {
    let inside = |at: u64| at < address && address < at + face::JUMP;
    let jumps = |face: &FaceState| face::functions(&face.code).into_iter().any(|(_, at)| inside(face.start + at));
    let changed = state.faces.iter().filter(|face| state.patches.iter().any(|patch| patch.at == face.start));
    changed.filter(|face| face.range().contains(&address)).any(jumps)
}

/// Gives every address space this kernel's vDSO, where it has another: that of which the image has the `code`.
pub fn adapt(all: &mut [&mut MemoryState], code: Option<&[u8]>) -> Result<(), RebuildError> {
    let lacking = |what: &str| RebuildError::Lacks(format!("the vDSO that the image was taken with ({what})"));
    let away: Vec<usize> = (0..all.len()).filter(|i| !is_at_home(all[*i])).collect();
    let Some(ours) = vdso::code().filter(|_| !away.is_empty()) else { return Ok(()) };
    let code = code.ok_or_else(|| lacking("its kernel was another, and the image has no copy of it"))?;
    let digest = vdso::digest(code);
    for place in &away {
        // It may have come home with its kin.
        let Some(theirs) = all[*place].vdso.clone().filter(|vdso| !vdso::fits(vdso)) else { continue };
        if digest != theirs.digest {
            return Err(lacking("its kernel was another, and the image has a copy of yet another"));
        }
        check(&theirs, code.len() as u64).map_err(|what| RebuildError::Damaged(what.into()))?;
        if !all.iter().flat_map(|state| &state.faces).all(FaceState::can_be) {
            return Err(RebuildError::Damaged("a face of a vDSO lies where none can".into()));
        }
        // Those that were forked from each other have theirs at one place, and get ours at one place.
        let kin: Vec<&MemoryState> =
            all.iter().map(|state| &**state).filter(|s| s.vdso.as_ref() == Some(&theirs)).collect();
        let start = match home(&kin, ours) {
            Some(start) => start,
            None => free_place(&kin, &theirs, ours.length()).ok_or_else(|| lacking("and has no room for another"))?,
        };
        for state in all.iter_mut().filter(|state| state.vdso.as_ref() == Some(&theirs)) {
            exchange(state, &theirs, (code, ours), start).map_err(|what| lacking(&what))?;
        }
    }
    Ok(())
}

/// Whether what an image says of a vDSO can be.
fn check(theirs: &VdsoState, code: u64) -> Result<(), &'static str> {
    let aligned = |at: u64| at.is_multiple_of(PAGE) && at != 0 && at < 1 << 47;
    let sound = theirs.parts.iter().all(|(_, start, end)| start < end && aligned(*start) && aligned(*end));
    let whole = theirs.parts.windows(2).all(|pair| pair[0].2 == pair[1].1);
    let ends = theirs.parts.last().is_some_and(|part| part.0 == "[vdso]" && part.2 - part.1 == code);
    let short = theirs.range().end.saturating_sub(theirs.range().start) <= 4 * LONGEST;
    if sound && whole && ends && short { Ok(()) } else { Err("its vDSO lies where none can") }
}

/// Where all of them have a face of this kernel's vDSO, and what was before it.
fn home(kin: &[&MemoryState], ours: &Code) -> Option<u64> {
    let of_ours = |face: &&FaceState| face::told(&face.code).is_some_and(|told| told.digest == ours.digest);
    let start = kin.first()?.faces.iter().find(of_ours)?.start.checked_sub(ours.lead())?;
    let is_whole = |state: &&MemoryState| {
        let clocks = start..start + ours.lead();
        let face = state.faces.iter().find(|face| face.start == clocks.end);
        let empty = |runs: &[super::PageRun]| !runs.iter().any(|run| run.start < clocks.end && clocks.start < run.end);
        let stands_for_clocks = |vma: &VmaState| vma.backing == Backing::Anonymous && vma.protection == libc::PROT_READ;
        let covering = state.vmas.iter().filter(|vma| ranges::overlap(&vma.range(), &clocks).is_some());
        let (mut covered, mut fit) = (0, true);
        for vma in covering {
            covered += ranges::overlap(&vma.range(), &clocks).map_or(0, |range| range.end - range.start);
            fit &= stands_for_clocks(vma);
        }
        face.is_some_and(|face| of_ours(&face) && face.code.len() == ours.bytes.len())
            && fit
            && covered == clocks.end - clocks.start
            && empty(&state.pages)
            && empty(&state.left)
    };
    kin.iter().all(is_whole).then_some(start)
}

/// Addresses near `theirs` that none of them uses.
fn free_place(kin: &[&MemoryState], theirs: &VdsoState, length: u64) -> Option<u64> {
    let used = kin.iter().flat_map(|state| {
        let margin = |vma: &VmaState| if vma.has(flag::GROWSDOWN) { GROWTH } else { MARGIN };
        let vmas = state.vmas.iter().map(move |vma| vma.start.saturating_sub(margin(vma))..vma.end + MARGIN);
        let heap = state.fields.start_brk..state.fields.brk.saturating_add(GROWTH);
        vmas.chain([heap]).filter(|range| range.start < range.end)
    });
    let own = theirs.range().start.saturating_sub(MARGIN)..theirs.range().end + MARGIN;
    let used = ranges::joined(used.chain([own]).collect());
    let around =
        theirs.range().start.saturating_sub(NEAR).max(1 << 20)..(theirs.range().end + NEAR).min((1 << 47) - (1 << 20));
    let gaps = ranges::without(around, &used);
    gaps.iter().rfind(|gap| gap.end - gap.start >= length).map(|gap| (gap.end - length) / PAGE * PAGE)
}

/// Gives one address space this kernel's vDSO at `start`.
fn exchange(
    state: &mut MemoryState,
    theirs: &VdsoState,
    (code, ours): (&[u8], &Code),
    start: u64,
) -> Result<(), String> {
    let own = start..start + ours.length();
    cut_out(state, &own);
    state.faces.retain(|face| ranges::overlap(&face.range(), &own).is_none());
    let place = theirs.code().ok_or("it has no code")?;
    let functions: Vec<(String, u64)> =
        ours.symbols.iter().map(|(name, offset)| (name.clone(), start + ours.lead() + offset)).collect();
    state.faces.push(FaceState { start: place.start, code: code.to_vec() });
    for face in &mut state.faces {
        face.code = face::make(&face.code, face.start, &functions)?;
        state.patches.push(Patch { at: face.start, bytes: face.code.clone() });
    }
    let clocks = theirs.range().start..place.start;
    let both = [(clocks, libc::PROT_READ), (place, libc::PROT_READ | libc::PROT_EXEC)];
    for (range, protection) in both.into_iter().filter(|(range, _)| range.start < range.end) {
        let vma = VmaState {
            start: range.start,
            end: range.end,
            protection,
            flags: 0,
            backing: Backing::Anonymous,
            name: None,
            key: 0,
            policy: Default::default(),
        };
        let at = state.vmas.partition_point(|other| other.start < vma.start);
        state.vmas.insert(at, vma);
    }
    state.vdso = Some(ours.placed_at(start));
    Ok(())
}

/// Takes a range out of what is mapped.
fn cut_out(state: &mut MemoryState, range: &Range<u64>) {
    let without = |part: Range<u64>| ranges::without(part, std::slice::from_ref(range));
    let vmas = std::mem::take(&mut state.vmas).into_iter().flat_map(|vma| {
        let parts = without(vma.range());
        parts.into_iter().map(move |part| match part == vma.range() {
            true => vma.clone(),
            // Only what has no file is cut.
            false => VmaState { start: part.start, end: part.end, ..vma.clone() },
        })
    });
    state.vmas = vmas.collect();
    for runs in [&mut state.pages, &mut state.left] {
        let kept = without(0..u64::MAX);
        *runs = super::PageRun::parts(runs, &kept);
    }
}
