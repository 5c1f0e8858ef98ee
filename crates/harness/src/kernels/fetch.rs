//! Debian's packages of kernels, downloaded into a cache and taken apart there: nothing is installed.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Mutex;

use anyhow::{Context, Result, ensure};

use super::{Kernel, Series, unpack};
use crate::lab::built_beside;

/// What a machine lacks that would be needed to try other kernels: a way to a mirror, or the emulator.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Unavailable(pub(super) String);

/// Packages that a kernel is made of, among those that depend on each other.
const PARTS: [&str; 3] = ["linux-image-", "linux-binary-", "linux-modules-"];

/// The newest kernel of a series: from the cache, or from wherever this machine has its packages.
///
/// # Errors
///
/// [`Unavailable`] where it cannot be had here; anything else is a defect.
pub fn fetch(series: Series) -> Result<Kernel> {
    static ONE: Mutex<()> = Mutex::new(());
    let _one_at_a_time = ONE.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let cache = cache()?;
    let directory = cache.join(format!("{}-{:016x}", series.name, unpack::version()));
    if !directory.exists() {
        let fresh = tempfile::tempdir_in(&cache).context("making a directory for a kernel")?;
        download(series, fresh.path())?;
        unpack::kernel(fresh.path())?;
        std::fs::rename(fresh.path(), &directory).context("putting a kernel into the cache")?;
    }
    Kernel::cached(&directory)
}

/// Beside what was built, where nothing is tracked and `cargo clean` removes it.
fn cache() -> Result<PathBuf> {
    let zap = built_beside("zap")?;
    let built = zap.ancestors().nth(2).with_context(|| format!("{} is in no directory of a build", zap.display()))?;
    let cache = built.join("kernels");
    std::fs::create_dir_all(&cache).with_context(|| format!("making {}", cache.display()))?;
    Ok(cache)
}

/// Downloads all parts of the newest kernel and takes them apart below `directory`.
fn download(series: Series, directory: &Path) -> Result<()> {
    let apt = match series.suite {
        None => Apt { options: Vec::new() },
        Some(suite) => Apt::with_suite(suite, directory)?,
    };
    let packages = apt.parts_of(series.package)?;
    ensure!(!packages.is_empty(), Unavailable(format!("{} depends on no kernel", series.package)));
    let mut command = apt.command("apt-get");
    command.args(["-qq", "-o", "APT::Sandbox::User=root", "download"]).args(&packages).current_dir(directory);
    succeed(&mut command)?;
    let root = directory.join("root");
    for entry in std::fs::read_dir(directory).context("looking at what was downloaded")? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "deb") {
            succeed(Command::new("dpkg").arg("-x").arg(&path).arg(&root))?;
            std::fs::remove_file(&path)?;
        }
    }
    Ok(())
}

/// Runs a command to its end, which must be a good one.
fn succeed(command: &mut Command) -> Result<Output> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command.output().map_err(|error| Unavailable(format!("{name} cannot be run: {error}")))?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), Unavailable(format!("{name} fails: {}", said.trim())));
    Ok(output)
}

/// Debian's package tools, perhaps with lists of their own.
struct Apt {
    options: Vec<String>,
}

impl Apt {
    /// With the lists of one suite alone, kept below `directory`, from where this machine has the others.
    fn with_suite(suite: &str, directory: &Path) -> Result<Self> {
        let targets = ["indextargets", "--format", "$(REPO_URI) $(CODENAME) $(COMPONENT)", "Created-By: Packages"];
        let output = succeed(Command::new("apt-get").args(targets))?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let plain = text.lines().find_map(|line| match line.split(' ').collect::<Vec<_>>()[..] {
            [uri, codename, "main"] if !codename.contains('-') => Some(uri),
            _ => None,
        });
        let uri = plain.ok_or_else(|| Unavailable("apt has no list of packages".into()))?;
        let lists = directory.join("apt");
        std::fs::create_dir_all(lists.join("lists/partial"))?;
        std::fs::write(lists.join("sources.list"), format!("deb {uri} {suite} main\n"))?;
        let at = |name: &str| lists.join(name).display().to_string();
        let options = [
            ("Dir::Etc::sourcelist", at("sources.list")),
            ("Dir::Etc::sourceparts", "/dev/null".into()),
            ("Dir::State::lists", at("lists")),
            ("Dir::Cache", at("cache")),
            ("APT::Sandbox::User", "root".into()),
        ];
        let apt = Self { options: options.into_iter().map(|(name, value)| format!("{name}={value}")).collect() };
        std::fs::create_dir_all(lists.join("cache"))?;
        succeed(apt.command("apt-get").args(["-qq", "update"]))?;
        Ok(apt)
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.args(self.options.iter().flat_map(|option| ["-o", option]));
        command
    }

    /// The parts of a kernel that `package` depends on, and what they depend on.
    fn parts_of(&self, package: &str) -> Result<BTreeSet<String>> {
        let (mut found, mut waiting) = (BTreeSet::new(), vec![package.to_owned()]);
        while let Some(package) = waiting.pop() {
            let output = succeed(self.command("apt-cache").args(["show", "--no-all-versions", &package]))?;
            let fresh = dependencies(&String::from_utf8_lossy(&output.stdout));
            waiting.extend(fresh.into_iter().filter(|name| found.insert(name.clone())));
        }
        Ok(found)
    }
}

/// The parts of kernels that a package's description says it depends on.
fn dependencies(description: &str) -> Vec<String> {
    let lines = description.lines().filter_map(|line| line.strip_prefix("Depends: "));
    let names = lines.flat_map(|line| line.split([',', '|'])).filter_map(|name| name.split_whitespace().next());
    names.filter(|name| PARTS.iter().any(|part| name.starts_with(part))).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    #[test]
    fn parts_of_kernels_are_found_among_dependencies() {
        let text = "Package: linux-image-cloud-amd64\nDepends: kmod, linux-base (>= 4.3~), linux-image-6.1.0-56-cloud-amd64 \
                    (= 6.1.192-2)\nDescription: x\n";
        assert_eq!(super::dependencies(text), ["linux-image-6.1.0-56-cloud-amd64"]);
    }
}
