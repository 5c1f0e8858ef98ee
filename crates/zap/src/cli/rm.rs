//! `zap rm`.

use super::{options, print_error};
use crate::monitor::client;
use crate::monitor::protocol::{Failure, Request};
use crate::pod::host_config::HostConfig;
use crate::pod::network::follow::{self, Here};
use crate::pod::network::forwarder;
use crate::pod::{PodError, PodState, Store};
use crate::sys::pidfd::PidFd;

/// Remove pods and all that is theirs
#[derive(clap::Args)]
#[command(
    after_help = "With --residual the pods are such as have moved away, and what is removed is the forwarders that \
    were left here for them, and what has this host follow them (zap ls --residual). Connections with the address that \
    they had end then."
)]
pub(super) struct Args {
    /// End those that run
    #[arg(short, long)]
    force: bool,
    /// Remove what forwards to pods that have moved away, or follows them
    #[arg(long, conflicts_with = "force")]
    residual: bool,
    /// The pods
    #[arg(required = true, value_parser = options::pod_name)]
    pods: Vec<String>,
}

pub(super) fn run(store: &Store, args: &Args) -> Result<u8, Failure> {
    // One that cannot be removed does not keep the others.
    let one = |pod: &String| if args.residual { remove_residual(store, pod) } else { remove(store, pod, args.force) };
    let removed = args.pods.iter().map(one);
    let mut failures: Vec<Failure> = removed.filter_map(Result::err).collect();
    // Nobody may be left who was connected with a pod elsewhere.
    let _ = follow::tidy(store);
    let Some(last) = failures.pop() else { return Ok(0) };
    failures.iter().for_each(|failure| print_error(&failure.message));
    let code = failures.first().map_or(last.code, |first| first.code);
    Err(Failure { code, ..last })
}

fn remove_residual(store: &Store, name: &str) -> Result<(), Failure> {
    let config = HostConfig::load(store.state()).map_err(|e| Failure::of(&e, 1))?;
    let forwarded = forwarder::remove_forwarders(&config, name);
    let followed = Here::of(store).and_then(|here| here.forget(name));
    match forwarded.and_then(|forwarded| Ok(forwarded | followed?)) {
        Ok(true) => Ok(()),
        Ok(false) => Err(Failure { message: format!("nothing here forwards to a pod {name}, or follows it"), code: 6 }),
        Err(error) => Err(Failure::of(&error, error.exit_code())),
    }
}

fn remove(store: &Store, name: &str, force: bool) -> Result<(), Failure> {
    let mut record = store.load(name)?;
    if record.state != PodState::Stopped && !record.init.is_some_and(|init| init.lives()) {
        // It ended without a monitor to see it; whatever is left of it is tidied first.
        client::revive(store, name)?;
        match store.load(name) {
            Ok(fresh) => record = fresh,
            Err(PodError::Unknown(_)) => return Ok(()),
            Err(e) => return Err(e.into()),
        }
    }
    if record.state == PodState::Stopped {
        // A monitor may still be waiting for a slow client to read the end.
        if let Some(monitor) = record.monitor.filter(|m| m.lives()) {
            let _ = PidFd::open(monitor.pid).and_then(|p| p.signal(libc::SIGKILL));
            client::await_end(record.monitor);
        }
        return Ok(store.forget(name)?);
    }
    if !force {
        let state = if record.state == PodState::Suspended { "suspended" } else { "running" };
        let hint = "; end it first, or use --force";
        return Err(PodError::State { pod: name.to_owned(), state: state.to_owned(), hint }.into());
    }
    let removed = client::ask::<()>(store, name, &Request::Remove);
    if removed.is_ok() {
        client::await_end(record.monitor);
    }
    // It may have been ending by itself just then, and is remembered as stopped.
    match store.load(name) {
        Ok(left) if left.state == PodState::Stopped && left.created == record.created => remove(store, name, false),
        Ok(_) => removed.map(drop),
        Err(PodError::Unknown(_)) => Ok(()),
        Err(e) => Err(e.into()),
    }
}
