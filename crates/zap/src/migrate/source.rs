//! The side that gives a pod away.

use std::net::Ipv4Addr;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use super::ahead;
use super::followers::Followers;
use super::progress::{Stage, Track, Tracked};
use super::protocol::{Hello, Message, VERSION};
use super::store::{StoreFile, ThroughStore};
use super::strategies::{self, Strategy};
use super::wire::{NotSent, Wire};
use super::{Options, Stats};
use crate::checkpoint::{self, Afterwards, CheckpointError, Given, Phase, Taker};
use crate::fault;
use crate::files::UsedFile;
use crate::image::{Compression, FORMAT, ImageWriter, PartSink};
use crate::memory::LeftBehind;
use crate::monitor::protocol::Failure;
use crate::pod::journal::Undo;
use crate::pod::network::follow::{Moved, can_follow};
use crate::pod::network::former::FormerPlace;
use crate::pod::network::{Network, NetworkError};
use crate::pod::registry::Residual;
use crate::pod::{LivePod, PodError};
use crate::record;

/// Why a pod was not moved. It goes on running here, but for [`CheckpointError::InDoubt`].
#[derive(Debug, thiserror::Error)]
pub enum MigrateError {
    /// The stream failed.
    #[error("pod {pod} goes on here: the stream to {to} failed: {source}")]
    Wire {
        /// The pod's name.
        pod: String,
        /// What the destination is called.
        to: String,
        /// How.
        source: std::io::Error,
    },
    /// Whoever asked for it took that back.
    #[error("pod {0} goes on here: its migration was interrupted")]
    Interrupted(String),
    /// The destination would not have it.
    #[error("pod {pod} goes on here: {to} refuses it: {failure}")]
    Refused {
        /// The pod's name.
        pod: String,
        /// What the destination is called.
        to: String,
        /// Its words.
        failure: Failure,
    },
    /// The destination said something that has no place in the protocol.
    #[error("pod {pod} goes on here: {to} says {said}, which is not its turn to say")]
    Protocol {
        /// The pod's name.
        pod: String,
        /// What the destination is called.
        to: String,
        /// The message.
        said: &'static str,
    },
    /// The destination has not what the pod uses.
    #[error("pod {pod} goes on here: {to} lacks {what}")]
    Lacks {
        /// The pod's name.
        pod: String,
        /// What the destination is called.
        to: String,
        /// What it lacks, and who uses it.
        what: String,
    },
    /// A host that was to follow it cannot.
    #[error("pod {pod} goes on here: it would not be followed: {source}")]
    Unfollowed {
        /// The pod's name.
        pod: String,
        /// Which, and why.
        source: std::io::Error,
    },
    /// The strategy is not known, or lacks something.
    #[error("pod {pod} goes on here: {what}")]
    Strategy {
        /// The pod's name.
        pod: String,
        /// What is wrong.
        what: String,
    },
    /// It could not be written down, or was not taken.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
}

impl MigrateError {
    /// The exit code of the command (CLI.md).
    pub fn exit_code(&self) -> u8 {
        match self {
            MigrateError::Refused { failure, .. } => failure.code,
            MigrateError::Checkpoint(error) => error.exit_code(),
            MigrateError::Strategy { .. } => 2,
            MigrateError::Lacks { .. } => 4,
            _ => 1,
        }
    }
}

/// Moves a pod over `wire`. When this returns figures, the pod's processes here have ended and the caller removes the rest.
pub fn migrate(
    pod: &mut LivePod,
    options: &Options,
    wire: Arc<Wire>,
    mut followers: Followers,
    track: &Track,
) -> Result<Stats, MigrateError> {
    fault::arm(options.fault.as_deref());
    let name = pod.spec.name.clone();
    let broken = |source: std::io::Error| match wire.is_cancelled() {
        true => MigrateError::Interrupted(name.clone()),
        false => MigrateError::Wire { pod: name.clone(), to: options.to.clone(), source },
    };
    let wrong = |what: String| MigrateError::Strategy { pod: name.clone(), what };
    let strategy = strategies::of_name(&options.strategy);
    let strategy = strategy.ok_or_else(|| wrong(format!("there is no strategy {}", options.strategy)))?;
    let store = store_for(pod, strategy, options)?;
    let (counted, stored) = (wire.clone(), store.clone());
    track.counting(move || counted.sent() + stored.as_ref().map_or(0, |file| file.written()));
    wire.greet().map_err(broken)?;
    let former = former(pod, options)?;
    let mut hello = hello(pod, strategy, store.as_deref(), options.any_address);
    hello.former = former.clone();
    // Also where nobody is told, for it may keep its address.
    let is_followed = |network: &&Network| options.follow || network.is_followed();
    hello.trail = pod.network.as_ref().filter(is_followed).map(Network::trail);
    let unfollowed = |source| MigrateError::Unfollowed { pod: name.clone(), source };
    if options.follow {
        can_follow().map_err(|error| unfollowed(std::io::Error::other(error)))?;
    }
    followers.await_all().map_err(unfollowed)?;
    let tracked = Tracked { strategy, track: track.clone(), memory: hello.memory };
    wire.send(&Message::Hello(Box::new(hello))).map_err(broken)?;
    match wire.hear().map_err(broken)? {
        Message::Welcome { offer, .. } => {
            if let Err(what) = offer.map_or(Ok(()), |there| ahead::check(pod, &there)) {
                let _ = wire.send(&Message::Abandoned(format!("what it uses is not there: {what}")));
                return Err(MigrateError::Lacks { pod: name, to: options.to.clone(), what });
            }
        }
        Message::Refused(failure) => {
            return Err(MigrateError::Refused { pod: name.clone(), to: options.to.clone(), failure });
        }
        other => {
            return Err(MigrateError::Protocol { pod: name.clone(), to: options.to.clone(), said: other.name() });
        }
    }
    fault::fallible("migrate-welcomed").map_err(broken)?;
    let how = checkpoint::Options {
        output: Default::default(),
        afterwards: Afterwards::Gone,
        compress: Compression::None,
        parent: None,
        carry_files: options.carry_files,
        fault: options.fault.clone(),
    };
    let was_suspended = pod.cgroup.is_frozen();
    let mut handed =
        HandedOver { to: options.to.clone(), was_suspended, track: track.clone(), former, ..HandedOver::default() };
    if options.follow {
        handed.followers = Some(followers);
    }
    let mut taker = Destination { wire: wire.clone(), handed: &mut handed };
    let sink: Arc<dyn PartSink> = match &store {
        Some(file) => Arc::new(ThroughStore { wire: wire.clone(), file: file.clone() }),
        None => wire.clone(),
    };
    let writer = ImageWriter::sending(sink).map_err(CheckpointError::from);
    let sent = writer.and_then(|writer| checkpoint::send(pod, &how, &tracked, writer, &mut taker));
    if let Some(file) = &store {
        pod.journal.done(&Undo::Store(file.path().to_owned())).map_err(CheckpointError::from)?;
    }
    let sent = sent.map_err(|error| {
        // The destination hears why; if it cannot hear any more it finds out by itself.
        let _ = wire.send(&Message::Abandoned(error.to_string()));
        match error {
            CheckpointError::InDoubt { .. } => error.into(),
            _ if wire.is_cancelled() => MigrateError::Interrupted(name.clone()),
            CheckpointError::Image(error) => broken(std::io::Error::other(error)),
            other => other.into(),
        }
    })?;
    fault::point("migrate-away");
    Ok(Stats {
        downtime_us: sent.downtime_us,
        bytes: wire.sent() + store.map_or(0, |file| file.written()),
        rounds: sent.rounds,
        strategy: options.strategy.clone(),
        phases: sent.phases,
        address: handed.address,
        there: handed.there,
        not_forwarded: handed.not_forwarded,
        residual_bytes: handed.residual_bytes,
        residual_us: handed.residual_us,
        // The caller knows when nothing of the pod is left.
        ..Stats::default()
    })
}

/// The place that is to be kept for the pod here, if its address does not go along.
fn former(pod: &LivePod, options: &Options) -> Result<Option<FormerPlace>, MigrateError> {
    let place = pod.network.as_ref().filter(|_| options.forward).map(Network::place_to_keep).transpose();
    place.map_err(|source| CheckpointError::from(PodError::Network { pod: pod.spec.name.clone(), source }).into())
}

/// The file in the store, where the strategy needs one.
fn store_for(
    pod: &mut LivePod,
    strategy: &dyn Strategy,
    options: &Options,
) -> Result<Option<Arc<StoreFile>>, MigrateError> {
    let name = pod.spec.name.clone();
    let wrong = |what: String| MigrateError::Strategy { pod: name.clone(), what };
    let file = match (strategy.needs_store(), &options.store) {
        (false, None) => return Ok(None),
        (false, Some(_)) => return Err(wrong(format!("{} has no use for a --store", strategy.name()))),
        (true, None) => {
            return Err(wrong(format!("{} needs --store DIR: a directory that both hosts see", strategy.name())));
        }
        (true, Some(directory)) => {
            StoreFile::create(directory, &name).map_err(|e| wrong(format!("--store {}: {e}", directory.display())))?
        }
    };
    pod.journal.record(Undo::Store(file.path().to_owned())).map_err(CheckpointError::from)?;
    Ok(Some(Arc::new(file)))
}

fn hello(pod: &LivePod, strategy: &dyn Strategy, store: Option<&StoreFile>, any_address: bool) -> Hello {
    let memory = pod.cgroup.pids().unwrap_or_default().into_iter().filter_map(|process| {
        let status = std::fs::read_to_string(process.proc("status")).ok()?;
        let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"))?;
        line.split_ascii_whitespace().next()?.parse::<u64>().ok()
    });
    Hello {
        protocol: VERSION,
        format: FORMAT,
        records: record::KNOWN.iter().map(|(kind, version)| ((*kind).to_owned(), *version)).collect(),
        spec: pod.spec.clone(),
        address: pod.network.as_ref().map(|network| network.outer().ipv4),
        any_address,
        former: None,
        trail: None,
        memory: memory.sum::<u64>() << 10,
        files: size_of_files(&pod.upper()),
        strategy: strategy.name().to_owned(),
        store: store.map(|file| file.path().to_owned()),
    }
}

/// Bytes on disk of all that is in a directory, as far as that can be told.
fn size_of_files(directory: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let mut waiting = vec![directory.to_owned()];
    let mut bytes = 0;
    while let Some(directory) = waiting.pop() {
        for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
            match entry.metadata() {
                Ok(metadata) if metadata.is_dir() => waiting.push(entry.path()),
                Ok(metadata) => bytes += metadata.blocks() * 512,
                Err(_) => {}
            }
        }
    }
    bytes
}

/// What came of handing a pod over.
#[derive(Default)]
struct HandedOver {
    to: String,
    was_suspended: bool,
    track: Track,
    /// The place to keep for it here, and where the line to it ends there.
    former: Option<FormerPlace>,
    line: Option<Ipv4Addr>,
    not_forwarded: Option<String>,
    /// The other hosts that follow it, if it is to be followed, and whether the destination knows of that.
    followers: Option<Followers>,
    followed_there: bool,
    /// The address at which it is reached there, and what it did to rebuild it.
    address: String,
    there: Vec<Phase>,
    residual_bytes: u64,
    residual_us: u64,
}

impl HandedOver {
    /// Whether a forwarder is wanted, and needed, and the destination has no end for its line.
    fn cannot_be_forwarded(&self) -> bool {
        let moves = |place: &FormerPlace| place.plan.ipv4.to_string() != self.address;
        self.former.as_ref().is_some_and(moves) && self.line.is_none()
    }

    /// Whoever is connected with the pod reaches it where it is about to run, if it is to be followed and moves at all.
    fn have_all_follow(&mut self, pod: &mut LivePod) -> std::io::Result<()> {
        let from = pod.network.as_ref().map(|network| network.outer().ipv4);
        let (Some(followers), Some(from), Ok(to)) = (&mut self.followers, from, self.address.parse()) else {
            return Ok(());
        };
        let moved = Moved { pod: pod.spec.name.clone(), from, to };
        if moved.from == moved.to {
            return Ok(());
        }
        if !self.followed_there {
            return Err(std::io::Error::other("the destination knows nothing of those who follow a pod"));
        }
        pod.follow(&moved).map_err(std::io::Error::other)?;
        followers.follow(&moved)
    }

    /// The pod goes on here.
    fn have_nobody_follow(&mut self, pod: &mut LivePod) -> Result<(), PodError> {
        if let Some(followers) = &mut self.followers {
            followers.go_back();
        }
        pod.follow_no_more()
    }
}

/// The host at the other end of the stream.
struct Destination<'a> {
    wire: Arc<Wire>,
    handed: &'a mut HandedOver,
}

impl Taker for Destination<'_> {
    fn compare(&mut self, files: Vec<UsedFile>) -> Result<(), Failure> {
        let to = &self.handed.to;
        let failed = |code, what: String| Failure { message: what, code };
        let broken = |error: std::io::Error| failed(1, format!("the stream to {to} failed: {error}"));
        self.wire.send(&Message::Uses(files)).map_err(broken)?;
        let answer = self.wire.hear().map_err(broken)?;
        fault::fallible("migrate-compared").map_err(broken)?;
        match answer {
            Message::Alike => Ok(()),
            Message::Failed(failure) => Err(failed(failure.code, format!("{to} refuses it: {failure}"))),
            other => Err(failed(1, format!("{to} says {}, which is not its turn to say", other.name()))),
        }
    }

    fn take(&mut self, pod: &mut LivePod, left: &LeftBehind) -> Given {
        match hand_over(pod, &self.wire, left, self.handed) {
            Given::Kept(why) => Given::Kept(format!("{why}{}", and(self.handed.have_nobody_follow(pod).err()))),
            other => other,
        }
    }
}

/// All has been sent and the pod is held: waits until it is rebuilt over there, gives it up here, has it let go there, and
/// serves what was left behind.
fn hand_over(pod: &mut LivePod, wire: &Wire, left: &LeftBehind, handed: &mut HandedOver) -> Given {
    if let Err(error) = fault::fallible("migrate-sent") {
        return Given::Kept(format!("it could not be handed over: {error}"));
    }
    handed.track.begin(Stage::HandingOver);
    let was_suspended = handed.was_suspended;
    match wire.hear() {
        Ok(Message::Ready { address, line, followed, phases }) => {
            (handed.address, handed.line, handed.there) = (address, line, phases);
            handed.followed_there = followed;
        }
        Ok(Message::Failed(failure)) => return Given::Kept(format!("it could not be rebuilt there: {failure}")),
        Ok(other) => {
            return Given::Kept(format!("the destination says {}, which is not its turn to say", other.name()));
        }
        Err(error) => return Given::Kept(format!("the stream failed before it was ready there: {error}")),
    }
    if let Err(error) = fault::fallible("migrate-ready") {
        return Given::Kept(format!("it could not be given up: {error}"));
    }
    if handed.cannot_be_forwarded() {
        return Given::Kept("the destination knows nothing of forwarders".to_owned());
    }
    if let Err(error) = handed.have_all_follow(pod) {
        return Given::Kept(error.to_string());
    }
    if let Err(error) = fault::fallible("migrate-followed") {
        return Given::Kept(format!("it could not be given up: {error}"));
    }
    if let Err(error) = wire.commit() {
        return Given::Kept(error.to_string());
    }
    handed.track.begin(Stage::Given);
    // From here on it must not run here, whatever happens to us: the destination may be told the next moment.
    if let Err(error) = pod.give_up() {
        let back = pod.take_back(was_suspended);
        return Given::Kept(format!("it could not be given up: {error}{}", and(back.err())));
    }
    fault::point("migrate-given-up");
    let kept = match handed.followers.as_mut().map_or(Ok(()), Followers::keep) {
        Err(error) => format!("it would not be followed: {error}"),
        Ok(()) => match let_go_there(pod, wire, left, handed) {
            Ok(given) => return given,
            Err(kept) => kept,
        },
    };
    match pod.take_back(was_suspended) {
        Ok(()) => Given::Kept(kept),
        Err(error) => Given::InDoubt(format!("{kept}; and here: {error}")),
    }
}

/// Says *go*, and serves what was left behind; an error says why the pod is not there, for certain.
fn let_go_there(pod: &mut LivePod, wire: &Wire, left: &LeftBehind, handed: &mut HandedOver) -> Result<Given, String> {
    match wire.send_whole(&Message::Go) {
        Ok(()) => {
            fault::point("migrate-told");
            match hear_and_serve(wire, left) {
                Ok(Message::Running) => {
                    let since = Instant::now();
                    handed.not_forwarded = send_after(pod, handed).err().map(|error| error.to_string());
                    handed.residual_bytes = left.bytes();
                    handed.track.begin(Stage::Following { bytes: left.bytes() });
                    let served = serve(pod, wire, left, &handed.to);
                    handed.residual_us = since.elapsed().as_micros() as u64;
                    Ok(match served {
                        Ok(()) => Given::Away(since),
                        Err(error) => Given::InDoubt(format!(
                            "it ran there, and the stream failed before the destination said that all of its memory had come: {error}"
                        )),
                    })
                }
                // Its copy has ended: that is certain.
                Ok(Message::Failed(failure)) => Err(format!("it could not be let go there: {failure}")),
                Ok(other) => Ok(Given::InDoubt(format!("the destination says {}", other.name()))),
                Err(error) => Ok(Given::InDoubt(doubt(&error))),
            }
        }
        Err(NotSent::Nothing(error)) => Err(format!("the stream failed before it was let go there: {error}")),
        Err(NotSent::Some(error)) => Ok(Given::InDoubt(doubt(&error))),
    }
}

/// What came for the pod while it was away is lost if it cannot be sent after it: peers send it again. What comes from now on
/// goes by a forwarder, if there is to be one; it is an error if that cannot be made.
fn send_after(pod: &LivePod, handed: &HandedOver) -> Result<(), NetworkError> {
    let Some(network) = &pod.network else { return Ok(()) };
    if let (Some(place), Some(to)) = (&handed.former, handed.line) {
        return network.forward(&pod.spec.name, place, to);
    }
    if let Err(error) = network.send_after() {
        tracing::warn!("what came for pod {} while it moved: {error}", pod.spec.name);
    }
    Ok(())
}

/// Answers whoever fetches pages, until something else is said.
fn hear_and_serve(wire: &Wire, left: &LeftBehind) -> std::io::Result<Message> {
    loop {
        match wire.hear()? {
            Message::Fetch { offset, length } if offset.checked_add(length).is_some_and(|end| end <= left.bytes()) => {
                let pages = left.read(&(offset..offset + length)).map_err(std::io::Error::other)?;
                wire.send_pages(offset, &pages)?;
            }
            other => return Ok(other),
        }
    }
}

/// Serves what was left behind until nothing of it is wanted any more.
fn serve(pod: &mut LivePod, wire: &Wire, left: &LeftBehind, to: &str) -> std::io::Result<()> {
    if left.bytes() == 0 {
        return Ok(());
    }
    let residual = Residual { to: to.to_owned(), memory: left.bytes() };
    pod.keep_for(residual).map_err(std::io::Error::other)?;
    fault::point("migrate-serving");
    match hear_and_serve(wire, left)? {
        Message::Complete => Ok(()),
        other => Err(std::io::Error::other(format!("the destination says {}", other.name()))),
    }
}

fn doubt(error: &std::io::Error) -> String {
    format!("the stream failed in the one moment in which nobody knows: {error}")
}

fn and(error: Option<impl std::fmt::Display>) -> String {
    error.map_or_else(String::new, |error| format!("; and {error}"))
}
