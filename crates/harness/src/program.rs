//! Programs for a tree of processes and their threads, as the property tests generate them and `pod-program` runs them in a pod.
//!
//! Every step is meaningful in every state: what it names (a process, a region, a channel) is taken modulo what there
//! is. So any shortened program is a program, too.

use serde::{Deserialize, Serialize};

/// One thing that one thread of one process does, while all others wait for their turn.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Step {
    /// Which of the living processes, modulo their number. A pause is always the first one's.
    pub who: u8,
    /// Which of its threads, modulo their number. A pause is always the first one's.
    #[serde(default)]
    pub thread: u8,
    /// What it does.
    pub op: Op,
}

impl Step {
    /// A step of the first thread of a process.
    pub fn of_first(who: u8, op: Op) -> Step {
        Step { who, thread: 0, op }
    }
}

/// Something that is written to and read from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Kind {
    /// A pipe.
    Pipe,
    /// A pair of connected Unix stream sockets.
    Pair,
    /// A pair of connected Unix sockets that keep the bounds of messages.
    Packets,
    /// A TCP connection over the pod's loopback interface.
    Tcp,
    /// Two UDP sockets, connected to each other.
    Udp,
    /// A connection between Unix sockets, one of which has a path.
    Named,
    /// An eventfd.
    Event,
    /// An eventfd that is a semaphore.
    Semaphore,
    /// A file.
    File,
    /// A file opened for appending.
    Append,
    /// A named pipe.
    Fifo,
    /// A pseudo-terminal: written to at the slave, read from at the master.
    Pty,
    /// A memfd.
    Memfd,
    /// A memfd that can be sealed.
    Sealed,
    /// A file of `/dev/shm`.
    Shm,
    /// A pair of connected Unix datagram sockets.
    Datagrams,
    /// A pair of connected Unix sockets over which other channels are passed.
    Post,
    /// Likewise, of sockets that keep no bounds of messages.
    PostStream,
    /// A timerfd that is armed far in the future, or has expired, or neither.
    Timer,
    /// A signalfd.
    Signals,
    /// A POSIX message queue.
    Queue,
    /// An epoll instance.
    Epoll,
    /// An inotify instance with a directory of its own.
    Notify,
}

impl Kind {
    /// Every kind.
    pub const ALL: [Kind; 23] = {
        use Kind::*;
        [
            Pipe, Pair, Packets, Tcp, Udp, Named, Event, Semaphore, File, Append, Fifo, Pty, Memfd, Sealed, Shm,
            Datagrams, Post, PostStream, Timer, Signals, Queue, Epoll, Notify,
        ]
    };
}

/// What a process does. Numbers of regions, channels and processes are modulo what there is.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Op {
    /// Makes a child, which has everything that this process has.
    Fork,
    /// Ends; nothing for the first process.
    Exit(u8),
    /// Buries a child that has ended, if there is one.
    Wait,
    /// Maps a region of memory.
    Map {
        /// Whether children will share it.
        shared: bool,
        /// Its size.
        pages: u8,
    },
    /// Attaches a System V shared memory segment.
    Segment(u8),
    /// Fills a part of a region.
    Store {
        /// Which.
        region: u8,
        /// Which of its pages.
        page: u8,
        /// With what.
        seed: u8,
    },
    /// Maps a file.
    MapFile {
        /// Which channel.
        channel: u8,
        /// Whether writes reach the file.
        shared: bool,
    },
    /// Makes a region bigger or smaller, at its place.
    Resize {
        /// Which.
        region: u8,
        /// Its new size.
        pages: u8,
    },
    /// Moves a region to another place.
    Move(u8),
    /// Tells the kernel how a region will be used (madvise(2), mlock(2)).
    Advise {
        /// Which.
        region: u8,
        /// What.
        advice: u8,
    },
    /// Removes a System V object.
    RemoveObject(u8),
    /// Adds to or takes from a System V semaphore.
    Semaphore {
        /// Which set.
        key: u8,
        /// How much.
        change: i8,
        /// Whether the end of the process undoes it.
        undo: bool,
    },
    /// Sends a System V message.
    Message {
        /// To which queue.
        key: u8,
        /// Its type and length.
        bytes: u8,
    },
    /// Takes a System V message.
    Receive(u8),
    /// Changes the protection of a region, or of one of its pages.
    Protect {
        /// Which.
        region: u8,
        /// Bits: read, write, execute; one page alone.
        protection: u8,
        /// Which page.
        page: u8,
    },
    /// Unmaps a region.
    Unmap(u8),
    /// Opens a channel.
    Open(Kind),
    /// Writes to a channel.
    Put {
        /// Which.
        channel: u8,
        /// How many bytes; for an eventfd how much.
        bytes: u16,
    },
    /// Reads from a channel what is in it, but at most so much.
    Take {
        /// Which.
        channel: u8,
        /// How many bytes.
        bytes: u16,
    },
    /// Moves the offset of a file.
    Seek {
        /// Which channel.
        channel: u8,
        /// Where to.
        offset: u16,
    },
    /// Removes a file's name.
    Unlink(u8),
    /// Gives a file another name.
    Rename(u8),
    /// Makes a file longer.
    Grow {
        /// Which channel.
        channel: u8,
        /// Bytes at least.
        bytes: u16,
    },
    /// Makes a file longer or shorter, if it has never been mapped.
    Truncate {
        /// Which channel.
        channel: u8,
        /// Its new length.
        bytes: u16,
    },
    /// Shuts the end down that is written to.
    Shut(u8),
    /// Has the channel once more, with the same open files.
    Dup(u8),
    /// Tries to lock a range of a file, as fcntl(2) does.
    LockRange {
        /// Which channel.
        channel: u8,
        /// First byte.
        start: u8,
        /// For the open file instead of the process.
        open_file: bool,
    },
    /// Sends a channel over another that is for this ([`Kind::Post`]).
    Pass {
        /// Which.
        channel: u8,
        /// Over which.
        over: u8,
    },
    /// Receives a channel.
    Fetch(u8),
    /// Has an epoll instance watch a channel.
    Watch {
        /// Which instance.
        epoll: u8,
        /// What.
        channel: u8,
        /// How: bits of watching for the end, for room, and once only.
        how: u8,
    },
    /// Asks an epoll instance what is ready.
    Ready(u8),
    /// Tries to lock a file, as flock(2) does, or to seal it.
    Lock(u8),
    /// Closes a channel.
    Close(u8),
    /// Listens on a TCP port, or on a Unix socket with that number in its name.
    Listen {
        /// Which.
        port: u16,
        /// Whether of TCP.
        tcp: bool,
    },
    /// Connects to one of its listeners.
    Connect(u8),
    /// Accepts a connection, if one waits.
    Accept(u8),
    /// Makes a terminal that of its session, and its own group the one in front.
    Terminal(u8),
    /// Takes a robust mutex that all processes share, if it is free, or gives it back.
    Mutex(u8),
    /// Goes on in a signal handler, or comes back from it.
    Handler,
    /// Blocks a signal.
    Block(u8),
    /// Unblocks a signal.
    Unblock(u8),
    /// Sends a signal with a value.
    Send {
        /// To which of the living processes.
        to: u8,
        /// Which signal.
        signal: u8,
    },
    /// Stops another process, but for the first.
    Stop(u8),
    /// Lets a process that was stopped go on.
    Continue(u8),
    /// Sends a signal with a value to one thread.
    Direct {
        /// Of which of the living processes.
        to: u8,
        /// To which of its threads.
        thread: u8,
        /// Which signal.
        signal: u8,
    },
    /// Starts a thread, which takes steps from then on.
    Thread(u8),
    /// Ends the thread; nothing for the first one.
    Leave,
    /// Waits in a call of the kernel's, over other steps; nothing for the first thread.
    Await(u8),
    /// Ends the wait of one of its threads.
    Ring(u8),
    /// Arms a timer that signals, far in the future or at once.
    Alarm(u8),
    /// Becomes another user; nothing for the first process.
    User(u8),
    /// Sets a priority, an affinity, or a switch of prctl(2).
    Tune {
        /// Which.
        what: u8,
        /// To what.
        value: u8,
    },
    /// Sets the file mode creation mask.
    Umask(u8),
    /// Changes the working directory.
    Chdir(u8),
    /// Begins a session.
    Session,
    /// Begins a process group.
    Group,
    /// Joins the group of another process.
    Join(u8),
    /// Sets a soft limit.
    Limit(u8),
    /// Sets the name of the thread.
    Name(u8),
    /// Sleeps that many milliseconds.
    Sleep(u8),
    /// Notes everything that it can see of itself; a thread that is not the first one what is its own alone.
    Look,
    /// The first process says that it is here, and waits until it is told to go on.
    Pause,
}

impl Op {
    /// What [`Op::kind`] calls those that are generated.
    pub fn kinds() -> Vec<String> {
        let opened = Kind::ALL.map(|kind| Op::Open(kind).kind());
        OTHERS.iter().map(|name| (*name).to_owned()).chain(opened).collect()
    }

    /// The kinds of steps in what a program tells: their numbers, with `+` for those that not only a first thread has taken.
    pub fn kinds_in(told: &str) -> Vec<String> {
        let kinds = Op::kinds();
        let kind = |number: &str| number.parse().ok().and_then(|number: usize| kinds.get(number));
        let named = |word: &str| match word.strip_suffix('+') {
            Some(number) => kind(number).map(|kind| format!("{kind}{BY_ANOTHER}")),
            None => kind(word).cloned(),
        };
        told.split(' ').filter_map(named).collect()
    }

    /// What it is called in counts: its name, and the kind of what it opens.
    pub fn kind(&self) -> String {
        match self {
            Op::Open(kind) => format!("Open {kind:?}"),
            other => {
                let shown = format!("{other:?}");
                shown.split([' ', '(']).next().unwrap_or_default().to_owned()
            }
        }
    }
}

/// What is behind a kind of step in counts, where it was not a process's first thread that took it.
pub const BY_ANOTHER: &str = ", not the first thread";

/// Everything that processes do but for opening channels.
const OTHERS: [&str; 61] = [
    "Fork",
    "Exit",
    "Wait",
    "Map",
    "Segment",
    "Store",
    "MapFile",
    "Resize",
    "Move",
    "Advise",
    "RemoveObject",
    "Semaphore",
    "Message",
    "Receive",
    "Protect",
    "Unmap",
    "Put",
    "Take",
    "Seek",
    "Unlink",
    "Rename",
    "Grow",
    "Truncate",
    "Shut",
    "Dup",
    "LockRange",
    "Pass",
    "Fetch",
    "Watch",
    "Ready",
    "Lock",
    "Close",
    "Listen",
    "Connect",
    "Accept",
    "Terminal",
    "Mutex",
    "Handler",
    "Block",
    "Unblock",
    "Send",
    "Stop",
    "Continue",
    "Direct",
    "Thread",
    "Leave",
    "Await",
    "Ring",
    "Alarm",
    "User",
    "Tune",
    "Umask",
    "Chdir",
    "Session",
    "Group",
    "Join",
    "Limit",
    "Name",
    "Sleep",
    "Look",
    "Pause",
];

/// The directory in the pod where the first process says where it is, and in the end what the transcript is.
pub const MEETING_POINT: &str = "/mnt/meeting-point";
