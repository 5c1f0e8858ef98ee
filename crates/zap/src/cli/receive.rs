//! `zap receive`.

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;

use super::print_error;
use crate::migrate::destination::Options;
use crate::migrate::keys::Keys;
use crate::migrate::relay;
use crate::monitor::client;
use crate::monitor::protocol::{Born, Failure, Start};
use crate::pod::Store;

/// Take a pod that is moved here: the other side of migrate
#[derive(clap::Args)]
#[command(
    after_help = "Without --listen the stream is stdin and stdout, and one pod is taken.\n\nExample, on the host where the \
    pod is:\n  zap migrate web --via \"ssh b zap receive\"\nor, here:\n  zap keys --add KEY-OF-THE-OTHER-HOST\n  zap receive \
    --listen 0.0.0.0:7411"
)]
pub(super) struct Args {
    /// Listen for hosts whose keys are known, until interrupted
    #[arg(long, value_name = "ADDR:PORT")]
    listen: Option<SocketAddr>,
}

pub(super) fn run(store: &Store, args: &Args) -> Result<u8, Failure> {
    match args.listen {
        Some(address) => listen(store, address),
        None => receive(store),
    }
}

fn receive(store: &Store) -> Result<u8, Failure> {
    let failed = |e: std::io::Error| Failure { message: format!("the stream: {e}"), code: 1 };
    let from = std::io::stdin().as_fd().try_clone_to_owned().map_err(failed)?;
    let to = std::io::stdout().as_fd().try_clone_to_owned().map_err(failed)?;
    let options = Options { fault: crate::fault::wanted(), stream: crate::fault::stream_wanted("destination") };
    let start = Start::Receive { store: store.clone(), options };
    let (born, _) = client::launch_with::<Born>(&start, [from, to])?;
    // stdout belongs to the stream
    print_error(&format!("pod {} runs here now", born.name));
    Ok(0)
}

/// Takes whatever comes, each pod by a `zap receive` of its own.
fn listen(store: &Store, address: SocketAddr) -> Result<u8, Failure> {
    let failed = |e: std::io::Error| Failure { message: format!("--listen {address}: {e}"), code: 1 };
    let keys = Keys::of(store).map_err(|e| Failure::of(&e, 1))?;
    let listener = TcpListener::bind(address).map_err(failed)?;
    let bound = listener.local_addr().map_err(failed)?;
    print_error(&format!("listening at {bound}; the key of this host is {}", keys.own()));
    for socket in listener.incoming().flatten() {
        // Read anew for each: hosts are made known while we listen.
        let server = keys.server().map_err(|e| Failure::of(&e, 1))?;
        let state = (*store != Store::new(None)).then(|| store.state().to_owned());
        std::thread::spawn(move || {
            let from = socket.peer_addr().map_or_else(|_| "?".to_owned(), |peer| peer.to_string());
            if let Err(error) = take(socket, server, state) {
                print_error(&format!("{from}: {error}"));
            }
        });
    }
    Ok(0)
}

fn take(socket: TcpStream, server: Arc<rustls::ServerConfig>, state: Option<PathBuf>) -> std::io::Result<()> {
    let mut tls = rustls::ServerConnection::new(server).map_err(std::io::Error::other)?;
    let mut stream = &socket;
    // Nothing is started for somebody who is not known.
    while tls.is_handshaking() {
        tls.complete_io(&mut stream)?;
    }
    let mut command = Command::new("/proc/self/exe");
    command.envs(state.map(|state| ("ZAP_STATE", state)));
    let mut child = command.arg("receive").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    let (Some(from), Some(to)) = (child.stdout.take(), child.stdin.take()) else { return Ok(()) };
    let carried = relay::carry(tls.into(), socket, [from.into(), to.into()]);
    child.wait()?;
    carried
}
