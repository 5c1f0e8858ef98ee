//! Setting networks up as they were, in the builder, before any socket is made.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use super::interfaces::{IN_OPERATION, KEPT_DOWN};
use super::requests::Requests;
use super::{Configuration, InterfaceState, NETNSA_FD, NETNSA_NSID, NetworkState, Place, RTM_NEWNSID, Table, inside};
use super::{features, filters, generic, remake, settings};
use crate::error::{Context, RebuildError};
use crate::namespaces::Made;
use crate::pod::network::netlink::Channel;

/// Interfaces by where they are.
type Ends<'a> = HashMap<(Place, u32), &'a InterfaceState>;

/// The networks of an image, and where they are.
struct Networks<'a> {
    states: &'a [NetworkState],
    home: OwnedFd,
    made: &'a Made,
}

/// Networks that lack nothing but packet filters.
pub struct Begun {
    home: OwnedFd,
    /// A file of each tun and tap device that had one: without it there would be no carrier.
    pub taps: HashMap<(Place, String), File>,
}

/// Gives every network namespace what it had: first the interfaces of all, for some lead from one into another.
/// Returns what is needed for the rest, if there is anything to be done.
pub fn restart(states: &[NetworkState], made: &Made) -> Result<Option<Begun>, RebuildError> {
    if states.is_empty() {
        return Ok(None);
    }
    let home = File::open("/proc/self/ns/net").rebuilding("opening", "the pod's network namespace")?;
    let networks = Networks { states, home: home.into(), made };
    let set_up = || {
        let taps = networks.make()?;
        networks.each(|state, configuration, route| {
            remake::adjust(route, &configuration.interfaces)?;
            settings::restart(&state.settings)?;
            features::restart(&configuration.features)?;
            remake::switch(route, &in_order(configuration))
        })?;
        networks.each(|state, configuration, route| {
            remake::say_again(route, &configuration.interfaces, IN_OPERATION)?;
            remake::let_generate(route, &configuration.interfaces)?;
            remake::say_again(route, &configuration.interfaces, KEPT_DOWN)?;
            remake::listen(&configuration.interfaces)?;
            let known = |index| configuration.interfaces.iter().any(|interface| interface.index == index);
            for table in Table::ALL {
                configuration.tables.get(&table).map_or(Ok(()), |wanted| table.restart(route, wanted, &known))?;
            }
            generic::restart(&configuration.generic)?;
            settings::restart_sizes(&state.settings)
        })?;
        networks.settings_alone().map(|()| taps)
    };
    let taps = set_up().map_err(failed)?;
    Ok(Some(Begun { home: networks.home, taps }))
}

/// Gives the namespaces their packet filters, when all sockets are there: nothing that makes them is to be filtered.
pub fn restart_filters(states: &[NetworkState], begun: Option<Begun>, made: &Made) -> Result<(), RebuildError> {
    let Some(Begun { home, .. }) = begun else { return Ok(()) };
    let networks = Networks { states, home, made };
    let filter = |_: &NetworkState, configuration: &Configuration, _: &Channel| {
        configuration.filters.as_ref().map_or(Ok(()), filters::restart)
    };
    networks.each(filter).map_err(failed)
}

fn failed(error: io::Error) -> RebuildError {
    match error.kind() {
        io::ErrorKind::Unsupported => RebuildError::Lacks(format!("what the pod's network needs: {error}")),
        _ => RebuildError::Kernel { step: "setting up", object: "the pod's network".into(), source: error },
    }
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
    fn make(&self) -> io::Result<HashMap<(Place, String), File>> {
        let ends: Ends<'_> = self
            .states
            .iter()
            .filter_map(|state| Some((state.place, state.configuration.as_ref()?)))
            .flat_map(|(place, found)| found.interfaces.iter().map(move |one| ((place, one.index), one)))
            .collect();
        let (mut made, mut taps) = (HashSet::new(), HashMap::new());
        for state in self.states {
            let Some(configuration) = &state.configuration else { continue };
            inside(self.file(state.place)?, || {
                let route = Channel::route()?;
                remake::rename(&route, &configuration.interfaces)?;
                self.name(&route, &configuration.ids)?;
                let mut requests = Requests::new(&route);
                for one in in_order(configuration).iter().filter(|one| one.kind.is_some()) {
                    if one.is_tun() {
                        let file = remake::make_tun(one)?;
                        taps.extend(one.is_had().then(|| ((state.place, one.name.clone()), file)));
                    } else if made.insert((state.place, one.index)) {
                        let peer = self.peer(state.place, one, &ends)?;
                        made.extend(one.other.filter(|_| peer.is_some()).map(|other| (other.place, other.index)));
                        remake::make(&mut requests, one, peer)?;
                    }
                }
                requests.run()
            })?;
        }
        Ok(taps)
    }

    /// The other end of a veth that is in `place`.
    fn peer<'p>(&'p self, place: Place, one: &InterfaceState, ends: &Ends<'p>) -> io::Result<Option<remake::Peer<'p>>> {
        let Some(other) = one.other.filter(|_| one.is_veth()) else { return Ok(None) };
        let missing = || io::Error::other(format!("the other end of {} is missing", one.name));
        let peer = *ends.get(&(other.place, other.index)).ok_or_else(missing)?;
        let there = (other.place != place).then(|| self.file(other.place)).transpose()?;
        Ok(Some((peer, there)))
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
