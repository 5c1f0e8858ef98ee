//! Every kind of guest (see `pod-guest`), five ways: undisturbed; checkpointed and left running, twice; restarted;
//! restarted twice, side by side, from the images of both; restarted from the image of a restart. Each checks itself from inside.

#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use harness::lab::{Lab, PATIENCE, Pod, wait_until, zap_binary};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rand::{Rng, SeedableRng};

/// Kinds about networks that change nothing of the pod's own but what any root may.
const ORDINARY: [&str; 4] =
    ["network-namespace", "network-namespace-off", "network-settings-by-root", "network-of-others"];

/// What a pod needs that makes tun devices.
const TUN: &[&str] = &["--bind", "/dev/net/tun"];

/// A pod in which a guest runs.
struct Guest<'a> {
    lab: &'a Lab,
    name: String,
}

impl<'a> Guest<'a> {
    /// Starts a guest and waits until it has set up.
    fn start(lab: &'a Lab, name: &str, kind: &str) -> Result<Self> {
        let program = env!("CARGO_BIN_EXE_pod-guest");
        let mounts = kind.starts_with("mounts");
        let add = match kind {
            _ if mounts => &["--cap-add", "sys_admin"][..],
            _ if kind.starts_with("network") && !ORDINARY.contains(&kind) => &["--cap-add", "net_admin"][..],
            _ if kind == "seccomp-strict" || kind == "fanotify-user" || kind.starts_with("io-uring") => {
                &["--seccomp", "unconfined"][..]
            }
            "performance-counter" | "bpf-map" | "own-host-name" => &["--cap-add", "sys_admin"][..],
            _ if kind.starts_with("fanotify") => &["--cap-add", "sys_admin"][..],
            "userfaultfd" => &["--cap-add", "sys_ptrace"][..],
            _ => &["--cap-add", "sys_nice"][..],
        };
        let device = if ["network-tun", "network-tun-lasting"].contains(&kind) { TUN } else { &[] };
        let network = if kind.starts_with("network-way-out") { "bridge" } else { "private" };
        lab.zap(&[&["run", "-d", "-n", name, "--net", network], device, add, &["--", program, kind]].concat())?;
        let guest = Self { lab, name: name.into() };
        wait_until("the guest to be ready", || {
            let log = guest.pod()?.log();
            ensure!(log.contains("ready\n"), "it has printed {log:?}");
            Ok(())
        })?;
        Ok(guest)
    }

    fn pod(&self) -> Result<Pod<'a>> {
        self.lab.pod(&self.name)
    }

    fn checkpoint(&self, image: &Path, options: &[&str]) -> Result<()> {
        self.pod()?.checkpoint(image, options).map(drop)
    }

    /// Restarts an image beside what runs already.
    fn restart(lab: &'a Lab, image: &Path, name: &str) -> Result<Self> {
        lab.zap(&["restart", &image.to_string_lossy(), "-d", "-n", name])?;
        Ok(Self { lab, name: name.into() })
    }

    /// Lets the guest check itself, and removes it.
    fn check(self) -> Result<()> {
        // A guest that fails may end its pod before this has ended: what it says comes first.
        let told = self.pod()?.exec(&["touch", "/tmp/go"]);
        let code = wait_until("the guest to end", || {
            let pods = self.lab.pods()?;
            let state = pods.into_iter().find(|pod| pod.name == self.name).map(|pod| pod.state);
            ensure!(state.as_deref() == Some("stopped"), "it is {state:?}");
            Ok(self.lab.try_zap(&["wait", &self.name])?.0.status.code())
        });
        let log = self.pod()?.log();
        let code = code.with_context(|| format!("{} has printed {log:?}", self.name))?;
        ensure!(code == Some(0) && log.ends_with("ok\n"), "as {}, it ended with {code:?}:\n{log}", self.name);
        told?;
        self.pod()?.remove()
    }
}

/// What is kept: five ways, three pods of them at once.
fn keeps(kind: &str) -> Result<()> {
    let _huge = kind.starts_with("huge-").then(HugePages::have).transpose()?;
    let lab = Lab::new()?;
    let [first, next, second] = ["first", "next", "second"].map(|image| lab.directory().join(image));
    Guest::start(&lab, "undisturbed", kind)?.check()?;
    let original = Guest::start(&lab, "original", kind)?;
    original.checkpoint(&first, &["--leave-running"])?;
    // What a checkpoint has looked at is as it was.
    original.checkpoint(&next, &["--leave-running"])?;
    original.check()?;
    let copies = [Guest::restart(&lab, &first, "copy")?, Guest::restart(&lab, &next, "twin")?];
    let [copy, twin] = copies;
    twin.check()?;
    copy.checkpoint(&second, &[])?;
    Guest::restart(&lab, &second, "grandchild")?.check()
}

/// What cannot be kept: refused by name before anything is disturbed, and the guest runs on.
fn refuses(kind: &str, because: &str) -> Result<()> {
    let lab = Lab::new()?;
    let guest = Guest::start(&lab, "refused", kind)?;
    let image = lab.directory().join("image");
    let (output, _) = lab.try_zap(&["checkpoint", "refused", "-o", &image.to_string_lossy(), "--leave-running"])?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.code() == Some(3), "it ended with {}: {said}", output.status);
    ensure!(said.contains(because), "it does not say {because:?}: {said}");
    ensure!(!image.exists(), "a refused checkpoint left an image");
    guest.check()
}

/// At most as many at once as the machine has processors: a guest that spins takes one.
fn with_room(test: impl FnOnce() -> Result<()>) {
    static RUNNING: std::sync::Mutex<usize> = std::sync::Mutex::new(0);
    static ENDED: std::sync::Condvar = std::sync::Condvar::new();
    let room = std::thread::available_parallelism().map_or(2, usize::from).max(2);
    let running = RUNNING.lock().unwrap();
    let (mut running, timeout) = ENDED.wait_timeout_while(running, 20 * PATIENCE, |now| *now >= room).unwrap();
    assert!(!timeout.timed_out(), "no room for another test");
    *running += 1;
    drop(running);
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(test));
    *RUNNING.lock().unwrap() -= 1;
    ENDED.notify_one();
    match result {
        Ok(Ok(())) => {}
        Ok(Err(error)) => panic!("{error:#}"),
        Err(panic) => std::panic::resume_unwind(panic),
    }
}

macro_rules! guests {
    ($($test:ident)*) => { $(#[test] fn $test() { with_room(|| keeps(&stringify!($test).replace('_', "-"))); })* };
}

macro_rules! refused {
    ($($test:ident $because:literal)*) => {
        $(#[test] fn $test() { with_room(|| refuses(&stringify!($test).replace('_', "-"), $because)); })*
    };
}

guests! {
    plain tree zombies zombie_signals orphan subreaper subreaper_sessions death_signal exit_signal stopped stopped_threads stopped_and_continued forks_afterwards
    leader_gone vfork_brief
    shared_directory shared_files shared_strangely shared_memory_process shared_memory_alone shared_memory_wholly
    shared_memory_family shared_memory_siblings shared_memory_written shared_memory_stopped
    groups daemon daemon_family background_job session_late
    threads thread_ids thread_directory rseq robust_list robust_death joining thread_credentials
    general_registers vector_registers x87 segments
    actions action_works pending pending_thread pending_kinds terminal_full terminal_typed_full terminal_stopped
    pending_all all_handled all_preempted signal_files alternate_stack in_handler autodisarm sigsuspend
    interval_timers interval_ticks posix_timers posix_ticks absolute_timer thread_timer thread_timers_expiring posix_timers_expiring many_timers many_signals clocks clock_watchers
    credentials capabilities no_new_privileges securebits limits names umask cwd cwd_deleted chroot scheduling oom_score
    undumpable personality login_user
    private shared_anonymous file_private file_shared file_deleted copy_on_write huge_pages heap big
    protections grows_down advice advice_changing locked many_mappings executable_memory low_address vdso program_replaced memfd
    waiting_calls waiting_timeouts waiting_again sleeps long_sleep survivor respawner fork_storm thread_storm
    inotify inotify_renamed inotify_nameless inotify_shared inotify_unread inotify_many
    fanotify fanotify_handles fanotify_user fanotify_unread fanotify_unread_handles
    user_namespace user_namespace_unmapped user_namespace_threads user_namespace_nested network_namespace
    network_namespace_off namespace_handles host_name_namespace ipc_namespace cgroup_namespace time_namespace namespace_shared
    sandbox thread_filters
    pidfd pidfd_thread pidfd_ended proc_files proc_half_read proc_ended proc_ended_root
    cpu_affinity io_priority timer_slack speculation memory_policy memory_policy_ranges memory_barriers write_or_execute machine_checks time_stamps
    sealed_memory moving_memory moving_threads
    mqueue mqueue_unlinked mqueue_waiting mqueue_notify named_semaphore
    semaphores_threads semaphores_undo semaphores_undo_kinds semaphores_waiting segments_protected
    owner_thread owner_group directory_notify lease locks_waiting range_locks_waiting
    connecting connecting_blocked broadcast_stream urgent_written unix_urgent unix_backlog unix_backlog_messages unix_backlog_silent udp_lite closing_always
    closed_and_told ended_where_it_was
    rare_options packet_headers zero_copy numbered_times udp_lite_unread echo_unread
    handshake_put_aside handshake_put_aside_elsewhere
    locked_future locked_unreadable droppable named_memory protection_keys
    pid_namespace pid_namespace_threads pid_namespace_nested pid_namespace_of_users pid_namespace_orphans
    pid_namespace_groups pid_namespace_abandoned pid_namespace_entered pid_namespace_unborn pid_namespace_handles
    browser_sandbox
    mounts_tmpfs mounts_bind mounts_views mounts_in_memory mounts_unbindable
    multicast_groups filtered_socket port_shared mapped_address netlink_groups fast_open corked_stream corked_idle corked_datagram corked_datagram6 datagram_held_back
    rights_cycle handles_on_their_way unix_credentials datagrams_shut address_without_port stream_headers
    unix_names unix_links datagrams_empty raw_socket packet_socket packet_ring
    fifo_one_sided fifo_deleted pipe_resized nameless_file path_only directory_half_read linked_elsewhere file_replaced
    behind_a_root many_descriptors files_beyond_limit
    autogroup_nice own_segments dispatched_calls huge_memfd
    seccomp_strict deadline guards sparse sealed locked_on_fault asynchronous_io network_kept
    network_interface network_address network_route network_route_order network_rule network_mtu network_off network_queueing network_neighbour
    network_bridge network_settings network_settings_by_root network_between network_of_others
    network_way_out network_way_out_bridged network_way_out_off
    io_uring io_uring_fresh io_uring_shared io_uring_unordered io_uring_going_on
    network_filter network_filter_translates network_tun network_tun_lasting
    network_features network_operation network_heard network_groups network_neighbours_told network_multipath network_segments
    network_measured
    mounts_namespace mounts_namespace_copied namespace_of_mounts namespace_of_mounts_pivoted namespace_of_mounts_data namespace_of_mounts_data_alone
    mounts_proc_of_namespace mounts_proc_of_namespace_nested mounts_proc_of_namespace_covered
    same_numbers told_by_number root_file_removed linked_far_away attributes_nameless executable_memfd message_senders
    data_limit own_host_name
    mounts_proc_of_namespace_users mounts_proc_of_namespace_elsewhere mounts_interfaces_of_namespace queues_of_namespace
}

refused! {
    asynchronous_io_waits "is used for requests that wait (IOCB_CMD_POLL)"
    vfork "vfork"
    io_uring_mapped "is an io_uring that is closed, which cannot be checkpointed"
    io_uring_in_flight "has requests in flight"
    io_uring_notifying "tells an eventfd of its answers"
    io_uring_polling "has a thread of the kernel's that looks for requests"
    io_uring_of_one "belongs to one thread"
    io_uring_files "has files that were registered with it"
    io_uring_buffers "has buffers that were registered with it"
    io_uring_provided "has buffers to choose from"
    io_uring_timed "has timeouts in flight"
    io_uring_registered "is registered with one of its threads"
    io_uring_nowhere "is registered with one of its threads"
    io_uring_wide "has requests or answers of another size"
    userfaultfd "is a userfaultfd, which cannot be checkpointed yet"
    fanotify_unread_endless "has events that were not read, and a queue that loses none"
    fanotify_asked "is asked before files are opened"
    performance_counter "is a performance counter of this host's, which cannot be checkpointed"
    bpf_map "is a BPF object of this host's, which cannot be checkpointed"
    mounts_limit_of_messages "the limit kernel.msgmax has been set in the pod"
    pressure_trigger "tells its program of pressure"
    flow_label "has labels of IPv6 that sockets have leased"
    seccomp_listener "is a seccomp listener, which cannot be checkpointed yet"
    dispatched_calls_now "is in code whose system calls come back to it"
    namespace_handle_mounts "is a mount namespace in which no process lives, which cannot be checkpointed"
    no_vdso "vDSO"
    thread_directory_shared "has a root and working directory of its own (CLONE_FS) together with another"
    thread_directory_of_process "has a root and working directory of its own (CLONE_FS) in /proc"
    thread_files "has a descriptor table of its own"
    thread_undo_list "has a semaphore undo list of its own"
    thread_namespace "a thread is in another"
    traced "is traced by another process"
    mqueue_notify_full "has messages, and a process to notify"
    mqueue_notify_thread "SIGEV_THREAD"
    mounts_of_what_is_gone "shows what was removed"
    mounts_moved "was taken away or moved"
    namespace_of_mounts_overlay "is of the file system overlay"
    mounts_proc_of_namespace_outside "shows a namespace made inside the pod"
    directory_notify_others "F_NOTIFY"
    urgent "urgent data"
    urgent_read "urgent data"
    signed_packets "TCP_MD5SIG"
    zero_copy_used "SO_ZEROCOPY"
    numbered_times_used "SOF_TIMESTAMPING_OPT_ID"
    saved_request "TCP_SAVE_SYN"
    time_untold "MSG_ERRQUEUE"
    closed_early "was closed by its program while the other end has yet to take"
    closed_early_elsewhere "was closed by its program while the other end has yet to take"
    unix_backlog_alone "a descriptor on its way that nobody holds any more"
    corked_datagram_apart "holds back a datagram with options of its own"
    network_filter_within_rule "has a packet filter with a chain within a rule"
    network_mirror "has the queueing discipline clsact"
    network_tunnel "has the interface tunnel, of the kind vxlan"
    network_sets "has sets of addresses (ipset)"
    signals_beyond_count "take the kernel too long to show"
    mappings_all "are as many as it may have"
    path_too_long "has a path that is longer than the kernel tells"
}

/// More huge pages of the host's, until this is dropped. There is one number of them, so one has them at a time.
struct HugePages {
    before: u32,
    _alone: std::sync::MutexGuard<'static, ()>,
}

impl HugePages {
    const NUMBER: &str = "/proc/sys/vm/nr_hugepages";
    /// Three pods at once, each with four and a copy of one.
    const MORE: u32 = 24;

    fn have() -> Result<HugePages> {
        static ALONE: std::sync::Mutex<()> = std::sync::Mutex::new(());
        let alone = ALONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let before = std::fs::read_to_string(Self::NUMBER)?.trim().parse()?;
        let huge = HugePages { before, _alone: alone };
        huge.set(before + Self::MORE)?;
        let found: u32 = std::fs::read_to_string(Self::NUMBER)?.trim().parse()?;
        if found < before + Self::MORE {
            // The kernel has as many as it finds whole, and says nothing of the others: once it has moved what lies about it
            // finds more.
            let _ = std::fs::write("/proc/sys/vm/compact_memory", "1");
            huge.set(before + Self::MORE)?;
        }
        Ok(huge)
    }

    fn set(&self, number: u32) -> Result<()> {
        std::fs::write(Self::NUMBER, number.to_string()).context("having huge pages")
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        let _ = self.set(self.before);
    }
}

/// A host that has no huge page free is said to lack them, and keeps nothing of what it tried.
#[test]
fn a_host_that_lacks_huge_pages_says_so() {
    with_room(|| {
        let lab = Lab::new()?;
        let image = lab.directory().join("image");
        let huge = HugePages::have()?;
        let guest = Guest::start(&lab, "original", "huge-pages")?;
        guest.checkpoint(&image, &[])?;
        huge.set(0)?;
        let (output, _) = lab.try_zap(&["restart", &image.to_string_lossy(), "-d", "-n", "copy"])?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.code() == Some(4), "it ended with {}: {said}", output.status);
        ensure!(said.contains("huge pages"), "it does not say what is missing: {said}");
        ensure!(lab.pods()?.is_empty(), "a pod is left");
        huge.set(huge.before + HugePages::MORE)?;
        Guest::restart(&lab, &image, "copy")?.check()
    });
}

/// The monitor of a pod, as the registry has it.
fn monitor_of(lab: &Lab, name: &str) -> Result<Option<i32>> {
    let record = std::fs::read(lab.state().join("pods").join(name).join("pod.json"))?;
    let record: serde_json::Value = serde_json::from_slice(&record)?;
    Ok(record["monitor"]["pid"].as_i64().map(|pid| pid as i32))
}

/// It goes on here, and as it was restarts beside itself.
fn goes_on_twice(lab: &Lab, guest: Guest<'_>) -> Result<()> {
    let image = lab.directory().join("last");
    guest.checkpoint(&image, &["--leave-running"])?;
    guest.check()?;
    Guest::restart(lab, &image, "again")?.check()
}

/// A monitor that is killed at any moment of a checkpoint harms nothing: the pod runs on, unaware, and can be
/// checkpointed by the next.
fn outlives_monitors(rounds: u32) -> Result<()> {
    let lab = Lab::new()?;
    let guest = Guest::start(&lab, "survivor", "survivor")?;
    let mut random = rand::rngs::StdRng::seed_from_u64(20_021_209);
    for round in 0..rounds {
        let image = lab.directory().join(format!("image{round}"));
        // The first command after a death gives the pod a new monitor.
        lab.zap(&["exec", "survivor", "true"]).with_context(|| format!("in round {round}"))?;
        let monitor = monitor_of(&lab, "survivor")?.context("the pod has no monitor")?;
        let mut command = std::process::Command::new(zap_binary()?);
        command.arg("--state").arg(lab.state()).args(["checkpoint", "survivor", "--leave-running", "-o"]).arg(&image);
        let mut checkpoint = lab.host().spawn(command.stderr(std::process::Stdio::null()))?;
        std::thread::sleep(Duration::from_micros(random.random_range(0..150_000)));
        kill(Pid::from_raw(monitor), Signal::SIGKILL).context("killing a monitor")?;
        wait_until("the monitor to be gone", || {
            ensure!(!Path::new(&format!("/proc/{monitor}")).exists(), "it is there");
            Ok(())
        })?;
        let ended = checkpoint.wait()?;
        ensure!(image.exists() || !ended.success(), "round {round}: {ended}, and there is no image");
        if image.exists() {
            lab.zap(&["verify", &image.to_string_lossy()]).with_context(|| format!("round {round}: {ended}"))?;
        }
        let _ = std::fs::remove_dir_all(&image);
        let log = guest.pod()?.log();
        ensure!(log == "ready\n", "after round {round}, it has printed {log:?}");
    }
    goes_on_twice(&lab, guest)
}

#[test]
fn a_pod_outlives_its_monitors() {
    with_room(|| outlives_monitors(8));
}

/// A process with threads that is killed while it is held: the checkpoint fails or goes on without it, nothing hangs, and
/// the pod runs on.
fn outlives_processes(rounds: u32) -> Result<()> {
    let lab = Lab::new()?;
    let guest = Guest::start(&lab, "respawner", "respawner")?;
    let mut random = rand::rngs::StdRng::seed_from_u64(20_261_122);
    let victim = || -> Result<Option<i32>> {
        let processes = guest.pod()?.processes()?;
        // The latest by the pod's numbers: the host's may have begun again from the lowest.
        Ok(processes.iter().max_by_key(|process| process.pid).map(|process| process.host_pid))
    };
    let mut told = 0;
    for round in 0..rounds {
        let image = lab.directory().join(format!("image{round}"));
        let child = wait_until("the child and its threads", || {
            let child = victim()?.context("there is no child")?;
            let threads = std::fs::read_dir(format!("/proc/{child}/task")).map_or(0, Iterator::count);
            ensure!(threads == 41, "it has {threads}");
            Ok(child)
        })?;
        let options = ["checkpoint", "respawner", "--leave-running", "-o", &image.to_string_lossy()].map(str::to_owned);
        let mut command = std::process::Command::new(zap_binary()?);
        command.arg("--state").arg(lab.state()).args(options).stderr(std::process::Stdio::piped());
        let checkpoint = lab.host().spawn(&mut command)?;
        std::thread::sleep(Duration::from_micros(random.random_range(0..100_000)));
        kill(Pid::from_raw(child), Signal::SIGKILL).context("killing a process")?;
        let (sender, receiver) = std::sync::mpsc::channel();
        std::thread::spawn(move || sender.send(checkpoint.wait_with_output()));
        let output = receiver.recv_timeout(PATIENCE).with_context(|| format!("round {round}: it hangs"))??;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(
            output.status.success() || said.contains("pod respawner: "),
            "round {round}: {}: {said}",
            output.status
        );
        ensure!(output.status.success() == image.exists(), "round {round}: {}: {said}", output.status);
        told += u32::from(!output.status.success());
        eprintln!("round {round}: {} {said}", output.status);
        let _ = std::fs::remove_dir_all(&image);
    }
    eprintln!("{told} of {rounds} checkpoints failed");
    goes_on_twice(&lab, guest)
}

#[test]
fn a_pod_outlives_its_processes() {
    with_room(|| outlives_processes(20));
}

/// Every kind that the guest knows is tested here.
#[test]
fn no_kind_is_forgotten() {
    let listed = std::process::Command::new(env!("CARGO_BIN_EXE_pod-guest")).output().unwrap();
    let source = include_str!("guests.rs");
    let forgotten = |kind: &&str| !source.split_whitespace().any(|word| word == kind.replace('-', "_"));
    let text = String::from_utf8(listed.stdout).unwrap();
    let forgotten: Vec<_> = text.lines().filter(forgotten).collect();
    if !forgotten.is_empty() {
        panic!("no test names {forgotten:?}");
    }
}
