//! The descriptor table of a process: which number leads to which open file description.

use std::cmp::Ordering;
use std::os::fd::OwnedFd;
use std::sync::OnceLock;

use serde::{Deserialize, Serialize};

use super::{describe, intern_file, kind_of};
use crate::error::{CaptureError, Context};
use crate::ids::{FileId, HostPid};
use crate::look::{Look, Subject};
use crate::sys::kcmp;
use crate::sys::pidfd::PidFd;
use crate::tracee::{Batch, Call, Results};

/// A descriptor of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DescriptorState {
    /// Its number.
    pub number: i32,
    /// The open file description it leads to.
    pub file: FileId,
    /// Whether `execve` closes it.
    pub close_on_exec: bool,
}

/// Numbers that are not in use are tried this often before the kernel is asked for the list.
const MISSES: usize = 64;

/// The descriptors of a process that is held, in the order of their numbers; files met for the first time are captured.
/// `close_on_exec` is left false: only the process itself knows it cheaply (see [`ask_close_on_exec`]).
pub fn process_descriptors(
    look: &mut Look<'_>,
    subject: &Subject,
    pidfd: &PidFd,
) -> Result<Vec<DescriptorState>, CaptureError> {
    let mut found = Vec::new();
    walk(subject, &mut |number| {
        let file = match inherited(look, subject, number) {
            Some(file) => file,
            None => match copy(subject, pidfd, number)? {
                Some(copy) => intern_file(look, subject, number, copy)?,
                None => return Ok(false),
            },
        };
        look.files.note(subject.host, number, file);
        found.push(DescriptorState { number, file, close_on_exec: false });
        Ok(true)
    })?;
    Ok(found)
}

/// The file behind a number that leads where it led in another process: most of what relatives have is the same, and to
/// compare costs a third of copying.
fn inherited(look: &Look<'_>, subject: &Subject, number: i32) -> Option<FileId> {
    let (id, place) = look.files.latest(number)?;
    let (who, other) = place.number();
    let same = kcmp::compare_files(subject.host.0, number, who, other).ok()?;
    (same == Ordering::Equal).then_some(id)
}

/// Looks, while the pod runs, at every file of a process: refuses what cannot be captured, and does ahead what the hold
/// would be long for. The process may close files or end meanwhile.
pub fn check_all(look: &mut Look<'_>, subject: &Subject, pidfd: &PidFd) -> Result<(), CaptureError> {
    let checked = walk(subject, &mut |number| {
        let Some(copy) = copy(subject, pidfd, number)? else { return Ok(false) };
        let descriptor = describe(subject, number, copy)?;
        check_one(look, &descriptor)?;
        Ok(true)
    });
    match checked {
        Err(CaptureError::Vanished(_)) => Ok(()),
        other => other,
    }
}

/// Refuses a file that cannot be captured, and does ahead what its capture would take long for. The pod may run.
pub(crate) fn check_one(look: &mut Look<'_>, descriptor: &super::Descriptor) -> Result<(), CaptureError> {
    let kind = kind_of(descriptor)?;
    kind.check(descriptor)?;
    if descriptor.link.starts_with(b"socket:") || super::tun::is_one(descriptor) {
        look.namespaces.of_socket(descriptor)?;
    }
    kind.look_ahead(look, descriptor)
}

/// Visits every number of a process's table. The numbers are nearly always dense, and how many there are is known:
/// trying number after number costs a twentieth of listing `/proc/PID/fd`. `visit` says whether a number is in use.
fn walk(subject: &Subject, visit: &mut dyn FnMut(i32) -> Result<bool, CaptureError>) -> Result<(), CaptureError> {
    let Some(size) = count(subject.host).map_err(|e| failed(subject, "counting", e))? else {
        return walk_list(subject, 0, visit);
    };
    let (mut number, mut open, mut misses) = (0, 0, 0);
    while open < size && misses < MISSES {
        match visit(number)? {
            true => open += 1,
            false => misses += 1,
        }
        number += 1;
    }
    if open < size { walk_list(subject, number, visit) } else { Ok(()) }
}

/// Visits the numbers from `from` on, by the kernel's list.
fn walk_list(
    subject: &Subject,
    from: i32,
    visit: &mut dyn FnMut(i32) -> Result<bool, CaptureError>,
) -> Result<(), CaptureError> {
    let numbers = listed_from(subject, from).map_err(|e| failed(subject, "listing", e))?;
    numbers.into_iter().try_for_each(|number| visit(number).map(drop))
}

/// How many descriptors a process has, where the kernel says so by the size of `/proc/PID/fd`: since Linux 6.2.
pub(crate) fn count(process: HostPid) -> std::io::Result<Option<usize>> {
    static IS_TOLD: OnceLock<bool> = OnceLock::new();
    // We have some ourselves.
    let is_told = || std::fs::metadata("/proc/self/fd").is_ok_and(|listed| listed.len() > 0);
    let size = std::fs::metadata(process.proc("fd"))?.len() as usize;
    Ok(IS_TOLD.get_or_init(is_told).then_some(size))
}

/// A copy of a file of a process, if the number is in use.
fn copy(subject: &Subject, pidfd: &PidFd, number: i32) -> Result<Option<OwnedFd>, CaptureError> {
    match pidfd.get(number) {
        Ok(file) => Ok(Some(file)),
        Err(e) if e.raw_os_error() == Some(libc::EBADF) => Ok(None),
        Err(e) => Err(failed(subject, "copying", e)),
    }
}

fn failed(subject: &Subject, step: &'static str, source: std::io::Error) -> CaptureError {
    let object = || format!("the files of process {} ({})", subject.pod, subject.command);
    match source.raw_os_error() {
        Some(libc::ESRCH | libc::ENOENT) => CaptureError::Vanished(subject.pod),
        _ => CaptureError::Kernel { step, object: object(), source },
    }
}

/// The numbers from `from` on, by the kernel's list.
fn listed_from(subject: &Subject, from: i32) -> std::io::Result<Vec<i32>> {
    let mut numbers = Vec::new();
    for entry in std::fs::read_dir(subject.host.proc("fd"))? {
        let number = entry?.file_name().to_str().and_then(|n| n.parse().ok()).unwrap_or(-1);
        numbers.extend((number >= from).then_some(number));
    }
    numbers.sort_unstable();
    Ok(numbers)
}

/// Questions of a batch about the close-on-exec flags of descriptors.
#[derive(Clone, Debug)]
pub struct CloseOnExec(Vec<Call>);

/// Adds to `batch` the questions whether each of `descriptors` is closed by `execve`.
pub fn ask_close_on_exec(batch: &mut Batch, descriptors: &[DescriptorState]) -> CloseOnExec {
    let ask = |d: &DescriptorState| batch.attempt(libc::SYS_fcntl, [d.number.into(), libc::F_GETFD.into()]);
    CloseOnExec(descriptors.iter().map(ask).collect())
}

impl CloseOnExec {
    /// Enters the answers.
    pub fn fill(&self, results: &Results, descriptors: &mut [DescriptorState]) {
        for (call, descriptor) in self.0.iter().zip(descriptors) {
            let answer = results.get(*call);
            descriptor.close_on_exec = answer >= 0 && answer & i64::from(libc::FD_CLOEXEC) != 0;
        }
    }
}

/// The same from outside, by `/proc/PID/fdinfo`: slower, for a process in which no batch can run.
pub fn read_close_on_exec(subject: &Subject, descriptors: &mut [DescriptorState]) -> Result<(), CaptureError> {
    for descriptor in descriptors {
        let path = subject.host.proc(&format!("fdinfo/{}", descriptor.number));
        let info = crate::procfs::read_record_text(&path).capturing("reading", path.display())?;
        let flags = info.lines().find_map(|l| l.strip_prefix("flags:")).map(str::trim);
        let flags = flags.and_then(|f| i32::from_str_radix(f, 8).ok()).unwrap_or(0);
        descriptor.close_on_exec = flags & libc::O_CLOEXEC != 0;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use super::*;
    use crate::files::testing::{spec, subject};
    use crate::image::DataSink;
    use crate::look::Console;

    #[test]
    fn finds_far_numbers_and_shared_files() {
        let (from, to) = nix::unistd::pipe().unwrap();
        let far = nix::fcntl::fcntl(&from, nix::fcntl::FcntlArg::F_DUPFD_CLOEXEC(900)).unwrap();
        let (spec, mut sink, subject) = (spec(), DataSink::default(), subject());
        let pidfd = PidFd::open(subject.host).unwrap();
        let mut look = Look::new(&spec, subject.host, &mut sink, Console::None, false);
        let mut seen = Vec::new();
        // The files of the test's own process are anything; only the numbers are looked at.
        walk(&subject, &mut |number| {
            let copy = copy(&subject, &pidfd, number)?;
            seen.extend(copy.is_some().then_some(number));
            Ok(copy.is_some())
        })
        .unwrap();
        assert!([from.as_raw_fd(), to.as_raw_fd(), far].iter().all(|n| seen.contains(n)));
        let id = intern_file(&mut look, &subject, far, from.try_clone().unwrap()).unwrap();
        look.files.note(subject.host, far, id);
        assert_eq!(inherited(&look, &subject, far), Some(id));
        assert_eq!(inherited(&look, &subject, to.as_raw_fd()), None);
        nix::unistd::close(far).unwrap();
    }
}
