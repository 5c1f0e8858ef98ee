//! Files of the root that a moving pod uses, where the destination's root has others.

use std::path::{Path, PathBuf};

use super::common::{Done, Host, eventually, finish};
use super::counter::{COUNT, Counter};

/// Two hosts that have different roots under one path, which have what a pod runs from a bind mount.
struct World {
    here: Host,
    there: Host,
}

const BINDS: [&str; 2] = ["--bind", "/usr:/usr:ro"];
const DATA: &str = "what the pod has open";

impl World {
    fn new() -> World {
        let world = World { here: Host::new(), there: Host::new() };
        for root in [world.root(), world.other_root()] {
            for directory in ["usr", "gate"] {
                std::fs::create_dir_all(root.join(directory)).unwrap();
            }
            for name in ["bin", "lib", "lib64"] {
                std::os::unix::fs::symlink(format!("usr/{name}"), root.join(name)).unwrap();
            }
            for name in ["data", "late"] {
                std::fs::write(root.join(name), DATA).unwrap();
            }
        }
        world
    }

    fn root(&self) -> PathBuf {
        self.here.path("root")
    }

    /// What the destination has under the path of [`World::root`].
    fn other_root(&self) -> PathBuf {
        self.there.path("root")
    }

    fn run(&self, options: &[&str], script: &str) {
        let root = self.root();
        let words = ["-n", "counter", "--root", root.to_str().unwrap()];
        self.here.start([&words[..], &BINDS, options, &["--", "sh", "-c", script]].concat());
    }

    /// Moves the pod. What comes from the source passes through `valve` first.
    fn migrate(&self, valve: &str, fault: &str, options: &[&str]) -> Done {
        let mount = format!("mount --bind '{}' '{}'", self.other_root().display(), self.root().display());
        let way = format!("{valve} | unshare --mount sh -c \"{mount} && {}\"", self.there.leads_to("receive"));
        let mut command = self.here.zap([&["migrate", "counter", "--via", &way], options].concat());
        finish(command.env("ZAP_FAULT", fault).stdin(std::process::Stdio::null()))
    }

    /// The pod is not to go, because of that file.
    fn refused(&self, fault: &str, file: &str, why: &str) {
        let done = self.migrate("cat", fault, &[]);
        let named = done.stderr.contains(&format!("{file} is another file there ({why}"))
            && done.stderr.contains("--carry-files");
        assert!(done.code == 4 && named, "{done:?}");
        assert_eq!(self.there.ok(["ls", "--json"]), "[]");
        Counter::of(&self.here, "counter").goes_on();
    }
}

fn change(file: &Path, contents: &str) {
    std::fs::write(file, contents).unwrap();
}

/// Any attempt to hold the pod.
const HELD: &str = "checkpoint-frozen:error";

#[test]
fn a_file_that_differs_there_is_named_before_the_pod_is_touched() {
    let world = World::new();
    world.run(&[], &format!("exec 3</data; {COUNT}"));
    Counter::of(&world.here, "counter").goes_on();
    let data = world.other_root().join("data");
    change(&data, "what the pod has OPEN");
    world.refused(HELD, "/data", "its contents differ");
    change(&data, "another size");
    world.refused(HELD, "/data", "its size differs");
    std::fs::remove_file(&data).unwrap();
    world.refused(HELD, "/data", "it cannot be read");
    std::fs::create_dir(&data).unwrap();
    world.refused(HELD, "/data", "it is not a file");
    std::fs::remove_dir(&data).unwrap();
    // It is taken along if one says so.
    change(&data, "what the pod has OPEN");
    let done = world.migrate("cat", "", &["--carry-files"]);
    assert_eq!(done.code, 0, "{done:?}");
    Counter::of(&world.there, "counter").goes_on();
    assert_eq!(world.there.ok(["exec", "counter", "cat", "/data"]), DATA);
    assert_eq!(std::fs::read_to_string(&data).unwrap(), "what the pod has OPEN");
}

#[test]
fn a_file_with_other_time_stamps_is_the_same() {
    let world = World::new();
    world.run(&[], &format!("exec 3</data; {COUNT}"));
    Counter::of(&world.here, "counter").goes_on();
    let data = std::fs::File::options().write(true).open(world.other_root().join("data")).unwrap();
    data.set_modified(std::time::UNIX_EPOCH).unwrap();
    let done = world.migrate("cat", "", &[]);
    assert_eq!(done.code, 0, "{done:?}");
    Counter::of(&world.there, "counter").goes_on();
}

#[test]
fn a_file_that_is_opened_afterwards_is_compared_in_the_hold() {
    let world = World::new();
    let gate = world.here.path("gate");
    std::fs::create_dir(&gate).unwrap();
    let bind = format!("{}:/gate", gate.display());
    let script = "head -c 8000000 /dev/urandom >/blob; touch /gate/ready
        until [ -e /gate/go ]; do sleep 0.01; done; exec 3</late; touch /gate/open";
    world.run(&["--bind", &bind], &format!("{script}; {COUNT}"));
    eventually("the pod to be ready", || gate.join("ready").exists());
    change(&world.other_root().join("late"), "what the pod has OPEN");
    // It opens the file when its own, which are sent while it runs, are half there.
    let gate = gate.display();
    let valve = format!(
        "(stdbuf -o0 head -c 4000000; touch '{gate}/go'; until [ -e '{gate}/open' ]; do sleep 0.01; done; cat)"
    );
    let done = world.migrate(&valve, "", &[]);
    assert!(done.code == 1 && done.stderr.contains("/late has changed"), "{done:?}");
    assert_eq!(world.there.ok(["ls", "--json"]), "[]");
    Counter::of(&world.here, "counter").goes_on();
}
