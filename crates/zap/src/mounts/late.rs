//! Mounts of mount namespaces that can be made only when the processes are there: a proc belongs to the PID namespace of
//! whoever makes it, and that is made by its first process. What lies on such a mount, or shows part of it, waits with it.

use std::collections::HashSet;
use std::os::fd::OwnedFd;

use super::assemble::{Frame, attach_late};
use super::restart::{Sources, new_in};
use super::{FileSystem, Holder, NestState, NestedMount, NestedSource};
use crate::error::{Context, RebuildError};
use crate::files::mounts::as_path;
use crate::ids::{HostPid, PodPid};
use crate::image::ImageReader;
use crate::namespaces::{Body, Made, NamespaceId, NamespaceState};
use crate::sys::pidfd::PidFd;

/// The mounts of an image that come late: by the namespace, and their place in its list.
#[derive(Debug, Default)]
pub(crate) struct Late(HashSet<(NamespaceId, usize)>);

fn nests(states: &[NamespaceState]) -> impl Iterator<Item = (NamespaceId, &NestState)> + Clone {
    states.iter().filter_map(|state| match &state.body {
        Body::Mount(nest) => Some((state.id, nest)),
        _ => None,
    })
}

/// The PID namespace that a file system shows, if that was made inside the pod.
fn shows(system: &FileSystem) -> Option<NamespaceId> {
    system.of.filter(|_| system.kind == "proc")
}

impl Late {
    /// Finds them.
    pub(crate) fn of(states: &[NamespaceState]) -> Late {
        let mut late = Late::default();
        let all = || nests(states).flat_map(|(id, nest)| nest.mounts.iter().zip(0..).map(move |(m, at)| (id, at, m)));
        loop {
            let before = late.0.len();
            for (id, at, mount) in all() {
                if late.awaits(mount) || mount.on.is_some_and(|on| late.0.contains(&(id, on))) {
                    late.0.insert((id, at));
                }
            }
            if late.0.len() == before {
                return late;
            }
        }
    }

    /// Whether a mount comes late.
    pub(crate) fn contains(&self, id: NamespaceId, place: usize) -> bool {
        self.0.contains(&(id, place))
    }

    /// Whether what a mount shows is made late.
    pub(crate) fn awaits(&self, mount: &NestedMount) -> bool {
        match &mount.source {
            NestedSource::Home(_) | NestedSource::Removed(Holder::Nobody(_), _) => false,
            NestedSource::New(system) => shows(system).is_some(),
            NestedSource::Part(other, first, _) | NestedSource::Removed(Holder::Mount(other, first), _) => {
                self.0.contains(&(*other, *first))
            }
        }
    }
}

/// What is left to be mounted in the mount namespaces of an image.
pub struct LateMounts {
    states: Vec<NamespaceState>,
    late: Late,
    sources: Sources,
    namespaces: Made,
}

impl LateMounts {
    /// The namespaces and what is ready for them; `None` if nothing is left.
    pub(crate) fn of(
        states: &[NamespaceState],
        late: Late,
        mut sources: Sources,
        made: &Made,
    ) -> std::io::Result<Option<LateMounts>> {
        if late.0.is_empty() {
            return Ok(None);
        }
        sources.keep(|id, place| late.contains(id, place));
        let namespaces = made.iter().map(|(id, file)| Ok((*id, file.try_clone()?)));
        let namespaces = namespaces.collect::<std::io::Result<Made>>()?;
        Ok(Some(LateMounts { states: states.to_vec(), late, sources, namespaces }))
    }

    /// Mounts everything that is left; `firsts` are the first processes of PID namespaces. The caller is in the pod's own
    /// namespaces and its process's only thread.
    pub fn make(mut self, image: &ImageReader, firsts: &[(NamespaceId, PodPid)]) -> Result<(), RebuildError> {
        let states = std::mem::take(&mut self.states);
        for (id, nest) in nests(&states) {
            let awaited = nest.mounts.iter().enumerate().filter(|(_, mount)| self.late.awaits(mount));
            let (wholes, parts): (Vec<_>, Vec<_>) =
                awaited.partition(|(_, mount)| matches!(mount.source, NestedSource::New(_)));
            for (place, mount) in wholes.into_iter().chain(parts) {
                let source = self.source(image, mount, firsts)?;
                self.sources.put(id, place, mount, source)?;
            }
        }
        // Once it is attached in one, nothing can be taken from there for another any more.
        for (id, nest) in nests(&states) {
            self.attach(&states, id, nest)?;
        }
        Ok(())
    }

    fn source(
        &self,
        image: &ImageReader,
        mount: &NestedMount,
        firsts: &[(NamespaceId, PodPid)],
    ) -> Result<OwnedFd, RebuildError> {
        match &mount.source {
            NestedSource::New(system) => {
                let shown = shows(system).and_then(|id| firsts.iter().find(|(of, _)| *of == id));
                let missing = || RebuildError::Damaged("the PID namespace that a proc shows is not in it".into());
                let (_, first) = shown.ok_or_else(missing)?;
                let object = || format!("process {first}");
                // Seen from the pod, where this is.
                let first = PidFd::open(HostPid(first.0)).rebuilding("opening", object())?;
                new_in(image, system, &first)
            }
            NestedSource::Part(other, first, rest) => self.sources.part(*other, *first, rest),
            NestedSource::Home(_) | NestedSource::Removed(..) => {
                let source = std::io::Error::other("it does not come late");
                Err(source).rebuilding("binding", as_path(&mount.place).display())
            }
        }
    }

    fn attach(&self, states: &[NamespaceState], id: NamespaceId, nest: &NestState) -> Result<(), RebuildError> {
        let places: Vec<usize> = (0..nest.mounts.len()).filter(|place| self.late.contains(id, *place)).collect();
        let missing = || RebuildError::Damaged(format!("namespace {} is not in it", id.0));
        let made = |id| self.namespaces.get(&id).ok_or_else(missing);
        let Some(state) = states.iter().find(|state| state.id == id).filter(|_| !places.is_empty()) else {
            return Ok(());
        };
        let frame = Frame::of(states, state, nest, state.owner.map(made).transpose()?);
        let mounts: Vec<_> = places
            .iter()
            .map(|place| Ok((*place, self.sources.find(id, *place)?)))
            .collect::<Result<_, RebuildError>>()?;
        attach_late(made(id)?, &frame, &mounts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn proc(of: Option<NamespaceId>) -> NestedSource {
        let (kind, device, root) = ("proc".into(), b"proc".to_vec(), b"/".to_vec());
        NestedSource::New(FileSystem { kind, device, options: Vec::new(), contents: None, root, of })
    }

    fn mount(on: Option<usize>, source: NestedSource) -> NestedMount {
        NestedMount { on, place: b"/x".to_vec(), source, attributes: 0, shared: false, unbindable: false }
    }

    #[test]
    fn what_lies_on_a_late_mount_or_shows_part_of_it_is_late() {
        let (pid, nest) = (NamespaceId(0), NamespaceId(1));
        let mounts = vec![
            mount(None, NestedSource::Home(b"/".to_vec())),
            mount(Some(0), NestedSource::Part(nest, 3, b"/sys".to_vec())),
            mount(Some(0), proc(None)),
            mount(Some(0), proc(Some(pid))),
            mount(Some(3), NestedSource::Home(b"/dev/null".to_vec())),
        ];
        let state = NamespaceState { id: nest, owner: None, body: Body::Mount(NestState { mounts }) };
        let late = Late::of(&[state]);
        let places: Vec<usize> = (0..5).filter(|place| late.contains(nest, *place)).collect();
        assert_eq!(places, [1, 3, 4]);
    }
}
