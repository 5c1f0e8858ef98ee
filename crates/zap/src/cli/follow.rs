//! `zap follow`.

use crate::migrate::followers;
use crate::monitor::protocol::Failure;
use crate::pod::Store;

/// Follow a pod that another host moves: the other side of migrate --tell
#[derive(clap::Args)]
#[command(
    after_help = "The stream is stdin and stdout. Programs and pods of this host that are connected with the pod reach it at \
    the address that it gets, under the one that they know, for as long as they stay connected; new connections \
    are not translated. `zap ls --residual` lists whom this host follows, and `zap rm --residual` ends it.\n\nExample, \
    on the host where the pod is:\n  zap migrate web --via \"ssh b zap receive\" --any-address --follow --tell \"ssh c zap \
    follow\""
)]
pub(super) struct Args {}

pub(super) fn run(store: &Store, Args {}: &Args) -> Result<u8, Failure> {
    followers::serve(store, std::io::stdin(), std::io::stdout()).map(|()| 0)
}
