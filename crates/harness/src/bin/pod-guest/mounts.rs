//! Mounts that a pod's own processes make, which takes CAP_SYS_ADMIN.

use std::ffi::CString;
use std::io::{Read, Seek, Write};

use crate::stage::*;

pub(crate) const KINDS: &[crate::stage::Kind] = &[
    ("mounts-tmpfs", mounts_tmpfs),
    ("mounts-bind", mounts_bind),
    ("mounts-views", mounts_views),
    ("mounts-in-memory", mounts_in_memory),
    ("mounts-unbindable", mounts_unbindable),
    ("mounts-of-what-is-gone", mounts_of_what_is_gone),
    ("mounts-moved", mounts_moved),
];

pub(crate) fn mount(source: &str, target: &str, kind: &str, flags: libc::c_ulong, data: &str) -> Checked {
    let text = |text: &str| CString::new(text).map_err(|e| e.to_string());
    let (source, target, kind, data) = (text(source)?, text(target)?, text(kind)?, text(data)?);
    let made = unsafe { libc::mount(source.as_ptr(), target.as_ptr(), kind.as_ptr(), flags, data.as_ptr().cast()) };
    done("mount", made).map(drop)
}

pub(crate) fn directory(path: &str) -> Checked {
    std::fs::create_dir_all(path).map_err(|e| format!("{path}: {e}"))
}

/// Every mount, without the numbers that the host gives.
pub(crate) fn table() -> Result<Vec<String>, String> {
    let text = read("/proc/self/mountinfo")?;
    let line = |line: &str| {
        let (front, back) = line.split_once(" - ")?;
        let words: Vec<&str> = front.split(' ').skip(3).filter(|word| !word.starts_with("shared:")).collect();
        let back = if back.starts_with("overlay") { "overlay" } else { back };
        Some(format!("{} {} {back}", words.join(" "), front.contains("shared:")))
    };
    Ok(text.lines().filter_map(line).collect())
}

fn unchanged() -> Checked {
    let before = table()?;
    hold()?;
    let now = table()?;
    let differ = |a: &[String], b: &[String]| a.iter().filter(|line| !b.contains(line)).cloned().collect::<Vec<_>>();
    let (gone, new) = (differ(&before, &now), differ(&now, &before));
    check(gone.is_empty() && new.is_empty(), format!("mounts are gone: {gone:?}; and new: {new:?}"))?;
    equal("mounts", now.len(), before.len())
}

/// File systems in memory, with what is in them, on each other, and files that are open there.
fn mounts_tmpfs() -> Checked {
    directory("/mnt/one")?;
    mount("things", "/mnt/one", "tmpfs", libc::MS_NOSUID | libc::MS_NOEXEC, "size=1m,mode=750")?;
    write("/mnt/one/file", "contents")?;
    directory("/mnt/one/deep/inner")?;
    mount("inner", "/mnt/one/deep/inner", "tmpfs", 0, "")?;
    write("/mnt/one/deep/inner/file", "inside")?;
    mount("", "/mnt/one/deep/inner", "", libc::MS_SHARED, "")?;
    let text = |e: std::io::Error| e.to_string();
    let mut open = std::fs::File::options().read(true).append(true).open("/mnt/one/file").map_err(text)?;
    let options = std::fs::File::options().create(true).truncate(true).read(true).write(true).clone();
    let mut gone = options.open("/mnt/one/gone").map_err(text)?;
    gone.write_all(b"unlinked").map_err(text)?;
    std::fs::remove_file("/mnt/one/gone").map_err(text)?;
    std::env::set_current_dir("/mnt/one/deep").map_err(text)?;
    unchanged()?;
    equal("a file", read("/mnt/one/file")?, "contents".into())?;
    equal("a file inside", read("inner/file")?, "inside".into())?;
    open.write_all(b" more").map_err(text)?;
    equal("a file that is open", read("/mnt/one/file")?, "contents more".into())?;
    let mut left = String::new();
    gone.rewind().and_then(|()| gone.read_to_string(&mut left)).map_err(text)?;
    equal("a file without a name", left, "unlinked".into())?;
    check(std::fs::write("/mnt/one/large", vec![1; 2 << 20]).is_err(), "its size is not limited any more")
}

/// Directories and files shown elsewhere, some of which cannot be written to there.
fn mounts_bind() -> Checked {
    for path in ["/mnt/bin", "/mnt/own", "/mnt/memory", "/mnt/part"] {
        directory(path)?;
    }
    let text = |e: std::io::Error| e.to_string();
    mount("/usr/bin", "/mnt/bin", "", libc::MS_BIND, "")?;
    mount("", "/mnt/bin", "", libc::MS_BIND | libc::MS_REMOUNT | libc::MS_RDONLY | libc::MS_NODEV, "")?;
    directory("/srv/own")?;
    write("/srv/own/file", "own")?;
    mount("/srv/own", "/mnt/own", "", libc::MS_BIND, "")?;
    write("/mnt/name", "")?;
    mount("/etc/hostname", "/mnt/name", "", libc::MS_BIND, "")?;
    mount("memory", "/mnt/memory", "tmpfs", 0, "")?;
    directory("/mnt/memory/some")?;
    write("/mnt/memory/some/file", "some")?;
    mount("/mnt/memory/some", "/mnt/part", "", libc::MS_BIND, "")?;
    let program = std::fs::File::open("/mnt/bin/env").map_err(text)?;
    let own = std::fs::File::options().read(true).write(true).open("/mnt/own/file").map_err(text)?;
    let running = std::process::Command::new("/mnt/bin/sleep").arg("1000").spawn();
    let mut running = running.map_err(text)?;
    until("a program to start", || {
        std::fs::read_link(format!("/proc/{}/exe", running.id())).is_ok_and(|exe| exe.ends_with("sleep"))
    })?;
    until_asleep(running.id() as i32)?;
    unchanged()?;
    check(std::fs::write("/mnt/bin/new", "").is_err(), "it can be written to")?;
    write("/mnt/own/file", "changed")?;
    equal("what is shown elsewhere", read("/srv/own/file")?, "changed".into())?;
    equal("part of a file system", read("/mnt/part/file")?, "some".into())?;
    write("/mnt/part/file", "other")?;
    equal("the whole of it", read("/mnt/memory/some/file")?, "other".into())?;
    equal("a file on a file", read("/mnt/name")?, read("/etc/hostname")?)?;
    drop((program, own));
    running.kill().and_then(|()| running.wait()).map_err(text).map(drop)
}

/// What the kernel shows, and terminals and queues.
fn mounts_views() -> Checked {
    for kind in ["proc", "mqueue", "devpts"] {
        let path = format!("/mnt/{kind}");
        directory(&path)?;
        let data = if kind == "devpts" { "newinstance,ptmxmode=0666,mode=620" } else { "" };
        mount(kind, &path, kind, libc::MS_NOSUID | libc::MS_NOEXEC, data)?;
    }
    let open = std::fs::File::open("/mnt/proc/uptime").map_err(|e| e.to_string())?;
    unchanged()?;
    let mut text = String::new();
    (&open).read_to_string(&mut text).map_err(|e| e.to_string())?;
    check(!text.is_empty(), "nothing is shown")?;
    check(std::path::Path::new("/mnt/proc/self/stat").exists(), "processes are not shown")?;
    std::fs::File::open("/mnt/devpts/ptmx").map_err(|e| format!("a new terminal: {e}")).map(drop)
}

/// Mounts in the file systems in memory that every pod has, with something beneath them.
fn mounts_in_memory() -> Checked {
    for (under, place) in [("/tmp", "/tmp/one/deep"), ("/run", "/run/one/deep"), ("/dev/shm", "/dev/shm/one/deep")] {
        directory(place)?;
        write(format!("{place}/beneath"), under)?;
        mount("things", place, "tmpfs", 0, "")?;
        write(format!("{place}/on-top"), under)?;
    }
    write("/tmp/name", "a name")?;
    mount("/etc/hostname", "/tmp/name", "", libc::MS_BIND, "")?;
    unchanged()?;
    equal("a file on a file", read("/tmp/name")?, read("/etc/hostname")?)?;
    for (under, place) in [("/tmp", c"/tmp/one/deep"), ("/run", c"/run/one/deep"), ("/dev/shm", c"/dev/shm/one/deep")] {
        let shown = place.to_string_lossy();
        equal("what was on top", read(format!("{shown}/on-top"))?, under.into())?;
        done("umount", unsafe { libc::umount2(place.as_ptr(), 0) })?;
        equal("what was beneath", read(format!("{shown}/beneath"))?, under.into())?;
    }
    done("umount", unsafe { libc::umount2(c"/tmp/name".as_ptr(), 0) })?;
    equal("the file beneath", read("/tmp/name")?, "a name".into())
}

/// A file system in memory that cannot be shown elsewhere.
fn mounts_unbindable() -> Checked {
    directory("/mnt/alone")?;
    directory("/mnt/elsewhere")?;
    mount("alone", "/mnt/alone", "tmpfs", 0, "")?;
    mount("", "/mnt/alone", "", libc::MS_UNBINDABLE, "")?;
    write("/mnt/alone/file", "contents")?;
    unchanged()?;
    equal("a file", read("/mnt/alone/file")?, "contents".into())?;
    check(mount("/mnt/alone", "/mnt/elsewhere", "", libc::MS_BIND, "").is_err(), "it can be shown elsewhere")
}

/// A directory that is shown elsewhere, and was removed.
fn mounts_of_what_is_gone() -> Checked {
    directory("/mnt/memory")?;
    directory("/mnt/shown")?;
    mount("memory", "/mnt/memory", "tmpfs", 0, "")?;
    directory("/mnt/memory/gone")?;
    mount("/mnt/memory/gone", "/mnt/shown", "", libc::MS_BIND, "")?;
    std::fs::remove_dir("/mnt/memory/gone").map_err(|e| e.to_string())?;
    hold_loosely()
}

/// What a pod was born with is taken away.
fn mounts_moved() -> Checked {
    done("umount", unsafe { libc::umount2(c"/run".as_ptr(), libc::MNT_DETACH) })?;
    hold_loosely()
}
