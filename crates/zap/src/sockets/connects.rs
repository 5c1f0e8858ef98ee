//! Threads that are in `connect(2)`, which the hold interrupted when the connection was there already.

use super::tcp::{Form, TcpState};
use crate::files::FileState;
use crate::ids::FileId;
use crate::image::decode;
use crate::process::state::ProcessState;
use crate::sys::ptrace::{registers_from_words, registers_to_words};
use crate::tracee::interrupted;

/// Has the call return in threads of an image that wait for connections which are there. The kernel, which makes it again by
/// itself, knows that nobody was told yet; of a rebuilt socket it takes for granted that somebody was (EISCONN).
pub(crate) fn end(processes: &mut [ProcessState], files: &[FileState]) {
    for process in processes {
        for thread in &mut process.threads {
            let registers = registers_from_words(&thread.registers);
            let Some((number, returned)) = interrupted::connecting(&registers) else { continue };
            let file = process.descriptors.iter().find(|descriptor| descriptor.number == number);
            if file.is_some_and(|descriptor| is_connected(files, descriptor.file)) {
                thread.registers = registers_to_words(&returned);
            }
        }
    }
}

fn is_connected(files: &[FileState], id: FileId) -> bool {
    let state = files.iter().find(|file| file.id == id && file.kind == "tcp");
    let state = state.and_then(|file| decode::<TcpState>(&file.state).ok());
    state.is_some_and(|state| matches!(state.form, Form::Connected(_)))
}
