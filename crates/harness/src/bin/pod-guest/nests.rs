//! Mount namespaces that a pod's own processes make.

use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};

use crate::mounts::{directory, mount, table};
use crate::namespaces::{become_ordinary, become_root, unshare};
use crate::stage::*;

pub(crate) const KINDS: &[crate::stage::Kind] = &[
    ("mounts-namespace", mounts_namespace),
    ("mounts-namespace-copied", mounts_namespace_copied),
    ("namespace-of-mounts", namespace_of_mounts),
    ("namespace-of-mounts-data", namespace_of_mounts_data),
    ("namespace-of-mounts-data-alone", namespace_of_mounts_data_alone),
    ("namespace-of-mounts-pivoted", namespace_of_mounts_pivoted),
    ("namespace-of-mounts-overlay", namespace_of_mounts_overlay),
];

pub(crate) fn text(error: std::io::Error) -> String {
    error.to_string()
}

pub(crate) fn private() -> Checked {
    mount("", "/", "", libc::MS_REC | libc::MS_PRIVATE, "")
}

/// A child elsewhere, which checks there that the mounts are what they were.
pub(crate) fn elsewhere<T>(
    go_there: impl FnOnce() -> Result<T, String>,
    afterwards: impl FnOnce(T) -> Checked,
) -> Checked {
    let set_up = Gate::new()?;
    let child = fork(|| {
        let things = go_there()?;
        let before = table()?;
        set_up.open()?;
        // What was opened is all that is left of where the driver's word appears.
        await_go();
        same(&before, &table()?)?;
        afterwards(things)
    })?;
    set_up.pass(1)?;
    let home = table()?;
    hold()?;
    same(&home, &table()?)?;
    reap(child)
}

/// The order in which mounts are listed says nothing.
pub(crate) fn same(before: &[String], now: &[String]) -> Checked {
    let differ = |a: &[String], b: &[String]| a.iter().filter(|line| !b.contains(line)).cloned().collect::<Vec<_>>();
    let (gone, new) = (differ(before, now), differ(now, before));
    check(gone.is_empty() && new.is_empty(), format!("mounts are gone: {gone:?}; and new: {new:?}"))?;
    equal("mounts", now.len(), before.len())
}

/// Files of a file system in memory: one that grows, one without a name.
struct Open {
    grows: File,
    gone: File,
}

impl Open {
    fn at(path: &str) -> Result<Open, String> {
        write(format!("{path}/file"), "contents")?;
        let grows = File::options().read(true).append(true).open(format!("{path}/file")).map_err(text)?;
        let mut options = File::options();
        options.create(true).truncate(true).read(true).write(true);
        let mut gone = options.open(format!("{path}/gone")).map_err(text)?;
        gone.write_all(b"unlinked").map_err(text)?;
        std::fs::remove_file(format!("{path}/gone")).map_err(text)?;
        Ok(Open { grows, gone })
    }

    fn check(&mut self, path: &str) -> Checked {
        self.grows.write_all(b" more").map_err(text)?;
        equal("a file that is open", read(format!("{path}/file"))?, "contents more".into())?;
        let mut left = String::new();
        self.gone.rewind().and_then(|()| self.gone.read_to_string(&mut left)).map_err(text)?;
        equal("a file without a name", left, "unlinked".into())
    }
}

/// As `unshare -m` does it: things are mounted, taken away, bound, and nobody outside sees it.
fn mounts_namespace() -> Checked {
    for path in ["/mnt/one", "/mnt/bin", "/mnt/part"] {
        directory(path)?;
    }
    elsewhere(
        || {
            unshare(libc::CLONE_NEWNS)?;
            private()?;
            mount("things", "/mnt/one", "tmpfs", libc::MS_NOSUID, "size=1m,mode=750")?;
            directory("/mnt/one/deep/inner")?;
            let open = Open::at("/mnt/one")?;
            mount("inner", "/mnt/one/deep/inner", "tmpfs", 0, "")?;
            write("/mnt/one/deep/inner/file", "inside")?;
            mount("", "/mnt/one/deep/inner", "", libc::MS_SHARED, "")?;
            mount("/mnt/one/deep", "/mnt/part", "", libc::MS_BIND, "")?;
            mount("/usr/bin", "/mnt/bin", "", libc::MS_BIND, "")?;
            mount("", "/mnt/bin", "", libc::MS_BIND | libc::MS_REMOUNT | libc::MS_RDONLY, "")?;
            done("umount", unsafe { libc::umount2(c"/run".as_ptr(), libc::MNT_DETACH) })?;
            std::env::set_current_dir("/mnt/one/deep").map_err(text)?;
            let running = std::process::Command::new("/mnt/bin/sleep").arg("1000").spawn().map_err(text)?;
            until_asleep(running.id() as i32)?;
            Ok((open, running))
        },
        |(mut open, mut running)| {
            open.check("/mnt/one")?;
            equal("a file inside", read("inner/file")?, "inside".into())?;
            check(std::fs::write("/mnt/bin/new", "").is_err(), "it can be written to")?;
            check(std::fs::write("/mnt/one/large", vec![1; 2 << 20]).is_err(), "its size is not limited any more")?;
            std::fs::remove_file("/mnt/one/large").map_err(text)?;
            write("/mnt/one/deep/other", "seen twice")?;
            equal("part of it", read("/mnt/part/other")?, "seen twice".into())?;
            running.kill().and_then(|()| running.wait()).map_err(text)?;
            done("umount", unsafe { libc::umount(c"/mnt/part".as_ptr()) }).map(drop)
        },
    )?;
    check(!std::path::Path::new("/mnt/one/file").exists(), "what was mounted elsewhere is seen here")
}

/// A copy of a namespace that had mounts of its own: both show the same file system.
fn mounts_namespace_copied() -> Checked {
    directory("/mnt/both")?;
    let set_up = Gate::new()?;
    let child = fork(|| {
        unshare(libc::CLONE_NEWNS)?;
        private()?;
        mount("both", "/mnt/both", "tmpfs", 0, "")?;
        write("/mnt/both/file", "of one")?;
        let grandchild = fork(|| {
            unshare(libc::CLONE_NEWNS)?;
            mount("", "/mnt/both", "", libc::MS_BIND | libc::MS_REMOUNT | libc::MS_RDONLY, "")?;
            set_up.open()?;
            await_go();
            until("the other's word", || read("/mnt/both/word").is_ok_and(|word| word == "go"))?;
            check(std::fs::write("/mnt/both/file", "").is_err(), "it can be written to")
        })?;
        set_up.open()?;
        await_go();
        write("/mnt/both/word.new", "go")?;
        std::fs::rename("/mnt/both/word.new", "/mnt/both/word").map_err(text)?;
        reap(grandchild)
    })?;
    set_up.pass(2)?;
    hold()?;
    reap(child)
}

/// An ordinary user who is root in a namespace mounts things.
fn namespace_of_mounts() -> Checked {
    std::fs::create_dir_all("/mnt/own").map_err(text)?;
    elsewhere(
        || {
            become_ordinary()?;
            become_root(libc::CLONE_NEWNS)?;
            private()?;
            mount("own", "/mnt/own", "tmpfs", libc::MS_NODEV, "mode=700,uid=0,gid=0")?;
            Open::at("/mnt/own")
        },
        |mut open| {
            open.check("/mnt/own")?;
            let found = std::fs::metadata("/mnt/own/file").map_err(text)?;
            equal("whose file it is", (found.uid(), found.gid()), (0, 0))?;
            // More can be mounted there, and what the pod was born with still covers what it covers.
            mount("more", "/mnt/own", "tmpfs", 0, "")?;
            check(unsafe { libc::umount(c"/run".as_ptr()) } != 0, "what is below was revealed")
        },
    )
}

/// As sandboxes give programs files: mounted where they are to be seen, and removed where they were made.
fn namespace_of_mounts_data() -> Checked {
    std::fs::create_dir_all("/mnt/base").map_err(text)?;
    let facts = || -> Result<_, String> {
        let found = std::fs::metadata("/mnt/base/root/read").map_err(text)?;
        Ok((found.mode(), found.nlink(), found.mtime(), found.len()))
    };
    elsewhere(
        || {
            become_root(libc::CLONE_NEWNS)?;
            private()?;
            mount("base", "/mnt/base", "tmpfs", 0, "mode=755")?;
            std::fs::create_dir("/mnt/base/root").map_err(text)?;
            for (name, contents) in [("read", "to be read"), ("written", "to be written"), ("empty", "")] {
                let (made, seen) = (format!("/mnt/base/data-{name}"), format!("/mnt/base/root/{name}"));
                write(&made, contents)?;
                write(&seen, "")?;
                std::fs::set_permissions(&made, std::fs::Permissions::from_mode(0o640)).map_err(text)?;
                mount(&made, &seen, "", libc::MS_BIND, "")?;
                std::fs::remove_file(&made).map_err(text)?;
            }
            let read_only = libc::MS_BIND | libc::MS_REMOUNT | libc::MS_RDONLY;
            mount("", "/mnt/base/root/read", "", read_only, "")?;
            mount("", "/mnt/base", "", read_only, "")?;
            Ok((File::open("/mnt/base/root/read").map_err(text)?, facts()?))
        },
        |(mut open, before)| {
            let mut contents = String::new();
            std::io::Read::read_to_string(&mut open, &mut contents).map_err(text)?;
            equal("what an open one has", contents, "to be read".into())?;
            equal("what is read", read("/mnt/base/root/read")?, "to be read".into())?;
            equal("permissions, names, time, length", facts()?, before)?;
            check(std::fs::write("/mnt/base/root/read", "").is_err(), "it can be written to")?;
            equal("what is written", read("/mnt/base/root/written")?, "to be written".into())?;
            write("/mnt/base/root/written", "anew")?;
            equal("an empty one", read("/mnt/base/root/empty")?, String::new())?;
            check(std::fs::write("/mnt/base/new", "").is_err(), "the rest can be written to")?;
            equal("the names there", std::fs::read_dir("/mnt/base").map_err(text)?.count(), 1)
        },
    )
}

/// The same, with nothing left of the file system in which the file was made; seen from a copy of the namespace as well.
fn namespace_of_mounts_data_alone() -> Checked {
    std::fs::create_dir_all("/mnt/base").map_err(text)?;
    write("/mnt/seen", "")?;
    let (copied, written) = (Gate::new()?, Gate::new()?);
    elsewhere(
        || {
            become_root(libc::CLONE_NEWNS)?;
            private()?;
            mount("base", "/mnt/base", "tmpfs", 0, "mode=755")?;
            std::fs::create_dir("/mnt/base/deep").map_err(text)?;
            write("/mnt/base/deep/data", "data")?;
            mount("/mnt/base/deep/data", "/mnt/seen", "", libc::MS_BIND, "")?;
            std::fs::remove_file("/mnt/base/deep/data").map_err(text)?;
            done("umount", unsafe { libc::umount2(c"/mnt/base".as_ptr(), libc::MNT_DETACH) })?;
            let child = fork(|| {
                unshare(libc::CLONE_NEWNS)?;
                copied.open()?;
                written.pass(1)?;
                equal("what another has written", read("/mnt/seen")?, "anew".into())
            })?;
            copied.pass(1)?;
            Ok(child)
        },
        |child| {
            equal("what is there", read("/mnt/seen")?, "data".into())?;
            write("/mnt/seen", "anew")?;
            written.open()?;
            reap(child)
        },
    )?;
    equal("what is below it", read("/mnt/seen")?, String::new())
}

/// As container programs do it: a root of its own, with parts of the pod's, and what was the root is gone.
fn namespace_of_mounts_pivoted() -> Checked {
    std::fs::create_dir_all("/srv/shared").map_err(text)?;
    let word = File::open("/tmp").map_err(text)?;
    elsewhere(
        || {
            become_root(libc::CLONE_NEWNS)?;
            private()?;
            mount("root", "/mnt", "tmpfs", libc::MS_NOSUID | libc::MS_NODEV, "mode=755")?;
            for path in ["usr", "tmp", "proc", "dev", "shared", "own", "old"] {
                directory(&format!("/mnt/{path}"))?;
            }
            for path in ["/usr", "/tmp", "/proc", "/dev"] {
                mount(path, &format!("/mnt{path}"), "", libc::MS_BIND | libc::MS_REC, "")?;
            }
            let read_only = libc::MS_BIND | libc::MS_REMOUNT | libc::MS_RDONLY | libc::MS_NOSUID | libc::MS_NODEV;
            let flags = read_only | locked_flags("/usr")?;
            mount("", "/mnt/usr", "", flags, "")?;
            mount("/srv/shared", "/mnt/shared", "", libc::MS_BIND, "")?;
            mount("own", "/mnt/own", "tmpfs", 0, "size=64k")?;
            std::env::set_current_dir("/mnt").map_err(text)?;
            call("pivot_root", libc::SYS_pivot_root, [c".".as_ptr() as u64, c"old".as_ptr() as u64])?;
            std::env::set_current_dir("/").map_err(text)?;
            done("umount", unsafe { libc::umount2(c"/old".as_ptr(), libc::MNT_DETACH) })?;
            std::fs::remove_dir("/old").map_err(text)?;
            std::env::set_current_dir("/own").map_err(text)?;
            let program = File::open("/usr/bin/env").map_err(text)?;
            Ok((Open::at("/own")?, program))
        },
        |(mut open, _program)| {
            open.check("/own")?;
            equal("the directory", std::env::current_dir().map_err(text)?, "/own".into())?;
            check(std::fs::write("/usr/new", "").is_err(), "it can be written to")?;
            check(!std::path::Path::new("/etc").exists(), "the old root is seen")?;
            write("/shared/word", "from inside")
        },
    )?;
    drop(word);
    equal("what was written inside", read("/srv/shared/word")?, "from inside".into())
}

/// The flags of a mount that those who are not its makers must keep.
fn locked_flags(path: &str) -> Result<libc::c_ulong, String> {
    let path = std::ffi::CString::new(path).map_err(|e| e.to_string())?;
    let mut found: libc::statvfs = unsafe { std::mem::zeroed() };
    done("statvfs", unsafe { libc::statvfs(path.as_ptr(), &mut found) })?;
    let times = [
        (libc::ST_NOATIME, libc::MS_NOATIME),
        (libc::ST_RELATIME, libc::MS_RELATIME),
        (libc::ST_NOEXEC, libc::MS_NOEXEC),
    ];
    Ok(times.iter().filter(|(shown, _)| found.f_flag & shown != 0).fold(0, |all, (_, flag)| all | flag))
}

/// A file system of which nothing is known.
fn namespace_of_mounts_overlay() -> Checked {
    for path in ["/mnt/up", "/mnt/work", "/mnt/over"] {
        directory(path)?;
    }
    hold_loosely_beside(|| {
        become_root(libc::CLONE_NEWNS)?;
        mount("parts", "/mnt", "tmpfs", 0, "")?;
        for path in ["/mnt/up", "/mnt/work", "/mnt/over"] {
            directory(path)?;
        }
        mount("over", "/mnt/over", "overlay", 0, "lowerdir=/usr,upperdir=/mnt/up,workdir=/mnt/work,userxattr")
    })
}
