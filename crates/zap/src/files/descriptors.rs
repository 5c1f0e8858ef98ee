//! The descriptor table of a process: which number leads to which open file description.

use std::os::fd::OwnedFd;

use serde::{Deserialize, Serialize};

use super::{describe, intern_file, kind_of, regular};
use crate::error::{CaptureError, Context};
use crate::ids::FileId;
use crate::look::{Look, Subject};
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
    for (number, file) in copies(subject, pidfd)? {
        let file = intern_file(look, subject, number, file)?;
        look.files.note(subject.host, number, file);
        found.push(DescriptorState { number, file, close_on_exec: false });
    }
    Ok(found)
}

/// Looks, while the pod runs, at every file of a process: refuses what cannot be captured, and does ahead what the hold
/// would be long for. The process may close files or end meanwhile.
pub fn check_all(look: &mut Look<'_>, subject: &Subject, pidfd: &PidFd) -> Result<(), CaptureError> {
    let copies = match copies(subject, pidfd) {
        Err(CaptureError::Vanished(_)) => return Ok(()),
        other => other?,
    };
    for (number, file) in copies {
        let descriptor = describe(subject, number, file)?;
        let kind = kind_of(&descriptor)?;
        kind.check(&descriptor)?;
        if kind.name() == "regular" {
            regular::look_ahead(look, &descriptor)?;
        }
    }
    Ok(())
}

/// Copies of every file of a process. The numbers of a table are nearly always dense, and its size is known: asking for
/// number after number costs a twentieth of listing `/proc/PID/fd`.
fn copies(subject: &Subject, pidfd: &PidFd) -> Result<Vec<(i32, OwnedFd)>, CaptureError> {
    let listed = std::fs::metadata(subject.host.proc("fd"));
    let size = listed.map_err(|e| failed(subject, "counting", e))?.len() as usize;
    let mut copies = Vec::with_capacity(size);
    let (mut number, mut misses) = (0, 0);
    while copies.len() < size && misses < MISSES {
        match pidfd.get(number) {
            Ok(file) => copies.push((number, file)),
            Err(e) if e.raw_os_error() == Some(libc::EBADF) => misses += 1,
            Err(e) => return Err(failed(subject, "copying", e)),
        }
        number += 1;
    }
    if copies.len() < size {
        rest(subject, pidfd, number, &mut copies).map_err(|e| failed(subject, "listing", e))?;
    }
    Ok(copies)
}

fn failed(subject: &Subject, step: &'static str, source: std::io::Error) -> CaptureError {
    match source.raw_os_error() {
        Some(libc::ESRCH | libc::ENOENT) => CaptureError::Vanished(subject.pod),
        _ => CaptureError::Kernel {
            step,
            object: format!("the files of process {} ({})", subject.pod, subject.command),
            source,
        },
    }
}

/// The files from number `from` on, by the kernel's list.
fn rest(subject: &Subject, pidfd: &PidFd, from: i32, copies: &mut Vec<(i32, OwnedFd)>) -> std::io::Result<()> {
    let mut numbers = Vec::new();
    for entry in std::fs::read_dir(subject.host.proc("fd"))? {
        let number = entry?.file_name().to_str().and_then(|n| n.parse().ok()).unwrap_or(-1);
        numbers.extend((number >= from).then_some(number));
    }
    numbers.sort_unstable();
    for number in numbers {
        match pidfd.get(number) {
            Ok(file) => copies.push((number, file)),
            // Closed since the list was made: the process runs.
            Err(e) if e.raw_os_error() == Some(libc::EBADF) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
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
        let info = std::fs::read_to_string(&path).capturing("reading", path.display())?;
        let flags = info.lines().find_map(|l| l.strip_prefix("flags:")).map(str::trim);
        let flags = flags.and_then(|f| i32::from_str_radix(f, 8).ok()).unwrap_or(0);
        descriptor.close_on_exec = flags & libc::O_CLOEXEC != 0;
    }
    Ok(())
}
