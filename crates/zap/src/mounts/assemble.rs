//! Mount namespaces put together, in the builder, out of mounts that are attached nowhere yet.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use nix::fcntl::{OFlag, openat};
use nix::sys::stat::Mode;

use super::late::Late;
use super::restart::{Sources, in_slot, missing, propagation};
use super::table::join;
use super::{Holder, NestState, NestedMount, NestedSource};
use crate::error::{Context, RebuildError};
use crate::files::mounts::{as_path, relative};
use crate::namespaces::{NamespaceId, NamespaceState};
use crate::sys::{capability, clone, mount, namespace, nsfs};

/// Makes a mount namespace that belongs to the user namespace `owner` (`None`: the pod's own), without what comes late.
pub(crate) fn make_nest(
    id: NamespaceId,
    frame: &Frame<'_>,
    (sources, late): (&Sources, &Late),
) -> Result<OwnedFd, RebuildError> {
    let nest = frame.nest;
    let places: Vec<usize> = (0..nest.mounts.len()).filter(|place| !late.contains(id, *place)).collect();
    let mounts: Vec<(usize, &OwnedFd)> =
        places.iter().map(|place| Ok((*place, sources.find(id, *place)?))).collect::<Result<_, RebuildError>>()?;
    if places.first() != Some(&0) {
        return Err(missing(0));
    }
    let paths = paths(nest)?;
    let made = in_slot(&|| {
        // Seen from its new root there may be no /proc.
        let itself = crate::sys::file::open_path(Path::new("/proc/self"))?;
        namespace::unshare(libc::CLONE_NEWNS)?;
        mount::make_all_private()?;
        let mounts = Assembly::of(frame, &mounts)?;
        mounts.assemble(nest, &|_, root| {
            mount::attach(root, Path::new(DESK))?;
            nix::unistd::fchdir(root)?;
            Ok(())
        })?;
        mount::pivot_here()?;
        propagate(nest, &paths, &|place| !late.contains(id, place))?;
        let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC;
        Ok(openat(&itself, "ns/mnt", flags, Mode::empty())?)
    });
    made.rebuilding("making", "a mount namespace")
}

/// Puts mounts that come late into a mount namespace.
pub(super) fn attach_late(
    namespace: &OwnedFd,
    frame: &Frame<'_>,
    mounts: &[(usize, &OwnedFd)],
) -> Result<(), RebuildError> {
    let nest = frame.nest;
    let paths = paths(nest)?;
    let attached = clone::in_child(&|| {
        namespace::unshare(libc::CLONE_NEWNS)?;
        mount::make_all_private()?;
        let ready = Assembly::of(frame, mounts)?;
        nsfs::enter(namespace, libc::CLONE_NEWNS)?;
        ready.assemble(nest, &|place, mounted| mount::attach(mounted, as_path(&paths[place])))?;
        propagate(nest, &paths, &|place| mounts.iter().any(|(late, _)| *late == place))
    });
    attached.rebuilding("mounting in", "a mount namespace")
}

/// Gives those mounts their propagation, each of which is on top where it is.
fn propagate(nest: &NestState, paths: &[Vec<u8>], wanted: &dyn Fn(usize) -> bool) -> io::Result<()> {
    for (_, (state, path)) in nest.mounts.iter().zip(paths).enumerate().filter(|(place, _)| wanted(*place)) {
        if let Some(propagation) = propagation(state.shared, state.unbindable) {
            mount::propagate(as_path(path), propagation)?;
        }
    }
    Ok(())
}

/// Any directory that every pod has.
const DESK: &str = "/proc";

/// What a mount namespace is to be.
pub(crate) struct Frame<'f> {
    nest: &'f NestState,
    /// The user namespace that it belongs to (`None`: the pod's own).
    owner: Option<&'f OwnedFd>,
    /// Which of its mounts show what others have mounted.
    foreign: Vec<bool>,
}

impl<'f> Frame<'f> {
    /// That of a mount namespace of the image, whose owner is that user namespace.
    pub(crate) fn of(
        states: &[NamespaceState],
        state: &NamespaceState,
        nest: &'f NestState,
        owner: Option<&'f OwnedFd>,
    ) -> Frame<'f> {
        let owner_of = |id| states.iter().find(|other| other.id == id).and_then(|other| other.owner);
        let is_foreign = |mount: &NestedMount| match &mount.source {
            NestedSource::Home(_) => true,
            NestedSource::Part(other, ..) | NestedSource::Removed(Holder::Mount(other, _), _) => {
                owner_of(*other) != state.owner
            }
            NestedSource::New(_) | NestedSource::Removed(Holder::Nobody(_), _) => false,
        };
        Frame { nest, owner, foreign: nest.mounts.iter().map(is_foreign).collect() }
    }
}

/// Mounts of a namespace, by their places in its list, to be put where they are to be.
struct Assembly {
    mounts: BTreeMap<usize, OwnedFd>,
    /// Those that are where they are to be, on another one.
    tied: HashSet<usize>,
}

impl Assembly {
    /// Has them ready. The caller must be in a mount namespace of its own, and is afterwards in the user namespace that the
    /// new one belongs to.
    fn of(frame: &Frame<'_>, mounts: &[(usize, &OwnedFd)]) -> io::Result<Assembly> {
        match frame.owner {
            None => {
                let copies = mounts.iter().map(|(place, mounted)| Ok((*place, mounted.try_clone()?)));
                Ok(Assembly { mounts: copies.collect::<io::Result<_>>()?, tied: HashSet::new() })
            }
            Some(owner) => Self::for_others(owner, frame, mounts),
        }
    }

    /// Of what others have mounted, nothing that lies on something else of theirs may be taken away there to see what is
    /// below. The kernel ties such mounts together when a namespace is copied for other owners.
    fn for_others(owner: &OwnedFd, frame: &Frame<'_>, mounts: &[(usize, &OwnedFd)]) -> io::Result<Assembly> {
        let Frame { nest, foreign, .. } = frame;
        let given: HashMap<usize, &OwnedFd> = mounts.iter().copied().collect();
        let on = |place: usize| nest.mounts[place].on.filter(|on| given.contains_key(on));
        let tied_to = |place: usize| on(place).filter(|on| foreign[place] && foreign[*on]);
        let desk = Path::new(DESK);
        mount::attach(mount::new_mount(c"tmpfs", &[], 0)?, desk)?;
        for (place, mounted) in mounts {
            if let Some(on) = tied_to(*place) {
                mount::attach_on(mounted, given[&on], relative(&nest.mounts[*place].place))?;
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
        let mut ready = Assembly { mounts: BTreeMap::new(), tied: HashSet::new() };
        for (place, _) in mounts {
            let copy = match tied_to(*place) {
                Some(on) => {
                    ready.tied.insert(*place);
                    mount::open_mount(&ready.mounts[&on], relative(&nest.mounts[*place].place))?
                }
                None => mount::copy_mount(&desk.join(place.to_string()), true)?,
            };
            ready.mounts.insert(*place, copy);
        }
        Ok(ready)
    }

    /// Puts them on each other; `first` puts those somewhere that are on none of them.
    fn assemble(&self, nest: &NestState, first: &dyn Fn(usize, BorrowedFd<'_>) -> io::Result<()>) -> io::Result<()> {
        for (place, mounted) in self.mounts.iter().filter(|(place, _)| !self.tied.contains(place)) {
            let state = &nest.mounts[*place];
            match state.on.and_then(|on| self.mounts.get(&on)) {
                Some(on) => mount::attach_on(mounted, on, relative(&state.place))?,
                None => first(*place, mounted.as_fd())?,
            }
        }
        Ok(())
    }
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
