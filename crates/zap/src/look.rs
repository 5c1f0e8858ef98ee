//! What a checkpoint has found so far: the context that every `capture` is given.

use std::collections::{BTreeMap, HashSet};
use std::os::fd::OwnedFd;

use crate::error::CaptureError;
use crate::files::{Descriptor, FileIdentity, FileTable};
use crate::ids::{HostPid, PodPid};
use crate::image::DataSink;
use crate::memory::MappedFiles;
use crate::mounts::{Home, Nests};
use crate::pod::PodSpec;

/// A process of the pod as a capture sees it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Subject {
    /// Its PID on the host.
    pub host: HostPid,
    /// Its PID in the pod.
    pub pod: PodPid,
    /// Its command name (`comm`), lossily as text: for messages only.
    pub command: String,
}

impl Subject {
    /// Its name in messages: `process 7 (httpd)`.
    pub fn object(&self) -> String {
        format!("process {} ({})", self.pod, self.command)
    }

    /// The error that refuses the pod because of `object` of this process.
    pub fn refuse(&self, object: impl Into<String>, why: impl Into<String>) -> CaptureError {
        CaptureError::Refused {
            process: self.pod,
            command: self.command.clone(),
            object: object.into(),
            why: why.into(),
        }
    }
}

/// The pod's console as its files show it: the far ends are the monitor's, outside the pod.
#[derive(Debug, Default)]
pub enum Console {
    /// No console (PID 1 alone knows it).
    #[default]
    None,
    /// Three pipes. Inode numbers of stdin, stdout, stderr; `stdin` is the monitor's end (to look at unread bytes).
    Pipes {
        /// `st_ino` of the pipes.
        inodes: [u64; 3],
    },
    /// A pty of the pod's own devpts, whose master the monitor holds.
    Pty {
        /// N of `/dev/pts/N` in the pod.
        index: u32,
        /// The monitor's master side.
        master: OwnedFd,
    },
}

/// The state of a checkpoint in progress. One per checkpoint; lives in the pod's monitor.
pub struct Look<'a> {
    /// The pod that is being written down.
    pub spec: &'a PodSpec,
    /// The pod's PID 1 on the host: `/proc/PID/root` and `/proc/PID/ns` are the pod's.
    pub init: HostPid,
    /// How many PID namespaces lie around the pod's.
    pub depth: usize,
    /// The open file descriptions met so far. [`FileTable::intern`] is how one becomes a [`crate::ids::FileId`].
    pub files: FileTable,
    /// The files behind mappings met so far.
    pub mapped: MappedFiles,
    /// Directories in which files were looked up in the hold.
    pub(crate) directories: crate::files::Directories,
    /// The files of the root that were open or mapped ahead of the hold, by their paths in the root.
    pub used: BTreeMap<Vec<u8>, FileIdentity>,
    /// Where bulk bytes go (queue contents, pages, deleted files). Buffers are kept in memory until the pod runs again.
    pub data: &'a mut DataSink,
    /// What is known of its sockets.
    pub sockets: crate::sockets::Sightings,
    /// The namespaces that were made inside it.
    pub namespaces: crate::namespaces::Sightings,
    /// The pod's console.
    pub console: Console,
    /// The directory of the pod's upper layers, as `LivePod::upper` gives it; empty when it is not known, and then files
    /// of those layers are taken for files of the root.
    pub upper: std::path::PathBuf,
    /// Mounts that were made inside the pod, by number.
    pub made: crate::mounts::Made,
    /// Mount namespaces that were made inside the pod.
    pub nests: crate::mounts::Nests,
    /// Where it is written down which mounts the pod was born with.
    pub mounts_file: std::path::PathBuf,
    /// Whether the image carries the contents of the root's files that are open or mapped.
    pub carry_files: bool,
    /// Bytes that the queues of the files met ahead of the hold had.
    pub queued: u64,
    /// Objects (a pipe, a pty pair) whose shared part has been captured already: (kind, identity).
    seen: HashSet<(&'static str, u64, u64)>,
}

impl<'a> Look<'a> {
    /// A look that has seen nothing.
    pub fn new(
        spec: &'a PodSpec,
        init: HostPid,
        data: &'a mut DataSink,
        console: Console,
        carry_files: bool,
    ) -> Look<'a> {
        Look {
            spec,
            init,
            depth: crate::process::discover::depth_of(init).unwrap_or(0),
            files: FileTable::default(),
            mapped: MappedFiles::default(),
            directories: Default::default(),
            used: BTreeMap::new(),
            data,
            sockets: Default::default(),
            namespaces: crate::namespaces::Sightings::new(spec, init),
            console,
            upper: std::path::PathBuf::new(),
            made: Default::default(),
            nests: Default::default(),
            mounts_file: std::path::PathBuf::new(),
            carry_files,
            queued: 0,
            seen: HashSet::new(),
        }
    }

    /// A path of the pod, as it is reached from the host, from the root of the mount namespace through which a file was
    /// opened.
    pub fn path_from_host(&self, descriptor: &Descriptor, path: &[u8]) -> std::path::PathBuf {
        let nested = self.nests.path(descriptor, path);
        nested.unwrap_or_else(|| crate::files::from_host(self.init, path))
    }

    /// Looks what is mounted in the mount namespaces that were met.
    pub fn look_into_mount_namespaces(&mut self) -> Result<(), CaptureError> {
        if self.namespaces.mount_namespaces().next().is_some() {
            let home = Home::look(self.spec, self.init, &self.mounts_file)?;
            self.nests = Nests::look(&self.namespaces, self.init, &home)?;
            self.nests.add_to(&mut self.made, &home);
        }
        Ok(())
    }

    /// True the first time that this object is asked about: whoever gets `true` captures the shared part.
    pub fn first_sight(&mut self, kind: &'static str, device: u64, inode: u64) -> bool {
        self.seen.insert((kind, device, inode))
    }
}
