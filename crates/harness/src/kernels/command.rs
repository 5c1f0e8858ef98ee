//! A command server, for a guest whose only neighbours are ours: whoever connects says what to run, and is its terminal.
//!
//! First come the words of the command, as JSON behind their length (`u32`, little-endian); then what is for its stdin, to
//! the end of the stream. Back come frames `kind: u8 · length: u32 · payload`: what it says, what it complains about, and
//! its exit code last.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::{Mutex, mpsc};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

/// The port that guests listen at.
pub const PORT: u16 = 7777;

const STDOUT: u8 = 1;
const STDERR: u8 = 2;
const EXIT: u8 = 3;
/// Longer is no command.
const LONGEST: u32 = 1 << 20;
/// How long to wait for what a command that has ended said last: a process that it left behind may have its pipes.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// Serves everybody who connects, for ever.
pub fn serve(listener: &TcpListener) -> Result<()> {
    loop {
        let (stream, _) = listener.accept().context("waiting for a connection")?;
        std::thread::spawn(move || {
            if let Err(error) = serve_one(&stream) {
                eprintln!("command server: {error:#}");
            }
            let _ = stream.shutdown(Shutdown::Both);
        });
    }
}

fn serve_one(stream: &TcpStream) -> Result<()> {
    stream.set_nodelay(true)?;
    let mut length = [0; 4];
    (&*stream).read_exact(&mut length).context("reading a command")?;
    let length = u32::from_le_bytes(length);
    ensure!(length <= LONGEST, "{length} bytes are no command");
    let mut words = vec![0; length as usize];
    (&*stream).read_exact(&mut words).context("reading a command")?;
    let words: Vec<String> = serde_json::from_slice(&words).context("understanding a command")?;
    let back = Mutex::new(stream);
    let code = match run(&words, stream, &back) {
        Ok(status) => status.code().unwrap_or_else(|| 128 + signal_of(status)),
        Err(error) => {
            frame(&back, STDERR, format!("{error:#}\n").as_bytes())?;
            127
        }
    };
    frame(&back, EXIT, &code.to_le_bytes())
}

fn signal_of(status: ExitStatus) -> i32 {
    std::os::unix::process::ExitStatusExt::signal(&status).unwrap_or_default()
}

fn frame(back: &Mutex<&TcpStream>, kind: u8, payload: &[u8]) -> Result<()> {
    let mut bytes = vec![kind];
    bytes.extend_from_slice(&(payload.len() as u32).to_le_bytes());
    bytes.extend_from_slice(payload);
    let mut to = *back.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    to.write_all(&bytes).context("answering")
}

fn run(words: &[String], stream: &TcpStream, back: &Mutex<&TcpStream>) -> Result<ExitStatus> {
    let [program, arguments @ ..] = words else { bail!("which command?") };
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().with_context(|| format!("starting {program}"))?;
    let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    let from = stream.try_clone().context("sharing the connection")?;
    // Not waited for: it ends with the connection.
    std::thread::spawn(move || stdin.map(|to| pass_on(&from, to)));
    let (done, ended) = mpsc::channel();
    let said = [(STDOUT, stdout.map(boxed)), (STDERR, stderr.map(boxed))];
    let back = back.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).try_clone()?;
    let back = std::sync::Arc::new(Mutex::new(back));
    for (kind, pipe) in said {
        let (back, done) = (back.clone(), done.clone());
        std::thread::spawn(move || {
            let _ = pipe.map(|pipe| carry(kind, pipe, &back));
            let _ = done.send(());
        });
    }
    let status = child.wait().context("waiting for a command")?;
    for _ in 0..2 {
        let _ = ended.recv_timeout(LAST_WORDS);
    }
    // Whoever has more to say is cut off by the last frame.
    let _last = back.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    Ok(status)
}

fn boxed(pipe: impl Read + Send + 'static) -> Box<dyn Read + Send> {
    Box::new(pipe)
}

fn carry(kind: u8, mut from: Box<dyn Read + Send>, back: &Mutex<TcpStream>) -> Result<()> {
    let mut piece = vec![0; 64 << 10];
    loop {
        let length = from.read(&mut piece)?;
        if length == 0 {
            return Ok(());
        }
        let to = back.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        frame(&Mutex::new(&to), kind, &piece[..length])?;
    }
}

/// Asks for a command to be run, and gives the connection.
pub fn ask(stream: &TcpStream, words: &[&str]) -> Result<()> {
    let words = serde_json::to_vec(words).context("writing a command")?;
    let mut bytes = (words.len() as u32).to_le_bytes().to_vec();
    bytes.extend(words);
    (&*stream).write_all(&bytes).context("asking for a command")
}

/// Hands what a command says to `stdout` and `stderr` until it ends; its exit code.
pub fn follow(stream: &TcpStream, mut stdout: impl Write, mut stderr: impl Write) -> Result<i32> {
    let mut payload = Vec::new();
    loop {
        let mut head = [0; 5];
        (&*stream).read_exact(&mut head).context("the guest has nothing more to say")?;
        let [kind, a, b, c, d] = head;
        payload.resize(u32::from_le_bytes([a, b, c, d]) as usize, 0);
        (&*stream).read_exact(&mut payload).context("the guest stopped in the middle of a word")?;
        match kind {
            STDOUT => stdout.write_all(&payload).and_then(|()| stdout.flush())?,
            STDERR => stderr.write_all(&payload)?,
            EXIT => return Ok(i32::from_le_bytes(*payload.first_chunk().context("an exit code")?)),
            other => bail!("the guest said something of kind {other}"),
        }
    }
}

/// Runs a command over there with this process's stdin, stdout and stderr; its exit code.
pub fn call(address: SocketAddr, words: &[&str]) -> Result<i32> {
    let stream = TcpStream::connect(address).with_context(|| format!("calling {address}"))?;
    stream.set_nodelay(true)?;
    ask(&stream, words)?;
    let to = stream.try_clone()?;
    // Not waited for: it may wait for input that does not come.
    std::thread::spawn(move || pass_stdin_on(&to));
    follow(&stream, std::io::stdout(), std::io::stderr())
}

/// Carries stdin to an address, and what comes back to stdout.
pub fn pipe(address: SocketAddr) -> Result<()> {
    let stream = TcpStream::connect(address).with_context(|| format!("calling {address}"))?;
    stream.set_nodelay(true)?;
    let to = stream.try_clone()?;
    std::thread::spawn(move || pass_stdin_on(&to));
    pass_on(&stream, std::io::stdout()).context("handing on what came back")
}

fn pass_stdin_on(to: &TcpStream) {
    let _ = pass_on(std::io::stdin().lock(), to);
    let _ = to.shutdown(Shutdown::Write);
}

/// Passes on what comes, to its end. Not by [`std::io::copy`], which splices: a splice that waits for a socket holds the lock
/// of the pipe, and whoever would read what is in there already waits, too.
fn pass_on(mut from: impl Read, mut to: impl Write) -> std::io::Result<()> {
    let mut piece = vec![0; 64 << 10];
    loop {
        match from.read(&mut piece)? {
            0 => return Ok(()),
            length => to.write_all(&piece[..length]).and_then(|()| to.flush())?,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ran(words: &[&str], input: &[u8]) -> (i32, Vec<u8>, Vec<u8>) {
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let address = listener.local_addr().unwrap();
        std::thread::spawn(move || serve(&listener));
        let stream = TcpStream::connect(address).unwrap();
        ask(&stream, words).unwrap();
        (&stream).write_all(input).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        let code = follow(&stream, &mut stdout, &mut stderr).unwrap();
        (code, stdout, stderr)
    }

    #[test]
    fn a_command_hears_and_is_heard() {
        let (code, stdout, stderr) = ran(&["sh", "-c", "cat; echo no >&2; exit 7"], b"yes");
        assert_eq!((code, &stdout[..], &stderr[..]), (7, &b"yes"[..], &b"no\n"[..]));
    }

    #[test]
    fn what_cannot_be_run_says_so() {
        let (code, _, stderr) = ran(&["/no/such/program"], b"");
        assert!(code == 127 && String::from_utf8_lossy(&stderr).contains("/no/such/program"));
        assert_eq!(ran(&["sh", "-c", "kill -9 $$"], b"").0, 137);
    }
}
