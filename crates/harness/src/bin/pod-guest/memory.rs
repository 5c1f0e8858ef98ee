//! Memory: private, shared, of files, copied on write.

use crate::stage::*;

pub(crate) const KINDS: &[crate::stage::Kind] = &[
    ("private", private),
    ("shared-anonymous", shared_anonymous),
    ("file-private", file_private),
    ("file-shared", file_shared),
    ("file-deleted", file_deleted),
    ("copy-on-write", copy_on_write),
    ("huge-pages", huge_pages),
    ("heap", heap),
    ("big", big),
];

pub(crate) const PAGE: usize = 4096;
const READ_WRITE: i32 = libc::PROT_READ | libc::PROT_WRITE;

/// A mapping; `file` is -1 for none.
pub(crate) fn map(length: usize, protection: i32, flags: i32, file: i32) -> Result<*mut u8, String> {
    let address = unsafe { libc::mmap(std::ptr::null_mut(), length, protection, flags, file, 0) };
    done("mmap", address as i64).map(|address| address as *mut u8)
}

pub(crate) fn anonymous(length: usize) -> Result<*mut u8, String> {
    map(length, READ_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1)
}

pub(crate) fn shared(length: usize) -> Result<*mut u8, String> {
    map(length, READ_WRITE, libc::MAP_SHARED | libc::MAP_ANONYMOUS, -1)
}

pub(crate) fn protect(address: *mut u8, length: usize, protection: i32) -> Checked {
    done("mprotect", unsafe { libc::mprotect(address.cast(), length, protection) }).map(drop)
}

pub(crate) fn bytes<'a>(address: *mut u8, length: usize) -> &'a mut [u8] {
    unsafe { std::slice::from_raw_parts_mut(address, length) }
}

/// Fills memory with words that depend on place and `seed`.
pub(crate) fn fill(address: *mut u8, length: usize, seed: u64) {
    let words = unsafe { std::slice::from_raw_parts_mut(address.cast::<u64>(), length / 8) };
    words.iter_mut().enumerate().for_each(|(i, word)| *word = word_at(i, seed));
}

fn word_at(place: usize, seed: u64) -> u64 {
    (place as u64 + seed).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

pub(crate) fn check_filled(what: &str, address: *mut u8, length: usize, seed: u64) -> Checked {
    let words = unsafe { std::slice::from_raw_parts(address.cast::<u64>(), length / 8) };
    match words.iter().enumerate().position(|(i, word)| *word != word_at(i, seed)) {
        None => Ok(()),
        Some(place) => Err(format!("{what}: {:#x} at byte {:#x}", words[place], place * 8)),
    }
}

/// Private memory: contents, holes that stay zero, pages that are only read.
fn private() -> Checked {
    let memory = anonymous(64 * PAGE)?;
    fill(memory, 8 * PAGE, 1);
    let at = |page: usize| unsafe { memory.add(page * PAGE) };
    fill(at(20), PAGE, 2);
    fill(at(63), PAGE, 3);
    protect(at(4), 2 * PAGE, libc::PROT_READ)?;
    check(bytes(at(30), PAGE).iter().all(|b| *b == 0), "fresh memory is not zero")?;
    hold()?;
    check_filled("the beginning", memory, 8 * PAGE, 1)?;
    check_filled("page 20", at(20), PAGE, 2)?;
    check_filled("the end", at(63), PAGE, 3)?;
    check(bytes(at(21), 42 * PAGE).iter().all(|b| *b == 0), "a hole is not zero")?;
    unsafe { libc::madvise(at(20).cast(), PAGE, libc::MADV_DONTNEED) };
    check(bytes(at(20), PAGE).iter().all(|b| *b == 0), "memory given back is not zero")?;
    equal("the end of the mapping", unsafe { libc::munmap(memory.cast(), 64 * PAGE) }, 0)
}

/// Shared memory of no file: what one relative writes, the other reads, afterwards too.
fn shared_anonymous() -> Checked {
    let memory = shared(16 * PAGE)?;
    fill(memory, 16 * PAGE, 5);
    let set_up = Gate::new()?;
    let done = Gate::new()?;
    let child = fork(|| {
        fill(memory, PAGE, 6);
        set_up.open()?;
        await_go();
        check_filled("the child's page", memory, PAGE, 6)?;
        fill(unsafe { memory.add(2 * PAGE) }, PAGE, 7);
        done.open()
    })?;
    set_up.pass(1)?;
    hold()?;
    done.pass(1)?;
    check_filled("the page written before", memory, PAGE, 6)?;
    check_filled("the page written after", unsafe { memory.add(2 * PAGE) }, PAGE, 7)?;
    reap(child)
}

fn file_of(path: &str, pages: usize, seed: u64) -> Result<i32, String> {
    let memory = anonymous(pages * PAGE)?;
    fill(memory, pages * PAGE, seed);
    write(path, &*bytes(memory, pages * PAGE))?;
    unsafe { libc::munmap(memory.cast(), pages * PAGE) };
    let path = std::ffi::CString::new(path).map_err(|e| e.to_string())?;
    done("open", unsafe { libc::open(path.as_ptr(), libc::O_RDWR) }).map(|file| file as i32)
}

/// A private view of a file: its own pages and the file's.
fn file_private() -> Checked {
    let file = file_of("/tmp/viewed", 8, 11)?;
    let memory = map(8 * PAGE, READ_WRITE, libc::MAP_PRIVATE, file)?;
    unsafe { libc::close(file) };
    fill(unsafe { memory.add(3 * PAGE) }, PAGE, 12);
    hold()?;
    check_filled("the file's pages", memory, 3 * PAGE, 11)?;
    check_filled("the changed page", unsafe { memory.add(3 * PAGE) }, PAGE, 12)?;
    let text = std::fs::read("/tmp/viewed").map_err(|e| e.to_string())?;
    equal("the file itself", text[3 * PAGE..3 * PAGE + 8].to_vec(), word_at(3 * PAGE / 8, 11).to_ne_bytes().to_vec())
}

/// A shared view: writing to it changes the file.
fn file_shared() -> Checked {
    let file = file_of("/tmp/viewed", 8, 21)?;
    let memory = map(8 * PAGE, READ_WRITE, libc::MAP_SHARED, file)?;
    unsafe { libc::close(file) };
    fill(memory, PAGE, 22);
    hold()?;
    check_filled("the page written before", memory, PAGE, 22)?;
    fill(unsafe { memory.add(PAGE) }, PAGE, 23);
    let text = std::fs::read("/tmp/viewed").map_err(|e| e.to_string())?;
    equal("the file", text[PAGE..PAGE + 8].to_vec(), word_at(0, 23).to_ne_bytes().to_vec())
}

/// Views of a file that is not there any more, in two processes.
fn file_deleted() -> Checked {
    let file = file_of("/tmp/passing", 8, 31)?;
    let shared = map(8 * PAGE, READ_WRITE, libc::MAP_SHARED, file)?;
    let private = map(8 * PAGE, READ_WRITE, libc::MAP_PRIVATE, file)?;
    unsafe { libc::close(file) };
    std::fs::remove_file("/tmp/passing").map_err(|e| e.to_string())?;
    fill(private, PAGE, 33);
    let (set_up, written) = (Gate::new()?, Gate::new()?);
    let child = fork(|| {
        set_up.open()?;
        await_go();
        fill(unsafe { shared.add(7 * PAGE) }, PAGE, 32);
        written.open()
    })?;
    set_up.pass(1)?;
    hold()?;
    written.pass(1)?;
    check_filled("the file's pages", shared, 7 * PAGE, 31)?;
    check_filled("the child's page", unsafe { shared.add(7 * PAGE) }, PAGE, 32)?;
    check_filled("the private page", private, PAGE, 33)?;
    check(!std::path::Path::new("/tmp/passing").exists(), "the deleted file is back")?;
    reap(child)
}

/// Kilobytes of memory, what is shared counted in proportion, of some processes.
fn proportional(pids: &[i32]) -> Result<u64, String> {
    let one = |pid: &i32| {
        let text = read(format!("/proc/{pid}/smaps_rollup"))?;
        let line = text.lines().find_map(|line| line.strip_prefix("Pss_Anon:"));
        line.and_then(|l| l.trim().strip_suffix(" kB")?.parse::<u64>().ok()).ok_or_else(|| "no Pss".to_owned())
    };
    pids.iter().map(one).sum()
}

/// Memory that relatives share until one writes: each sees its own, and it is still shared.
fn copy_on_write() -> Checked {
    const PAGES: usize = 2048;
    let memory = anonymous(PAGES * PAGE)?;
    fill(memory, PAGES * PAGE, 41);
    let set_up = Gate::new()?;
    let mut pids = vec![std::process::id() as i32];
    for number in 0..3usize {
        pids.push(fork(|| {
            let own = unsafe { memory.add(number * 8 * PAGE) };
            fill(own, 8 * PAGE, 50 + number as u64);
            set_up.open()?;
            await_go();
            check_filled("a child's own pages", own, 8 * PAGE, 50 + number as u64)?;
            let others = number * 8 * PAGE;
            check_filled("pages before a child's own", memory, others, 41)?;
            let word = unsafe { memory.add((PAGES - 1) * PAGE).cast::<u64>().read() };
            equal("the last page", word, word_at((PAGES - 1) * PAGE / 8, 41))
        })?);
    }
    set_up.pass(3)?;
    let before = proportional(&pids)?;
    hold_and(|| {
        let now = proportional(&pids)?;
        check(now <= before + before / 10 + 256, format!("{now} kB of memory, {before} kB before"))
    })?;
    check_filled("the parent's pages", memory, PAGES * PAGE, 41)?;
    pids[1..].iter().try_for_each(|pid| reap(*pid))
}

/// Pages of 2 MiB: private ones, of which a child has its own, shared ones, and some that nobody can touch.
fn huge_pages() -> Checked {
    const HUGE: usize = 2 << 20;
    let flags = libc::MAP_ANONYMOUS | libc::MAP_HUGETLB;
    let private = map(2 * HUGE, READ_WRITE, flags | libc::MAP_PRIVATE, -1)?;
    let shared = map(2 * HUGE, READ_WRITE, flags | libc::MAP_SHARED, -1)?;
    map(HUGE, libc::PROT_NONE, flags | libc::MAP_PRIVATE | libc::MAP_NORESERVE, -1)?;
    let (behind, third) = (unsafe { private.add(HUGE / 2) }, unsafe { shared.add(3 * HUGE / 2) });
    fill(private, PAGE, 1);
    fill(behind, PAGE, 2);
    fill(shared, PAGE, 3);
    let set_up = Gate::new()?;
    let child = fork(|| {
        fill(behind, PAGE, 4);
        set_up.open()?;
        await_go();
        check_filled("what a child shares with its parent", private, PAGE, 1)?;
        check_filled("what it has written", behind, PAGE, 4)?;
        check_filled("what all share", shared, PAGE, 3)?;
        fill(third, PAGE, 5);
        Ok(())
    })?;
    set_up.pass(1)?;
    hold()?;
    reap(child)?;
    check_filled("the beginning", private, PAGE, 1)?;
    check_filled("the middle", behind, PAGE, 2)?;
    check_filled("what a child has written", third, PAGE, 5)?;
    check(bytes(unsafe { private.add(HUGE) }, HUGE).iter().all(|b| *b == 0), "what nobody wrote is not zero")
}

/// The heap of a child that allocates nothing else grows as before.
fn heap() -> Checked {
    let set_up = Gate::new()?;
    let child = fork(|| {
        let sbrk = |by: isize| unsafe { libc::sbrk(by) } as usize;
        let before = sbrk(5 * PAGE as isize);
        fill(before as *mut u8, 5 * PAGE, 61);
        let top = sbrk(0);
        set_up.open()?;
        await_go();
        equal("the top of the heap", sbrk(0), top)?;
        check_filled("the heap", before as *mut u8, 5 * PAGE, 61)?;
        equal("the heap grown", sbrk(3 * PAGE as isize), top)?;
        check(bytes(top as *mut u8, 3 * PAGE).iter().all(|b| *b == 0), "new heap is not zero")
    })?;
    set_up.pass(1)?;
    hold()?;
    reap(child)
}

/// More memory than fits into one read or one batch.
fn big() -> Checked {
    const LENGTH: usize = 48 << 20;
    let memory = anonymous(LENGTH)?;
    fill(memory, LENGTH, 71);
    // Every other page of a stretch: many short runs.
    let scattered = anonymous(4096 * PAGE)?;
    (0..2048).for_each(|i| fill(unsafe { scattered.add(i * 2 * PAGE) }, PAGE, i as u64));
    hold()?;
    check_filled("the big block", memory, LENGTH, 71)?;
    (0..2048).try_for_each(|i| {
        check_filled("a scattered page", unsafe { scattered.add(i * 2 * PAGE) }, PAGE, i as u64)?;
        check(bytes(unsafe { scattered.add((i * 2 + 1) * PAGE) }, PAGE).iter().all(|b| *b == 0), "a hole is not zero")
    })
}
