//! The pod's `/dev`.

use std::io;
use std::os::unix::fs::symlink;
use std::path::Path;

use nix::sys::stat::{Mode, SFlag, makedev, mknod};

use super::BuildError;
use super::build::{chmod, fresh};
use crate::sys::mount::{NO_DEV, NO_EXEC, NO_SUID};

const NODES: [(&str, u64, u64); 6] =
    [("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0)];

const LINKS: [(&str, &str); 5] = [
    ("/proc/self/fd", "fd"),
    ("/proc/self/fd/0", "stdin"),
    ("/proc/self/fd/1", "stdout"),
    ("/proc/self/fd/2", "stderr"),
    ("pts/ptmx", "ptmx"),
];

/// Mounts `/dev` and fills it.
pub(super) fn populate(tty: bool) -> Result<(), BuildError> {
    let source = (c"source", Some(c"tmpfs"));
    fresh(c"tmpfs", "/dev", &[source, (c"mode", Some(c"755"))], NO_SUID)?;
    nodes_and_links(tty).map_err(|source| BuildError { what: "/dev".to_owned(), source })?;
    let pts = [
        (c"source", Some(c"devpts")),
        (c"newinstance", None),
        (c"ptmxmode", Some(c"0666")),
        (c"mode", Some(c"0620")),
        (c"gid", Some(c"5")),
    ];
    fresh(c"devpts", "/dev/pts", &pts, NO_SUID | NO_EXEC)?;
    fresh(c"tmpfs", "/dev/shm", &[source, (c"mode", Some(c"1777"))], NO_SUID | NO_DEV)?;
    fresh(c"mqueue", "/dev/mqueue", &[(c"source", Some(c"mqueue"))], NO_SUID | NO_DEV | NO_EXEC)
}

fn nodes_and_links(tty: bool) -> io::Result<()> {
    for (name, major, minor) in NODES {
        let path = format!("/dev/{name}");
        mknod(path.as_str(), SFlag::S_IFCHR, Mode::from_bits_truncate(0o666), makedev(major, minor))?;
        chmod(&path, 0o666)?;
    }
    for (target, name) in LINKS {
        symlink(target, Path::new("/dev").join(name))?;
    }
    if tty {
        // The console is the first pty of the pod.
        symlink("pts/0", "/dev/console")?;
    }
    Ok(())
}
