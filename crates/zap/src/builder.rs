//! The builder: a short-lived process inside a new pod, forked by its PID 1, that opens every file of the image, makes its
//! IPC objects, and clones the seeds out of which the tree grows.

use std::fs::File;
use std::io::{IoSlice, IoSliceMut};
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use nix::fcntl::{OFlag, openat};
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use nix::sys::stat::Mode;
use serde::{Deserialize, Serialize};

use crate::error::{Context, RebuildError};
use crate::files::{self, FileState};
use crate::ids::{FileId, HostPid, PodPid};
use crate::image::{ImageReader, decode, encode};
use crate::ipc::{self, IpcState};
use crate::keepers::{Keeping, Kept};
use crate::mounts::{self, LateMounts, MountState};
use crate::namespaces::network::{self, NetworkState};
use crate::namespaces::{self, NamespaceId};
use crate::pod::{self, NetworkMode, PodSpec};
use crate::rebuild::Rebuild;
use crate::record::PodRecord;
use crate::sys::pidfd::PidFd;
use crate::sys::{clone, mount, nsfs, seed};

/// What the builder is to do.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Order {
    /// The pod as it was born.
    pub spec: PodSpec,
    /// How many of the descriptors that it is given are the image's; console pipes follow.
    pub image_files: usize,
    /// Where the stub goes in every seed.
    pub code: Range<u64>,
    /// Where batches go in every seed.
    pub scratch: Range<u64>,
    /// The seeds' PIDs.
    pub seeds: Vec<PodPid>,
    /// What is to be kept by other processes.
    pub keeping: Keeping,
}

/// What the builder answers.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Answer {
    /// Where some of the files are.
    Opened(Vec<(FileId, i32)>),
    /// Where some of those are that others keep.
    Kept(Vec<(FileId, Kept)>),
    /// All files are open, the seeds exist. A console pty's master comes along.
    Built {
        /// The descriptor of the image's data.
        data: i32,
        /// Those of the namespaces.
        namespaces: Vec<(NamespaceId, i32)>,
        /// Those of the processes that keep files.
        keepers: Vec<i32>,
        /// Whether every file is connected with the others: else they are to be when every process is there.
        complete: bool,
    },
    /// It failed.
    Failed {
        /// The sentence.
        message: String,
        /// What kind of failure: the exit code of the command.
        exit_code: u8,
    },
}

/// What the builder is asked for once the seeds exist.
#[derive(Clone, Debug, Serialize, Deserialize)]
enum Request {
    /// The next process gets these numbers: each in the PID namespace of which this is the first process (0: the pod's).
    Number(Vec<(PodPid, i32)>),
    /// What could not be mounted before the first processes of PID namespaces were there: these.
    Mount(Vec<(NamespaceId, PodPid)>),
    /// What could not be connected before every process was there.
    Connect,
}

/// Runs the builder on its descriptors: a socket to the monitor, the image's, the console's. It ends when the socket does.
pub fn run(files: Vec<OwnedFd>) -> ! {
    let mut files = files.into_iter();
    let Some(socket) = files.next() else { std::process::exit(1) };
    // What it was told is there for as long as it is.
    let answer = match receive(&socket).and_then(|order| build(Box::leak(Box::new(order)), files.collect())) {
        Ok(mut built) => {
            let _ = built.tell(&socket);
            // The pool stays open for the monitor to fetch copies, until it hangs up.
            built.serve(&socket);
            // With who keeps files for it.
            drop(built);
            std::process::exit(0)
        }
        Err(error) => Answer::Failed { message: error.to_string(), exit_code: exit_code(&error) },
    };
    let _ = send(&socket, &answer, None);
    std::process::exit(1)
}

/// What the builder has made. All of it stays open: the seeds have the same numbers.
struct Built {
    rebuild: Rebuild<'static>,
    /// The files of the image, if some of them are yet to be connected.
    states: Option<Vec<FileState>>,
    /// The image's data.
    data: OwnedFd,
    console_master: Option<OwnedFd>,
    mounts: Option<LateMounts>,
}

impl Built {
    /// Says where everything is, files in portions of which each fits into a message.
    fn tell(&self, socket: &OwnedFd) -> std::io::Result<()> {
        const PORTION: usize = 2048;
        let files: Vec<_> = self.rebuild.files().map(|(id, file)| (id, file.as_raw_fd())).collect();
        for some in files.chunks(PORTION) {
            send(socket, &Answer::Opened(some.to_vec()), None)?;
        }
        let kept: Vec<_> = self.rebuild.kept().collect();
        for some in kept.chunks(PORTION) {
            send(socket, &Answer::Kept(some.to_vec()), None)?;
        }
        let namespaces = self.rebuild.namespaces.iter().map(|(id, file)| (*id, file.as_raw_fd())).collect();
        let (keepers, complete) = (self.rebuild.keepers(), self.states.is_none());
        let built = Answer::Built { data: self.data.as_raw_fd(), namespaces, keepers, complete };
        send(socket, &built, self.console_master.as_ref())
    }

    /// Does what it is asked for until the monitor hangs up. Those in user namespaces have no right to choose numbers.
    fn serve(&mut self, socket: &OwnedFd) {
        let mut last = None;
        let mut bytes = vec![0; 64 << 10];
        while let Ok(length @ 1..) = nix::unistd::read(socket, &mut bytes) {
            let result = match decode(&bytes[..length]) {
                Err(message) => Err(message),
                Ok(Request::Number(numbers)) => {
                    if last.is_none() {
                        last = last_pid().ok();
                    }
                    let mut asked = numbers.iter();
                    let put = |file: &File| asked.all(|(first, number)| put(file, first.0, *number).is_ok());
                    if last.as_ref().is_some_and(put) { Ok(()) } else { Err("it could not".to_owned()) }
                }
                Ok(Request::Mount(firsts)) => match self.mounts.take() {
                    Some(mounts) => mounts.make(self.rebuild.image, &firsts).map_err(|error| error.to_string()),
                    None => Ok(()),
                },
                Ok(Request::Connect) => match &self.states {
                    Some(states) => files::connect_late(&mut self.rebuild, states).map_err(|error| error.to_string()),
                    None => Ok(()),
                },
            };
            if send(socket, &result, None).is_err() {
                return;
            }
        }
    }
}

/// The kernel takes the writer's own PID namespace: somebody goes into that of `first` and has a child there.
fn put(last: &File, first: i32, number: i32) -> std::io::Result<()> {
    let before = (number - 1).to_string();
    let write = || last.write_all_at(before.as_bytes(), 0);
    if first == 0 {
        return write();
    }
    let handle = PidFd::open(HostPid(first))?;
    clone::in_child(&|| {
        nsfs::enter(&handle, libc::CLONE_NEWPID)?;
        clone::in_child(&write)
    })
}

/// `ns_last_pid` of the pod, whose own `/proc/sys` cannot be written to.
fn last_pid() -> std::io::Result<File> {
    let proc = mount::new_mount(c"proc", &[], 0)?;
    let flags = OFlag::O_WRONLY | OFlag::O_CLOEXEC;
    Ok(File::from(openat(&proc, "sys/kernel/ns_last_pid", flags, Mode::empty())?))
}

/// Asks the builder to number the next process, in each PID namespace of which this is the first process.
pub fn ask_numbers(socket: &OwnedFd, numbers: &[(PodPid, i32)]) -> std::io::Result<()> {
    ask(socket, &Request::Number(numbers.to_vec()))
}

/// Asks the builder to mount what needs the first processes of PID namespaces.
pub fn ask_to_mount(socket: &OwnedFd, firsts: Vec<(NamespaceId, PodPid)>) -> std::io::Result<()> {
    ask(socket, &Request::Mount(firsts))
}

/// Asks the builder to connect what needs every process.
pub fn ask_to_connect(socket: &OwnedFd) -> std::io::Result<()> {
    ask(socket, &Request::Connect)
}

fn ask(socket: &OwnedFd, request: &Request) -> std::io::Result<()> {
    send(socket, request, None)?;
    let mut bytes = vec![0; 16 << 10];
    let length = nix::unistd::read(socket, &mut bytes)?;
    let answer: Result<(), String> = decode(&bytes[..length]).map_err(std::io::Error::other)?;
    answer.map_err(std::io::Error::other)
}

fn exit_code(error: &RebuildError) -> u8 {
    match error {
        RebuildError::Kernel { .. } => 1,
        RebuildError::Lacks(_) | RebuildError::Changed { .. } => 4,
        RebuildError::Damaged(_) => 5,
    }
}

fn build(order: &'static Order, mut given: Vec<OwnedFd>) -> Result<Built, RebuildError> {
    let console = given.split_off(order.image_files);
    let image = ImageReader::receive(given).map_err(|e| RebuildError::Damaged(e.to_string()))?;
    let image: &'static ImageReader = Box::leak(Box::new(image));
    let states: Vec<FileState> = image.every("file").map_err(|e| RebuildError::Damaged(e.to_string()))?;
    let mut rebuild = Rebuild::new(image, &order.spec, console);
    rebuild.have_kept(order.keeping.clone());
    let ipc: IpcState = image.one("ipc").map_err(|e| RebuildError::Damaged(e.to_string()))?;
    let namespaces = image.every("namespace").map_err(|e| RebuildError::Damaged(e.to_string()))?;
    let pod: PodRecord = image.one("pod").map_err(|e| RebuildError::Damaged(e.to_string()))?;
    if let Some(names) = pod.names {
        if !pod::may_name_itself(&order.spec) {
            return Err(RebuildError::Damaged(
                "its names were changed, which it has no right to (CAP_SYS_ADMIN)".into(),
            ));
        }
        namespaces::name(&names).rebuilding("setting", "the names of the pod")?;
    }
    let mounts: Vec<MountState> = image.every("mount").map_err(|e| RebuildError::Damaged(e.to_string()))?;
    mounts::make(image, &mounts)?;
    let (made, late) = namespaces::make(image, &namespaces)?;
    let networks: Vec<NetworkState> = image.every("network").map_err(|e| RebuildError::Damaged(e.to_string()))?;
    if order.spec.network == NetworkMode::Host && networks.iter().any(|network| network.place.is_none()) {
        return Err(RebuildError::Damaged("it has a network of its own and shares the host's".into()));
    }
    let is_set_up = |network: &NetworkState| network.place.is_none() && network.configuration.is_some();
    if !network::is_administered(&order.spec) && networks.iter().any(is_set_up) {
        return Err(RebuildError::Damaged("its network was set up, which it has no right to (CAP_NET_ADMIN)".into()));
    }
    let mut begun = network::restart(&networks, &made)?;
    rebuild.taps = begun.as_mut().map(|begun| std::mem::take(&mut begun.taps)).unwrap_or_default();
    rebuild.namespaces = made;
    ipc::restart(&mut rebuild, &ipc)?;
    files::open_all(&mut rebuild, &states)?;
    files::connect_all(&mut rebuild, &states)?;
    network::restart_filters(&networks, begun, &rebuild.namespaces)?;
    let console_master = rebuild.console_master.take();
    let is_complete = !files::any_late(&states)?;
    rebuild.let_go(is_complete)?;
    let states = (!is_complete).then_some(states);
    let data = image.data_file().map_err(|e| RebuildError::Damaged(e.to_string()))?;
    let data = data.try_clone_to_owned().rebuilding("copying", "the descriptor of the image")?;
    seed::prepare(&order.code, &order.scratch, &crate::tracee::stub_code())
        .rebuilding("preparing", "the ground of the seeds")?;
    for pid in &order.seeds {
        spawn_seed(*pid).rebuilding("making", format!("process {pid}"))?;
    }
    Ok(Built { rebuild, states, data, console_master, mounts: late })
}

/// Clones a seed. A helper thread that has ended keeps its number a moment longer than `/proc` shows it (`release_task`
/// of the kernel frees numbers last), and nothing but the attempt tells when it is free.
fn spawn_seed(pid: PodPid) -> std::io::Result<()> {
    let deadline = Instant::now() + Duration::from_secs(1);
    loop {
        match crate::sys::clone::spawn_seed(pid) {
            Err(e) if e.raw_os_error() == Some(libc::EEXIST) && Instant::now() < deadline => std::thread::yield_now(),
            other => return other,
        }
    }
}

/// Sends a message, and a descriptor with it.
pub fn send<T: Serialize>(socket: &OwnedFd, message: &T, file: Option<&OwnedFd>) -> std::io::Result<()> {
    let bytes = encode(message);
    let numbers: Vec<RawFd> = file.iter().map(|file| file.as_raw_fd()).collect();
    let control = [ControlMessage::ScmRights(&numbers)];
    let control = if numbers.is_empty() { &[][..] } else { &control[..] };
    sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(&bytes)], control, MsgFlags::MSG_NOSIGNAL, None)?;
    Ok(())
}

/// Receives the builder's answer, and the descriptor with it. An end of file means that the builder died.
pub fn receive_answer(socket: &OwnedFd) -> Result<(Answer, Option<OwnedFd>), RebuildError> {
    let mut bytes = vec![0; 64 << 10];
    let mut space = nix::cmsg_space!(RawFd);
    let (length, file) = {
        let mut parts = [IoSliceMut::new(&mut bytes)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        let message = recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut space), flags)
            .rebuilding("waiting for", "the builder")?;
        let rights = message.cmsgs().rebuilding("reading from", "the builder")?.find_map(|c| match c {
            ControlMessageOwned::ScmRights(files) => files.first().copied(),
            _ => None,
        });
        (message.bytes, rights.map(crate::sys::seed::own))
    };
    if length == 0 {
        let source = std::io::Error::other("it ended without an answer");
        return Err(RebuildError::Kernel { step: "waiting for", object: "the builder".into(), source });
    }
    Ok((decode(&bytes[..length]).map_err(RebuildError::Damaged)?, file))
}

fn receive(socket: &OwnedFd) -> Result<Order, RebuildError> {
    let mut bytes = vec![0; 1 << 20];
    let flags = MsgFlags::empty();
    let length = nix::sys::socket::recv(socket.as_fd().as_raw_fd(), &mut bytes, flags)
        .rebuilding("receiving", "the order of the restart")?;
    decode(&bytes[..length]).map_err(RebuildError::Damaged)
}
