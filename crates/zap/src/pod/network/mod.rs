//! How a pod is connected: a veth on the host's bridge, with addresses of its own.
//!
//! All of it is kernel state that describes itself, so nothing of it can be left over or get out of step: an address is
//! leased by the *name* of the host's side of its veth (`zv` and the address in hexadecimal; the kernel refuses a second
//! one), and goes when the pod's network namespace goes.

mod announce;
mod bridge;
mod connections;
pub(crate) mod filter;
pub mod follow;
pub mod former;
pub mod forwarder;
mod lease;
mod line;
pub(crate) mod links;
mod namespace;
mod neighbours;
pub(crate) mod netlink;
mod newcomers;
mod probe;
mod publish;
mod stand_in;
pub mod trail;
mod translate;
mod waiting_room;
mod way_out;

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::OnceLock;

use serde::{Deserialize, Serialize};

use crate::ids::HostPid;
use crate::pod::host_config::HostConfig;
use crate::pod::{AddressPlan, Publish};
use crate::sys::packet;
use filter::Family;
use former::{FormerPlace, Kept};
use line::Line;
use links::PortState;
use netlink::{Batch, Behind, Channel};
use trail::{End, Trail};
use waiting_room::{Waiting, WaitingRoom};

/// What a pod asks of the network.
#[derive(Clone, Debug, Default)]
pub struct Request<'a> {
    /// The pod's name, for messages and for whoever lists the links.
    pub pod: &'a str,
    /// The addresses that it was born with, if it is a restarted one. It keeps them inside, whatever it has outside.
    pub inner: Option<&'a AddressPlan>,
    /// The address asked for on the bridge (`--ip`), with the length of its prefix.
    pub address: Option<(Ipv4Addr, Option<u8>)>,
    /// The MAC address asked for.
    pub mac: Option<[u8; 6]>,
    /// Ports of the host that lead into the pod.
    pub publish: &'a [Publish],
    /// Whether it starts out blocked, as [`Network::block`] leaves it.
    pub blocked: bool,
    /// The place that it had at the host that it left, if a forwarder is to keep it.
    pub former: Option<&'a FormerPlace>,
    /// The hosts that it was on before, if it is followed.
    pub trail: Option<&'a Trail>,
}

/// A pod's connection. It can be written down and read back by another monitor of the same pod.
#[derive(Debug, Serialize, Deserialize)]
pub struct Network {
    config: HostConfig,
    init: HostPid,
    link: String,
    index: u32,
    /// What the link is told apart by from that of whoever has the address next.
    #[serde(default)]
    alias: String,
    inner: AddressPlan,
    outer: AddressPlan,
    publish: Vec<Publish>,
    #[serde(default)]
    former: Option<Kept>,
    #[serde(default)]
    trail: Option<End>,
    /// The host's ports, as long as this process lives.
    #[serde(skip)]
    held: Vec<publish::Held>,
    /// Where packets wait while it is held for a moment, once that has been prepared: nowhere if it cannot be.
    #[serde(skip)]
    waiting_room: OnceLock<Option<WaitingRoom>>,
}

/// Why a pod could not be connected.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// Something asked for by name belongs to somebody else (exit code 6).
    #[error("{0} is taken")]
    Taken(String),
    /// The host cannot do it (exit code 4).
    #[error("this host lacks {0}")]
    Lacks(String),
    /// What was asked for cannot be (exit code 2).
    #[error("{0}")]
    Usage(String),
    /// A kernel interface failed.
    #[error("{step} {object}: {source}")]
    Kernel {
        /// What was being done: `making the link`.
        step: &'static str,
        /// What it was done to.
        object: String,
        /// What the kernel said.
        source: std::io::Error,
    },
}

impl NetworkError {
    /// The exit code of a command that ends because of this.
    pub fn exit_code(&self) -> u8 {
        match self {
            NetworkError::Taken(_) => 6,
            NetworkError::Lacks(_) => 4,
            NetworkError::Usage(_) => 2,
            NetworkError::Kernel { .. } => 1,
        }
    }
}

impl From<netlink::Failed> for NetworkError {
    fn from(failed: netlink::Failed) -> NetworkError {
        match failed.source.raw_os_error() {
            Some(libc::EPERM) => NetworkError::Lacks("the right to change its network (CAP_NET_ADMIN)".to_owned()),
            _ => NetworkError::Kernel { step: failed.step, object: failed.object, source: failed.source },
        }
    }
}

/// Gives a kernel error its step and object.
fn kernel(step: &'static str, object: &str) -> impl FnOnce(io::Error) -> NetworkError {
    move |source| NetworkError::Kernel { step, object: object.to_owned(), source }
}

/// The pod's end of its link has this index on every host: programs keep it in the scope of link-local addresses.
const ETH0: (&str, u32) = ("eth0", 64);

impl Network {
    /// Connects the network namespace of `init` (a fresh one) to the bridge of ours: leases an address, makes the veth, and
    /// gives the pod `eth0` and `lo`. It is written down by `note` before there is anything of it. On failure nothing is left.
    pub fn attach(
        config: &HostConfig,
        request: &Request<'_>,
        init: HostPid,
        note: &dyn Fn(&Network) -> io::Result<()>,
    ) -> Result<Network, NetworkError> {
        let channel = open()?;
        let held = publish::hold(request.publish)?;
        let mut network = {
            let _lock = namespace::lock().map_err(kernel("locking", "the network namespace"))?;
            let bridge = bridge::ensure(config, &channel)?;
            Network::lease(config, request, init, &channel)
                .and_then(|network| network.make_link(&channel, bridge, note).map(|()| network))
                .inspect_err(|_| drop(bridge::remove_if_idle(config, &channel, None, Behind::Thread)))?
        };
        network.held = held;
        let connect = || {
            network.add_rules(&channel)?;
            network.bring_up(&channel, request.blocked)?;
            // One that is blocked comes from somewhere, and may yet go back there.
            if request.blocked { Ok(()) } else { network.supersede_forwarder() }
        };
        connect().inspect_err(|_| {
            let _ = network.detach();
        })?;
        Ok(network)
    }

    /// Translates and publishes, where need be: most pods need no rule at all.
    fn add_rules(&self, channel: &Channel) -> Result<(), NetworkError> {
        if let Some(former) = &self.former {
            self.make_line(former, channel)?;
        }
        if self.has_ways() {
            let trail = self.trail.as_ref().map(|end| (end, self.index));
            translate::install(&self.link, &self.inner, &self.outer, self.former.as_ref(), trail)?;
        }
        if self.trail.is_some() {
            trail::keep_address(&self.link, &self.outer)?;
        }
        if self.former.is_some() {
            line::open_end(channel, &former::link_name(&self.link))?;
        }
        if self.publish.is_empty() {
            return Ok(());
        }
        let _lock = namespace::lock().map_err(kernel("locking", "the network namespace"))?;
        bridge::let_in(&self.config, channel, publish::needs_loopback(&self.publish))?;
        publish::install(&self.config, &self.link, &self.outer, &self.publish)
    }

    /// Makes this host's end of the line to the pod's former place.
    fn make_line(&self, former: &Kept, channel: &Channel) -> Result<(), NetworkError> {
        let links = bridge::list(channel)?;
        let master = links.iter().find(|l| l.index == self.index).and_then(|l| l.master);
        let master = master.ok_or_else(|| NetworkError::Lacks("a bridge for the pod's link".to_owned()))?;
        let (name, place) = (former::link_name(&self.link), &former.place);
        let line = Line {
            name: &name,
            id: place.id,
            here: self.config.address.address,
            there: place.host,
            plan: &place.plan,
            leads_to_pod: false,
        };
        line.make(channel, master, &format!("zap {} to {}", self.link, place.host))
    }

    /// This host's end of the line to the pod's former place, if it has one.
    pub fn end_of_line(&self) -> Option<Ipv4Addr> {
        self.former.as_ref().map(|_| self.config.address.address)
    }

    /// Has those with whom the pod is connected be answered, whoever says something first, at its former place, if it has one,
    /// and wherever they are who follow it.
    pub fn know_callers(&mut self) -> Result<(), NetworkError> {
        if self.former.is_none() && self.trail.is_none() {
            return Ok(());
        }
        let connected = namespace::inside(self.init, || Ok(connections::of_sockets()));
        let connected = connected.map_err(kernel("looking for", "whom the pod is connected with"))?;
        if let Some(end) = &mut self.trail {
            // At home that begins here: nobody follows it to where it was.
            follow::supersede(self.outer.ipv4)?;
            end.know(&self.link, &connected, &self.config, &self.inner)?;
        }
        if self.former.is_some() { former::know(&self.link, &connected) } else { Ok(()) }
    }

    /// Whether there are hosts that follow it to where it is.
    pub fn is_followed(&self) -> bool {
        self.trail.is_some()
    }

    /// The hosts that the pod was on, when it leaves this one.
    pub fn trail(&self) -> Trail {
        let way = self.trail.as_ref().map(End::trail).unwrap_or_default();
        way.and(self.config.address.address)
    }

    /// Whether not all that passes the pod's link passes it as it is.
    fn has_ways(&self) -> bool {
        self.former.is_some() || self.trail.is_some() || translate::is_needed(&self.inner, &self.outer)
    }

    fn remove_rules(&self) -> Result<(), NetworkError> {
        if self.has_ways() {
            translate::remove(&self.link)?;
        }
        if self.trail.is_some() {
            trail::forget_address(&self.link)?;
        }
        if self.publish.is_empty() { Ok(()) } else { publish::remove(&self.link) }
    }

    /// Switches the pod's end on and gives it its addresses; they come only after the block, so nothing can leave before it.
    fn bring_up(&self, channel: &Channel, blocked: bool) -> Result<(), NetworkError> {
        let inside = namespace::inside(self.init, || {
            let channel = Channel::route()?;
            let mut batch = Batch::default();
            links::set_up(&mut batch, "lo");
            links::set_up(&mut batch, ETH0.0);
            channel.run(&batch).map(|()| channel).map_err(io::Error::from)
        });
        let inside = inside.map_err(kernel("switching on", "the pod's interface"))?;
        links::await_carrier(channel, self.index).map_err(kernel("waiting for", &self.link))?;
        if blocked {
            self.block()?;
        }
        let mut batch = Batch::default();
        let plan = &self.inner;
        links::add_address(&mut batch, ETH0, plan.ipv4.into(), plan.prefix4);
        links::add_default_route(&mut batch, ETH0.1, plan.gateway4.into());
        links::add_address(&mut batch, ETH0, links::link_local(plan.mac).into(), 64);
        batch.optional();
        links::add_address(&mut batch, ETH0, plan.ipv6.into(), plan.prefix6);
        batch.optional();
        links::add_default_route(&mut batch, ETH0.1, plan.gateway6.into());
        batch.optional();
        Ok(inside.run(&batch)?)
    }

    /// The addresses that the pod sees. To be kept as [`crate::pod::PodSpec::address`].
    pub fn inner(&self) -> &AddressPlan {
        &self.inner
    }

    /// The addresses under which others reach it: the same, unless they were taken when the pod was restarted.
    pub fn outer(&self) -> &AddressPlan {
        &self.outer
    }

    /// Prepares for [`Network::block`] so that it lets packets for the pod wait instead of dropping them. Where the host
    /// cannot do that, they are dropped.
    pub fn make_waiting_room(&self) {
        self.waiting_room.get_or_init(|| {
            let make = || {
                let channel = Channel::route()?;
                let links = links::list(&channel)?;
                let master = links.iter().find(|l| l.index == self.index).and_then(|l| l.master);
                let master = master.ok_or_else(|| io::Error::other("the pod's link is on no bridge"))?;
                WaitingRoom::make(&channel, &self.link, self.outer.mac, master)
            };
            make().inspect_err(|error| tracing::info!("packets for a held pod are dropped: {error}")).ok()
        });
    }

    /// The pod, which is blocked here, runs on another host of the same network: what has waited for it goes there.
    pub fn send_after(&self) -> Result<(), NetworkError> {
        if self.waiting_room().is_none() { Ok(()) } else { self.send_after_by(|_| {}) }
    }

    /// The same by the way that `lead` shows the bridge.
    fn send_after_by(&self, lead: impl FnOnce(&mut Batch)) -> Result<(), NetworkError> {
        let mut batch = Batch::default();
        if let Some(room) = self.waiting_room() {
            room.leave(&mut batch);
        }
        lead(&mut batch);
        open()?.run(&batch)?;
        match self.waiting_room() {
            Some(room) => room.empty(Waiting::All).map_err(kernel("sending on", "what has waited")),
            None => Ok(()),
        }
    }

    fn waiting_room(&self) -> Option<&WaitingRoom> {
        self.waiting_room.get().and_then(Option::as_ref)
    }

    /// Has packets for the pod wait from now on if there is a place for them, and else blocks it. Whether what it sends itself
    /// passes.
    pub fn divert(&self) -> Result<bool, NetworkError> {
        let Some(room) = self.waiting_room() else { return self.block().map(|()| false) };
        let mut batch = Batch::default();
        room.open(&mut batch);
        Ok(open()?.run(&batch).map(|()| true)?)
    }

    /// Stops the pod's packets from now on, both ways, on the host's side: the pod cannot tell, and what the bridge has
    /// learned stays. Those that wait go on waiting.
    pub fn block(&self) -> Result<(), NetworkError> {
        let mut batch = Batch::default();
        if let Some(room) = self.waiting_room() {
            room.open(&mut batch);
        }
        links::set_port(&mut batch, (&self.link, self.index), PortState::Disabled);
        Ok(open()?.run(&batch)?)
    }

    /// Lets packets through again, those first that wait.
    pub fn unblock(&self) -> Result<(), NetworkError> {
        self.open_port(Waiting::All)
    }

    /// The same for as long as newcomers are dropped ([`Network::drop_newcomers`]): those that wait already go on waiting.
    pub fn unblock_for_known(&self) -> Result<(), NetworkError> {
        self.open_port(Waiting::Known)
    }

    fn open_port(&self, who: Waiting) -> Result<(), NetworkError> {
        let mut batch = Batch::default();
        links::set_port(&mut batch, (&self.link, self.index), PortState::Forwarding);
        if let Some(room) = self.waiting_room() {
            room.close(&mut batch, self.index);
        }
        match open()?.run(&batch) {
            // The pod has switched its end off. The bridge opens the port when it is on again.
            Err(failed) if failed.source.raw_os_error() == Some(libc::ENETDOWN) => {}
            other => other?,
        }
        match self.waiting_room() {
            Some(room) => room.empty(who).map_err(kernel("sending on", "what has waited")),
            None => Ok(()),
        }
    }

    /// Has the pod ask anew for the neighbours that it asked for while it was blocked: it would wait for a second before it
    /// did so by itself, with all that it has for them.
    pub fn forget_unanswered(&self) -> Result<(), NetworkError> {
        let forget = || neighbours::forget_unanswered(&Channel::route()?, ETH0.1);
        namespace::inside(self.init, forget).map_err(kernel("forgetting", "neighbours that were not heard of"))
    }

    /// Drops requests for new TCP connections on their way to the pod from now on; those that it has go on.
    pub fn drop_newcomers(&self) -> Result<(), NetworkError> {
        newcomers::drop_at(&self.link)
    }

    /// Lets them through again. It is no error if they were not dropped.
    pub fn admit_newcomers(&self) -> Result<(), NetworkError> {
        newcomers::admit_at(&self.link)
    }

    /// Tells the bridge's neighbours where the pod's addresses are now (gratuitous ARP, unsolicited NA).
    ///
    /// Returns when they have been told. The rest is done beside the caller: the kernel takes tens of milliseconds to close a
    /// packet socket.
    pub fn announce(&self) {
        let (frames, init, address) = (announce::frames(&self.inner), self.init, self.outer.ipv4);
        let (told, done) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let send = move || {
                let socket = packet::send_frames(ETH0.1, &frames)?;
                drop(told);
                drop(socket);
                Ok(())
            };
            if let Err(error) = namespace::inside(init, send) {
                tracing::warn!("announcing {address}: {error}");
            }
        });
        // Nothing is ever said: it ends when they have been told, or cannot be.
        let _: Result<(), _> = done.recv();
    }

    /// Takes back what this process holds for the pod (published ports), after reading a written-down connection.
    pub fn resume(&mut self, init: HostPid) -> Result<(), NetworkError> {
        self.init = init;
        // Somebody may have taken a port since the last monitor died; the rules are still there and go before.
        self.held = publish::hold(&self.publish).unwrap_or_default();
        Ok(())
    }

    /// Removes the pod's link and rules, and the bridge with its last pod. Whether its processes live or not; again is no error.
    pub fn detach(&self) -> Result<(), NetworkError> {
        self.take_away(Behind::Thread)
    }

    /// As [`Network::detach`], for a process that is about to end: what the kernel does when nobody sees the link any more, for
    /// tens of milliseconds, it does in another.
    pub fn depart(&self) -> Result<(), NetworkError> {
        self.take_away(Behind::Process)
    }

    fn take_away(&self, behind: Behind) -> Result<(), NetworkError> {
        let channel = open()?;
        let _lock = namespace::lock().map_err(kernel("locking", "the network namespace"))?;
        if self.is_somebody_elses(&bridge::list(&channel)?) {
            return Ok(());
        }
        self.remove_rules()?;
        let line = self.former.as_ref().map(|_| former::link_name(&self.link));
        if bridge::remove_if_idle(&self.config, &channel, Some(&self.link), behind)? {
            return line.as_deref().map_or(Ok(()), line::remove);
        }
        if let Some(line) = &line {
            line::remove(line)?;
        }
        let mut batch = Batch::default();
        links::delete(&mut batch, &self.link);
        if self.waiting_room().is_some() {
            links::delete(&mut batch, &waiting_room::name(&self.link));
            batch.optional();
        }
        match channel.remove(batch, self.index, behind) {
            // The pod's last process ended, and the kernel has removed the link with the pod's namespace.
            Err(gone) if gone.source.raw_os_error() == Some(libc::ENODEV) => Ok(()),
            other => Ok(other?),
        }
    }
}

/// The place that the pod had where it was before, as it has it here: not needed where it has the same address.
fn former_place(
    config: &HostConfig,
    request: &Request<'_>,
    outer: &AddressPlan,
    inner: &AddressPlan,
    channel: &Channel,
) -> Result<Option<Kept>, NetworkError> {
    let Some(place) = request.former.filter(|place| place.plan.ipv4 != outer.ipv4) else { return Ok(None) };
    let gateway_mac = bridge::hardware_address(config, channel)?;
    if place.host == config.address.address || place.gateway_mac == gateway_mac {
        let what = "a network of pods of its own: no forwarder can lead to one that is called the same";
        return Err(NetworkError::Lacks(what.to_owned()));
    }
    if outer.mac != inner.mac {
        return Err(NetworkError::Taken(
            "the MAC address that the pod was born with, which a forwarder needs,".to_owned(),
        ));
    }
    Ok(Some(Kept { place: place.clone(), gateway_mac }))
}

/// Whether this host can make a bridge with a veth on it, filter packets, exchange addresses on a link, have a line to
/// another host, and follow a pod, tried in a network namespace that is then gone.
pub fn probe() -> [io::Result<()>; 5] {
    let tried = || Ok([probe::bridge(), filter::is_there(), probe::exchange(), line::try_one(), follow::try_it()]);
    in_fresh_namespace(tried).unwrap_or_else(|e| [(); 5].map(|()| Err(io::Error::new(e.kind(), e.to_string()))))
}

/// Does something in a network namespace that is then gone.
fn in_fresh_namespace<T: Send + 'static>(act: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    let tried = std::thread::spawn(|| {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET)?;
        act()
    });
    tried.join().unwrap_or_else(|_| Err(io::Error::other("the probe panicked")))
}

fn open() -> Result<Channel, NetworkError> {
    Channel::route().map_err(kernel("opening", "a netlink socket"))
}

/// Name and number of the interface that a pod is born with.
pub(crate) fn pod_interface() -> (&'static str, u32) {
    ETH0
}

/// Switches the loopback interface on in the network namespace of `init` (`--net private`; [`Network::attach`] does it itself).
pub fn loopback(init: HostPid) -> Result<(), NetworkError> {
    let set_up = || {
        let mut batch = Batch::default();
        links::set_up(&mut batch, "lo");
        Channel::route()?.run(&batch).map_err(io::Error::from)
    };
    namespace::inside(init, set_up).map_err(kernel("switching on", "the pod's loopback interface"))
}

/// The IPv4 address of the pod that has this IPv6 address; exit code 2 if no pod can have it.
pub fn ipv4_of(address: Ipv6Addr) -> Result<Ipv4Addr, NetworkError> {
    lease::ipv4_of(address)
}

/// Whether a pod that comes from another host could keep this address here: nobody has it, and it is of the pods' network.
pub fn could_lease(config: &HostConfig, address: Ipv4Addr) -> Result<(), NetworkError> {
    let request = Request { address: Some((address, None)), ..Request::default() };
    lease::choose(config, &request, &bridge::list(&open()?)?).map(drop)
}

/// Removes the rules of links that went with their pods, and the bridge if no pod is left on it: for the command that finds that
/// a pod's monitor died with it.
pub fn tidy(config: &HostConfig) -> Result<(), NetworkError> {
    let channel = open()?;
    let _lock = namespace::lock().map_err(kernel("locking", "the network namespace"))?;
    let links = bridge::list(&channel)?;
    let link_of = |table: &str| trail::link_of(table).or_else(|| lease::of_link(table).map(|_| table.to_owned()));
    let is_gone = |table: &str| link_of(table).is_some_and(|gone| links.iter().all(|link| link.name != gone));
    for family in [Family::Inet, Family::Device] {
        for (table, _) in filter::tables(family)?.iter().filter(|(table, _)| is_gone(table)) {
            filter::delete_table(family, table)?;
        }
    }
    bridge::remove_if_idle(config, &channel, None, Behind::Thread).map(drop)
}

/// Reads some bytes as what the kernel says of links, routes, neighbours, connections and packet filters.
pub(crate) fn try_answer(bytes: &[u8]) {
    links::try_answer(bytes);
    neighbours::try_answer(bytes);
    connections::try_answer(bytes);
    filter::try_answer(bytes);
}

/// Reads some bytes as a frame on its way to a pod.
pub(crate) fn try_frame(bytes: &[u8]) {
    let _ = newcomers::is_one(bytes);
}

/// Reads a text as tables of `/proc/net`, as what links and packet filters say of themselves, and as what other hosts say.
pub(crate) fn try_text(text: &str) {
    connections::try_table(text);
    way_out::try_table(text);
    forwarder::try_table(text);
    bridge::try_alias(text);
    follow::try_line(text);
}
