//! The story of a restart: read → verify → rebuild → let go.

mod error;
mod later;

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, Ipv4Addr};
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::ScopedJoinHandle;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{AddressFamily, Shutdown, SockFlag, SockType, shutdown, socketpair};
use nix::time::ClockId;
use serde::{Deserialize, Serialize};

use crate::builder::{self, Answer, Order};
use crate::checkpoint::{Clock, Phase};
use crate::demands;
use crate::error::{Context, RebuildError};
use crate::fault;
use crate::fetch::Fetching;
use crate::files::{self, FileState, HashCache, LateFiles, Unsettled};
use crate::ids::{FileId, HostPid, PodPid};
use crate::image::ImageReader;
use crate::ipc::{self, IpcState};
use crate::keepers::Keeping;
use crate::memory::{self, PageRun};
use crate::monitor::session::End;
use crate::namespaces::enter::Names;
use crate::namespaces::{Kind, Levels, NamespaceId, NamespaceState};
use crate::plausible;
use crate::pod::journal::Undo;
use crate::pod::live::Unpack;
use crate::pod::network::former::FormerPlace;
use crate::pod::network::trail::Trail;
use crate::pod::network::{self, NetworkError};
use crate::pod::trees;
use crate::pod::{Bind, Birth, ClockOffsets, LivePod, PodError, PodSpec, Publish, Shim, Store};
use crate::process::grow::{Common, Grove, GrowError, Incomplete, Numberer, PART, Pool, Surroundings};
use crate::process::state::{self, EndedState, Place, ProcessState};
use crate::process::tree::{self, Plan};
use crate::process::{discover, sharing};
use crate::record::{self, PodRecord};
use crate::sockets;
use crate::sys::descriptor;
use crate::sys::pidfd::PidFd;
use crate::tracee::TraceeError;

/// How an image is to be restarted.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Options {
    /// Absolute path of the image.
    pub image: PathBuf,
    /// The name asked for; the image's own if that is free, else a fresh one.
    pub name: Option<String>,
    /// The outer address asked for.
    pub address: Option<IpAddr>,
    /// The place that a forwarder keeps for it where it was.
    #[serde(default)]
    pub former: Option<FormerPlace>,
    /// The hosts that it was on before, if it is followed from there.
    #[serde(default)]
    pub trail: Option<Trail>,
    /// Published ports; those of the image if `None`.
    pub publish: Option<Vec<Publish>>,
    /// Bind mounts in place of the image's of the same target.
    pub binds: Vec<Bind>,
    /// The root directory in place of the image's.
    pub root: Option<PathBuf>,
    /// The fault point at which the monitor is to die ([`crate::fault`]).
    #[serde(default)]
    pub fault: Option<String>,
}

/// Figures of a finished restart. Times are whole microseconds.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Stats {
    /// From the request until every process runs.
    pub total_us: u64,
    /// verify, namespaces, tree, memory, files, network, let-go.
    pub phases: Vec<Phase>,
    /// The name that the pod got.
    pub name: String,
    /// The address at which it is reached, if it has one.
    pub address: Option<String>,
}

pub use self::error::RestartError;
use self::later::Later;
/// What PID 1 runs in the child that builds.
pub use crate::builder::run as builder;

/// Asked when the whole pod is rebuilt and held: an error ends it, and nothing is left. Address spaces whose pages come later
/// must be served when it returns. It is told what the restart took so far.
pub type Gate<'a> = dyn FnMut(&mut LivePod, Vec<Incomplete>, &[Phase]) -> Result<(), String> + Send + 'a;

/// A pod that was started again, here or where it moved to.
pub struct Restarted {
    /// It runs.
    pub pod: LivePod,
    /// What that took.
    pub stats: Stats,
    /// How the rest of its memory comes, where some comes later.
    pub fetching: Option<Fetching>,
}

/// Starts an image again. Much memory is put in place once the pod runs. On an error nothing is left of the attempt. The caller
/// must be its process's only thread.
pub fn restart(store: Store, options: &Options) -> Result<Restarted, RestartError> {
    let clock = Clock::start();
    // Before anything is read: PID 1 of the pod has the memory that this process has now.
    let shim = shim(options)?;
    let mut image = Image::of(ImageReader::open(&options.image)?, options, false)?;
    let mut later = Later::of(&mut image)?;
    let mut gate = |pod: &mut LivePod, incomplete: Vec<Incomplete>, _: &[Phase]| later.begin(pod, incomplete);
    let restarted = restart_image(store, image, options, (shim, clock), &mut gate);
    let fetching = later.settle(restarted.is_ok());
    restarted.map(|(pod, stats)| Restarted { pod, stats, fetching })
}

/// Starts an image again that was received, and checked, as soon as `gate` opens. Otherwise as [`restart`].
pub fn restart_received(
    store: Store,
    reader: ImageReader,
    options: &Options,
    gate: &mut Gate<'_>,
) -> Result<(LivePod, Stats), RestartError> {
    let clock = Clock::start();
    let shim = shim(options)?;
    restart_image(store, Image::of(reader, options, true)?, options, (shim, clock), gate)
}

fn shim(options: &Options) -> Result<Shim, PodError> {
    let pod = options.name.clone().unwrap_or_else(|| options.image.display().to_string());
    Shim::fork().map_err(|source| PodError::Kernel { pod, step: "forking".to_owned(), source })
}

fn restart_image(
    store: Store,
    image: Image,
    options: &Options,
    (shim, mut clock): (Shim, Clock),
    gate: &mut Gate<'_>,
) -> Result<(LivePod, Stats), RestartError> {
    clock.lap("verify");
    if options.fault.is_some() {
        fault::arm(options.fault.as_deref());
    }
    fault::fallible("restart-verified").rebuilding("verifying", fault::OBJECT).map_err(|e| image.failed(e))?;
    let pod = std::thread::scope(|scope| {
        let (state, whole) = (store.state().to_owned(), &image);
        let verify = move || {
            HashCache::load(&state);
            whole.verify_bulk()
        };
        let bulk = Bulk(scope.spawn(verify));
        let made = image.namespaces(store, options, &shim);
        clock.lap("namespaces");
        let mut pod = match made {
            Ok(pod) => pod,
            Err(error) => return bulk.before(Err(error)),
        };
        // On a thread of its own: ptrace belongs to threads, and the end of this one lets go of whatever a failure left held.
        let rebuilt = std::thread::scope(|scope| {
            let thread = scope.spawn(|| image.rebuild(&mut pod, &mut clock, bulk, gate));
            thread.join().unwrap_or(Err(RestartError::Panicked))
        });
        match rebuilt {
            Ok(()) => Ok(pod),
            Err(error) => Err(give_up(pod, error)),
        }
    })?;
    fault::point("restart-done");
    let address = pod.network.as_ref().map(|network| network.outer().ipv4.to_string());
    let name = pod.spec.name.clone();
    let (phases, total_us) = clock.finish();
    Ok((pod, Stats { total_us, phases, name, address }))
}

/// Takes away what was made of a pod.
fn give_up(pod: LivePod, error: RestartError) -> RestartError {
    let name = pod.spec.name.clone();
    match pod.destroy(End::TakenAway(format!("the restart of {name} failed"))) {
        Ok(()) => error,
        Err(second) => second.into(),
    }
}

/// Says whether an image could be restarted here; changes nothing.
pub fn verify(options: &Options) -> Result<(), RestartError> {
    Image::of(ImageReader::open(&options.image)?, options, false)?.verify_bulk()
}

/// The bulk of an image being verified, while what does not depend on it is made.
struct Bulk<'scope>(ScopedJoinHandle<'scope, Result<(), RestartError>>);

impl Bulk<'_> {
    /// What is wrong with the image comes before what came of it.
    fn before<T>(self, result: Result<T, RestartError>) -> Result<T, RestartError> {
        self.0.join().unwrap_or(Err(RestartError::Panicked)).and(result)
    }
}

/// An image, read and verified but for its bulk.
struct Image {
    reader: ImageReader,
    checked: bool,
    pod: PodRecord,
    processes: Vec<ProcessState>,
    zombies: Vec<EndedState>,
    files: Vec<FileState>,
    ipc: IpcState,
    namespaces: Vec<NamespaceState>,
    plan: Plan,
}

impl Image {
    /// `checked` says that the bytes of its files are known to be right.
    fn of(reader: ImageReader, options: &Options, checked: bool) -> Result<Image, RestartError> {
        reader.check_kinds(record::KNOWN)?;
        if !checked {
            reader.verify_layers()?;
        }
        let mut pod: PodRecord = reader.one("pod")?;
        let mut processes: Vec<ProcessState> = reader.every("process")?;
        let zombies: Vec<EndedState> = reader.one("zombies")?;
        let files: Vec<FileState> = reader.every("file")?;
        let ipc = reader.one("ipc")?;
        let namespaces = reader.every("namespace")?;
        let living = processes.iter().map(|process| process.place.clone());
        let places: Vec<Place> = living.chain(zombies.iter().map(|zombie| zombie.place.clone())).collect();
        let name = pod.spec.name.clone();
        let damaged = |what: String| RestartError::Rebuild { pod: name.clone(), source: RebuildError::Damaged(what) };
        let data = reader.parts().find(|(name, ..)| *name == "data").map_or(0, |(_, _, length)| length);
        plausible::check(&pod.spec, &processes, &zombies, &files, data).map_err(damaged)?;
        let plan = tree::plan(&places, pod.init_session).map_err(|e| damaged(e.to_string()))?;
        let beginnings = pod.beginnings.clone().without_hidden(&pod.spec.environment);
        let fits = demands::fit(&mut processes, &pod.host, &beginnings);
        fits.map_err(|source| RestartError::Rebuild { pod: name.clone(), source })?;
        sockets::end_connects(&mut processes, &files);
        if let Some(root) = &options.root {
            pod.spec.root = root.clone();
        }
        for bind in &options.binds {
            pod.spec.binds.retain(|known| known.target != bind.target);
            pod.spec.binds.push(bind.clone());
        }
        if let Some(publish) = &options.publish {
            pod.spec.publish = publish.clone();
        }
        Ok(Image { reader, checked, pod, processes, zombies, files, ipc, namespaces, plan })
    }

    /// What takes long to verify: the contents of memory and queues, and the files of the root that the pod goes on using.
    fn verify_bulk(&self) -> Result<(), RestartError> {
        match self.checked {
            false => self.reader.verify_data()?,
            // What comes later is checked when it does.
            true => {
                let left = self.processes.iter().flat_map(|process| &process.memory.left);
                self.reader.verify_stored(&left.filter_map(PageRun::data).collect::<Vec<_>>())?;
            }
        }
        files::verify_root(&self.pod.spec.root, &self.files).map_err(|source| self.failed(source))
    }

    /// A pod as `run` makes it, but with nobody in it, its clocks where they were, and its network blocked.
    fn namespaces(&self, store: Store, options: &Options, shim: &Shim) -> Result<LivePod, RestartError> {
        let (monotonic, boottime) = self.pod.clocks;
        let clocks = ClockOffsets {
            monotonic: monotonic - record::host_clock(ClockId::CLOCK_MONOTONIC),
            boottime: boottime - record::host_clock(ClockId::CLOCK_BOOTTIME),
        };
        let address = options.address.map(|address| self.ipv4_of(address)).transpose()?.map(|address| (address, None));
        let threads = self.processes.iter().flat_map(|process| &process.threads).map(|thread| thread.tid);
        let last_pid = self.plan.nodes.keys().copied().chain(threads).max().map(|pid| pid.0);
        let own = options.name.clone().unwrap_or_else(|| self.pod.spec.name.clone());
        let fresh = (2..1000).map(|number| format!("{}-{number}", self.pod.spec.name));
        for name in std::iter::once(own).chain(fresh) {
            let mut unpack = |into: &Path| trees::unpack_upper(&self.reader, into);
            let unpack: Option<Unpack<'_>> = Some(&mut unpack);
            let birth = Birth {
                clocks: Some(clocks),
                network_blocked: true,
                address,
                former: options.former.as_ref(),
                trail: options.trail.as_ref(),
                unpack,
                last_pid,
                shim: Some(shim),
                ..Birth::default()
            };
            let spec = PodSpec { name, ..self.pod.spec.clone() };
            match LivePod::create(store.clone(), spec, birth) {
                // A name that nobody asked for gives way.
                Err(PodError::Taken(_)) if options.name.is_none() => {}
                other => return Ok(other?),
            }
        }
        Err(PodError::Taken(self.pod.spec.name.clone()).into())
    }

    /// The address of the pods' network that was asked for: each IPv6 address there goes with an IPv4 address.
    fn ipv4_of(&self, address: IpAddr) -> Result<Ipv4Addr, RestartError> {
        let found = match address {
            IpAddr::V4(address) => Ok(address),
            IpAddr::V6(address) => network::ipv4_of(address),
        };
        found.map_err(|source| PodError::Network { pod: self.pod.spec.name.clone(), source }.into())
    }

    fn failed(&self, error: impl Into<GrowError>) -> RestartError {
        let pod = self.pod.spec.name.clone();
        match error.into() {
            GrowError::Rebuild(source) => RestartError::Rebuild { pod, source },
            GrowError::Tracee(source) => RestartError::Tracee { pod, source },
        }
    }

    /// Files, tree, memory, and everything else; ends with everybody let go.
    fn rebuild(
        &self,
        pod: &mut LivePod,
        clock: &mut Clock,
        bulk: Bulk<'_>,
        gate: &mut Gate<'_>,
    ) -> Result<(), RestartError> {
        let namespaces = fault::fallible("restart-namespaces").rebuilding("making", fault::OBJECT);
        let opened = namespaces.map_err(|e| self.failed(e)).and_then(|()| self.open_files(pod));
        // No process is made of anything that was not verified.
        let (common, builder) = bulk.before(opened)?;
        clock.lap("files");
        fault::fallible("restart-files").rebuilding("opening", fault::OBJECT).map_err(|e| self.failed(e))?;
        let number = |numbers: &[(PodPid, i32)]| builder.number(numbers);
        std::thread::scope(|scope| {
            let unsettled = scope.spawn(|| self.unsettled(&builder));
            let mut grove = self.raise(pod, common, (&number, &builder), clock)?;
            let unsettled = unsettled.join().unwrap_or(Err(RestartError::Panicked))?;
            builder.connect_late().map_err(|e| self.failed(e))?;
            let dismissed = builder.dismiss();
            let host_pid = |pid: PodPid| grove.host_of(pid);
            files::settle_all(&unsettled, &host_pid).map_err(|e| self.failed(e))?;
            ipc::remove_marked(pod.init, &self.ipc).map_err(|e| self.failed(e))?;
            // Should this monitor die before it is told to go on, the pod dies with it.
            let incomplete = grove.take_incomplete().map_err(|e| self.failed(e))?;
            gate(pod, incomplete, clock.phases())
                .map_err(|why| RestartError::NotGiven { pod: self.pod.spec.name.clone(), why })?;
            self.let_go(pod, grove, unsettled, dismissed, clock)
        })
    }

    /// Every process, held where it was when it was captured.
    fn raise<'a>(
        &'a self,
        pod: &LivePod,
        common: Common,
        (number, builder): (&'a Numberer<'a>, &Builder),
        clock: &mut Clock,
    ) -> Result<Grove<'a>, RestartError> {
        let late = LateFiles::of(&self.files).map_err(|e| self.failed(e))?;
        let (names, levels) = (Names(&self.namespaces), Levels(&self.namespaces));
        let surroundings = Surroundings { late, names, levels, number };
        let mut grove = Grove::new(common, &self.plan, &self.processes, &self.zombies, surroundings);
        let hosts = processes_of(pod)?;
        for seed in &self.plan.seeds {
            let host = hosts.get(seed).copied().ok_or(TraceeError::Died(*seed)).map_err(|e| self.failed(e))?;
            grove.adopt(*seed, host).map_err(|e| self.failed(e))?;
        }
        grove.grow().map_err(|e| self.failed(e))?;
        builder.mount(grove.firsts()).map_err(|e| self.failed(e))?;
        clock.lap("memory");
        fault::fallible("restart-memory").rebuilding("filling", fault::OBJECT).map_err(|e| self.failed(e))?;
        grove.join_groups().map_err(|e| self.failed(e))?;
        grove.end_the_ended().map_err(|e| self.failed(e))?;
        grove.furnish().map_err(|e| self.failed(e))?;
        grove.number_on().map_err(|e| self.failed(e))?;
        grove.finish().map_err(|e| self.failed(e))?;
        clock.lap("tree");
        fault::fallible("restart-tree").rebuilding("making", fault::OBJECT).map_err(|e| self.failed(e))?;
        Ok(grove)
    }

    /// Lets everybody go, and packets through.
    fn let_go(
        &self,
        pod: &mut LivePod,
        mut grove: Grove<'_>,
        unsettled: Vec<Unsettled<'_>>,
        builder: Dismissed,
        clock: &mut Clock,
    ) -> Result<(), RestartError> {
        grove.come_of_age().map_err(|e| self.failed(e))?;
        fault::fallible("restart-before-let-go").rebuilding("letting go", fault::OBJECT).map_err(|e| self.failed(e))?;
        let known = pod.network.as_mut().map_or(Ok(()), |network| network.know_callers());
        known.map_err(|source| network_failed(pod, source))?;
        // From here on the pod lives, whatever becomes of this monitor.
        pod.journal.record(Undo::Unblock)?;
        pod.beginnings = self.pod.beginnings.clone();
        if let Some(main) = self.pod.main {
            pod.watch_main(main)?;
        }
        if let Some(network) = &pod.network {
            network.unblock().map_err(|source| network_failed(pod, source))?;
            network.forget_unanswered().map_err(|source| network_failed(pod, source))?;
        }
        pod.journal.done(&Undo::Unblock)?;
        // Connections go on, now that packets come through.
        files::awaken_all(unsettled).map_err(|e| self.failed(e))?;
        builder.await_end();
        clock.lap("network");
        let touched = self.touched(&grove);
        grove.let_go().map_err(|e| self.failed(e))?;
        if let Some(network) = &pod.network {
            network.announce();
            if let Err(error) = network.supersede_forwarder() {
                tracing::warn!("a forwarder for pod {}, which has come home, is left: {error}", pod.spec.name);
            }
        }
        // Nobody waits for it: whoever needs one of these pages first has it mapped in by itself.
        std::thread::spawn(move || {
            for (process, windows) in touched {
                if let Err(error) = memory::touch(process, &windows) {
                    tracing::debug!(%error, "pages of files are not mapped in ahead");
                }
            }
        });
        clock.lap("let-go");
        Ok(())
    }

    /// Where the processes had pages of files mapped in.
    fn touched(&self, grove: &Grove<'_>) -> Vec<(HostPid, Vec<Range<u64>>)> {
        let of = |process: &ProcessState| Some((grove.host_of(process.place.pid)?, process.memory.touched.clone()));
        self.processes.iter().filter_map(of).collect()
    }

    /// The contents of the tmpfs mounts, and every file, open in the builder.
    fn open_files(&self, pod: &mut LivePod) -> Result<(Common, Builder), RestartError> {
        trees::unpack_tmpfs(&self.reader, pod.init).map_err(|e| self.failed(e))?;
        let mut common = self.common(pod)?;
        let builder = self.build(pod, &common)?;
        common.pool = builder.pool.clone();
        Ok((common, builder))
    }

    /// Addresses and numbers that every process of the restart has free.
    fn common(&self, pod: &LivePod) -> Result<Common, RestartError> {
        const CODE: u64 = 4096;
        let scratch = PART * sharing::most_sharers(&self.processes) as u64;
        let place = memory::free_gap(self.processes.iter().map(|process| &process.memory), CODE + scratch);
        let start =
            place.ok_or_else(|| self.failed(RebuildError::Lacks("free address space for zap's scratch".into())))?;
        let depth = discover::depth_of(pod.init).map_err(|_| self.failed(TraceeError::Died(PodPid(1))))?;
        Ok(Common {
            code: start..start + CODE,
            scratch: start + CODE..start + CODE + scratch,
            pool: Arc::default(),
            depth,
            filters: common_filters(&self.processes),
        })
    }

    /// Has the builder open every file and clone the seeds.
    fn build(&self, pod: &mut LivePod, common: &Common) -> Result<Builder, RestartError> {
        let image = self.reader.share()?;
        let console = if self.pod.spec.tty { Vec::new() } else { pod.new_console_pipes()?.into() };
        // The seeds inherit the limit; each process gets its own limits back. While files are opened there are at most as many
        // to spare.
        let highest = self.processes.iter().flat_map(|process| &process.descriptors).map(|d| d.number).max();
        let wanted = (2 * self.files.len() as u64).max(highest.unwrap_or(0) as u64) + 1024;
        let allow = |process: i32| {
            if let Err(error) = descriptor::allow(process, wanted) {
                tracing::info!(%error, "the limit of open files stays as it is");
            }
        };
        allow(0);
        let most =
            descriptor::most().rebuilding("asking", "how many files zap may open").map_err(|e| self.failed(e))?;
        let mut keeping = Keeping::of(self.files.len(), (wanted, most), || self.near());
        let mut free = self.free_pids();
        keeping.pids.iter_mut().zip(&mut free).for_each(|(pid, free)| *pid = free);
        let order = Order {
            spec: self.pod.spec.clone(),
            image_files: image.len(),
            code: common.code.clone(),
            scratch: common.scratch.clone(),
            seeds: self.plan.seeds.clone(),
            keeping,
        };
        let kind = SockType::SeqPacket;
        let (ours, theirs) = socketpair(AddressFamily::Unix, kind, None, SockFlag::SOCK_CLOEXEC)
            .rebuilding("making", "a socket to the builder")
            .map_err(|e| self.failed(e))?;
        let files = std::iter::once(theirs).chain(image).chain(console).collect();
        let host = pod.build(free.next().unwrap_or(PodPid(i32::MAX)), files)?;
        allow(host.0);
        builder::send(&ours, &order, None).rebuilding("writing to", "the builder").map_err(|e| self.failed(e))?;
        let mut pool = Pool::default();
        let (master, complete) = loop {
            match builder::receive_answer(&ours).map_err(|e| self.failed(e))? {
                (Answer::Opened(files), _) => pool.files.extend(files),
                (Answer::Kept(files), _) => pool.kept.extend(files),
                (Answer::Built { data, namespaces, keepers, complete }, master) => {
                    (pool.data, pool.namespaces) = (data, namespaces.into_iter().collect());
                    pool.keepers = keepers;
                    break (master, complete);
                }
                (Answer::Failed { message, exit_code }, _) => {
                    return Err(RestartError::Builder { pod: self.pod.spec.name.clone(), message, exit_code });
                }
            }
        };
        if let Some(master) = master {
            pod.adopt_console_master(master)?;
        }
        Ok(Builder { socket: ours, host, pool: Arc::new(pool), complete })
    }

    /// Files that processes need for more than to have them open, or that those need who could not fetch them from others any
    /// more: they enter user namespaces first.
    fn near(&self) -> HashSet<FileId> {
        let mut near = HashSet::new();
        for process in &self.processes {
            near.extend(process.memory.files());
            near.extend(process.root.into_iter().chain([process.cwd]));
            near.extend(process.directories_of_threads());
            if process.namespaces.of(Kind::User).is_some() {
                near.extend(process.descriptors.iter().map(|descriptor| descriptor.file));
            }
        }
        near
    }

    /// PIDs that nobody of the image has, for the builder and its like.
    fn free_pids(&self) -> impl Iterator<Item = PodPid> {
        let taken: HashSet<i32> = self.plan.nodes.keys().map(|pid| pid.0).collect();
        let threads: HashSet<i32> = self.processes.iter().flat_map(|p| &p.threads).map(|t| t.tid.0).collect();
        // Who opens a file of a process that has ended takes its number.
        let ended: HashSet<i32> = files::proc::ended(&self.files).map(|pid| pid.0).collect();
        (2..).filter(move |pid| ![&taken, &threads, &ended].iter().any(|numbers| numbers.contains(pid))).map(PodPid)
    }

    /// The files for which there is something to do once every process exists; what takes long is done.
    fn unsettled(&self, builder: &Builder) -> Result<Vec<Unsettled<'_>>, RestartError> {
        let pidfd = PidFd::open(builder.host).rebuilding("opening", "the builder").map_err(|e| self.failed(e))?;
        let pool = &builder.pool;
        let keepers = pool.keepers.iter().map(|handle| pidfd.get(*handle).map(PidFd::from));
        let keepers: Vec<PidFd> =
            keepers.collect::<Result<_, _>>().rebuilding("opening", "who keeps files").map_err(|e| self.failed(e))?;
        let fetch =
            |file: FileId| match pool.kept.get(&file).and_then(|kept| Some((keepers.get(kept.keeper)?, kept.number))) {
                Some((keeper, number)) => keeper.get(number),
                None => pidfd.get(pool.files.get(&file).copied().unwrap_or(-1)),
            };
        files::unsettled(&self.files, &fetch).map_err(|e| self.failed(e))
    }
}

fn network_failed(pod: &LivePod, source: NetworkError) -> PodError {
    PodError::Network { pod: pod.spec.name.clone(), source }
}

/// The builder, waiting with the pool open.
struct Builder {
    socket: OwnedFd,
    host: HostPid,
    pool: Arc<Pool>,
    /// Whether every file is connected.
    complete: bool,
}

impl Builder {
    /// Sees to it that the next process gets these numbers, the innermost first: each in the PID namespace of which this
    /// is the first process (0: the pod's).
    fn number(&self, numbers: &[(PodPid, i32)]) -> Result<(), RebuildError> {
        builder::ask_numbers(&self.socket, numbers).rebuilding("numbering", format!("a task as {numbers:?}"))
    }

    /// Has it mount what shows the PID namespaces made inside the pod, of which these are the first processes.
    fn mount(&self, firsts: Vec<(NamespaceId, PodPid)>) -> Result<(), RebuildError> {
        match firsts.is_empty() {
            true => Ok(()),
            false => builder::ask_to_mount(&self.socket, firsts).rebuilding("mounting", "what shows PID namespaces"),
        }
    }

    /// Has it connect the files that carry such as can be opened only now that every process exists.
    fn connect_late(&self) -> Result<(), RebuildError> {
        if self.complete {
            return Ok(());
        }
        builder::ask_to_connect(&self.socket).rebuilding("connecting", "what carries handles on processes")
    }

    /// Lets it end: nothing more is asked of it.
    fn dismiss(&self) -> Dismissed {
        let process = PidFd::open(self.host).ok();
        let _ = shutdown(self.socket.as_raw_fd(), Shutdown::Both);
        Dismissed(process)
    }
}

/// A builder on its way out.
struct Dismissed(Option<PidFd>);

impl Dismissed {
    /// Returns when nothing of the pool is open in it any more.
    fn await_end(self) {
        if let Some(process) = self.0 {
            let mut ended = [PollFd::new(process.as_fd(), PollFlags::POLLIN)];
            let _ = poll(&mut ended, PollTimeout::from(5_000u16));
        }
    }
}

/// How many filters, from the oldest on, all processes have in common.
fn common_filters(processes: &[ProcessState]) -> usize {
    let Some(first) = processes.first() else { return 0 };
    let common = |other: &ProcessState| state::common(&first.filters, &other.filters).min(other.shared_filters());
    processes.iter().map(common).min().unwrap_or(0)
}

/// The host's PID of every process of a pod.
fn processes_of(pod: &LivePod) -> Result<HashMap<PodPid, HostPid>, RestartError> {
    let population = discover::discover(pod.init, &pod.cgroup.pids()?);
    let live = population.map(|population| population.live).unwrap_or_default();
    Ok(live.into_iter().map(|found| (found.subject.pod, found.subject.host)).collect())
}
