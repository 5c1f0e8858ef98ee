//! Making the namespaces of an image, in the builder, before anything is put into them.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use super::{Body, Kind, NamespaceId, NamespaceState, links, time, user, uts};
use crate::error::{Context, RebuildError};
use crate::image::ImageReader;
use crate::mounts::{self, Frame, Late, LateMounts, Maker, Sources};
use crate::sys::{capability, clone, exec, namespace, nsfs};

/// Namespaces that have been made, by number.
pub type Made = HashMap<NamespaceId, OwnedFd>;

/// Makes every namespace, and says what is to be mounted in them when the processes are there. The caller must be its
/// process's only thread.
pub fn make(image: &ImageReader, states: &[NamespaceState]) -> Result<(Made, Option<LateMounts>), RebuildError> {
    let mut made = Made::new();
    for state in states {
        let what = || format!("a {} namespace", state.body.kind().name());
        let owner = owner(state, &made)?;
        let one = match &state.body {
            // The first process in it makes it; and what is mounted may show any other namespace.
            Body::Pid(_) | Body::Mount(_) => continue,
            Body::User(body) => user::restart(owner, group(state, states), body),
            body => below(owner, body),
        };
        made.insert(state.id, one.rebuilding("making", what())?);
    }
    let nests = || {
        states.iter().filter_map(|state| if let Body::Mount(nest) = &state.body { Some((state, nest)) } else { None })
    };
    let (mut sources, late) = (Sources::default(), Late::of(states));
    for (state, nest) in nests() {
        let (users, groups) = maps(state.owner, states);
        let user = |id| user::inside(id, &users);
        let group = |id| user::inside(id, &groups);
        let first = |maps: &[&[[u32; 3]]]| user::outside(maps.last()?.first()?[0], maps);
        let someone = first(&users).zip(first(&groups));
        let maker = owner(state, &made)?.map(|namespace| Maker { namespace, user: &user, group: &group, someone });
        sources.prepare(image, state.id, nest, (maker, &late, &made))?;
    }
    // Once it is attached in one, nothing can be taken from there for another any more.
    for (state, nest) in nests() {
        let one =
            mounts::make_nest(state.id, &Frame::of(states, state, nest, owner(state, &made)?), (&sources, &late))?;
        made.insert(state.id, one);
    }
    let late = LateMounts::of(states, late, sources, &made).rebuilding("keeping", "mounts for later")?;
    Ok((made, late))
}

/// Maps of user namespaces, from the outermost inwards.
type Maps<'s> = Vec<&'s [[u32; 3]]>;

/// What the user namespaces from the pod's own (excluded) to `innermost` map: users, and groups.
pub(super) fn maps(innermost: Option<NamespaceId>, states: &[NamespaceState]) -> (Maps<'_>, Maps<'_>) {
    let users = line(innermost, states).into_iter().filter_map(|state| match &state.body {
        Body::User(user) => Some((&user.users[..], &user.groups[..])),
        _ => None,
    });
    users.unzip()
}

fn owner<'m>(state: &NamespaceState, made: &'m Made) -> Result<Option<&'m OwnedFd>, RebuildError> {
    let Some(owner) = state.owner else { return Ok(None) };
    let missing = || RebuildError::Damaged(format!("the owner of namespace {} is not in it", state.id.0));
    made.get(&owner).map(Some).ok_or_else(missing)
}

/// The user namespaces from the pod's own (excluded) to `innermost`.
pub(super) fn line(innermost: Option<NamespaceId>, states: &[NamespaceState]) -> Vec<&NamespaceState> {
    let of = |id: NamespaceId| states.iter().find(|state| state.id == id);
    let mut line: Vec<_> =
        std::iter::successors(innermost.and_then(of), |state| state.owner.and_then(of)).take(32).collect();
    line.reverse();
    line
}

/// A group that has a name in the namespace's parent, as the pod's own names it.
fn group(state: &NamespaceState, states: &[NamespaceState]) -> u32 {
    let maps: Vec<&[[u32; 3]]> = line(state.owner, states).iter().filter_map(|s| s.groups()).collect();
    let first = maps.last().and_then(|map| map.first()).map_or(0, |line| line[0]);
    user::outside(first, &maps).unwrap_or(0)
}

impl NamespaceState {
    /// The lines of the group map of a user namespace.
    fn groups(&self) -> Option<&[[u32; 3]]> {
        match &self.body {
            Body::User(user) => Some(&user.groups),
            _ => None,
        }
    }
}

/// Makes a namespace below a user namespace, by a process of ours that goes there.
fn below(owner: Option<&OwnedFd>, body: &Body) -> io::Result<OwnedFd> {
    let made = user::slot()?;
    clone::in_child(&|| {
        if let Some(owner) = owner {
            nsfs::enter(owner.as_fd(), libc::CLONE_NEWUSER)?;
            capability::visible()?;
        }
        namespace::unshare(body.kind().flag())?;
        match body {
            Body::Network(links) => links::restart(links)?,
            Body::Uts(names) => uts::restart(names)?,
            Body::Time(offsets) => time::restart(offsets)?,
            Body::User(_) | Body::Pid(_) | Body::Mount(_) | Body::Ipc(_) | Body::Cgroup => {}
        }
        let name = if body.kind() == Kind::Time { "time_for_children" } else { body.kind().file() };
        let file = File::open(format!("/proc/self/ns/{name}"))?;
        exec::duplicate_to(file.as_raw_fd(), made.as_raw_fd())
    })?;
    Ok(made)
}
