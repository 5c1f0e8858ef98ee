//! The story of a checkpoint: look ahead → hold → look → let go → write.
//!
//! It runs on a thread of its own, and tracers (`process/crew.rs`) hold the pod's processes: ptrace belongs to threads, and
//! whatever goes wrong, the end of a thread lets go of every process that it held, which then walks home by itself (see
//! `tracee`).

mod error;
mod figures;
mod look;
mod options;
mod stop;

use std::collections::{BTreeMap, HashMap};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

pub use self::error::CheckpointError;
use self::error::{held_failed, network_failed, refused, trees_failed, unexpected};
pub(crate) use self::figures::Clock;
pub use self::figures::{Phase, Stats};
pub use self::options::{Afterwards, Options};
use self::stop::UnderWay;
use crate::error::{CaptureError, Context};
use crate::fault;
use crate::files::{self, FileIdentity, UsedFile};
use crate::ids::{HostPid, PodPid};
use crate::image::ImageWriter;
use crate::ipc::{self, IpcState};
use crate::kernel;
use crate::look::Look;
use crate::memory::{self, LeftBehind, MappedFiles};
use crate::migrate::strategies::{PreCopy, Strategy};
use crate::monitor::protocol::Failure;
use crate::mounts::{self, MountState, Nests};
use crate::namespaces::NamespaceState;
use crate::namespaces::network::{self, NetworkState};
use crate::parallel;
use crate::pod::LivePod;
use crate::pod::journal::Undo;
use crate::pod::trees::{self, Trees};
use crate::process::ahead::{self, Layout, Layouts, MemoryAhead, Permission};
use crate::process::capture;
use crate::process::discover::{self, Found, PodProc, Population};
use crate::process::hold::{self, Cleared, HeldPod, HoldError, Tracers};
use crate::process::sharing::Groups;
use crate::process::state::{EndedState, ProcessState};
use crate::process::statuses::Statuses;
use crate::process::stops;
use crate::record::PodRecord;
use crate::sys::{descriptor, heap};

/// Writes a pod down. On an error the pod goes on as it was.
pub fn checkpoint(pod: &mut LivePod, options: &Options) -> Result<Stats, CheckpointError> {
    on_a_thread(pod, |pod| {
        let image = Undo::Image(options.output.clone());
        pod.journal.record(image.clone())?;
        let writer = ImageWriter::create_child(&options.output, options.compress, options.parent.as_deref());
        let told = writer.map_err(CheckpointError::from).and_then(|writer| tell(pod, options, &PreCopy, writer, None));
        pod.journal.done(&image)?;
        told
    })
}

/// Sends a pod to whoever puts the parts of its image together. What becomes of its memory is up to `strategy`. On an error
/// the pod goes on as it was, unless [`Given::InDoubt`] is what came of it.
pub fn send(
    pod: &mut LivePod,
    options: &Options,
    strategy: &dyn Strategy,
    writer: ImageWriter,
    taker: &mut dyn Taker,
) -> Result<Stats, CheckpointError> {
    on_a_thread(pod, |pod| tell(pod, options, strategy, writer, Some(taker)))
}

/// Whoever a pod is sent to.
pub trait Taker: Send {
    /// Asked while the pod runs, before anything of it is sent: whether these files of its root are the same there.
    fn compare(&mut self, files: Vec<UsedFile>) -> Result<(), Failure>;

    /// Takes the pod, all of which has been sent and which is held; returns when nothing of what was left behind is needed
    /// any more.
    fn take(&mut self, pod: &mut LivePod, left: &LeftBehind) -> Given;
}

/// What came of giving a pod away.
pub enum Given {
    /// It runs elsewhere, since then.
    Away(Instant),
    /// It does not: it goes on here.
    Kept(String),
    /// Nobody can tell: it stays held, and the network blocked.
    InDoubt(String),
}

fn on_a_thread(
    pod: &mut LivePod,
    tell: impl FnOnce(&mut LivePod) -> Result<Stats, CheckpointError> + Send,
) -> Result<Stats, CheckpointError> {
    let name = pod.spec.name.clone();
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| tell(pod));
        thread.join().unwrap_or_else(|_| {
            let source = CaptureError::Unexpected { object: "the tracer".into(), what: "panic".into() };
            Err(CheckpointError::Capture { pod: name, source })
        })
    })
}

/// Whatever happens, no part of an image stays, and on an error the pod is as suspended as it was.
fn tell(
    pod: &mut LivePod,
    options: &Options,
    strategy: &dyn Strategy,
    writer: ImageWriter,
    taker: Option<&mut dyn Taker>,
) -> Result<Stats, CheckpointError> {
    let was_suspended = pod.cgroup.is_frozen();
    let told = tell_stages(pod, options, strategy, writer, taker);
    let goes_on = !matches!(told, Ok(_) | Err(CheckpointError::InDoubt { .. }));
    if goes_on && !was_suspended {
        pod.cgroup.thaw()?;
    }
    told
}

fn tell_stages(
    pod: &mut LivePod,
    options: &Options,
    strategy: &dyn Strategy,
    mut writer: ImageWriter,
    mut taker: Option<&mut dyn Taker>,
) -> Result<Stats, CheckpointError> {
    let mut checkpoint = Checkpoint {
        was_suspended: pod.cgroup.is_frozen(),
        memory: Arc::default(),
        statuses: Arc::default(),
        groups: Groups::default(),
        mapped: MappedFiles::default(),
        used: BTreeMap::new(),
        gone: HashMap::new(),
        names: HashMap::new(),
        opened: Vec::new(),
        under_way: UnderWay::default(),
        network: network::Ahead::default(),
        left: LeftBehind::default(),
        pod,
        options,
        sends: taker.is_some(),
        strategy,
        clock: Clock::start(),
    };
    fault::arm(options.fault.as_deref());
    // A copy of every file of the pod is open in the hold.
    if let Err(error) = descriptor::allow(0, MOST_FILES) {
        tracing::info!(%error, "the limit of open files stays as it is");
    }
    fault::fallible("checkpoint-begin").map_err(|e| refused(checkpoint.pod, unexpected(fault::OBJECT, &e)))?;
    let trees = checkpoint.look_ahead(&mut writer, taker.as_mut().map(|taker| &mut **taker as &mut dyn Taker))?;
    fault::fallible("checkpoint-looked-ahead").map_err(|e| refused(checkpoint.pod, unexpected(fault::OBJECT, &e)))?;
    let held = checkpoint.hold()?;
    let mut stats =
        Stats { processes: held.processes.len() as u64, threads: held.threads() as u64, ..Stats::default() };
    let (held, captured) = checkpoint.look(held, &mut writer, trees)?;
    stats.holds_us.extend(&checkpoint.memory.holds_us);
    stats.rounds = checkpoint.memory.rounds + 1;
    if options.afterwards == Afterwards::Gone {
        // The pod stays held until its image is whole, and ends while it is held: should writing fail, it goes on.
        let held_for = checkpoint.clock.held();
        if let Err(error) = checkpoint.write(captured, writer, &mut stats) {
            checkpoint.let_go(held)?;
            return Err(error);
        }
        stats.holds_us.push(match taker {
            Some(taker) => checkpoint.give(held, taker)?,
            None => checkpoint.end(held).map(|()| held_for)?,
        });
    } else {
        checkpoint.let_go(held)?;
        stats.holds_us.push(checkpoint.clock.held());
        fault::point("checkpoint-let-go");
        checkpoint.write(captured, writer, &mut stats)?;
        ahead::prepare_for_next(&checkpoint.pod.layouts);
    }
    fault::point("checkpoint-written");
    Ok(checkpoint.clock.into_stats(stats))
}

/// Room for copies that is prepared at most, and what is not worth preparing.
const MOST_ROOM: u64 = 256 << 20;
const LITTLE_ROOM: usize = 1 << 20;

/// Threads that it is worth having the kernel tell of: to begin with that takes some milliseconds, once, beside all else.
const MANY_THREADS: u64 = 8;

/// Descriptors that a monitor may have.
const MOST_FILES: u64 = 1 << 20;

/// A checkpoint in progress.
struct Checkpoint<'a> {
    pod: &'a mut LivePod,
    options: &'a Options,
    /// Whether it goes to a host that is to run it at once.
    sends: bool,
    /// How its memory is dealt with.
    strategy: &'a dyn Strategy,
    /// The pages that stay behind.
    left: LeftBehind,
    clock: Clock,
    /// Whether the pod was suspended already.
    was_suspended: bool,
    /// What is known of its memory from when it ran.
    memory: Arc<MemoryAhead>,
    /// What `/proc` says of its processes and threads, opened then.
    statuses: Arc<Statuses>,
    /// Who shared what with whom then.
    groups: Groups,
    /// The mapped files that were captured then.
    mapped: MappedFiles,
    /// The files of the root that were open or mapped then.
    used: BTreeMap<Vec<u8>, FileIdentity>,
    /// The PIDs in the pod, by those of the host, of processes that are gone and known to its sockets.
    gone: HashMap<i32, i32>,
    /// The names of its sockets' files that have several, by device and inode.
    names: HashMap<(u64, u64), Vec<PathBuf>>,
    /// They themselves, kept open until the pod runs again.
    opened: Vec<Arc<OwnedFd>>,
    /// What its sockets have under way.
    under_way: UnderWay,
    /// What is known of its network from when it ran.
    network: network::Ahead,
}

/// What was captured while the pod was held.
struct Captured {
    pod: PodRecord,
    processes: Vec<ProcessState>,
    zombies: Vec<EndedState>,
    files: Vec<files::FileState>,
    ipc: IpcState,
    namespaces: Vec<NamespaceState>,
    networks: Vec<NetworkState>,
    mounts: Vec<MountState>,
    trees: Trees,
}

impl Checkpoint<'_> {
    /// While the pod runs: refuses what cannot be captured, before anything is disturbed, and copies its files.
    fn look_ahead(
        &mut self,
        writer: &mut ImageWriter,
        taker: Option<&mut dyn Taker>,
    ) -> Result<Trees, CheckpointError> {
        self.network = network::begin(self.pod).map_err(|e| refused(self.pod, e))?;
        let members = self.pod.cgroup.pids()?;
        let population = discover::discover(self.pod.init, &members).map_err(|e| refused(self.pod, e))?;
        self.main_lives(population.live.iter().map(|found| found.subject.pod))?;
        self.make_room(&population);
        let (trees, queued, memory) = self.check_and_copy(&population, writer, taker)?;
        self.memory = Arc::new(memory);
        self.statuses = Arc::new(Statuses::open(&population, &PodProc::new(self.pod.init)));
        let unfollowed = match self.memory.unfollowed() {
            // Neither stays in our memory: it stays there, or is sent as it is read.
            _ if self.strategy.leaves_pages() => 0,
            much if self.sends && much > look::MUCH as u64 => 0,
            few => few,
        };
        let room = (unfollowed + queued).min(MOST_ROOM) as usize;
        if room > LITTLE_ROOM {
            heap::warm(room);
        }
        self.clock.lap("look-ahead");
        Ok(trees)
    }

    /// Refuses a pod that uses files of the root which are not the same where it goes, unless it takes them along.
    fn compare(&mut self, taker: &mut dyn Taker) -> Result<(), CheckpointError> {
        let used = std::mem::take(&mut self.used).into_iter().filter(|_| !self.options.carry_files);
        let used = used.map(|(path, identity)| UsedFile { path, identity }).collect();
        let refused = |failure| CheckpointError::Unlike { pod: self.pod.spec.name.clone(), failure };
        taker.compare(used).map_err(refused)
    }

    /// Whether the pod is to run again in a moment, here or on another host.
    fn goes_on(&self) -> bool {
        self.sends || self.options.afterwards != Afterwards::Gone
    }

    /// Refuses what cannot be captured, then copies files. Beside that it copies memory: at once that of processes which need
    /// not be disturbed for it, that of others when it is known that nothing is refused, and what is sent to a `taker` when that
    /// takes the pod. Also how many bytes wait in queues.
    fn check_and_copy(
        &mut self,
        population: &Population,
        writer: &mut ImageWriter,
        taker: Option<&mut dyn Taker>,
    ) -> Result<(Trees, u64, MemoryAhead), CheckpointError> {
        let hosts: Vec<HostPid> = population.live.iter().map(|found| found.subject.host).collect();
        ahead::prepare(population);
        let earlier = std::mem::take(&mut self.pod.layouts);
        let again = !earlier.is_empty();
        let layouts = parallel::map(hosts.clone(), |process| Layout::read(process, earlier.get(&process)));
        let layouts: Layouts = hosts.into_iter().zip(layouts).collect();
        self.pod.layouts = layouts.clone();
        let groups = Groups::of(population);
        let follows = !self.was_suspended && self.strategy.another_round(&[]);
        let (mut data, mut handles) = (std::mem::take(&mut writer.data), std::mem::take(&mut self.pod.handles));
        let strategy = self.strategy;
        let (give, permission) = Permission::new();
        let (trees, memory) = std::thread::scope(|scope| {
            let (groups, data, handles) = (&groups, &mut data, &mut handles);
            if population.threads() > MANY_THREADS {
                scope.spawn(kernel::threads::open);
            }
            let at_once = taker.is_none();
            let memory = scope.spawn(move || match follows && (at_once || permission.is_given()) {
                true => {
                    MemoryAhead::look_ahead((layouts, groups), population, handles, data, (strategy, permission), again)
                }
                false => MemoryAhead::layouts(layouts, groups),
            });
            let checked = self.check(population, groups, writer).and_then(|found| {
                taker.map_or(Ok(()), |taker| self.compare(taker))?;
                Ok(found)
            });
            give.tell(checked.is_ok());
            let trees = checked.and_then(|(queued, nests)| {
                let trees = Trees::look_ahead(self.pod, writer, &nests).map_err(|e| trees_failed(self.pod, e))?;
                Ok((trees, queued))
            });
            (trees, memory.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
        });
        (writer.data, self.pod.handles) = (data, handles);
        self.groups = groups;
        trees.map(|(trees, queued)| (trees, queued, memory))
    }

    /// Has room for copies of all files be made: in the hold it would take long.
    fn make_room(&self, population: &Population) {
        let size = |found: &Found| found.status.field("FDSize").and_then(|size| size.parse::<u64>().ok()).unwrap_or(0);
        let needed = population.live.iter().map(size).sum::<u64>() + population.threads();
        if let Err(error) = descriptor::make_room(needed.min(MOST_FILES / 8)) {
            tracing::info!(%error, "the table of descriptors grows as it is needed");
        }
    }

    /// Refuses what cannot be captured. How many bytes wait in queues, and what is mounted in other mount namespaces.
    fn check(
        &mut self,
        population: &Population,
        groups: &Groups,
        writer: &mut ImageWriter,
    ) -> Result<(u64, Nests), CheckpointError> {
        let pod = &*self.pod;
        let mut look = Look::new(&pod.spec, pod.init, &mut writer.data, pod.console()?, self.options.carry_files);
        look.upper = pod.upper();
        look.mounts_file = pod.mounts_file();
        look.made = mounts::made(&pod.spec, pod.init, &pod.mounts_file()).map_err(|e| refused(pod, e))?;
        capture::check_all(&mut look, population, groups, &pod.layouts).map_err(|e| refused(pod, e))?;
        ipc::limits::check(&pod.spec, pod.init).map_err(|e| refused(pod, e))?;
        pod.cgroup.check().map_err(|e| refused(pod, e))?;
        let network = std::mem::take(&mut self.network);
        self.network = network::look_ahead(pod, &look.namespaces, network).map_err(|e| refused(pod, e))?;
        if let (Some(network), true, true) = (&pod.network, look.sockets.hear, self.goes_on()) {
            network.make_waiting_room();
        }
        let listeners = std::mem::take(&mut look.sockets.listeners);
        self.under_way = UnderWay::look_into(pod, listeners, look.namespaces.networks())
            .map_err(|e| refused(pod, unexpected("asking sock_diag", &e)))?;
        self.mapped = std::mem::take(&mut look.mapped).into_ahead();
        self.used = std::mem::take(&mut look.used);
        self.gone = std::mem::take(&mut look.sockets.gone);
        self.names = std::mem::take(&mut look.sockets.names);
        // The image's data is with whoever copies memory meanwhile: what is captured ahead has none of it.
        match look.data.end() {
            0 => Ok((look.queued, std::mem::take(&mut look.nests))),
            _ => Err(refused(pod, unexpected("what was captured ahead", &std::io::Error::other("it has bytes")))),
        }
    }

    /// A pod ends with its first command. That can have ended without PID 1 having been able to say so: killed while the pod
    /// was suspended, or in the instant in which it was being frozen.
    fn main_lives(&self, mut live: impl Iterator<Item = PodPid>) -> Result<(), CheckpointError> {
        match self.pod.main {
            Some(main) if !live.any(|pid| pid == main) => Err(refused(self.pod, CaptureError::Vanished(main))),
            _ => Ok(()),
        }
    }

    /// Everybody stands still when this returns, and no packet reaches or leaves the pod.
    fn hold(&mut self) -> Result<HeldPod, CheckpointError> {
        let failed = |e| unexpected("starting tracers", &e);
        let tracers = Tracers::start(self.statuses.processes()).map_err(|e| refused(self.pod, failed(e)))?;
        let seized = self.stop().and_then(|()| {
            fault::fallible("checkpoint-frozen").map_err(|e| refused(self.pod, unexpected(fault::OBJECT, &e)))?;
            let members = self.pod.cgroup.pids()?;
            let groups = std::mem::take(&mut self.groups);
            hold::seize_all(tracers, self.pod.init, &members, (&self.statuses, groups))
                .map_err(|e| held_failed(self.pod, e))
        });
        // Tracees stay stopped when the group thaws.
        self.pod.cgroup.thaw()?;
        let held = seized.and_then(|seized| seized.wait(&self.memory).map_err(|e| held_failed(self.pod, e)));
        let held = held.and_then(|held| {
            self.main_lives(held.processes.iter().map(|process| process.found.subject.pod))?;
            Ok(held)
        });
        if held.is_err() {
            self.put_back()?;
        }
        self.clock.lap("hold");
        held
    }

    /// Looks at everything, with the pod held: nothing is written to disk, but much memory is sent that is to be sent.
    fn look(
        &mut self,
        held: HeldPod,
        writer: &mut ImageWriter,
        trees: Trees,
    ) -> Result<(HeldPod, Captured), CheckpointError> {
        match self.capture(&held, writer, trees) {
            Ok(captured) => Ok((held, captured)),
            Err(error) => {
                self.let_go(held)?;
                Err(held_failed(self.pod, error))
            }
        }
    }

    fn capture(&mut self, held: &HeldPod, writer: &mut ImageWriter, mut trees: Trees) -> Result<Captured, HoldError> {
        fault::fallible("checkpoint-held").capturing("looking at", fault::OBJECT)?;
        let pod = &*self.pod;
        // What is in the console's pipes now is in the image; nobody reads it out meanwhile.
        let _hush = pod.hush_console();
        let console = pod.console().map_err(|e| unexpected("the console", &e))?;
        let mut look = Look::new(&pod.spec, pod.init, &mut writer.data, console, self.options.carry_files);
        look.upper = pod.upper();
        look.mounts_file = pod.mounts_file();
        look.made = mounts::made(&pod.spec, pod.init, &pod.mounts_file())?;
        look.mapped = std::mem::take(&mut self.mapped);
        look.sockets.gone = std::mem::take(&mut self.gone);
        look.sockets.names = std::mem::take(&mut self.names);
        if self.options.afterwards != Afterwards::Gone {
            self.opened = look.mapped.opened();
        }
        let mut looked = look::processes(&mut look, held, self.memory.clone(), self.statuses.clone())?;
        self.clock.lap("look");
        if self.strategy.leaves_pages() {
            looked.leave_pages(&look, held, &mut self.left)?;
        }
        looked.read_pages(&mut look, held, self.sends)?;
        if self.sends && !self.strategy.leaves_pages() {
            looked.put_off_pages(&look, held, self.strategy)?;
        }
        self.clock.lap("memory");
        files::finish(&mut look)?;
        let mut processes = looked.assemble(&look, held)?;
        let ipc = ipc::capture(&mut look, pod.init)?;
        ipc::undo::capture_all(&ipc, held, pod.init, &mut processes)?;
        let memory = processes.iter().map(|process| &process.memory);
        trees.catch_up(&trees::mapped_for_writing(pod, &look, memory))?;
        let files = look.files.states().cloned().collect();
        let zombies = capture::zombies(&mut look, &held.zombies)?;
        let namespaces = mounts::fill(look.namespaces.states()?, &look, &trees.fresh())?;
        let networks = network::capture(pod, &look.namespaces, &self.network)?;
        let mounts = mounts::capture(&pod.spec, pod.init, &pod.mounts_file(), &trees.fresh())?;
        pod.cgroup.check_frozen()?;
        let pod = PodRecord::of(pod)?;
        let captured = Captured { pod, processes, zombies, files, ipc, namespaces, networks, mounts, trees };
        self.clock.lap("files");
        fault::fallible("checkpoint-captured").capturing("looking at", fault::OBJECT)?;
        Ok(captured)
    }

    fn let_go(&mut self, held: HeldPod) -> Result<(), CheckpointError> {
        let stopped = held.stopped();
        let cleared = held.clear();
        let stays = self.was_suspended || self.options.afterwards == Afterwards::Suspended;
        if stays || !stopped.is_empty() {
            // Stopped tracees count as frozen, and stay so when they are let go.
            self.pod.cgroup.freeze()?;
        }
        let gone = cleared.and_then(Cleared::let_go);
        if !stays && !stopped.is_empty() {
            // Who is let go runs for a moment before a signal's stop has it again, and nobody may see that.
            stops::await_all(&stopped);
            self.pod.cgroup.thaw()?;
        }
        self.put_back()?;
        self.clock.lap("let-go");
        self.opened.clear();
        gone.map(drop).map_err(|e| held_failed(self.pod, e))
    }

    /// Gives the pod away, all of whose image has been sent. Returns for how long it ran nowhere, in microseconds.
    fn give(&mut self, held: HeldPod, taker: &mut dyn Taker) -> Result<u64, CheckpointError> {
        // Cleared before it is frozen for good, which is part of giving it up: batches run no more then.
        let cleared = match held.clear() {
            Ok(cleared) => cleared,
            Err(error) => {
                self.put_back()?;
                return Err(held_failed(self.pod, error));
            }
        };
        let pod = self.pod.spec.name.clone();
        match taker.take(self.pod, &self.left) {
            Given::Away(since) => {
                let held_for = self.clock.held_until(since);
                self.pod.cgroup.begin_kill()?;
                // As in `end`.
                drop(cleared);
                self.pod.cgroup.await_end()?;
                self.clock.lap("let-go");
                Ok(held_for)
            }
            Given::Kept(why) => {
                let gone = cleared.let_go();
                self.put_back()?;
                gone.map_err(|e| held_failed(self.pod, e))?;
                Err(CheckpointError::Kept { pod, why })
            }
            Given::InDoubt(why) => {
                // Stopped tracees count as frozen, and stay so when they are let go. The network stays blocked.
                let gone = cleared.let_go();
                self.pod.journal.done(&Undo::Thaw)?;
                self.pod.journal.done(&Undo::Sockets)?;
                gone.map_err(|e| held_failed(self.pod, e))?;
                Err(CheckpointError::InDoubt { pod, why })
            }
        }
    }

    /// Undoes what the hold did to the pod as a whole.
    fn put_back(&mut self) -> Result<(), CheckpointError> {
        if self.was_suspended {
            self.pod.cgroup.freeze()?;
        }
        self.pod.journal.done(&Undo::Thaw)?;
        self.pod.journal.done(&Undo::Sockets)?;
        // Newcomers first: those that wait go on waiting for as long as others are dropped.
        let admitted = self.admit_newcomers();
        self.unblock()?;
        admitted
    }

    fn unblock(&mut self) -> Result<(), CheckpointError> {
        if let Some(network) = &self.pod.network {
            let opened = match self.under_way.newcomers_dropped() {
                true => network.unblock_for_known(),
                false => network.unblock(),
            };
            opened.map_err(|source| network_failed(self.pod, source))?;
            self.pod.journal.done(&Undo::Unblock)?;
        }
        Ok(())
    }

    /// Ends the pod's processes, which are held: none runs again. Their last packets go nowhere.
    fn end(&mut self, held: HeldPod) -> Result<(), CheckpointError> {
        self.pod.begin_end()?;
        // From Linux 7 on PID 1 is there until it has reaped everybody, whom tracers keep from it.
        drop(held);
        self.pod.cgroup.await_end()?;
        self.clock.lap("let-go");
        Ok(())
    }

    fn write(&mut self, captured: Captured, mut writer: ImageWriter, stats: &mut Stats) -> Result<(), CheckpointError> {
        let pages = captured.processes.iter().map(|process| process.memory.stored_bytes() / memory::PAGE);
        stats.pages = pages.sum();
        writer.record("pod", 1, &captured.pod);
        writer.records("process", 1, &captured.processes)?;
        writer.record("zombies", 1, &captured.zombies);
        writer.record("ipc", 1, &captured.ipc);
        writer.records("file", 1, &captured.files)?;
        captured.namespaces.iter().for_each(|namespace| writer.record("namespace", 1, namespace));
        let settings = self.network.settings_alone(self.pod).map_err(|e| refused(self.pod, e))?;
        captured.networks.iter().chain(&settings).for_each(|network| writer.record("network", 1, network));
        captured.mounts.iter().for_each(|mount| writer.record("mount", 1, mount));
        captured.trees.finish(&mut writer).map_err(|e| trees_failed(self.pod, e))?;
        fault::fallible("checkpoint-before-rename").map_err(|e| refused(self.pod, unexpected(fault::OBJECT, &e)))?;
        stats.bytes = writer.finish(&captured.pod.facts())?.bytes;
        self.clock.lap("write");
        Ok(())
    }
}
