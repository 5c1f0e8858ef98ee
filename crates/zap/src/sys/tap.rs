//! Tap devices: what is sent to the device is read from a file, and what is written to the file arrives by the device.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;

use super::check;

/// How many bytes precede each frame: what the sender left to the hardware, checksum and segmentation
/// (`struct virtio_net_hdr`).
pub const HEADER: usize = 10;

/// The longest that is read at once: a packet to be segmented, with its headers.
pub const LONGEST: usize = HEADER + (68 << 10);

const OFFLOAD: libc::c_uint = libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6 | libc::TUN_F_TSO_ECN;

/// Makes a tap device of this name in this thread's network namespace. It is there for as long as the file is open, which
/// never waits.
///
/// # Errors
/// `ENOENT` or `ENODEV` where the kernel has no such devices, `EBUSY` if the name is taken, `EPERM` without CAP_NET_ADMIN.
pub fn make(name: &str) -> io::Result<File> {
    let mut options = File::options();
    let file = options.read(true).write(true).custom_flags(libc::O_NONBLOCK).open("/dev/net/tun")?;
    // SAFETY: all-zero is a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // The last byte ends the name.
    let room = request.ifr_name.len() - 1;
    for (to, from) in request.ifr_name[..room].iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as i16;
    // SAFETY: the kernel reads and writes the ifreq at the address, which is ours.
    check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) }.into())?;
    // SAFETY: the argument is a number.
    check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(OFFLOAD)) }.into())?;
    Ok(file)
}
