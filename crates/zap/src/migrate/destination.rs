//! The side that takes a pod.

use std::fs::File;
use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};

use serde::{Deserialize, Serialize};

use super::from_source::FromSource;
use super::protocol::{Hello, Message, VERSION};
use super::strategies::{self, Strategy};
use super::wire::Wire;
use crate::checkpoint::Phase;
use crate::demands::Offer;
use crate::error::RebuildError;
use crate::fault::{self, Stream};
use crate::fetch::{Fetching, Filling, FromImage, FromStore, Supply, Whose};
use crate::files::{self, HashCache, UsedFile};
use crate::image::{FORMAT, ImageError, ImageReader, ReceivedImage};
use crate::monitor::protocol::Failure;
use crate::pod::host_config::HostConfig;
use crate::pod::network::follow::{Here, Moved};
use crate::pod::network::{self, Network, NetworkError};
use crate::pod::{LivePod, NetworkMode, PodSpec, Store};
use crate::process::grow::Incomplete;
use crate::record;
use crate::restart::{self, Restarted};

/// What a destination insists on.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Options {
    /// The fault point at which the monitor is to die ([`crate::fault`]).
    #[serde(default)]
    pub fault: Option<String>,
    /// For tests: what happens to the stream.
    #[serde(default)]
    pub stream: Stream,
}

/// Takes a pod that comes over `wire`. On an error nothing is left of it, and the source has been told if it could be. The
/// caller must be its process's only thread.
pub fn receive(store: Store, options: &Options, wire: Wire) -> Result<Restarted, Failure> {
    let wire = Arc::new(wire);
    fault::arm(options.fault.as_deref());
    wire.greet().map_err(cut)?;
    let hello = match wire.hear().map_err(cut)? {
        Message::Hello(hello) => *hello,
        other => return Err(out_of_turn(&other)),
    };
    if let Err(failure) = could_live_here(&store, &hello) {
        let _ = wire.send(&Message::Refused(failure.clone()));
        return Err(failure);
    }
    let offer = Some(Box::new(Offer::here()));
    wire.send(&Message::Welcome { name: hello.spec.name.clone(), offer }).map_err(cut)?;
    let received = fault::fallible("receive-welcomed").map_err(cut).and_then(|()| take_image(&store, &hello, &wire));
    let received = received.and_then(|reader| fault::fallible("receive-complete").map(|()| reader).map_err(cut));
    let rebuilt = received.and_then(|reader| rebuild(store, &hello, reader, &wire));
    let received = rebuilt.inspect_err(|failure| {
        let _ = wire.send(&Message::Failed(failure.clone()));
    })?;
    // The source finds out by itself if it cannot be told.
    let _ = wire.send(&Message::Running);
    fault::point("receive-running");
    if let Some(fetching) = &received.fetching {
        fault::point("receive-fetching");
        fetching.settle();
    }
    Ok(received)
}

fn cut(error: std::io::Error) -> Failure {
    Failure { message: format!("the stream from the source failed: {error}"), code: 1 }
}

fn out_of_turn(message: &Message) -> Failure {
    Failure { message: format!("the source says {}, which is not its turn to say", message.name()), code: 1 }
}

fn abandoned(why: &str) -> Failure {
    Failure { message: format!("the source thought better of it: {why}"), code: 1 }
}

/// Looks whether the pod could be rebuilt here, before it is touched there.
fn could_live_here(store: &Store, hello: &Hello) -> Result<(), Failure> {
    let refused = |code, message: String| Err(Failure { message, code });
    if hello.protocol != VERSION || hello.format != FORMAT {
        return refused(
            4,
            format!(
                "it speaks version {} with images of format {}; this zap speaks {VERSION} with format {FORMAT}",
                hello.protocol, hello.format
            ),
        );
    }
    let unknown = |(kind, version): &&(String, u16)| {
        !record::KNOWN.iter().any(|(known, newest)| known == kind && version <= newest)
    };
    if let Some((kind, version)) = hello.records.iter().find(unknown) {
        return refused(
            4,
            format!("it writes records of kind {kind}, version {version}, which this zap does not know"),
        );
    }
    let PodSpec { name, root, binds, .. } = &hello.spec;
    if store.pod_dir(name).exists() {
        return refused(6, format!("the name {name} is taken"));
    }
    let absent = std::iter::once(root).chain(binds.iter().map(|bind| &bind.source)).find(|path| !path.exists());
    if let Some(path) = absent {
        return refused(4, format!("there is no {} here", path.display()));
    }
    if let (NetworkMode::Bridge, Some(address)) = (hello.spec.network, hello.address) {
        let config = HostConfig::load(store.state()).map_err(|e| Failure { message: e.to_string(), code: 1 })?;
        if let (Err(error), false) = (network::could_lease(&config, address), hello.any_address) {
            return Err(Failure::of(&error, error.exit_code()));
        }
        if hello.former.is_some() && network::could_lease(&config, address).is_err() {
            network::forwarder::can_have_lines().map_err(|error| Failure::of(&error, error.exit_code()))?;
        }
        if hello.trail.is_some() {
            network::follow::can_follow().map_err(|error| Failure::of(&error, error.exit_code()))?;
        }
    }
    if strategies::of_name(&hello.strategy).is_none() {
        return refused(4, format!("it moves memory by {}, which this zap does not know", hello.strategy));
    }
    if let Some(path) = hello.store.as_ref().filter(|path| !path.exists()) {
        return refused(4, format!("it does not see {}: both hosts must see the store", path.display()));
    }
    if let Some(free) = available_storage(store).filter(|free| *free < hello.files) {
        let storage = store.storage().display();
        let (has, free) = (hello.files >> 20, free >> 20);
        return refused(4, format!("its files take {has} MiB, and {free} are free in {storage}"));
    }
    match available_memory() {
        Some(free) if free < hello.memory => {
            refused(4, format!("it has {} MiB of memory, and {} are free here", hello.memory >> 20, free >> 20))
        }
        _ => Ok(()),
    }
}

/// Compares the files of the root that the pod uses with those here, while it runs there. One that it begins to use afterwards
/// is compared when it is rebuilt.
fn compare_root(root: &Path, files: Vec<UsedFile>) -> Result<(), Failure> {
    files::compare(root, files).map_err(|error| match error {
        RebuildError::Changed { path, what } => {
            let message =
                format!("{path} is another file there ({what}); --carry-files has the pod take its own along");
            Failure { message, code: 4 }
        }
        other => Failure::of(&other, 1),
    })
}

/// Bytes that are free where the pod's files go: in the nearest directory above that is there already.
fn available_storage(store: &Store) -> Option<u64> {
    let there = store.storage().ancestors().find(|directory| directory.exists())?;
    let file_system = nix::sys::statvfs::statvfs(there).ok()?;
    Some(file_system.blocks_available() * file_system.fragment_size())
}

/// The pod's address, if it can have it here; none if another will do.
fn address(store: &Store, hello: &Hello) -> Option<IpAddr> {
    let could_have = |address: &std::net::Ipv4Addr| {
        let config = HostConfig::load(store.state());
        config.is_ok_and(|config| network::could_lease(&config, *address).is_ok())
    };
    hello.address.filter(|address| !hello.any_address || could_have(address)).map(IpAddr::V4)
}

/// Bytes of memory that the kernel thinks could be had.
fn available_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    Some(line.split_ascii_whitespace().next()?.parse::<u64>().ok()? << 10)
}

/// What can end the arrival of an image.
enum Arrival {
    Cut(std::io::Error),
    Image(ImageError),
    Said(Failure),
}

impl From<std::io::Error> for Arrival {
    fn from(error: std::io::Error) -> Arrival {
        Arrival::Cut(error)
    }
}

impl From<ImageError> for Arrival {
    fn from(error: ImageError) -> Arrival {
        Arrival::Image(error)
    }
}

/// Keeps the parts of the image until all are there.
fn take_image(store: &Store, hello: &Hello, wire: &Wire) -> Result<ImageReader, Failure> {
    let storage = store.storage().to_owned();
    HashCache::load(store.state());
    // Without it archives are kept in memory.
    let _ = crate::pod::make_private_directory(&storage);
    let image = ReceivedImage::new(Path::new("the image from the source"), &storage);
    let arrived = std::thread::scope(|scope| {
        let (full, to_keep) = sync_channel(FRAMES);
        let (kept, free) = channel();
        let keeper = scope.spawn(|| keep(image, to_keep, kept));
        let heard = hear_all(hello, wire, &full, &free);
        drop(full);
        // If something could not be kept, that is why nothing more was heard.
        let image = keeper.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        Ok(image.complete(&heard?)?)
    });
    arrived.map_err(|error| match error {
        Arrival::Cut(error) => cut(error),
        Arrival::Image(error) => Failure::of(&error, 5),
        Arrival::Said(failure) => failure,
    })
}

/// What is heard while earlier parts are being kept.
const FRAMES: usize = 2;

/// Something of an image.
enum Part {
    Begins(String),
    Stored(String, File),
    Bytes(u16, Vec<u8>),
}

/// Keeps what comes, and gives buffers back.
fn keep(mut image: ReceivedImage, parts: Receiver<Part>, kept: Sender<Vec<u8>>) -> Result<ReceivedImage, ImageError> {
    for part in parts {
        match part {
            Part::Begins(name) => image.begin(&name)?,
            Part::Stored(name, file) => image.stored(&name, file)?,
            Part::Bytes(number, bytes) => {
                image.append(number, &bytes)?;
                // Nobody may need another one.
                let _ = kept.send(bytes);
            }
        }
    }
    Ok(image)
}

/// Hears all parts of the image, and then its manifest.
fn hear_all(
    hello: &Hello,
    wire: &Wire,
    parts: &SyncSender<Part>,
    free: &Receiver<Vec<u8>>,
) -> Result<Vec<u8>, Arrival> {
    loop {
        let mut bytes = None;
        let heard = wire.hear_frame(|part, buffer| {
            bytes = Some(Part::Bytes(part, std::mem::replace(buffer, free.try_recv().unwrap_or_default())));
        })?;
        let part = match (heard, bytes) {
            (None, None) => continue,
            (None, Some(bytes)) => bytes,
            (Some(Message::Begin { name }), _) => Part::Begins(name),
            (Some(Message::Uses(files)), _) => {
                compare_root(&hello.spec.root, files).map_err(Arrival::Said)?;
                wire.send(&Message::Alike)?;
                fault::fallible("receive-compared")?;
                continue;
            }
            (Some(Message::Stored { name }), _) => {
                let store = hello.store.as_deref();
                let path = store.ok_or_else(|| Arrival::Said(out_of_turn(&Message::Stored { name: name.clone() })))?;
                let file = File::open(path)?;
                // Nobody else has a use for it; it is there for as long as it is open here.
                std::fs::remove_file(path)?;
                Part::Stored(name, file)
            }
            (Some(Message::Manifest(manifest)), _) => return Ok(manifest),
            (Some(Message::Abandoned(why)), _) => {
                return Err(Arrival::Said(abandoned(&why)));
            }
            (Some(other), _) => return Err(Arrival::Said(out_of_turn(&other))),
        };
        if parts.send(part).is_err() {
            return Err(Arrival::Cut(std::io::Error::other("it could not be kept")));
        }
    }
}

/// Rebuilds the pod, tells the source, and lets it go once the source has given it up.
fn rebuild(store: Store, hello: &Hello, reader: ImageReader, wire: &Arc<Wire>) -> Result<Restarted, Failure> {
    let options = restart::Options {
        image: reader.path().to_owned(),
        name: Some(hello.spec.name.clone()),
        address: address(&store, hello),
        former: hello.former.clone(),
        trail: hello.trail.clone(),
        publish: None,
        binds: Vec::new(),
        root: None,
        fault: None,
    };
    let mut supply = Some(supply(hello, &reader, wire)?);
    let (mut fetching, mut moved) = (None, None);
    let here = store.clone();
    let mut gate = |pod: &mut LivePod, incomplete: Vec<Incomplete>, phases: &[Phase]| {
        let filling = match supply.take() {
            Some(supply) if !incomplete.is_empty() => Some(Filling::entrust(pod, incomplete, supply)?),
            _ => None,
        };
        let address = pod.network.as_ref().map_or_else(String::new, |n| n.outer().ipv4.to_string());
        let failed = |error: std::io::Error| cut(error).message;
        let line = pod.network.as_ref().and_then(Network::end_of_line);
        if hello.trail.is_some() {
            follow_here(hello, pod, &mut moved).map_err(|error| error.to_string())?;
        }
        let followed = hello.trail.is_some();
        wire.send(&Message::Ready { address, line, followed, phases: phases.to_vec() }).map_err(failed)?;
        fault::fallible("receive-ready").map_err(failed)?;
        match wire.hear().map_err(failed)? {
            Message::Go => {
                fault::fallible("receive-told").map_err(failed)?;
                fetching = filling.map(|filling| filling.begin(Whose::of(pod))).transpose().map_err(failed)?;
                Ok(())
            }
            Message::Abandoned(why) => Err(abandoned(&why).message),
            other => Err(out_of_turn(&other).message),
        }
    };
    let restarted = restart::restart_received(store, reader, &options, &mut gate);
    match restarted {
        Ok((pod, stats)) => Ok(Restarted { pod, stats, fetching }),
        Err(error) => {
            // Before the source is told: it may not hear both that all has come and that it failed.
            fetching.iter().for_each(Fetching::abandon);
            if let Some(moved) = &moved {
                let undone = Here::of(&here).and_then(|here| here.follow(&moved.back()));
                let _ = undone.inspect_err(|error| tracing::warn!("pod {moved} has not come: {error}"));
            }
            Err(error.into())
        }
    }
}

/// Whoever is connected with the pod here, while it comes here, follows it to the address that it has here.
fn follow_here(hello: &Hello, pod: &LivePod, moved: &mut Option<Moved>) -> Result<(), NetworkError> {
    let (Some(network), Some(from)) = (&pod.network, hello.address) else { return Ok(()) };
    let to = network.outer().ipv4;
    let moved = moved.insert(Moved { pod: hello.spec.name.clone(), from, to });
    Here::of(&pod.store)?.follow(moved)
}

/// Where pages come from that are not in place when the pod is let go.
fn supply(hello: &Hello, reader: &ImageReader, wire: &Arc<Wire>) -> Result<Box<dyn Supply>, Failure> {
    if strategies::of_name(&hello.strategy).is_some_and(Strategy::leaves_pages) {
        return Ok(Box::new(FromSource(wire.clone())));
    }
    let damaged = |e: ImageError| Failure::of(&e, 5);
    if reader.is_stored() {
        return Ok(Box::new(FromStore::new(reader.stored_data().map_err(damaged)?)));
    }
    let data = reader.data_file().map_err(damaged)?.try_clone_to_owned();
    Ok(Box::new(FromImage::new(data.map_err(|e| Failure { message: format!("sharing the image: {e}"), code: 1 })?)))
}
