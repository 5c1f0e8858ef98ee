//! What is taken from a kernel's packages: the kernel, uncompressed, and the modules that a guest needs.

use std::collections::HashMap;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

/// Those that a guest needs which is a host of pods; a kernel may have some of them built in.
const MODULES: &[&str] = &[
    "virtio_pci",
    "virtiofs",
    "virtio_net",
    "overlay",
    "bridge",
    "veth",
    "tun",
    "nf_tables",
    "nft_chain_nat",
    "nft_nat",
    "nft_ct",
    "nft_masq",
    "nft_redir",
    "nft_reject",
    "nft_reject_inet",
    "nft_reject_bridge",
    "nft_meta_bridge",
    "nft_fwd_netdev",
    "nft_dup_netdev",
    "nft_limit",
    "nft_hash",
    "nft_numgen",
    "inet_diag",
    "tcp_diag",
    "udp_diag",
    "raw_diag",
    "unix_diag",
    "af_packet_diag",
    "netlink_diag",
    // A connection takes its congestion control along, which is the host's unless it was asked for.
    "tcp_bbr",
];

/// By which what was unpacked before is known to be all that is needed.
pub(super) fn version() -> u64 {
    let mut hasher = DefaultHasher::new();
    MODULES.hash(&mut hasher);
    hasher.finish()
}

/// Turns what is below `directory`/root into what a [`super::Kernel`] has.
pub(super) fn kernel(directory: &Path) -> Result<()> {
    let root = directory.join("root");
    let modules = ["lib/modules", "usr/lib/modules"].map(|path| root.join(path));
    let modules = modules.into_iter().find(|path| path.is_dir()).context("the packages have no modules")?;
    let release = fs::read_dir(&modules)?.next().context("the packages have no kernel's modules")??.file_name();
    let release = release.to_string_lossy().into_owned();
    let places = [root.join("boot").join(format!("vmlinuz-{release}")), modules.join(&release).join("vmlinuz")];
    let compressed = places.iter().find(|path| path.exists()).context("the packages have no kernel")?;
    fs::write(directory.join("vmlinux"), uncompressed(&fs::read(compressed)?)?)?;
    keep_modules(&modules.join(&release), &directory.join("modules"))?;
    fs::write(directory.join("release"), format!("{release}\n"))?;
    fs::remove_dir_all(&root).context("removing what is not needed of the packages")?;
    match fs::remove_dir_all(directory.join("apt")) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error).context("removing lists of packages"),
        _ => Ok(()),
    }
}

/// The kernel in a bzImage (Documentation/arch/x86/boot.rst: `setup_sects`, `payload_offset`, `payload_length`).
fn uncompressed(image: &[u8]) -> Result<Vec<u8>> {
    let word = |at: usize| Some(u32::from_le_bytes(*image.get(at..)?.first_chunk()?) as usize);
    let payload = || {
        let sectors = match *image.get(0x1f1)? {
            0 => 4,
            some => usize::from(some),
        };
        let start = (sectors + 1) * 512 + word(0x248)?;
        image.get(start..start.checked_add(word(0x24c)?)?)
    };
    let payload = payload().context("this is no kernel")?;
    // Behind what was compressed stands its size.
    let packed = payload.get(..payload.len().saturating_sub(4)).unwrap_or_default();
    match packed {
        [0x28, 0xb5, 0x2f, 0xfd, ..] => through("zstd", packed),
        [0x02, 0x21, 0x4c, 0x18, ..] => through("lz4", packed),
        [0xfd, b'7', b'z', b'X', ..] => through("xz", packed),
        _ => bail!("the kernel is compressed in a way that is not known"),
    }
}

/// What a decompressor makes of something.
fn through(program: &str, packed: &[u8]) -> Result<Vec<u8>> {
    let mut command = Command::new(program);
    command.arg("-dc").stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.spawn().with_context(|| format!("starting {program}"))?;
    let mut stdin = child.stdin.take().context("a pipe")?;
    let output = std::thread::scope(|scope| {
        scope.spawn(move || stdin.write_all(packed));
        child.wait_with_output()
    })?;
    ensure!(output.status.success(), "{program} fails");
    Ok(output.stdout)
}

/// Puts the modules into `to`, named so that their order is the one in which they can be loaded.
fn keep_modules(from: &Path, to: &Path) -> Result<()> {
    let mut all = HashMap::new();
    find_modules(&from.join("kernel"), &mut all)?;
    let mut order = Vec::new();
    for name in MODULES {
        load(name, &all, &mut order)?;
    }
    fs::create_dir(to)?;
    for (place, (name, bytes)) in order.iter().enumerate() {
        fs::write(to.join(format!("{place:02}-{name}.ko")), bytes)?;
    }
    Ok(())
}

/// Every module below a directory, by name.
fn find_modules(directory: &Path, all: &mut HashMap<String, PathBuf>) -> Result<()> {
    for entry in fs::read_dir(directory).with_context(|| format!("reading {}", directory.display()))? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if path.is_dir() {
            find_modules(&path, all)?;
        } else if let Some((name, _)) = name.split_once(".ko") {
            all.insert(name.replace('-', "_"), path);
        }
    }
    Ok(())
}

/// Adds a module to those to be loaded, behind what it depends on. One that is not there is built in.
fn load(name: &str, all: &HashMap<String, PathBuf>, order: &mut Vec<(String, Vec<u8>)>) -> Result<()> {
    let Some(path) = all.get(name).filter(|_| order.iter().all(|(known, _)| known != name)) else { return Ok(()) };
    let bytes = fs::read(path).with_context(|| format!("reading {}", path.display()))?;
    let bytes = if path.extension().is_some_and(|e| e == "xz") { through("xz", &bytes)? } else { bytes };
    for other in depends(&bytes) {
        load(&other, all, order)?;
    }
    order.push((name.to_owned(), bytes));
    Ok(())
}

/// What a module says that it depends on: `depends=a,b` in its `.modinfo`.
fn depends(module: &[u8]) -> Vec<String> {
    const WORD: &[u8] = b"\0depends=";
    let Some(at) = module.windows(WORD.len()).position(|window| window == WORD) else { return Vec::new() };
    let list = module[at + WORD.len()..].split(|byte| *byte == 0).next().unwrap_or_default();
    let names = list.split(|byte| *byte == b',').filter(|name| !name.is_empty());
    names.map(|name| String::from_utf8_lossy(name).replace('-', "_")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_say_what_they_depend_on() {
        assert_eq!(depends(b"\x7fELF\0license=GPL\0depends=stp,llc\0name=bridge\0"), ["stp", "llc"]);
        assert!(depends(b"\0depends=\0x").is_empty() && depends(b"").is_empty());
    }

    #[test]
    fn what_is_no_kernel_is_refused() {
        assert!(uncompressed(&[0; 64]).is_err());
        assert!(uncompressed(&vec![0xff; 4096]).is_err());
    }
}
