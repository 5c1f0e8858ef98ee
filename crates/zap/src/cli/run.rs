//! `zap run`.

use std::path::PathBuf;

use crate::cli::options;
use crate::monitor::client;
use crate::monitor::protocol::{Born, Failure, Start, Watch};
use crate::pod::{Bind, Limits, NetworkMode, PodSpec, Publish, Seccomp, Store, capabilities};

use super::{console, or_125, print, usage};

/// Make a pod and run COMMAND in it
#[derive(clap::Args)]
#[command(
    after_help = "Example:\n  zap run --rm -it -- bash\n  zap run -d --name web -p 8080:80 -- apache2ctl -D FOREGROUND\n\n\
    Ctrl-P Ctrl-Q leaves a pod with a terminal running by itself."
)]
pub(super) struct Args {
    /// Name of the pod [default: a fresh readable one]
    #[arg(short, long, value_parser = options::pod_name)]
    name: Option<String>,
    /// Leave it running, and print its name
    #[arg(short, long)]
    detach: bool,
    /// Keep stdin open
    #[arg(short, long)]
    interactive: bool,
    /// Give it a terminal
    #[arg(short, long)]
    tty: bool,
    /// Its root file system, under a private overlay
    #[arg(long, value_name = "DIR", default_value = "/")]
    root: PathBuf,
    /// An external directory or file
    #[arg(long, value_name = "SRC[:DST][:ro]", value_parser = options::bind)]
    bind: Vec<Bind>,
    /// How it is connected
    #[arg(long, value_enum, default_value = "bridge")]
    net: Net,
    /// Its address on the bridge [default: the next free one]
    #[arg(long, value_name = "ADDR[/LEN]", value_parser = options::address)]
    ip: Option<(std::net::Ipv4Addr, Option<u8>)>,
    /// Its MAC address [default: made of its address]
    #[arg(long, value_parser = options::mac)]
    mac: Option<Mac>,
    /// A port of the host that leads into it
    #[arg(short, long, value_name = "[ADDR:]HOSTPORT:PODPORT[/udp]", value_parser = options::publish)]
    publish: Vec<Publish>,
    /// Its host name [default: its name]
    #[arg(long)]
    hostname: Option<String>,
    /// User of COMMAND, by name or number, as the pod's files know it
    #[arg(short, long, value_name = "USER[:GROUP]")]
    user: Option<String>,
    /// Working directory of COMMAND [default: /]
    #[arg(short, long, value_name = "DIR")]
    workdir: Option<PathBuf>,
    /// Environment of COMMAND; a KEY alone takes the caller's value
    #[arg(short, long, value_name = "KEY[=VALUE]")]
    env: Vec<String>,
    /// Memory that it may use, such as 512m
    #[arg(long, value_name = "SIZE", value_parser = options::size)]
    memory: Option<u64>,
    /// CPUs that it may use, such as 1.5
    #[arg(long, value_name = "N", value_parser = options::cpus)]
    cpus: Option<u64>,
    /// Processes and threads that it may have
    #[arg(long, value_name = "N")]
    pids: Option<u64>,
    /// A capability more, or all
    #[arg(long, value_name = "CAP")]
    cap_add: Vec<String>,
    /// A capability less, or all
    #[arg(long, value_name = "CAP")]
    cap_drop: Vec<String>,
    /// System call filter: default, unconfined, or a file in JSON
    #[arg(long, value_name = "PROFILE", default_value = "default")]
    seccomp: String,
    /// Remove it when its command ends
    #[arg(long)]
    rm: bool,
    /// The command and its arguments
    #[arg(required = true, trailing_var_arg = true, value_name = "COMMAND")]
    command: Vec<String>,
}

type Mac = [u8; 6];

#[derive(Clone, Copy, clap::ValueEnum)]
enum Net {
    /// A link to the host's bridge, with an address of its own
    Bridge,
    /// Loopback only
    Private,
    /// The host's own network; such a pod's sockets cannot be moved
    Host,
}

pub(super) fn run(store: &Store, args: Args) -> Result<u8, Failure> {
    let (detach, tty, interactive) = (args.detach, args.tty, args.interactive);
    let (address, mac) = (args.ip, args.mac);
    let named = args.name.is_some();
    let mut spec = spec(store, args)?;
    let watch = Watch { attached: !detach, window: if tty { console::window() } else { None } };
    let fault = crate::fault::wanted();
    let (born, socket) = loop {
        let (on, what, fault) = (store.clone(), Box::new(spec.clone()), fault.clone());
        let start = Start::Run { store: on, spec: what, address, mac, watch, fault };
        match client::launch::<Born>(&start) {
            // Somebody else took the fresh name in the meantime.
            Err(failure)
                if !named && failure.code == 6 && failure.message.contains(&format!("name {} ", spec.name)) =>
            {
                let fresh = fresh_name(store);
                spec.hostname = if spec.hostname == spec.name { fresh.clone() } else { spec.hostname };
                spec.name = fresh;
            }
            other => break other.map_err(or_125)?,
        }
    };
    if detach {
        print(&format!("{}\n", born.name))?;
        return Ok(0);
    }
    let code = console::watch(socket, tty, interactive)?;
    if spec.remove {
        client::await_end(born.monitor);
    }
    Ok(code)
}

fn spec(store: &Store, args: Args) -> Result<PodSpec, Failure> {
    let root = std::fs::canonicalize(&args.root).map_err(|e| usage(format!("--root {}: {e}", args.root.display())))?;
    if !root.is_dir() {
        return Err(usage(format!("--root {}: not a directory", root.display())));
    }
    let workdir = args.workdir.unwrap_or_else(|| "/".into());
    if !workdir.is_absolute() {
        return Err(usage(format!("--workdir {}: not an absolute path", workdir.display())));
    }
    let seccomp = match args.seccomp.as_str() {
        "default" => Seccomp::Default,
        "unconfined" => Seccomp::Unconfined,
        file => Seccomp::Profile(std::fs::read_to_string(file).map_err(|e| usage(format!("--seccomp {file}: {e}")))?),
    };
    let capabilities = capabilities::resolve(&args.cap_add, &args.cap_drop).map_err(|e| usage(e.to_string()))?;
    crate::pod::seccomp::filter(&seccomp, &capabilities).map_err(|e| usage(e.to_string()))?;
    let name = args.name.unwrap_or_else(|| fresh_name(store));
    Ok(PodSpec {
        hostname: args.hostname.unwrap_or_else(|| name.clone()),
        name,
        root,
        binds: args.bind,
        network: match args.net {
            Net::Bridge => NetworkMode::Bridge,
            Net::Private => NetworkMode::Private,
            Net::Host => NetworkMode::Host,
        },
        address: None,
        publish: args.publish,
        command: args.command,
        environment: options::environment(&args.env),
        user: args.user,
        workdir,
        tty: args.tty,
        interactive: args.interactive,
        limits: Limits { memory: args.memory, cpus: args.cpus, pids: args.pids },
        capabilities,
        seccomp,
        remove: args.rm,
    })
}

/// A readable name that no pod has.
fn fresh_name(store: &Store) -> String {
    const QUALITIES: [&str; 24] = [
        "amber", "bold", "brisk", "calm", "clear", "deep", "eager", "fair", "fleet", "fond", "glad", "grand", "keen",
        "kind", "light", "lively", "merry", "mild", "neat", "proud", "quick", "quiet", "sunny", "swift",
    ];
    const THINGS: [&str; 24] = [
        "ash", "bay", "beech", "brook", "cedar", "cliff", "cove", "creek", "dale", "dune", "elm", "fern", "field",
        "ford", "glen", "grove", "heath", "hill", "lake", "marsh", "oak", "pine", "reef", "vale",
    ];
    let pick = |list: &[&str]| list[rand::random_range(0..list.len())].to_owned();
    store.free_name(&format!("{}-{}", pick(&QUALITIES), pick(&THINGS)))
}
