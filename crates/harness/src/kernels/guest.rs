//! A virtual machine: booted, given commands, ended.

use std::fs::File;
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use super::fetch::Unavailable;
use super::init::{CONTROL, ROOT};
use super::{Kernel, command, initramfs};
use crate::lab::{Netns, built_beside, wait_for};

/// What a guest may take to boot, and a command in it, on a machine that has other things to do.
const BOOT: Duration = Duration::from_secs(300);
const COMMAND: Duration = Duration::from_secs(600);

/// Where Debian has the other half of virtiofs: with QEMU itself (12), or in a package of its own.
const VIRTIOFSD: [&str; 2] = ["/usr/lib/qemu/virtiofsd", "/usr/libexec/virtiofsd"];

/// What a guest is made of.
#[derive(Clone, Copy, Debug)]
pub struct Machine<'a> {
    /// Its processor, as QEMU names it.
    pub processor: &'a str,
    /// Its memory, in MiB.
    pub memory: u32,
}

impl Machine<'_> {
    /// All that QEMU can emulate. Without what would have the kernel copy byte by byte (ERMS), and without five-level page
    /// tables.
    pub const ORDINARY: Machine<'static> = Machine { processor: "max,la57=off,erms=off,fsrm=off", memory: 512 };
}

/// A virtual machine that runs. Dropped, it is gone.
#[derive(Debug)]
pub struct Guest {
    netns: Arc<Netns>,
    number: u8,
    address: SocketAddr,
    directory: PathBuf,
    emulator: Child,
    /// As long as it is open the emulator lives: it ends with us, however we end.
    life: Option<ChildStdin>,
    files: Child,
}

impl Guest {
    /// Boots a kernel, reached from within `netns` only. It has an interface `eth1` there, the other end of which is a port of
    /// the bridge `bridge`.
    ///
    /// # Errors
    ///
    /// [`Unavailable`] where there is no emulator; anything else is a defect.
    pub fn boot(kernel: &Kernel, machine: Machine<'_>, netns: Arc<Netns>, bridge: &str) -> Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(1);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        ensure!(number < 250, "too many guests");
        let daemon = VIRTIOFSD.iter().find(|path| Path::new(path).exists());
        let daemon = daemon.ok_or_else(|| super::Unavailable::of("there is no virtiofsd"))?;
        let directory = PathBuf::from(format!("/run/zap-guest-{}-{number}", std::process::id()));
        std::fs::create_dir(&directory).with_context(|| format!("making {}", directory.display()))?;
        let made = Making { directory: &directory, netns: &netns, number };
        let mut files = made.share_files(daemon)?;
        let started = made.start(kernel, machine, bridge);
        let mut emulator = match started {
            Ok(emulator) => emulator,
            Err(error) => {
                end(&mut files);
                let _ = std::fs::remove_dir_all(&directory);
                return Err(error);
            }
        };
        let life = emulator.stdin.take();
        let address = SocketAddr::from((made.address(2), command::PORT));
        let mut guest = Self { netns, number: number as u8, address, directory, emulator, life, files };
        guest.await_boot()?;
        Ok(guest)
    }

    fn await_boot(&mut self) -> Result<()> {
        let (emulator, address, netns) = (&mut self.emulator, self.address, &self.netns);
        let answers = wait_for("a guest to boot", BOOT, || {
            if let Some(status) = emulator.try_wait()? {
                bail!("the emulator ended with {status}");
            }
            let connect = || TcpStream::connect_timeout(&address, Duration::from_secs(5));
            Ok(netns.enter(connect)??)
        });
        answers.map(drop).with_context(|| format!("its console:\n{}", self.console()))
    }

    /// What its kernel has printed.
    pub fn console(&self) -> String {
        let bytes = std::fs::read(self.directory.join("console")).unwrap_or_default();
        let said = std::fs::read(self.directory.join("emulator")).unwrap_or_default();
        String::from_utf8_lossy(&[bytes, said].concat()).into_owned()
    }

    /// The namespace that reaches it.
    pub(super) fn netns(&self) -> &Netns {
        &self.netns
    }

    /// The address at which the guest reaches that namespace.
    pub(super) fn neighbour(&self) -> Ipv4Addr {
        Ipv4Addr::new(10, 77, self.number, 1)
    }

    /// The words of a command, for a shell on the host, that runs what follows in the guest.
    pub fn way_in(&self) -> Result<String> {
        let program = built_beside("kernel-guest")?;
        Ok(format!("{} {} call {}", self.netns.way_in(), program.display(), self.address))
    }

    /// Runs a command in the guest to its end: its exit code, what it said, and what it complained about.
    pub fn output(&self, words: &[&str]) -> Result<(i32, String, String)> {
        let address = self.address;
        let stream = self.netns.enter(|| TcpStream::connect(address))?.context("calling the guest")?;
        stream.set_read_timeout(Some(COMMAND))?;
        command::ask(&stream, words)?;
        stream.shutdown(std::net::Shutdown::Write)?;
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        let code = command::follow(&stream, &mut stdout, &mut stderr).with_context(|| words.join(" "))?;
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        Ok((code, text(stdout), text(stderr)))
    }

    /// Runs a command in the guest; what it said. Anything but exit code 0 is an error.
    pub fn run(&self, words: &[&str]) -> Result<String> {
        let (code, stdout, stderr) = self.output(words)?;
        ensure!(code == 0, "in the guest, {} ended with {code}: {}{}", words.join(" "), stdout, stderr.trim());
        Ok(stdout)
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // Whoever waits at the other end of the pipe ends the emulator, and itself.
        drop(self.life.take());
        let _ = self.emulator.wait();
        end(&mut self.files);
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

fn end(child: &mut Child) {
    let _ = child.kill();
    let _ = child.wait();
}

/// A guest that is being made.
struct Making<'a> {
    directory: &'a Path,
    netns: &'a Netns,
    number: u32,
}

impl Making<'_> {
    /// Of the network that is there to give the guest commands.
    fn address(&self, end: u8) -> Ipv4Addr {
        Ipv4Addr::new(10, 77, self.number as u8, end)
    }

    /// Starts what shows the guest the host's root, without what is mounted on it but for the build.
    fn share_files(&self, daemon: &str) -> Result<Child> {
        let root = self.directory.join("root");
        std::fs::create_dir(&root)?;
        let mut script = String::from("mount --bind / \"$1\"\n");
        for apart in mounts_apart()? {
            let path = apart.display();
            script += &format!("mount --bind '{path}' \"$1{path}\"\n");
        }
        script += "exec \"$2\" --socket-path=\"$3\" -o source=\"$1\",cache=always,sandbox=chroot,no_writeback\n";
        let mut command = Command::new("unshare");
        command
            .args(["--mount", "sh", "-e", "-c", &script, "sh"])
            .arg(&root)
            .arg(daemon)
            .arg(self.directory.join("files"));
        let log = File::create(self.directory.join("files.log"))?;
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let child = command.spawn().context("starting virtiofsd")?;
        wait_for("virtiofsd to listen", BOOT, || {
            let log = || std::fs::read_to_string(self.directory.join("files.log")).unwrap_or_default();
            ensure!(self.directory.join("files").exists(), "it has said {:?}", log());
            Ok(())
        })?;
        Ok(child)
    }

    /// Starts the emulator.
    fn start(&self, kernel: &Kernel, machine: Machine<'_>, bridge: &str) -> Result<Child> {
        let (control, pods) = (format!("ctl{}", self.number), format!("vm{}", self.number));
        self.netns.ip(&[
            &format!("tuntap add {control} mode tap"),
            &format!("address add {}/24 dev {control}", self.address(1)),
            &format!("link set {control} up"),
            &format!("tuntap add {pods} mode tap"),
            &format!("link set {pods} master {bridge}"),
            &format!("link set {pods} up"),
        ])?;
        let archive = self.directory.join("initramfs");
        std::fs::write(&archive, initramfs::archive(&built_beside("kernel-guest")?, &kernel.modules()?)?)?;
        let memory = machine.memory;
        let at = |name: &str| self.directory.join(name).display().to_string();
        let (image, processor) = (kernel.image().display().to_string(), machine.processor.to_owned());
        let card = |id: &str, tap: &str, last: u8| {
            let mac = format!("52:54:00:77:{:02x}:{last:02x}", self.number);
            let net = format!("tap,id={id},ifname={tap},script=no,downscript=no");
            let device = format!("virtio-net-pci,netdev={id},mac={mac},romfile=");
            ["-netdev".into(), net, "-device".into(), device]
        };
        let arguments: Vec<String> = [
            "-machine q35,accel=tcg -smp 1 -nodefaults -no-reboot -display none"
                .split(' ')
                .map(str::to_owned)
                .collect(),
            vec!["-cpu".into(), processor, "-m".into(), format!("{memory}")],
            vec!["-serial".into(), format!("file:{}", at("console"))],
            vec!["-kernel".into(), image, "-initrd".into(), at("initramfs"), "-append".into(), self.arguments()],
            vec!["-object".into(), format!("memory-backend-memfd,id=mem,size={memory}M,share=on")],
            vec!["-numa".into(), "node,memdev=mem".into()],
            vec!["-chardev".into(), format!("socket,id=files,path={}", at("files"))],
            vec!["-device".into(), format!("vhost-user-fs-pci,chardev=files,tag={ROOT}")],
            card("control", &control, 2).into(),
            card("pods", &pods, 3).into(),
        ]
        .concat();
        // Ended when nobody holds its stdin any more.
        let script = "qemu-system-x86_64 \"$@\" </dev/null & read -r _; kill -KILL $!; wait";
        let mut command = Command::new("sh");
        command.args(["-c", script, "sh"]).args(arguments).stdin(Stdio::piped());
        let log = File::create(self.directory.join("emulator"))?;
        self.netns.spawn(command.stdout(log.try_clone()?).stderr(log))
    }

    /// What the kernel is told.
    fn arguments(&self) -> String {
        let control = format!("{CONTROL}{}/24", self.address(2));
        let quick = "tsc=reliable no_timer_check mitigations=off random.trust_cpu=1 panic=-1";
        format!("console=ttyS0 quiet net.ifnames=0 {quick} {control}")
    }
}

/// Directories that the guest needs of those that are mounted on the root: where the build is, and its like.
fn mounts_apart() -> Result<Vec<PathBuf>> {
    let device = |path: &Path| std::fs::metadata(path).map(|found| found.dev());
    let root = device(Path::new("/"))?;
    let this = std::env::current_exe().context("finding this program's own path")?;
    let build = this.parent().map(Path::to_owned).unwrap_or_default();
    let wanted = [PathBuf::from("/usr"), build];
    Ok(wanted.into_iter().filter(|path| device(path).is_ok_and(|found| found != root)).collect())
}

impl Unavailable {
    pub(super) fn of(what: &str) -> Self {
        Self(what.to_owned())
    }
}
