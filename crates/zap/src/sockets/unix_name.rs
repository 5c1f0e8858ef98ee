//! Names of unix sockets: paths, absolute or relative to a directory of long ago, whose file may be gone; abstract names.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::{CaptureError, Context};
use crate::files::{Descriptor, from_host, unlinked};
use crate::look::Look;
use crate::sys::clone::in_thread;
use crate::sys::{file, message, mount, socket};

/// The name that a unix socket is bound to.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnixName {
    /// `sun_path` as it was given: a path without the final NUL, or a NUL and an abstract name. Empty: none.
    #[serde(with = "serde_bytes")]
    pub bytes: Vec<u8>,
    /// The file that a path made, unless it was removed.
    pub file: Option<BoundFile>,
}

/// The file of a bound socket.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BoundFile {
    /// Where it is now, in the pod.
    pub path: PathBuf,
    /// Permissions.
    pub mode: u32,
    /// Owner.
    pub user: u32,
    /// Group.
    pub group: u32,
    /// The other names that it has, in the pod (`link`).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub others: Vec<PathBuf>,
}

impl UnixName {
    /// Whether it is a path (rather than abstract, or none).
    pub(super) fn is_path(&self) -> bool {
        self.bytes.first().is_some_and(|b| *b != 0)
    }

    /// The `sockaddr_un`.
    pub(super) fn to_kernel(&self) -> Vec<u8> {
        let mut address = (libc::AF_UNIX as u16).to_ne_bytes().to_vec();
        address.extend(&self.bytes);
        if self.is_path() && self.bytes.len() < 108 {
            address.push(0);
        }
        address
    }
}

/// `sun_path` of a `sockaddr_un` as [`UnixName::bytes`] has it.
pub(super) fn plain(address: &[u8]) -> Vec<u8> {
    let path = address.get(2..).unwrap_or_default();
    match path.first() {
        Some(0) => path.to_vec(),
        _ => path.split(|b| *b == 0).next().unwrap_or_default().to_vec(),
    }
}

/// The name of a socket. Names that its file has and nobody finds are refused.
pub(super) fn capture(look: &mut Look<'_>, descriptor: &Descriptor) -> Result<UnixName, CaptureError> {
    match look_up(look, descriptor).capturing("asking the name of", descriptor.object())? {
        Some(name) => Ok(name),
        None => Err(descriptor.refuse("is bound to a file that has another name, which was not found")),
    }
}

/// The name of a socket, unless its file has some that are not found.
fn look_up(look: &mut Look<'_>, descriptor: &Descriptor) -> io::Result<Option<UnixName>> {
    let fd = descriptor.as_fd();
    let mut name = UnixName { bytes: plain(&socket::local_name(fd)?), file: None };
    if name.is_path()
        && let Ok(bound) = message::bound_file(fd)
    {
        let stat = file::fstat(&bound)?;
        let path = std::fs::read_link(format!("/proc/self/fd/{}", bound.as_raw_fd()))?;
        let names = match path.as_os_str().as_bytes().strip_suffix(b" (deleted)") {
            _ if stat.st_nlink == 0 => Vec::new(),
            None if stat.st_nlink == 1 => vec![path],
            None => every_name(look, descriptor, &bound, &path)?,
            Some(lost) => every_name(look, descriptor, &bound, Path::new(OsStr::from_bytes(lost)))?,
        };
        if names.len() < stat.st_nlink as usize {
            return Ok(None);
        }
        let (mode, user, group) = (stat.st_mode & 0o7777, stat.st_uid, stat.st_gid);
        let mut names = names.into_iter();
        name.file = names.next().map(|path| BoundFile { path, mode, user, group, others: names.collect() });
    }
    Ok(Some(name))
}

/// Every name of the file of a socket that was bound to `path`; that one, or else one in the same directory, comes first:
/// servers link a socket to where it is to appear when they listen.
fn every_name(look: &mut Look<'_>, descriptor: &Descriptor, bound: &OwnedFd, path: &Path) -> io::Result<Vec<PathBuf>> {
    let stat = file::fstat(bound)?;
    let file = (stat.st_dev, stat.st_ino);
    let all_there = |names: &Vec<PathBuf>| {
        let is_there = |name: &PathBuf| unlinked::is_at(&from_host(look.init, name.as_os_str().as_bytes()), &stat);
        names.len() == stat.st_nlink as usize && names.iter().all(is_there)
    };
    if let Some(known) = look.sockets.names.get(&file).filter(|names| all_there(names)) {
        return Ok(known.clone());
    }
    let Some(mount) = look.files.mounts.find(mount::id_of(bound)?, look.init, descriptor.subject.host)?.cloned() else {
        return Ok(Vec::new());
    };
    let mut names = unlinked::names(look, &mount, &stat)?;
    names.sort_by_key(|name| (name != path, name.parent() != path.parent(), name.clone()));
    look.sockets.names.insert(file, names.clone());
    Ok(names)
}

/// Whether the file of a name is found under its path in the pod's own mount namespace, or was not bound elsewhere.
pub(super) fn is_found(look: &Look<'_>, fd: BorrowedFd<'_>, name: &UnixName) -> io::Result<bool> {
    let Some(bound) = name.file.as_ref().filter(|_| !look.nests.is_empty()) else { return Ok(true) };
    let itself = message::bound_file(fd)?;
    if !look.nests.has(mount::id_of(&itself)?) {
        return Ok(true);
    }
    Ok(unlinked::is_at(&from_host(look.init, bound.path.as_os_str().as_bytes()), &file::fstat(&itself)?))
}

/// Binds a socket to its name. The file of a path appears where it was; one that was removed appears nowhere.
pub(super) fn bind(fd: BorrowedFd<'_>, name: &UnixName) -> io::Result<()> {
    match (&name.file, name.bytes.is_empty()) {
        (_, true) => Ok(()),
        (Some(bound), _) if directory_of(name, &bound.path).is_some() => {
            bind_in_place(fd, name, bound)?;
            link_others(bound)
        }
        (Some(bound), _) if bind_moved(fd, name, bound)? => link_others(bound),
        _ if name.is_path() => in_nowhere(name, || socket::bind(fd, &name.to_kernel())),
        _ => socket::bind(fd, &name.to_kernel()),
    }
}

/// The directory in which binding to `name` makes `path`; `None` if no directory does (the file was renamed).
fn directory_of(name: &UnixName, path: &Path) -> Option<PathBuf> {
    let given = Path::new(OsStr::from_bytes(&name.bytes));
    let parent = given.file_name().filter(|n| path.file_name() == Some(n)).and(path.parent())?;
    if given.is_absolute() {
        // The same file by another path (a link on the way) is as good.
        return Some(PathBuf::from("/"));
    }
    let above = given.parent()?;
    let base = parent.as_os_str().as_bytes().strip_suffix(above.as_os_str().as_bytes())?;
    Some(PathBuf::from(OsStr::from_bytes(base)))
}

/// Binds a socket whose file was renamed afterwards: in a directory that is the root meanwhile, from which the file is moved
/// to where it is. Whether that could be done.
fn bind_moved(fd: BorrowedFd<'_>, name: &UnixName, bound: &BoundFile) -> io::Result<bool> {
    let given = Path::new(OsStr::from_bytes(&name.bytes));
    let plain = |part| matches!(part, Component::RootDir | Component::Normal(_));
    let (true, Some(home)) = (given.components().all(plain), bound.path.parent()) else { return Ok(false) };
    let nest = home.join(format!(".zap-{}-{}", std::process::id(), fd.as_raw_fd()));
    let made = nest.join(given.strip_prefix("/").unwrap_or(given));
    std::fs::create_dir_all(made.parent().unwrap_or(&nest))?;
    let placed = in_thread(|| {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_FS)?;
        nix::unistd::chroot(&nest)?;
        nix::unistd::chdir("/")?;
        socket::bind(fd, &name.to_kernel())
    });
    let placed = placed.and_then(|()| dress(&made, bound)).and_then(|()| std::fs::rename(&made, &bound.path));
    std::fs::remove_dir_all(&nest)?;
    placed.map(|()| true)
}

/// Gives the file of a socket its owner and permissions.
fn dress(path: &Path, bound: &BoundFile) -> io::Result<()> {
    std::os::unix::fs::chown(path, Some(bound.user), Some(bound.group))?;
    std::fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(bound.mode))
}

/// Gives the file of a socket its other names, which lead to what was there before.
fn link_others(bound: &BoundFile) -> io::Result<()> {
    for other in &bound.others {
        remove(other)?;
        std::fs::hard_link(&bound.path, other)?;
    }
    Ok(())
}

/// Removes a file, if it is there.
fn remove(path: &Path) -> io::Result<()> {
    std::fs::remove_file(path).or_else(|e| if e.kind() == io::ErrorKind::NotFound { Ok(()) } else { Err(e) })
}

fn bind_in_place(fd: BorrowedFd<'_>, name: &UnixName, bound: &BoundFile) -> io::Result<()> {
    let directory = directory_of(name, &bound.path).unwrap_or_else(|| PathBuf::from("/"));
    remove(&bound.path)?;
    in_directory(&directory, || socket::bind(fd, &name.to_kernel()))?;
    dress(&bound.path, bound)
}

/// Runs `bind` with another working directory, in a thread that has one of its own.
fn in_directory(directory: &Path, bind: impl FnOnce() -> io::Result<()> + Send) -> io::Result<()> {
    in_thread(|| {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_FS)?;
        nix::unistd::chdir(directory)?;
        bind()
    })
}

/// Runs `bind` where a path leads to an empty file system that nobody else sees, and removes what it made there: so a
/// socket gets a name whose file is gone, whatever is at that path in the pod.
pub(super) fn in_nowhere(name: &UnixName, bind: impl FnOnce() -> io::Result<()> + Send) -> io::Result<()> {
    use nix::mount::MsFlags;
    let path = Path::new(OsStr::from_bytes(&name.bytes));
    in_thread(|| {
        let none: Option<&str> = None;
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS)?;
        nix::mount::mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
        nix::mount::mount(Some("tmpfs"), "/proc", Some("tmpfs"), MsFlags::empty(), Some("mode=0755"))?;
        nix::unistd::chroot("/proc")?;
        nix::unistd::chdir("/")?;
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent)?;
        }
        // Whoever is to connect may, whatever its user.
        nix::sys::stat::umask(nix::sys::stat::Mode::empty());
        bind()?;
        std::fs::remove_file(path)
    })
}

/// A `sockaddr_un` by which a bound socket is reached, and what must stay open meanwhile.
pub(super) struct Way(pub(super) Vec<u8>, #[allow(dead_code)] Option<OwnedFd>);

/// How `target`, which is bound to `name`, is reached, wherever its file is, even removed.
pub(super) fn way_to(target: BorrowedFd<'_>, name: &UnixName) -> io::Result<Way> {
    if !name.is_path() {
        return Ok(Way(name.to_kernel(), None));
    }
    let bound = message::bound_file(target)?;
    let path = format!("/proc/self/fd/{}", bound.as_raw_fd());
    Ok(Way(UnixName { bytes: path.into_bytes(), file: None }.to_kernel(), Some(bound)))
}

/// Connects to a bound socket.
pub(super) fn connect_to(fd: BorrowedFd<'_>, target: BorrowedFd<'_>, name: &UnixName) -> io::Result<()> {
    socket::connect(fd, &way_to(target, name)?.0)
}
