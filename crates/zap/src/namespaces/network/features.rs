//! What interfaces are to do for the kernel with packets (`ethtool -K`): checksums, segments, tags.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::OnceLock;

use serde::{Deserialize, Serialize};

use super::generic::{family, header};
use super::requests::{Requests, text, word};
use crate::pod::network::netlink::{Attributes, Channel, attribute, attributes_of};

/// Interfaces that are to do the same.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Features {
    /// Their numbers.
    pub interfaces: Vec<u32>,
    /// What they are to do, by the kernel's names.
    pub on: BTreeSet<String>,
    /// What they could do, and are not to.
    pub off: BTreeSet<String>,
}

/// What is on and what off.
type Switched = (BTreeSet<String>, BTreeSet<String>);

const FAMILY: &str = "ethtool";
const HEADER: usize = 4;
const GET_NAMES: u8 = 1;
const GET: u8 = 11;
const SET: u8 = 12;
const OF: u16 = 1;
const INDEX: u16 = 1;
const HOW: u16 = 3;
const COMPACT: u32 = 1;
const WITHOUT_REPLY: u32 = 2;
const POSSIBLE: u16 = 2;
const WANTED: u16 = 3;
const BITS: u16 = 3;
const BIT: u16 = 1;
const NAME: u16 = 2;
const VALUE: u16 = 3;
const WORDS: u16 = 4;
/// The names of features among all that the kernel has (`ETH_SS_FEATURES`).
const SETS: u16 = 2;
const FEATURES: u32 = 4;

/// What the interfaces of the caller's namespace are to do, of those that are `known`. A host may be unable to tell.
pub(super) fn list(known: &dyn Fn(u32) -> bool) -> io::Result<Vec<Features>> {
    let mut alike: BTreeMap<Switched, Vec<u32>> = BTreeMap::new();
    for (index, switched) in now()?.into_iter().filter(|(index, _)| known(*index)) {
        alike.entry(switched).or_default().push(index);
    }
    Ok(alike.into_iter().map(|((on, off), interfaces)| Features { interfaces, on, off }).collect())
}

fn now() -> io::Result<BTreeMap<u32, Switched>> {
    let Ok(channel) = Channel::generic() else { return Ok(BTreeMap::new()) };
    let Some(family) = family(&channel, FAMILY)? else { return Ok(BTreeMap::new()) };
    let names = names(&channel, family)?;
    let mut asked = Attributes::default();
    // Each would be larger than what the kernel lists at once, with all names in it.
    asked.nest(OF, |of| {
        of.put_u32(HOW, COMPACT);
    });
    let bodies = channel.ask(family, libc::NLM_F_DUMP, &[&header(GET), asked.bytes()].concat())?;
    Ok(bodies.iter().filter_map(|body| parse(body, names)).collect())
}

/// What the kernel calls features, by their numbers: the same as long as it runs.
fn names(channel: &Channel, family: u16) -> io::Result<&'static [String]> {
    static NAMES: OnceLock<Vec<String>> = OnceLock::new();
    if let Some(names) = NAMES.get() {
        return Ok(names);
    }
    let mut asked = Attributes::default();
    asked.nest(OF, |_| {}).nest(SETS, |sets| {
        sets.nest(BIT, |set| {
            set.put_u32(INDEX, FEATURES);
        });
    });
    let bodies = channel.ask(family, 0, &[&header(GET_NAMES), asked.bytes()].concat())?;
    let body = bodies.first().and_then(|body| body.get(HEADER..)).unwrap_or_default();
    let sets = attributes_of(body, SETS).flat_map(|sets| attributes_of(sets, BIT));
    let names = sets.flat_map(|set| attributes_of(set, BITS)).flat_map(|names| attributes_of(names, BIT));
    Ok(NAMES.get_or_init(|| names.filter_map(|name| attribute(name, NAME)).map(text).collect()))
}

fn parse(body: &[u8], names: &[String]) -> Option<(u32, Switched)> {
    let all = body.get(HEADER..)?;
    let those = |which| Some(named(attribute(attribute(all, which)?, WORDS)?, names));
    let (possible, wanted): (BTreeSet<String>, _) = (those(POSSIBLE)?, those(WANTED)?);
    let on: BTreeSet<String> = wanted.intersection(&possible).cloned().collect();
    let off = possible.difference(&on).cloned().collect();
    Some((word(attribute(attribute(all, OF)?, INDEX)?)?, (on, off)))
}

/// The names of the bits that are set.
fn named(bits: &[u8], names: &[String]) -> BTreeSet<String> {
    let is_set = |number: usize| word(bits.get(number / 32 * 4..)?).filter(|word| word >> (number % 32) & 1 != 0);
    names.iter().enumerate().filter(|(number, _)| is_set(*number).is_some()).map(|(_, name)| name.clone()).collect()
}

/// Has interfaces of the caller's namespace do what they are to and do not, as far as this kernel knows it.
pub(super) fn restart(wanted: &[Features]) -> io::Result<()> {
    if wanted.is_empty() {
        return Ok(());
    }
    let (channel, now) = (Channel::generic()?, now()?);
    let Some(family) = family(&channel, FAMILY)? else { return Ok(()) };
    let mut requests = Requests::new(&channel);
    for features in wanted {
        for index in &features.interfaces {
            let Some((on, off)) = now.get(index) else { continue };
            let switched: Vec<_> = features
                .on
                .intersection(off)
                .map(|name| (name, true))
                .chain(features.off.intersection(on).map(|name| (name, false)))
                .collect();
            if !switched.is_empty() {
                let what = ("switching features of", "an interface");
                requests.push(what, (family, 0), &header(SET), |request| put(request, *index, &switched))?;
            }
        }
    }
    requests.run()
}

fn put(request: &mut Attributes, index: u32, switched: &[(&String, bool)]) {
    request.nest(OF, |of| {
        of.put_u32(INDEX, index).put_u32(HOW, WITHOUT_REPLY);
    });
    request.nest(WANTED, |wanted| {
        wanted.nest(BITS, |bits| {
            for (name, on) in switched {
                bits.nest(BIT, |bit| {
                    bit.put_str(NAME, name);
                    if *on {
                        bit.put(VALUE, &[]);
                    }
                });
            }
        });
    });
}

#[cfg(test)]
mod tests {
    use super::super::LOOPBACK;
    use super::*;
    use crate::sys::{clone, namespace};

    #[test]
    fn what_was_switched_is_listed_and_switched_again() {
        const SWITCHED: &str = "rx-gro-list";
        let listed = || list(&|index| index == LOOPBACK);
        let (before, after) = clone::in_thread(|| {
            namespace::unshare(libc::CLONE_NEWNET)?;
            let before = listed()?;
            let [Features { interfaces, on, off }] = &before[..] else { return Ok((before, Vec::new())) };
            let (mut on, mut off) = (on.clone(), off.clone());
            on.extend(off.take(SWITCHED));
            // What no kernel knows is left.
            off.insert("of-another-kernel".into());
            restart(&[Features { interfaces: interfaces.clone(), on, off }])?;
            Ok((before, listed()?))
        })
        .unwrap();
        assert!(before[0].off.contains(SWITCHED) && !before[0].on.contains(SWITCHED), "{before:?}");
        assert!(after[0].on.contains(SWITCHED) && !after[0].off.contains(SWITCHED), "{after:?}");
    }
}
