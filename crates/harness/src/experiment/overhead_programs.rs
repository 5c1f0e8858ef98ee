//! What a pod costs programs that do real work: a build, a database in a file, one in memory, files.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::{Experiment, Extent, Session};
use crate::lab::{Lab, Pod, PodOptions};
use crate::samples::Circumstances;
use crate::workload::{Sleep, folder};

pub(super) const EXPERIMENT: Experiment = Experiment {
    name: "overhead-programs",
    claim: "low overhead",
    what: "make -j2 of Lua, SQLite, redis-benchmark, fio through the overlay: in a pod and natively, in turns",
    cases: || PROGRAMS.to_vec(),
    runs: (10, 20),
    share: 6,
    run,
};

/// Scripts in `workloads/overhead`.
const PROGRAMS: [&str; 4] = ["make", "sqlite", "redis", "fio"];
/// Where their folder, and that of sources, are in a pod.
const FOLDER_IN_POD: &str = "/srv/overhead";
const SOURCES_IN_POD: &str = "/srv/sources";
/// Where they work in a pod: in its upper layer.
const WORK_IN_POD: &str = "/var/local/work";

fn run(session: &mut Session) -> Result<()> {
    let lab = Lab::new()?;
    let (folder, sources) = (folder("overhead")?, sources()?);
    let bind = |from: &Path, to: &str| ["--bind".to_string(), format!("{}:{to}:ro", from.display())];
    let options = [bind(&folder, FOLDER_IN_POD), bind(&sources, SOURCES_IN_POD)].concat();
    let pod = lab.start_pod(&Sleep, "work", &PodOptions { options })?;
    let wanted: Vec<&str> = PROGRAMS.into_iter().filter(|program| session.wants(program)).collect();
    session.each(
        &wanted,
        |program| (*program).into(),
        |session, program| {
            let how = if session.extent == Extent::Fast { "fast" } else { "whole" };
            let built = if *program == "make" { format!(";source={}", source_in(&sources)?) } else { String::new() };
            let parameters = format!("how={how}{built}");
            let mut rounds = session.rounds(program);
            while let Some(run) = session.next(&mut rounds)? {
                for arm in session.shuffled(&["native", "pod"]) {
                    session.step(&format!("{program}, {arm}"));
                    let printed = match arm {
                        "pod" => in_pod(&pod, program, how),
                        _ => natively(&lab, [&folder, &sources], program, how),
                    };
                    let of = Circumstances { workload: program, parameters: &parameters, arm, run };
                    for line in printed.with_context(|| arm.to_string())?.lines() {
                        let (metric, value, unit) =
                            figure(line).with_context(|| format!("{program} printed {line:?}"))?;
                        session.record(&of, metric, value, unit)?;
                    }
                }
            }
            Ok(())
        },
    )?;
    pod.remove()
}

/// Where `setup.sh` puts sources: beside what is built.
fn sources() -> Result<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/sources");
    std::fs::create_dir_all(&path).with_context(|| format!("making {}", path.display()))?;
    path.canonicalize().with_context(|| format!("looking for {}", path.display()))
}

/// Which source is built, with its version: it is no package that is installed.
fn source_in(sources: &Path) -> Result<String> {
    let entries = std::fs::read_dir(sources).with_context(|| format!("reading {}", sources.display()))?;
    let mut names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let named = names.find_map(|name| name.split_once(".orig.tar").map(|(source, _)| source.to_owned()));
    named.with_context(|| format!("{} has no source: ./setup.sh fetches it", sources.display()))
}

fn in_pod(pod: &Pod<'_>, program: &str, how: &str) -> Result<String> {
    let script = format!(
        "rm -rf {WORK_IN_POD} && mkdir -p {WORK_IN_POD} && {FOLDER_IN_POD}/{program} {WORK_IN_POD} {SOURCES_IN_POD} {how}"
    );
    pod.exec(&["bash", "-c", &script])
}

/// In a directory on the storage that the pod's upper layer is on.
fn natively(lab: &Lab, [folder, sources]: [&Path; 2], program: &str, how: &str) -> Result<String> {
    let work = lab.directory().join("work");
    std::fs::create_dir(&work).with_context(|| format!("making {}", work.display()))?;
    let mut command = Command::new(folder.join(program));
    let output = lab.host().output(command.arg(&work).arg(sources).arg(how));
    std::fs::remove_dir_all(&work).with_context(|| format!("removing {}", work.display()))?;
    let output = output?;
    ensure!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// `METRIC VALUE UNIT`
fn figure(line: &str) -> Option<(&str, f64, &str)> {
    let (metric, rest) = line.split_once(' ')?;
    let (value, unit) = rest.split_once(' ')?;
    Some((metric, value.parse().ok()?, unit))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_have_a_name_a_value_and_a_unit() {
        assert_eq!(figure("whole 12.5 us"), Some(("whole", 12.5, "us")));
        assert_eq!(figure("whole us"), None);
        assert_eq!(figure("whole much us"), None);
    }
}
