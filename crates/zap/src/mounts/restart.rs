//! Mounts of an image made again, in the builder, before any file is opened.

use std::collections::HashMap;
use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;

use super::capture::path_of;
use super::late::Late;
use super::removed::{self, RemovedFile};
use super::shown::kind_shown;
use super::{FileSystem, Holder, MountState, NestState, NestedMount, NestedSource, Source};
use crate::error::{Context, RebuildError};
use crate::files::mounts::{as_path, relative};
use crate::image::ImageReader;
use crate::layer;
use crate::namespaces::{Made, NamespaceId};
use crate::sys::pidfd::PidFd;
use crate::sys::{capability, clone, exec, mount, namespace, nsfs};

/// Makes every mount. Nobody else is in the pod yet.
pub fn make(image: &ImageReader, states: &[MountState]) -> Result<(), RebuildError> {
    // Before anything covers what is bound.
    let mut ready: Vec<Option<OwnedFd>> = Vec::with_capacity(states.len());
    for state in states {
        let shown = as_path(&state.point).display();
        ready.push(match &state.source {
            Source::Bind(path) => Some(mount::copy_mount(as_path(path), false).rebuilding("binding", shown)?),
            Source::New(system) => Some(new(image, system, None, &here)?),
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
pub(super) fn propagation(shared: bool, unbindable: bool) -> Option<u64> {
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

/// Makes a mount.
type Make<'m> = dyn Fn() -> io::Result<OwnedFd> + 'm;

/// Where a mount is made: here.
fn here(make: &Make<'_>) -> io::Result<OwnedFd> {
    make()
}

/// A proc of the PID namespace of this process: whoever makes it must be there, and that are but children of whoever goes
/// there.
pub(super) fn new_in(image: &ImageReader, system: &FileSystem, first: &PidFd) -> Result<OwnedFd, RebuildError> {
    new(image, system, None, &|make| {
        let slot: OwnedFd = std::fs::File::open("/dev/null")?.into();
        clone::in_child(&|| {
            nsfs::enter(first, libc::CLONE_NEWPID)?;
            clone::in_child(&|| exec::duplicate_to(make()?.as_raw_fd(), slot.as_raw_fd()))
        })?;
        Ok(slot)
    })
}

fn new(
    image: &ImageReader,
    system: &FileSystem,
    maker: Option<Maker<'_>>,
    place: &dyn Fn(&Make<'_>) -> io::Result<OwnedFd>,
) -> Result<OwnedFd, RebuildError> {
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
    let make = || mount::new_mount(&kind, &options, 0);
    let mounted = match maker {
        // Nobody in the pod's own user namespace owns what is shown in another one; what shows a namespace is its owner's.
        Some(maker) if kind_shown(&system.kind).is_none() => made_by(maker.namespace, &make),
        _ => place(&make),
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
pub(super) fn in_slot(open: &dyn Fn() -> io::Result<OwnedFd>) -> io::Result<OwnedFd> {
    let slot: OwnedFd = std::fs::File::open("/dev/null")?.into();
    clone::in_child(&|| exec::duplicate_to(open()?.as_raw_fd(), slot.as_raw_fd()))?;
    Ok(slot)
}

/// What is to be mounted in the mount namespaces of an image, attached nowhere yet.
#[derive(Default)]
pub struct Sources {
    mounts: HashMap<(NamespaceId, usize), OwnedFd>,
    /// Names that mounted files have until they are where they are to be.
    names: HashMap<(NamespaceId, usize), removed::Name>,
}

impl Sources {
    /// Prepares what one of them shows, while nothing is attached: what is taken from others must have been prepared.
    pub(crate) fn prepare(
        &mut self,
        image: &ImageReader,
        id: NamespaceId,
        nest: &NestState,
        (maker, late, made): (Option<Maker<'_>>, &Late, &Made),
    ) -> Result<(), RebuildError> {
        let is_part = |state: &NestedMount| matches!(state.source, NestedSource::Part(..) | NestedSource::Removed(..));
        let ready = nest.mounts.iter().enumerate().filter(|(_, state)| !late.awaits(state));
        let (parts, wholes): (Vec<_>, Vec<_>) = ready.partition(|(_, state)| is_part(state));
        for (place, state) in wholes.into_iter().chain(parts) {
            let mounted = match &state.source {
                NestedSource::Home(path) => {
                    let path = as_path(path);
                    mount::copy_mount(path, false).rebuilding("binding", path.display())?
                }
                NestedSource::New(system) => match kind_shown(&system.kind).zip(system.of) {
                    None => new(image, system, maker, &here)?,
                    Some((kind, of)) => {
                        let gone = || RebuildError::Damaged(format!("namespace {} is not in it", of.0));
                        let shown = made.get(&of).ok_or_else(gone)?;
                        new(image, system, maker, &|make| {
                            in_slot(&|| {
                                nsfs::enter(shown, kind.flag())?;
                                make()
                            })
                        })?
                    }
                },
                NestedSource::Part(other, first, rest) => self.part(*other, *first, rest)?,
                NestedSource::Removed(holder, file) => {
                    let (mounted, name) = self.removed(image, holder, file, maker)?;
                    self.names.insert((id, place), name);
                    mounted
                }
            };
            self.put(id, place, state, mounted)?;
        }
        Ok(())
    }

    /// A copy of part of what another mount shows.
    pub(super) fn part(&self, other: NamespaceId, first: usize, rest: &[u8]) -> Result<OwnedFd, RebuildError> {
        let whole = path_of(self.find(other, first)?);
        // It may be a file.
        let inside = if rest.is_empty() { whole } else { whole.join(relative(rest)) };
        mount::copy_mount(&inside, false).rebuilding("binding", as_path(rest).display())
    }

    /// A file without a name in the file system of another mount, or in one of its own.
    fn removed(
        &self,
        image: &ImageReader,
        holder: &Holder,
        file: &RemovedFile,
        maker: Option<Maker<'_>>,
    ) -> Result<(OwnedFd, removed::Name), RebuildError> {
        let make = || match holder {
            Holder::Mount(other, first) => {
                removed::make(file, self.find(*other, *first)?, false).rebuilding("making", "a mounted file")
            }
            Holder::Nobody(system) => {
                let whole = new(image, system, maker, &here)?;
                removed::make(file, &whole, true).rebuilding("making", "a mounted file")
            }
        };
        match maker.and_then(|maker| maker.someone) {
            None => make(),
            Some(someone) => {
                capability::making_as(someone, make).rebuilding("becoming", "a user of a user namespace")?
            }
        }
    }

    /// Keeps what a mount shows, with the mount's options.
    pub(super) fn put(
        &mut self,
        id: NamespaceId,
        place: usize,
        state: &NestedMount,
        mounted: OwnedFd,
    ) -> Result<(), RebuildError> {
        mount::shape(mounted.as_fd(), state.attributes, 0)
            .rebuilding("setting the options of", as_path(&state.place).display())?;
        self.mounts.insert((id, place), mounted);
        Ok(())
    }

    /// What a mount shows.
    pub(super) fn find(&self, id: NamespaceId, place: usize) -> Result<&OwnedFd, RebuildError> {
        self.mounts.get(&(id, place)).ok_or_else(|| missing(place))
    }

    /// Forgets the others.
    pub(super) fn keep(&mut self, is_wanted: impl Fn(NamespaceId, usize) -> bool) {
        self.mounts.retain(|(id, place), _| is_wanted(*id, *place));
        self.names.retain(|(id, place), _| is_wanted(*id, *place));
    }
}

pub(super) fn missing(place: usize) -> RebuildError {
    RebuildError::Damaged(format!("mount {place} of a mount namespace is not in it"))
}
