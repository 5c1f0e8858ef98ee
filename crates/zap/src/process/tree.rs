//! How a process tree is grown again: who forks whom, before or after making a session, and which passing processes help.
//!
//! Sessions are inherited by fork alone. A process whose session was made by somebody who is not its parent any more is
//! forked in that session by a *phantom* (a process of ours that ends again), and so is its parent's adopted child, as it
//! was the first time.

use std::collections::{BTreeMap, BTreeSet};

use crate::ids::PodPid;
use crate::process::state::Place;

/// PID 1 of the pod.
pub const INIT: PodPid = PodPid(1);

/// What a node of the plan is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// A live process of the image.
    Live,
    /// A process that has ended and waits to be reaped.
    Zombie,
    /// A helper that ends once it has forked its children; nobody sees it.
    Phantom,
}

/// One process to be made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// Its PID.
    pub pid: PodPid,
    /// What it is.
    pub role: Role,
    /// Whether it makes a session of its own.
    pub leads_session: bool,
    /// Whom it forks before it makes its session.
    pub before: Vec<PodPid>,
    /// Whom it forks afterwards.
    pub after: Vec<PodPid>,
}

/// The whole plan.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Whom the builder forks as children of PID 1, in order.
    pub seeds: Vec<PodPid>,
    /// Every process to be made.
    pub nodes: BTreeMap<PodPid, Node>,
    /// Who joins which group, once everybody exists.
    pub groups: Vec<(PodPid, PodPid)>,
}

/// Why a tree cannot be grown again.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TreeError {
    /// A process names a parent that is not in the image.
    #[error("process {0} has a parent, {1}, that is not there")]
    NoParent(PodPid, PodPid),
    /// No order of forks gives this process its session.
    #[error("process {0} cannot be put into session {1} again")]
    Session(PodPid, PodPid),
    /// PIDs are exhausted.
    #[error("no PID is free for a helper")]
    NoPid,
}

struct Planner<'a> {
    places: BTreeMap<PodPid, &'a Place>,
    plan: Plan,
    taken: BTreeSet<PodPid>,
}

/// Plans the growth of a tree. Children of PID 1 are forked by the builder, which is in PID 1's session.
pub fn plan(places: &[Place], init_session: PodPid) -> Result<Plan, TreeError> {
    let mut taken: BTreeSet<PodPid> = places.iter().flat_map(|p| [p.pid, p.parent, p.group, p.session]).collect();
    taken.insert(INIT);
    let places: BTreeMap<PodPid, &Place> = places.iter().map(|place| (place.pid, place)).collect();
    let mut planner = Planner { places, plan: Plan::default(), taken };
    for place in planner.places.values() {
        let role = if place.ended.is_some() { Role::Zombie } else { Role::Live };
        let node = Node {
            pid: place.pid,
            role,
            leads_session: place.session == place.pid,
            before: Vec::new(),
            after: Vec::new(),
        };
        planner.plan.nodes.insert(place.pid, node);
    }
    let pids: Vec<PodPid> = planner.places.keys().copied().collect();
    for pid in pids {
        planner.attach(pid, init_session)?;
    }
    planner.join_groups(init_session)?;
    Ok(planner.plan)
}

impl Planner<'_> {
    /// Decides who forks `pid`.
    fn attach(&mut self, pid: PodPid, init_session: PodPid) -> Result<(), TreeError> {
        let place = self.places[&pid];
        let (parent, session) = (place.parent, place.session);
        if parent != INIT && !self.places.contains_key(&parent) {
            return Err(TreeError::NoParent(pid, parent));
        }
        if session == pid {
            return self.fork_by(parent, pid);
        }
        let parent_session = if parent == INIT { init_session } else { self.places[&parent].session };
        if session == parent_session {
            return self.fork_by(parent, pid);
        }
        if parent != INIT
            && self.places[&parent].session == parent
            && self.birth_session(parent, init_session) == session
        {
            self.node(parent).before.push(pid);
            return Ok(());
        }
        self.fork_by_phantom(pid, session)
    }

    /// The session into which a session leader is born: its forker's.
    fn birth_session(&self, leader: PodPid, init_session: PodPid) -> PodPid {
        match self.places.get(&self.places[&leader].parent) {
            Some(parent) => parent.session,
            None => init_session,
        }
    }

    fn node(&mut self, pid: PodPid) -> &mut Node {
        self.plan.nodes.entry(pid).or_insert_with(|| Node {
            pid,
            role: Role::Phantom,
            leads_session: false,
            before: Vec::new(),
            after: Vec::new(),
        })
    }

    fn fork_by(&mut self, parent: PodPid, child: PodPid) -> Result<(), TreeError> {
        match parent {
            INIT => self.plan.seeds.push(child),
            _ => self.node(parent).after.push(child),
        }
        Ok(())
    }

    /// Has a passing process in `session` fork `pid`, which PID 1 adopts when the passing process ends.
    fn fork_by_phantom(&mut self, pid: PodPid, session: PodPid) -> Result<(), TreeError> {
        if self.places[&pid].parent != INIT {
            return Err(TreeError::Session(pid, session));
        }
        if self.places.contains_key(&session) {
            let helper = self.free_pid()?;
            self.node(session).after.push(helper);
            self.node(helper).after.push(pid);
            return Ok(());
        }
        if !self.plan.nodes.contains_key(&session) {
            self.node(session).leads_session = true;
            self.plan.seeds.push(session);
        }
        self.node(session).after.push(pid);
        Ok(())
    }

    /// Groups whose leader is gone are made by a phantom with the leader's PID.
    fn join_groups(&mut self, init_session: PodPid) -> Result<(), TreeError> {
        let members: Vec<(PodPid, PodPid, PodPid)> =
            self.places.values().map(|place| (place.pid, place.group, place.session)).collect();
        for (pid, group, session) in members {
            if session == pid {
                continue; // a session leader leads its group, and cannot leave it
            }
            if !self.plan.nodes.contains_key(&group) && group != INIT && group != init_session {
                self.node(group);
                match self.places.get(&session) {
                    Some(_) => self.node(session).after.push(group),
                    None if session == init_session => self.plan.seeds.push(group),
                    None => self.node(session).after.push(group),
                }
                self.plan.groups.push((group, group));
            }
            self.plan.groups.push((pid, group));
        }
        // Leaders first: a group exists once its leader has made it.
        self.plan.groups.sort_by_key(|(pid, group)| (pid != group, *pid));
        Ok(())
    }

    fn free_pid(&mut self) -> Result<PodPid, TreeError> {
        let free = (300..32_000).rev().map(PodPid).find(|pid| !self.taken.contains(pid)).ok_or(TreeError::NoPid)?;
        self.taken.insert(free);
        Ok(free)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(pid: i32, parent: i32, group: i32, session: i32) -> Place {
        let [pid, parent, group, session] = [pid, parent, group, session].map(PodPid);
        Place { pid, parent, group, session, exit_signal: libc::SIGCHLD, ended: None }
    }

    #[test]
    fn a_server_with_workers() {
        let plan = plan(&[place(2, 1, 2, 2), place(7, 2, 2, 2), place(8, 2, 2, 2)], INIT).unwrap();
        assert_eq!(plan.seeds, [PodPid(2)]);
        assert_eq!(plan.nodes[&PodPid(2)].after, [PodPid(7), PodPid(8)]);
        assert!(plan.nodes[&PodPid(2)].leads_session);
    }

    #[test]
    fn a_daemon_whose_session_leader_has_left() {
        let plan = plan(&[place(2, 1, 2, 2), place(9, 1, 8, 8)], INIT).unwrap();
        assert_eq!(plan.seeds, [PodPid(2), PodPid(8)]);
        let phantom = &plan.nodes[&PodPid(8)];
        assert_eq!((phantom.role, phantom.leads_session), (Role::Phantom, true));
        assert_eq!(phantom.after, [PodPid(9)]);
        assert!(plan.groups.contains(&(PodPid(9), PodPid(8))));
    }

    #[test]
    fn an_orphan_of_a_living_session_goes_through_a_helper() {
        let plan = plan(&[place(2, 1, 2, 2), place(5, 1, 5, 2)], INIT).unwrap();
        let helper = plan.nodes[&PodPid(2)].after[0];
        assert_eq!(plan.nodes[&helper].role, Role::Phantom);
        assert_eq!(plan.nodes[&helper].after, [PodPid(5)]);
    }

    #[test]
    fn a_child_from_before_its_parents_session() {
        let plan = plan(&[place(2, 1, 2, 2), place(3, 2, 3, 3), place(4, 3, 2, 2)], INIT).unwrap();
        assert_eq!(plan.nodes[&PodPid(3)].before, [PodPid(4)]);
    }

    #[test]
    fn a_background_job_whose_group_leader_has_left() {
        let plan = plan(&[place(2, 1, 2, 2), place(6, 2, 5, 2)], INIT).unwrap();
        assert_eq!(plan.nodes[&PodPid(5)].role, Role::Phantom);
        assert_eq!(plan.groups[0], (PodPid(5), PodPid(5)));
    }
}
