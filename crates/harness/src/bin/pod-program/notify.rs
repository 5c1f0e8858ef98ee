//! An inotify instance and the directory that it watches.

use std::io;
use std::os::fd::OwnedFd;

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};

use super::channel::Channel;

/// One that watches a fresh directory of this name.
pub(super) fn open(directory: &str) -> io::Result<OwnedFd> {
    std::fs::create_dir(directory)?;
    let inotify = Inotify::init(InitFlags::IN_NONBLOCK)?;
    watch(&inotify, directory)?;
    Ok(inotify.into())
}

fn watch(inotify: &Inotify, directory: &str) -> nix::Result<String> {
    let events = AddWatchFlags::IN_CREATE | AddWatchFlags::IN_DELETE;
    inotify.add_watch(directory, events).map(|number| format!("{number:?}"))
}

/// Changes something in the directory, and tells what is heard of that; all that could be heard before is forgotten.
pub(super) fn change(channel: &Channel, number: usize) -> String {
    let Ok(descriptor) = channel.reader().try_clone_to_owned() else { return "no descriptor".into() };
    let inotify = super::raw::as_inotify(descriptor);
    super::masks::forget_events(&inotify);
    let path = format!("{}/{}", channel.path(), number % 4);
    let changed = match number % 3 {
        0 => std::fs::create_dir(&path).map(|()| watch(&inotify, &path)),
        1 => std::fs::write(&path, "").map(|()| Ok(String::new())),
        _ => std::fs::remove_file(&path).map(|()| Ok(String::new())),
    };
    let heard = inotify.read_events().unwrap_or_default();
    let heard: Vec<String> =
        heard.iter().map(|event| format!("{:?} {:?} {:?}", event.wd, event.mask, event.name)).collect();
    // Something for who comes after a checkpoint.
    let _ = std::fs::write(format!("{}/waits-{number}", channel.path()), "");
    format!("{:?} {heard:?}", changed.map_err(|error| error.kind()))
}
