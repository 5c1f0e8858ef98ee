//! What has been set up in a network namespace, the pod's own or one made inside it: interfaces, addresses, routes, rules for
//! routes, neighbours, queueing disciplines, settings. What cannot be given back is refused by name.
//!
//! The pod's own can be changed with `--cap-add net_admin`, but for its settings, which any root may set.

mod connections;
mod features;
mod filters;
mod generic;
mod groups;
mod interfaces;
mod remake;
mod requests;
mod restart;
mod settings;
mod tables;
mod vlans;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::sync::OnceLock;
use std::thread::JoinHandle;

use serde::{Deserialize, Serialize};

use super::{Kind, NamespaceId, Sightings};
use crate::error::{CaptureError, Context};
use crate::ids::{HostPid, PodPid};
use crate::pod::live::LivePod;
use crate::pod::network::netlink::{Attributes, Channel, attribute};
use crate::pod::network::pod_interface;
use crate::pod::{AddressPlan, NetworkMode, PodSpec, capabilities};
use crate::sys::{clone, descriptor, file, namespace, nsfs};
use interfaces::Abroad;
use settings::{Settings, Values};

pub use features::Features;
pub use filters::{FilterState, Part};
pub use generic::Part as GenericPart;
pub(crate) use interfaces::flags_of_tun;
pub use interfaces::{InterfaceState, Other};
pub(super) use requests::{index_of, word};
pub use restart::{Begun, restart, restart_filters};
pub use settings::Setting;
pub use tables::{Entries, Table};

/// A network namespace: the pod's own if there is no number.
pub type Place = Option<NamespaceId>;

/// What is not as it is in a new network namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkState {
    /// Which one.
    pub place: Place,
    /// What has been set up there; `None`: what zap itself has, or what [`super::LinksState`] says.
    pub configuration: Option<Configuration>,
    /// Settings below `/proc/sys/net`, in the order in which they are given back.
    pub settings: Vec<Setting>,
}

/// Interfaces, and what goes with them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Configuration {
    /// Every interface.
    pub interfaces: Vec<InterfaceState>,
    /// What other namespaces of the pod are called here.
    pub ids: Vec<(Place, i32)>,
    /// Addresses, routes and so on.
    pub tables: BTreeMap<Table, Entries>,
    /// Packet filters.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub filters: Option<FilterState>,
    /// What parts of the kernel have that are spoken with through generic netlink.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub generic: BTreeMap<GenericPart, Entries>,
    /// What interfaces are to do with packets.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub features: Vec<Features>,
}

const DUMP: i32 = libc::NLM_F_DUMP;
const NET_ADMIN: &str = "NET_ADMIN";
/// The number of every namespace's loopback interface.
pub(super) const LOOPBACK: u32 = 1;
/// What modules put into every new namespace, as long as nobody uses it.
const EVERYWHERE: [&str; 10] =
    ["tunl0", "gre0", "gretap0", "erspan0", "ip_vti0", "ip6_vti0", "sit0", "ip6tnl0", "ip6gre0", "teql0"];
const RTM_NEWNSID: u16 = 88;
const RTM_GETNSID: u16 = 90;
const RTM_GETNEXTHOP: u16 = 106;
const NETNSA_NSID: u16 = 1;
const NETNSA_FD: u16 = 3;
/// Settings that are kept open for the hold: each namespace has hundreds.
const MOST_OPEN: u64 = 8000;

fn is_everywhere(name: &str, up: bool) -> bool {
    !up && EVERYWHERE.contains(&name)
}

/// What is known from when the pod ran.
#[derive(Debug, Default)]
pub struct Ahead {
    /// How often somebody had set something then.
    writes: Option<u64>,
    /// Who reads the settings of a pod that may change no more of its network: nobody waits for that but who writes them down.
    home: Option<JoinHandle<io::Result<Vec<Setting>>>>,
    /// Those of namespaces that are looked at again in the hold, by the inode of their namespace.
    open: HashMap<u64, Settings>,
    /// How many more may be open.
    room: usize,
    /// What is to be kept of namespaces that nobody in the pod can set up, by their inodes, which are theirs while they are open.
    born: HashMap<u64, (OwnedFd, Option<NetworkState>)>,
}

/// What a new network namespace has.
struct Fresh {
    /// Kept: the kernel keeps others from changing links while it takes one down.
    namespace: OwnedFd,
    configuration: Configuration,
    /// The addresses of its loopback interface once that is on.
    addresses: Entries,
    /// Its settings, once somebody has asked for them.
    values: OnceLock<Values>,
}

impl Fresh {
    fn get() -> io::Result<&'static Fresh> {
        static FRESH: OnceLock<Fresh> = OnceLock::new();
        if let Some(fresh) = FRESH.get() {
            return Ok(fresh);
        }
        let fresh = clone::in_thread(|| {
            namespace::unshare(libc::CLONE_NEWNET)?;
            let own = File::open("/proc/thread-self/ns/net")?;
            let route = Channel::route()?;
            let (configuration, _) = look(&route, None, None)?.map_err(io::Error::other)?;
            namespace::loopback_up()?;
            let addresses = Table::Addresses.list(&route, &|index| index == LOOPBACK)?.map_err(io::Error::other)?;
            Ok(Fresh { namespace: own.into(), configuration, addresses, values: OnceLock::new() })
        })?;
        Ok(FRESH.get_or_init(|| fresh))
    }

    /// What of the settings of a namespace is to be in an image.
    fn kept(&self, values: &Values, everything: bool) -> io::Result<Vec<Setting>> {
        if values.is_empty() {
            return Ok(Vec::new());
        }
        if self.values.get().is_none() {
            let read = inside(&self.namespace, || Settings::open(&mut 0)?.read())?;
            let _ = self.values.set(read);
        }
        Ok(settings::kept(values, self.values.get().ok_or(io::ErrorKind::NotFound)?, everything))
    }

    /// Whether a namespace is new but for what [`super::LinksState`] has.
    fn is_like(&self, found: &Configuration) -> bool {
        let ([usual], [own]) = (&self.configuration.interfaces[..], &found.interfaces[..]) else { return false };
        let up = own.is_up();
        let usual = InterfaceState { flags: own.flags & libc::IFF_UP as u32 | usual.flags, ..usual.clone() };
        let addresses = found.tables.get(&Table::Addresses);
        let no_addresses = Entries::new();
        *own == usual
            && found.filters.is_none()
            && found.generic == self.configuration.generic
            && found.features == self.configuration.features
            && addresses == Some(if up { &self.addresses } else { &no_addresses })
            && Table::ALL.iter().all(|table| {
                let of = |configuration: &Configuration| configuration.tables.get(table).cloned().unwrap_or_default();
                table.is_default(&of(found), &of(&self.configuration))
            })
    }
}

/// A namespace that is being looked at.
struct Looked {
    place: Place,
    file: OwnedFd,
    configuration: Configuration,
    abroad: Vec<Abroad>,
    values: Values,
}

/// Begins to look at the pod's network.
pub fn begin(pod: &LivePod) -> Result<Ahead, CaptureError> {
    let mut ahead = Ahead { writes: pod.sysctls.writes(), ..Ahead::default() };
    if has_settings_alone(pod) {
        ahead.home = Some(read_settings(pod)?);
    }
    Ok(ahead)
}

/// Whether settings are all that somebody in the pod may have changed of its network, and somebody may have.
fn has_settings_alone(pod: &LivePod) -> bool {
    pod.spec.network != NetworkMode::Host && !is_administered(&pod.spec) && !pod.sysctls.are_untouched()
}

/// Begins to read the settings of the pod's own network.
fn read_settings(pod: &LivePod) -> Result<JoinHandle<io::Result<Vec<Setting>>>, CaptureError> {
    let home = home(pod.init)?;
    let read = move || {
        let values = inside(&home, || Settings::open(&mut 0)?.read())?;
        Fresh::get()?.kept(&values, false)
    };
    Ok(std::thread::spawn(read))
}

/// Looks at the pod's network while it runs, and refuses what cannot be captured. Every process has been met.
pub fn look_ahead(pod: &LivePod, met: &Sightings, mut ahead: Ahead) -> Result<Ahead, CaptureError> {
    let (spec, init) = (&pod.spec, pod.init);
    refuse_labels(spec, init, met)?;
    // Others have use for descriptors too.
    let most = descriptor::most().capturing("asking", "how many files zap may open")? / 4;
    ahead.room = most.min(MOST_OPEN) as usize;
    if is_administered(spec) {
        ahead.open(&home(init)?).capturing("opening", "the settings of the pod's network")?;
    }
    for (id, namespace) in met.of_kind(Kind::Network) {
        if !ahead.is_born(id, namespace, pod, met)? {
            ahead.open(namespace).capturing("opening", "the settings of a network namespace")?;
        }
    }
    capture(pod, met, &ahead).map(|_| ahead)
}

/// Labels of IPv6 that sockets have leased are listed, but not whose they are.
fn refuse_labels(spec: &PodSpec, init: HostPid, met: &Sightings) -> Result<(), CaptureError> {
    const LABELS: &str = "net/ip6_flowlabel";
    let why = "has labels of IPv6 that sockets have leased (IPV6_FLOWLABEL_MGR)";
    // A host may be without IPv6.
    let has = |text: io::Result<String>| text.is_ok_and(|text| has_labels(&text));
    if spec.network != NetworkMode::Host && has(std::fs::read_to_string(init.proc(LABELS))) {
        return Err(refused(None, met, why));
    }
    for (id, namespace) in met.of_kind(Kind::Network) {
        if has(inside(namespace, || std::fs::read_to_string(format!("/proc/thread-self/{LABELS}")))) {
            return Err(refused(Some(id), met, why));
        }
    }
    Ok(())
}

/// Whether somebody has one: those that nobody has any more stay for a while. Each line has the label, who may share it, an
/// owner, and how many have it.
fn has_labels(text: &str) -> bool {
    let users = |line: &str| line.split_ascii_whitespace().nth(3)?.parse::<u32>().ok();
    text.lines().filter_map(users).any(|users| users != 0)
}

/// What of the pod's network is not as a restart makes it by itself.
pub fn capture(pod: &LivePod, met: &Sightings, ahead: &Ahead) -> Result<Vec<NetworkState>, CaptureError> {
    let (spec, init) = (&pod.spec, pod.init);
    let (mut looked, mut states) = (Vec::new(), Vec::new());
    let touched = ahead.writes != pod.sysctls.writes();
    if is_administered(spec) {
        let home = home(init)?;
        if spec.network == NetworkMode::Bridge {
            check_way_out(&home, spec.address.as_ref())?;
        }
        looked.push(look_into(None, home, spec, met, ahead)?);
    }
    for (id, namespace) in met.of_kind(Kind::Network) {
        let inode = file::fstat(namespace).capturing("looking at", "a network namespace")?.st_ino;
        if let Some((_, state)) = ahead.born.get(&inode).filter(|_| !touched) {
            states.extend(state.clone().map(|state| NetworkState { place: Some(id), ..state }));
            continue;
        }
        let namespace = namespace.try_clone().capturing("copying", "a network namespace")?;
        looked.push(look_into(Some(id), namespace, spec, met, ahead)?);
    }
    pair(&mut looked, met)?;
    for one in looked {
        states.extend(one.into_state()?);
    }
    states.sort_by_key(|state| state.place);
    Ok(states)
}

impl Ahead {
    /// The settings of a pod that may change no more of its network, if any has been set. It stands still, or has.
    pub fn settings_alone(&mut self, pod: &LivePod) -> Result<Option<NetworkState>, CaptureError> {
        let reader = match self.home.take() {
            Some(reader) => reader,
            None if has_settings_alone(pod) => read_settings(pod)?,
            None => return Ok(None),
        };
        let settings = reader.join().unwrap_or_else(|_| Err(io::Error::other("a thread panicked")));
        let settings = settings.capturing("reading", "the settings of the pod's network")?;
        Ok((!settings.is_empty()).then(|| NetworkState { settings, ..NetworkState::default() }))
    }

    fn open(&mut self, namespace: &OwnedFd) -> io::Result<()> {
        let room = &mut self.room;
        let settings = inside(namespace, || Settings::open(room))?;
        self.open.insert(file::fstat(namespace)?.st_ino, settings);
        Ok(())
    }

    /// Whether a namespace is as it was born and remains so, but for settings: these are as they are now.
    fn is_born(
        &mut self,
        id: NamespaceId,
        namespace: &OwnedFd,
        pod: &LivePod,
        met: &Sightings,
    ) -> Result<bool, CaptureError> {
        let copy = || namespace.try_clone().capturing("copying", "a network namespace");
        if !is_beyond_reach(&pod.spec, pod.init, namespace).capturing("asking whose is", "a network namespace")? {
            return Ok(false);
        }
        let looked = match self.writes == Some(0) {
            true => look_at_configuration(Some(id), copy()?, &pod.spec, met)?,
            false => look_into(Some(id), copy()?, &pod.spec, met, self)?,
        };
        let is_connected = !looked.abroad.is_empty();
        let state = looked.into_state()?;
        if is_connected || state.as_ref().is_some_and(|state| state.configuration.is_some()) {
            return Ok(false);
        }
        let inode = file::fstat(namespace).capturing("looking at", "a network namespace")?.st_ino;
        self.born.insert(inode, (copy()?, state));
        Ok(true)
    }

    /// The settings of the caller's namespace, in which are these interfaces.
    fn values(&self, namespace: &OwnedFd, interfaces: &[InterfaceState]) -> io::Result<Values> {
        match self.open.get(&file::fstat(namespace)?.st_ino) {
            Some(open) if interfaces.iter().all(|interface| open.knows(&interface.name)) => open.read(),
            _ => Settings::open(&mut 0)?.read(),
        }
    }
}

impl Looked {
    fn into_state(mut self) -> Result<Option<NetworkState>, CaptureError> {
        let fresh = fresh()?;
        // What zap sets up in the pod's own is compared when it is there.
        let plain = self.place.is_some() && fresh.is_like(&self.configuration);
        let settings = fresh.kept(&self.values, !plain);
        let settings = settings.capturing("reading", "the settings of a new network namespace")?;
        if plain && settings.is_empty() {
            return Ok(None);
        }
        // Another host may be without what nobody has touched.
        self.configuration.generic.retain(|part, entries| fresh.configuration.generic.get(part) != Some(entries));
        Ok(Some(NetworkState { place: self.place, configuration: (!plain).then_some(self.configuration), settings }))
    }
}

fn fresh() -> Result<&'static Fresh, CaptureError> {
    Fresh::get().capturing("looking into", "a new network namespace")
}

/// Whether the pod may do more to its own network than set settings.
pub fn is_administered(spec: &PodSpec) -> bool {
    spec.network != NetworkMode::Host && capabilities::includes(&spec.capabilities, NET_ADMIN)
}

/// Whether nobody in the pod has the power to set up a namespace: it belongs to the pod's own users, who lack it.
fn is_beyond_reach(spec: &PodSpec, init: HostPid, namespace: &OwnedFd) -> io::Result<bool> {
    if capabilities::includes(&spec.capabilities, NET_ADMIN) {
        return Ok(false);
    }
    let owner = file::fstat(nsfs::owner(namespace)?)?.st_ino;
    Ok(owner == std::fs::metadata(init.proc("ns/user"))?.ino())
}

fn home(init: HostPid) -> Result<OwnedFd, CaptureError> {
    File::open(init.proc("ns/net")).map(OwnedFd::from).capturing("opening", "the pod's network namespace")
}

/// Runs `act` in a network namespace.
pub(super) fn inside<T: Send>(
    namespace: impl AsFd + Sync,
    act: impl FnOnce() -> io::Result<T> + Send,
) -> io::Result<T> {
    clone::in_thread(|| {
        nsfs::enter(&namespace, libc::CLONE_NEWNET)?;
        act()
    })
}

fn refused(place: Place, met: &Sightings, why: &str) -> CaptureError {
    let why = format!("{why}, which cannot be checkpointed yet; undo that first");
    let home = || CaptureError::Refused {
        process: PodPid(1),
        command: "init".into(),
        object: "the pod's network".into(),
        why: why.clone(),
    };
    place.and_then(|id| met.refuse(id, why.clone())).unwrap_or_else(home)
}

fn look_into(
    place: Place,
    file: OwnedFd,
    spec: &PodSpec,
    met: &Sightings,
    ahead: &Ahead,
) -> Result<Looked, CaptureError> {
    let mut looked = look_at_configuration(place, file, spec, met)?;
    let values = inside(&looked.file, || ahead.values(&looked.file, &looked.configuration.interfaces));
    looked.values = values.capturing("reading", "the settings of a network namespace of the pod")?;
    Ok(looked)
}

/// Without its settings.
fn look_at_configuration(place: Place, file: OwnedFd, spec: &PodSpec, met: &Sightings) -> Result<Looked, CaptureError> {
    let plan = spec.address.as_ref().filter(|_| place.is_none() && spec.network == NetworkMode::Bridge);
    let found = inside(&file, || look(&Channel::route()?, place, plan));
    let found = found.capturing("looking into", "a network namespace of the pod")?;
    let (configuration, abroad) = found.map_err(|why| refused(place, met, &why))?;
    Ok(Looked { place, file, configuration, abroad, values: Values::default() })
}

/// What has been set up in the caller's namespace, or why it cannot be set up anew.
type Found = Result<(Configuration, Vec<Abroad>), String>;

fn look(route: &Channel, place: Place, plan: Option<&AddressPlan>) -> io::Result<Found> {
    let own = |state: &InterfaceState| {
        state.index == LOOPBACK || (plan.is_some() && state.is_veth() && state.index == pod_interface().1)
    };
    let found: Result<Vec<_>, String> = interfaces::list(route, place, &own)?.into_iter().collect();
    let (interfaces, abroad): (Vec<_>, Vec<_>) = match found {
        Ok(found) => found.into_iter().unzip(),
        Err(why) => return Ok(Err(why)),
    };
    let mut configuration = Configuration { interfaces, ..Configuration::default() };
    for table in Table::ALL {
        let known = |index| configuration.interfaces.iter().any(|interface| interface.index == index);
        match table.list(route, &known)? {
            Ok(entries) => configuration.tables.insert(table, entries),
            Err(why) => return Ok(Err(why)),
        };
    }
    if let Some(what) = others(route) {
        return Ok(Err(what.to_owned()));
    }
    if let Some(why) = vlans::refusal(route, &configuration.interfaces)?.or_else(|| without_way(&configuration)) {
        return Ok(Err(why));
    }
    let known = |index| configuration.interfaces.iter().any(|interface| interface.index == index);
    (configuration.generic, configuration.features) = (generic::list()?, features::list(&known)?);
    match filters::capture()? {
        Ok(filters) => configuration.filters = (!filters.parts.is_empty()).then_some(filters),
        Err(why) => return Ok(Err(why)),
    }
    Ok(Ok((configuration, abroad.into_iter().flatten().collect())))
}

/// A bridge that is off and has members of groups: the kernel takes none of such.
fn without_way(configuration: &Configuration) -> Option<String> {
    let groups = configuration.tables.get(&Table::Groups)?;
    let of = |bridge: &&InterfaceState| groups.iter().any(|group| index_of(group) == Some(bridge.index));
    let off = configuration.interfaces.iter().filter(|one| one.is_bridge() && !one.is_up()).find(of)?;
    Some(format!("has the bridge {}, which is off and has groups", off.name))
}

/// What else there may be, of what this kernel knows.
fn others(route: &Channel) -> Option<&'static str> {
    const SECURITY_ASSOCIATIONS: u16 = 0x12;
    const SECURITY_POLICIES: u16 = 0x15;
    const SETS: u16 = (libc::NFNL_SUBSYS_IPSET as u16) << 8 | 7;
    // An attribute without which the kernel tells nothing: the version in which it is spoken with.
    const SETS_PROTOCOL: &[u8] = &[5, 0, 1, 0, 6, 0, 0, 0];
    let has = |channel: io::Result<Channel>, kind, header: &[u8]| {
        channel.and_then(|channel| channel.ask(kind, DUMP, header)).is_ok_and(|found| !found.is_empty())
    };
    if route.ask(RTM_GETNEXTHOP, DUMP, &[0; 8]).is_ok_and(|found| !found.is_empty()) {
        Some("has objects through which routes lead (nexthop)")
    } else if has(Channel::security(), SECURITY_ASSOCIATIONS, &[]) || has(Channel::security(), SECURITY_POLICIES, &[]) {
        Some("has IPsec associations or policies")
    } else if has(Channel::filter(), SETS, &[&[0; 4][..], SETS_PROTOCOL].concat()) {
        Some("has sets of addresses (ipset)")
    } else if has_old_filters() {
        Some("has packet filters of the old kind (iptables-legacy)")
    } else {
        None
    }
}

/// Whether there are packet filters that are not nf_tables.
fn has_old_filters() -> bool {
    let names = ["ip_tables_names", "ip6_tables_names", "arp_tables_names"];
    let has =
        |name: &str| std::fs::read_to_string(format!("/proc/thread-self/net/{name}")).is_ok_and(|n| !n.is_empty());
    names.into_iter().any(has)
}

/// The interface by which the pod is connected must be there, under its address: others know it by that.
fn check_way_out(home: &OwnedFd, plan: Option<&AddressPlan>) -> Result<(), CaptureError> {
    let Some(plan) = plan else { return Ok(()) };
    let (name, index) = pod_interface();
    let found = inside(home, || interfaces::address(&Channel::route()?, index));
    let why = match found.capturing("looking for", name)? {
        Some(address) if address == plan.mac => return Ok(()),
        Some(_) => format!("has another MAC address at {name}"),
        None => format!("has its interface {name} no more"),
    };
    Err(CaptureError::Refused {
        process: PodPid(1),
        command: "init".into(),
        object: "the pod's network".into(),
        why: format!("{why}, which cannot be checkpointed; undo that first"),
    })
}

/// Finds the other ends of interfaces that lead into other namespaces.
fn pair(looked: &mut [Looked], met: &Sightings) -> Result<(), CaptureError> {
    let mut ends: HashMap<(u32, u32), Vec<usize>> = HashMap::new();
    for (at, one) in looked.iter().enumerate() {
        for end in &one.abroad {
            ends.entry((end.index, end.other)).or_default().push(at);
        }
    }
    for at in 0..looked.len() {
        let one = &looked[at];
        let candidates = |end: &Abroad| ends.get(&(end.other, end.index)).map_or(&[][..], |all| &all[..]);
        let others: BTreeSet<usize> =
            one.abroad.iter().flat_map(candidates).copied().filter(|other| *other != at).collect();
        let ids = ids_of(&one.file, looked, &others).capturing("asking for the names of", "network namespaces")?;
        let mut found = Vec::new();
        for end in &one.abroad {
            let there = candidates(end).iter().find(|other| ids.get(*other) == Some(&end.namespace));
            let name = one.configuration.interfaces.iter().find(|interface| interface.index == end.index);
            let (name, is_veth) = name.map_or(("", false), |interface| (&interface.name, interface.is_veth()));
            let Some(there) = there.filter(|_| is_veth) else {
                let why = format!("has the interface {name}, whose other end is in no network namespace of the pod");
                return Err(refused(one.place, met, &why));
            };
            found.push((end.index, Other { place: looked[*there].place, index: end.other }, end.namespace));
        }
        let configuration = &mut looked[at].configuration;
        for (index, other, id) in found {
            if let Some(state) = configuration.interfaces.iter_mut().find(|state| state.index == index) {
                state.other = Some(other);
            }
            if !configuration.ids.contains(&(other.place, id)) {
                configuration.ids.push((other.place, id));
            }
        }
    }
    Ok(())
}

/// What a namespace calls others, by their places among all.
fn ids_of(namespace: &OwnedFd, all: &[Looked], others: &BTreeSet<usize>) -> io::Result<HashMap<usize, i32>> {
    if others.is_empty() {
        return Ok(HashMap::new());
    }
    inside(namespace, || {
        let route = Channel::route()?;
        let named = others.iter().map(|other| Ok((*other, id_of(&route, all[*other].file.as_fd())?)));
        named.collect()
    })
}

/// What the caller's namespace calls another: nothing is less than zero.
fn id_of(route: &Channel, other: BorrowedFd<'_>) -> io::Result<i32> {
    let mut asked = Attributes::default();
    asked.put_u32(NETNSA_FD, other.as_raw_fd() as u32);
    let answers = route.ask(RTM_GETNSID, 0, &[&[0; 4], asked.bytes()].concat())?;
    let id = answers.first().and_then(|body| {
        let id = attribute(body.get(4..)?, NETNSA_NSID)?;
        Some(i32::from_ne_bytes(*id.first_chunk()?))
    });
    id.ok_or_else(|| io::ErrorKind::NotFound.into())
}

/// Reads some bytes as what the kernel says of interfaces and of connections that it follows.
pub(super) fn try_answer(bytes: &[u8]) {
    drop(interfaces::parse(bytes, None));
    let _ = interfaces::has_unnoticed_carrier(bytes);
    connections::try_answer(bytes);
}

/// Reads some bytes as entries of tables and as parts of packet filters, of the kernel's or of an image.
pub(super) fn try_entry(bytes: &[u8]) {
    Table::ALL.iter().for_each(|table| table.try_entry(bytes));
    filters::try_answer(bytes);
    drop(groups::kept(bytes));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_that_nobody_has_are_none() {
        const HEAD: &str = "Label S Owner  Users  Linger Expires  Dst                              Opt\n";
        let line =
            |users| format!("12345 1 0      {users}      6      11       00000000000000000000000000000001 0   \n");
        assert!(!has_labels(HEAD) && !has_labels(&format!("{HEAD}{}", line(0))));
        assert!(has_labels(&format!("{HEAD}{}{}", line(0), line(1))));
    }
}
