//! Images of released versions of the format must restart for ever: one of each is kept in `tests/golden/`, of a program that
//! needs nothing of the host (`witness.c`), which it carries itself.
//!
//! With `ZAP_GOLDEN=write` the image of the present version is made anew, which changes what is promised: do so only when
//! the version of the format has changed.

#![allow(missing_docs)]

mod common;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use common::{Host, eventually, finish};
use serde::Serialize;
use serde::de::DeserializeOwned;
use zap::image::{ImageReader, decode, encode};

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}

fn present() -> PathBuf {
    golden().join(format!("format-{}", zap::image::FORMAT))
}

fn write(image: &Path) {
    let host = Host::new();
    let root = Path::new("/var/tmp/zap-golden");
    let _ = std::fs::remove_dir_all(root);
    std::fs::create_dir(root).unwrap();
    let flags = "-static -nostdlib -nostartfiles -ffreestanding -fno-stack-protector -fno-pie -no-pie -Os -o";
    let mut compile = Command::new("gcc");
    compile.args(flags.split(' ')).arg(root.join("witness")).arg(golden().join("witness.c"));
    assert_eq!(finish(&mut compile).code, 0);
    host.start(["-n", "golden", "--root", root.to_str().unwrap(), "--", "/witness"]);
    eventually("it is ready", || host.ok(["logs", "golden"]) == "ready");
    let _ = std::fs::remove_dir_all(image);
    host.ok(["checkpoint", "golden", "-o", image.to_str().unwrap(), "--carry-files", "--compress", "zstd"]);
    std::fs::remove_dir_all(root).unwrap();
}

#[test]
fn images_of_every_version_restart() {
    if std::env::var("ZAP_GOLDEN").is_ok_and(|wish| wish == "write") {
        write(&present());
    }
    assert!(present().exists(), "there is no image of the present version: see above");
    let host = Host::new();
    let root = host.path("root");
    let images = std::fs::read_dir(golden()).unwrap().map(|entry| entry.unwrap().path());
    for image in images.filter(|path| path.is_dir()) {
        std::fs::create_dir(&root).unwrap();
        let words = ["restart", image.to_str().unwrap(), "-d", "-n", "golden", "--root", root.to_str().unwrap()];
        host.ok(words);
        // What it finds is as it was, and so it is after a checkpoint by this version.
        let again = host.path("again");
        host.ok(["checkpoint", "golden", "-o", again.to_str().unwrap(), "--carry-files"]);
        host.ok(["restart", again.to_str().unwrap(), "-d", "--root", root.to_str().unwrap()]);
        host.ok(["kill", "-s", "USR1", "golden"]);
        let ended = host.run(["wait", "golden"]);
        assert_eq!((ended.code, host.ok(["logs", "golden"]).as_str()), (0, "ok"), "{}: {ended:?}", image.display());
        host.ok(["rm", "golden"]);
        std::fs::remove_dir_all(&root).unwrap();
        std::fs::remove_dir_all(&again).unwrap();
    }
}

/// A state that is read and written again is the same, byte for byte.
fn comes_back<T: DeserializeOwned + Serialize>(kind: &str, body: &[u8]) {
    let state: T = decode(body).unwrap_or_else(|error| panic!("{kind}: {error}"));
    assert!(encode(&state) == body, "a record of the kind {kind} comes back as another");
}

type Check = fn(&str, &[u8]);

/// What an image that builds on another says of each of its files: where stretches of it are stored.
type Stretches = Vec<(String, Vec<(u16, u64, u64)>)>;

/// The kind of the record that is the image's own.
const STRETCHES: &str = "stretches";

/// Kinds of records. Images of this version have no `layers`, which are known for those that had.
const RECORDS: [(&str, Check); 9] = [
    ("pod", comes_back::<zap::record::PodRecord>),
    ("process", comes_back::<zap::process::state::ProcessState>),
    ("zombies", comes_back::<Vec<zap::process::state::EndedState>>),
    ("ipc", comes_back::<zap::ipc::IpcState>),
    ("file", file_comes_back),
    ("namespace", comes_back::<zap::namespaces::NamespaceState>),
    ("network", comes_back::<zap::namespaces::network::NetworkState>),
    ("mount", comes_back::<zap::mounts::MountState>),
    (STRETCHES, comes_back::<Stretches>),
];

/// Kinds of files: what each keeps is in a state of its own.
const FILES: [(&str, Check); 29] = {
    use zap::{files, sockets};
    [
        ("proc", comes_back::<files::proc::ProcState>),
        ("removed-directory", comes_back::<files::removed::RemovedState>),
        ("name-only", comes_back::<files::name_only::NameOnlyState>),
        ("mqueue", comes_back::<files::mqueue::MqueueState>),
        ("regular", comes_back::<files::regular::RegularState>),
        ("memfd", comes_back::<files::memfd::MemfdState>),
        ("shared-memory", comes_back::<files::shared_memory::SharedMemoryState>),
        ("huge-memory", comes_back::<files::huge_memory::HugeMemoryState>),
        ("directory", comes_back::<files::directory::DirectoryState>),
        ("pipe", comes_back::<files::pipe::PipeState>),
        ("fifo", comes_back::<files::fifo::FifoState>),
        ("device", comes_back::<files::device::DeviceState>),
        ("tun", comes_back::<files::tun::TunState>),
        ("tcp", comes_back::<sockets::TcpState>),
        ("udp", comes_back::<sockets::UdpState>),
        ("raw", comes_back::<sockets::RawState>),
        ("packet", comes_back::<sockets::LinkState>),
        ("netlink", comes_back::<sockets::NetlinkState>),
        ("eventfd", comes_back::<files::eventfd::EventfdState>),
        ("io-uring", comes_back::<files::io_uring::IoUringState>),
        ("epoll", comes_back::<files::epoll::EpollState>),
        ("timerfd", comes_back::<files::timerfd::TimerfdState>),
        ("signalfd", comes_back::<files::signalfd::SignalfdState>),
        ("pty", comes_back::<files::pty::PtyState>),
        ("unix", comes_back::<sockets::UnixState>),
        ("pidfd", comes_back::<files::pidfd::PidfdState>),
        ("inotify", comes_back::<files::inotify::InotifyState>),
        ("fanotify", comes_back::<files::fanotify::FanotifyState>),
        ("namespace-file", comes_back::<files::namespace::NamespaceFileState>),
    ]
};

fn file_comes_back(kind: &str, body: &[u8]) {
    comes_back::<zap::files::FileState>(kind, body);
    let file: zap::files::FileState = decode(body).unwrap();
    let (_, check) = FILES.iter().find(|(kind, _)| *kind == file.kind).unwrap();
    check(&file.kind, &file.state);
}

/// A file of every kind but those of [`RARE_FILES_OPENER`], and a child that has ended.
const FILES_OPENER: &str = "
import ctypes, mmap, os, select, socket, time
libc = ctypes.CDLL(None)
os.mkfifo('/tmp/fifo'); os.mkdir('/tmp/gone')
kept = [os.pipe(), os.openpty(), os.eventfd(7), os.memfd_create('memory'), os.pidfd_open(os.getpid()), select.epoll(),
        os.open('/tmp/fifo', os.O_RDWR), os.open('/tmp/gone', os.O_RDONLY), os.open('/', os.O_RDONLY), os.open('/', os.O_PATH),
        os.open('/proc/self/status', os.O_RDONLY), os.open('/proc/self/ns/net', os.O_RDONLY), os.open('/dev/null', os.O_RDWR),
        open('/tmp/file', 'w'), mmap.mmap(-1, 8192), socket.socketpair(), socket.create_server(('127.0.0.1', 80)),
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM), socket.socket(socket.AF_INET, socket.SOCK_RAW, 1),
        socket.socket(socket.AF_PACKET, socket.SOCK_RAW), socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)]
made = [libc.timerfd_create(1, 0), libc.inotify_init(), libc.signalfd(-1, ctypes.create_string_buffer(128), 0),
        libc.mq_open(b'/queue', os.O_RDWR | os.O_CREAT, 0o600, None)]
assert min(made) >= 0, made
os.rmdir('/tmp/gone')
if os.fork() == 0: os._exit(3)
print('ready', flush=True)
time.sleep(1000)
";

/// Files that a pod has whose filter and capabilities are others. No huge page is used, so the host need not have one.
const RARE_FILES_OPENER: &str = "
import ctypes, fcntl, mmap, os, struct, time
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
tun = os.open('/dev/net/tun', os.O_RDWR)
fcntl.ioctl(tun, 0x400454ca, struct.pack('16sH22x', b'tun0', 1))
made = [libc.fanotify_init(0, os.O_RDONLY), libc.syscall(425, 8, ctypes.create_string_buffer(120))]
made += [libc.fanotify_mark(made[0], 1, ctypes.c_uint64(0x20), -100, b'/tmp')]
assert min(made) >= 0, (made, ctypes.get_errno())
shared, without_reserve, huge = mmap.MAP_SHARED | mmap.MAP_ANONYMOUS, 0x4000, 0x40000
assert libc.mmap(None, ctypes.c_size_t(2 << 20), 3, shared | without_reserve | huge, -1, ctypes.c_long(0)) % 4096 == 0
print('ready', flush=True)
time.sleep(1000)
";

/// All records of an image come back; their kinds, and those of its files.
fn all_come_back(image: &Path) -> BTreeSet<String> {
    let reader = ImageReader::open(image).unwrap();
    let mut seen: BTreeSet<String> = reader.contents().map(|(kind, ..)| kind.to_owned()).collect();
    for kind in seen.clone() {
        let (_, check) = RECORDS.iter().find(|(known, _)| *known == kind).unwrap_or_else(|| panic!("of a kind {kind}"));
        reader.records(&kind).for_each(|(_, body)| check(&kind, body));
    }
    let file = |(_, body)| decode::<zap::files::FileState>(body).unwrap().kind;
    seen.extend(reader.records("file").map(file));
    seen
}

/// All kinds of records, of pods that have mounted something, with namespaces of their own making, and files of all kinds.
#[test]
fn every_record_comes_back() {
    let records: BTreeSet<&str> = RECORDS.iter().map(|(kind, _)| *kind).chain(["layers"]).collect();
    let known = zap::record::KNOWN.iter().map(|(kind, _)| *kind).chain([STRETCHES]);
    assert_eq!(records, known.collect());
    let files: BTreeSet<&str> = FILES.iter().map(|(kind, _)| *kind).collect();
    assert_eq!(files, zap::files::KINDS.iter().map(|kind| kind.name()).collect());
    const INNER: &str =
        "ip address add 10.7.0.1/32 dev lo; ip rule add to 10.8.0.0/16 lookup 7; echo ready; exec sleep 1000";
    let command = format!("mount -t tmpfs none /mnt; unshare -Urmnipf sh -c '{INNER}'");
    let rare = "--cap-add sys_admin --cap-add net_admin --seccomp unconfined --bind /dev/net/tun";
    let host = Host::new();
    let mut seen = BTreeSet::new();
    for (name, options, command) in [
        ("nested", "--cap-add sys_admin", ["sh", "-c", &command]),
        ("files", "--cap-add net_raw", ["python3", "-c", FILES_OPENER]),
        ("rare", rare, ["python3", "-c", RARE_FILES_OPENER]),
    ] {
        let options: Vec<&str> = options.split(' ').collect();
        host.start([&["-n", name], &options[..], &["--"], &command].concat());
        eventually("it is ready", || host.ok(["logs", name]).contains("ready"));
        let [image, child] = ["", "-child"].map(|end| host.path(&format!("{name}{end}")));
        let (image, child) = (image.to_str().unwrap(), child.to_str().unwrap());
        host.ok(["checkpoint", name, "-o", image, "--leave-running"]);
        host.ok(["checkpoint", name, "-o", child, "--parent", image]);
        [image, child].iter().for_each(|image| seen.append(&mut all_come_back(Path::new(image))));
    }
    let missing: Vec<&str> =
        RECORDS.iter().chain(&FILES).map(|(kind, _)| *kind).filter(|k| !seen.contains(*k)).collect();
    assert!(missing.is_empty(), "no record of the kinds {missing:?} was seen");
}
