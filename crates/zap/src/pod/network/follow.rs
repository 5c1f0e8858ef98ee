//! Following a pod that has moved to another network: programs of this host, and of its pods, that are connected with its old
//! address reach it at the new one.
//!
//! The packet filter puts the new address for the old one as the last thing that happens to a packet on its way out, and the old
//! one for the new one as the first on its way in: sockets, routes, connection tracking and its translations know nothing but
//! the old one. Packets are meant whose ports are those of a connection that there was when the pod moved; new connections
//! with either address are left alone. Where the old address was on the network of this host's own pods, a route leads to
//! where the new one is, and pods that look for it on their network are answered by the host.
//!
//! All of it is kernel state that describes itself: a table (`zt` and the old address in hexadecimal) whose comment says who
//! is followed, and where to. No process of zap's has to live for it.

use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::connections::{self, Connection, FROM_PORT, Ports, TO_PORT, found};
use super::filter::{self, Base, Checksum, Family, Hook, Rule, Ruleset, delete_table};
use super::former::{self, DESTINATION4, DESTINATION6, NUMBER4, NUMBER6, SOURCE4, SOURCE6, TARGET4, TARGET6};
use super::lease::{self, ipv6_of};
use super::netlink::{Batch, Behind, Channel};
use super::stand_in::StandIn;
use super::translate::{IPV4, IPV6};
use super::{NetworkError, bridge, kernel, links, namespace, open, probe};
use crate::ids::HostPid;
use crate::pod::Store;
use crate::pod::host_config::{ConfigError, HostConfig};
use crate::pod::registry::Record;

/// A pod that this host follows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Followed {
    /// Its name, where it came from.
    pub pod: String,
    /// The address that programs know.
    pub old: Ipv4Addr,
    /// The one that it has.
    pub new: Ipv4Addr,
    /// Which of the registries in this network namespace began it: others do not know whom it is for.
    registry: u32,
}

/// A move of a pod's, from one address to another.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Moved {
    /// Its name.
    pub pod: String,
    /// The address that it had.
    pub from: Ipv4Addr,
    /// The one that it has then.
    pub to: Ipv4Addr,
}

impl Moved {
    /// The way back.
    pub fn back(&self) -> Moved {
        Moved { pod: self.pod.clone(), from: self.to, to: self.from }
    }
}

impl fmt::Display for Moved {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Moved { pod, from, to } = self;
        write!(f, "{pod} {from} {to}")
    }
}

impl FromStr for Moved {
    type Err = String;

    fn from_str(text: &str) -> Result<Moved, String> {
        let wrong = || format!("`{text}` does not say which pod moves from where to where");
        let mut words = text.split(' ');
        let [Some(pod), Some(from), Some(to), None] = std::array::from_fn(|_| words.next()) else {
            return Err(wrong());
        };
        let address = |text: &str| text.parse().map_err(|_| wrong());
        Ok(Moved { pod: pod.to_owned(), from: address(from)?, to: address(to)? })
    }
}

/// Reads a text as what another host says of a pod that moves, and as what a table says of one that is followed.
pub(super) fn try_line(text: &str) {
    drop((text.parse::<Moved>(), Followed::described("zt0a000001", text)));
}

/// This host and its pods: who may be connected with one that moves.
pub struct Here {
    registry: u32,
    config: HostConfig,
    pods: Vec<Neighbour>,
}

/// A pod of this host's: its PID 1, the host's end of its link, and the address that it has inside.
struct Neighbour {
    init: HostPid,
    link: String,
    own: Ipv4Addr,
}

const TABLE: &str = "zt";
/// Which packets from it come in pieces: only the first has ports.
const PIECES4: &str = "pieces4";
const PIECES6: &str = "pieces6";
const PIECES_MS: u64 = 5000;

impl Here {
    /// As the registry has it.
    pub fn of(store: &Store) -> Result<Here, NetworkError> {
        let wrong = |e: ConfigError| NetworkError::Usage(e.to_string());
        let config = HostConfig::load(store.state()).map_err(wrong)?;
        let names = store.names().unwrap_or_default();
        let records = names.iter().filter_map(|name| store.load(name).ok());
        let neighbour = |record: Record| {
            let init = record.init.filter(|init| init.lives())?.pid;
            let (link, own) = (lease::link_name(record.outer_addresses()?.ipv4), record.spec.address?.ipv4);
            Some(Neighbour { init, link, own })
        };
        Ok(Here { registry: registry(store), config, pods: records.filter_map(neighbour).collect() })
    }

    /// A pod moves: whoever follows it already does so further, and so does from now on whoever is connected with it, on this
    /// host or in one of its pods.
    pub fn follow(&self, moved: &Moved) -> Result<(), NetworkError> {
        if moved.from == moved.to {
            return Ok(());
        }
        let _lock = namespace::lock().map_err(kernel("locking", "the network namespace"))?;
        let all = followed()?;
        let connections = self.connections()?;
        for known in all.iter().filter(|known| known.new == moved.from && known.registry == self.registry) {
            known.end()?;
            if known.old != moved.to {
                self.begin(&Followed { pod: moved.pod.clone(), new: moved.to, ..known.clone() }, &connections)?;
            }
        }
        if !all.iter().any(|known| known.old == moved.from) {
            let (pod, registry) = (moved.pod.clone(), self.registry);
            self.begin(&Followed { pod, old: moved.from, new: moved.to, registry }, &connections)?;
        }
        self.leave_bridge()
    }

    /// Removes the bridge if nobody relies on it any more.
    fn leave_bridge(&self) -> Result<(), NetworkError> {
        bridge::remove_if_idle(&self.config, &open()?, None, Behind::Thread).map(drop)
    }

    fn tidy(&self) -> Result<Vec<Followed>, NetworkError> {
        let _lock = namespace::lock().map_err(kernel("locking", "the network namespace"))?;
        let all = self.own()?;
        let connections = self.connections()?;
        let (needed, idle): (Vec<_>, Vec<_>) = all.into_iter().partition(|known| known.is_needed_for(&connections));
        idle.iter().try_for_each(|known| self.end(known))?;
        Ok(needed)
    }

    /// Follows the pods of that name no more. Whether it did.
    pub fn forget(&self, pod: &str) -> Result<bool, NetworkError> {
        let _lock = namespace::lock().map_err(kernel("locking", "the network namespace"))?;
        let all = self.own()?;
        let its: Vec<_> = all.iter().filter(|known| known.pod == pod).collect();
        its.iter().try_for_each(|known| self.end(known))?;
        Ok(!its.is_empty())
    }

    /// Those that this registry began to follow.
    fn own(&self) -> Result<Vec<Followed>, NetworkError> {
        Ok(followed()?.into_iter().filter(|known| known.registry == self.registry).collect())
    }

    /// Connections of sockets of this host and of its pods.
    fn connections(&self) -> Result<Vec<Connection>, NetworkError> {
        let mut all = connections::of_sockets();
        for pod in &self.pods {
            all.extend(pod.connections()?);
        }
        Ok(all)
    }

    /// Begins, if there is anybody to begin it for.
    fn begin(&self, followed: &Followed, connections: &[Connection]) -> Result<(), NetworkError> {
        if !followed.is_needed_for(connections) {
            return Ok(());
        }
        // Where they are translated others have their ports outside.
        let connections = [connections, &connections::translated()?].concat();
        let detours = self.detours(followed)?;
        // First what tells of the rest.
        let began = followed.translate(&self.config, &connections, !detours.is_empty());
        began.and_then(|()| self.lead_there(followed, &detours)).inspect_err(|_| drop(self.end(followed)))
    }

    fn end(&self, followed: &Followed) -> Result<(), NetworkError> {
        followed.end()?;
        self.leave_bridge()
    }

    /// How packets for the old address have to leave where they would leave otherwise than those for the new one do.
    fn detours(&self, followed: &Followed) -> Result<Vec<([IpAddr; 2], links::Way)>, NetworkError> {
        let channel = open()?;
        let way = |address| links::way_to(&channel, address).map_err(kernel("looking for the way to", "a pod"));
        let mut detours = Vec::new();
        for [old, new] in followed.addresses() {
            match (way(old)?, way(new)?) {
                (is, wanted) if is == wanted => {}
                (_, Some(wanted)) => detours.push(([old, new], wanted)),
                // Without IPv6 nobody is connected by it.
                (_, None) if new.is_ipv6() => {}
                (_, None) => return Err(NetworkError::Lacks(format!("a way to {new}"))),
            }
        }
        Ok(detours)
    }

    fn lead_there(&self, followed: &Followed, detours: &[([IpAddr; 2], links::Way)]) -> Result<(), NetworkError> {
        let channel = open()?;
        let mut batch = Batch::default();
        detours.iter().for_each(|([old, new], way)| links::add_route(&mut batch, *old, *new, *way));
        if !batch.is_empty() {
            channel.run(&batch)?;
        }
        if !self.config.address.contains(followed.old) {
            return Ok(());
        }
        // Pods reached it without the host's help, and do not any more.
        bridge::let_in(&self.config, &channel, false)?;
        self.stand_in(followed, &channel)
    }

    /// Has pods that are connected with it find this host where it was.
    fn stand_in(&self, followed: &Followed, channel: &Channel) -> Result<(), NetworkError> {
        let mut links = Vec::new();
        for pod in &self.pods {
            if followed.is_needed_for(&pod.connections()?) {
                links.push(pod.link.as_str());
            }
        }
        if links.is_empty() {
            return Ok(());
        }
        let mac = bridge::hardware_address(&self.config, channel)?;
        let [[old4, _], [old6, _]] = followed.addresses().map(|pair| pair.map(links::octets));
        let mut rules = Ruleset::described(Family::Device, &followed.table(), &followed.comment());
        for link in links {
            let device = nix::net::if_::if_nametoindex(link).map_err(|e| kernel("looking for", link)(e.into()))?;
            let host = StandIn { mac, device };
            // Before what the link itself translates.
            rules.chain(link, "filter", Hook::Ingress, -250, Some(link));
            rules.rule(link, host.answer4(|asked| asked.has(TARGET4.0, TARGET4.1, &old4)));
            rules.rule(link, host.answer6(|asked| asked.has(TARGET6.0, TARGET6.1, &old6)));
            for (address, kind, old) in [(DESTINATION4, IPV4, &old4), (DESTINATION6, IPV6, &old6)] {
                let sent = Rule::default().ether_type(kind).has(address.0, address.1, old);
                rules.rule(link, sent.put(Base::Link, 0, &mac, Checksum::None));
            }
        }
        rules.make()
    }
}

impl Neighbour {
    fn connections(&self) -> Result<Vec<Connection>, NetworkError> {
        let mut all = connections::none_if_gone(namespace::inside(self.init, || Ok(connections::of_sockets())))?;
        // With itself it is connected without anybody's help.
        let own = [IpAddr::from(self.own), ipv6_of(self.own).into()];
        all.retain(|connection| !own.contains(&connection.address));
        Ok(all)
    }
}

/// What tells a registry from others.
fn registry(store: &Store) -> u32 {
    crc32fast::hash(store.state().as_os_str().as_encoded_bytes())
}

/// The pods that this host follows.
fn followed() -> Result<Vec<Followed>, NetworkError> {
    let tables = filter::tables(Family::Inet)?;
    Ok(tables.iter().filter_map(|(name, comment)| Followed::described(name, comment)).collect())
}

/// The pods that this host follows. Those that nobody is connected with any more it follows no more.
pub fn tidy(store: &Store) -> Result<Vec<Followed>, NetworkError> {
    match followed() {
        Ok(all) if all.is_empty() => Ok(all),
        Ok(_) => Here::of(store)?.tidy(),
        // Without a packet filter nobody is followed.
        Err(NetworkError::Lacks(_)) => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

/// Whether pods can be followed to this host, and from it.
pub fn can_follow() -> Result<(), NetworkError> {
    super::in_fresh_namespace(try_it).map_err(|e| NetworkError::Lacks(format!("{LACKS}: {e}")))
}

/// What a host is without that cannot.
const LACKS: &str = "what it takes to follow a pod (nftables netdev fwd, nat)";

/// Has a pod be followed, in a network namespace that the calling thread has to itself.
pub(super) fn try_it() -> io::Result<()> {
    let config = HostConfig::default();
    let (old, new) = (config.address.address, Ipv4Addr::LOCALHOST);
    let tried = || {
        Followed { pod: String::new(), old, new, registry: 0 }.translate(&config, &[], true)?;
        let host = StandIn { mac: [2; 6], device: 1 };
        let mut rules = Ruleset::new(Family::Device, TABLE);
        rules.chain(TABLE, "filter", Hook::Ingress, 0, Some("lo"));
        rules.rule(TABLE, host.answer4(|asked| asked));
        rules.rule(TABLE, host.answer6(|asked| asked));
        rules.make()
    };
    tried().map_err(probe::what_the_kernel_said)
}

/// Whether connections of this host's own rely on the address of its bridge to follow a pod.
pub(super) fn relies_on(config: &HostConfig) -> bool {
    followed().is_ok_and(|all| all.iter().any(|known| config.address.contains(known.old)))
}

/// Whoever is followed from this address is here: that ends.
pub(super) fn supersede(old: Ipv4Addr) -> Result<(), NetworkError> {
    match (Followed { pod: String::new(), old, new: old, registry: 0 }).end() {
        // Without a packet filter nobody is followed.
        Err(NetworkError::Lacks(_)) => Ok(()),
        other => other,
    }
}

impl Followed {
    fn table(&self) -> String {
        format!("{TABLE}{:08x}", self.old.to_bits())
    }

    fn comment(&self) -> String {
        format!("{} to {} for {:08x}", self.pod, self.new, self.registry)
    }

    fn described(table: &str, comment: &str) -> Option<Followed> {
        let digits = table.strip_prefix(TABLE).filter(|digits| digits.len() == 8)?;
        let old = u32::from_str_radix(digits, 16).ok().map(Ipv4Addr::from_bits)?;
        let (comment, registry) = comment.rsplit_once(" for ")?;
        let (pod, new) = comment.rsplit_once(" to ")?;
        let registry = u32::from_str_radix(registry, 16).ok()?;
        Some(Followed { pod: pod.to_owned(), old, new: new.parse().ok()?, registry })
    }

    /// Old and new address of each family.
    fn addresses(&self) -> [[IpAddr; 2]; 2] {
        [[self.old.into(), self.new.into()], [ipv6_of(self.old).into(), ipv6_of(self.new).into()]]
    }

    fn ports(&self, connections: &[Connection]) -> impl Iterator<Item = Ports> {
        let meant = self.addresses().map(|[old, _]| old);
        connections.iter().filter(move |c| meant.contains(&c.address)).map(Connection::ports)
    }

    fn is_needed_for(&self, connections: &[Connection]) -> bool {
        self.ports(connections).next().is_some()
    }

    fn translate(&self, config: &HostConfig, connections: &[Connection], is_detour: bool) -> Result<(), NetworkError> {
        let table = self.table();
        let mut rules = Ruleset::described(Family::Inet, &table, &self.comment());
        rules.chain("in", "filter", Hook::Prerouting, -300, None);
        rules.chain("out", "filter", Hook::Postrouting, 300, None);
        connections::make_sets(&mut rules, "");
        let fields = self.addresses().map(|[old, new]| Field::of(old, new));
        for field in &fields {
            rules.set(field.pieces.0, field.family);
            field.exchange().into_iter().for_each(|(chain, rule)| rules.rule(chain, rule));
        }
        if config.address.contains(self.old) {
            // Their connections with it never went out under another address.
            rules.chain("known", "nat", Hook::Postrouting, 99, None);
            fields.iter().flat_map(Field::keep_source).for_each(|rule| rules.rule("known", rule));
        }
        if is_detour {
            // Who is not meant would come where nobody waits for him, and perhaps back.
            for (chain, hook) in [("own", Hook::Output), ("others", Hook::Forward)] {
                rules.chain(chain, "filter", hook, 0, None);
                fields.iter().flat_map(Field::refuse_others).for_each(|rule| rules.rule(chain, rule));
            }
        }
        rules.make()?;
        connections::fill_sets((Family::Inet, &table), "", self.ports(connections))
    }

    fn end(&self) -> Result<(), NetworkError> {
        let table = self.table();
        if !filter::has_table(Family::Inet, &table)? {
            return Ok(());
        }
        let channel = open()?;
        let mut batch = Batch::default();
        for [old, _] in self.addresses() {
            links::delete_route(&mut batch, old);
            batch.optional();
        }
        channel.run(&batch)?;
        delete_table(Family::Device, &table)?;
        // Last: it is what tells of the rest.
        delete_table(Family::Inet, &table)
    }
}

/// Where packets of a family have what is exchanged, and what that is.
struct Field {
    family: IpAddr,
    source: (Base, u32, usize),
    destination: (Base, u32, usize),
    old: Vec<u8>,
    new: Vec<u8>,
    checksum: Checksum,
    pieces: (&'static str, (Base, u32)),
    error: Error,
}

/// A message about an error: its protocol and kinds, and where it quotes the protocol, the destination and the ports of the packet.
struct Error {
    message: i32,
    kind: u8,
    kinds: u8,
    protocol: u32,
    destination: u32,
    ports: u32,
}

impl Field {
    fn of(old: IpAddr, new: IpAddr) -> Field {
        let (source, destination, checksum, pieces, error) = match old {
            IpAddr::V4(_) => {
                let unreachable = Error {
                    message: libc::IPPROTO_ICMP,
                    kind: 3,
                    kinds: 0xff,
                    protocol: 8 + 9,
                    destination: 8 + 16,
                    ports: 8 + 20,
                };
                (SOURCE4, DESTINATION4, Checksum::AtAndPseudo(10), (PIECES4, NUMBER4), unreachable)
            }
            IpAddr::V6(_) => {
                let any = Error {
                    message: libc::IPPROTO_ICMPV6,
                    kind: 0,
                    kinds: 0xfc,
                    protocol: 8 + 6,
                    destination: 8 + 24,
                    ports: 8 + 40,
                };
                (SOURCE6, DESTINATION6, Checksum::Pseudo, (PIECES6, NUMBER6), any)
            }
        };
        Field {
            family: old,
            source,
            destination,
            old: links::octets(old),
            new: links::octets(new),
            checksum,
            pieces,
            error,
        }
    }

    /// The sets of its connections, by protocol.
    fn sets(&self) -> impl Iterator<Item = (i32, String)> {
        let is_v4 = self.family.is_ipv4();
        let its = move |(family, ..): &(IpAddr, i32, String)| family.is_ipv4() == is_v4;
        connections::sets("").into_iter().filter(its).map(|(_, protocol, set)| (protocol, set))
    }

    /// What is exchanged, and in which chains.
    fn exchange(&self) -> Vec<(&'static str, Rule)> {
        let (source, destination, (pieces, number)) = (self.source, self.destination, self.pieces);
        let old = |rule: Rule| rule.put(source.0, source.1, &self.old, self.checksum);
        let from_it = |rule: Rule| rule.has(source.0, source.1, &self.new);
        let mut rules = Vec::new();
        for (protocol, set) in self.sets() {
            let [whole4, first4, whole6, first6] = former::with_ports(protocol);
            let (whole, first) = if self.family.is_ipv4() { (whole4, first4) } else { (whole6, first6) };
            let first = found(from_it(first), &set, TO_PORT, FROM_PORT);
            rules.push(("in", first.remember(pieces, source, Some(number), PIECES_MS)));
            rules.push(("in", old(found(from_it(whole), &set, TO_PORT, FROM_PORT))));
            let sent = found(self.sent().transport(protocol), &set, FROM_PORT, TO_PORT);
            rules.push(("out", sent.put(destination.0, destination.1, &self.new, self.checksum)));
            rules.push(("in", self.mend_error(protocol, &set)));
        }
        let piece = if self.family.is_ipv4() { former::piece4() } else { former::piece6() };
        rules.push(("in", old(from_it(piece).found_in(pieces, source, Some(number)))));
        rules
    }

    /// What others say about packets for it is about packets that were sent to the old address.
    fn mend_error(&self, protocol: i32, set: &str) -> Rule {
        let at = |offset| (Base::Transport, offset);
        let Error { message, kind, kinds, protocol: quoted, destination, ports } = self.error;
        let error = Rule::default().family_of(self.family).transport(message);
        let error = error.has_masked(Base::Transport, 0, &[kind], &[kinds]);
        let error = error.has(Base::Transport, quoted, &[protocol as u8]).has(Base::Transport, destination, &self.new);
        let error = found(error, set, at(ports), at(ports + 2));
        error.put(Base::Transport, destination, &self.old, Checksum::At(2))
    }

    /// What is for the old address.
    fn sent(&self) -> Rule {
        Rule::default().family_of(self.family).has(self.destination.0, self.destination.1, &self.old)
    }

    /// What is sent in connections with it.
    fn meant(&self) -> impl Iterator<Item = Rule> {
        self.sets().map(|(protocol, set)| found(self.sent().transport(protocol), &set, FROM_PORT, TO_PORT))
    }

    /// Keeps connections with it from being translated otherwise.
    fn keep_source(&self) -> Vec<Rule> {
        self.meant().map(|sent| sent.keep_source(self.source)).collect()
    }

    /// Tells whoever sends something else to the old address that nobody is there.
    fn refuse_others(&self) -> Vec<Rule> {
        self.meant().map(Rule::accept).chain([self.sent().refuse(libc::IPPROTO_UDP)]).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_says_whom_it_follows() {
        let [old, new] = [[198, 18, 0, 2], [198, 19, 0, 7]].map(Ipv4Addr::from);
        let followed = Followed { pod: "a pod to go".to_owned(), old, new, registry: 0xbeef };
        assert_eq!(followed.table(), "ztc6120002");
        assert_eq!(Followed::described(&followed.table(), &followed.comment()), Some(followed));
        assert_eq!(Followed::described("zvc6120002", ""), None);
    }
}
