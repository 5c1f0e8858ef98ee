//! Hosts that follow a pod which moves to another address: each is told by a command that ends in `zap follow` there, as the
//! destination is by one that ends in `zap receive`.
//!
//! | source | | follower |
//! | --- | --- | --- |
//! | | ← | `zap/follow1`: it can |
//! | `POD FROM TO`, once the pod is rebuilt there, held | → | follows |
//! | | ← | `ok`, or `no` and why: the source's copy goes on |
//! | `keep`, when the pod is given up here | → | goes on following when this ends |
//! | `back`, if the pod goes on here after all | → | follows it no more, as it does if this ends before `keep` |
//!
//! All are lines. The commands are started, and have greeted, before the pod is held: while it is, each line takes as long as its way.

use std::fs::File;
use std::io::{self, BufRead, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::monitor::protocol::Failure;
use crate::pod::Store;
use crate::pod::network::follow::{Here, Moved, can_follow};

const GREETING: &str = "zap/follow1";
const OK: &str = "ok";
const NO: &str = "no ";
const KEEP: &str = "keep";
const BACK: &str = "back";
/// How long a command may take to reach its host …
const REACHING: Duration = Duration::from_secs(30);
/// … and how long a pod is held for one.
const ANSWERING: Duration = Duration::from_secs(10);
/// No line is longer.
const LONGEST: usize = 4096;

/// Such hosts.
#[derive(Default)]
pub struct Followers(Vec<Follower>);

/// One of them.
struct Follower {
    command: String,
    from: File,
    to: File,
}

impl Followers {
    /// Those that these commands lead to, each by the files that its stdout and stdin are the other ends of.
    pub fn new(commands: &[String], files: Vec<OwnedFd>) -> Followers {
        let mut files = files.into_iter().map(File::from);
        let with_files = |command: &String| {
            let (from, to) = (files.next()?, files.next()?);
            Some(Follower { command: command.clone(), from, to })
        };
        Followers(commands.iter().filter_map(with_files).collect())
    }

    /// Waits until all are there.
    pub fn await_all(&mut self) -> io::Result<()> {
        self.each(|follower| match follower.hear(REACHING)?.as_str() {
            GREETING => Ok(()),
            other => Err(unexpected(other)),
        })
    }

    /// Has all of them follow the pod; when this returns they do.
    pub fn follow(&mut self, moved: &Moved) -> io::Result<()> {
        self.say(&moved.to_string())?;
        self.each(|follower| match follower.hear(ANSWERING)?.as_str() {
            OK => Ok(()),
            other => Err(other.strip_prefix(NO).map_or_else(|| unexpected(other), io::Error::other)),
        })
    }

    /// The pod is given up here: they do so from now on.
    pub fn keep(&mut self) -> io::Result<()> {
        self.say(KEEP)
    }

    /// The pod goes on here. Who cannot be told finds out by itself, if it was not told to keep on.
    pub fn go_back(&mut self) {
        let _ = self.say(BACK);
    }

    fn say(&mut self, line: &str) -> io::Result<()> {
        self.each(|follower| follower.to.write_all(format!("{line}\n").as_bytes()))
    }

    fn each(&mut self, act: impl Fn(&mut Follower) -> io::Result<()>) -> io::Result<()> {
        let named = |follower: &mut Follower| {
            act(follower).map_err(|error| io::Error::new(error.kind(), format!("`{}`: {error}", follower.command)))
        };
        // All are told, whatever comes of one.
        let all: Vec<_> = self.0.iter_mut().map(named).collect();
        all.into_iter().collect()
    }
}

fn unexpected(said: &str) -> io::Error {
    io::Error::other(format!("it is no `zap follow`: it says {said:?}"))
}

impl Follower {
    /// One line.
    fn hear(&mut self, limit: Duration) -> io::Result<String> {
        let limit = PollTimeout::try_from(limit).unwrap_or(PollTimeout::MAX);
        let (mut line, mut byte) = (Vec::new(), [0]);
        while line.len() < LONGEST {
            match poll(&mut [PollFd::new(self.from.as_fd(), PollFlags::POLLIN)], limit) {
                Err(nix::errno::Errno::EINTR) => continue,
                Ok(0) => return Err(io::Error::new(io::ErrorKind::TimedOut, "it is silent")),
                other => other?,
            };
            match (self.from.read(&mut byte)?, byte) {
                (0, _) => return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "it has ended")),
                (_, [b'\n']) => return Ok(String::from_utf8_lossy(&line).into_owned()),
                (_, [other]) => line.push(other),
            }
        }
        Err(unexpected("too much"))
    }
}

/// The follower's side.
pub fn serve(store: &Store, from: impl Read, mut to: impl Write) -> Result<(), Failure> {
    let failed = |e: io::Error| Failure { message: format!("the stream from the source: {e}"), code: 1 };
    can_follow().map_err(|error| Failure::of(&error, error.exit_code()))?;
    let mut lines = io::BufReader::new(from.take(4 * LONGEST as u64)).lines();
    let mut hear = || lines.next().transpose().map_err(failed);
    let mut say = |line: &str| writeln!(to, "{line}").and_then(|()| to.flush()).map_err(failed);
    say(GREETING)?;
    let Some(line) = hear()? else { return Ok(()) };
    let moved: Moved = line.parse().map_err(|message| Failure { message, code: 2 })?;
    let follow = |moved: &Moved| {
        let followed = Here::of(store).and_then(|here| here.follow(moved));
        followed.map_err(|error| Failure::of(&error, error.exit_code()))
    };
    if let Err(failure) = follow(&moved) {
        say(&format!("{NO}{failure}"))?;
        return Err(failure);
    }
    // Who has been cut off by then has not been told to keep on either.
    let is_kept = say(OK).is_ok() && hear().is_ok_and(|line| line.as_deref() == Some(KEEP));
    let goes_on = is_kept && hear().map_or(true, |line| line.as_deref() != Some(BACK));
    if goes_on { Ok(()) } else { follow(&moved.back()) }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    fn one(says: &str) -> (Followers, UnixStream) {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(says.as_bytes()).unwrap();
        let files = vec![ours.try_clone().unwrap().into(), ours.into()];
        (Followers::new(&["ssh c zap follow".to_owned()], files), theirs)
    }

    #[test]
    fn a_host_is_told_and_answers() {
        let moved = Moved { pod: "web".into(), from: [198, 18, 0, 2].into(), to: [198, 19, 0, 2].into() };
        let (mut followers, theirs) = one("zap/follow1\nok\n");
        followers.await_all().unwrap();
        followers.follow(&moved).unwrap();
        followers.keep().unwrap();
        drop(followers);
        let said: Vec<String> = io::BufReader::new(theirs).lines().map(Result::unwrap).collect();
        assert_eq!(said, ["web 198.18.0.2 198.19.0.2", "keep"]);
        assert_eq!(said[0].parse(), Ok(moved));
    }

    #[test]
    fn why_a_host_does_not_follow_is_told() {
        let moved: Moved = "web 198.18.0.2 198.19.0.2".parse().unwrap();
        let (mut followers, _theirs) = one("zap/follow1\nno this host lacks a way to 198.19.0.2\n");
        followers.await_all().unwrap();
        let why = followers.follow(&moved).unwrap_err().to_string();
        assert_eq!(why, "`ssh c zap follow`: this host lacks a way to 198.19.0.2");
        let (mut followers, theirs) = one("hello\n");
        assert!(followers.await_all().unwrap_err().to_string().contains("it is no `zap follow`"));
        drop(theirs);
        assert!(followers.follow(&moved).is_err());
    }
}
