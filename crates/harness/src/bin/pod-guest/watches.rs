//! Those who watch files: inotify.

use std::ffi::CString;
use std::fs;

use crate::stage::*;

pub(crate) const KINDS: &[crate::stage::Kind] = &[
    ("inotify", inotify),
    ("inotify-renamed", inotify_renamed),
    ("inotify-nameless", inotify_nameless),
    ("inotify-shared", inotify_shared),
    ("inotify-unread", inotify_unread),
    ("inotify-many", inotify_many),
];

/// What an event says: watch descriptor, mask, cookie, name.
type Event = (i32, u32, u32, String);

fn instance() -> Result<i32, String> {
    done("inotify_init1", unsafe { libc::inotify_init1(libc::IN_NONBLOCK) }).map(|file| file as i32)
}

fn watch(file: i32, path: &str, mask: u32) -> Result<i32, String> {
    let name = CString::new(path).map_err(|e| e.to_string())?;
    done(path, unsafe { libc::inotify_add_watch(file, name.as_ptr(), mask) }).map(|wd| wd as i32)
}

fn unwatch(file: i32, wd: i32) -> Checked {
    done("inotify_rm_watch", unsafe { libc::inotify_rm_watch(file, wd) }).map(drop)
}

/// Every event that is there.
fn events(file: i32) -> Vec<Event> {
    let mut found = Vec::new();
    let mut buffer = [0u8; 1 << 16];
    loop {
        let length = unsafe { libc::read(file, buffer.as_mut_ptr().cast(), buffer.len()) };
        if length <= 0 {
            return found;
        }
        let mut rest = &buffer[..length as usize];
        while rest.len() >= 16 {
            let word = |at: usize| u32::from_ne_bytes([rest[at], rest[at + 1], rest[at + 2], rest[at + 3]]);
            let end = 16 + word(12) as usize;
            let name = String::from_utf8_lossy(&rest[16..end]).trim_end_matches('\0').to_owned();
            found.push((word(0) as i32, word(4), word(8), name));
            rest = &rest[end..];
        }
    }
}

/// The watches as `fdinfo` has them: descriptor and mask, in order.
fn shown(file: i32) -> Result<Vec<(i32, u32)>, String> {
    let info = read(format!("/proc/self/fdinfo/{file}"))?;
    let field = |line: &str, label: &str| {
        let value = line.split_once(label)?.1.split_whitespace().next()?;
        u32::from_str_radix(value, 16).ok()
    };
    let lines = info.lines().filter(|line| line.starts_with("inotify"));
    let mut all: Vec<_> = lines.filter_map(|l| Some((field(l, "wd:")? as i32, field(l, " mask:")?))).collect();
    all.sort_unstable();
    Ok(all)
}

pub(crate) fn make(path: &str) -> Checked {
    fs::create_dir_all(path).map_err(|e| format!("{path}: {e}"))
}

fn rename(from: &str, to: &str) -> Checked {
    fs::rename(from, to).map_err(|e| format!("{from}: {e}"))
}

fn event(wd: i32, mask: u32, name: &str) -> Event {
    (wd, mask, 0, name.into())
}

/// Watches of every kind of place, with gaps between their numbers.
fn inotify() -> Checked {
    let file = instance()?;
    make("/tmp/seen")?;
    make("/var/tmp/seen/inner")?;
    write("/var/tmp/seen/file", "1")?;
    let tmpfs = watch(file, "/tmp/seen", libc::IN_CREATE | libc::IN_EXCL_UNLINK)?;
    let lower = watch(file, "/usr/share", libc::IN_CREATE | libc::IN_MOVED_TO)?;
    for _ in 0..1000 {
        unwatch(file, watch(file, "/etc", libc::IN_CREATE)?)?;
    }
    let upper = watch(file, "/var/tmp/seen", libc::IN_ALL_EVENTS)?;
    let once = watch(file, "/var/tmp/seen/file", libc::IN_MODIFY | libc::IN_ONESHOT)?;
    watch(file, "/etc/passwd", libc::IN_MODIFY)?;
    watch(file, "/dev/pts", libc::IN_CREATE)?;
    watch(file, "/dev/shm", libc::IN_CREATE)?;
    watch(file, "/", libc::IN_CREATE)?;
    // Through a link, and the link itself.
    std::os::unix::fs::symlink("/tmp/seen", "/var/tmp/seen/link").map_err(|e| e.to_string())?;
    equal("a watch through a link", watch(file, "/var/tmp/seen/link", libc::IN_DELETE | libc::IN_MASK_ADD)?, tmpfs)?;
    let link = watch(file, "/var/tmp/seen/link", libc::IN_DELETE_SELF | libc::IN_DONT_FOLLOW)?;
    events(file);
    let before = shown(file)?;
    equal("watches", before.len(), 9)?;
    hold()?;
    equal("watches", shown(file)?, before.clone())?;
    equal("events", events(file), Vec::new())?;
    write("/tmp/seen/new", "")?;
    write("/usr/share/new", "")?;
    write("/var/tmp/seen/file", "22")?;
    fs::remove_file("/tmp/seen/new").map_err(|e| e.to_string())?;
    fs::remove_file("/var/tmp/seen/link").map_err(|e| e.to_string())?;
    let told = events(file);
    let expected = [
        event(tmpfs, libc::IN_CREATE, "new"),
        event(lower, libc::IN_CREATE, "new"),
        event(upper, libc::IN_MODIFY, "file"),
        event(once, libc::IN_MODIFY, ""),
        event(once, libc::IN_IGNORED, ""),
        event(tmpfs, libc::IN_DELETE, "new"),
        event(link, libc::IN_DELETE_SELF, ""),
        event(upper, libc::IN_DELETE, "link"),
    ];
    expected.iter().try_for_each(|event| check(told.contains(event), format!("no {event:?} in {told:?}")))?;
    let next = watch(file, "/var/tmp/seen/inner", libc::IN_CREATE)?;
    check(before.iter().all(|(wd, _)| *wd < next), "a number that was in use is given again")
}

/// What was renamed after it was watched: in the upper layer, a directory of the lower one, a file of the lower one.
fn inotify_renamed() -> Checked {
    let file = instance()?;
    make("/var/tmp/a/b")?;
    make("/var/tmp/c")?;
    write("/var/tmp/a/b/f", "")?;
    let moved = watch(file, "/var/tmp/a/b", libc::IN_CREATE)?;
    let renamed = watch(file, "/var/tmp/a/b/f", libc::IN_ATTRIB)?;
    let below = watch(file, "/usr/share/doc/bash", libc::IN_CREATE)?;
    let doc = watch(file, "/usr/share/doc", libc::IN_CREATE)?;
    let copied = watch(file, "/etc/fstab", libc::IN_ATTRIB)?;
    rename("/var/tmp/a/b", "/var/tmp/c/d")?;
    rename("/var/tmp/c/d/f", "/var/tmp/g")?;
    rename("/usr/share/doc", "/usr/share/docs")?;
    rename("/etc/fstab", "/var/tmp/c/fstab")?;
    events(file);
    let before = shown(file)?;
    hold()?;
    equal("watches", shown(file)?, before)?;
    let allow = |path: &str| fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o600));
    write("/var/tmp/c/d/new", "")?;
    allow("/var/tmp/g").map_err(|e| e.to_string())?;
    write("/usr/share/docs/bash/new", "")?;
    write("/usr/share/docs/new", "")?;
    allow("/var/tmp/c/fstab").map_err(|e| e.to_string())?;
    let expected = [
        event(moved, libc::IN_CREATE, "new"),
        event(renamed, libc::IN_ATTRIB, ""),
        event(below, libc::IN_CREATE, "new"),
        event(doc, libc::IN_CREATE, "new"),
        event(copied, libc::IN_ATTRIB, ""),
    ];
    equal("events", events(file), expected.to_vec())
}

/// Files that have no name any more, but are open.
fn inotify_nameless() -> Checked {
    let file = instance()?;
    make("/var/tmp/gone")?;
    write("/tmp/gone", "1")?;
    write("/var/tmp/file", "1")?;
    let open = |path: &str| fs::File::options().read(true).write(true).open(path).map_err(|e| format!("{path}: {e}"));
    let (on_tmpfs, on_overlay) = (open("/tmp/gone")?, open("/var/tmp/file")?);
    let directory = fs::File::open("/var/tmp/gone").map_err(|e| e.to_string())?;
    let wds = [
        watch(file, "/tmp/gone", libc::IN_MODIFY)?,
        watch(file, "/var/tmp/file", libc::IN_MODIFY)?,
        watch(file, "/var/tmp/gone", libc::IN_ATTRIB)?,
    ];
    fs::remove_file("/tmp/gone").and_then(|()| fs::remove_file("/var/tmp/file")).map_err(|e| e.to_string())?;
    fs::remove_dir("/var/tmp/gone").map_err(|e| e.to_string())?;
    events(file);
    let before = shown(file)?;
    hold()?;
    equal("watches", shown(file)?, before)?;
    use std::os::unix::fs::FileExt;
    on_tmpfs.write_at(b"2", 0).and_then(|_| on_overlay.write_at(b"2", 0)).map_err(|e| e.to_string())?;
    let told = events(file);
    equal("events", told, vec![event(wds[0], libc::IN_MODIFY, ""), event(wds[1], libc::IN_MODIFY, "")])?;
    drop((on_tmpfs, on_overlay, directory));
    let told = events(file);
    let ignored = told.iter().filter(|(_, mask, ..)| *mask == libc::IN_IGNORED).count();
    equal("watches that ended", ignored, 3)
}

/// One instance of two processes, and a watch that is another's too; an epoll waits for it.
fn inotify_shared() -> Checked {
    let (file, other) = (instance()?, instance()?);
    let epoll = done("epoll_create1", unsafe { libc::epoll_create1(0) })? as i32;
    let mut wanted = libc::epoll_event { events: libc::EPOLLIN as u32, u64: 7 };
    done("epoll_ctl", unsafe { libc::epoll_ctl(epoll, libc::EPOLL_CTL_ADD, file, &raw mut wanted) })?;
    make("/tmp/seen")?;
    let (wd, same) = (watch(file, "/tmp/seen", libc::IN_CREATE)?, watch(other, "/tmp/seen", libc::IN_DELETE)?);
    let (done_here, set_up) = (Gate::new()?, Gate::new()?);
    let child = fork(|| {
        set_up.open()?;
        await_go();
        done_here.pass(1)?;
        equal("events of both", events(file), vec![event(wd, libc::IN_CREATE, "new")])
    })?;
    set_up.pass(1)?;
    hold()?;
    let mut ready = libc::epoll_event { events: 0, u64: 0 };
    equal("ready ones", unsafe { libc::epoll_wait(epoll, &raw mut ready, 1, 0) }, 0)?;
    write("/tmp/seen/new", "")?;
    equal("ready ones", unsafe { libc::epoll_wait(epoll, &raw mut ready, 1, 0) }, 1)?;
    done_here.open()?;
    reap(child)?;
    fs::remove_file("/tmp/seen/new").map_err(|e| e.to_string())?;
    equal("events of the other", events(other), vec![event(same, libc::IN_DELETE, "new")])
}

/// Unread events are there, or one that says that events were lost; and then those that come.
fn inotify_unread() -> Checked {
    let file = instance()?;
    make("/tmp/seen")?;
    let wd = watch(file, "/tmp/seen", libc::IN_CREATE)?;
    write("/tmp/seen/unread", "")?;
    hold()?;
    write("/tmp/seen/new", "")?;
    let told = events(file);
    let lost = event(-1, libc::IN_Q_OVERFLOW, "");
    let first = told.first().cloned().unwrap_or_default();
    check(first == event(wd, libc::IN_CREATE, "unread") || first == lost, format!("{first:?} comes first"))?;
    equal("other events", &told[1..], &[event(wd, libc::IN_CREATE, "new")])?;
    equal("the next watch", watch(file, "/var/tmp", libc::IN_CREATE)?, wd + 1)
}

/// As many watches as a desktop has, of directories of the lower layer.
fn inotify_many() -> Checked {
    let file = instance()?;
    let mut watched = Vec::new();
    for entry in fs::read_dir("/usr/share/doc").map_err(|e| e.to_string())?.flatten().take(2000) {
        let path = entry.path().to_string_lossy().into_owned();
        watched.push((watch(file, &path, libc::IN_CREATE | libc::IN_ATTRIB)?, path));
    }
    let before = shown(file)?;
    hold()?;
    equal("watches", shown(file)?, before)?;
    for (wd, path) in watched.iter().step_by(100).filter(|(_, path)| fs::metadata(path).is_ok_and(|m| m.is_dir())) {
        write(format!("{path}/new"), "")?;
        equal("events", events(file), vec![event(*wd, libc::IN_CREATE, "new")])?;
    }
    Ok(())
}
