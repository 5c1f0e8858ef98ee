//! The bridge that pods are put on: made with the first, gone with the last, and nothing of it remembered elsewhere.
//!
//! What removing it has to restore is written in its alias, so any zap process can, and a bridge without such an alias
//! is somebody else's: used, but neither changed nor removed.

use super::follow;
use super::former;
use super::forwarder;
use super::lease::{ipv6_of, leased, mac_of};
use super::links::{self, FarEnd, Link};
use super::netlink::{Batch, Behind, Channel};
use super::waiting_room;
use super::way_out::{self, WayOut};
use super::{NetworkError, kernel, open};
use crate::pod::host_config::HostConfig;

/// The mark at the beginning of the alias of what is ours.
const MARK: &str = "zap";

/// What was off before the bridge was made, and is to be switched off with it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Undo {
    forward4: bool,
    forward6: bool,
    guard: bool,
    uplink: Option<String>,
}

impl Undo {
    fn to_alias(&self) -> String {
        let mut alias = MARK.to_owned();
        let words = [(self.forward4, " forward4"), (self.forward6, " forward6"), (self.guard, " guard")];
        alias.extend(words.iter().filter(|(is, _)| *is).map(|(_, word)| *word));
        if let Some(uplink) = &self.uplink {
            alias.push_str(&format!(" uplink={uplink}"));
        }
        alias
    }

    /// What an alias says; `None` if the bridge is not ours.
    fn from_alias(alias: &str) -> Option<Undo> {
        let mut words = alias.split(' ');
        if words.next() != Some(MARK) {
            return None;
        }
        let mut undo = Undo::default();
        for word in words {
            undo.forward4 |= word == "forward4";
            undo.forward6 |= word == "forward6";
            undo.guard |= word == "guard";
            undo.uplink = undo.uplink.or(word.strip_prefix("uplink=").map(str::to_owned));
        }
        Some(undo)
    }
}

/// Reads a text as the alias of a bridge.
pub(super) fn try_alias(text: &str) {
    drop(Undo::from_alias(text));
}

/// The index of the bridge of `config`, made if need be. The caller has the lock.
pub(super) fn ensure(config: &HostConfig, channel: &Channel) -> Result<u32, NetworkError> {
    let links = list(channel)?;
    match find(config, &links) {
        Some(bridge) if bridge.up => return Ok(bridge.index),
        // One of ours that is down is what a maker who was killed has left.
        Some(bridge) if Undo::from_alias(&bridge.alias).is_some() => remove(config, &links, None, Behind::Thread)?,
        Some(_) => return Err(NetworkError::Lacks(format!("the bridge {}: it is switched off", config.bridge))),
        None => {}
    }
    let uplink = config.uplink.as_deref().map(|name| usable_uplink(&links, name)).transpose()?;
    make(config, channel, uplink).inspect_err(|_| {
        let _ = list(channel).and_then(|links| remove(config, &links, None, Behind::Thread));
        // All that there is if it was the bridge that could not be made.
        let mut batch = Batch::default();
        links::delete(&mut batch, &keeper(config)[0]);
        let _ = channel.run(&batch);
    })
}

/// Every link of the namespace, in the order of their making as far as it is known.
pub(super) fn list(channel: &Channel) -> Result<Vec<Link>, NetworkError> {
    let mut links = links::list(channel).map_err(kernel("listing", "the links"))?;
    links.sort_by_key(|l| l.index);
    Ok(links)
}

/// Removes the bridge if it is ours and idle; `last` is a pod's link that goes at the same time. The caller has the lock.
/// Returns whether it has removed it.
pub(super) fn remove_if_idle(
    config: &HostConfig,
    channel: &Channel,
    last: Option<&str>,
    behind: Behind,
) -> Result<bool, NetworkError> {
    let links = list(channel)?;
    let Some(bridge) = find(config, &links).filter(|b| Undo::from_alias(&b.alias).is_some()) else { return Ok(false) };
    let is_pod = |l: &&Link| leased(l).is_some() && Some(l.name.as_str()) != last;
    let needs_it = |l: &&Link| l.master == Some(bridge.index) && (is_pod(l) || forwarder::kept(l).is_some());
    if links.iter().any(|l| needs_it(&l)) || follow::relies_on(config) {
        return Ok(false);
    }
    remove(config, &links, last, behind).map(|()| true)
}

/// Prepares the host for published ports: they need forwarding, and packets of its loopback addresses on the bridge if
/// `loopback` ports are among them. The caller has the lock.
pub(super) fn let_in(config: &HostConfig, channel: &Channel, loopback: bool) -> Result<(), NetworkError> {
    let links = list(channel)?;
    let Some((bridge, undo)) = find(config, &links).and_then(|b| Some((b, Undo::from_alias(&b.alias)?))) else {
        return Ok(());
    };
    let (off4, off6) = way_out::forwarding_is_off(config);
    let guard = loopback && !undo.guard;
    if !off4 && !off6 && !guard {
        return Ok(());
    }
    let undo = Undo {
        forward4: undo.forward4 || off4,
        forward6: undo.forward6 || off6,
        guard: undo.guard || guard,
        uplink: undo.uplink,
    };
    let mut batch = Batch::default();
    links::set_alias(&mut batch, &bridge.name, &undo.to_alias());
    channel.run(&batch)?;
    way_out::forward(off4, off6)?;
    if let (true, Ok(mac)) = (off6, bridge.address.as_slice().try_into()) {
        let mut batch = Batch::default();
        add_link_local(&mut batch, (&bridge.name, bridge.index), mac);
        channel.run(&batch)?;
    }
    if guard { way_out::guard(config) } else { Ok(()) }
}

/// The hardware address of the bridge.
pub(super) fn hardware_address(config: &HostConfig, channel: &Channel) -> Result<[u8; 6], NetworkError> {
    let links = list(channel)?;
    let address = find(config, &links).and_then(|bridge| bridge.address.as_slice().try_into().ok());
    address.ok_or_else(|| NetworkError::Lacks(format!("the bridge {}", config.bridge)))
}

fn find<'a>(config: &HostConfig, links: &'a [Link]) -> Option<&'a Link> {
    links.iter().find(|l| l.name == config.bridge)
}

fn make(config: &HostConfig, channel: &Channel, uplink: Option<&Link>) -> Result<u32, NetworkError> {
    let name = config.bridge.as_str();
    let way = WayOut::of_this_host(config);
    let undo = Undo {
        forward4: way.switches_on_ipv4(),
        forward6: way.switches_on_ipv6(),
        guard: false,
        uplink: uplink.filter(|l| !l.up).map(|l| l.name.clone()),
    };
    let mut batch = Batch::default();
    add_keeper(config, &mut batch);
    links::add_bridge(&mut batch, name, mac_of(config.address.address));
    links::set_alias(&mut batch, name, &undo.to_alias());
    channel.run(&batch)?;
    let links = list(channel)?;
    let index = find(config, &links).map_or(0, |l| l.index);
    let mut batch = Batch::default();
    links::set_master(&mut batch, &keeper(config)[0], index);
    if let Some(uplink) = uplink {
        links::set_master(&mut batch, &uplink.name, index);
        links::set_up(&mut batch, &uplink.name);
    }
    links::add_address(&mut batch, (name, index), config.address.address.into(), config.address.prefix);
    links::add_address_alone(&mut batch, (name, index), ipv6_of(config.address.address).into(), 64);
    batch.optional();
    channel.run(&batch)?;
    way.open(config)?;
    let mut batch = Batch::default();
    if way.forwards_ipv6() {
        add_link_local(&mut batch, (name, index), mac_of(config.address.address));
    }
    links::set_up(&mut batch, name);
    // The network of all pods is longer than what is on this bridge: other hosts have their parts of it.
    let (network, prefix) = (ipv6_of(config.address.first()), 96 + config.address.prefix);
    links::add_network_route(&mut batch, (name, index), network.into(), prefix);
    batch.optional();
    channel.run(&batch)?;
    Ok(index)
}

/// Gives the bridge the address under which the kernel asks, on behalf of others, where a pod is: without it, nobody beyond this
/// host reaches the IPv6 address of a pod that has not spoken first.
fn add_link_local(batch: &mut Batch, bridge: (&str, u32), mac: [u8; 6]) {
    links::add_address(batch, bridge, links::link_local(mac).into(), 64);
    batch.optional();
}

/// Makes a port for the bridge that is always open. Without one, blocking the only pod takes the carrier from the bridge,
/// and the kernel then forgets the host's neighbours and holds the lock on links for many milliseconds.
///
/// It is made before the bridge, so that the kernel also removes it before: removing a bridge is what takes long.
fn add_keeper(config: &HostConfig, batch: &mut Batch) {
    let [near, far] = keeper(config);
    links::add_veth(batch, &near, 0, None, &FarEnd { name: &far, index: 0, mac: None, namespace: None });
    links::set_up(batch, &near);
    links::set_up(batch, &far);
}

fn keeper(config: &HostConfig) -> [String; 2] {
    [format!("{}-a", config.bridge), format!("{}-b", config.bridge)]
}

fn usable_uplink<'a>(links: &'a [Link], name: &str) -> Result<&'a Link, NetworkError> {
    let found = links.iter().find(|l| l.name == name);
    let found = found.ok_or_else(|| NetworkError::Lacks(format!("the interface {name} (`uplink` in config.toml)")))?;
    match found.master {
        Some(_) => Err(NetworkError::Taken(format!("the interface {name} (`uplink` in config.toml)"))),
        None => Ok(found),
    }
}

fn remove(config: &HostConfig, links: &[Link], last: Option<&str>, behind: Behind) -> Result<(), NetworkError> {
    let Some(bridge) = find(config, links) else { return Ok(()) };
    let undo = Undo::from_alias(&bridge.alias).unwrap_or_default();
    way_out::close(config, undo.forward4, undo.forward6, undo.guard)?;
    let mut batch = Batch::default();
    if let Some(last) = last {
        // Without its bridge it would lead to the host, and what a dying pod still sends, the ends of its connections, is not
        // to be heard.
        links::set_down(&mut batch, last);
        batch.optional();
    }
    // A number that is no other bridge's.
    let group = 0x5a00_0000 | bridge.index;
    let [near, _] = keeper(config);
    let (room, line) = (last.map(waiting_room::name), last.map(former::link_name));
    let is_pods = |l: &Link| [last, room.as_deref(), line.as_deref()].contains(&Some(l.name.as_str()));
    let together = |l: &&Link| l.index == bridge.index || l.name == near || is_pods(l);
    for link in links.iter().filter(together) {
        links::set_group(&mut batch, &link.name, group);
        if is_pods(link) {
            // The kernel removes it with the pod's namespace or the monitor, and may get to that first.
            batch.optional();
        }
    }
    if let Some(uplink) = &undo.uplink {
        links::set_down(&mut batch, uplink);
        batch.optional();
    }
    links::delete_group(&mut batch, group);
    let first = links.iter().find(|l| l.name == near).unwrap_or(bridge).index;
    Ok(open()?.remove(batch, first, behind)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_to_be_undone_is_read_back_from_the_alias() {
        for undo in
            [Undo::default(), Undo { forward4: true, forward6: false, guard: true, uplink: Some("eth1".to_owned()) }]
        {
            assert_eq!(Undo::from_alias(&undo.to_alias()), Some(undo));
        }
        assert_eq!(Undo::from_alias("my bridge"), None);
    }
}
