//! How a process tree is grown again: who forks whom, before or after making a session, and which passing processes help.
//!
//! Sessions are inherited by fork alone. A process whose session was made by somebody who is not its parent any more is
//! forked in that session by a *phantom* (a process of ours that ends again), and so is its parent's adopted child, as it
//! was the first time.

use std::collections::{BTreeMap, BTreeSet};

use crate::ids::PodPid;
use crate::namespaces::NamespaceId;
use crate::process::state::{Inner, Place};

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
    /// Its PID namespace, if that was made inside the pod.
    pub namespace: Option<NamespaceId>,
    /// Its numbers in PID namespaces made inside the pod, the outermost first.
    pub numbers: Vec<i32>,
    /// Of the first process of a PID namespace: numbers for whoever takes it to the namespace's owner, the pod's first.
    pub helper: Vec<i32>,
}

impl Node {
    /// Whether it is the first process of its PID namespace.
    pub fn is_first(&self) -> bool {
        self.numbers.last() == Some(&1)
    }

    /// What it is called that many PID namespaces below the pod's; 0: nothing.
    pub fn seen_from(&self, level: usize) -> i32 {
        if level == 0 { self.pid.0 } else { self.numbers.get(level - 1).copied().unwrap_or(0) }
    }
}

/// The whole plan.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Whom the builder forks as children of PID 1, in order.
    pub seeds: Vec<PodPid>,
    /// Every process to be made.
    pub nodes: BTreeMap<PodPid, Node>,
    /// Who joins which group, once everybody exists, and what it calls it.
    pub groups: Vec<(PodPid, PodPid, i32)>,
    /// Helpers whose children a subreaper adopts, and who that is. They end after the other helpers, when those processes
    /// are subreapers.
    pub adopters: BTreeMap<PodPid, PodPid>,
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
    /// Numbers that somebody has in any PID namespace made inside the pod.
    taken_inside: BTreeSet<i32>,
    /// The sessions into which session leaders are born.
    births: BTreeMap<PodPid, PodPid>,
}

/// Plans the growth of a tree. Children of PID 1 are forked by the builder, which is in PID 1's session.
pub fn plan(places: &[Place], init_session: PodPid) -> Result<Plan, TreeError> {
    let mut taken: BTreeSet<PodPid> = places.iter().flat_map(|p| [p.pid, p.parent, p.group, p.session]).collect();
    taken.insert(INIT);
    let inside = |place: &Place| place.inner.clone();
    let taken_inside =
        places.iter().map(inside).flat_map(|inner| [inner.pids, inner.groups, inner.sessions]).flatten().collect();
    let places: BTreeMap<PodPid, &Place> = places.iter().map(|place| (place.pid, place)).collect();
    let births = births(&places, init_session);
    let mut planner = Planner { places, plan: Plan::default(), taken, taken_inside, births };
    for place in planner.places.values() {
        let role = if place.ended.is_some() { Role::Zombie } else { Role::Live };
        let node = Node {
            pid: place.pid,
            role,
            leads_session: place.session == place.pid,
            before: Vec::new(),
            after: Vec::new(),
            namespace: place.inner.namespace,
            numbers: place.inner.pids.clone(),
            helper: Vec::new(),
        };
        planner.plan.nodes.insert(place.pid, node);
    }
    planner.give_helpers()?;
    let pids: Vec<PodPid> = planner.places.keys().copied().collect();
    for pid in pids {
        planner.attach(pid, init_session)?;
    }
    planner.join_groups(init_session)?;
    Ok(planner.plan)
}

/// The session into which each session leader is born: its parent's, or that of a child of its own that was born before it
/// made its session.
fn births(places: &BTreeMap<PodPid, &Place>, init_session: PodPid) -> BTreeMap<PodPid, PodPid> {
    let mut children: BTreeMap<PodPid, Vec<PodPid>> = BTreeMap::new();
    for place in places.values() {
        children.entry(place.cloner()).or_default().push(place.pid);
    }
    // Parents come before their children.
    let mut order: Vec<PodPid> = children.get(&INIT).cloned().unwrap_or_default();
    let mut next = 0;
    while let Some(pid) = order.get(next) {
        order.extend(children.get(pid).into_iter().flatten());
        next += 1;
    }
    let leads = |pid: &PodPid| places.get(pid).is_some_and(|place| place.session == *pid);
    let mut wanted: BTreeMap<PodPid, PodPid> = BTreeMap::new();
    for pid in order.iter().rev().filter(|pid| leads(pid)) {
        let of_child = |child: &PodPid| match leads(child) {
            true => wanted.get(child).copied(),
            false => Some(places[child].session),
        };
        let foreign = children.get(pid).into_iter().flatten().filter_map(of_child).find(|session| session != pid);
        wanted.extend(foreign.map(|session| (*pid, session)));
    }
    let mut births = BTreeMap::new();
    for pid in order.iter().filter(|pid| leads(pid)) {
        let parent = places[pid].cloner();
        let usual = places.get(&parent).map_or(init_session, |parent| parent.session);
        // A session whose leader came from elsewhere was there before; in any other an orphan was born, adopted since.
        let was_there = |wanted: &&PodPid| {
            births.get(&parent) == Some(*wanted) || places.contains_key(wanted) && !descends(places, **wanted, *pid)
        };
        let birth = wanted.get(pid).filter(was_there).copied().unwrap_or(usual);
        births.insert(*pid, birth);
    }
    births
}

/// Whether `process` is a descendant of `ancestor`.
fn descends(places: &BTreeMap<PodPid, &Place>, process: PodPid, ancestor: PodPid) -> bool {
    let parent = |pid: &PodPid| places.get(pid).map(|place| place.parent);
    std::iter::successors(parent(&process), parent).take(places.len()).any(|pid| pid == ancestor)
}

impl Planner<'_> {
    /// Decides who forks `pid`.
    fn attach(&mut self, pid: PodPid, init_session: PodPid) -> Result<(), TreeError> {
        let place = self.places[&pid];
        let (parent, session) = (place.cloner(), place.session);
        let born_at_home = match self.births.get(&pid) {
            Some(born) => *born == init_session,
            None => session == init_session,
        };
        if parent == INIT && place.level() > 0 && born_at_home {
            return self.fork_by_passer_by(pid);
        }
        if parent != INIT && !self.places.contains_key(&parent) {
            return Err(TreeError::NoParent(pid, parent));
        }
        let parent_session = if parent == INIT { init_session } else { self.places[&parent].session };
        let born = if session == pid { self.births.get(&pid).copied().unwrap_or(parent_session) } else { session };
        if born == parent_session {
            return self.fork_by(parent, pid);
        }
        if self.births.get(&parent) == Some(&born) {
            self.node(parent).before.push(pid);
            return Ok(());
        }
        if place.cloner.is_some() {
            return Err(TreeError::Session(pid, session));
        }
        self.fork_by_phantom(pid, born)
    }

    fn node(&mut self, pid: PodPid) -> &mut Node {
        self.plan.nodes.entry(pid).or_insert_with(|| Node {
            pid,
            role: Role::Phantom,
            leads_session: false,
            before: Vec::new(),
            after: Vec::new(),
            namespace: None,
            numbers: Vec::new(),
            helper: Vec::new(),
        })
    }

    /// A phantom in the PID namespace of `member`, called there as `numbers` say, or as nobody is.
    fn phantom(&mut self, pid: PodPid, member: PodPid, numbers: Option<Vec<i32>>) -> Result<(), TreeError> {
        let inner = self.inner(member);
        let numbers = match numbers {
            Some(numbers) => numbers,
            None => inner.pids.iter().map(|_| self.free_inside()).collect::<Result<_, _>>()?,
        };
        let node = self.node(pid);
        (node.namespace, node.numbers) = (inner.namespace, numbers);
        Ok(())
    }

    fn inner(&self, pid: PodPid) -> Inner {
        self.places.get(&pid).map(|place| place.inner.clone()).unwrap_or_default()
    }

    /// Whoever makes a PID namespace may need somebody to go to its owner.
    fn give_helpers(&mut self) -> Result<(), TreeError> {
        let first = self.plan.nodes.values().filter(|node| node.is_first());
        let first: Vec<(PodPid, usize)> = first.map(|node| (node.pid, node.numbers.len())).collect();
        for (pid, levels) in first {
            let mut helper = vec![self.free_pid()?.0];
            for _ in 1..levels {
                helper.push(self.free_inside()?);
            }
            self.node(pid).helper = helper;
        }
        Ok(())
    }

    /// A child of PID 1 in a PID namespace made inside the pod: PID 1 adopted it from somebody outside that namespace.
    fn fork_by_passer_by(&mut self, pid: PodPid) -> Result<(), TreeError> {
        let helper = self.free_pid()?;
        self.node(helper).after.push(pid);
        self.plan.seeds.push(helper);
        Ok(())
    }

    fn fork_by(&mut self, parent: PodPid, child: PodPid) -> Result<(), TreeError> {
        match parent {
            INIT => self.plan.seeds.push(child),
            _ => self.node(parent).after.push(child),
        }
        Ok(())
    }

    /// Has a passing process in `session` fork `pid`, which its parent adopts when the passing process ends: PID 1, the first
    /// process of a PID namespace, or a subreaper.
    fn fork_by_phantom(&mut self, pid: PodPid, session: PodPid) -> Result<(), TreeError> {
        let (parent, inner) = (self.places[&pid].parent, self.inner(pid));
        let is_home = |inner: &Inner| inner.namespace.is_none();
        let adopts =
            parent == INIT || self.places[&parent].is_first() && self.inner(parent).namespace == inner.namespace;
        let subreaper = (!adopts).then_some(parent);
        if subreaper.is_some() && !(is_home(&inner) && is_home(&self.inner(parent))) {
            return Err(TreeError::Session(pid, session));
        }
        // Whoever passes is in the PID namespace whose first process is to adopt its child.
        let adopter = if parent == INIT { None } else { inner.namespace };
        if self.places.contains_key(&session) {
            let is_below = subreaper.is_none_or(|subreaper| descends(&self.places, session, subreaper));
            if self.inner(session).namespace != adopter || !is_below {
                return Err(TreeError::Session(pid, session));
            }
            let helper = self.free_pid()?;
            self.phantom(helper, session, None)?;
            self.node(session).after.push(helper);
            self.node(helper).after.push(pid);
            self.plan.adopters.extend(subreaper.map(|subreaper| (helper, subreaper)));
            return Ok(());
        }
        if !self.plan.nodes.contains_key(&session) {
            if parent != INIT && inner.sessions.last() == Some(&0) {
                return Err(TreeError::Session(pid, session));
            }
            if parent != INIT {
                self.phantom(session, pid, Some(inner.sessions))?;
            }
            self.node(session).leads_session = true;
            self.fork_by(parent, session)?;
            self.plan.adopters.extend(subreaper.map(|subreaper| (session, subreaper)));
        } else if self.plan.adopters.get(&session).copied() != subreaper {
            return Err(TreeError::Session(pid, session));
        }
        self.node(session).after.push(pid);
        Ok(())
    }

    /// Groups whose leader is gone are made by a phantom with the leader's PID.
    fn join_groups(&mut self, init_session: PodPid) -> Result<(), TreeError> {
        let members: Vec<Place> = self.places.values().map(|place| Place::clone(place)).collect();
        for place in members {
            let Place { pid, group, session, .. } = place;
            if session == pid {
                continue; // a session leader leads its group, and cannot leave it
            }
            let own = place.own_group();
            if own == 0 {
                continue; // it was born into a group outside its PID namespace
            }
            if !self.plan.nodes.contains_key(&group) && group != INIT && group != init_session {
                self.phantom(group, pid, Some(place.inner.groups))?;
                match self.places.get(&session) {
                    Some(_) => self.node(session).after.push(group),
                    None if session == init_session => self.plan.seeds.push(group),
                    None => self.node(session).after.push(group),
                }
                self.plan.groups.push((group, group, 0));
            }
            self.plan.groups.push((pid, group, own));
        }
        // Leaders first: a group exists once its leader has made it.
        self.plan.groups.sort_by_key(|(pid, group, _)| (pid != group, *pid));
        Ok(())
    }

    fn free_pid(&mut self) -> Result<PodPid, TreeError> {
        let free = (300..32_000).rev().map(PodPid).find(|pid| !self.taken.contains(pid)).ok_or(TreeError::NoPid)?;
        self.taken.insert(free);
        Ok(free)
    }

    fn free_inside(&mut self) -> Result<i32, TreeError> {
        let free = (300..32_000).rev().find(|pid| !self.taken_inside.contains(pid)).ok_or(TreeError::NoPid)?;
        self.taken_inside.insert(free);
        Ok(free)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(pid: i32, parent: i32, group: i32, session: i32) -> Place {
        let [pid, parent, group, session] = [pid, parent, group, session].map(PodPid);
        Place {
            pid,
            parent,
            group,
            session,
            exit_signal: libc::SIGCHLD,
            ended: None,
            cloner: None,
            inner: Inner::default(),
        }
    }

    /// In a PID namespace right below the pod's: what it, its group and its session are called there.
    fn inside(place: Place, numbers: [i32; 3]) -> Place {
        let [pids, groups, sessions] = numbers.map(|number| vec![number]);
        Place { inner: Inner { namespace: Some(NamespaceId(0)), pids, groups, sessions }, ..place }
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
        assert!(plan.groups.contains(&(PodPid(9), PodPid(8), 8)));
    }

    #[test]
    fn an_orphan_of_a_living_session_goes_through_a_helper() {
        let plan = plan(&[place(2, 1, 2, 2), place(5, 1, 5, 2)], INIT).unwrap();
        let helper = plan.nodes[&PodPid(2)].after[0];
        assert_eq!(plan.nodes[&helper].role, Role::Phantom);
        assert_eq!(plan.nodes[&helper].after, [PodPid(5)]);
    }

    #[test]
    fn orphans_that_a_subreaper_adopted() {
        // 3's session, and 9's leader has left; both 5 and 9 were adopted by 2.
        let places = [place(2, 1, 2, 2), place(3, 2, 3, 3), place(5, 2, 3, 3), place(9, 2, 8, 8)];
        let plan = plan(&places, INIT).unwrap();
        let helper = plan.nodes[&PodPid(3)].after[0];
        assert_eq!(plan.nodes[&helper].after, [PodPid(5)]);
        assert!(plan.nodes[&PodPid(2)].after.contains(&PodPid(8)));
        assert_eq!(plan.nodes[&PodPid(8)].after, [PodPid(9)]);
        assert_eq!(plan.adopters, BTreeMap::from([(helper, PodPid(2)), (PodPid(8), PodPid(2))]));
    }

    #[test]
    fn a_sibling_is_cloned_by_who_shares_with_it() {
        let cloned_by = |place: Place, cloner: i32| Place { cloner: Some(PodPid(cloner)), ..place };
        let places = [place(2, 1, 2, 2), cloned_by(place(3, 1, 2, 2), 2), place(4, 3, 2, 2)];
        let after = |places: &[Place], pid: i32| plan(places, INIT).unwrap().nodes[&PodPid(pid)].after.clone();
        assert_eq!(plan(&places, INIT).unwrap().seeds, [PodPid(2)]);
        assert_eq!((after(&places, 2), after(&places, 3)), (vec![PodPid(3)], vec![PodPid(4)]));
        // From before its cloner made its session.
        let places = [place(2, 1, 2, 2), place(3, 2, 3, 3), cloned_by(place(4, 2, 2, 2), 3)];
        assert_eq!(plan(&places, INIT).unwrap().nodes[&PodPid(3)].before, [PodPid(4)]);
        // No passer-by could have its parent adopt it.
        let places = [place(2, 1, 2, 2), cloned_by(place(3, 1, 3, 9), 2)];
        assert_eq!(plan(&places, INIT).unwrap_err(), TreeError::Session(PodPid(3), PodPid(9)));
    }

    #[test]
    fn a_child_from_before_its_parents_session() {
        let plan = plan(&[place(2, 1, 2, 2), place(3, 2, 3, 3), place(4, 3, 2, 2)], INIT).unwrap();
        assert_eq!(plan.nodes[&PodPid(3)].before, [PodPid(4)]);
    }

    #[test]
    fn a_child_from_before_the_sessions_of_its_parent_and_theirs() {
        let places = [place(2, 1, 2, 2), place(3, 2, 3, 3), place(4, 3, 4, 4), place(5, 4, 2, 2), place(6, 3, 6, 6)];
        let plan = plan(&places, INIT).unwrap();
        assert_eq!(plan.nodes[&PodPid(3)].before, [PodPid(4)]);
        assert_eq!(plan.nodes[&PodPid(3)].after, [PodPid(6)]);
        assert_eq!(plan.nodes[&PodPid(4)].before, [PodPid(5)]);
    }

    #[test]
    fn an_orphan_with_a_session_and_a_child_from_before() {
        let plan = plan(&[place(2, 1, 2, 2), place(4, 1, 4, 4), place(5, 4, 2, 2)], INIT).unwrap();
        let helper = plan.nodes[&PodPid(2)].after[0];
        assert_eq!(plan.nodes[&helper].after, [PodPid(4)]);
        assert_eq!(plan.nodes[&PodPid(4)].before, [PodPid(5)]);
    }

    #[test]
    fn a_background_job_whose_group_leader_has_left() {
        let plan = plan(&[place(2, 1, 2, 2), place(6, 2, 5, 2)], INIT).unwrap();
        assert_eq!(plan.nodes[&PodPid(5)].role, Role::Phantom);
        assert_eq!(plan.groups[0], (PodPid(5), PodPid(5), 0));
    }

    #[test]
    fn an_orphan_is_adopted_inside() {
        let places = [
            place(2, 1, 2, 2),
            inside(place(3, 2, 2, 2), [1, 0, 0]),
            inside(place(9, 3, 9, 8), [7, 7, 6]),
            inside(place(5, 3, 5, 5), [3, 3, 3]),
            inside(place(6, 3, 6, 5), [4, 4, 3]),
        ];
        let plan = plan(&places, INIT).unwrap();
        // One whose session has no leader any more, and one whose leader lives.
        let leader = &plan.nodes[&PodPid(8)];
        assert_eq!((leader.role, &leader.numbers[..], &leader.after[..]), (Role::Phantom, &[6][..], &[PodPid(9)][..]));
        assert!(plan.nodes[&PodPid(3)].after.contains(&PodPid(8)));
        let helper = &plan.nodes[&plan.nodes[&PodPid(5)].after[0]];
        assert_eq!((helper.namespace, helper.after.len(), helper.numbers.len()), (Some(NamespaceId(0)), 1, 1));
        assert!(plan.groups.contains(&(PodPid(9), PodPid(9), 7)));
        // A group outside is inherited.
        assert!(!plan.groups.iter().any(|(pid, ..)| *pid == PodPid(3)));
    }

    #[test]
    fn an_abandoned_namespace_is_left_by_a_passer_by() {
        let plan = plan(&[inside(place(3, 1, 3, 3), [1, 1, 1])], INIT).unwrap();
        let passing = &plan.nodes[&plan.seeds[0]];
        assert_eq!((passing.role, &passing.after[..], passing.namespace), (Role::Phantom, &[PodPid(3)][..], None));
        assert_eq!(plan.nodes[&PodPid(3)].helper.len(), 1);
    }
}
