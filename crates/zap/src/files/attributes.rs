//! Extended attributes of files that travel without a name. (Those of files that have one are in the layers.)

use std::ffi::OsStr;
use std::io;
use std::os::fd::BorrowedFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use serde_bytes::ByteBuf;
use xattr::FileExt as _;

use crate::layer::labelled;

/// Names and values.
pub type Attributes = Vec<(ByteBuf, ByteBuf)>;

/// The attributes of an open file.
pub(super) fn take(file: BorrowedFd<'_>) -> io::Result<Attributes> {
    let file = std::fs::File::from(file.try_clone_to_owned()?);
    let names = match file.list_xattr() {
        Err(e) if e.raw_os_error() == Some(libc::ENOTSUP) => return Ok(Attributes::new()),
        names => names?,
    };
    let mut attributes = Attributes::new();
    for name in names {
        if let Some(value) = file.get_xattr(&name)? {
            attributes.push((ByteBuf::from(name.into_vec()), ByteBuf::from(value)));
        }
    }
    Ok(attributes)
}

/// Gives them to a file.
pub(super) fn put(file: BorrowedFd<'_>, attributes: &Attributes) -> io::Result<()> {
    if attributes.is_empty() {
        return Ok(());
    }
    let file = std::fs::File::from(file.try_clone_to_owned()?);
    for (name, value) in attributes {
        labelled(name, file.set_xattr(OsStr::from_bytes(name), value))?;
    }
    Ok(())
}
