//! The context of a restart, in the *builder*: a short-lived process inside the new pod that opens every file
//! before the first process of the pod exists.

use std::any::Any;
use std::cell::{Cell, OnceCell};
use std::collections::HashMap;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use crate::error::{Context, RebuildError};
use crate::ids::FileId;
use crate::image::ImageReader;
use crate::keepers::{Keepers, Keeping, Kept};
use crate::namespaces::{Made, NamespaceId};
use crate::pod::PodSpec;
use crate::sys::nsfs;

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
    /// The namespaces that were made inside the pod.
    pub namespaces: Made,
    /// Files that keep tun and tap devices, by namespace and name, until those of the image do.
    pub taps: HashMap<(Option<NamespaceId>, String), File>,
    network: Option<NamespaceId>,
    mounts: Option<NamespaceId>,
    /// The pod's own mount namespace, once the builder has left it.
    home: Option<OwnedFd>,
    files: HashMap<FileId, Slot>,
    /// What others keep of them, if not all can be open at once, and who.
    keeping: Keeping,
    keepers: Keepers,
    /// Files that nobody else keeps yet, of those that others may.
    young: Vec<FileId>,
    /// How many of those that others keep were fetched and are open here, too.
    fetched: Cell<usize>,
    objects: HashMap<(&'static str, ObjectKey), Box<dyn Any>>,
}

/// A file of the pool: open here, or kept by another process, from which it is fetched when it is needed.
#[derive(Default)]
struct Slot {
    here: OnceCell<OwnedFd>,
    kept: Option<Kept>,
}

/// What tells objects of one kind apart: a number, or of files that of their file system and their own there. An inode number
/// alone is no such thing: file systems count on their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ObjectKey(u64, u64);

impl From<u64> for ObjectKey {
    fn from(number: u64) -> ObjectKey {
        ObjectKey(0, number)
    }
}

impl From<(u64, u64)> for ObjectKey {
    fn from((device, inode): (u64, u64)) -> ObjectKey {
        ObjectKey(device, inode)
    }
}

impl<'a> Rebuild<'a> {
    /// A rebuild that has made nothing.
    pub fn new(image: &'a ImageReader, spec: &'a PodSpec, console: Vec<OwnedFd>) -> Rebuild<'a> {
        Rebuild {
            image,
            spec,
            console,
            console_master: None,
            namespaces: Made::new(),
            taps: HashMap::new(),
            network: None,
            mounts: None,
            home: None,
            files: HashMap::new(),
            keeping: Keeping::default(),
            keepers: Keepers::default(),
            young: Vec::new(),
            fetched: Cell::new(0),
            objects: HashMap::new(),
        }
    }

    /// Goes into a network namespace (`None`: the pod's own): what is made from now on belongs there. The builder is one
    /// thread.
    pub fn work_in(&mut self, network: Option<NamespaceId>) -> Result<(), RebuildError> {
        if network == self.network {
            return Ok(());
        }
        self.look_from(None)?;
        let entered = match network {
            // PID 1 never leaves it.
            None => File::open("/proc/1/ns/net").and_then(|home| nsfs::enter(home, libc::CLONE_NEWNET)),
            Some(id) => {
                let missing = || RebuildError::Damaged(format!("namespace {} is not in it", id.0));
                nsfs::enter(self.namespaces.get(&id).ok_or_else(missing)?, libc::CLONE_NEWNET)
            }
        };
        self.network = network;
        entered.rebuilding("entering", "a network namespace")
    }

    /// The network namespace in which it works (`None`: the pod's own).
    pub fn network(&self) -> Option<NamespaceId> {
        self.network
    }

    /// Goes into a mount namespace (`None`: the pod's own): paths lead from its root from now on. Says where it was.
    pub fn look_from(&mut self, mounts: Option<NamespaceId>) -> Result<Option<NamespaceId>, RebuildError> {
        if mounts == self.mounts {
            return Ok(mounts);
        }
        let home = match self.home.take() {
            Some(home) => home,
            None => File::open("/proc/self/ns/mnt").rebuilding("opening", "the pod's mount namespace")?.into(),
        };
        let entered = match mounts {
            None => nsfs::enter(&home, libc::CLONE_NEWNS),
            Some(id) => {
                let missing = || RebuildError::Damaged(format!("namespace {} is not in it", id.0));
                nsfs::enter(self.namespaces.get(&id).ok_or_else(missing)?, libc::CLONE_NEWNS)
            }
        };
        self.home = Some(home);
        entered.rebuilding("entering", "a mount namespace")?;
        Ok(std::mem::replace(&mut self.mounts, mounts))
    }

    /// Whether paths lead from another root than that of the pod's own mount namespace.
    pub fn is_abroad(&self) -> bool {
        self.mounts.is_some()
    }

    /// Something that two files share (the pipe behind two ends), made by whoever comes first and kept under (kind, key).
    pub fn object<T: Any>(&mut self, kind: &'static str, key: impl Into<ObjectKey>) -> Option<&mut T> {
        self.objects.get_mut(&(kind, key.into())).and_then(|o| o.downcast_mut())
    }

    /// Keep `object` for the others that share it.
    pub fn keep_object<T: Any>(&mut self, kind: &'static str, key: impl Into<ObjectKey>, object: T) {
        self.objects.insert((kind, key.into()), Box::new(object));
    }

    /// Such an object, made now if nobody came first.
    pub fn object_or_default<T: Any + Default>(&mut self, kind: &'static str, key: impl Into<ObjectKey>) -> &mut T {
        let object = self.objects.entry((kind, key.into())).or_insert_with(|| Box::new(T::default()));
        object.downcast_mut().expect("objects of a kind are of one type")
    }

    /// Such an object, for the last who shares it.
    pub fn take_object<T: Any>(&mut self, kind: &'static str, key: impl Into<ObjectKey>) -> Option<T> {
        self.objects.remove(&(kind, key.into())).and_then(|object| object.downcast().ok()).map(|object| *object)
    }

    /// Not all files can be open here at once: others keep them.
    pub fn have_kept(&mut self, keeping: Keeping) {
        self.keeping = keeping;
    }

    /// Put an opened file in the pool.
    pub fn keep_file(&mut self, id: FileId, file: OwnedFd) -> Result<(), RebuildError> {
        self.files.insert(id, Slot { here: file.into(), kept: None });
        if !self.keeping.is_needed() || self.keeping.near.contains(&id) {
            return Ok(());
        }
        self.young.push(id);
        if self.young.len() < self.keeping.portion { Ok(()) } else { self.put_away() }
    }

    /// Has a process keep what nobody keeps yet.
    fn put_away(&mut self) -> Result<(), RebuildError> {
        let young = std::mem::take(&mut self.young);
        let Some(pid) = self.keeping.pids.pop().filter(|_| !young.is_empty()) else { return Ok(()) };
        let keeper = self.keepers.add(pid).rebuilding("making", "a process that keeps files")?;
        for id in young {
            if let Some(slot) = self.files.get_mut(&id)
                && let Some(file) = slot.here.take()
            {
                slot.kept = Some(Kept { keeper, number: file.as_raw_fd() });
            }
        }
        Ok(())
    }

    /// Closes what was fetched of what others keep, if it is much.
    pub fn put_back(&mut self) {
        if self.fetched.get() > self.keeping.portion {
            self.put_all_back();
        }
    }

    fn put_all_back(&mut self) {
        self.files.values_mut().filter(|slot| slot.kept.is_some()).for_each(|slot| drop(slot.here.take()));
        self.fetched.set(0);
    }

    /// A file of the pool; an error of the image if nothing of that number was opened.
    pub fn file(&self, id: FileId) -> Result<BorrowedFd<'_>, RebuildError> {
        let missing = || RebuildError::Damaged(format!("{id} is referred to but is not in it"));
        let slot = self.files.get(&id).ok_or_else(missing)?;
        if let (None, Some(kept)) = (slot.here.get(), slot.kept) {
            let copy = self.keepers.fetch(kept).rebuilding("fetching", id)?;
            self.fetched.set(self.fetched.get() + 1);
            let _ = slot.here.set(copy);
        }
        slot.here.get().map(|file| file.as_fd()).ok_or_else(missing)
    }

    /// Every file of the pool that is open here.
    pub fn files(&self) -> impl Iterator<Item = (FileId, BorrowedFd<'_>)> {
        self.files.iter().filter_map(|(id, slot)| Some((*id, slot.here.get()?.as_fd())))
    }

    /// Every file that another process keeps.
    pub fn kept(&self) -> impl Iterator<Item = (FileId, Kept)> {
        self.files.iter().filter_map(|(id, slot)| Some((*id, slot.kept?)))
    }

    /// The numbers of the handles on those processes.
    pub fn keepers(&self) -> Vec<i32> {
        self.keepers.handles()
    }

    /// Lets go of what nobody needs when every file is open, and connected if it is `complete`.
    pub fn let_go(&mut self, complete: bool) -> Result<(), RebuildError> {
        (self.console, self.taps, self.home) = (Vec::new(), HashMap::new(), None);
        if complete {
            self.objects.clear();
        }
        self.put_away()?;
        self.put_all_back();
        Ok(())
    }

    /// The files alone.
    pub fn into_files(self) -> HashMap<FileId, OwnedFd> {
        self.files.into_iter().filter_map(|(id, slot)| Some((id, slot.here.into_inner()?))).collect()
    }
}
