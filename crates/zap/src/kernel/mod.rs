//! What the kernel has and shows nobody by other ways, read from its memory by those who may (`CAP_BPF` and
//! `CAP_PERFMON`, a kernel with type information). Where things are in it, the running kernel's own types say
//! (`/sys/kernel/btf/vmlinux`). Without one or the other, what is read so stays refused by name.
//!
//! Nothing is locked meanwhile: only of what nobody changes, since everybody who could is held, is this true.

pub(crate) mod mappings;
mod pages;
pub(crate) mod threads;
mod types;

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::{LazyLock, Mutex, MutexGuard};

use self::pages::Pages;
use self::types::Types;
use crate::ids::Address;
use crate::sys::kernel::Window;

/// The members that are read, as `structure.member`.
const MEMBERS: &[&str] = &[
    "address_space.i_pages",
    "cred.egid",
    "cred.euid",
    "fdtable.fd",
    "fdtable.max_fds",
    "file.f_inode",
    "file.f_mapping",
    "file.private_data",
    "files_struct.fdt",
    "flowi4.daddr",
    "flowi4.saddr",
    "flowi4.uli",
    "flowi6.daddr",
    "flowi6.flowlabel",
    "flowi6.saddr",
    "flowi6.uli",
    "flowi_common.flowic_oif",
    "fsnotify_mark.obj_list",
    "fsnotify_mark_connector.list",
    "hlist_node.next",
    "inet6_cork.hop_limit",
    "inet6_cork.opt",
    "inet6_cork.tclass",
    "inet_cork.gso_size",
    "inet_cork.opt",
    "inet_cork.tos",
    "inet_cork.transmit_time",
    "inet_cork.ttl",
    "inet_cork_full.base",
    "inet_cork_full.fl",
    "inet_sock.cork",
    "inet_sock.pinet6",
    "inode.i_fsnotify_marks",
    "inode.i_ino",
    "inode.i_sb",
    "ipv6_pinfo.cork",
    "mm_struct.pgd",
    "mqueue_inode_info.notify",
    "mqueue_inode_info.notify_owner",
    "mqueue_inode_info.vfs_inode",
    "pid.level",
    "pid.numbers",
    "scm_fp_list.count",
    "scm_fp_list.fp",
    "sigevent.sigev_value",
    "sk_buff.cb",
    "sk_buff.data",
    "sk_buff.data_len",
    "sk_buff.end",
    "sk_buff.head",
    "sk_buff.len",
    "sk_buff.network_header",
    "sk_buff.next",
    "sk_buff.sk",
    "sk_buff.transport_header",
    "sk_buff_head.next",
    "sk_buff_head.qlen",
    "skb_frag.len",
    "skb_frag.netmem",
    "skb_frag.offset",
    "skb_shared_info.frags",
    "skb_shared_info.nr_frags",
    "sock.sk_peer_cred",
    "sock.sk_peer_pid",
    "sock.sk_receive_queue",
    "sock.sk_socket",
    "sock.sk_tskey",
    "sock.sk_write_queue",
    "sock.sk_zckey",
    "socket.sk",
    "super_block.s_dev",
    "task_struct.files",
    "task_struct.mm",
    "task_struct.thread_pid",
    "udp_sock.len",
    "udp_sock.pending",
    "udp_sock.reader_queue",
    "unix_address.len",
    "unix_address.name",
    "unix_skb_parms.fp",
    "unix_skb_parms.gid",
    "unix_skb_parms.pid",
    "unix_skb_parms.uid",
    "unix_sock.addr",
    "unix_sock.oob_skb",
    "unix_sock.peer",
    "upid.nr",
    "vm_area_struct.anon_vma",
    "vm_area_struct.vm_end",
    "vm_area_struct.vm_file",
    "vm_area_struct.vm_flags",
    "vm_area_struct.vm_mm",
    "vm_area_struct.vm_pgoff",
    "vm_area_struct.vm_start",
    "xarray.xa_head",
];

/// Members that there are in some kernels alone.
const OPTIONAL: &[&str] = &[
    "anon_vma_name.name",
    "dnotify_mark.dn",
    "dnotify_mark.fsn_mark",
    "dnotify_struct.dn_fd",
    "dnotify_struct.dn_filp",
    "dnotify_struct.dn_mask",
    "dnotify_struct.dn_next",
    "io_ring_ctx.cancelable_uring_cmd",
    "io_ring_ctx.defer_list",
    "io_ring_ctx.flags",
    "io_ring_ctx.futex_list",
    "io_ring_ctx.io_bl_xa",
    "io_ring_ctx.ltimeout_list",
    "io_ring_ctx.timeout_list",
    "io_ring_ctx.waitid_list",
    "kioctx.active_reqs",
    "kioctx.user_id",
    "kioctx_table.nr",
    "kioctx_table.table",
    "mm_struct.ioctx_table",
    "mm_struct.mm_lock_seq",
    "sigpending.signal",
    "task_struct.atomic_flags",
    "task_struct.clear_child_tid",
    "task_struct.comm",
    "task_struct.cred",
    "task_struct.flags",
    "task_struct.fs",
    "task_struct.mempolicy",
    "task_struct.pdeath_signal",
    "task_struct.pending",
    "task_struct.personality",
    "task_struct.robust_list",
    "task_struct.sas_ss_flags",
    "task_struct.sas_ss_size",
    "task_struct.sas_ss_sp",
    "task_struct.seccomp",
    "task_struct.sysvsem",
    "task_struct.thread_info",
    "task_struct.timer_slack_ns",
    "tcp_sock.snd_up",
    "thread_info.flags",
    "thread_info.syscall_work",
    "vm_area_struct.anon_name",
];

/// What some of them were called before.
const FORMERLY: &[(&str, &str)] = &[
    ("skb_frag.len", "bio_vec.bv_len"),
    ("skb_frag.netmem", "bio_vec.bv_page"),
    ("skb_frag.offset", "bio_vec.bv_offset"),
];

/// The structures whose sizes are of interest.
const SIZES: &[&str] = &["page", "upid"];

/// What the kernel calls with every mapping of a process, and with every thread.
const TELLERS: [&str; 2] = ["bpf_iter_task_vma", "bpf_iter_task"];

/// Bytes of a pointer.
const POINTER: u64 = 8;
/// Bytes of a part of a buffer that is in pages: page, length, offset.
const PART: u64 = 16;

/// A reader of the running kernel's memory.
#[derive(Debug)]
pub(crate) struct Kernel {
    window: Window,
    members: HashMap<&'static str, u64>,
    sizes: HashMap<&'static str, u64>,
    pages: Option<Pages>,
    /// How many PID namespaces lie around the one that we are in.
    level: usize,
    /// The numbers of the functions that tell of mappings, and of threads.
    tellers: [Option<u32>; 2],
}

/// The one of this process, opened by whoever first asks: ahead of a hold, since it takes some milliseconds. The error is
/// why there is none.
pub(crate) fn reader() -> Result<MutexGuard<'static, Kernel>, &'static str> {
    let reader = READER.as_ref().map_err(String::as_str)?;
    Ok(reader.lock().unwrap_or_else(std::sync::PoisonError::into_inner))
}

static READER: LazyLock<Result<Mutex<Kernel>, String>> =
    LazyLock::new(|| Kernel::open().map(Mutex::new).map_err(|e| e.to_string()));

impl Kernel {
    fn open() -> io::Result<Kernel> {
        let window = Window::open()?;
        let text = std::fs::read("/sys/kernel/btf/vmlinux")?;
        let members = MEMBERS.iter().chain(OPTIONAL).chain(FORMERLY.iter().map(|(_, former)| former));
        let wanted = members.filter_map(|member| member.split('.').next()).chain(SIZES.iter().copied());
        let types = Types::parse(&text, &wanted.collect(), &TELLERS).ok_or(io::ErrorKind::InvalidData)?;
        let formerly = |name: &str| {
            let (_, former) = FORMERLY.iter().find(|(now, _)| *now == name)?;
            types.member(former)
        };
        let known = |name: &'static str, found: Option<u64>| {
            let missing = || io::Error::new(io::ErrorKind::Unsupported, format!("the kernel has no {name}"));
            found.map(|found| (name, found)).ok_or_else(missing)
        };
        let member = |name: &&'static str| known(name, types.member(name).or_else(|| formerly(name)));
        let size = |name: &&'static str| known(name, types.size(name));
        let optional = OPTIONAL.iter().filter_map(|name| Some((*name, types.member(name)?)));
        let members = MEMBERS.iter().map(member).chain(optional.map(Ok));
        let mut kernel = Kernel {
            window,
            pages: None,
            level: 0,
            tellers: TELLERS.map(|name| types.function(name)),
            members: members.collect::<io::Result<_>>()?,
            sizes: SIZES.iter().map(size).collect::<io::Result<_>>()?,
        };
        kernel.pages = Pages::find(&mut kernel).ok();
        let task = kernel.window.current_task()?;
        let own = kernel.pointer(task, "task_struct.thread_pid")?;
        kernel.level = kernel.word(own, "pid.level")? as usize;
        Ok(kernel)
    }

    /// Whether this kernel has one of the members that not all have.
    pub(crate) fn has(&self, member: &str) -> bool {
        self.members.contains_key(member)
    }

    /// Where a member of the structure at `structure` is.
    pub(crate) fn at(&self, structure: Address, member: &str) -> Address {
        Address(structure.0.wrapping_add(self.members[member]))
    }

    /// The structure of which the one at `inner` is a member.
    pub(crate) fn around(&self, inner: Address, member: &str) -> Address {
        Address(inner.0.wrapping_sub(self.members[member]))
    }

    /// How large a structure is.
    pub(crate) fn size(&self, structure: &str) -> u64 {
        self.sizes[structure]
    }

    /// So many bytes.
    pub(crate) fn bytes(&mut self, at: Address, length: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; length];
        self.window.read(at, &mut bytes)?;
        Ok(bytes)
    }

    /// So many bytes, of which it is known how many they are.
    pub(crate) fn array<const N: usize>(&mut self, at: Address) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.window.read(at, &mut bytes)?;
        Ok(bytes)
    }

    /// A pointer that is a member; zero where there is none.
    pub(crate) fn pointer(&mut self, structure: Address, member: &str) -> io::Result<Address> {
        self.array(self.at(structure, member)).map(u64::from_ne_bytes).map(Address)
    }

    /// A member of 32 bits.
    pub(crate) fn word(&mut self, structure: Address, member: &str) -> io::Result<u32> {
        self.array(self.at(structure, member)).map(u32::from_ne_bytes)
    }

    /// A member of 16 bits.
    pub(crate) fn half(&mut self, structure: Address, member: &str) -> io::Result<u16> {
        self.array(self.at(structure, member)).map(u16::from_ne_bytes)
    }

    /// A member of 8 bits.
    pub(crate) fn byte(&mut self, structure: Address, member: &str) -> io::Result<u8> {
        self.array(self.at(structure, member)).map(|[byte]| byte)
    }

    /// So many pointers in a row.
    pub(crate) fn pointers(&mut self, at: Address, count: usize) -> io::Result<Vec<Address>> {
        let bytes = self.bytes(at, count * size_of::<u64>())?;
        Ok(bytes.as_chunks().0.iter().map(|pointer| Address(u64::from_ne_bytes(*pointer))).collect())
    }

    /// The buffers of a queue of a socket's (`struct sk_buff_head`).
    pub(crate) fn queue(&mut self, head: Address) -> io::Result<Vec<Address>> {
        let count = self.word(head, "sk_buff_head.qlen")?;
        let mut next = self.pointer(head, "sk_buff_head.next")?;
        let mut buffers = Vec::new();
        for _ in 0..count {
            buffers.push(next);
            next = self.pointer(next, "sk_buff.next")?;
        }
        // It is a ring, to which the head belongs.
        if next == head { Ok(buffers) } else { Err(io::Error::other("the queue of a socket has changed meanwhile")) }
    }

    /// The bytes of a buffer (`struct sk_buff`); `None` if some are in pages that are not found.
    pub(crate) fn buffer(&mut self, buffer: Address) -> io::Result<Option<Vec<u8>>> {
        let length = self.word(buffer, "sk_buff.len")? as usize;
        let in_pages = self.word(buffer, "sk_buff.data_len")? as usize;
        let start = self.pointer(buffer, "sk_buff.data")?;
        let mut bytes = self.bytes(start, length.saturating_sub(in_pages))?;
        if in_pages == 0 {
            return Ok(Some(bytes));
        }
        let Some(pages) = self.pages else { return Ok(None) };
        let shared = self.pointer(buffer, "sk_buff.head")?.plus(self.word(buffer, "sk_buff.end")?.into());
        let [count] = self.array(self.at(shared, "skb_shared_info.nr_frags"))?;
        for number in 0..u64::from(count) {
            let part = self.at(shared, "skb_shared_info.frags").plus(number * PART);
            let page = self.pointer(part, "skb_frag.netmem")?;
            let (offset, length) = (self.word(part, "skb_frag.offset")?, self.word(part, "skb_frag.len")?);
            bytes.extend(self.bytes(pages.contents(page).plus(offset.into()), length as usize)?);
        }
        Ok((bytes.len() == length).then_some(bytes))
    }

    /// The kernel's records (`struct file`) of the open files behind descriptors of this process.
    pub(crate) fn files<'f>(&mut self, ours: impl Iterator<Item = BorrowedFd<'f>>) -> io::Result<Vec<Address>> {
        let files = self.in_table(|kernel, files, count| kernel.pointers(files, count as usize))?;
        let file = |ours: BorrowedFd<'_>| files.get(ours.as_raw_fd() as usize).copied();
        ours.map(|ours| file(ours).ok_or_else(|| io::ErrorKind::NotFound.into())).collect()
    }

    /// That of one of them.
    pub(crate) fn file(&mut self, ours: BorrowedFd<'_>) -> io::Result<Address> {
        let number = ours.as_raw_fd() as u32;
        self.in_table(|kernel, files, count| match number < count {
            true => kernel.array(files.plus(u64::from(number) * POINTER)).map(u64::from_ne_bytes).map(Address),
            false => Err(io::ErrorKind::NotFound.into()),
        })
    }

    /// Reads from the table of descriptors of this process, which begins there and has that many places.
    fn in_table<T>(&mut self, read: impl Fn(&mut Self, Address, u32) -> io::Result<T>) -> io::Result<T> {
        let task = self.window.current_task()?;
        let descriptors = self.pointer(task, "task_struct.files")?;
        let mut table = self.pointer(descriptors, "files_struct.fdt")?;
        loop {
            let count = self.word(table, "fdtable.max_fds")?;
            let files = self.pointer(table, "fdtable.fd")?;
            let found = read(self, files, count);
            // Another thread of ours may have needed a larger one meanwhile, and this be nothing any more.
            let latest = self.pointer(descriptors, "files_struct.fdt")?;
            if latest == table {
                return found;
            }
            table = latest;
        }
    }

    /// The kernel's record (`struct sock`) of a socket behind a descriptor of this process.
    pub(crate) fn socket(&mut self, ours: BorrowedFd<'_>) -> io::Result<Address> {
        let file = self.file(ours)?;
        let socket = self.pointer(file, "file.private_data")?;
        self.pointer(socket, "socket.sk")
    }

    /// The kernel's record (`struct inode`) of what a descriptor of this process leads to.
    pub(crate) fn inode(&mut self, ours: BorrowedFd<'_>) -> io::Result<Address> {
        let file = self.file(ours)?;
        self.pointer(file, "file.f_inode")
    }

    /// How an `io_uring` behind a descriptor of this process was set up (`IORING_SETUP_…`), and what it has that its `fdinfo`
    /// does not tell.
    pub(crate) fn ring(&mut self, ours: BorrowedFd<'_>) -> io::Result<(u32, Option<&'static str>)> {
        const SETUP: &str = "io_ring_ctx.flags";
        const BUFFERS: &str = "io_ring_ctx.io_bl_xa";
        // Those that lead back to themselves when they are empty, and those that lead nowhere.
        const CIRCLES: [(&str, &str); 3] = [
            ("io_ring_ctx.timeout_list", "timeouts in flight"),
            ("io_ring_ctx.ltimeout_list", "requests in flight that have timeouts"),
            ("io_ring_ctx.defer_list", "requests that wait for others"),
        ];
        const LINES: [(&str, &str); 3] = [
            ("io_ring_ctx.futex_list", "requests in flight that wait for futexes"),
            ("io_ring_ctx.waitid_list", "requests in flight that wait for children"),
            ("io_ring_ctx.cancelable_uring_cmd", "commands in flight"),
        ];
        let members = [SETUP, BUFFERS].into_iter().chain(CIRCLES.iter().chain(&LINES).map(|(member, _)| *member));
        if !{ members }.all(|member| self.has(member)) {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let file = self.file(ours)?;
        let ring = self.pointer(file, "file.private_data")?;
        let setup = self.word(ring, SETUP)?;
        let buffers = self.at(ring, BUFFERS);
        if self.pointer(buffers, "xarray.xa_head")? != Address(0) {
            let what = "buffers to choose from (IORING_REGISTER_PBUF_RING, IORING_OP_PROVIDE_BUFFERS)";
            return Ok((setup, Some(what)));
        }
        for (list, what) in CIRCLES {
            if self.pointer(ring, list)? != self.at(ring, list) {
                return Ok((setup, Some(what)));
            }
        }
        for (list, what) in LINES {
            if self.pointer(ring, list)? != Address(0) {
                return Ok((setup, Some(what)));
            }
        }
        Ok((setup, None))
    }

    /// Whether a context of asynchronous I/O has requests that wait for something other than a disk. `memory` is a descriptor
    /// of this process for the memory (`/proc/PID/mem`) of one that has the context.
    pub(crate) fn has_requests(&mut self, memory: BorrowedFd<'_>, context: u64) -> io::Result<bool> {
        const REQUESTS: &str = "kioctx.active_reqs";
        const NEEDED: [&str; 5] =
            [REQUESTS, "kioctx.user_id", "kioctx_table.nr", "kioctx_table.table", "mm_struct.ioctx_table"];
        if !NEEDED.iter().all(|member| self.has(member)) {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let file = self.file(memory)?;
        let memory = self.pointer(file, "file.private_data")?;
        let table = self.pointer(memory, "mm_struct.ioctx_table")?;
        if table == Address(0) {
            return Ok(false);
        }
        let count = self.word(table, "kioctx_table.nr")?;
        for found in self.pointers(self.at(table, "kioctx_table.table"), count as usize)? {
            if found != Address(0) && self.pointer(found, "kioctx.user_id")? == Address(context) {
                return Ok(self.pointer(found, REQUESTS)? != self.at(found, REQUESTS));
            }
        }
        Err(io::ErrorKind::NotFound.into())
    }

    /// The number of a process (`struct pid`) in a PID namespace that is `depth` levels below ours; zero if it has none.
    pub(crate) fn pid(&mut self, pid: Address, depth: usize) -> io::Result<i32> {
        let depth = self.level + depth;
        if (self.word(pid, "pid.level")? as usize) < depth {
            return Ok(0);
        }
        let numbers = self.at(pid, "pid.numbers").plus(depth as u64 * self.size("upid"));
        self.word(numbers, "upid.nr").map(|number| number as i32)
    }
}

/// Reads some bytes as the types of a kernel.
pub(crate) fn try_types(bytes: &[u8]) {
    types::try_types(bytes);
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn large_messages_are_read_from_their_pages() {
        let (from, to) = std::os::unix::net::UnixDatagram::pair().unwrap();
        let message: Vec<u8> = (0..50_000u32).map(|n| (n / 7) as u8).collect();
        from.send(&message).unwrap();
        let mut kernel = reader().unwrap();
        let receiver = kernel.socket(to.as_fd()).unwrap();
        let queue = kernel.at(receiver, "sock.sk_receive_queue");
        let buffer = kernel.pointer(queue, "sk_buff_head.next").unwrap();
        assert!(kernel.word(buffer, "sk_buff.data_len").unwrap() > 0);
        assert!(kernel.buffer(buffer).unwrap().unwrap() == message);
    }

    #[test]
    fn descriptors_of_one_file_lead_to_one_record() {
        let (one, other) = (std::fs::File::open("/dev/null").unwrap(), std::fs::File::open("/dev/null").unwrap());
        let copy = one.try_clone().unwrap();
        let found = reader().unwrap().files([&one, &other, &copy].into_iter().map(AsFd::as_fd)).unwrap();
        assert_eq!(found[0], found[2]);
        assert_ne!(found[0], found[1]);
    }
}
