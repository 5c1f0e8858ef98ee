//! Asynchronous input and output.

use crate::stage::*;

pub(crate) const KINDS: &[crate::stage::Kind] =
    &[("asynchronous-io", asynchronous_io), ("asynchronous-io-waits", asynchronous_io_waits)];

/// Contexts of asynchronous input and output that wait for nothing.
fn asynchronous_io() -> Checked {
    let mut contexts = [0u64; 2];
    call("io_setup", libc::SYS_io_setup, [10, &raw mut contexts[0] as u64])?;
    call("io_setup", libc::SYS_io_setup, [1000, &raw mut contexts[1] as u64])?;
    let file = std::fs::OpenOptions::new().read(true).write(true).create(true).truncate(true).open("/tmp/file");
    let file = file.map_err(|e| e.to_string())?;
    let used = [submit(contexts[0], &file, b"first", 0, 1)?, submit(contexts[1], &file, b"second", 5, 2)?];
    equal("submitted", used, [1, 1])?;
    equal("an event", reaped(contexts[0], 8)?, vec![(1, 5)])?;
    equal("an event", reaped(contexts[1], 8)?, vec![(2, 6)])?;
    // Unread.
    submit(contexts[1], &file, b"third", 11, 3)?;
    submit(contexts[1], &file, b"fourth", 16, 4)?;
    hold()?;
    equal("unread events", reaped(contexts[1], 8)?, vec![(3, 5), (4, 6)])?;
    for round in 0..2000 {
        for context in contexts {
            submit(context, &file, b"again", 0, round)?;
            equal("an event", reaped(context, 1)?, vec![(round, 5)])?;
        }
    }
    for context in contexts {
        call("io_destroy", libc::SYS_io_destroy, [context])?;
    }
    Ok(())
}

/// A context with a request that waits until something can be read from a pipe (`IOCB_CMD_POLL`).
fn asynchronous_io_waits() -> Checked {
    let mut contexts = [0u64; 2];
    call("io_setup", libc::SYS_io_setup, [10, &raw mut contexts[0] as u64])?;
    call("io_setup", libc::SYS_io_setup, [1000, &raw mut contexts[1] as u64])?;
    let mut ends = [0; 2];
    done("pipe", unsafe { libc::pipe(ends.as_mut_ptr()) })?;
    let (poll, readable) = (5, libc::POLLIN as u64);
    equal("submitted", ask(contexts[1], [7, 0, poll | (ends[0] as u64) << 32, readable, 0, 0, 0, 0])?, 1)?;
    hold()?;
    done("write", unsafe { libc::write(ends[1], c"x".as_ptr().cast(), 1) } as i64)?;
    equal("an event", reaped(contexts[1], 8)?, vec![(7, (libc::POLLIN | libc::POLLRDNORM).into())])
}

fn submit(context: u64, file: &std::fs::File, bytes: &[u8], offset: u64, data: u64) -> Result<i64, String> {
    use std::os::fd::AsRawFd;
    // Written to: operation 1.
    let control =
        [data, 0, 1 | (file.as_raw_fd() as u64) << 32, bytes.as_ptr() as u64, bytes.len() as u64, offset, 0, 0];
    ask(context, control)
}

fn ask(context: u64, control: [u64; 8]) -> Result<i64, String> {
    let list = [&raw const control as u64];
    call("io_submit", libc::SYS_io_submit, [context, 1, &raw const list as u64])
}

fn reaped(context: u64, most: u64) -> Result<Vec<(u64, i64)>, String> {
    let mut events = [[0u64; 4]; 8];
    let none = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    let args = [context, 0, most, events.as_mut_ptr() as u64, &raw const none as u64];
    let count = call("io_getevents", libc::SYS_io_getevents, args)?;
    Ok(events[..count as usize].iter().map(|event| (event[0], event[2] as i64)).collect())
}
