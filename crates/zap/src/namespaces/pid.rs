//! PID namespaces. They are made with their first processes, when the tree grows: here is only how they lie in each other,
//! and who may number processes in them.

use serde::{Deserialize, Serialize};

use super::{Body, NamespaceId, NamespaceState};

/// A PID namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PidState {
    /// The one around it, which has a lower number; `None`: the pod's.
    pub parent: Option<NamespaceId>,
}

/// The namespaces of an image, as far as they say who may do what.
#[derive(Clone, Copy)]
pub struct Levels<'s>(pub &'s [NamespaceState]);

impl Levels<'_> {
    fn state(&self, id: NamespaceId) -> Option<&NamespaceState> {
        self.0.iter().find(|state| state.id == id)
    }

    /// The user namespace that owns a namespace; `None`: the pod's.
    pub fn owner(&self, id: NamespaceId) -> Option<NamespaceId> {
        self.state(id)?.owner
    }

    /// The PID namespaces from the pod's (excluded) to `innermost`.
    pub fn line(&self, innermost: Option<NamespaceId>) -> Vec<NamespaceId> {
        let around = |id: &NamespaceId| match self.state(*id)?.body {
            Body::Pid(PidState { parent }) => parent,
            _ => None,
        };
        let mut line: Vec<NamespaceId> = std::iter::successors(innermost, around).take(32).collect();
        line.reverse();
        line
    }

    /// Whether somebody with every capability in the user namespace `user` has them over what `owner` owns.
    pub fn rules(&self, user: Option<NamespaceId>, owner: Option<NamespaceId>) -> bool {
        std::iter::successors(Some(owner), |owner| owner.map(|id| self.owner(id))).take(33).any(|one| one == user)
    }
}
