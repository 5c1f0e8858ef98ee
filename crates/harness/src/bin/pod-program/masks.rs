//! What transcripts leave out, because a checkpoint may be told by it: each item is for the row of `docs/differences.md` that
//! begins so and has the mark †, which a test compares.

use std::path::Path;

use harness::program::Kind;
use nix::sys::inotify::Inotify;

/// Row: inode, device and mount numbers
///
/// A link to what has no name but a number, without that (`pipe:[123]`).
pub(crate) fn without_number(link: &str) -> &str {
    match link.split_once(":[") {
        Some((kind, number)) if number.starts_with(|c: char| c.is_ascii_digit()) => kind,
        _ => link,
    }
}

/// Row: a text of `/proc` that is half read
///
/// What a small file of `/proc` shows, in one read.
pub(crate) fn shown(path: impl AsRef<Path>) -> String {
    let mut bytes = vec![0; 64 << 10];
    let read = std::fs::File::open(path).and_then(|mut file| std::io::Read::read(&mut file, &mut bytes));
    String::from_utf8_lossy(&bytes[..read.unwrap_or(0)]).into_owned()
}

/// Row: two neighbouring mappings
///
/// Pages as they are, whichever mappings they belong to: those that are alike in one word.
pub(crate) fn by_page(pages: &[String]) -> String {
    pages.chunk_by(|one, other| one == other).map(|alike| format!(" {}x {}", alike.len(), alike[0])).collect()
}

/// Row: private memory of which no page is there
///
/// Flags of mappings in `smaps`: those that a program sets, not what the kernel makes of it.
pub(crate) const MAPPING_FLAGS: [&str; 12] = ["sh", "gd", "lo", "sr", "rr", "dc", "ht", "dd", "wf", "mg", "nh", "hg"];

/// Row: an edge-triggered epoll
///
/// What a channel can be watched for besides contents: not for edges.
pub(crate) const WATCHED_FOR: [i32; 3] = [libc::EPOLLRDHUP, libc::EPOLLOUT, libc::EPOLLONESHOT];

/// Row: a one-shot of an epoll
///
/// Whether a channel tells if it is ready: what an epoll instance reports may be a one-shot's error once more.
pub(crate) fn tells_whether_ready(kind: Kind) -> bool {
    kind != Kind::Epoll
}

/// Row: unread events of inotify
///
/// Takes all that could be heard.
pub(crate) fn forget_events(inotify: &Inotify) {
    while inotify.read_events().is_ok() {}
}

/// Row: a child of a process is its first thread's
///
/// Of neighbours that tell of a parent's death the first: a parent that ends with several threads is told of once for each that
/// a child belongs to on the way, in whatever order the threads end.
pub(crate) fn one_death<T>(seen: &mut Vec<T>, is_of_death: impl Fn(&T) -> bool) {
    seen.dedup_by(|one, other| is_of_death(one) && is_of_death(other));
}

/// Row: a wait in a call that no stop restarts
///
/// Whether a stop has ended a wait, which is then begun again. That a checkpoint ends none the guests `waiting-calls` and its like
/// try, who forgive nothing.
pub(crate) fn is_of_a_stop(error: &std::io::Error) -> bool {
    error.kind() == std::io::ErrorKind::Interrupted
}
