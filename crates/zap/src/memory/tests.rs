//! A process and its child with memory of every sort are captured and made again in other processes.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Lines};
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::Arc;

use super::layout::Nature;
use super::pages::Frames;
use super::*;
use crate::files::FileTable;
use crate::files::testing::spec;
use crate::ids::{FileId, HostPid, PodPid};
use crate::image::{DataSink, ImageReader};
use crate::look::{Console, Look, Subject};
use crate::sys::testing as own;
use crate::tracee::{Batch, Ground, Held, Seized, Site, ThreadName, seize};

const RW: i32 = libc::PROT_READ | libc::PROT_WRITE;
const PRIVATE: i32 = libc::MAP_PRIVATE;
const P: u64 = PAGE;

fn filled(pages: u64, flags: i32, file: Option<i32>) -> u64 {
    let start = own::map((pages * P) as usize, RW, flags, file);
    (0..pages).for_each(|i| own::poke(start + i * P, (i % 250) as u8 + 1));
    start
}

/// Runs in a process of its own, started by [`Victim::start`].
#[test]
#[ignore = "is the victim of the other tests"]
fn victim() {
    if std::env::var_os("ZAP_TEST_VICTIM").is_none() {
        return;
    }
    let exe = std::fs::File::open("/proc/self/exe").unwrap();
    let memfd = nix::sys::memfd::memfd_create("mapped", nix::sys::memfd::MFdFlags::empty()).unwrap();
    nix::unistd::ftruncate(&memfd, 64 << 10).unwrap();
    let plain = filled(256, PRIVATE, None);
    let hidden = filled(4, PRIVATE, None);
    own::over(libc::SYS_mprotect, hidden, 4 * P as usize, libc::PROT_NONE);
    let constant = filled(5, PRIVATE, None);
    own::over(libc::SYS_mprotect, constant, 5 * P as usize, libc::PROT_READ);
    filled(8, PRIVATE | libc::MAP_GROWSDOWN, None);
    filled(3, libc::MAP_SHARED, None);
    own::map(1 << 30, libc::PROT_NONE, PRIVATE | libc::MAP_NORESERVE, None);
    let file = own::map(4 * P as usize, RW, PRIVATE, Some(exe.as_raw_fd()));
    own::poke(file + P, 7);
    own::map(3 * P as usize, libc::PROT_READ, libc::MAP_SHARED, Some(exe.as_raw_fd()));
    filled(9, libc::MAP_SHARED, Some(memfd.as_raw_fd()));
    let holes = own::map(64 * P as usize, RW, PRIVATE, None);
    (0..64).step_by(2).for_each(|i| own::poke(holes + i * P, 9));
    for advice in
        [libc::MADV_DONTDUMP, libc::MADV_NOHUGEPAGE, libc::MADV_RANDOM, libc::MADV_DONTFORK, libc::MADV_WIPEONFORK]
    {
        own::over(libc::SYS_madvise, filled(6, PRIVATE, None), 6 * P as usize, advice);
    }
    own::over(libc::SYS_mlock2, filled(2, PRIVATE, None), 2 * P as usize, 0);
    let child = own::fork();
    if child == 0 {
        nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL).unwrap();
        own::poke(plain + 3 * P, 200);
        change(plain, holes, constant);
        nix::unistd::write(std::io::stdout(), b"changed\n").unwrap();
        loop {
            nix::unistd::pause();
        }
    }
    println!("victims {} {child}", std::process::id());
    obey(plain);
    own::exit();
}

/// What the child does with what it inherited.
fn change(plain: u64, holes: u64, constant: u64) {
    own::over(libc::SYS_madvise, plain + 5 * P, 2 * P as usize, libc::MADV_DONTNEED);
    own::over(libc::SYS_munmap, plain + 20 * P, 4 * P as usize, 0);
    own::over(libc::SYS_mprotect, plain + 40 * P, 4 * P as usize, libc::PROT_READ);
    own::poke(holes + P, 77);
    own::over(libc::SYS_madvise, holes, 8 * P as usize, libc::MADV_DONTDUMP);
    own::over(libc::SYS_mprotect, constant, P as usize, RW);
    own::poke(constant, 99);
    own::over(libc::SYS_mprotect, constant, P as usize, libc::PROT_NONE);
    filled(12, PRIVATE, None);
}

/// Writes to its memory whenever a byte comes in, until its input ends.
fn obey(plain: u64) {
    let stdin = std::io::stdin();
    let mut byte = [0];
    while nix::unistd::read(&stdin, &mut byte).is_ok_and(|n| n > 0) {
        own::poke(plain + 10 * P, byte[0]);
        own::over(libc::SYS_madvise, plain + 60 * P, 2 * P as usize, libc::MADV_DONTNEED);
        own::poke(plain + 61 * P, byte[0]);
        filled(5, PRIVATE, None);
        println!("written");
    }
}

/// Whether one of its threads waits for its end.
fn reads(pid: i32) -> bool {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    threads.flatten().any(|t| std::fs::read_to_string(t.path().join("wchan")).is_ok_and(|w| w.contains("pipe_read")))
}

struct Victim {
    process: Child,
    lines: Lines<BufReader<ChildStdout>>,
    parent: HostPid,
    child: HostPid,
}

impl Victim {
    fn start() -> Victim {
        let mut process = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "memory::tests::victim", "--ignored", "--nocapture", "--test-threads=1"])
            .env("ZAP_TEST_VICTIM", "1")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(process.stdout.take().unwrap()).lines();
        let mut said: Vec<String> = Vec::new();
        while !(said.iter().any(|l| l.contains("changed")) && said.iter().any(|l| l.contains("victims "))) {
            said.push(lines.next().unwrap().unwrap());
        }
        let line = said.iter().find(|l| l.contains("victims ")).unwrap();
        let pids: Vec<i32> = line.split_whitespace().filter_map(|w| w.parse().ok()).collect();
        let victim = Victim { process, lines, parent: HostPid(pids[0]), child: HostPid(pids[1]) };
        victim.settle();
        victim
    }

    /// Waits until its thread waits for input: nothing of it changes any more.
    fn settle(&self) {
        while !reads(self.parent.0) {
            std::thread::yield_now();
        }
    }

    fn write(&mut self, byte: u8) {
        std::io::Write::write_all(self.process.stdin.as_mut().unwrap(), &[byte]).unwrap();
        while !self.lines.next().unwrap().unwrap().contains("written") {}
        self.settle();
    }
}

impl Drop for Victim {
    fn drop(&mut self) {
        drop(self.process.stdin.take());
        self.process.wait().unwrap();
    }
}

fn subject(host: HostPid) -> Subject {
    Subject { host, pod: PodPid(host.0), command: "victim".into() }
}

type Known = HashMap<FileId, std::fs::File>;

/// Files of this host's root are no business of a test of memory: they get numbers of their own.
fn know(look: &mut Look<'_>, host: HostPid, seen: &Survey, known: &mut Known) {
    let file = |m: &&Mapping| m.nature() == Nature::File && !m.path.ends_with(b" (deleted)");
    for m in seen.mappings.iter().filter(file) {
        let opened = std::fs::File::open(host.proc(&format!("map_files/{:x}-{:x}", m.start, m.end))).unwrap();
        let id = FileId(1000 + known.len() as u32);
        // as it is known from a mapping, and as the executable is known
        let device = std::os::unix::fs::MetadataExt::dev(&opened.metadata().unwrap());
        look.mapped.met.entry((m.device, m.inode, m.path.clone(), false)).or_insert(id);
        let id = look.mapped.met[&(m.device, m.inode, m.path.clone(), false)];
        look.mapped.met.insert((device, m.inode, m.path.clone(), false), id);
        known.entry(id).or_insert(opened);
    }
}

fn take(
    look: &mut Look<'_>,
    host: HostPid,
    parent: Option<&Captured>,
    known: &mut Known,
    ahead: Option<&Ahead>,
) -> Captured {
    let seen = survey(host, &Arc::new(layout_of(host).unwrap()), &[], (ahead, &[])).unwrap();
    know(look, host, &seen, known);
    let heap = seen.mappings.iter().find(|m| m.path == b"[heap]").unwrap();
    let request = Request { subject: &subject(host), brk: heap.end, parent };
    let mut captured = capture(look, &request, seen).unwrap();
    read_all(look.data, [&mut captured]).unwrap();
    captured
}

/// A process that will become something else: prepared as a seed is.
struct Seed {
    process: Child,
    held: Held,
    ground: Ground,
    keep: Range<u64>,
}

const MARKER: i32 = libc::SIGURG;
const SEAT: usize = 512 << 10;

fn name(pid: i32) -> ThreadName {
    ThreadName { host: HostPid(pid), pod: PodPid(pid), own: (pid, pid) }
}

fn sleeping(place: u64) -> Seed {
    let mut sleeper = Command::new("sleep");
    // a registered rseq area must not be unmapped
    let process = sleeper.arg("1000").env("GLIBC_TUNABLES", "glibc.pthread.rseq=0").spawn().unwrap();
    let host = HostPid(process.id() as i32);
    while !std::fs::read_to_string(host.proc("wchan")).unwrap().contains("nanosleep") {
        std::thread::yield_now();
    }
    let mut held = seize(name(host.0), 0).unwrap().wait().unwrap();
    let vdso = mappings(host).unwrap().into_iter().find(|m| m.path == b"[vdso]").unwrap();
    let read = || {
        let mut bytes = vec![0; (vdso.end - vdso.start) as usize];
        std::fs::File::open(host.proc("mem")).unwrap().read_exact_at(&mut bytes, vdso.start).unwrap();
        bytes
    };
    let before = read();
    let scratch = place + P..place + P + SEAT as u64;
    let both = (host, PodPid(host.0));
    let site = Site::find(both, vdso.start..vdso.end).unwrap();
    let ground = Ground::prepare(&mut held, site, scratch.clone(), SEAT, MARKER).unwrap();
    // the stub moves from the vDSO, which will go, to a page of its own
    let tail = before.iter().rposition(|b| *b != 0).unwrap() / 16 * 16 + 16;
    let mut batch = Batch::new();
    let (protection, flags) = (libc::PROT_READ | libc::PROT_EXEC, PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED);
    let args = [place.into(), P.into(), protection.into(), flags.into(), (-1).into(), 0u64.into()];
    batch.call(libc::SYS_mmap, args, "mapping the stub");
    held.run(&ground, 0, &batch).unwrap();
    ground.memory().write_all_at(&read()[tail..], place).unwrap();
    let ground = Ground::brought(both, place, scratch.clone(), SEAT, MARKER).unwrap();
    Seed { process, held, ground, keep: place..scratch.end }
}

fn run_all(held: &mut Held, ground: &Ground, batches: &[MemoryBatch]) {
    for batch in batches {
        assert!(batch.batch.size() <= SEAT, "{}", batch.batch.size());
        let results = held.run(ground, 0, &batch.batch).unwrap();
        batch.check(&results).unwrap();
    }
}

impl Drop for Seed {
    fn drop(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }
}

/// Ends a process of the test when the test ends.
struct Ended(i32);

impl Drop for Ended {
    fn drop(&mut self) {
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(self.0), nix::sys::signal::Signal::SIGKILL).unwrap();
    }
}

/// A line of `smaps` as far as a restart promises it.
type Line = (Range<u64>, i32, bool, u64, Vec<u8>, u32);

fn lines(host: HostPid, ours: &[Range<u64>]) -> Vec<Line> {
    let found = survey(host, &Arc::new(layout_of(host).unwrap()), ours, (None, &[])).unwrap().mappings;
    let mut lines: Vec<Line> = Vec::new();
    for m in found.iter().cloned() {
        let offset = if m.inode == 0 { 0 } else { m.offset };
        let line = (m.start..m.end, m.protection, m.shared, offset, m.path, m.flags.known & capture::CARRIED);
        match lines.last_mut() {
            // the kernel may join neighbours that are alike, or not
            Some(l)
                if l.0.end == line.0.start
                    && m.inode == 0
                    && (l.1, l.2, &l.4, l.5) == (line.1, line.2, &line.4, line.5) =>
            {
                l.0.end = line.0.end
            }
            _ => lines.push(line),
        }
    }
    lines
}

fn contents(host: HostPid, state: &MemoryState) -> HashMap<u64, Vec<u8>> {
    let memory = std::fs::File::open(host.proc("mem")).unwrap();
    let mut pages = HashMap::new();
    for run in &state.pages {
        for address in (run.start..run.end).step_by(P as usize) {
            let mut page = vec![0; P as usize];
            memory.read_exact_at(&mut page, address).unwrap();
            pages.insert(address, page);
        }
    }
    pages
}

fn compare(old: HostPid, new: HostPid, state: &MemoryState, keep: &Range<u64>) {
    let (before, after) = (lines(old, &[]), lines(new, std::slice::from_ref(keep)));
    for (a, b) in before.iter().zip(&after) {
        assert_eq!(a, b, "{} / {}", String::from_utf8_lossy(&a.4), String::from_utf8_lossy(&b.4));
    }
    assert_eq!(before.len(), after.len());
    assert!(contents(old, state) == contents(new, state), "contents differ");
    let ours = std::slice::from_ref(keep);
    let (before, after) = (
        survey(old, &Arc::new(layout_of(old).unwrap()), &[], (None, &[])).unwrap(),
        survey(new, &Arc::new(layout_of(new).unwrap()), ours, (None, &[])).unwrap(),
    );
    assert_eq!(before.fields, after.fields);
    assert_eq!(std::fs::read_link(old.proc("exe")).unwrap(), std::fs::read_link(new.proc("exe")).unwrap());
    let there = |s: &Survey| {
        let kernel =
            s.mappings.iter().filter(|m| m.nature() == Nature::Kernel).map(|m| m.start..m.end).chain([keep.clone()]);
        let kernel = ranges::joined(kernel.collect());
        let all = ranges::joined(s.regions.iter().map(|r| r.start..r.end).collect());
        all.into_iter().flat_map(|r| ranges::without(r, &kernel)).collect::<Vec<_>>()
    };
    assert_eq!(there(&before), there(&after), "the pages that are there");
}

/// How many pages child and parent share copy-on-write.
fn shared(parent: HostPid, child: HostPid, state: &MemoryState) -> u64 {
    let pagemap = |host: HostPid| std::fs::File::open(host.proc("pagemap")).unwrap();
    let own = pages::runs(&state.pages);
    let all = Frames::read(&pagemap(child), &own).unwrap().shared_with(&pagemap(parent), &own).unwrap();
    all.iter().map(|r| (r.end - r.start) / P).sum()
}

/// Descriptors of ours as they are inherited by what we spawn.
fn pool(files: &FileTable, known: &Known, data: i32) -> (HashMap<FileId, i32>, i32) {
    let inheritable =
        |fd: std::os::fd::BorrowedFd<'_>| nix::fcntl::fcntl(fd, nix::fcntl::FcntlArg::F_DUPFD(600)).unwrap();
    let mut numbers = HashMap::new();
    for state in files.states() {
        let file = files.file(state.id).unwrap();
        numbers.insert(state.id, inheritable(std::os::fd::AsFd::as_fd(&*file)));
    }
    for (id, file) in known {
        numbers.insert(*id, inheritable(std::os::fd::AsFd::as_fd(file)));
    }
    let data = std::fs::File::open(format!("/proc/self/fd/{data}")).unwrap();
    (numbers, inheritable(std::os::fd::AsFd::as_fd(&data)))
}

#[test]
fn memory_of_every_sort_is_made_again() {
    let victim = Victim::start();
    let (spec, mut sink) = (spec(), DataSink::default());
    let mut look = Look::new(&spec, HostPid(std::process::id() as i32), &mut sink, Console::None, false);
    let mut known = Known::new();
    let parent = take(&mut look, victim.parent, None, &mut known, None);
    let child = take(&mut look, victim.child, Some(&parent), &mut known, None);
    let sources = |s: &MemoryState| {
        s.pages.iter().filter(|r| r.source == PageSource::Parent).map(|r| (r.end - r.start) / P).sum::<u64>()
    };
    assert!(sources(&child.state) > 200 && sources(&parent.state) == 0);
    assert!(child.state.stored_bytes() < 60 * P, "{}", child.state.stored_bytes());
    let files = std::mem::take(&mut look.files);
    drop(look);
    let image = ImageReader::of_sink(sink).unwrap();
    let (numbers, data) = pool(&files, &known, image.data_file().unwrap().as_raw_fd());
    let place = free_gap([&parent.state, &child.state], SEAT as u64 + P).unwrap();
    let mut seed = sleeping(place);
    let host = seed.held.name.host;
    let numbers = |id: FileId| numbers[&id];
    let target = Target {
        state: &parent.state,
        current: &mapped(host),
        inherited: None,
        keep: seed.keep.clone(),
        pool: &numbers,
        data,
    };
    run_all(&mut seed.held, &seed.ground, &rebuild_batches(&target).unwrap());
    let mut batch = Batch::new();
    let flags = libc::CLONE_PTRACE as u64 | libc::SIGCHLD as u64;
    let clone =
        batch.call(libc::SYS_clone, [flags.into(), 0u64.into(), 0u64.into(), 0u64.into(), 0u64.into()], "forking");
    let born = seed.held.run(&seed.ground, 0, &batch).unwrap().get(clone) as i32;
    let _ended = Ended(born);
    let mut second = Seized::newborn(name(born)).wait().unwrap();
    let ground =
        Ground::brought((HostPid(born), PodPid(born)), seed.keep.start, seed.ground.scratch(), SEAT, MARKER).unwrap();
    let target =
        Target { state: &child.state, current: &mapped(HostPid(born)), inherited: Some(&parent.state), ..target };
    run_all(&mut second, &ground, &rebuild_batches(&target).unwrap());
    run_all(&mut second, &ground, &late_batch(&child.state));
    run_all(&mut seed.held, &seed.ground, &late_batch(&parent.state));
    compare(victim.parent, host, &parent.state, &seed.keep);
    compare(victim.child, HostPid(born), &child.state, &seed.keep);
    let before = shared(victim.parent, victim.child, &child.state);
    let after = shared(host, HostPid(born), &child.state);
    println!("shared copy-on-write: {before} pages before, {after} after");
    assert!(after >= before && before > 200);
}

fn mapped(host: HostPid) -> Vec<std::ops::Range<u64>> {
    mappings(host).unwrap().iter().map(|m| m.start..m.end).collect()
}

/// A userfaultfd made by the process itself.
fn userfault(host: HostPid, thread: HostPid) -> std::os::fd::OwnedFd {
    let name = ThreadName { own: (host.0, thread.0), ..name(thread.0) };
    let mut held = seize(name, 0).unwrap().wait().unwrap();
    let vdso = mappings(host).unwrap().into_iter().find(|m| m.path == b"[vdso]").unwrap();
    let scratch = 0x10_0000_0000..0x10_0000_0000 + SEAT as u64;
    let both = (host, PodPid(host.0));
    let site = Site::find(both, vdso.start..vdso.end).unwrap();
    let ground = Ground::prepare(&mut held, site, scratch, SEAT, MARKER).unwrap();
    let mut batch = Batch::new();
    let made = ask_for_tracking(&mut batch);
    let number = held.run(&ground, 0, &batch).unwrap().get(made);
    assert!(number >= 0, "{number}");
    let file = crate::sys::pidfd::PidFd::open(host).unwrap().get(number as i32).unwrap();
    let mut batch = Batch::new();
    batch.call(libc::SYS_close, [(number as u64).into()], "closing");
    held.run(&ground, 0, &batch).unwrap();
    ground.clear(&mut held).unwrap();
    held.let_go().unwrap();
    file
}

/// The contents that an image would give back.
fn stored(image: &ImageReader, state: &MemoryState) -> HashMap<u64, Vec<u8>> {
    let mut pages = HashMap::new();
    for run in &state.pages {
        let PageSource::Data(offset) = run.source else { continue };
        for address in (run.start..run.end).step_by(P as usize) {
            let place = crate::image::DataRef { offset: offset + (address - run.start), length: P };
            pages.insert(address, image.read(place).unwrap());
        }
    }
    pages
}

#[test]
fn what_is_followed_is_copied_once() {
    let mut victim = Victim::start();
    let (spec, mut sink) = (spec(), DataSink::default());
    let mut look = Look::new(&spec, HostPid(std::process::id() as i32), &mut sink, Console::None, false);
    let thread = own_thread(victim.parent);
    let mut ahead = Ahead::begin(victim.parent, Handle::new(userfault(victim.parent, thread)).unwrap(), &[]).unwrap();
    victim.settle();
    let first = look.data.stream(|feed| ahead.round(feed, &subject(victim.parent), None)).unwrap().unwrap();
    let idle = look.data.stream(|feed| ahead.round(feed, &subject(victim.parent), None)).unwrap().unwrap();
    victim.write(51);
    let second = look.data.stream(|feed| ahead.round(feed, &subject(victim.parent), None)).unwrap().unwrap();
    println!("rounds: {first:?} {idle:?} {second:?}");
    assert!(first.copied > 300 * P && idle.copied <= 8 * P && second.copied <= 32 * P);
    victim.write(77);
    let before = look.data.end();
    let captured = take(&mut look, victim.parent, None, &mut Known::new(), Some(&ahead));
    // Modified pages of private file mappings are not followed: how many there are depends on the size of this program.
    let in_hold = captured.state.pages.iter().filter(|run| matches!(run.source, PageSource::Data(at) if at >= before));
    let anonymous = |run: &&PageRun| {
        let vma = captured.state.vmas.iter().find(|vma| vma.range().contains(&run.start));
        vma.is_some_and(|vma| vma.backing == Backing::Anonymous)
    };
    let followed: u64 = in_hold.filter(anonymous).map(|run| (run.end - run.start) / P).sum();
    println!("in the hold: {followed} of {} pages", (look.data.end() - before) / P);
    assert!((1..=40).contains(&followed), "{followed} pages");
    drop(look);
    let image = ImageReader::of_sink(sink).unwrap();
    assert!(stored(&image, &captured.state) == contents(victim.parent, &captured.state));
}

#[test]
fn what_was_followed_can_be_followed_again() {
    let mut victim = Victim::start();
    let (spec, mut sink) = (spec(), DataSink::default());
    let look = Look::new(&spec, HostPid(std::process::id() as i32), &mut sink, Console::None, false);
    let handle = Handle::new(userfault(victim.parent, own_thread(victim.parent))).unwrap();
    victim.settle();
    let smaps = victim.parent.proc("smaps");
    let is_watched = || std::fs::read_to_string(&smaps).unwrap().contains(" uw");
    for value in [51, 77] {
        let mut ahead = Ahead::begin(victim.parent, handle.clone(), &[]).unwrap();
        let all = look.data.stream(|feed| ahead.round(feed, &subject(victim.parent), None)).unwrap().unwrap();
        let idle = look.data.stream(|feed| ahead.round(feed, &subject(victim.parent), None)).unwrap().unwrap();
        assert!(is_watched());
        victim.write(value);
        let written = look.data.stream(|feed| ahead.round(feed, &subject(victim.parent), None)).unwrap().unwrap();
        println!("rounds: {all:?} {idle:?} {written:?}");
        assert!(all.copied > 300 * P && idle.copied <= 8 * P && (P..=32 * P).contains(&written.copied));
        drop(ahead);
        // Between checkpoints it costs the process nothing.
        assert!(!is_watched());
    }
}

/// The thread that obeys.
fn own_thread(host: HostPid) -> HostPid {
    let threads = std::fs::read_dir(host.proc("task")).unwrap().flatten();
    let mut reading =
        threads.filter(|t| std::fs::read_to_string(t.path().join("wchan")).unwrap().contains("pipe_read"));
    HostPid(reading.next().unwrap().file_name().to_str().unwrap().parse().unwrap())
}
