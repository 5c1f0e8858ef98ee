//! Taking a process that has grown in the pod's own namespaces into those where it was.

use super::Body;
use super::{Kind, Membership, NamespaceId, NamespaceState, make, user};
use crate::process::credentials::CredentialsState;
use crate::tracee::Batch;

/// Into those of its namespaces, but for user and PID namespaces, that are `wanted`. What is outside its user namespace
/// cannot be changed any more once it is in that.
pub fn enter(
    membership: &Membership,
    wanted: &dyn Fn(NamespaceId) -> bool,
    number: &dyn Fn(NamespaceId) -> i32,
    batch: &mut Batch,
) {
    let others = membership.0.iter().filter(|(kind, _)| !matches!(kind, Kind::User | Kind::Pid));
    for (kind, id) in others.filter(|(_, id)| wanted(**id)) {
        go(*kind, number(*id), batch);
    }
}

/// Into a user namespace, as the user that it is to be. A process that has several threads could not; those that it clones
/// later are there as well.
pub fn enter_user(number: i32, batch: &mut Batch) {
    go(Kind::User, number, batch);
    // Whoever goes there is hidden from others of its kind.
    batch.call(libc::SYS_prctl, [libc::PR_SET_DUMPABLE.into(), 1i32.into()], "showing it to its relatives");
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
