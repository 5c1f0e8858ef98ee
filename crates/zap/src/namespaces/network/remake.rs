//! Making interfaces as they were.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::path::Path;

use serde_bytes::ByteBuf;

use super::Place;
use super::interfaces::{self, INET6_GENERATION, InterfaceState, MADE_WITH, OTHER_NAME, OTHER_NAMES, PORT, UP};
use super::requests::Requests;
use crate::pod::network::netlink::{Attributes, Channel};
use crate::sys::namespace;
use crate::sys::tap::{self, Lasting};

const CREATE: i32 = libc::NLM_F_CREATE | libc::NLM_F_EXCL;
const RTM_NEWLINKPROP: u16 = 108;
const PORT_KIND: u16 = 4;
const PORT_DATA: u16 = 5;
const VETH_INFO_PEER: u16 = 1;
const GENERATE_NONE: u8 = 1;
/// The kernel puts off what it has noticed for a second at most.
const LONGEST_NOTICE: u16 = 2000;

/// The other end of a veth, and the namespace that it goes to if that is another.
pub(super) type Peer<'a> = (&'a InterfaceState, Option<BorrowedFd<'a>>);

fn put_some(attributes: &mut Attributes, all: &[(u16, ByteBuf)], wanted: &[u16]) {
    for (kind, value) in all.iter().filter(|(kind, _)| wanted.contains(kind)) {
        attributes.put(*kind, value);
    }
}

/// Makes an interface, a veth with its other end.
pub(super) fn make(requests: &mut Requests<'_>, state: &InterfaceState, peer: Option<Peer<'_>>) -> io::Result<()> {
    let Some((kind, settable)) = state.kind.as_deref().and_then(|kind| Some((kind, interfaces::data_of(kind)?))) else {
        return Ok(());
    };
    let header = interfaces::header(state.index, 0, 0);
    requests.push(("making the interface", &state.name), (libc::RTM_NEWLINK, CREATE), &header, |link| {
        begin(link, state);
        if let (Some(other), None) = (state.other, peer) {
            link.put_u32(libc::IFLA_LINK, other.index);
        }
        link.nest(libc::IFLA_LINKINFO, |info| {
            info.put_str(libc::IFLA_INFO_KIND, kind).nest(libc::IFLA_INFO_DATA, |data| match peer {
                Some(peer) => put_peer(data, peer),
                // A bridge is given its settings afterwards, where they are not what it has.
                None if kind == "bridge" => {}
                None => put_some(data, &state.data, settable),
            });
        });
    })
}

/// Makes a tun or tap device, which stays until it is for one of its files to keep it; here is one.
pub(super) fn make_tun(state: &InterfaceState) -> io::Result<File> {
    let what = |e: io::Error| io::Error::new(e.kind(), format!("making the interface {}: {e}", state.name));
    let device = Path::new(tap::PATH);
    let file = tap::make_lasting(device, (&state.name, state.index), state.tun_flags()).map_err(what)?;
    for (whose, owner) in [Lasting::Owner, Lasting::Group].into_iter().zip(state.tun_owners()) {
        owner.map_or(Ok(()), |owner| tap::set_lasting(&file, whose, owner)).map_err(what)?;
    }
    Ok(file)
}

fn put_peer(data: &mut Attributes, (state, there): Peer<'_>) {
    data.nest_after(VETH_INFO_PEER, &interfaces::header(state.index, 0, 0), |peer| {
        begin(peer, state);
        if let Some(there) = there {
            peer.put_u32(libc::IFLA_NET_NS_FD, there.as_raw_fd() as u32);
        }
    });
}

/// What an interface begins with.
fn begin(link: &mut Attributes, state: &InterfaceState) {
    link.put_str(libc::IFLA_IFNAME, &state.name);
    put_some(link, &state.settings, &MADE_WITH);
    // A bridge has the address of a port, unless it is given one.
    if let Some(address) = state.setting(libc::IFLA_ADDRESS).filter(|_| state.kind.as_deref() != Some("bridge")) {
        link.put(libc::IFLA_ADDRESS, address);
    }
}

/// Every interface there is now.
fn now(route: &Channel) -> io::Result<Vec<InterfaceState>> {
    let bodies = route.ask(libc::RTM_GETLINK, libc::NLM_F_DUMP, &interfaces::question(0))?;
    Ok(bodies.iter().filter_map(|body| Some(interfaces::parse(body, Place::default())?.0)).collect())
}

fn change(
    requests: &mut Requests<'_>,
    state: &InterfaceState,
    flags: (u32, u32),
    fill: impl FnOnce(&mut Attributes),
) -> io::Result<()> {
    let header = interfaces::header(state.index, flags.0, flags.1);
    requests.push(("setting up the interface", &state.name), (libc::RTM_NEWLINK, 0), &header, fill)
}

/// Gives those that a namespace is born with their names: others may have been given the old ones.
pub(super) fn rename(route: &Channel, all: &[InterfaceState]) -> io::Result<()> {
    let (mut requests, now) = (Requests::new(route), now(route)?);
    for state in all.iter().filter(|state| state.kind.is_none()) {
        if now.iter().any(|now| now.index == state.index && now.name != state.name) {
            change(&mut requests, state, (0, 0), |link| {
                link.put_str(libc::IFLA_IFNAME, &state.name);
            })?;
        }
    }
    requests.run()
}

/// Puts ports into their bridges, and gives every interface what it does not have already.
pub(super) fn adjust(route: &Channel, all: &[InterfaceState]) -> io::Result<()> {
    let mut requests = Requests::new(route);
    for (state, bridge) in all.iter().filter_map(|state| Some((state, state.bridge?))) {
        change(&mut requests, state, (0, 0), |link| {
            link.put_u32(libc::IFLA_MASTER, bridge);
        })?;
    }
    requests.run()?;
    // A bridge has become what its ports made of it.
    let now = now(route)?;
    for state in all {
        let Some(now) = now.iter().find(|now| now.index == state.index) else { continue };
        adjust_one(&mut requests, state, now)?;
    }
    requests.run()
}

fn missing(wanted: &[(u16, ByteBuf)], now: &[(u16, ByteBuf)]) -> Vec<(u16, ByteBuf)> {
    wanted.iter().filter(|one| !now.contains(one)).cloned().collect()
}

fn adjust_one(requests: &mut Requests<'_>, state: &InterfaceState, now: &InterfaceState) -> io::Result<()> {
    let settings: Vec<_> = missing(&state.settings, &now.settings);
    let changed = (state.flags ^ now.flags) & !UP;
    let given = state.given();
    if changed != 0 || settings.iter().any(|(kind, _)| given.contains(kind)) {
        // Without a mask of what is meant the kernel takes all flags for that.
        change(requests, state, (state.flags & changed, changed), |link| put_some(link, &settings, &given))?;
    }
    if let (Some(kind @ "bridge"), data @ [_, ..]) = (state.kind.as_deref(), &missing(&state.data, &now.data)[..]) {
        change(requests, state, (0, 0), |link| {
            link.nest(libc::IFLA_LINKINFO, |info| {
                let settable = interfaces::data_of(kind).unwrap_or_default();
                info.put_str(libc::IFLA_INFO_KIND, kind);
                info.nest(libc::IFLA_INFO_DATA, |inside| put_some(inside, data, settable));
            });
        })?;
    }
    if let port @ [_, ..] = &missing(&state.port, &now.port)[..] {
        change(requests, state, (0, 0), |link| {
            link.nest(libc::IFLA_LINKINFO, |info| {
                info.put_str(PORT_KIND, "bridge").nest(PORT_DATA, |inside| put_some(inside, port, PORT));
            });
        })?;
    }
    let names: Vec<_> = state.other_names.iter().filter(|name| !now.other_names.contains(name)).collect();
    if !names.is_empty() {
        let header = interfaces::header(state.index, 0, 0);
        requests.push(("naming the interface", &state.name), (RTM_NEWLINKPROP, CREATE), &header, |link| {
            link.nest(OTHER_NAMES, |inside| {
                for name in names {
                    inside.put_str(OTHER_NAME, name);
                }
            });
        })?;
    }
    Ok(())
}

/// Switches interfaces on and off. None of them comes by an address through that.
pub(super) fn switch(route: &Channel, all: &[InterfaceState]) -> io::Result<()> {
    let (mut requests, now) = (Requests::new(route), now(route)?);
    for state in all {
        let Some(now) = now.iter().find(|now| now.index == state.index) else { continue };
        if state.is_up() && !now.is_up() {
            generate(&mut requests, state, GENERATE_NONE)?;
        }
        if state.is_up() != now.is_up() {
            change(&mut requests, state, (state.flags & UP, UP), |_| {})?;
        }
    }
    requests.run()
}

/// Has interfaces come by addresses as they did, once they know whether they have a carrier: it is then that they do.
pub(super) fn let_generate(route: &Channel, all: &[InterfaceState]) -> io::Result<()> {
    // Subscribed before asking, so that no change can fall between the two.
    let news = Channel::news(libc::RTMGRP_LINK)?;
    let mut requests = Requests::new(route);
    for state in all {
        let found = await_notice(route, &news, state.index)?;
        let now = found.first().and_then(|body| interfaces::parse(body, Place::default()));
        match (state.generation, now.and_then(|(now, ..)| now.generation)) {
            (Some(wanted), Some(has)) if wanted != has => generate(&mut requests, state, wanted)?,
            _ => {}
        }
    }
    requests.run()
}

/// Says again what the kernel forgets of interfaces as it notices that they have a carrier.
pub(super) fn say_again(route: &Channel, all: &[InterfaceState], what: &[u16]) -> io::Result<()> {
    // Not every interface lets itself be told what is not so.
    let is_said = |(kind, value): &&(u16, ByteBuf)| what.contains(kind) && value[..] != [0];
    let said = |state: &InterfaceState| state.settings.iter().filter(is_said).cloned().collect::<Vec<_>>();
    let those: Vec<_> = all.iter().map(|state| (state, said(state))).filter(|(_, said)| !said.is_empty()).collect();
    if those.is_empty() {
        return Ok(());
    }
    let (news, mut requests) = (Channel::news(libc::RTMGRP_LINK)?, Requests::new(route));
    for (state, said) in those {
        await_notice(route, &news, state.index)?;
        change(&mut requests, state, (0, 0), |link| put_some(link, &said, what))?;
    }
    requests.run()
}

/// Has interfaces listen to the groups that they were made to.
pub(super) fn listen(all: &[InterfaceState]) -> io::Result<()> {
    for state in all {
        state.groups.iter().try_for_each(|group| namespace::listen_to(&state.name, group))?;
    }
    Ok(())
}

/// What there is to know of an interface, once the kernel has taken notice of its carrier: until then it sends nothing.
fn await_notice(route: &Channel, news: &Channel, index: u32) -> io::Result<Vec<Vec<u8>>> {
    loop {
        // Asking for one has the kernel (6.8 and later) see to its carrier first, unless it is at it.
        let found = route.ask(libc::RTM_GETLINK, 0, &interfaces::question(index))?;
        let unnoticed = found.first().is_some_and(|body| interfaces::has_unnoticed_carrier(body));
        if !unnoticed || !news.wait(LONGEST_NOTICE.into())? {
            return Ok(found);
        }
    }
}

fn generate(requests: &mut Requests<'_>, state: &InterfaceState, mode: u8) -> io::Result<()> {
    change(requests, state, (0, 0), |link| {
        link.nest(libc::IFLA_AF_SPEC, |families| {
            families.nest(libc::AF_INET6 as u16, |v6| {
                v6.put(INET6_GENERATION, &[mode]);
            });
        });
    })?;
    // The host may be without IPv6.
    requests.optional();
    Ok(())
}
