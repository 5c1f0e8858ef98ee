//! `zap migrate`.

use std::os::fd::OwnedFd;
use std::process::{Child, Stdio};

use super::{options, print, usage};
use crate::migrate::{Options, Stats, Strategy};
use crate::monitor::client;
use crate::monitor::protocol::{Failure, Request};
use crate::pod::Store;

/// Move a pod to another host; its connections go on
#[derive(clap::Args)]
#[command(
    after_help = "The command of --via is run by a shell; it must end in `zap receive` on the other host, and carry bytes \
    both ways.\n\nIf the stream breaks in the one moment in which neither side can know who has the pod, the copy here \
    stays held: look at the destination, then say --resolve POD keep (it does not run there) or drop (it \
    does).\n\nExample:\n  zap migrate web --via \"ssh b zap receive\"\n  zap migrate --resolve web keep"
)]
pub(super) struct Args {
    /// The pod
    #[arg(value_parser = options::pod_name, required_unless_present = "resolve")]
    pod: Option<String>,
    /// A command whose stdin and stdout lead to `zap receive` there
    #[arg(long, value_name = "COMMAND", required_unless_present = "resolve")]
    via: Option<String>,
    /// How its memory is moved
    #[arg(long, value_enum, default_value = "pre-copy")]
    strategy: Strategies,
    /// Take the root's files along that it has open or mapped
    #[arg(long)]
    carry_files: bool,
    /// Print one line of figures in JSON
    #[arg(long)]
    stats: bool,
    /// Decide where a pod lives after a cut
    #[arg(long, num_args = 2, value_names = ["POD", "keep|drop"], conflicts_with_all = ["pod", "via"])]
    resolve: Option<Vec<String>>,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum Strategies {
    StopAndCopy,
    PreCopy,
}

impl From<Strategies> for Strategy {
    fn from(strategy: Strategies) -> Strategy {
        match strategy {
            Strategies::StopAndCopy => Strategy::StopAndCopy,
            Strategies::PreCopy => Strategy::PreCopy,
        }
    }
}

pub(super) fn run(store: &Store, args: Args) -> Result<u8, Failure> {
    if let Some(words) = &args.resolve {
        return resolve(store, words);
    }
    let (Some(pod), Some(via)) = (args.pod, args.via) else { return Err(usage("which pod, and where to?")) };
    let monitor = store.load(&pod)?.monitor;
    let options = Options {
        strategy: args.strategy.into(),
        to: format!("`{via}`"),
        carry_files: args.carry_files,
        cut_before: crate::fault::cut_wanted("source"),
        fault: crate::fault::wanted(),
    };
    let (mut child, stream) = connect(&via)?;
    let moved = client::ask_with::<Stats>(store, &pod, &Request::Migrate(options), stream);
    // It ends when its stream does.
    let ended = child.wait();
    let stats = moved.map_err(|failure| explain(failure, ended.ok()))?;
    client::await_end(monitor);
    if args.stats {
        let line = serde_json::to_string(&stats).map_err(|e| Failure { message: e.to_string(), code: 1 })?;
        print(&(line + "\n"))?;
    }
    Ok(0)
}

/// Runs the command that leads to the other host: its stdout and stdin are the stream.
fn connect(via: &str) -> Result<(Child, [OwnedFd; 2]), Failure> {
    let failed = |e: std::io::Error| Failure { message: format!("{via}: {e}"), code: 1 };
    let mut command = std::process::Command::new("/bin/sh");
    let mut child = command.args(["-c", via]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().map_err(failed)?;
    match (child.stdout.take(), child.stdin.take()) {
        (Some(from), Some(to)) => Ok((child, [from.into(), to.into()])),
        _ => Err(failed(std::io::Error::other("it has no pipes"))),
    }
}

/// A command that could not be run says more than that the stream broke.
fn explain(failure: Failure, ended: Option<std::process::ExitStatus>) -> Failure {
    match ended.and_then(|status| status.code()) {
        Some(code @ (126 | 127)) => {
            let message = format!("{}; the command of --via could not be run (exit {code})", failure.message);
            Failure { message, ..failure }
        }
        _ => failure,
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
