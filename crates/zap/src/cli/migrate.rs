//! `zap migrate`.

use std::net::TcpStream;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::thread::JoinHandle;
use std::time::Duration;

use clap::builder::{PossibleValue, PossibleValuesParser};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::following::{Following, Interrupts};
use super::{options, print, print_error, usage};
use crate::ids::HostPid;
use crate::migrate::keys::{KeyError, Keys};
use crate::migrate::strategies::{self, PreCopy, Strategy};
use crate::migrate::{Options, Stats, relay};
use crate::monitor::client;
use crate::monitor::protocol::{Failure, Request};
use crate::pod::Store;
use crate::sys::pidfd::PidFd;

/// Move a pod to another host; its connections go on
#[derive(clap::Args)]
#[command(
    after_help = "The command of --via is run by a shell; it must end in `zap receive` on the other host, and carry bytes \
    both ways.\n\nIf the stream breaks in the one moment in which neither side can know who has the pod, the copy here \
    stays held: look at the destination, then say --resolve POD keep (it does not run there) or drop (it \
    does).\n\nCtrl-C ends it, and the pod goes on here, until it is handed over.\n\nWith copy-on-reference the pod needs this host until all of its memory has \
    followed: this command runs until then, and if the stream breaks before, the pod is killed there \
    and held here as it was when it left.\n\nExample:\n  zap migrate web --via \"ssh b zap receive\"\n  zap migrate --resolve web keep"
)]
pub(super) struct Args {
    /// The pod
    #[arg(value_parser = options::pod_name, required_unless_present = "resolve")]
    pod: Option<String>,
    /// A command whose stdin and stdout lead to `zap receive` there
    #[arg(long, value_name = "COMMAND", required_unless_present_any = ["resolve", "to"])]
    via: Option<String>,
    /// Where `zap receive --listen` listens; the hosts know each other by key
    #[arg(long, value_name = "HOST:PORT", conflicts_with = "via")]
    to: Option<String>,
    /// How its memory is moved
    #[arg(long, value_parser = strategy_names(), default_value = PreCopy.name())]
    strategy: String,
    /// For flush: a directory that both hosts see under this name
    #[arg(long, value_name = "DIR")]
    store: Option<PathBuf>,
    /// Where its address cannot be had there, let it be reached at another
    ///
    /// Inside it keeps the address it was born with. Connections with others end without --follow or --forward, those inside go on.
    #[arg(long)]
    any_address: bool,
    /// … and leave a forwarder here, for those connected with its old one
    ///
    /// It is listed by `zap ls --residual` and removed by `zap rm --residual`; it goes when the pod comes back, or another
    /// asks for the address.
    #[arg(long, requires = "any_address")]
    forward: bool,
    /// … and have programs and pods of both hosts follow it that are connected with it
    ///
    /// They reach it at its new address, for as long as they stay connected. `zap ls --residual` lists that, and
    /// `zap rm --residual` ends it.
    #[arg(long, requires = "any_address", conflicts_with = "forward")]
    follow: bool,
    /// … and those of another host, that a command leads to; it must end in `zap follow`. May be repeated
    #[arg(long, value_name = "COMMAND", requires = "follow")]
    tell: Vec<String>,
    /// Take the root's files along that it has open or mapped
    #[arg(long)]
    carry_files: bool,
    /// Print one line of figures in JSON
    #[arg(long)]
    stats: bool,
    /// Decide where a pod lives after a cut
    #[arg(long, num_args = 2, value_names = ["POD", "keep|drop"], conflicts_with_all = ["pod", "via", "to"])]
    resolve: Option<Vec<String>>,
}

fn strategy_names() -> PossibleValuesParser {
    PossibleValuesParser::new(
        strategies::ALL.map(|strategy| PossibleValue::new(strategy.name()).help(strategy.about())),
    )
}

pub(super) fn run(store: &Store, args: Args) -> Result<u8, Failure> {
    if let Some(words) = &args.resolve {
        return resolve(store, words);
    }
    let Some(pod) = args.pod else { return Err(usage("which pod?")) };
    // Reached before there is a second thread: a monitor that has died is replaced by a fork.
    let socket = client::connect(store, &pod)?;
    let monitor = store.load(&pod)?.monitor;
    let failed = |e: std::io::Error| Failure { message: format!("Ctrl-C: {e}"), code: 1 };
    let interrupts = Interrupts::hold_back().map_err(failed)?;
    let following = Following::start(&pod, &socket, interrupts).map_err(failed)?;
    let (way, stream) = match (&args.via, &args.to) {
        (Some(via), _) => connect(via)?,
        (_, Some(to)) => call(store, to)?,
        _ => return Err(usage("where to? --via or --to says it")),
    };
    let (told, streams): (Vec<Child>, Vec<[OwnedFd; 2]>) =
        args.tell.iter().map(|command| start(command)).collect::<Result<Vec<_>, _>>()?.into_iter().unzip();
    let options = Options {
        strategy: args.strategy,
        store: args.store,
        to: args.via.map_or_else(|| args.to.unwrap_or_default(), |via| format!("`{via}`")),
        any_address: args.any_address,
        forward: args.forward,
        follow: args.follow,
        tell: args.tell,
        carry_files: args.carry_files,
        // Also where nobody looks: what Ctrl-C may do depends on it.
        progress: true,
        stream: crate::fault::stream_wanted("source"),
        fault: crate::fault::wanted(),
    };
    let request = Request::Migrate(options);
    let files = stream.into_iter().chain(streams.into_iter().flatten()).collect();
    let mut told_of = |bytes: &[u8]| following.told(bytes);
    let moved = client::ask_with::<_, Stats>((&socket, monitor), &request, files, &mut told_of);
    following.end();
    // The monitor has let go of their streams.
    for mut command in told {
        let _ = command.wait();
    }
    let stats = way.explain(moved)?;
    client::await_end(monitor);
    if let Some(why) = &stats.not_forwarded {
        print_error(&format!("pod {pod} runs there, but no forwarder could be left here: {why}"));
    }
    if args.stats {
        let line = serde_json::to_string(&stats).map_err(|e| Failure { message: e.to_string(), code: 1 })?;
        print(&(line + "\n"))?;
    }
    Ok(0)
}

/// How the other host is reached: it ends when the stream does.
enum Way {
    Command(Child),
    Connection(JoinHandle<std::io::Result<()>>),
}

impl Way {
    /// Why the way failed says more than that the stream broke.
    fn explain(self, moved: Result<Stats, Failure>) -> Result<Stats, Failure> {
        let why = match self {
            // A command that does not see that its stream has ended is not waited for if nothing came of it: Ctrl-C is to end this.
            Way::Command(child) if moved.is_err() && !ends_soon(&child) => None,
            Way::Command(mut child) => match child.wait().ok().and_then(|status| status.code()) {
                Some(code @ (126 | 127)) => Some(format!("the command of --via could not be run (exit {code})")),
                _ => None,
            },
            Way::Connection(relay) => relay.join().ok().and_then(Result::err).map(|error| error.to_string()),
        };
        moved.map_err(|failure| match why {
            Some(why) => Failure { message: format!("{}; {why}", failure.message), ..failure },
            None => failure,
        })
    }
}

/// Whether a command ends within a second, as one does that could not be run.
fn ends_soon(child: &Child) -> bool {
    let Ok(handle) = PidFd::open(HostPid(child.id() as i32)) else { return true };
    poll(&mut [PollFd::new(handle.as_fd(), PollFlags::POLLIN)], PollTimeout::from(1000u16)) != Ok(0)
}

/// How long a host may take to answer a call.
const PATIENCE: Duration = Duration::from_secs(10);

/// Calls a host that listens, and speaks TLS with it.
fn call(store: &Store, to: &str) -> Result<(Way, [OwnedFd; 2]), Failure> {
    let failed = |e: std::io::Error| Failure { message: format!("{to}: {e}"), code: 1 };
    let unusable = |e: KeyError| Failure::of(&e, 1);
    let keys = Keys::of(store).map_err(unusable)?;
    let addresses = std::net::ToSocketAddrs::to_socket_addrs(to).map_err(|e| usage(format!("--to {to}: {e}")))?;
    let mut last = std::io::Error::new(std::io::ErrorKind::NotFound, "it has no address");
    let mut found = None;
    for address in addresses {
        match TcpStream::connect_timeout(&address, PATIENCE) {
            Ok(socket) => {
                found = Some(socket);
                break;
            }
            Err(error) => last = error,
        }
    }
    let socket = found.ok_or(last).map_err(failed)?;
    let name = rustls::pki_types::ServerName::try_from("zap").map_err(|e| failed(std::io::Error::other(e)))?;
    let client = rustls::ClientConnection::new(keys.client().map_err(unusable)?, name);
    let tls = client.map_err(|e| failed(std::io::Error::other(e)))?;
    let (ours, theirs) = relay::pipes().map_err(failed)?;
    let relay = std::thread::spawn(move || relay::carry(tls.into(), socket, ours));
    Ok((Way::Connection(relay), theirs))
}

/// Runs the command that leads to the other host: its stdout and stdin are the stream.
fn connect(via: &str) -> Result<(Way, [OwnedFd; 2]), Failure> {
    start(via).map(|(child, stream)| (Way::Command(child), stream))
}

fn start(via: &str) -> Result<(Child, [OwnedFd; 2]), Failure> {
    let failed = |e: std::io::Error| Failure { message: format!("{via}: {e}"), code: 1 };
    let mut command = std::process::Command::new("/bin/sh");
    let mut child = command.args(["-c", via]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().map_err(failed)?;
    match (child.stdout.take(), child.stdin.take()) {
        (Some(from), Some(to)) => Ok((child, [from.into(), to.into()])),
        _ => Err(failed(std::io::Error::other("it has no pipes"))),
    }
}

fn resolve(store: &Store, words: &[String]) -> Result<u8, Failure> {
    let [pod, word] = words else { return Err(usage("--resolve needs a pod and `keep` or `drop`")) };
    let keep = match word.as_str() {
        "keep" => true,
        "drop" => false,
        other => return Err(usage(format!("--resolve {pod} {other}: the word is `keep` or `drop`"))),
    };
    let monitor = store.load(pod)?.monitor;
    client::ask::<()>(store, pod, &Request::Resolve { keep })?;
    if !keep {
        client::await_end(monitor);
    }
    Ok(0)
}
