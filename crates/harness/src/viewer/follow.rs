//! One viewer: a connection, a thread that follows the screen, and the hands of a person.

use std::io::{self, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::keys;
use super::picture::{Picture, Region};
use super::wire::{self, FromServer, Rectangle};
use crate::client::Gaps;
use crate::lab::{Netns, PATIENCE};

/// The connection broke, or the server sent what it must not.
#[derive(Clone, Debug, thiserror::Error)]
#[error("the viewer's connection: {0}")]
pub struct ViewerError(String);

/// What the following thread has seen.
#[derive(Debug, Default)]
struct Seen {
    picture: Picture,
    /// Updates so far.
    updates: u64,
    /// Of them, those that brought the whole screen.
    whole: u64,
    /// Since when someone wants to know when updates come, and when they came.
    times: Option<Vec<Instant>>,
    /// The last text that was selected or cut on the desktop.
    text: Option<String>,
    error: Option<ViewerError>,
}

#[derive(Debug)]
struct Shared {
    seen: Mutex<Seen>,
    changed: Condvar,
    /// Both the follower and the hands write.
    out: Mutex<TcpStream>,
}

/// See the [module](super).
#[derive(Debug)]
pub struct Viewer {
    shared: Arc<Shared>,
    stream: TcpStream,
    follower: Option<JoinHandle<()>>,
    name: String,
}

impl Viewer {
    /// Connects from the network namespace `from`; returns once the whole screen has been seen.
    pub fn connect(from: &Netns, to: SocketAddr) -> Result<Self> {
        let connect = || -> io::Result<TcpStream> {
            let stream = TcpStream::connect_timeout(&to, PATIENCE)?;
            stream.set_nodelay(true)?;
            stream.set_read_timeout(Some(PATIENCE))?;
            Ok(stream)
        };
        let mut stream = from.enter(connect)?.with_context(|| format!("connecting to the desktop at {to}"))?;
        let (size, name) = wire::shake_hands(&mut stream).context("greeting the desktop")?;
        // Nothing need ever move on a screen: a read may wait for ever, it is those who look that lose patience.
        stream.set_read_timeout(None)?;
        let seen = Seen { picture: Picture::new(size), ..Seen::default() };
        let out = stream.try_clone().context("sharing the connection")?;
        let shared = Arc::new(Shared { seen: Mutex::new(seen), changed: Condvar::new(), out: Mutex::new(out) });
        let follower = {
            let (shared, stream) = (Arc::clone(&shared), stream.try_clone().context("sharing the connection")?);
            std::thread::spawn(move || shared.follow(stream))
        };
        let viewer = Self { shared, stream, follower: Some(follower), name };
        viewer.refresh()?;
        Ok(viewer)
    }

    /// The name of the desktop.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Our end of the connection.
    pub fn local_address(&self) -> Result<SocketAddr> {
        self.stream.local_addr().context("the viewer's own address")
    }

    /// What has been seen last.
    pub fn picture(&self) -> Picture {
        self.shared.seen().picture.clone()
    }

    /// Asks for the whole screen and gives it: not what we remember but what the desktop has.
    pub fn refresh(&self) -> Result<Picture> {
        let (before, size) = {
            let seen = self.shared.seen();
            (seen.whole, (seen.picture.width, seen.picture.height))
        };
        self.send(&wire::request(size, true))?;
        self.wait("the whole screen", |seen| (seen.whole > before).then(|| seen.picture.clone()))
    }

    /// Waits until something more is drawn.
    pub fn await_update(&self) -> Result<()> {
        let before = self.shared.seen().updates;
        self.wait("an update of the screen", |seen| (seen.updates > before).then_some(()))
    }

    /// Waits for the first update after `moment`, which is after [`watch`](Self::watch), and says when it came.
    pub fn await_update_after(&self, moment: Instant) -> Result<Instant> {
        let times = |seen: &Seen| seen.times.as_ref()?.iter().find(|time| **time > moment).copied();
        self.wait("an update of the screen", times)
    }

    /// Waits until `check` says what it sees in a picture.
    pub fn await_picture<T>(&self, what: &str, mut check: impl FnMut(&Picture) -> Option<T>) -> Result<T> {
        self.wait(what, |seen| check(&seen.picture))
    }

    /// Waits until nothing outside `moving` has changed for `calm`; gives the whole screen as the desktop has it.
    pub fn settled(&self, moving: &[Region], calm: Duration) -> Result<Picture> {
        let deadline = Instant::now() + PATIENCE;
        let mut last = self.refresh()?;
        loop {
            std::thread::sleep(calm);
            let now = self.refresh()?;
            match now.difference(&last, moving) {
                None => return Ok(now),
                Some(region) if Instant::now() > deadline => bail!("the screen is restless at {region:?}"),
                Some(_) => last = now,
            }
        }
    }

    /// Notes from now on when updates come.
    pub fn watch(&self) {
        self.shared.seen().times = Some(vec![Instant::now()]);
    }

    /// How long the screen stood still since [`watch`](Self::watch), which is where its times begin.
    pub fn watched(&self) -> Result<Gaps> {
        let times = self.shared.seen().times.take().unwrap_or_default();
        let timeline = times.windows(2).map(|pair| (pair[1] - times[0], pair[1] - pair[0])).collect();
        Gaps::of(timeline).context("nothing moved on the screen")
    }

    /// Types a text.
    pub fn type_text(&self, text: &str) -> Result<()> {
        text.chars().try_for_each(|character| {
            let key = keys::of(character);
            match keys::is_shifted(character) {
                true => self.press(&[keys::SHIFT, key]),
                false => self.press(&[key]),
            }
        })
    }

    /// Presses keys one after the other, then lets them go, the last first: `[CONTROL, of('z')]` is Ctrl-Z.
    pub fn press(&self, symbols: &[u32]) -> Result<()> {
        let down = symbols.iter().map(|symbol| wire::key(*symbol, true));
        let up = symbols.iter().rev().map(|symbol| wire::key(*symbol, false));
        self.send(&down.chain(up).flatten().collect::<Vec<u8>>())
    }

    /// Clicks with a button (1: left, 2: middle, 3: right).
    pub fn click(&self, at: (u16, u16), button: u8) -> Result<()> {
        self.mouse(at, None)?;
        self.mouse(at, Some(button))?;
        self.mouse(at, None)
    }

    /// Clicks twice with the left button, in one message: a desktop that has to wait between two takes them for two clicks.
    pub fn click_twice(&self, at: (u16, u16)) -> Result<()> {
        let steps = [None, Some(1), None, Some(1), None];
        self.send(&steps.map(|button| pointer(at, button)).concat())
    }

    /// Moves the mouse, with a button down or none.
    pub fn mouse(&self, at: (u16, u16), button: Option<u8>) -> Result<()> {
        self.send(&pointer(at, button))
    }

    /// Puts a text of ours into the desktop's clipboard.
    pub fn cut(&self, text: &str) -> Result<()> {
        self.send(&wire::cut(text))
    }

    /// Waits for a text to be selected on the desktop that satisfies `wanted`.
    pub fn await_text(&self, what: &str, wanted: impl Fn(&str) -> bool) -> Result<String> {
        self.wait(what, |seen| seen.text.clone().filter(|text| wanted(text)))
    }

    fn send(&self, message: &[u8]) -> Result<()> {
        self.shared.send(message).map_err(|error| match &self.shared.seen().error {
            Some(known) => known.clone().into(),
            None => anyhow::Error::new(error).context("writing to the desktop"),
        })
    }

    fn wait<T>(&self, what: &str, mut check: impl FnMut(&Seen) -> Option<T>) -> Result<T> {
        let deadline = Instant::now() + PATIENCE;
        let mut seen = self.shared.seen();
        loop {
            if let Some(value) = check(&seen) {
                return Ok(value);
            }
            if let Some(error) = &seen.error {
                return Err(anyhow::Error::new(error.clone()).context(format!("while waiting for {what}")));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            ensure!(!left.is_zero(), "waited {} s for {what}", PATIENCE.as_secs());
            seen = self.shared.changed.wait_timeout(seen, left).unwrap_or_else(|poisoned| poisoned.into_inner()).0;
        }
    }
}

impl Drop for Viewer {
    fn drop(&mut self) {
        let _ = self.stream.shutdown(std::net::Shutdown::Both);
        if let Some(follower) = self.follower.take() {
            let _ = follower.join();
        }
    }
}

impl Shared {
    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn send(&self, message: &[u8]) -> io::Result<()> {
        self.out.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).write_all(message)
    }

    fn follow(&self, stream: TcpStream) {
        let mut from = BufReader::with_capacity(1 << 18, stream);
        if let Err(error) = self.take_messages(&mut from) {
            self.seen().error = Some(ViewerError(error.to_string()));
            self.changed.notify_all();
        }
    }

    fn take_messages(&self, from: &mut impl Read) -> io::Result<()> {
        loop {
            match wire::next(from)? {
                FromServer::Update(count) => self.take_update(from, count)?,
                FromServer::Text(text) => {
                    self.seen().text = Some(text.into_iter().map(char::from).collect());
                    self.changed.notify_all();
                }
                FromServer::Other => {}
            }
        }
    }

    /// Takes an update and asks for the next. The picture changes at once, so that nobody sees half an update.
    fn take_update(&self, from: &mut impl Read, count: u16) -> io::Result<()> {
        let mut pieces = Vec::new();
        for _ in 0..count {
            let head = wire::rectangle(from)?;
            let bytes = match head.encoding {
                wire::RAW => usize::from(head.width) * usize::from(head.height) * 4,
                wire::COPY => 4,
                wire::DESKTOP_SIZE => 0,
                other => return Err(io::Error::other(format!("a rectangle in encoding {other}"))),
            };
            let mut content = vec![0; bytes];
            from.read_exact(&mut content)?;
            pieces.push((head, content));
        }
        let size = {
            let mut seen = self.seen();
            let mut drawn = 0;
            for (head, content) in &pieces {
                drawn += draw(&mut seen.picture, *head, content)?;
            }
            seen.updates += 1;
            seen.whole += u64::from(drawn >= seen.picture.pixels.len());
            if let Some(times) = &mut seen.times {
                times.push(Instant::now());
            }
            (seen.picture.width, seen.picture.height)
        };
        self.changed.notify_all();
        self.send(&wire::request(size, false))
    }
}

/// The mouse is there, with a button down or none.
fn pointer(at: (u16, u16), button: Option<u8>) -> [u8; 6] {
    wire::pointer(at, button.map_or(0, |button| 1 << (button - 1)))
}

/// Draws a rectangle; gives the number of pixels.
fn draw(picture: &mut Picture, head: Rectangle, content: &[u8]) -> io::Result<usize> {
    let outside = || io::Error::other(format!("a rectangle outside the screen: {head:?}"));
    match head.encoding {
        wire::RAW => {
            let rows = content.chunks_exact((usize::from(head.width) * 4).max(1));
            for (y, row) in (head.y..).zip(rows) {
                let pixels = picture.row_mut(head.x, y, head.width).ok_or_else(outside)?;
                for (pixel, bytes) in pixels.iter_mut().zip(row.chunks_exact(4)) {
                    *pixel = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], 0]);
                }
            }
        }
        wire::COPY => {
            let mut source = content;
            let region = Region::new(wire::word(&mut source)?, wire::word(&mut source)?, head.width, head.height);
            let part = picture.part(region);
            for (y, row) in (head.y..).zip(part.pixels.chunks_exact(usize::from(head.width).max(1))) {
                picture.row_mut(head.x, y, head.width).ok_or_else(outside)?.copy_from_slice(row);
            }
        }
        _ => *picture = Picture::new((head.width, head.height)),
    }
    Ok(match head.encoding {
        wire::RAW => usize::from(head.width) * usize::from(head.height),
        _ => 0,
    })
}
