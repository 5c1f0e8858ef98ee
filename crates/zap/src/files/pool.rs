//! The files of an image made again: all opened by the builder, and taken from its pool of descriptors, which every seed
//! has, by each process.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::os::fd::{AsFd, OwnedFd};

use super::{DescriptorState, FileKind, FileState, LateFiles, kind, locks, owner};
use crate::error::{Context, RebuildError};
use crate::ids::{FileId, HostPid, PodPid};
use crate::parallel;
use crate::rebuild::Rebuild;
use crate::tracee::Batch;

fn kind_named(name: &str) -> Result<&'static dyn FileKind, RebuildError> {
    kind(name).ok_or_else(|| RebuildError::Damaged(format!("this zap does not know files of the kind {name:?}")))
}

/// Opens every file of the image, but for those that [`super::LateFiles`] has.
pub fn open_all(rebuild: &mut Rebuild<'_>, states: &[FileState]) -> Result<(), RebuildError> {
    let late = LateFiles::of(states)?;
    for state in states.iter().filter(|s| !late.contains(s.id)) {
        rebuild.work_in(state.network)?;
        rebuild.look_from(state.mounts)?;
        let file = kind_named(&state.kind)?.open(rebuild, state.id, &state.state)?;
        rebuild.keep_file(state.id, file)?;
    }
    rebuild.look_from(None)?;
    rebuild.work_in(None)
}

/// Connects every file with the others: first those that are only referred to, then those that refer. Those that carry
/// late ones are left to [`connect_late`].
pub fn connect_all(rebuild: &mut Rebuild<'_>, states: &[FileState]) -> Result<(), RebuildError> {
    let late = LateFiles::of(states)?;
    let put_off: HashSet<FileId> = late.carriers(states)?.iter().map(|state| state.id).collect();
    let now = |state: &&FileState| !late.contains(state.id) && !put_off.contains(&state.id);
    connect(rebuild, &states.iter().filter(now).collect::<Vec<_>>())?;
    for state in states.iter().filter(|s| !s.locks.is_empty() && !late.contains(s.id)) {
        locks::connect(rebuild.file(state.id)?, &state.locks).map_err(locks::failed(state.id))?;
        rebuild.put_back();
    }
    Ok(())
}

/// Whether any file carries late ones.
pub fn any_late(states: &[FileState]) -> Result<bool, RebuildError> {
    LateFiles::of(states)?.carriers(states).map(|carriers| !carriers.is_empty())
}

/// Opens the late files that others carry, and connects those. To be called when every process exists.
pub fn connect_late(rebuild: &mut Rebuild<'_>, states: &[FileState]) -> Result<(), RebuildError> {
    let late = LateFiles::of(states)?;
    let carriers = late.carriers(states)?;
    late.open_carried(rebuild, &carriers)?;
    connect(rebuild, &carriers)
}

fn connect(rebuild: &mut Rebuild<'_>, states: &[&FileState]) -> Result<(), RebuildError> {
    for refers in [false, true] {
        for state in states {
            let kind = kind_named(&state.kind)?;
            if kind.refers_to_others() == refers {
                rebuild.work_in(state.network)?;
                rebuild.look_from(state.mounts)?;
                kind.connect(rebuild, state.id, &state.state)?;
                rebuild.put_back();
            }
        }
    }
    rebuild.look_from(None)?;
    rebuild.work_in(None)
}

/// A file for which there is something to do once every process exists, and the monitor's copy of it.
pub struct Unsettled<'s> {
    state: &'s FileState,
    kind: &'static dyn FileKind,
    /// Whether its kind has something to do; its owner may be all.
    of_kind: bool,
    file: OwnedFd,
}

/// The files that need settling, prepared for it. `fetch` gives a copy of a file of the pool.
pub fn unsettled<'s>(
    states: &'s [FileState],
    fetch: &dyn Fn(FileId) -> std::io::Result<OwnedFd>,
) -> Result<Vec<Unsettled<'s>>, RebuildError> {
    let mut all = Vec::new();
    for state in states {
        let kind = kind_named(&state.kind)?;
        let of_kind = kind.needs_settling(&state.state);
        if !of_kind && state.owner.is_none() || kind.late(&state.state)?.is_some() {
            continue;
        }
        let file = fetch(state.id).rebuilding("fetching", state.id)?;
        if of_kind {
            kind.prepare(file.as_fd(), &state.state)?;
        }
        all.push(Unsettled { state, kind, of_kind, file });
    }
    Ok(all)
}

/// Settles every file that needs it, in the monitor.
pub fn settle_all(all: &[Unsettled<'_>], host_pid: &dyn Fn(PodPid) -> Option<HostPid>) -> Result<(), RebuildError> {
    for Unsettled { state, kind, of_kind, file } in all {
        if *of_kind {
            kind.settle(file.as_fd(), &state.state, host_pid)?;
        }
        if let Some(owner) = &state.owner {
            owner::settle(file.as_fd(), owner, host_pid)?;
        }
    }
    Ok(())
}

/// Awakens every file that needs it, in the monitor. What may go on must find nobody who holds a copy: they are closed.
pub fn awaken_all(all: Vec<Unsettled<'_>>) -> Result<(), RebuildError> {
    let awaken = |one: Unsettled<'_>| match one.of_kind {
        true => one.kind.awaken(one.file.as_fd(), &one.state.state),
        false => Ok(()),
    };
    parallel::map(all, awaken).into_iter().collect()
}

/// Descriptors that one batch takes care of at most.
const MANY: usize = 512;

/// Where the file of a descriptor is, for a process that is to have it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// In the pool, under this number.
    Pool(i32),
    /// Another process keeps it, on which the pool has this handle; under this number there.
    Kept {
        /// The handle.
        keeper: i32,
        /// The number.
        number: i32,
    },
    /// Nowhere yet: it is opened late.
    Late,
}

/// The calls by which one process takes its descriptors from the pool, or from those who keep them, and closes whatever else
/// it has.
pub fn restart_descriptors(
    descriptors: &[DescriptorState],
    source: &dyn Fn(FileId) -> Source,
) -> Result<Vec<Batch>, RebuildError> {
    let mut kept = Vec::new();
    let mut keepers = BTreeMap::new();
    for descriptor in descriptors {
        if let Source::Kept { keeper, number } = source(descriptor.file) {
            kept.push((*descriptor, keeper, number));
            keepers.insert(keeper, 0);
        }
    }
    if !keepers.is_empty() {
        // Until everything was fetched from them, the handles are where nothing is to be.
        let numbers: HashSet<i32> = descriptors.iter().map(|descriptor| descriptor.number).collect();
        for (place, free) in keepers.values_mut().zip((0..).filter(|number| !numbers.contains(number))) {
            *place = free;
        }
    }
    let mut near = Vec::with_capacity(descriptors.len());
    for descriptor in descriptors {
        if let Source::Pool(number) = source(descriptor.file) {
            near.push((*descriptor, number));
        }
    }
    let handle = |(keeper, place): (&i32, &i32)| {
        (DescriptorState { number: *place, file: HANDLE, close_on_exec: true }, *keeper)
    };
    near.extend(keepers.iter().map(handle));
    let mut batches = take_from_pool(&near)?;
    if !kept.is_empty() {
        kept.sort_by_key(|(descriptor, ..)| descriptor.number);
        let taken = near.iter().map(|(descriptor, _)| descriptor.number).collect();
        fetch_kept(&kept, &keepers, taken, &mut batches);
    }
    Ok(batches)
}

/// A handle on who keeps files is no file of the image.
const HANDLE: FileId = FileId(u32::MAX);

/// The calls by which a process fetches files that others keep: `taken` are the numbers that it has. The kernel gives the
/// lowest number that is free, which is nearly always the one that is wanted.
fn fetch_kept(
    kept: &[(DescriptorState, i32, i32)],
    keepers: &BTreeMap<i32, i32>,
    mut taken: HashSet<i32>,
    batches: &mut Vec<Batch>,
) {
    let mut lowest = 0;
    for some in kept.chunks(MANY / 3) {
        let mut batch = Batch::new();
        for (descriptor, keeper, number) in some {
            while taken.contains(&lowest) {
                lowest += 1;
            }
            let (wanted, handle) = (descriptor.number, keepers.get(keeper).copied().unwrap_or(-1));
            let what = format!("fetching descriptor {wanted} ({})", descriptor.file);
            batch.call(libc::SYS_pidfd_getfd, [handle.into(), (*number).into(), 0.into()], what.clone());
            if lowest != wanted {
                let flags = if descriptor.close_on_exec { libc::O_CLOEXEC } else { 0 };
                batch.call(libc::SYS_dup3, [lowest.into(), wanted.into(), flags.into()], what.clone());
                batch.call(libc::SYS_close, [lowest.into()], what);
            } else if !descriptor.close_on_exec {
                batch.call(libc::SYS_fcntl, [wanted.into(), libc::F_SETFD.into(), 0.into()], what);
            }
            taken.insert(wanted);
        }
        batches.push(batch);
    }
    let mut batch = Batch::new();
    keepers.values().for_each(|handle| close(&mut batch, *handle, *handle));
    batches.push(batch);
}

/// The calls by which one process takes these descriptors from those numbers of the pool, and closes whatever else it has.
fn take_from_pool(descriptors: &[(DescriptorState, i32)]) -> Result<Vec<Batch>, RebuildError> {
    let mut wanted = BTreeMap::new();
    for (descriptor, source) in descriptors {
        if descriptor.number < 0 {
            return Err(RebuildError::Damaged(format!("descriptor {} is none", descriptor.number)));
        }
        wanted.insert(descriptor.number, (*source, descriptor));
    }
    let aside = unused(wanted.iter().flat_map(|(number, (source, _))| [*number, *source]));
    let (mut batches, mut batch) = (Vec::new(), Batch::new());
    let mut give = |from: i32, to: i32, flags: i32, what: String| {
        batch.call(libc::SYS_dup3, [from.into(), to.into(), flags.into()], what);
        if batch.len() >= MANY {
            batches.push(std::mem::take(&mut batch));
        }
    };
    for step in moves(wanted.iter().map(|(number, (source, _))| (*number, *source))) {
        match step {
            Move::Aside(number) => give(number, aside, 0, format!("moving descriptor {number}")),
            Move::Give { from, to } => {
                let Some((_, descriptor)) = wanted.get(&to) else { continue };
                let flags = if descriptor.close_on_exec { libc::O_CLOEXEC } else { 0 };
                give(from.unwrap_or(aside), to, flags, format!("giving descriptor {to} ({})", descriptor.file));
            }
        }
    }
    for (number, (_, descriptor)) in wanted.iter().filter(|(number, (source, _))| *number == source) {
        let flags = if descriptor.close_on_exec { libc::FD_CLOEXEC } else { 0 };
        let what = format!("keeping descriptor {number} ({})", descriptor.file);
        batch.call(libc::SYS_fcntl, [(*number).into(), libc::F_SETFD.into(), flags.into()], what);
    }
    let mut next = 0;
    for number in wanted.keys() {
        close(&mut batch, next, *number - 1);
        next = *number + 1;
    }
    close(&mut batch, next, i32::MAX);
    batches.push(batch);
    Ok(batches)
}

/// The lowest number that is not among `numbers`.
fn unused(numbers: impl Iterator<Item = i32>) -> i32 {
    let used: HashSet<i32> = numbers.collect();
    (0..).find(|number| !used.contains(number)).unwrap_or(i32::MAX)
}

fn close(batch: &mut Batch, first: i32, last: i32) {
    if first <= last {
        batch.call(libc::SYS_close_range, [first.into(), last.into(), 0.into()], "closing what is of the seed");
    }
}

/// A step of moving descriptors that may lie in each other's way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Move {
    /// What is at a number is put aside.
    Aside(i32),
    /// A number is given what is at another one, or what was put aside last (`None`).
    Give { from: Option<i32>, to: i32 },
}

/// The steps that bring to each number what is at another one (number, where it is) now: nothing is overwritten that is
/// needed later. What is in its place already takes none.
fn moves(wanted: impl Iterator<Item = (i32, i32)>) -> Vec<Move> {
    let mut left: BTreeMap<i32, i32> = wanted.filter(|(number, source)| number != source).collect();
    let mut readers: HashMap<i32, usize> = HashMap::new();
    left.values().for_each(|source| *readers.entry(*source).or_default() += 1);
    let is_free = |number: &i32, readers: &HashMap<i32, usize>| readers.get(number).is_none_or(|count| *count == 0);
    let mut ready: Vec<i32> = left.keys().copied().filter(|number| is_free(number, &readers)).collect();
    let mut steps = Vec::with_capacity(left.len());
    loop {
        while let Some(to) = ready.pop() {
            let Some(from) = left.remove(&to) else { continue };
            steps.push(Move::Give { from: Some(from), to });
            readers.entry(from).and_modify(|count| *count -= 1);
            if is_free(&from, &readers) && left.contains_key(&from) {
                ready.push(from);
            }
        }
        // What is left goes round in circles, in each of which everything has one place to go to.
        let Some((first, mut from)) = left.pop_first() else { return steps };
        steps.push(Move::Aside(first));
        let mut to = first;
        while from != first {
            steps.push(Move::Give { from: Some(from), to });
            to = from;
            let Some(next) = left.remove(&to) else { break };
            from = next;
        }
        steps.push(Move::Give { from: None, to });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn descriptor(number: i32, file: u32) -> DescriptorState {
        DescriptorState { number, file: FileId(file), close_on_exec: number == 7 }
    }

    #[test]
    fn takes_from_the_pool_and_closes_the_rest() {
        let list = [descriptor(0, 0), descriptor(7, 1)];
        let batch = restart_descriptors(&list, &|id| Source::Pool(1000 + id.0 as i32)).unwrap();
        // Two are given; what lies between them and behind them is closed.
        assert_eq!(batch.iter().map(Batch::len).collect::<Vec<_>>(), [4]);
    }

    #[test]
    fn many_are_taken_in_pieces() {
        let list: Vec<_> = (0..1300).map(|number| descriptor(number, 0)).collect();
        let batches = restart_descriptors(&list, &|_| Source::Pool(2000)).unwrap();
        assert_eq!(batches.iter().map(Batch::len).collect::<Vec<_>>(), [MANY, MANY, 1301 - 2 * MANY]);
    }

    #[test]
    fn what_is_in_its_place_stays_there() {
        let list = [descriptor(7, 0), descriptor(8, 1)];
        let batch = restart_descriptors(&list, &|id| Source::Pool(7 + id.0 as i32)).unwrap();
        // Two flags; what lies below and above is closed.
        assert_eq!(batch.iter().map(Batch::len).collect::<Vec<_>>(), [4]);
    }

    #[test]
    fn what_others_keep_is_fetched() {
        let list = [descriptor(0, 0), descriptor(1, 1), descriptor(5, 2)];
        let kept = |id: FileId| match id.0 {
            0 => Source::Pool(30),
            number => Source::Kept { keeper: 40, number: number as i32 },
        };
        let batches = restart_descriptors(&list, &kept).unwrap();
        // One is given, and the handle (as 2); what is between and behind is closed. One comes where it is to be and is
        // not closed by execve, one must be moved; the handle goes.
        assert_eq!(batches.iter().map(Batch::len).collect::<Vec<_>>(), [4, 5, 1]);
    }

    #[test]
    fn what_is_put_aside_is_in_nobodys_way() {
        assert_eq!(unused([2, 3, 3, 2, 4, 0].into_iter()), 1);
        assert_eq!(unused([].into_iter()), 0);
    }

    proptest::proptest! {
        /// Whatever is where, each number gets what was wanted for it, in one step each and one more a circle.
        #[test]
        fn everything_arrives(wanted in proptest::collection::btree_map(0..12i32, 0..12i32, 0..12)) {
            let mut at: HashMap<i32, i32> = (0..12).map(|number| (number, number)).collect();
            let mut aside = None;
            let steps = moves(wanted.iter().map(|(number, source)| (*number, *source)));
            for step in &steps {
                match step {
                    Move::Aside(number) => aside = at.get(number).copied(),
                    Move::Give { from, to } => {
                        let what = from.map_or(aside, |from| at.get(&from).copied()).unwrap();
                        at.insert(*to, what);
                    }
                }
            }
            for (number, source) in &wanted {
                proptest::prop_assert_eq!(at[number], *source, "{:?}", steps);
            }
            proptest::prop_assert!(steps.len() <= wanted.len() + wanted.len() / 2);
        }
    }
}
