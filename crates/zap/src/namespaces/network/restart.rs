//! Setting networks up as they were, in the builder, before any socket is made.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use super::requests::Requests;
use super::{Configuration, InterfaceState, NETNSA_FD, NETNSA_NSID, NetworkState, Place, RTM_NEWNSID, Table, inside};
use super::{remake, settings};
use crate::error::{Context, RebuildError};
use crate::namespaces::Made;
use crate::pod::network::netlink::Channel;

/// The networks of an image, and where they are.
struct Networks<'a> {
    states: &'a [NetworkState],
    home: OwnedFd,
    made: &'a Made,
}

/// Gives every network namespace what it had: first the interfaces of all, for some lead from one into another.
pub fn restart(states: &[NetworkState], made: &Made) -> Result<(), RebuildError> {
    if states.is_empty() {
        return Ok(());
    }
    let home = File::open("/proc/self/ns/net").rebuilding("opening", "the pod's network namespace")?;
    let networks = Networks { states, home: home.into(), made };
    let set_up = || {
        networks.make()?;
        networks.each(|state, configuration, route| {
            remake::adjust(route, &configuration.interfaces)?;
            settings::restart(&state.settings)?;
            remake::switch(route, &in_order(configuration))
        })?;
        networks.each(|state, configuration, route| {
            remake::let_generate(route, &configuration.interfaces)?;
            let known = |index| configuration.interfaces.iter().any(|interface| interface.index == index);
            for table in Table::ALL {
                configuration.tables.get(&table).map_or(Ok(()), |wanted| table.restart(route, wanted, &known))?;
            }
            settings::restart_sizes(&state.settings)
        })?;
        networks.settings_alone()
    };
    set_up().map_err(|error: io::Error| match error.kind() {
        io::ErrorKind::Unsupported => RebuildError::Lacks(format!("what the pod's network needs: {error}")),
        _ => RebuildError::Kernel { step: "setting up", object: "the pod's network".into(), source: error },
    })
}

/// Interfaces, each after the one on top of which it is.
fn in_order(configuration: &Configuration) -> Vec<InterfaceState> {
    let below = |state: &InterfaceState| {
        let other = state.other.filter(|_| !state.is_veth())?;
        configuration.interfaces.iter().find(|lower| lower.index == other.index)
    };
    let depth = |state: &InterfaceState| std::iter::successors(Some(state), |state| below(state)).take(16).count();
    let mut ordered = configuration.interfaces.clone();
    ordered.sort_by_key(|state| depth(state));
    ordered
}

impl Networks<'_> {
    fn file(&self, place: Place) -> io::Result<BorrowedFd<'_>> {
        match place {
            None => Ok(self.home.as_fd()),
            Some(id) => self.made.get(&id).map(AsFd::as_fd).ok_or_else(|| io::Error::other("a namespace is missing")),
        }
    }

    /// Does something in every namespace in which something has been set up.
    fn each(&self, act: impl Fn(&NetworkState, &Configuration, &Channel) -> io::Result<()> + Sync) -> io::Result<()> {
        let configured = self.states.iter().filter_map(|state| Some((state, state.configuration.as_ref()?)));
        for (state, configuration) in configured {
            inside(self.file(state.place)?, || act(state, configuration, &Channel::route()?))?;
        }
        Ok(())
    }

    fn settings_alone(&self) -> io::Result<()> {
        for state in self.states.iter().filter(|state| state.configuration.is_none()) {
            inside(self.file(state.place)?, || settings::restart(&state.settings))?;
        }
        Ok(())
    }

    /// Makes the interfaces.
    fn make(&self) -> io::Result<()> {
        let ends: HashMap<(Place, u32), &InterfaceState> = self
            .states
            .iter()
            .filter_map(|state| Some((state.place, state.configuration.as_ref()?)))
            .flat_map(|(place, found)| found.interfaces.iter().map(move |one| ((place, one.index), one)))
            .collect();
        let mut made = HashSet::new();
        for state in self.states {
            let Some(configuration) = &state.configuration else { continue };
            let fresh: Vec<_> =
                in_order(configuration).into_iter().filter(|one| !made.contains(&(state.place, one.index))).collect();
            made.extend(fresh.iter().filter_map(|one| one.other).map(|other| (other.place, other.index)));
            inside(self.file(state.place)?, || {
                let route = Channel::route()?;
                remake::rename(&route, &configuration.interfaces)?;
                self.name(&route, &configuration.ids)?;
                let mut requests = Requests::new(&route);
                let mut with_other_end = HashSet::new();
                for one in &fresh {
                    let other = one.other.filter(|_| one.is_veth());
                    let missing = || io::Error::other(format!("the other end of {} is missing", one.name));
                    let peer = other.map(|other| {
                        let peer = *ends.get(&(other.place, other.index)).ok_or_else(missing)?;
                        let there = (other.place != state.place).then(|| self.file(other.place)).transpose()?;
                        Ok::<_, io::Error>((peer, there))
                    });
                    let peer = peer.transpose()?;
                    if with_other_end.contains(&one.index) {
                        continue;
                    }
                    with_other_end.extend(other.filter(|other| other.place == state.place).map(|other| other.index));
                    remake::make(&mut requests, one, peer)?;
                }
                requests.run()
            })?;
        }
        Ok(())
    }

    /// Has the caller's namespace call others what it called them.
    fn name(&self, route: &Channel, ids: &[(Place, i32)]) -> io::Result<()> {
        let mut requests = Requests::new(route);
        for (place, id) in ids {
            let file = self.file(*place)?;
            requests.push(("naming", "a network namespace"), (RTM_NEWNSID, 0), &[0; 4], |namespace| {
                namespace.put_u32(NETNSA_NSID, *id as u32).put_u32(NETNSA_FD, file.as_raw_fd() as u32);
            })?;
            // The host may have taken the number for the other end of `eth0`.
            requests.optional();
        }
        requests.run()
    }
}
