//! Which namespaces the processes and sockets of a pod are in, as a checkpoint meets them.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;

use super::{Births, Body, Kind, Membership, NamespaceId, NamespaceState, PidState, ipc, links, time, user, uts};
use crate::error::{CaptureError, Context};
use crate::files::Descriptor;
use crate::ids::{HostPid, PodPid};
use crate::look::Subject;
use crate::mounts::NestState;
use crate::pod::{PodSpec, capabilities};
use crate::process::discover::{PodProc, Zombie};
use crate::sys::{clone, nsfs};

/// The namespaces met so far.
pub struct Sightings {
    init: HostPid,
    /// Whether processes of the pod's own user namespace may make namespaces.
    privileged: bool,
    /// The inodes of the pod's own.
    home: HashMap<Kind, u64>,
    by_inode: HashMap<u64, NamespaceId>,
    met: Vec<Met>,
    members: HashMap<HostPid, Membership>,
    births: HashMap<HostPid, Births>,
}

/// A namespace that was met.
struct Met {
    kind: Kind,
    file: OwnedFd,
    owner: Option<NamespaceId>,
    /// Of a PID namespace: the one around it.
    parent: Option<NamespaceId>,
    /// Through whom.
    subject: Subject,
    /// A process that is in it.
    member: Option<Subject>,
}

impl Sightings {
    /// Nothing met, in the pod of `init`.
    pub fn new(spec: &PodSpec, init: HostPid) -> Sightings {
        Sightings {
            init,
            privileged: capabilities::includes(&spec.capabilities, "SYS_ADMIN"),
            home: HashMap::new(),
            by_inode: HashMap::new(),
            met: Vec::new(),
            members: HashMap::new(),
            births: HashMap::new(),
        }
    }

    fn home(&mut self, kind: Kind) -> Result<u64, CaptureError> {
        if let Some(inode) = self.home.get(&kind) {
            return Ok(*inode);
        }
        let path = self.init.proc(&format!("ns/{}", kind.file()));
        let inode = fs::metadata(&path).capturing("looking at", path.display())?.ino();
        self.home.insert(kind, inode);
        Ok(inode)
    }

    /// Looks where a process is. What cannot be captured is refused by name.
    ///
    /// One look at its user namespace is enough for most: without CAP_SYS_ADMIN, of which a pod has none unless it was
    /// given it, nobody gets into another namespace who has not made a user namespace.
    pub fn meet(&mut self, subject: &Subject) -> Result<(), CaptureError> {
        let user = inode(subject.host, "user", subject)?;
        if user == self.home(Kind::User)? && !self.privileged {
            return Ok(());
        }
        let mut membership = Membership::default();
        for kind in Kind::ALL {
            let file = kind.file();
            let inode = if kind == Kind::User { user } else { inode(subject.host, file, subject)? };
            if inode != self.home(kind)? {
                let namespace = File::open(subject.host.proc(&format!("ns/{file}"))).map_err(|e| lost(subject, e))?;
                let id = self.meet_one(kind, namespace.into(), subject)?;
                self.met[id.0 as usize].member.get_or_insert_with(|| subject.clone());
                membership.0.insert(kind, id);
            }
            match kind {
                Kind::Pid => self.meet_births(subject, inode)?,
                Kind::Time => refuse_elsewhere(subject, kind, inode)?,
                _ => {}
            }
        }
        if !membership.is_home() {
            self.members.insert(subject.host, membership);
        }
        Ok(())
    }

    /// Looks in which PID namespace the next children of a process are born; its own is `own`.
    fn meet_births(&mut self, subject: &Subject, own: u64) -> Result<(), CaptureError> {
        let births = match File::open(subject.host.proc("ns/pid_for_children")) {
            Ok(namespace) => match crate::sys::file::fstat(&namespace).map_err(|e| lost(subject, e))?.st_ino {
                inode if inode == own => return Ok(()),
                _ => Births::In(self.meet_one(Kind::Pid, namespace.into(), subject)?),
            },
            Err(_) if fs::metadata(subject.host.proc("ns/user")).is_ok() => Births::New,
            Err(error) => return Err(lost(subject, error)),
        };
        self.births.insert(subject.host, births);
        Ok(())
    }

    /// In which PID namespace the next children of a process that was looked at are born.
    pub fn births_of(&self, process: HostPid) -> Births {
        self.births.get(&process).copied().unwrap_or_default()
    }

    /// The PID namespace of a process that has ended.
    pub fn of_zombie(&mut self, ended: &Zombie, proc: &PodProc) -> Result<Option<NamespaceId>, CaptureError> {
        let command = String::from_utf8_lossy(&ended.stat.command).into_owned();
        let subject = Subject { host: HostPid(0), pod: ended.pid, command };
        let namespace = File::open(proc.path(ended.pid, "ns/pid")).map_err(|e| lost(&subject, e))?;
        self.meet_one(Kind::Pid, namespace.into(), &subject).map(Some)
    }

    /// The namespaces of a process that was looked at.
    pub fn of(&self, process: HostPid) -> Membership {
        self.members.get(&process).cloned().unwrap_or_default()
    }

    fn meet_one(&mut self, kind: Kind, file: OwnedFd, subject: &Subject) -> Result<NamespaceId, CaptureError> {
        let object = || format!("the {} namespace of {}", kind.name(), subject.object());
        let inode = crate::sys::file::fstat(&file).capturing("looking at", object())?.st_ino;
        if let Some(id) = self.by_inode.get(&inode) {
            return Ok(*id);
        }
        let owner = nsfs::owner(&file).capturing("asking the owner", object())?;
        let of_owner = crate::sys::file::fstat(&owner).capturing("looking at the owner", object())?.st_ino;
        let at_home = of_owner == self.home(Kind::User)?;
        let owner = if at_home { None } else { Some(self.meet_one(Kind::User, owner, subject)?) };
        let parent = if kind == Kind::Pid { self.meet_around(&file, subject)? } else { None };
        let id = NamespaceId(self.met.len() as u32);
        self.by_inode.insert(inode, id);
        self.met.push(Met { kind, file, owner, parent, subject: subject.clone(), member: None });
        Ok(id)
    }

    /// The PID namespace around one, if it is not the pod's.
    fn meet_around(&mut self, namespace: &OwnedFd, subject: &Subject) -> Result<Option<NamespaceId>, CaptureError> {
        let object = || format!("the PID namespace of {}", subject.object());
        let around = nsfs::parent(namespace).capturing("asking what is around", object())?;
        let inode = crate::sys::file::fstat(&around).capturing("looking around", object())?.st_ino;
        if inode == self.home(Kind::Pid)? { Ok(None) } else { self.meet_one(Kind::Pid, around, subject).map(Some) }
    }

    /// Refuses threads that are elsewhere than their process.
    pub fn check_threads(&self, subject: &Subject) -> Result<(), CaptureError> {
        if !self.privileged && !self.members.contains_key(&subject.host) {
            return Ok(());
        }
        let threads = fs::read_dir(subject.host.proc("task")).map_err(|e| lost(subject, e))?;
        for thread in threads.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).map(HostPid) {
            for kind in Kind::ALL.into_iter().filter(|_| thread != subject.host) {
                let of_process = inode(subject.host, kind.file(), subject)?;
                // A thread may end meanwhile.
                if inode(thread, kind.file(), subject).is_ok_and(|inode| inode != of_process) {
                    let why = format!("is in another {} namespace than its process", kind.name());
                    return Err(subject.refuse("a thread", format!("{why}, which cannot be checkpointed yet")));
                }
            }
            let births = |task: HostPid| fs::read_link(task.proc("ns/pid_for_children")).ok();
            if births(thread) != births(subject.host) && fs::metadata(thread.proc("ns/user")).is_ok() {
                let why = "has its children born in another PID namespace than its process";
                return Err(subject.refuse("a thread", format!("{why}, which cannot be checkpointed yet")));
            }
        }
        Ok(())
    }

    /// The mount namespaces that are not the pod's own, and through whom they were met.
    pub fn mount_namespaces(&self) -> impl Iterator<Item = (NamespaceId, &OwnedFd, &Subject)> {
        let numbered = self.met.iter().zip(0..).filter(|(met, _)| met.kind == Kind::Mount);
        numbered.map(|(met, id)| (NamespaceId(id), &met.file, &met.subject))
    }

    /// The namespaces of a kind that were met.
    pub fn of_kind(&self, kind: Kind) -> impl Iterator<Item = (NamespaceId, &OwnedFd)> {
        let numbered = self.met.iter().zip(0..).filter(move |(met, _)| met.kind == kind);
        numbered.map(|(met, id)| (NamespaceId(id), &met.file))
    }

    /// The namespace with that inode, if it was met.
    pub fn of_inode(&self, inode: u64) -> Option<NamespaceId> {
        self.by_inode.get(&inode).copied()
    }

    /// Whether sockets need to be asked where they are.
    pub fn has_networks(&self) -> bool {
        self.met.iter().any(|met| met.kind == Kind::Network)
    }

    /// The network namespaces that are not the pod's own.
    pub fn networks(&self) -> impl Iterator<Item = &OwnedFd> {
        self.met.iter().filter(|met| met.kind == Kind::Network).map(|met| &met.file)
    }

    /// The network namespace of a socket, if it is not the pod's own. Every process has been met.
    pub fn of_socket(&mut self, descriptor: &Descriptor) -> Result<Option<NamespaceId>, CaptureError> {
        let namespace = nsfs::of_socket(descriptor.as_fd());
        let namespace = namespace.capturing("asking the network namespace of", descriptor.object())?;
        let inode = crate::sys::file::fstat(&namespace).capturing("looking at", descriptor.object())?.st_ino;
        if inode == self.home(Kind::Network)? {
            return Ok(None);
        }
        let why = "belongs to a network namespace in which no process lives, which cannot be checkpointed yet";
        let lived_in = |id: &&NamespaceId| self.met[id.0 as usize].member.is_some();
        self.by_inode.get(&inode).filter(lived_in).map(|id| Some(*id)).ok_or_else(|| descriptor.refuse(why))
    }

    /// The namespace that a handle is on, if it is not the pod's own. Every process has been met.
    pub fn of_handle(&mut self, kind: Kind, descriptor: &Descriptor) -> Result<Option<NamespaceId>, CaptureError> {
        let inode = descriptor.stat.st_ino;
        if inode == self.home(kind)? {
            return Ok(None);
        }
        if let Some(id) = self.by_inode.get(&inode) {
            return Ok(Some(*id));
        }
        if matches!(kind, Kind::Pid | Kind::Mount | Kind::Time) {
            let why = format!("is a {} namespace in which no process lives, which cannot be checkpointed", kind.name());
            return Err(descriptor.refuse(why + "; have it closed first"));
        }
        let file = descriptor.as_fd().try_clone_to_owned().capturing("copying", descriptor.object())?;
        let id = self.meet_one(kind, file, &descriptor.subject)?;
        self.body(&self.met[id.0 as usize]).map(|_| Some(id))
    }

    /// A process that is in a namespace that was met.
    pub fn member(&self, id: NamespaceId) -> Option<PodPid> {
        self.met.get(id.0 as usize)?.member.as_ref().map(|member| member.pod)
    }

    /// Refuses the pod because of a namespace that was met.
    pub fn refuse(&self, id: NamespaceId, why: impl Into<String>) -> Option<CaptureError> {
        let met = self.met.get(id.0 as usize)?;
        Some(met.subject.refuse(format!("its {} namespace", met.kind.name()), why))
    }

    /// What is in the namespaces that were met, or a refusal.
    pub fn states(&self) -> Result<Vec<NamespaceState>, CaptureError> {
        let numbered = self.met.iter().zip(0..);
        numbered
            .map(|(met, id)| Ok(NamespaceState { id: NamespaceId(id), owner: met.owner, body: self.body(met)? }))
            .collect()
    }

    fn body(&self, met: &Met) -> Result<Body, CaptureError> {
        let object = || format!("the {} namespace of {}", met.kind.name(), met.subject.object());
        let refuse = |why: String| met.subject.refuse(format!("its {} namespace", met.kind.name()), why);
        let body = match met.kind {
            Kind::User => match met.member.as_ref().filter(|_| met.owner.is_none()) {
                Some(member) => user::capture_through(member.host, &met.file).map(Body::User),
                None => user::capture(&met.file).map(Body::User),
            },
            Kind::Network => {
                return links::capture(&met.file).map(Body::Network).capturing("looking into", object());
            }
            Kind::Ipc => {
                let objects = ipc::capture(&met.file).capturing("looking into", object())?;
                return objects.map(Body::Ipc).map_err(|why| refuse(why.into()));
            }
            Kind::Uts => inside(met, uts::capture).map(Body::Uts),
            Kind::Time => time::capture(self.init, met.subject.host).map(Body::Time),
            // Its root is where its maker was: in a pod there is but one place.
            Kind::Cgroup => Ok(Body::Cgroup),
            Kind::Pid => Ok(Body::Pid(PidState { parent: met.parent })),
            // What is mounted there is for those who know of contents to say.
            Kind::Mount => Ok(Body::Mount(NestState::default())),
        };
        body.capturing("looking into", object())
    }
}

/// Runs `look` in a thread in that namespace.
fn inside<T: Send>(met: &Met, look: fn() -> io::Result<T>) -> io::Result<T> {
    clone::in_thread(|| {
        nsfs::enter(met.file.as_fd(), met.kind.flag())?;
        look()
    })
}

/// The inode of a namespace of a process or thread.
fn inode(task: HostPid, file: &str, subject: &Subject) -> Result<u64, CaptureError> {
    Ok(fs::metadata(task.proc(&format!("ns/{file}"))).map_err(|e| lost(subject, e))?.ino())
}

fn lost(subject: &Subject, source: io::Error) -> CaptureError {
    match source.raw_os_error() {
        Some(libc::ENOENT | libc::ESRCH) => CaptureError::Vanished(subject.pod),
        _ => CaptureError::Kernel { step: "looking at the namespaces", object: subject.object(), source },
    }
}

/// Refuses a process whose next children will be in another namespace than it is itself.
fn refuse_elsewhere(subject: &Subject, kind: Kind, own: u64) -> Result<(), CaptureError> {
    let path = subject.host.proc(&format!("ns/{}_for_children", kind.file()));
    let elsewhere = match fs::metadata(path) {
        Ok(found) => found.ino() != own,
        // Nobody has been born there yet, or nobody ever will any more; or the process is gone.
        Err(_) => fs::metadata(subject.host.proc("ns/user")).is_ok(),
    };
    let why = format!("are to be born in another {} namespace, which cannot be checkpointed yet", kind.name());
    if elsewhere { Err(subject.refuse("its next children", why)) } else { Ok(()) }
}
