//! The workloads and the client, without any pod: what the pod's tests stand on.

#![allow(clippy::unwrap_used)]

use std::time::Duration;

use harness::client::load::Driver;
use harness::client::{Crowd, Prober};
use harness::lab::{Lab, PATIENCE};
use harness::workload::{Apache, Mpm, Workload};

/// A lab with the bridge that a pod would have made.
fn lab() -> Lab {
    let lab = Lab::with_zap("/bin/true".into()).unwrap();
    lab.host().ip(&["link add zap0 type bridge", "link set zap0 up", "address add 198.18.0.1/16 dev zap0"]).unwrap();
    lab.attach_client().unwrap();
    lab
}

#[test]
fn apache_serves_natively_with_each_mpm() {
    let lab = lab();
    for mpm in [Mpm::Event, Mpm::Worker, Mpm::Prefork] {
        let apache = Apache { mpm };
        let native = lab.start_native(&apache).unwrap();
        apache.health(&lab, native.served_at()).unwrap();
        let mut crowd = Crowd::open(lab.client(), native.served_at(), 46, 4, PATIENCE).unwrap();
        crowd.use_once().unwrap();
        crowd.finish().unwrap();
    }
}

#[test]
fn a_server_is_driven_and_probed() {
    let lab = lab();
    let native = lab.start_native(&Apache { mpm: Mpm::Event }).unwrap();
    let prober = Prober::start(lab.client(), native.served_at(), PATIENCE).unwrap();
    let mut driver = Driver::open(lab.client(), native.served_at(), "1k.bin", 10).unwrap();
    let burst = driver.burst(Duration::from_secs(2)).unwrap();
    assert!(burst.answered > 1 && burst.latencies_us().unwrap().is_sorted(), "{burst:?}");
    let gaps = prober.finish().unwrap();
    assert!(gaps.answers > 1 && gaps.typical <= gaps.longest, "{gaps:?}");
}

#[test]
fn nothing_of_a_lab_is_left() {
    let directory = {
        let lab = lab();
        let native = lab.start_native(&Apache { mpm: Mpm::Prefork }).unwrap();
        assert!(native.netns().processes().unwrap().len() > 1);
        lab.directory().to_path_buf()
    };
    assert!(!directory.exists());
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
    assert!(!mounts.contains(directory.to_str().unwrap()));
}
