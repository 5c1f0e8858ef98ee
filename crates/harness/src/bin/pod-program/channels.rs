//! Steps on channels.

use std::os::fd::AsRawFd;
use std::sync::atomic::Ordering::SeqCst;

use harness::program::{Kind, Op};

use super::channel::{Channel, hash};
use super::{Process, masks, pattern, raw};

/// Kinds that may be passed, and that an epoll may watch, without a cycle.
fn is_leaf(kind: Kind) -> bool {
    !matches!(kind, Kind::Post | Kind::PostStream | Kind::Epoll)
}

impl Process {
    pub(super) fn channel(&mut self, now: usize, op: &Op) -> String {
        if let Op::Open(kind) = op {
            let Some(number) = self.board.new_channel() else { return "no room".into() };
            return match Channel::open(number, *kind) {
                Ok(channel) => {
                    self.channels.push(channel);
                    number.to_string()
                }
                Err(error) => error.to_string(),
            };
        }
        let (Op::Put { channel: which, .. }
        | Op::Take { channel: which, .. }
        | Op::Seek { channel: which, .. }
        | Op::Grow { channel: which, .. }
        | Op::Truncate { channel: which, .. }
        | Op::LockRange { channel: which, .. }
        | Op::Pass { channel: which, .. }
        | Op::Watch { channel: which, .. }
        | Op::Unlink(which)
        | Op::Rename(which)
        | Op::Dup(which)
        | Op::Shut(which)
        | Op::Terminal(which)
        | Op::Fetch(which)
        | Op::Ready(which)
        | Op::Lock(which)
        | Op::Close(which)) = op
        else {
            return "no such thing".into();
        };
        if self.channels.is_empty() {
            return "nothing open".into();
        }
        let which = usize::from(*which) % self.channels.len();
        let channel = &self.channels[which];
        match op {
            Op::Put { bytes, .. } => self.put(now, channel, usize::from(*bytes)),
            Op::Take { bytes, .. } => self.take(channel, usize::from(*bytes)),
            Op::Seek { offset, .. } if channel.is_file() => {
                let whence = nix::unistd::Whence::SeekSet;
                format!("{:?}", nix::unistd::lseek(channel.reader(), i64::from(*offset), whence))
            }
            Op::Unlink(_) if channel.is_file() => format!("{:?}", nix::unistd::unlink(channel.path())),
            Op::Lock(_) if channel.kind == Kind::Sealed => {
                let seals = nix::fcntl::SealFlag::F_SEAL_GROW | nix::fcntl::SealFlag::F_SEAL_SHRINK;
                format!("{:?}", nix::fcntl::fcntl(channel.reader(), nix::fcntl::FcntlArg::F_ADD_SEALS(seals)))
            }
            Op::Lock(_) if channel.is_file() => {
                #[allow(deprecated, reason = "its replacement wants to own the descriptor")]
                let locked =
                    nix::fcntl::flock(channel.reader().as_raw_fd(), nix::fcntl::FlockArg::LockExclusiveNonblock);
                format!("{locked:?}")
            }
            Op::Rename(_) if channel.is_file() => self.channels[which].rename(),
            Op::Grow { bytes, .. } if channel.is_file() => format!("{:?}", channel.grow(u64::from(*bytes))),
            Op::Truncate { .. } if channel.is_file() && self.board.mapped[channel.number].load(SeqCst) == 1 => {
                "was mapped".into()
            }
            Op::Truncate { bytes, .. } if channel.is_file() => format!("{:?}", channel.truncate(u64::from(*bytes))),
            Op::Shut(_) => channel.shut(),
            Op::Terminal(_) if channel.kind == Kind::Pty => raw::control(channel.writer().as_raw_fd()),
            Op::Terminal(_) => "not a terminal".into(),
            Op::LockRange { start, open_file, .. } if channel.is_file() => {
                raw::lock_range(channel.reader().as_raw_fd(), i64::from(*start) * 10, *open_file).to_string()
            }
            Op::Dup(_) => match channel.dup() {
                Ok(dup) => {
                    let said = format!("{} {}", dup.number, dup.describe());
                    self.channels.push(dup);
                    said
                }
                Err(error) => error.to_string(),
            },
            Op::Pass { over, .. } => self.pass(which, *over),
            Op::Fetch(_) => self.fetch(which),
            Op::Watch { epoll, how, .. } => self.watch(which, *epoll, *how),
            Op::Ready(_) => self.ready(which),
            Op::Close(_) => {
                self.channels.remove(which);
                "closed".into()
            }
            _ => "not a file".into(),
        }
    }

    fn put(&self, now: usize, channel: &Channel, bytes: usize) -> String {
        let contents = &self.board.contents[channel.number];
        let inside = contents.load(SeqCst) as usize;
        match channel.kind {
            Kind::Event | Kind::Semaphore => {
                let put = channel.put(&(bytes as u64).to_ne_bytes());
                return format!("{put:?}");
            }
            _ if channel.is_file() => {}
            Kind::Notify => return super::notify::change(channel, bytes),
            Kind::Timer => return raw::arm(channel.reader().as_raw_fd(), bytes as i64).to_string(),
            Kind::Signals | Kind::Epoll | Kind::Post | Kind::PostStream => return "not for that".into(),
            Kind::Queue => {
                let message = pattern(now, bytes % 50);
                return raw::queue(channel.reader().as_raw_fd(), &message, (bytes % 4) as u32).to_string();
            }
            Kind::Pty if inside + bytes > 3_000 => return "full".into(),
            _ if bytes == 0 || (channel.has_messages() && inside > 5) || inside + bytes > 30_000 => {
                return "full".into();
            }
            Kind::Packets | Kind::Udp | Kind::Datagrams => contents.store(inside as u32 + 1, SeqCst),
            _ => contents.store((inside + bytes) as u32, SeqCst),
        }
        let put = channel.put(&pattern(now, bytes));
        // Somebody else may be told of it by an epoll instance.
        self.await_contents(channel);
        format!("{} {put:?}", channel.number)
    }

    fn take(&self, channel: &Channel, bytes: usize) -> String {
        let contents = &self.board.contents[channel.number];
        let inside = contents.load(SeqCst) as usize;
        let (length, left) = match channel.kind {
            Kind::Event | Kind::Semaphore | Kind::Timer => (8, 0),
            _ if channel.is_file() => (bytes, 0),
            Kind::Epoll | Kind::Post | Kind::PostStream | Kind::Notify => return "not for that".into(),
            Kind::Signals => return raw::take_signal(channel.reader().as_raw_fd()),
            Kind::Queue => return raw::unqueue(channel.reader().as_raw_fd()),
            Kind::Packets | Kind::Udp | Kind::Datagrams if inside > 0 => (1 << 16, inside - 1),
            _ if inside > 0 => (bytes.min(inside), inside - bytes.min(inside)),
            _ => return "empty".into(),
        };
        contents.store(left as u32, SeqCst);
        let taken = channel.take(length);
        format!("{} {:?}", channel.number, taken.map(|bytes| (bytes.len(), hash(&bytes))))
    }

    /// One of its channels.
    pub(super) fn channel_at(&self, which: u8) -> Option<&Channel> {
        self.channels.get(usize::from(which).checked_rem(self.channels.len())?)
    }

    /// One of its channels that are such.
    fn such(&self, such: impl Fn(&Channel) -> bool, which: u8) -> Option<&Channel> {
        let all: Vec<&Channel> = self.channels.iter().filter(|channel| such(channel)).collect();
        all.get(usize::from(which).checked_rem(all.len())?).copied()
    }

    fn pass(&self, which: usize, over: u8) -> String {
        let (channel, post) = (&self.channels[which], self.such(Channel::is_post, over));
        let Some(post) = post.filter(|_| is_leaf(channel.kind)) else { return "no post".into() };
        let waiting = &self.board.contents[post.number];
        if waiting.load(SeqCst) > 5 {
            return "full".into();
        }
        waiting.fetch_add(1, SeqCst);
        format!("{} over {} {:?}", channel.number, post.number, channel.send_over(post))
    }

    fn fetch(&mut self, which: usize) -> String {
        let post = &self.channels[which];
        let waiting = &self.board.contents[post.number];
        if !post.is_post() || waiting.load(SeqCst) == 0 {
            return "nothing there".into();
        }
        waiting.fetch_sub(1, SeqCst);
        match Channel::receive_over(post) {
            Ok(channel) => {
                let said = format!("{} {}", channel.number, channel.describe());
                self.channels.push(channel);
                said
            }
            Err(error) => format!("{error}"),
        }
    }

    fn watch(&self, which: usize, epoll: u8, how: u8) -> String {
        let channel = &self.channels[which];
        let Some(epoll) = self.such(|other| other.kind == Kind::Epoll, epoll).filter(|_| is_leaf(channel.kind)) else {
            return "no epoll".into();
        };
        let wanted = masks::WATCHED_FOR.into_iter().enumerate().filter(|(bit, _)| how >> bit & 1 == 1);
        let events = wanted.fold(libc::EPOLLIN, |all, (_, flag)| all | flag);
        let added = raw::watch(epoll.reader().as_raw_fd(), channel.reader().as_raw_fd(), events, channel.number as u64);
        format!("{} by {} {added}", channel.number, epoll.number)
    }

    fn ready(&self, which: usize) -> String {
        let epoll = &self.channels[which];
        if epoll.kind != Kind::Epoll {
            return "not an epoll".into();
        }
        self.channels.iter().for_each(|channel| self.await_contents(channel));
        format!("{:?}", raw::ready(epoll.reader().as_raw_fd()))
    }

    /// What comes by way of a network or a terminal comes in its own time.
    fn await_contents(&self, channel: &Channel) {
        let on_its_way = matches!(channel.kind, Kind::Tcp | Kind::Udp | Kind::Pty);
        if on_its_way && self.board.contents[channel.number].load(SeqCst) > 0 {
            raw::await_event(channel.reader().as_raw_fd(), libc::POLLIN);
        }
    }

    /// Whether it can be read from.
    pub(super) fn is_ready(&self, channel: &Channel) -> bool {
        self.await_contents(channel);
        masks::tells_whether_ready(channel.kind) && raw::is_readable(channel.reader().as_raw_fd())
    }
}
