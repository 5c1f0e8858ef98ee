//! State → kernel, for an address space: the system calls that make it again, planned and not yet done.

use std::ops::Range;

use super::keys::{self, Step};
use super::kinship::{self, vma_at};
use super::layout::flag;
use super::pages::runs;
use super::policy;
use super::state::{Backing, MemoryState, PageSource, VmaState};
use super::{ranges, vdso};
use crate::error::RebuildError;
use crate::ids::FileId;
use crate::sys::memory::{MADV_GUARD_INSTALL, MADV_GUARD_REMOVE};
use crate::tracee::{Arg, Batch, Call, Results};

/// The most that one batch takes, so that it fits into a scratch area.
const MOST_CALLS: usize = 900;
const MOST_DATA: usize = 192 << 10;
/// The most that one `preadv` takes: UIO_MAXIOV, and a round number below MAX_RW_COUNT.
const MOST_PIECES: usize = 1024;
const MOST_BYTES: u64 = 1 << 30;
/// The lowest address that anybody may map (`vm.mmap_min_addr`, or more).
const LOWEST: u64 = 0x10000;
/// Behind the last address of a process without five-level page tables.
const HIGHEST: u64 = 0x7fff_ffff_f000;

const ARCH_MAP_VDSO_64: u64 = 0x2003;
const PR_SET_VMA: u64 = 0x5356_4d41;
const MAP_DROPPABLE: i32 = 0x08;
const SYS_MSEAL: libc::c_long = 462;

/// A batch, and how much each of its reads must bring.
pub struct MemoryBatch {
    /// The calls.
    pub batch: Batch,
    reads: Vec<(Call, u64)>,
    /// Where mappings must have come to lie.
    placed: Vec<(Call, u64)>,
}

impl MemoryBatch {
    /// Whether every read brought all that it should: a batch does not end at a short one.
    pub fn check(&self, results: &Results) -> Result<(), RebuildError> {
        if let Some((_, at)) = self.placed.iter().find(|(call, at)| results.get(*call) != *at as i64) {
            return Err(RebuildError::Lacks(format!("a kernel that puts an io_uring at {at:#x}")));
        }
        match self.reads.iter().find(|(call, bytes)| results.get(*call) != *bytes as i64) {
            None => Ok(()),
            Some((call, bytes)) => {
                Err(RebuildError::Damaged(format!("{} of {bytes} bytes of memory could be read", results.get(*call))))
            }
        }
    }
}

/// What an address space is made from.
pub struct Target<'a> {
    /// What it shall be.
    pub state: &'a MemoryState,
    /// What is mapped now.
    pub current: &'a [Range<u64>],
    /// For a child that was just forked: what its parent was made from.
    pub inherited: Option<&'a MemoryState>,
    /// What must stay: the scratch area.
    pub keep: Range<u64>,
    /// The number that a file has in the process.
    pub pool: &'a dyn Fn(FileId) -> i32,
    /// The number of the image's data in the process.
    pub data: i32,
}

/// The batches that turn the address space of a seed, or of a child just forked, into what `target` says, in order. All that
/// must wait until the process has forked its own children is left to [`late_batch`].
pub fn rebuild_batches(target: &Target<'_>) -> Result<Vec<MemoryBatch>, RebuildError> {
    let state = target.state;
    if let Some(vma) = state.vmas.iter().find(|v| ranges::overlap(&v.range(), &target.keep).is_some()) {
        return Err(RebuildError::Lacks(format!("a free place for zap beside the mapping at {:#x}", vma.start)));
    }
    let kept = target.inherited.map_or(Vec::new(), |parent| kinship::kept(parent, state));
    let mut planner = Planner::default();
    unmap(&mut planner, target, &kept);
    map_vdso(&mut planner, target)?;
    set_fields(&mut planner, target);
    place_rings(&mut planner, target, &kept);
    for vma in state.vmas.iter().filter(|vma| !vma.is_ring()) {
        map(&mut planner, target, vma, &kept)?;
    }
    for vma in &state.vmas {
        bind(&mut planner, target, vma, &kept);
    }
    for vma in &state.vmas {
        advise(&mut planner, target, vma, &kept);
    }
    drop_pages(&mut planner, target, &kept);
    fill(&mut planner, target, &kept);
    have_keys(&mut planner, target)?;
    for vma in &state.vmas {
        protect(&mut planner, target, vma, &kept);
        lock(&mut planner, vma);
    }
    Ok(planner.finish())
}

/// What can be done only once the process has forked its children: they inherit memory without it.
pub fn late_batch(state: &MemoryState) -> Vec<MemoryBatch> {
    let mut planner = Planner::default();
    for vma in &state.vmas {
        for (flag, advice) in [(flag::DONTFORK, libc::MADV_DONTFORK), (flag::WIPEONFORK, libc::MADV_WIPEONFORK)] {
            if vma.has(flag) {
                planner.call(libc::SYS_madvise, over(vma.range(), advice), || what("advising", vma.start));
            }
        }
    }
    for vma in state.vmas.iter().filter(|v| v.has(flag::SEALED)) {
        planner.call(SYS_MSEAL, over(vma.range(), 0), || what("sealing", vma.start));
    }
    planner.finish()
}

/// Adds advice about a range to a batch.
pub fn over_range(batch: &mut Batch, range: &Range<u64>, advice: i32) {
    batch.call(libc::SYS_madvise, over(range.clone(), advice), what("advising", range.start));
}

/// `length` bytes of address space that none of `states` uses, with room around for stacks to grow.
pub fn free_gap<'a>(states: impl IntoIterator<Item = &'a MemoryState>, length: u64) -> Option<u64> {
    const MARGIN: u64 = 64 << 20;
    const LOWEST: u64 = 1 << 32;
    let used = states.into_iter().flat_map(|s| {
        let vdso = s.vdso.iter().map(|v| v.range());
        s.vmas.iter().map(VmaState::range).chain(vdso).chain(std::iter::once(s.fields.start_brk..s.fields.brk))
    });
    let gaps = ranges::without(LOWEST..1 << 46, &ranges::joined(used.collect()));
    let room = length + 2 * MARGIN;
    gaps.iter().rfind(|gap| gap.end - gap.start >= room).map(|gap| gap.end - MARGIN - length)
}

fn what(doing: &str, address: u64) -> String {
    format!("{doing} {address:#x}")
}

fn over(range: Range<u64>, number: i32) -> [Arg; 3] {
    [range.start.into(), (range.end - range.start).into(), number.into()]
}

/// Collects calls, in batches of bounded size.
#[derive(Default)]
struct Planner {
    done: Vec<MemoryBatch>,
    batch: Batch,
    reads: Vec<(Call, u64)>,
    placed: Vec<(Call, u64)>,
    data: usize,
}

impl Planner {
    fn make_room(&mut self, data: usize) {
        if self.batch.len() >= MOST_CALLS || self.data + data > MOST_DATA {
            self.end_batch();
        }
        self.data += data;
    }

    fn end_batch(&mut self) {
        let (batch, reads) = (std::mem::take(&mut self.batch), std::mem::take(&mut self.reads));
        let placed = std::mem::take(&mut self.placed);
        self.data = 0;
        if !batch.is_empty() {
            self.done.push(MemoryBatch { batch, reads, placed });
        }
    }

    fn call<const N: usize>(&mut self, number: libc::c_long, args: [Arg; N], what: impl FnOnce() -> String) {
        self.make_room(0);
        self.batch.call(number, args, what());
    }

    /// A call that a kernel may lack, where nothing depends on it.
    fn attempt<const N: usize>(&mut self, number: libc::c_long, args: [Arg; N]) {
        self.make_room(0);
        self.batch.attempt(number, args);
    }

    fn finish(mut self) -> Vec<MemoryBatch> {
        self.end_batch();
        self.done
    }
}

fn keeps_vdso(target: &Target<'_>) -> bool {
    target.inherited.is_some_and(|parent| parent.vdso == target.state.vdso)
}

fn unmap(planner: &mut Planner, target: &Target<'_>, kept: &[Range<u64>]) {
    let mut stays = kept.to_vec();
    stays.push(target.keep.clone());
    if keeps_vdso(target) {
        stays.extend(target.state.vdso.iter().map(|v| v.range()));
    }
    let mapped: Vec<Range<u64>> = target.current.iter().filter(|r| r.end <= HIGHEST).cloned().collect();
    for gap in ranges::without(0..HIGHEST, &ranges::joined(stays)) {
        let first = mapped.partition_point(|m| m.end <= gap.start);
        let behind = mapped.partition_point(|m| m.start < gap.end);
        if first < behind {
            let range = mapped[first].start.max(gap.start)..mapped[behind - 1].end.min(gap.end);
            let args = [range.start.into(), (range.end - range.start).into()];
            planner.call(libc::SYS_munmap, args, || what("unmapping", range.start));
        }
    }
}

fn map_vdso(planner: &mut Planner, target: &Target<'_>) -> Result<(), RebuildError> {
    let Some(vdso) = target.state.vdso.as_ref().filter(|_| !keeps_vdso(target)) else { return Ok(()) };
    if !vdso::fits(vdso) {
        return Err(RebuildError::Lacks("the vDSO that the image was taken with (its kernel was another)".into()));
    }
    let start = vdso.range().start;
    planner.call(libc::SYS_arch_prctl, [ARCH_MAP_VDSO_64.into(), start.into()], || what("mapping the vDSO at", start));
    Ok(())
}

/// `PR_SET_MM_MAP`. While nothing of the old program is mapped any more: the executable could not be changed otherwise.
fn set_fields(planner: &mut Planner, target: &Target<'_>) {
    let fields = &target.state.fields;
    let inherited = target.inherited.map(|parent| &parent.fields);
    if inherited == Some(fields) {
        return;
    }
    let exe = match fields.exe {
        Some(exe) if inherited.is_none_or(|parent| parent.exe != fields.exe) => (target.pool)(exe),
        _ => -1,
    };
    planner.make_room(256 + fields.auxv.len());
    let auxv = planner.batch.bytes(&fields.auxv);
    let numbers = [
        fields.start_code,
        fields.end_code,
        fields.start_data,
        fields.end_data,
        fields.start_brk,
        fields.brk,
        fields.start_stack,
        fields.arg_start,
        fields.arg_end,
        fields.env_start,
        fields.env_end,
        0,
        fields.auxv.len() as u64 | u64::from(exe as u32) << 32,
    ];
    let bytes: Vec<u8> = numbers.iter().flat_map(|n| n.to_ne_bytes()).collect();
    let map = planner.batch.bytes(&bytes);
    planner.batch.pointer(map, 88, auxv);
    let args = [libc::PR_SET_MM.into(), libc::PR_SET_MM_MAP.into(), map, bytes.len().into(), 0u64.into()];
    planner.batch.call(libc::SYS_prctl, args, "setting the fields of the address space");
}

/// The memory of rings, before there is anything else. The kernel alone chooses where it lies, so it is left one choice: all
/// other addresses are taken meanwhile.
fn place_rings(planner: &mut Planner, target: &Target<'_>, kept: &[Range<u64>]) {
    let mut taken = kept.to_vec();
    taken.push(target.keep.clone());
    taken.extend(target.state.vdso.iter().map(|vdso| vdso.range()));
    for vma in target.state.vmas.iter().filter(|vma| vma.is_ring()) {
        let Backing::Ring { file, offset } = vma.backing else { continue };
        for piece in ranges::without(vma.range(), kept) {
            taken.push(piece.clone());
            let others = ranges::without(LOWEST..HIGHEST, &ranges::joined(taken.clone()));
            let none = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED_NOREPLACE;
            for range in &others {
                let [start, length, nothing] = over(range.clone(), libc::PROT_NONE);
                let args = [start, length, nothing, none.into(), (-1i32).into(), 0u64.into()];
                planner.call(libc::SYS_mmap, args, || what("taking", range.start));
            }
            let [_, length, protection] = over(piece.clone(), vma.protection);
            let (file, offset) = ((target.pool)(file), offset + (piece.start - vma.start));
            let args = [0u64.into(), length, protection, libc::MAP_SHARED.into(), file.into(), offset.into()];
            planner.make_room(0);
            let call = planner.batch.call(libc::SYS_mmap, args, what("mapping an io_uring at", piece.start));
            planner.placed.push((call, piece.start));
            for range in &others {
                let args = [range.start.into(), (range.end - range.start).into()];
                planner.call(libc::SYS_munmap, args, || what("giving back", range.start));
            }
        }
    }
}

/// Pages of `vma` that are read from the image.
fn is_filled(state: &MemoryState, range: &Range<u64>) -> bool {
    let first = state.pages.partition_point(|r| r.end <= range.start);
    state.pages[first..].iter().take_while(|r| r.start < range.end).any(|r| r.source != PageSource::Parent)
}

/// The protection with which the parts that are mapped anew begin.
fn first_protection(state: &MemoryState, vma: &VmaState, range: &Range<u64>) -> i32 {
    if let Backing::SystemV { read_only, .. } = vma.backing {
        // shmat(2) gives all that the attachment may be; a child may use what its parent does not.
        let write = if read_only { 0 } else { libc::PROT_WRITE };
        return vma.protection & libc::PROT_EXEC | libc::PROT_READ | write;
    }
    let fill = vma.is_private() && is_filled(state, range);
    // The kernel would take a key for it at once.
    let read = if vma.is_execute_only() { libc::PROT_READ } else { 0 };
    vma.protection | read | if fill { libc::PROT_WRITE } else { 0 }
}

fn map(planner: &mut Planner, target: &Target<'_>, vma: &VmaState, kept: &[Range<u64>]) -> Result<(), RebuildError> {
    for piece in ranges::without(vma.range(), kept) {
        let protection = first_protection(target.state, vma, &piece);
        let fixed = libc::MAP_FIXED;
        let (kind, file, offset) = match vma.backing {
            // A place for its ring, which comes later.
            Backing::Asynchronous(_) => (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE, -1, 0),
            Backing::Anonymous if vma.has(flag::DROPPABLE) => (MAP_DROPPABLE | libc::MAP_ANONYMOUS, -1, 0),
            Backing::Anonymous => (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0),
            Backing::Private { file, offset } => (libc::MAP_PRIVATE, (target.pool)(file), offset),
            Backing::Shared { file, offset } => (libc::MAP_SHARED, (target.pool)(file), offset),
            Backing::Ring { .. } => continue,
            Backing::SystemV { id, read_only, .. } => {
                attach(planner, vma, (id, read_only), &piece)?;
                continue;
            }
        };
        let grows = if vma.has(flag::GROWSDOWN) { libc::MAP_GROWSDOWN } else { 0 };
        let reserve = if vma.has(flag::NORESERVE) { libc::MAP_NORESERVE } else { 0 };
        let offset = if file < 0 { 0 } else { offset + (piece.start - vma.start) };
        let args = [
            piece.start.into(),
            (piece.end - piece.start).into(),
            protection.into(),
            (kind | fixed | grows | reserve).into(),
            file.into(),
            offset.into(),
        ];
        let huge = vma.has(flag::HUGETLB);
        let doing =
            if huge { "having huge pages, of which enough must be free (vm.nr_hugepages), at" } else { "mapping" };
        planner.call(libc::SYS_mmap, args, || what(doing, piece.start));
        name(planner, vma, &piece);
    }
    Ok(())
}

fn attach(
    planner: &mut Planner,
    vma: &VmaState,
    (id, read_only): (i32, bool),
    piece: &Range<u64>,
) -> Result<(), RebuildError> {
    if *piece != vma.range() {
        return Err(RebuildError::Damaged(format!("half of the segment at {:#x} is inherited", vma.start)));
    }
    let read_only = if read_only { libc::SHM_RDONLY } else { 0 };
    let executable = if vma.protection & libc::PROT_EXEC == 0 { 0 } else { libc::SHM_EXEC };
    let args = [id.into(), vma.start.into(), (read_only | executable | libc::SHM_REMAP).into()];
    planner.call(libc::SYS_shmat, args, || what("attaching", vma.start));
    Ok(())
}

fn name(planner: &mut Planner, vma: &VmaState, piece: &Range<u64>) {
    if let Some(name) = &vma.name {
        planner.make_room(name.len() + 8);
        let mut text = name.to_vec();
        text.push(0);
        let text = planner.batch.bytes(&text);
        let length = piece.end - piece.start;
        planner
            .batch
            .attempt(libc::SYS_prctl, [PR_SET_VMA.into(), 0u64.into(), piece.start.into(), length.into(), text]);
    }
}

/// The parts of `vma` with what they begin as: flags, protection and key of the parent's, or none and what they were mapped
/// with.
fn parts(target: &Target<'_>, vma: &VmaState, kept: &[Range<u64>]) -> Vec<(Range<u64>, u32, i32, u8)> {
    let inherited = |r: Range<u64>| {
        let parent = target.inherited.and_then(|p| vma_at(&p.vmas, r.start));
        let (flags, protection, key) = parent.map_or((0, 0, 0), |p| (p.flags, p.protection, p.key));
        (r, flags, protection, key)
    };
    let anew = ranges::without(vma.range(), kept);
    let anew = anew.into_iter().map(|r| (r.clone(), 0, first_protection(target.state, vma, &r), 0));
    ranges::common(&[vma.range()], kept).into_iter().map(inherited).chain(anew).collect()
}

/// Advice that children may inherit: flag, advice, and the advice that takes it back.
const ADVICE: [(u32, i32, Option<i32>); 6] = [
    (flag::HUGEPAGE, libc::MADV_HUGEPAGE, None),
    (flag::NOHUGEPAGE, libc::MADV_NOHUGEPAGE, None),
    (flag::MERGEABLE, libc::MADV_MERGEABLE, Some(libc::MADV_UNMERGEABLE)),
    (flag::DONTDUMP, libc::MADV_DONTDUMP, Some(libc::MADV_DODUMP)),
    (flag::RANDOM, libc::MADV_RANDOM, Some(libc::MADV_NORMAL)),
    (flag::SEQUENTIAL, libc::MADV_SEQUENTIAL, Some(libc::MADV_NORMAL)),
];

fn advise(planner: &mut Planner, target: &Target<'_>, vma: &VmaState, kept: &[Range<u64>]) {
    for (range, has, ..) in parts(target, vma, kept) {
        let changes = ADVICE.iter().filter(|(flag, ..)| (has ^ vma.flags) & flag != 0);
        // what is taken back comes first: MADV_NORMAL takes back two
        type Changes<'c> = Vec<&'c (u32, i32, Option<i32>)>;
        let (wanted, unwanted): (Changes<'_>, Changes<'_>) = changes.partition(|(flag, ..)| vma.has(*flag));
        let back = unwanted.iter().filter_map(|change| change.2);
        for advice in back.chain(wanted.iter().map(|change| change.1)) {
            planner.attempt(libc::SYS_madvise, over(range.clone(), advice));
        }
    }
}

/// Memory is where it shall be before it is filled.
fn bind(planner: &mut Planner, target: &Target<'_>, vma: &VmaState, kept: &[Range<u64>]) {
    let of_parent = |range: &Range<u64>| target.inherited.and_then(|p| vma_at(&p.vmas, range.start)?.policy.as_ref());
    let inherited = ranges::common(&[vma.range()], kept).into_iter().map(|range| (of_parent(&range), range));
    let anew = ranges::without(vma.range(), kept).into_iter().map(|range| (None, range));
    for (_, range) in inherited.chain(anew).filter(|(has, _)| *has != vma.policy.as_ref()) {
        planner.make_room(256);
        policy::bind(range, vma.policy.as_ref(), &mut planner.batch);
    }
}

/// Pages and guards that the parent has and the child has not.
fn drop_pages(planner: &mut Planner, target: &Target<'_>, kept: &[Range<u64>]) {
    let Some(parent) = target.inherited else { return };
    let gone = |theirs: &[Range<u64>], ours: &[Range<u64>]| -> Vec<Range<u64>> {
        ranges::common(theirs, kept).into_iter().flat_map(|r| ranges::without(r, ours)).collect()
    };
    for range in gone(&parent.guards, &target.state.guards) {
        planner.call(libc::SYS_madvise, over(range.clone(), MADV_GUARD_REMOVE), || what("unguarding", range.start));
    }
    for range in gone(&runs(&parent.pages), &runs(&target.state.pages)) {
        planner.call(libc::SYS_madvise, over(range.clone(), libc::MADV_DONTNEED), || what("dropping", range.start));
    }
}

fn fill(planner: &mut Planner, target: &Target<'_>, kept: &[Range<u64>]) {
    // Piece by piece, as they are protected again.
    for piece in kept {
        make_writable(planner, target, piece);
    }
    let mut read = Read::default();
    for run in &target.state.pages {
        if let PageSource::Data(offset) = run.source {
            read.add(planner, target.data, run.start..run.end, offset);
        }
    }
    read.end(planner, target.data);
    for guard in &target.state.guards {
        let args = over(guard.clone(), MADV_GUARD_INSTALL);
        planner.call(libc::SYS_madvise, args, || what("guarding", guard.start));
    }
}

/// Inherited mappings into which pages are read must be writable for that.
fn make_writable(planner: &mut Planner, target: &Target<'_>, piece: &Range<u64>) {
    let vmas = &target.state.vmas;
    let first = vmas.partition_point(|v| v.end <= piece.start);
    for vma in vmas[first..].iter().take_while(|v| v.start < piece.end).filter(|v| v.is_private()) {
        let Some(range) = ranges::overlap(&vma.range(), piece).filter(|r| is_filled(target.state, r)) else { continue };
        for part in inherited_parts(target, &range).into_iter().filter(|p| p.1 & libc::PROT_WRITE == 0) {
            let (range, protection) = (part.0, part.1 | libc::PROT_WRITE);
            planner.call(libc::SYS_mprotect, over(range.clone(), protection), || what("opening", range.start));
        }
    }
}

/// `range` as the parent has it mapped: with each protection.
fn inherited_parts(target: &Target<'_>, range: &Range<u64>) -> Vec<(Range<u64>, i32)> {
    let vmas = target.inherited.map_or(&[][..], |p| &p.vmas);
    let first = vmas.partition_point(|v| v.end <= range.start);
    let overlapping = vmas[first..].iter().take_while(|v| v.start < range.end);
    overlapping.filter_map(|v| ranges::overlap(&v.range(), range).map(|r| (r, v.protection))).collect()
}

fn protect(planner: &mut Planner, target: &Target<'_>, vma: &VmaState, kept: &[Range<u64>]) {
    for (range, _, protection, key) in parts(target, vma, kept) {
        let inherited = !ranges::common(kept, std::slice::from_ref(&range)).is_empty();
        let opened = inherited && vma.is_private() && is_filled(target.state, &range);
        let now = if opened { protection | libc::PROT_WRITE } else { protection };
        if now == vma.protection && key == vma.key {
            continue;
        }
        let args = over(range.clone(), vma.protection);
        let doing = || what("protecting", range.start);
        if key == vma.key || vma.is_execute_only() {
            planner.call(libc::SYS_mprotect, args, doing);
        } else {
            let [start, length, protection] = args;
            planner.call(libc::SYS_pkey_mprotect, [start, length, protection, i32::from(vma.key).into()], doing);
        }
    }
}

/// Its protection keys. Memory is filled before: not every key lets everybody write.
fn have_keys(planner: &mut Planner, target: &Target<'_>) -> Result<(), RebuildError> {
    let steps = keys::steps(target.state, target.inherited);
    if !steps.is_empty() && !keys::are_offered() {
        return Err(RebuildError::Lacks("protection keys (the processor feature pku)".into()));
    }
    for step in steps {
        match step {
            Step::Have(key) => {
                planner
                    .call(libc::SYS_pkey_alloc, [0u64.into(), 0u64.into()], || format!("having protection key {key}"));
            }
            Step::ExecuteOnly(range) => {
                let args = over(range.clone(), libc::PROT_EXEC);
                planner.call(libc::SYS_mprotect, args, || what("having executed only what is at", range.start));
            }
            Step::Free(key) => {
                planner.call(libc::SYS_pkey_free, [key.into()], || format!("giving back protection key {key}"));
            }
        }
    }
    Ok(())
}

/// Locks are not inherited, and locking gives a process its own copies of what it shares: so before it has children.
fn lock(planner: &mut Planner, vma: &VmaState) {
    if vma.has(flag::LOCKED) {
        let on_fault = if vma.has(flag::LOCK_ON_FAULT) { libc::MLOCK_ONFAULT } else { 0 };
        let args = over(vma.range(), on_fault as i32);
        if vma.protection == libc::PROT_NONE {
            // The kernel locks it, and then says ENOMEM: what nobody may touch it cannot put in place (`__mm_populate`).
            return planner.attempt(libc::SYS_mlock2, args);
        }
        planner.call(libc::SYS_mlock2, args, || what("locking", vma.start));
    }
}

/// Reads of the image's data that go on where the last one ended become one call.
#[derive(Default)]
struct Read {
    pieces: Vec<Range<u64>>,
    offset: u64,
    bytes: u64,
}

impl Read {
    fn add(&mut self, planner: &mut Planner, data: i32, mut range: Range<u64>, mut offset: u64) {
        while !range.is_empty() {
            if offset != self.offset + self.bytes || self.pieces.len() == MOST_PIECES || self.bytes == MOST_BYTES {
                self.end(planner, data);
                self.offset = offset;
            }
            let now = (range.end - range.start).min(MOST_BYTES - self.bytes);
            match self.pieces.last_mut() {
                Some(last) if last.end == range.start => last.end += now,
                _ => self.pieces.push(range.start..range.start + now),
            }
            self.bytes += now;
            offset += now;
            range.start += now;
        }
    }

    fn end(&mut self, planner: &mut Planner, data: i32) {
        let pieces = std::mem::take(&mut self.pieces);
        let bytes = std::mem::take(&mut self.bytes);
        if pieces.is_empty() {
            return;
        }
        planner.make_room(pieces.len() * 16);
        let vector = pieces.iter().flat_map(|p| [p.start, p.end - p.start]).flat_map(u64::to_ne_bytes);
        let vector = planner.batch.bytes(&vector.collect::<Vec<u8>>());
        let args = [data.into(), vector, pieces.len().into(), self.offset.into(), 0u64.into()];
        let call = planner.batch.call(libc::SYS_preadv, args, what("filling", pieces[0].start));
        planner.reads.push((call, bytes));
    }
}
