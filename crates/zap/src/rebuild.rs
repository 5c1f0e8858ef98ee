//! The context of a restart, in the *builder*: a short-lived process inside the new pod that opens every file
//! before the first process of the pod exists.

use std::any::Any;
use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use crate::error::RebuildError;
use crate::ids::FileId;
use crate::image::ImageReader;
use crate::pod::PodSpec;

/// What every `restart` is given. Lives in the builder: inside the pod's namespaces, as root, alone there with PID 1.
pub struct Rebuild<'a> {
    /// The image that is being restarted, its data readable.
    pub image: &'a ImageReader,
    /// The pod as it was born.
    pub spec: &'a PodSpec,
    /// The pod's ends of new console pipes: stdin (read), stdout, stderr (write). Empty when the console is a pty.
    pub console: Vec<OwnedFd>,
    /// The master of the console pty, left here by the kind that makes it; the builder hands it to the monitor.
    pub console_master: Option<OwnedFd>,
    files: HashMap<FileId, OwnedFd>,
    objects: HashMap<(&'static str, u64), Box<dyn Any>>,
}

impl<'a> Rebuild<'a> {
    /// A rebuild that has made nothing.
    pub fn new(image: &'a ImageReader, spec: &'a PodSpec, console: Vec<OwnedFd>) -> Rebuild<'a> {
        Rebuild { image, spec, console, console_master: None, files: HashMap::new(), objects: HashMap::new() }
    }

    /// Something that two files share (the pipe behind two ends), made by whoever comes first and kept under (kind, key).
    pub fn object<T: Any>(&mut self, kind: &'static str, key: u64) -> Option<&mut T> {
        self.objects.get_mut(&(kind, key)).and_then(|o| o.downcast_mut())
    }

    /// Keep `object` for the others that share it.
    pub fn keep_object<T: Any>(&mut self, kind: &'static str, key: u64, object: T) {
        self.objects.insert((kind, key), Box::new(object));
    }

    /// Put an opened file in the pool.
    pub fn keep_file(&mut self, id: FileId, file: OwnedFd) {
        self.files.insert(id, file);
    }

    /// A file of the pool; an error of the image if nothing of that number was opened.
    pub fn file(&self, id: FileId) -> Result<BorrowedFd<'_>, RebuildError> {
        self.files
            .get(&id)
            .map(|f| f.as_fd())
            .ok_or_else(|| RebuildError::Damaged(format!("{id} is referred to but is not in it")))
    }

    /// Every file of the pool.
    pub fn into_files(self) -> HashMap<FileId, OwnedFd> {
        self.files
    }
}
