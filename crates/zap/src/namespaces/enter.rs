//! Taking a process that has grown in the pod's own namespaces into those where it was.

use super::Body;
use super::{Kind, Membership, NamespaceId, NamespaceState, make, user};
use crate::process::credentials::{self, CredentialsState};
use crate::tracee::Batch;

/// Into all but user namespaces, after which nothing outside can be changed any more.
pub fn enter(membership: &Membership, number: &dyn Fn(NamespaceId) -> i32, batch: &mut Batch) {
    for (kind, id) in membership.0.iter().filter(|(kind, _)| !matches!(kind, Kind::User | Kind::Pid)) {
        go(*kind, number(*id), batch);
    }
}

/// Into its user namespace. A process that has several threads could not; those that it clones later are there as well.
/// It becomes the user that it was before: numbers are the pod's own until it is there.
pub fn enter_user(
    membership: &Membership,
    credentials: &CredentialsState,
    number: &dyn Fn(NamespaceId) -> i32,
    batch: &mut Batch,
) {
    if let Some(id) = membership.of(Kind::User) {
        credentials::identify(credentials, batch);
        go(Kind::User, number(id), batch);
    }
}

fn go(kind: Kind, number: i32, batch: &mut Batch) {
    let what = format!("entering a {} namespace", kind.name());
    batch.call(libc::SYS_setns, [number.into(), kind.flag().into()], what);
}

/// What a thread in a user namespace is called there.
#[derive(Clone, Copy)]
pub struct Names<'s>(pub &'s [NamespaceState]);

impl Names<'_> {
    /// The credentials with the names that users and groups have inside; `None` where one has no name there.
    pub fn inside(&self, innermost: NamespaceId, outside: &CredentialsState) -> Option<CredentialsState> {
        let line = make::line(Some(innermost), self.0);
        let maps = |of: fn(&user::UserState) -> &Vec<[u32; 3]>| -> Vec<&[[u32; 3]]> {
            line.iter()
                .filter_map(|s| if let Body::User(user) = &s.body { Some(&of(user)[..]) } else { None })
                .collect()
        };
        let (users, groups) = (maps(|u| &u.users), maps(|u| &u.groups));
        let all = |ids: &[u32; 4], maps: &[&[[u32; 3]]]| -> Option<[u32; 4]> {
            let named: Option<Vec<u32>> = ids.iter().map(|id| user::inside(*id, maps)).collect();
            named?.try_into().ok()
        };
        Some(CredentialsState {
            uids: all(&outside.uids, &users)?,
            gids: all(&outside.gids, &groups)?,
            groups: outside.groups.iter().map(|id| user::inside(*id, &groups)).collect::<Option<_>>()?,
            ..outside.clone()
        })
    }
}
