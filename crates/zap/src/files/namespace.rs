//! Handles on namespaces: files of `/proc/PID/ns`. The pod's own are opened anew; those made inside the pod are there before
//! any file is, but for PID namespaces, which the first process in them makes.

use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::late::Late;
use super::{Descriptor, FileKind, decoded, reopen};
use crate::error::{CaptureError, Context, RebuildError};
use crate::ids::{FileId, PodPid};
use crate::image::encode;
use crate::look::Look;
use crate::namespaces::{Kind, NamespaceId};
use crate::rebuild::Rebuild;

/// A handle on a namespace.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NamespaceFileState {
    /// What it is of.
    pub kind: Kind,
    /// Which one; `None`: the pod's own.
    pub namespace: Option<NamespaceId>,
    /// Of a PID namespace made inside the pod: a process that is in it.
    pub member: Option<PodPid>,
    /// Status flags.
    pub flags: i32,
}

pub(super) struct NamespaceFile;

/// What a handle is on: its link is `net:[4026531840]`.
fn kind_of(descriptor: &Descriptor) -> Option<Kind> {
    let (name, _) = descriptor.link.split_at(descriptor.link.windows(2).position(|two| two == b":[")?);
    Kind::ALL.into_iter().find(|kind| kind.file().as_bytes() == name)
}

fn look_at(look: &mut Look<'_>, descriptor: &Descriptor) -> Result<NamespaceFileState, CaptureError> {
    let kind = kind_of(descriptor).ok_or_else(|| descriptor.refuse("is a namespace of no known kind"))?;
    let namespace = look.namespaces.of_handle(kind, descriptor)?;
    let (mut member, holder) = (None, descriptor.subject.host);
    if let (Kind::Pid, Some(id)) = (kind, namespace) {
        // Who has a proc of another namespace there would look in vain.
        if look.namespaces.of(holder).of(Kind::Mount).is_some() {
            return Err(descriptor.refuse(
                "is a PID namespace made inside the pod, held by a process with mounts of its own, which cannot be \
                 checkpointed yet; have it closed first",
            ));
        }
        member = look.namespaces.member(id);
    }
    Ok(NamespaceFileState { kind, namespace, member, flags: descriptor.flags() })
}

impl FileKind for NamespaceFile {
    fn name(&self) -> &'static str {
        "namespace-file"
    }

    fn recognizes(&self, descriptor: &Descriptor) -> bool {
        kind_of(descriptor).is_some()
    }

    fn look_ahead(&self, look: &mut Look<'_>, descriptor: &Descriptor) -> Result<(), CaptureError> {
        look_at(look, descriptor).map(drop)
    }

    fn capture(&self, look: &mut Look<'_>, descriptor: &Descriptor) -> Result<Vec<u8>, CaptureError> {
        look_at(look, descriptor).map(|state| encode(&state))
    }

    fn late(&self, state: &[u8]) -> Result<Option<Late>, RebuildError> {
        let NamespaceFileState { member, flags, .. } = decoded(state)?;
        let path = |member: PodPid| format!("/proc/{member}/ns/pid").into_bytes();
        Ok(member.map(|member| Late::Path { path: path(member), flags, position: 0, nested: false }))
    }

    fn open(&self, rebuild: &mut Rebuild<'_>, _id: FileId, state: &[u8]) -> Result<OwnedFd, RebuildError> {
        let state: NamespaceFileState = decoded(state)?;
        let path = match state.namespace {
            // PID 1 never leaves the pod's own.
            None => PathBuf::from(format!("/proc/1/ns/{}", state.kind.file())),
            Some(id) => {
                let missing = || RebuildError::Damaged(format!("namespace {} is not in it", id.0));
                let made = rebuild.namespaces.get(&id).ok_or_else(missing)?;
                PathBuf::from(format!("/proc/self/fd/{}", made.as_raw_fd()))
            }
        };
        reopen::path(&path, state.flags).rebuilding("opening", path.display())
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;
    use crate::files::testing::subject;

    #[test]
    fn handles_are_known_by_their_links() {
        let of = |path: &str| {
            let file = File::open(path).unwrap().into();
            kind_of(&crate::files::describe(&subject(), 3, file).unwrap())
        };
        assert_eq!(of("/proc/self/ns/net"), Some(Kind::Network));
        assert_eq!(of("/proc/self/ns/time_for_children"), Some(Kind::Time));
        assert_eq!(of("/dev/null"), None);
    }
}
