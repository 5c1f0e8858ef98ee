//! Why a file of no known kind is refused: the words a person would use for it.

use super::Descriptor;

/// Anonymous inodes and file systems of the kernel, by what their link begins with.
const NAMES: &[(&str, &str)] = &[
    ("anon_inode:[perf_event]", "is a performance counter of this host's, which cannot be checkpointed"),
    ("anon_inode:[userfaultfd]", "is a userfaultfd, which cannot be checkpointed yet"),
    ("anon_inode:[eventpoll]", "is an epoll instance, which cannot be checkpointed yet"),
    ("anon_inode:[eventfd]", "is an eventfd, which cannot be checkpointed yet"),
    ("anon_inode:[timerfd]", "is a timerfd, which cannot be checkpointed yet"),
    ("anon_inode:[signalfd]", "is a signalfd, which cannot be checkpointed yet"),
    ("anon_inode:[pidfd]", "is a pidfd, which cannot be checkpointed yet"),
    ("pidfd:", "is a pidfd, which cannot be checkpointed yet"),
    ("anon_inode:bpf", "is a BPF object of this host's, which cannot be checkpointed"),
    ("anon_inode:[bpf", "is a BPF object of this host's, which cannot be checkpointed"),
    ("anon_inode:btf", "is BPF type information of this host's, which cannot be checkpointed"),
    ("anon_inode:seccomp notify", "is a seccomp listener, which cannot be checkpointed yet"),
    ("anon_inode:[landlock-ruleset]", "is a Landlock ruleset, which the kernel does not let anyone read"),
    ("anon_inode:[mount", "is a detached mount or mount context, which cannot be checkpointed yet"),
    ("anon_inode:[fscontext]", "is a file system context (fsopen), which cannot be checkpointed"),
    ("anon_inode:kvm", "is a virtual machine (KVM), which cannot be checkpointed"),
    ("anon_inode:sync_file", "is a graphics fence, which cannot be checkpointed"),
    ("anon_inode:dmabuf", "is a graphics buffer, which cannot be checkpointed"),
    ("anon_inode:[iommufd]", "is an IOMMU object, which cannot be checkpointed"),
    ("/dmabuf:", "is a graphics buffer, which cannot be checkpointed"),
    ("/secretmem", "is a memfd_secret, whose pages the kernel shows to nobody"),
];

/// Why `descriptor`, which no kind recognises, cannot be checkpointed.
pub(super) fn why(descriptor: &Descriptor) -> String {
    let link = descriptor.link.as_slice();
    if link.starts_with(b"socket:[") {
        return crate::sockets::why_not(descriptor);
    }
    let named = NAMES.iter().find(|(start, _)| link.starts_with(start.as_bytes()));
    if let Some((_, why)) = named {
        return (*why).to_owned();
    }
    let device = descriptor.stat.st_rdev;
    let numbers = || format!("{}:{}", libc::major(device), libc::minor(device));
    match descriptor.stat.st_mode & libc::S_IFMT {
        libc::S_IFCHR => format!("is a device ({}) whose state is this host's and cannot be checkpointed", numbers()),
        libc::S_IFBLK => format!("is a disk ({}) and cannot be checkpointed", numbers()),
        _ => "is of a kind that cannot be checkpointed yet".to_owned(),
    }
}
