//! Ctrl-C as something to read.

use std::fs::File;
use std::io;
use std::os::fd::{IntoRawFd, RawFd};
use std::sync::atomic::{AtomicI32, Ordering};

use nix::fcntl::OFlag;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

static PIPE: AtomicI32 = AtomicI32::new(-1);

/// A file that has a byte to read, the signal's number, for each SIGINT, SIGTERM or SIGHUP of this process from now on.
///
/// A handler, not a blocked mask with `sigwait`: a mask would be inherited by every command that is spawned.
pub fn interrupts() -> io::Result<File> {
    let (reader, writer) = nix::unistd::pipe2(OFlag::O_CLOEXEC)?;
    let writer: RawFd = writer.into_raw_fd();
    PIPE.store(writer, Ordering::SeqCst);
    let action = SigAction::new(SigHandler::Handler(note), SaFlags::SA_RESTART, SigSet::empty());
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        // SAFETY: the handler calls only `write`, which is async-signal-safe, on a descriptor that is never closed.
        unsafe { sigaction(signal, &action) }?;
    }
    Ok(File::from(reader))
}

extern "C" fn note(signal: libc::c_int) {
    let byte = signal as u8;
    // SAFETY: one byte of this frame is written to a pipe of ours; a full pipe or an error changes nothing.
    unsafe { libc::write(PIPE.load(Ordering::SeqCst), (&raw const byte).cast(), 1) };
}
