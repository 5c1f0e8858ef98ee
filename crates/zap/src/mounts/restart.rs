//! Mounts of an image made again, in the builder, before any file is opened.

use std::collections::HashMap;
use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use nix::fcntl::{OFlag, openat};
use nix::sys::stat::Mode;

use super::capture::path_of;
use super::table::join;
use super::{FileSystem, MountState, NestState, NestedMount, NestedSource, Source};
use crate::error::{Context, RebuildError};
use crate::files::mounts::{as_path, relative};
use crate::image::ImageReader;
use crate::layer;
use crate::namespaces::NamespaceId;
use crate::sys::{capability, clone, exec, mount, namespace, nsfs};

/// Makes every mount. Nobody else is in the pod yet.
pub fn make(image: &ImageReader, states: &[MountState]) -> Result<(), RebuildError> {
    // Before anything covers what is bound.
    let mut ready: Vec<Option<OwnedFd>> = Vec::with_capacity(states.len());
    for state in states {
        let shown = as_path(&state.point).display();
        ready.push(match &state.source {
            Source::Bind(path) => Some(mount::copy_mount(as_path(path), false).rebuilding("binding", shown)?),
            Source::New(system) => Some(new(image, system, None)?),
            Source::Part(..) => None,
        });
    }
    let mut parts = Vec::with_capacity(states.len());
    for state in states {
        let Source::Part(first, rest) = &state.source else {
            parts.push(None);
            continue;
        };
        let missing = || RebuildError::Damaged(format!("mount {first} is not in it"));
        let whole = ready.get(*first).and_then(Option::as_ref).ok_or_else(missing)?;
        let inside = path_of(whole).join(relative(rest));
        let shown = as_path(&state.point).display();
        parts.push(Some(mount::copy_mount(&inside, false).rebuilding("binding", shown)?));
    }
    for ((state, mounted), part) in states.iter().zip(ready).zip(parts) {
        let point = as_path(&state.point);
        let Some(mounted) = mounted.or(part) else { continue };
        mount::shape(mounted.as_fd(), state.attributes, 0).rebuilding("setting the options of", point.display())?;
        mount::attach(&mounted, point).rebuilding("mounting", point.display())?;
        if let Some(propagation) = propagation(state.shared, state.unbindable) {
            mount::shape(mounted.as_fd(), state.attributes, propagation)
                .rebuilding("setting the propagation of", point.display())?;
        }
    }
    Ok(())
}

/// How a mount that is not private passes on what is mounted there.
fn propagation(shared: bool, unbindable: bool) -> Option<u64> {
    match (shared, unbindable) {
        (true, _) => Some(libc::MS_SHARED),
        (_, true) => Some(libc::MS_UNBINDABLE),
        _ => None,
    }
}

/// The user namespace in which a file system is made, and what users and groups are called there, from the pod's names.
#[derive(Clone, Copy)]
pub struct Maker<'m> {
    /// The namespace.
    pub namespace: &'m OwnedFd,
    /// The name of a user.
    pub user: &'m dyn Fn(u32) -> Option<u32>,
    /// The name of a group.
    pub group: &'m dyn Fn(u32) -> Option<u32>,
    /// A user and a group that have names there.
    pub someone: Option<(u32, u32)>,
}

fn new(image: &ImageReader, system: &FileSystem, maker: Option<Maker<'_>>) -> Result<OwnedFd, RebuildError> {
    let text = |text: &str| CString::new(text).map_err(|_| RebuildError::Damaged("an option has a NUL in it".into()));
    let kind = text(&system.kind)?;
    let source = CString::new(system.device.clone());
    let source = source.map_err(|_| RebuildError::Damaged("a device has a NUL in it".into()))?;
    let mut options = vec![(text("source")?, Some(source))];
    for (key, value) in &system.options {
        let Some(value) = named(key, value.as_deref(), maker) else { continue };
        options.push((text(key)?, value.as_deref().map(text).transpose()?));
    }
    let options: Vec<_> = options.iter().map(|(key, value)| (key.as_c_str(), value.as_deref())).collect();
    let mounted = match maker {
        // Nobody in the pod's own user namespace owns what is shown in another one.
        Some(maker) if system.kind != "proc" => made_by(maker.namespace, &|| mount::new_mount(&kind, &options, 0)),
        _ => mount::new_mount(&kind, &options, 0),
    };
    let mounted = mounted.rebuilding("making", &system.kind)?;
    let root = Path::new(".").join(relative(&system.root));
    let top = path_of(&mounted).join(&root);
    if let Some(archive) = &system.contents {
        let mut archive = image.layer(archive).map_err(|e| RebuildError::Damaged(e.to_string()))?;
        unpack(&mut archive, &top, maker)?;
    }
    match system.root.as_slice() {
        b"/" => Ok(mounted),
        _ => mount::copy_mount(&top, false).rebuilding("binding", &system.kind),
    }
}

fn unpack(archive: &mut impl io::Read, top: &Path, maker: Option<Maker<'_>>) -> Result<(), RebuildError> {
    let mut unpack = || {
        std::fs::create_dir_all(top).rebuilding("making", "a directory")?;
        layer::unpack(archive, top)
    };
    match maker.and_then(|maker| maker.someone) {
        None => unpack(),
        Some(someone) => capability::making_as(someone, unpack).rebuilding("becoming", "a user of a user namespace")?,
    }
}

/// The value of an option as its maker has to say it; `None` if the option cannot be given there.
fn named(key: &str, value: Option<&str>, maker: Option<Maker<'_>>) -> Option<Option<String>> {
    let (Some(maker), Some(value)) = (maker, value) else { return Some(value.map(str::to_owned)) };
    let name: &dyn Fn(u32) -> Option<u32> = match key {
        "uid" => maker.user,
        "gid" => maker.group,
        _ => return Some(Some(value.to_owned())),
    };
    Some(Some(name(value.parse().ok()?)?.to_string()))
}

/// Makes a mount in a user namespace: who is there may mount nothing in the pod's own mount namespace, but in a copy.
fn made_by(owner: &OwnedFd, make: &dyn Fn() -> io::Result<OwnedFd>) -> io::Result<OwnedFd> {
    in_slot(&|| {
        nsfs::enter(owner, libc::CLONE_NEWUSER)?;
        capability::visible()?;
        namespace::unshare(libc::CLONE_NEWNS)?;
        make()
    })
}

/// What a helper opened.
fn in_slot(open: &dyn Fn() -> io::Result<OwnedFd>) -> io::Result<OwnedFd> {
    let slot: OwnedFd = std::fs::File::open("/dev/null")?.into();
    clone::in_child(&|| exec::duplicate_to(open()?.as_raw_fd(), slot.as_raw_fd()))?;
    Ok(slot)
}

/// What is to be mounted in the mount namespaces of an image, attached nowhere yet.
#[derive(Default)]
pub struct Sources(HashMap<(NamespaceId, usize), OwnedFd>);

impl Sources {
    /// Prepares what one of them shows, while nothing is attached: what is taken from others must have been prepared.
    pub fn prepare(
        &mut self,
        image: &ImageReader,
        id: NamespaceId,
        nest: &NestState,
        maker: Option<Maker<'_>>,
    ) -> Result<(), RebuildError> {
        let is_part = |state: &NestedMount| matches!(state.source, NestedSource::Part(..));
        let (parts, wholes): (Vec<_>, Vec<_>) = nest.mounts.iter().enumerate().partition(|(_, state)| is_part(state));
        for (place, state) in wholes.into_iter().chain(parts) {
            let mounted = match &state.source {
                NestedSource::Home(path) => {
                    let path = as_path(path);
                    mount::copy_mount(path, false).rebuilding("binding", path.display())?
                }
                NestedSource::New(system) => new(image, system, maker)?,
                NestedSource::Part(other, first, rest) => {
                    let whole = self.0.get(&(*other, *first)).ok_or_else(|| missing(*first))?;
                    let inside = path_of(whole).join(relative(rest));
                    mount::copy_mount(&inside, false).rebuilding("binding", as_path(rest).display())?
                }
            };
            mount::shape(mounted.as_fd(), state.attributes, 0)
                .rebuilding("setting the options of", as_path(&state.place).display())?;
            self.0.insert((id, place), mounted);
        }
        Ok(())
    }
}

fn missing(place: usize) -> RebuildError {
    RebuildError::Damaged(format!("mount {place} of a mount namespace is not in it"))
}

/// Makes a mount namespace that belongs to the user namespace `owner` (`None`: the pod's own).
pub fn make_nest(
    id: NamespaceId,
    nest: &NestState,
    owner: Option<&OwnedFd>,
    sources: &Sources,
) -> Result<OwnedFd, RebuildError> {
    let find = |place: usize| sources.0.get(&(id, place)).ok_or_else(|| missing(place));
    let mounts = (0..nest.mounts.len()).map(find).collect::<Result<Vec<&OwnedFd>, _>>()?;
    let paths = paths(nest)?;
    if mounts.is_empty() {
        return Err(missing(0));
    }
    let made = in_slot(&|| {
        // Seen from its new root there may be no /proc.
        let itself = crate::sys::file::open_path(Path::new("/proc/self"))?;
        namespace::unshare(libc::CLONE_NEWNS)?;
        mount::make_all_private()?;
        match owner {
            None => assemble(nest, &mounts.iter().map(|mount| mount.as_fd()).collect::<Vec<_>>())?,
            Some(owner) => assemble_for(owner, nest, &mounts)?,
        }
        for (state, path) in nest.mounts.iter().zip(&paths) {
            if let Some(propagation) = propagation(state.shared, state.unbindable) {
                mount::propagate(as_path(path), propagation)?;
            }
        }
        let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC;
        Ok(openat(&itself, "ns/mnt", flags, Mode::empty())?)
    });
    made.rebuilding("making", "a mount namespace")
}

/// Puts mounts where they are to be, the first of which becomes the root of the caller's mount namespace.
fn assemble(nest: &NestState, mounts: &[BorrowedFd<'_>]) -> io::Result<()> {
    // Any directory that every pod has.
    mount::attach(mounts[0], Path::new("/proc"))?;
    for (state, mounted) in nest.mounts.iter().zip(mounts) {
        let Some(on) = state.on.and_then(|on| mounts.get(on)) else { continue };
        mount::attach_on(mounted, on, relative(&state.place))?;
    }
    nix::unistd::fchdir(mounts[0])?;
    mount::pivot_here()
}

/// The same for a namespace of others: of what the pod has itself, nothing that lies on something else of it may be taken
/// away there to see what is below. The kernel ties such mounts together when a namespace is copied for other owners.
fn assemble_for(owner: &OwnedFd, nest: &NestState, mounts: &[&OwnedFd]) -> io::Result<()> {
    let is_home = |place: usize| matches!(nest.mounts.get(place).map(|m| &m.source), Some(NestedSource::Home(_)));
    let is_tied = |place: usize| is_home(place) && nest.mounts[place].on.is_some_and(is_home);
    let desk = Path::new("/proc");
    mount::attach(mount::new_mount(c"tmpfs", &[], 0)?, desk)?;
    for (place, mounted) in mounts.iter().enumerate() {
        if let (true, Some(on)) = (is_tied(place), nest.mounts[place].on) {
            mount::attach_on(mounted, mounts[on], relative(&nest.mounts[place].place))?;
            continue;
        }
        let here = desk.join(place.to_string());
        match crate::sys::file::fstat(mounted)?.st_mode & libc::S_IFMT {
            libc::S_IFDIR => std::fs::create_dir(&here)?,
            _ => std::fs::write(&here, "")?,
        }
        mount::attach(mounted, &here)?;
    }
    nsfs::enter(owner, libc::CLONE_NEWUSER)?;
    capability::visible()?;
    namespace::unshare(libc::CLONE_NEWNS)?;
    let mut copies: Vec<OwnedFd> = Vec::with_capacity(mounts.len());
    for (place, state) in nest.mounts.iter().enumerate() {
        copies.push(match state.on.filter(|_| is_tied(place)) {
            Some(on) => mount::open_mount(&copies[on], relative(&state.place))?,
            None => mount::copy_mount(&desk.join(place.to_string()), true)?,
        });
    }
    mount::attach(&copies[0], desk)?;
    for (place, state) in nest.mounts.iter().enumerate().filter(|(place, _)| !is_tied(*place)) {
        let Some(on) = state.on else { continue };
        mount::attach_on(&copies[place], &copies[on], relative(&state.place))?;
    }
    nix::unistd::fchdir(&copies[0])?;
    mount::pivot_here()
}

/// Where each mount is, from the root.
fn paths(nest: &NestState) -> Result<Vec<Vec<u8>>, RebuildError> {
    let mut paths: Vec<Vec<u8>> = Vec::with_capacity(nest.mounts.len());
    for state in &nest.mounts {
        let above = match state.on {
            Some(on) => paths.get(on).ok_or_else(|| missing(on))?.as_slice(),
            None => b"/",
        };
        paths.push(join(above, &state.place));
    }
    Ok(paths)
}
