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
use crate::ids::{HostPid, PodPid};
use crate::image::{ImageReader, decode, encode};
use crate::ipc::{self, IpcState};
use crate::mounts::{self, MountState};
use crate::namespaces;
use crate::pod::PodSpec;
use crate::rebuild::Rebuild;
use crate::sys::pidfd::PidFd;
use crate::sys::{clone, mount, nsfs, seed};

/// What the builder is to do.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Order {
    /// The pod as it was born.
    pub spec: PodSpec,
    /// How many of the descriptors that it is given are the image's; console pipes follow.
    pub image_files: usize,
    /// The first descriptor of the pool.
    pub pool: i32,
    /// How many files the image has: the data comes behind them, then the namespaces.
    pub files: u32,
    /// Where the stub goes in every seed.
    pub code: Range<u64>,
    /// Where batches go in every seed.
    pub scratch: Range<u64>,
    /// The seeds' PIDs.
    pub seeds: Vec<PodPid>,
}

/// What the builder answers.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Answer {
    /// All files are open, the seeds exist. A console pty's master comes along.
    Built,
    /// It failed.
    Failed {
        /// The sentence.
        message: String,
        /// What kind of failure: the exit code of the command.
        exit_code: u8,
    },
}

/// Runs the builder on its descriptors: a socket to the monitor, the image's, the console's. It ends when the socket does.
pub fn run(files: Vec<OwnedFd>) -> ! {
    let mut files = files.into_iter();
    let Some(socket) = files.next() else { std::process::exit(1) };
    let answer = match receive(&socket).and_then(|order| build(&order, files.collect())) {
        Ok(master) => {
            let _ = send(&socket, &Answer::Built, master.as_ref());
            // The pool stays open for the monitor to fetch copies, until it hangs up.
            number_next(&socket);
            std::process::exit(0)
        }
        Err(error) => Answer::Failed { message: error.to_string(), exit_code: exit_code(&error) },
    };
    let _ = send(&socket, &answer, None);
    std::process::exit(1)
}

/// Sees to it, as often as it is asked, that the next process of the pod gets a number: those in user namespaces have no
/// right to choose one.
fn number_next(socket: &OwnedFd) {
    let mut last = None;
    let mut words = [0; 8 * 32];
    while let Ok(length @ 1..) = nix::unistd::read(socket, &mut words) {
        if last.is_none() {
            last = last_pid().ok();
        }
        let word = |bytes: &[u8]| bytes.first_chunk().map_or(0, |bytes| i32::from_ne_bytes(*bytes));
        let mut asked = words[..length].chunks(8).map(|pair| (word(pair), word(&pair[4..])));
        let written = last.as_ref().is_some_and(|file| asked.all(|(first, number)| put(file, first, number).is_ok()));
        let _ = nix::unistd::write(socket, &[u8::from(written)]);
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
    let words: Vec<u8> =
        numbers.iter().flat_map(|(first, number)| [first.0, *number]).flat_map(i32::to_ne_bytes).collect();
    nix::unistd::write(socket, &words)?;
    let mut answer = [0];
    match (nix::unistd::read(socket, &mut answer)?, answer) {
        (1, [1]) => Ok(()),
        _ => Err(std::io::Error::other("the builder could not")),
    }
}

fn exit_code(error: &RebuildError) -> u8 {
    match error {
        RebuildError::Kernel { .. } => 1,
        RebuildError::Lacks(_) | RebuildError::Changed { .. } => 4,
        RebuildError::Damaged(_) => 5,
    }
}

fn build(order: &Order, mut given: Vec<OwnedFd>) -> Result<Option<OwnedFd>, RebuildError> {
    let console = given.split_off(order.image_files);
    let image = ImageReader::receive(given).map_err(|e| RebuildError::Damaged(e.to_string()))?;
    let states: Vec<FileState> = image.every("file").map_err(|e| RebuildError::Damaged(e.to_string()))?;
    let mut rebuild = Rebuild::new(&image, &order.spec, console);
    let ipc: IpcState = image.one("ipc").map_err(|e| RebuildError::Damaged(e.to_string()))?;
    let namespaces = image.every("namespace").map_err(|e| RebuildError::Damaged(e.to_string()))?;
    let mounts: Vec<MountState> = image.every("mount").map_err(|e| RebuildError::Damaged(e.to_string()))?;
    mounts::make(&image, &mounts)?;
    rebuild.namespaces = namespaces::make(&image, &namespaces)?;
    ipc::restart(&mut rebuild, &ipc)?;
    files::open_all(&mut rebuild, &states)?;
    files::connect_all(&mut rebuild, &states)?;
    let master = rebuild.console_master.take();
    rebuild.console.clear();
    let made = rebuild.take_namespaces();
    let pool = rebuild.into_files();
    for (id, file) in &pool {
        place(file.as_raw_fd(), order.pool + id.0 as i32)?;
    }
    drop(pool);
    let data = image.data_file().map_err(|e| RebuildError::Damaged(e.to_string()))?;
    let last = order.pool + order.files as i32;
    place(data.as_raw_fd(), last)?;
    for (id, namespace) in &made {
        place(namespace.as_raw_fd(), last + 1 + id.0 as i32)?;
    }
    drop(made);
    seed::prepare(&order.code, &order.scratch, &crate::tracee::stub_code())
        .rebuilding("preparing", "the ground of the seeds")?;
    for pid in &order.seeds {
        spawn_seed(*pid).rebuilding("making", format!("process {pid}"))?;
    }
    Ok(master)
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

/// Gives a file its number in the pool.
fn place(file: RawFd, number: i32) -> Result<(), RebuildError> {
    seed::duplicate(file, number).rebuilding("numbering a file", format!("descriptor {number}; raise `ulimit -n`"))
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
