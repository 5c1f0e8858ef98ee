//! The files of an image made again: all opened by the builder, kept in a pool of high descriptor numbers, and taken
//! from there by each process.

use std::ops::RangeInclusive;
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
        rebuild.keep_file(state.id, file);
    }
    rebuild.look_from(None)?;
    rebuild.work_in(None)
}

/// Connects every file with the others: first those that are only referred to, then those that refer.
pub fn connect_all(rebuild: &mut Rebuild<'_>, states: &[FileState]) -> Result<(), RebuildError> {
    let late = LateFiles::of(states)?;
    for refers in [false, true] {
        for state in states.iter().filter(|s| !late.contains(s.id)) {
            let kind = kind_named(&state.kind)?;
            if kind.refers_to_others() == refers {
                rebuild.work_in(state.network)?;
                rebuild.look_from(state.mounts)?;
                kind.connect(rebuild, state.id, &state.state)?;
            }
        }
    }
    rebuild.look_from(None)?;
    rebuild.work_in(None)?;
    for state in states.iter().filter(|s| !s.locks.is_empty() && !late.contains(s.id)) {
        locks::connect(rebuild.file(state.id)?, &state.locks).map_err(locks::failed(state.id))?;
    }
    Ok(())
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

/// The calls by which one process takes its descriptors from the pool and closes the rest of it. Everything that it has
/// below the pool is closed first: a seed brings nothing of its own along. Files that are not in the pool (`None`) are
/// left out: they are opened late.
///
/// # Errors
///
/// A number inside the pool, which the builder must have put higher than every number of the image.
pub fn restart_descriptors(
    descriptors: &[DescriptorState],
    pool: &dyn Fn(FileId) -> Option<i32>,
    range: RangeInclusive<i32>,
) -> Result<Vec<Batch>, RebuildError> {
    let (mut batches, mut batch) = (Vec::new(), Batch::new());
    if *range.start() > 0 {
        let close = [0.into(), (range.start() - 1).into(), 0.into()];
        batch.call(libc::SYS_close_range, close, "closing the descriptors of the seed");
    }
    for descriptor in descriptors {
        if descriptor.number < 0 || descriptor.number >= *range.start() {
            return Err(RebuildError::Damaged(format!("descriptor {} is inside the pool", descriptor.number)));
        }
        let flags = if descriptor.close_on_exec { libc::O_CLOEXEC } else { 0 };
        let Some(source) = pool(descriptor.file) else { continue };
        let what = format!("giving descriptor {} ({})", descriptor.number, descriptor.file);
        batch.call(libc::SYS_dup3, [source.into(), descriptor.number.into(), flags.into()], what);
        if batch.len() >= MANY {
            batches.push(std::mem::take(&mut batch));
        }
    }
    let close = [(*range.start()).into(), (*range.end()).into(), 0.into()];
    batch.call(libc::SYS_close_range, close, "closing the pool");
    batches.push(batch);
    Ok(batches)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn descriptor(number: i32, file: u32) -> DescriptorState {
        DescriptorState { number, file: FileId(file), close_on_exec: number == 7 }
    }

    #[test]
    fn takes_from_the_pool_and_closes_it() {
        let list = [descriptor(0, 0), descriptor(7, 1)];
        let batch = restart_descriptors(&list, &|id| Some(1000 + id.0 as i32), 1000..=1001).unwrap();
        assert_eq!(batch.iter().map(Batch::len).collect::<Vec<_>>(), [4]);
    }

    #[test]
    fn many_are_taken_in_pieces() {
        let list: Vec<_> = (0..1300).map(|number| descriptor(number, 0)).collect();
        let batches = restart_descriptors(&list, &|_| Some(2000), 2000..=2000).unwrap();
        assert_eq!(batches.iter().map(Batch::len).collect::<Vec<_>>(), [MANY, MANY, 1302 - 2 * MANY]);
    }

    #[test]
    fn refuses_a_number_inside_the_pool() {
        assert!(restart_descriptors(&[descriptor(1000, 0)], &|_| Some(1000), 1000..=1001).is_err());
    }
}
