//! Those who are told what happens to files: fanotify.

use std::ffi::CString;
use std::fs;
use std::os::fd::{FromRawFd, OwnedFd};

use crate::stage::*;
use crate::watches::make;

pub(crate) const KINDS: &[crate::stage::Kind] = &[
    ("fanotify", marks),
    ("fanotify-handles", handles),
    ("fanotify-user", handles),
    ("fanotify-unread", unread),
    ("fanotify-unread-handles", unread_handles),
    ("fanotify-unread-endless", unread_endless),
    ("fanotify-asked", asked),
];

const NAMES: u32 = libc::FAN_REPORT_DIR_FID | libc::FAN_REPORT_NAME;
const CHILDREN: u64 = libc::FAN_EVENT_ON_CHILD | libc::FAN_ONDIR;

fn group(kind: u32) -> Result<i32, String> {
    let flags = u64::from(kind | libc::FAN_NONBLOCK | libc::FAN_CLOEXEC);
    Ok(call("fanotify_init", libc::SYS_fanotify_init, [flags, libc::O_LARGEFILE as u64])? as i32)
}

fn mark(group: i32, flags: u32, mask: u64, path: &str) -> Checked {
    let name = CString::new(path).map_err(|e| e.to_string())?;
    let args = [group as u64, u64::from(flags), mask, libc::AT_FDCWD as u64, name.as_ptr() as u64];
    call(path, libc::SYS_fanotify_mark, args).map(drop)
}

/// Every event that is there: its mask, and the path of its file or the name in its directory.
fn events(group: i32) -> Result<Vec<(u64, String)>, String> {
    let mut found = Vec::new();
    let mut buffer = [0u8; 1 << 14];
    loop {
        let length = unsafe { libc::read(group, buffer.as_mut_ptr().cast(), buffer.len()) };
        if length <= 0 {
            return Ok(found);
        }
        let mut rest = &buffer[..length as usize];
        while rest.len() >= 24 {
            let word = |at: usize| u32::from_ne_bytes([rest[at], rest[at + 1], rest[at + 2], rest[at + 3]]);
            let (all, head) = (word(0) as usize, usize::from(rest[6]));
            let mask = u64::from(word(8)) | u64::from(word(12)) << 32;
            let of = match word(16) as i32 {
                number if number >= 0 => {
                    let _file = unsafe { OwnedFd::from_raw_fd(number) };
                    let path = fs::read_link(format!("/proc/self/fd/{number}")).map_err(|e| e.to_string())?;
                    path.to_string_lossy().into_owned()
                }
                // A record of a handle on a directory, with a name behind it: its head, the file system, the handle.
                _ if all >= head + 20 => {
                    let name = head + 20 + word(head + 12) as usize;
                    String::from_utf8_lossy(rest.get(name..all).unwrap_or_default()).trim_end_matches('\0').to_owned()
                }
                _ => String::new(),
            };
            found.push((mask, of));
            rest = &rest[all..];
        }
    }
}

/// Marks as `fdinfo` has them: what kind of object, flags, events, ignored events.
fn shown(group: i32) -> Result<Vec<String>, String> {
    let info = read(format!("/proc/self/fdinfo/{group}"))?;
    let steady = |line: &str| {
        let words = line.split_whitespace();
        let kept = words.filter(|word| !["ino:", "sdev:", "mnt_id:", "f_handle:"].iter().any(|n| word.starts_with(n)));
        kept.collect::<Vec<_>>().join(" ") + if line.contains("mnt_id:") { " of a mount" } else { "" }
    };
    let mut lines: Vec<String> = info.lines().filter(|line| line.starts_with("fanotify")).map(steady).collect();
    lines.sort_unstable();
    Ok(lines)
}

/// Marks of files, directories, a mount and a file system; some things are ignored.
fn marks() -> Checked {
    let group = group(libc::FAN_CLASS_NOTIF)?;
    make("/var/tmp/seen/quiet")?;
    write("/var/tmp/seen/file", "x")?;
    write("/var/tmp/seen/ignored", "x")?;
    mark(group, libc::FAN_MARK_ADD, libc::FAN_CLOSE_WRITE | CHILDREN, "/var/tmp/seen")?;
    mark(group, libc::FAN_MARK_ADD, libc::FAN_OPEN, "/var/tmp/seen/file")?;
    let ignore = libc::FAN_MARK_ADD | libc::FAN_MARK_IGNORED_MASK | libc::FAN_MARK_IGNORED_SURV_MODIFY;
    mark(group, ignore, libc::FAN_CLOSE_WRITE, "/var/tmp/seen/ignored")?;
    mark(group, libc::FAN_MARK_ADD | libc::FAN_MARK_MOUNT, libc::FAN_CLOSE_WRITE, "/dev/shm")?;
    mark(group, libc::FAN_MARK_ADD | libc::FAN_MARK_FILESYSTEM, libc::FAN_MODIFY, "/run")?;
    let before = shown(group)?;
    equal("lines of fdinfo", before.len(), 6)?;
    hold()?;
    equal("marks", shown(group)?, before)?;
    equal("events before any", events(group)?, vec![])?;
    write("/var/tmp/seen/new", "")?;
    write("/var/tmp/seen/ignored", "y")?;
    read("/var/tmp/seen/file")?;
    write("/dev/shm/here", "")?;
    write("/run/there", "z")?;
    let told = |mask: u64, path: &str| (mask, path.to_owned());
    equal(
        "events",
        events(group)?,
        vec![
            told(libc::FAN_CLOSE_WRITE, "/var/tmp/seen/new"),
            told(libc::FAN_OPEN, "/var/tmp/seen/file"),
            told(libc::FAN_CLOSE_WRITE, "/dev/shm/here"),
            told(libc::FAN_MODIFY, "/run/there"),
        ],
    )?;
    // They are its own, by name: each can be removed.
    mark(group, libc::FAN_MARK_REMOVE | libc::FAN_MARK_MOUNT, libc::FAN_CLOSE_WRITE, "/dev/shm")?;
    mark(group, libc::FAN_MARK_REMOVE, libc::FAN_OPEN, "/var/tmp/seen/file")?;
    equal("fewer lines", shown(group)?.len(), 4)
}

/// A group whose events name files in directories.
fn handles() -> Checked {
    let group = group(NAMES)?;
    make("/var/tmp/seen")?;
    mark(group, libc::FAN_MARK_ADD, libc::FAN_CREATE | libc::FAN_DELETE | CHILDREN, "/var/tmp/seen")?;
    let before = shown(group)?;
    hold()?;
    equal("marks", shown(group)?, before)?;
    let told = |mask: u64, name: &str| vec![(mask, name.to_owned())];
    write("/var/tmp/seen/new", "")?;
    equal("events", events(group)?, told(libc::FAN_CREATE, "new"))?;
    fs::remove_file("/var/tmp/seen/new").map_err(|e| e.to_string())?;
    equal("events", events(group)?, told(libc::FAN_DELETE, "new"))?;
    make("/var/tmp/seen/directory")?;
    equal("events", events(group)?, told(libc::FAN_CREATE | libc::FAN_ONDIR, "directory"))
}

/// Unread events are there, or one that says that events were lost; and then those that come.
fn lost_at_most(kind: u32, mask: u64, shown: impl Fn(&str) -> String) -> Checked {
    let group = group(kind)?;
    make("/var/tmp/seen")?;
    mark(group, libc::FAN_MARK_ADD, mask | libc::FAN_EVENT_ON_CHILD, "/var/tmp/seen")?;
    write("/var/tmp/seen/unread", "")?;
    hold()?;
    write("/var/tmp/seen/new", "")?;
    let told = events(group)?;
    let first = told.first().cloned().unwrap_or_default();
    let is_lost = first.0 == libc::FAN_Q_OVERFLOW;
    check(is_lost || first == (mask, shown("unread")), format!("{first:?} comes first"))?;
    equal("other events", &told[1..], &[(mask, shown("new"))])
}

/// Of files.
fn unread() -> Checked {
    lost_at_most(libc::FAN_CLASS_NOTIF, libc::FAN_CLOSE_WRITE, |name| format!("/var/tmp/seen/{name}"))
}

/// Of names.
fn unread_handles() -> Checked {
    lost_at_most(NAMES, libc::FAN_CREATE, str::to_owned)
}

/// Events that were not read, in a queue that loses none.
fn unread_endless() -> Checked {
    let group = group(libc::FAN_UNLIMITED_QUEUE)?;
    make("/var/tmp/seen")?;
    mark(group, libc::FAN_MARK_ADD, libc::FAN_CLOSE_WRITE | CHILDREN, "/var/tmp/seen")?;
    write("/var/tmp/seen/unread", "")?;
    hold_loosely()?;
    equal("events", events(group)?, vec![(libc::FAN_CLOSE_WRITE, "/var/tmp/seen/unread".to_owned())])
}

/// A program that allows or forbids that files are opened.
fn asked() -> Checked {
    let group = group(libc::FAN_CLASS_CONTENT)?;
    write("/var/tmp/guarded", "x")?;
    mark(group, libc::FAN_MARK_ADD, libc::FAN_OPEN_PERM, "/var/tmp/guarded")?;
    hold_loosely()?;
    equal("lines of fdinfo", shown(group)?.len(), 2)
}
