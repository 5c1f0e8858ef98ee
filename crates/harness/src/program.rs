//! Programs for a tree of processes, as the property tests generate them and `pod-program` runs them in a pod.
//!
//! Every step is meaningful in every state: what it names (a process, a region, a channel) is taken modulo what there
//! is. So any shortened program is a program, too.

use serde::{Deserialize, Serialize};

/// One thing that one process does, while all others wait for their turn.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Step {
    /// Which of the living processes, modulo their number. A pause is always the first one's.
    pub who: u8,
    /// What it does.
    pub op: Op,
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
    /// An eventfd.
    Event,
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
    /// A pair of connected Unix datagram sockets.
    Datagrams,
    /// A pair of connected Unix sockets over which other channels are passed.
    Post,
    /// A timerfd that is armed far in the future, or not.
    Timer,
    /// A signalfd.
    Signals,
    /// A POSIX message queue.
    Queue,
    /// An epoll instance.
    Epoll,
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
    /// Tells the kernel how a region will be used (madvise(2), mlock(2)).
    Advise {
        /// Which.
        region: u8,
        /// What.
        advice: u8,
    },
    /// Removes a System V segment.
    RemoveSegment(u8),
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
    /// Changes the protection of a region.
    Protect {
        /// Which.
        region: u8,
        /// Bits: read, write, execute.
        protection: u8,
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
        /// How: bits of edge-triggered, one-shot.
        how: u8,
    },
    /// Asks an epoll instance what is ready.
    Ready(u8),
    /// Tries to lock a file, as flock(2) does.
    Lock(u8),
    /// Closes a channel.
    Close(u8),
    /// Listens on a TCP port.
    Listen(u16),
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
    /// Starts a thread that waits for ever.
    Thread(u8),
    /// Arms a timer that signals, far in the future.
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
    /// Sets the soft limit of open files.
    Limit(u8),
    /// Sets its name.
    Name(u8),
    /// Sleeps that many milliseconds.
    Sleep(u8),
    /// Notes everything that it can see of itself.
    Look,
    /// The first process says that it is here, and waits until it is told to go on.
    Pause,
}

impl Op {
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

/// The directory in the pod where the first process says where it is, and in the end what the transcript is.
pub const MEETING_POINT: &str = "/mnt/meeting-point";
