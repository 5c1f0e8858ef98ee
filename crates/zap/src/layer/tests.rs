use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::Path;

use nix::sys::stat::{Mode, SFlag, mknod};
use proptest::prelude::*;

use super::format::{self, Entry, Facts, Kind, TITLE, What};
use super::*;

/// Everything that can be seen of a tree, by path. In which order a directory lists what is in it is the file system's affair,
/// and what was packed twice was made twice.
fn portrait(top: &Path) -> BTreeMap<Vec<u8>, String> {
    let mut seen = BTreeMap::new();
    let directory = File::open(top).unwrap();
    tree::walk(directory.as_fd(), &mut |met| {
        let s = met.stat;
        let path = tree::magic_path(met.directory, met.name);
        let mut attributes: Vec<_> =
            xattr::list(&path).unwrap().map(|n| (n.clone(), xattr::get(&path, n).unwrap())).collect();
        attributes.sort();
        let contents = match s.st_mode & libc::S_IFMT {
            libc::S_IFREG => format!("{:?} {}", blake3::hash(&fs::read(&path).unwrap()), s.st_blocks / 64),
            libc::S_IFLNK => fs::read_link(&path).unwrap().display().to_string(),
            libc::S_IFDIR => String::new(),
            _ => format!("{}", s.st_rdev),
        };
        let size = if s.st_mode & libc::S_IFMT == libc::S_IFDIR { 0 } else { s.st_size };
        let links = if s.st_mode & libc::S_IFMT == libc::S_IFDIR { 0 } else { s.st_nlink };
        let facts = (s.st_mode, s.st_uid, s.st_gid, links, s.st_mtime, s.st_mtime_nsec, size, attributes);
        seen.insert(met.path.to_vec(), (s.st_ino, format!("{facts:?} {contents}")));
        Ok(())
    })
    .unwrap();
    let mut numbers: BTreeMap<u64, usize> = BTreeMap::new();
    let numbered = seen.into_iter().map(|(path, (inode, facts))| {
        let next = numbers.len();
        (path, format!("file {} {facts}", numbers.entry(inode).or_insert(next)))
    });
    numbered.collect()
}

fn tree_of_every_sort(top: &Path) {
    let at = |name: &str| top.join(name);
    fs::create_dir_all(at("a/b/empty")).unwrap();
    fs::write(at("a/plain"), "some text").unwrap();
    fs::set_permissions(at("a/plain"), fs::Permissions::from_mode(0o4751)).unwrap();
    std::os::unix::fs::chown(at("a/plain"), Some(12), Some(34)).unwrap();
    fs::set_permissions(at("a/plain"), fs::Permissions::from_mode(0o4751)).unwrap();
    fs::hard_link(at("a/plain"), at("a/b/same")).unwrap();
    symlink("../nowhere", at("a/link")).unwrap();
    File::create(at("a/holes")).unwrap().write_all_at(b"end", 40 << 20).unwrap();
    mknod(&at("a/fifo"), SFlag::S_IFIFO, Mode::S_IRUSR, 0).unwrap();
    mknod(&at("a/whiteout"), SFlag::S_IFCHR, Mode::empty(), 0).unwrap();
    mknod(&at("a/null"), SFlag::S_IFCHR, Mode::S_IRUSR, libc::makedev(1, 3)).unwrap();
    std::os::unix::net::UnixListener::bind(at("a/socket")).unwrap();
    xattr::set(at("a/b"), "trusted.overlay.opaque", b"y").unwrap();
    xattr::set(at("a/b/empty"), "trusted.overlay.redirect", b"/x").unwrap();
    fs::write(at("a/b/name \u{1}\n\\"), vec![7; 3_000_000]).unwrap();
    let old = nix::sys::time::TimeSpec::new(1_000_000_000, 123_456_789);
    nix::sys::stat::utimensat(
        nix::fcntl::AT_FDCWD,
        &at("a/b"),
        &old,
        &old,
        nix::sys::stat::UtimensatFlags::NoFollowSymlink,
    )
    .unwrap();
}

fn change(top: &Path) {
    let at = |name: &str| top.join(name);
    fs::write(at("a/b/same"), "other text").unwrap();
    fs::remove_file(at("a/fifo")).unwrap();
    fs::remove_dir(at("a/b/empty")).unwrap();
    fs::write(at("a/b/empty"), "now a file").unwrap();
    fs::remove_file(at("a/link")).unwrap();
    fs::create_dir(at("a/link")).unwrap();
    fs::write(at("a/link/new"), "").unwrap();
    fs::rename(at("a/holes"), at("moved")).unwrap();
    xattr::set(at("a"), "trusted.overlay.impure", b"y").unwrap();
}

fn directory() -> tempfile::TempDir {
    tempfile::tempdir_in("/var/tmp").unwrap()
}

#[test]
fn a_tree_of_every_sort_comes_back() {
    for home in ["/var/tmp", "/dev/shm"] {
        let (from, into) = (tempfile::tempdir_in(home).unwrap(), tempfile::tempdir_in(home).unwrap());
        tree_of_every_sort(from.path());
        let mut archive = Vec::new();
        let index = pack(from.path(), &mut archive).unwrap();
        pack_changes(from.path(), index, &Inodes::new(), &mut archive).unwrap();
        assert!(archive.len() < 10_000_000, "holes are left out: {}", archive.len());
        fs::write(into.path().join("a"), "in the way").unwrap();
        unpack(&mut &archive[..], into.path()).unwrap();
        let (before, after) = (portrait(from.path()), portrait(into.path()));
        for (path, facts) in &before {
            assert_eq!(Some(facts), after.get(path), "{}", String::from_utf8_lossy(path));
        }
        assert_eq!(before.len(), after.len());
    }
}

#[test]
fn only_changes_are_added() {
    let (from, into) = (directory(), directory());
    tree_of_every_sort(from.path());
    let mut archive = Vec::new();
    std::thread::sleep(std::time::Duration::from_millis(25)); // for files to be older than a tick
    let index = pack(from.path(), &mut archive).unwrap();
    let whole = archive.len();
    change(from.path());
    let mapped = fs::metadata(from.path().join("a/null")).unwrap();
    let always = Inodes::from([(mapped.dev(), mapped.ino())]);
    pack_changes(from.path(), index, &always, &mut archive).unwrap();
    assert!(archive.len() - whole < 10_000, "{} bytes were added", archive.len() - whole);
    unpack(&mut &archive[..], into.path()).unwrap();
    assert_eq!(portrait(from.path()), portrait(into.path()));
}

/// A large file that is written to all the time is packed whole once, and block by block from then on.
#[test]
fn blocks_that_differ_are_added() {
    for home in ["/var/tmp", "/dev/shm"] {
        let (from, into) = (tempfile::tempdir_in(home).unwrap(), tempfile::tempdir_in(home).unwrap());
        let path = from.path().join("log");
        let log = File::create(&path).unwrap();
        log.write_all_at(&vec![1; 3 << 20], 0).unwrap();
        log.write_all_at(b"far", 9 << 20).unwrap();
        let mut archive = Vec::new();
        let mut index = pack(from.path(), &mut archive).unwrap();
        assert!(index.has_large());
        log.write_all_at(b"first", 70_000).unwrap();
        let added = follow(from.path(), &mut index, &mut archive).unwrap();
        assert!((1..200_000).contains(&added), "{added} bytes were added");
        log.write_all_at(b"second", 1 << 20).unwrap();
        let added = follow(from.path(), &mut index, &mut archive).unwrap();
        assert!((1..200_000).contains(&added), "{added} bytes were added");
        let before = archive.len();
        // In the hold: something in the middle, something at the end, and a hole where something was.
        log.write_all_at(b"third", 2 << 20).unwrap();
        log.write_all_at(b"end", 12 << 20).unwrap();
        let hole = nix::fcntl::FallocateFlags::FALLOC_FL_PUNCH_HOLE | nix::fcntl::FallocateFlags::FALLOC_FL_KEEP_SIZE;
        nix::fcntl::fallocate(&log, hole, 256 << 10, 512 << 10).unwrap();
        pack_changes(from.path(), index, &Inodes::new(), &mut archive).unwrap();
        assert!(archive.len() - before < 400_000, "{} bytes were added", archive.len() - before);
        unpack(&mut &archive[..], into.path()).unwrap();
        assert_eq!(portrait(from.path()), portrait(into.path()));
    }
}

/// One that becomes another file, or gets another name, is not taken for what it was.
#[test]
fn blocks_are_those_of_one_file() {
    let (from, into) = (directory(), directory());
    let at = |name: &str| from.path().join(name);
    for (name, byte) in [("replaced", 1), ("linked", 2), ("shrunk", 3), ("moved", 4)] {
        fs::write(at(name), vec![byte; 2 << 20]).unwrap();
    }
    let mut archive = Vec::new();
    let mut index = pack(from.path(), &mut archive).unwrap();
    for name in ["replaced", "linked", "shrunk", "moved"] {
        File::options().write(true).open(at(name)).unwrap().write_all_at(b"x", 5).unwrap();
    }
    follow(from.path(), &mut index, &mut archive).unwrap();
    fs::write(at("new"), vec![5; 2 << 20]).unwrap();
    fs::rename(at("new"), at("replaced")).unwrap();
    fs::hard_link(at("linked"), at("other name")).unwrap();
    File::options().write(true).open(at("shrunk")).unwrap().set_len(1_500_001).unwrap();
    fs::rename(at("moved"), at("there")).unwrap();
    pack_changes(from.path(), index, &Inodes::new(), &mut archive).unwrap();
    unpack(&mut &archive[..], into.path()).unwrap();
    assert_eq!(portrait(from.path()), portrait(into.path()));
}

#[test]
fn bytes_of_what_is_no_file_do_not_differ() {
    let into = directory();
    let patched = |path: &[u8], changed| {
        let facts = Facts { mode: 0o755, ..Facts::default() };
        Entry { path: path.into(), what: What::Patched { size: 4, stretches: vec![(0, 4)], changed, facts } }
    };
    let fifo = || entry(b"p", Kind::Node(libc::S_IFIFO, 0));
    let file = || entry(b"f", Kind::Regular(0, Vec::new()));
    for hostile in [
        vec![fifo(), patched(b"p", vec![])],
        vec![patched(b"missing", vec![])],
        vec![file(), patched(b"f", vec![(2, 3)])],
        vec![file(), patched(b"f", vec![(u64::MAX, 3)])],
    ] {
        assert!(unpack(&mut &archive(hostile)[..], into.path()).is_err());
    }
}

fn archive(entries: Vec<Entry>) -> Vec<u8> {
    let mut out = TITLE.to_vec();
    for entry in entries {
        format::write(&mut out, &entry).unwrap();
    }
    format::write(&mut out, &Entry { path: Vec::new(), what: What::End }).unwrap();
    out
}

fn entry(path: &[u8], kind: Kind) -> Entry {
    Entry { path: path.into(), what: What::File(kind, Facts { mode: 0o755, ..Facts::default() }) }
}

#[test]
fn nothing_is_made_outside() {
    let (outside, into) = (directory(), directory());
    let target = outside.path().as_os_str().as_encoded_bytes().to_vec();
    let file = || Kind::Regular(0, Vec::new());
    for path in [&b"../x"[..], b"/x", b"a/../../x", b".", b"..", b"a//x", b"", b"x/", b"a/./x"] {
        let top = path.is_empty();
        let kind = if top { file() } else { Kind::Node(libc::S_IFIFO, 0) };
        let hostile = archive(vec![entry(b"a", Kind::Directory), entry(path, kind)]);
        assert!(unpack(&mut &hostile[..], into.path()).is_err(), "{}", String::from_utf8_lossy(path));
    }
    let through_link = archive(vec![entry(b"l", Kind::Symlink(target.clone())), entry(b"l/x", file())]);
    assert!(unpack(&mut &through_link[..], into.path()).is_err());
    let link_outside = Entry { path: b"h".into(), what: What::Link(b"l/x".into()) };
    fs::write(outside.path().join("x"), "theirs").unwrap();
    let linked = archive(vec![entry(b"l", Kind::Symlink(target)), link_outside]);
    assert!(unpack(&mut &linked[..], into.path()).is_err());
    assert_eq!(fs::read(outside.path().join("x")).unwrap(), b"theirs");
    assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 1);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_damaged_archive_makes_no_panic(place in any::<prop::sample::Index>(), byte: u8, cut: bool) {
        let (from, into) = (directory(), directory());
        fs::create_dir(from.path().join("d")).unwrap();
        fs::write(from.path().join("d/f"), "text").unwrap();
        symlink("f", from.path().join("d/l")).unwrap();
        let mut bytes = Vec::new();
        let index = pack(from.path(), &mut bytes).unwrap();
        pack_changes(from.path(), index, &Inodes::new(), &mut bytes).unwrap();
        let place = place.index(bytes.len());
        if cut { bytes.truncate(place) } else { bytes[place] = byte }
        let result = unpack(&mut &bytes[..], into.path());
        prop_assert!(!cut || result.is_err());
    }
}

#[test]
fn names_are_bytes() {
    let name = CString::new(b"\xff\xfe".to_vec()).unwrap();
    let (from, into) = (directory(), directory());
    let directory = File::open(from.path()).unwrap();
    fs::write(tree::magic_path(directory.as_fd(), &name), "x").unwrap();
    let mut bytes = Vec::new();
    let index = pack(from.path(), &mut bytes).unwrap();
    pack_changes(from.path(), index, &Inodes::new(), &mut bytes).unwrap();
    unpack(&mut &bytes[..], into.path()).unwrap();
    assert_eq!(portrait(from.path()), portrait(into.path()));
}
