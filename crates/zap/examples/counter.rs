//! Runs a pod that counts, checkpoints it, and starts it again, twice: it counts on from where it was.
//!
//! As root: `cargo build && cargo run --example counter`

use std::path::Path;
use std::thread::sleep;
use std::time::Duration;

use zap::host::Host;
use zap::monitor::protocol::Failure;
use zap::pod::PodSpec;

const COUNT: &str = "i=0; while sleep 0.2; do i=$((i+1)); echo $i; done";

fn main() -> Result<(), Failure> {
    let directory = std::env::temp_dir().join(format!("zap-counter-{}", std::process::id()));
    let host = Host::new(Some(&directory.join("state")));
    let result = count(&host, &directory.join("image"));
    let _ = std::fs::remove_dir_all(&directory);
    result
}

fn count(host: &Host, image: &Path) -> Result<(), Failure> {
    let pod = host.run(PodSpec::new("counter", &["sh", "-c", COUNT]))?;
    sleep(Duration::from_secs(1));
    println!("{pod} has counted to {}", last_line(host, &pod));

    let stats = host.checkpoint(&pod, image, false)?;
    println!("checkpoint: {} pages, held for {} µs; the pod is gone", stats.pages, stats.downtime_us);
    sleep(Duration::from_secs(1));

    // One image, two pods, side by side.
    let mut pods = Vec::new();
    for name in ["counter", "second"] {
        let (pod, stats) = host.restart(image, Some(name))?;
        println!("{pod}: restarted in {} µs", stats.total_us);
        pods.push(pod);
    }
    sleep(Duration::from_secs(1));
    for pod in pods {
        println!("{pod} has counted on to {}", last_line(host, &pod));
        host.remove(&pod)?;
    }
    Ok(())
}

fn last_line(host: &Host, pod: &str) -> String {
    let log = host.log(pod).unwrap_or_default();
    String::from_utf8_lossy(&log).lines().last().unwrap_or("nothing yet").to_owned()
}
