//! A console at work: a thread that carries output to the log and to whoever is attached, and input from them.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use serde::{Deserialize, Serialize};

use super::frame::{self, Collector, Kind};
use super::log::Log;
use crate::pod::console::Ends;
use crate::sys::file::set_nonblocking;
use crate::sys::pidfd::PidFd;
use crate::sys::tty::{self, WindowSize};

/// How a session ended, as its clients hear it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum End {
    /// The command ended with this code.
    Exited(i32),
    /// A checkpoint or migration took the pod away.
    TakenAway(String),
}

/// A console with its thread. Copies are the same one.
#[derive(Clone)]
pub struct Session(Arc<Handle>);

struct Handle {
    orders: Mutex<Sender<Order>>,
    wake: Arc<EventFd>,
    ends: Ends,
}

enum Order {
    Attach(UnixStream, bool),
    Target(PidFd),
    Hush(Sender<()>),
    Resume,
    Drain(Sender<()>),
    Say(String),
    End(End, Sender<()>),
}

/// What a session is to do besides carrying bytes.
#[derive(Default)]
pub struct Plan {
    /// Where output is logged.
    pub log: Option<Log>,
    /// Called when stdin has been closed for good.
    pub stdin_closed: Option<Box<dyn FnOnce() + Send>>,
}

/// While it lives, nobody reads the console's output, and nobody writes its input.
pub struct Hush(Option<Session>);

impl Drop for Hush {
    fn drop(&mut self) {
        if let Some(session) = &self.0 {
            session.order(Order::Resume);
        }
    }
}

impl Hush {
    /// The guard of a console that nobody reads anyway.
    pub fn of_nothing() -> Hush {
        Hush(None)
    }
}

impl Session {
    /// Starts the thread of a console.
    pub fn start(ends: Ends, plan: Plan) -> io::Result<Session> {
        let wake = Arc::new(EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?);
        let (sender, orders) = channel();
        // Only the thread may hold stdin's end, or closing it would close nothing.
        let look = ends.without_stdin()?;
        let pump = Pump::new(ends, plan, orders, wake.clone())?;
        std::thread::Builder::new().name("console".to_owned()).spawn(move || pump.run())?;
        Ok(Session(Arc::new(Handle { orders: Mutex::new(sender), wake, ends: look })))
    }

    fn order(&self, order: Order) {
        let orders = self.0.orders.lock().unwrap_or_else(PoisonError::into_inner);
        // Without a receiver the session has ended, and with it all there was to do.
        if orders.send(order).is_ok() {
            let _ = self.0.wake.write(1);
        }
    }

    fn order_and_wait(&self, order: impl FnOnce(Sender<()>) -> Order) {
        let (done, wait) = channel();
        self.order(order(done));
        // An error is a session that ended first.
        let _ = wait.recv();
    }

    /// The far ends, but for the pipe of stdin.
    pub fn ends(&self) -> &Ends {
        &self.0.ends
    }

    /// Shows a client what comes from now on, and takes its input if `input`.
    pub fn attach(&self, client: UnixStream, input: bool) {
        self.order(Order::Attach(client, input));
    }

    /// Sets the size of its window, if it has one.
    pub fn resize(&self, size: WindowSize) {
        if let Ends::Pty { master, .. } = &self.0.ends {
            let _ = tty::resize(master, size);
        }
    }

    /// Whom clients' signals are for.
    pub fn set_target(&self, process: PidFd) {
        self.order(Order::Target(process));
    }

    /// Leaves the console alone until the guard is dropped.
    pub fn hush(&self) -> Hush {
        self.order_and_wait(Order::Hush);
        Hush(Some(self.clone()))
    }

    /// Reads all that is there.
    pub fn drain(&self) {
        self.order_and_wait(Order::Drain);
    }

    /// Adds a line of zap's to what the pod says on stderr.
    pub fn say(&self, line: &str) {
        self.order(Order::Say(line.to_owned()));
    }

    /// Reads all that is there, tells the clients how it ended, and ends the thread.
    pub fn end(&self, end: End) {
        self.order_and_wait(|done| Order::End(end, done));
    }
}

/// A client that has this much to read yet makes the pod wait, as a slow terminal would.
const BACKLOG: usize = 1 << 20;
const CHUNK: usize = 64 << 10;
/// How long a client that does not read may hold up the end of a session.
const LAST_WORDS: Duration = Duration::from_secs(2);

struct Client {
    socket: UnixStream,
    input: bool,
    heard: Collector,
    unsent: VecDeque<u8>,
}

struct Output {
    kind: Kind,
    file: OwnedFd,
    ended: bool,
}

struct Pump {
    outputs: Vec<Output>,
    stdin: Option<OwnedFd>,
    is_tty: bool,
    unwritten: VecDeque<u8>,
    input_ended: bool,
    /// Whether a line of input was begun and not ended.
    mid_line: bool,
    clients: Vec<Client>,
    plan: Plan,
    orders: Receiver<Order>,
    wake: Arc<EventFd>,
    target: Option<PidFd>,
    hushed: usize,
    over: bool,
}

impl Pump {
    fn new(ends: Ends, plan: Plan, orders: Receiver<Order>, wake: Arc<EventFd>) -> io::Result<Pump> {
        let output = |kind, file| Output { kind, file, ended: false };
        let (outputs, stdin, is_tty) = match ends {
            Ends::Pipes { stdin, stdout, stderr, .. } => {
                (vec![output(Kind::Output, stdout), output(Kind::ErrorOutput, stderr)], stdin, false)
            }
            Ends::Pty { master, .. } => (vec![output(Kind::Output, master.try_clone()?)], Some(master), true),
        };
        for file in outputs.iter().map(|o| &o.file).chain(&stdin) {
            set_nonblocking(file)?;
        }
        Ok(Pump {
            outputs,
            stdin,
            is_tty,
            unwritten: VecDeque::new(),
            input_ended: false,
            mid_line: false,
            clients: Vec::new(),
            plan,
            orders,
            wake,
            target: None,
            hushed: 0,
            over: false,
        })
    }

    fn run(mut self) {
        while !self.over {
            match self.turn() {
                Ok(()) => {}
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => tracing::error!("console: {e}"),
            }
        }
    }

    fn turn(&mut self) -> io::Result<()> {
        let slow = self.clients.iter().any(|c| c.unsent.len() > BACKLOG);
        let reading = self.hushed == 0 && !slow;
        let mut fds = vec![PollFd::new(self.wake.as_fd(), PollFlags::POLLIN)];
        for output in &self.outputs {
            let wanted = if reading && !output.ended { PollFlags::POLLIN } else { PollFlags::empty() };
            // An ended or unread output would report its hang-up over and over.
            fds.push(PollFd::new(if wanted.is_empty() { self.wake.as_fd() } else { output.file.as_fd() }, wanted));
        }
        let writing = self.hushed == 0 && !self.unwritten.is_empty();
        match &self.stdin {
            Some(stdin) if writing => fds.push(PollFd::new(stdin.as_fd(), PollFlags::POLLOUT)),
            _ => fds.push(PollFd::new(self.wake.as_fd(), PollFlags::empty())),
        }
        for client in &self.clients {
            let send = if client.unsent.is_empty() { PollFlags::empty() } else { PollFlags::POLLOUT };
            let hear = if self.unwritten.len() > BACKLOG { PollFlags::empty() } else { PollFlags::POLLIN };
            fds.push(PollFd::new(client.socket.as_fd(), hear | send));
        }
        poll(&mut fds, PollTimeout::NONE)?;
        let ready: Vec<PollFlags> = fds.iter().map(|f| f.revents().unwrap_or(PollFlags::empty())).collect();
        drop(fds);

        let count = self.outputs.len();
        for index in 0..count {
            if !ready[1 + index].is_empty() {
                self.carry_output(index);
            }
        }
        if !ready[1 + count].is_empty() {
            self.write_input();
        }
        let mut alive = ready[2 + count..].iter().map(|flags| (*flags, true)).collect::<Vec<_>>();
        for (index, (flags, keep)) in alive.iter_mut().enumerate() {
            *keep = flags.is_empty() || self.serve(index, *flags);
        }
        let mut keeps = alive.iter().map(|(_, keep)| *keep);
        self.clients.retain(|_| keeps.next().unwrap_or(true));
        self.close_input_if_done();
        if !ready[0].is_empty() {
            let _ = self.wake.read();
            self.obey()?;
        }
        Ok(())
    }

    fn obey(&mut self) -> io::Result<()> {
        while let Ok(order) = self.orders.try_recv() {
            match order {
                Order::Attach(socket, input) => {
                    socket.set_nonblocking(true)?;
                    self.clients.push(Client { socket, input, heard: Collector::default(), unsent: VecDeque::new() });
                }
                Order::Target(process) => self.target = Some(process),
                Order::Hush(done) => {
                    self.hushed += 1;
                    drop(done);
                }
                Order::Resume => self.hushed = self.hushed.saturating_sub(1),
                Order::Drain(done) => {
                    self.drain();
                    drop(done);
                }
                Order::Say(line) => self.spread(Kind::ErrorOutput, line.as_bytes()),
                Order::End(end, done) => {
                    self.drain();
                    self.say_goodbye(&end);
                    self.over = true;
                    drop(done);
                }
            }
        }
        Ok(())
    }

    /// Reads one piece of an output; how long it was, 0 when there is nothing.
    fn carry_output(&mut self, index: usize) -> usize {
        let output = &mut self.outputs[index];
        let kind = output.kind;
        if let (Some(log), false) = (&mut self.plan.log, self.is_tty) {
            match log.take(kind, &output.file, CHUNK) {
                Ok(0) => {}
                Ok(length) => {
                    if !self.clients.is_empty() {
                        let bytes = log.moved(length).unwrap_or_default();
                        self.show(kind, &bytes);
                    }
                    return length;
                }
                Err(error) => tracing::warn!("the log takes no more: {error}"),
            }
        }
        let mut buffer = [0; CHUNK];
        let length = match nix::unistd::read(&output.file, &mut buffer) {
            Err(Errno::EAGAIN | Errno::EINTR) => return 0,
            // EIO: a terminal that was hung up, because its session's leader ended.
            Ok(0) | Err(_) => {
                output.ended = true;
                return 0;
            }
            Ok(length) => length,
        };
        self.spread(kind, &buffer[..length]);
        length
    }

    /// Into the log, and to whoever is attached.
    fn spread(&mut self, kind: Kind, bytes: &[u8]) {
        if let Some(log) = &mut self.plan.log {
            log.add(kind, bytes);
        }
        self.show(kind, bytes);
    }

    fn show(&mut self, kind: Kind, bytes: &[u8]) {
        let bytes = frame::encode(kind, bytes);
        for client in &mut self.clients {
            client.unsent.extend(&bytes);
        }
    }

    /// Reads what is there. Somebody may be writing all the while, and without end: no more is read than there can have been.
    fn drain(&mut self) {
        for index in 0..self.outputs.len() {
            let mut left = held_by(&self.outputs[index].file);
            while left > 0 && !self.outputs[index].ended {
                match self.carry_output(index) {
                    0 => break,
                    length => left = left.saturating_sub(length),
                }
            }
        }
    }

    fn write_input(&mut self) {
        let Some(stdin) = &self.stdin else { return };
        let (front, _) = self.unwritten.as_slices();
        match nix::unistd::write(stdin, front) {
            Ok(length) => drop(self.unwritten.drain(..length)),
            Err(Errno::EAGAIN | Errno::EINTR) => {}
            // Nobody reads it any more.
            Err(_) => self.unwritten.clear(),
        }
    }

    fn close_input_if_done(&mut self) {
        let done = self.input_ended && self.unwritten.is_empty() && !self.is_tty && self.stdin.take().is_some();
        if let (true, Some(closed)) = (done, self.plan.stdin_closed.take_if(|_| done)) {
            closed();
        }
    }

    /// Hears and answers a client; false when it has gone.
    fn serve(&mut self, index: usize, ready: PollFlags) -> bool {
        if ready.contains(PollFlags::POLLOUT) && !flush(&mut self.clients[index]) {
            return false;
        }
        if !ready.intersects(PollFlags::POLLIN | PollFlags::POLLHUP | PollFlags::POLLERR) {
            return true;
        }
        let mut buffer = [0; CHUNK];
        let client = &mut self.clients[index];
        match client.socket.read(&mut buffer) {
            Ok(0) => return false,
            Ok(length) => client.heard.add(&buffer[..length]),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return true,
            Err(_) => return false,
        }
        loop {
            match self.clients[index].heard.take() {
                Ok(Some((kind, payload))) => self.hear(index, kind, &payload),
                Ok(None) => return true,
                Err(_) => return false,
            }
        }
    }

    fn hear(&mut self, index: usize, kind: Kind, payload: &[u8]) {
        let may_write = self.clients[index].input && !self.input_ended && self.stdin.is_some();
        match kind {
            Kind::Input if may_write => {
                self.unwritten.extend(payload);
                self.mid_line = payload.last().is_some_and(|b| *b != b'\n');
            }
            Kind::InputEnd if may_write => self.end_input(),
            Kind::Resize => {
                if let [a, b, c, d] = *payload {
                    let size = WindowSize { rows: u16::from_le_bytes([a, b]), columns: u16::from_le_bytes([c, d]) };
                    if self.is_tty {
                        let _ = tty::resize(&self.outputs[0].file, size);
                    }
                }
            }
            Kind::Signal => {
                if let (Ok(bytes), Some(target)) = (payload.try_into(), &self.target) {
                    let _ = target.signal(i32::from_le_bytes(bytes));
                }
            }
            _ => {}
        }
    }

    /// A pipe is closed; a terminal has its end-of-file character typed into it.
    fn end_input(&mut self) {
        if !self.is_tty {
            self.input_ended = true;
            return;
        }
        let eof = match nix::sys::termios::tcgetattr(&self.outputs[0].file) {
            Ok(settings) => settings.control_chars[libc::VEOF],
            Err(_) => 4,
        };
        if std::mem::take(&mut self.mid_line) {
            // The first one only ends the line that was begun.
            self.unwritten.push_back(eof);
        }
        self.unwritten.push_back(eof);
    }

    fn say_goodbye(&mut self, end: &End) {
        let words = serde_json::to_vec(end).expect("an end is plain data");
        let bytes = frame::encode(Kind::End, &words);
        for client in &mut self.clients {
            client.unsent.extend(&bytes);
            let _ = client.socket.set_nonblocking(false);
            let _ = client.socket.set_write_timeout(Some(LAST_WORDS));
            let unsent = std::mem::take(&mut client.unsent);
            let (front, back) = unsent.as_slices();
            // A client that is gone, or does not listen, has itself to blame.
            let _ = client.socket.write_all(front).and_then(|()| client.socket.write_all(back));
        }
        self.clients.clear();
    }
}

/// How many bytes an output can have to read: the size of a pipe, and of a terminal more than the kernel lets it have.
fn held_by(output: &OwnedFd) -> usize {
    const TERMINAL: usize = 1 << 20;
    fcntl(output, FcntlArg::F_GETPIPE_SZ).map_or(TERMINAL, |size| size.max(0) as usize)
}

/// Sends what is unsent, as far as it goes; false when the client has gone.
fn flush(client: &mut Client) -> bool {
    let (front, _) = client.unsent.as_slices();
    match client.socket.write(front) {
        Ok(length) => drop(client.unsent.drain(..length)),
        Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
        Err(_) => return false,
    }
    true
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    /// A command has ended, and what it has left in the background writes on.
    #[test]
    fn whoever_writes_without_end_does_not_keep_a_session_from_ending() {
        let (ends, [_stdin, stdout, _stderr]) = Ends::pipes(false).unwrap();
        let session = Session::start(ends, Plan::default()).unwrap();
        let writer = std::thread::spawn(move || while nix::unistd::write(&stdout, &[b'y'; 4096]).is_ok() {});
        let (ours, theirs) = UnixStream::pair().unwrap();
        session.attach(theirs, false);
        let begun = Instant::now();
        session.drain();
        session.end(End::Exited(0));
        assert!(begun.elapsed() < 30 * LAST_WORDS, "{:?}", begun.elapsed());
        drop((ours, session));
        writer.join().unwrap();
    }
}
