//! `zap restart`.

use std::net::IpAddr;
use std::path::PathBuf;

use super::{console, options, or_125, print, usage};
use crate::monitor::client;
use crate::monitor::protocol::{Born, Failure, Start, Watch};
use crate::pod::{Bind, Publish, Store};
use crate::restart::Options;

/// Start a pod again from an image
#[derive(clap::Args)]
#[command(
    after_help = "An image can be restarted many times, also beside its original: the name and the outer address are \
    the image's own if they are free, else fresh ones. Inside, the pod keeps the address that it was born with.\n\n\
    Example:\n  zap restart web.zap -d --name web2"
)]
pub(super) struct Args {
    /// The image
    image: PathBuf,
    /// Leave it running, and print its name
    #[arg(short, long)]
    detach: bool,
    /// Name of the pod [default: the image's own if free]
    #[arg(short, long, value_parser = options::pod_name)]
    name: Option<String>,
    /// Its outer address [default: the image's own if free]
    #[arg(long, value_name = "ADDR", value_parser = options::any_address)]
    ip: Option<IpAddr>,
    /// A port of the host that leads into it, in place of the image's
    #[arg(short, long, value_name = "[ADDR:]HOSTPORT:PODPORT[/udp]", value_parser = options::publish)]
    publish: Vec<Publish>,
    /// An external directory or file, in place of the image's
    #[arg(long, value_name = "SRC[:DST][:ro]", value_parser = options::bind)]
    bind: Vec<Bind>,
    /// Its root file system, in place of the image's
    #[arg(long, value_name = "DIR")]
    root: Option<PathBuf>,
    /// Print one line of figures in JSON; needs --detach
    #[arg(long, requires = "detach")]
    stats: bool,
}

pub(super) fn run(store: &Store, args: Args) -> Result<u8, Failure> {
    let image = std::path::absolute(&args.image).map_err(|e| usage(format!("{}: {e}", args.image.display())))?;
    let root = args.root.map(|r| std::fs::canonicalize(&r).map_err(|e| usage(format!("--root {}: {e}", r.display()))));
    let options = Options {
        image,
        name: args.name,
        former: None,
        trail: None,
        address: args.ip,
        publish: (!args.publish.is_empty()).then_some(args.publish),
        binds: args.bind,
        root: root.transpose()?,
        fault: crate::fault::wanted(),
    };
    let watch = Watch { attached: !args.detach, window: console::window() };
    let start = Start::Restart { store: store.clone(), options: options.into(), watch };
    let (born, socket) = client::launch::<Born>(&start).map_err(or_125)?;
    if !args.detach {
        let (tty, input) = store.load(&born.name).map_or((false, false), |r| (r.spec.tty, r.spec.interactive));
        return console::watch(socket, tty, input);
    }
    print(&format!("{}\n", born.name))?;
    if args.stats {
        let line = serde_json::to_string(&born.stats).map_err(|e| Failure { message: e.to_string(), code: 1 })?;
        print(&(line + "\n"))?;
    }
    Ok(0)
}
