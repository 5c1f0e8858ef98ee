//! Tap and tun devices: what is sent to the device is read from a file, and what is written to the file arrives by the device.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use super::check;

/// How many bytes precede each frame: what the sender left to the hardware, checksum and segmentation
/// (`struct virtio_net_hdr`).
pub const HEADER: usize = 10;

/// The longest that is read at once: a packet to be segmented, with its headers.
pub const LONGEST: usize = HEADER + (68 << 10);

/// Where devices are made.
pub const PATH: &str = "/dev/net/tun";

/// The numbers of that file.
pub const DEVICE: (u32, u32) = (10, 200);

const OFFLOAD: libc::c_uint = libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6 | libc::TUN_F_TSO_ECN;

/// A number that a file of a device has, which can be asked for and set: the request for either.
#[derive(Clone, Copy, Debug)]
pub struct Number {
    get: libc::c_ulong,
    set: libc::c_ulong,
}

/// `TUN…SNDBUF`: bytes that wait at most to be read.
pub const SEND_BUFFER: Number = Number { get: 0x8004_54d3, set: 0x4004_54d4 };
/// `TUN…VNETHDRSZ`: the length of [`HEADER`].
pub const HEADER_LENGTH: Number = Number { get: 0x8004_54d7, set: 0x4004_54d8 };
/// `TUN…VNETLE`: whether that is little-endian.
pub const LITTLE_ENDIAN: Number = Number { get: 0x8004_54dd, set: 0x4004_54dc };

/// What belongs to a device, and stays when no file has it: a number each.
#[derive(Clone, Copy, Debug)]
#[repr(u32)]
pub enum Lasting {
    /// Whether it stays.
    Persistent = 0x4004_54cb,
    /// The user who may open it.
    Owner = 0x4004_54cc,
    /// The group that may.
    Group = 0x4004_54ce,
}

/// Makes a tap device of this name in this thread's network namespace. It is there for as long as the file is open, which
/// never waits.
///
/// # Errors
/// `ENOENT` or `ENODEV` where the kernel has no such devices, `EBUSY` if the name is taken, `EPERM` without CAP_NET_ADMIN.
pub fn make(name: &str) -> io::Result<File> {
    let mut options = File::options();
    let file = options.read(true).write(true).custom_flags(libc::O_NONBLOCK).open(PATH)?;
    attach(&file, name, libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR)?;
    // SAFETY: the argument is a number.
    check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(OFFLOAD)) }.into())?;
    Ok(file)
}

/// Makes a device with this name, number and flags (`IFF_TUN`, `IFF_NO_PI` …), which stays.
pub fn make_lasting(path: &Path, (name, index): (&str, u32), flags: i32) -> io::Result<File> {
    let file = File::options().read(true).write(true).open(path)?;
    // SAFETY: the kernel reads one number.
    check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFINDEX, &raw const index) }.into())?;
    attach(&file, name, flags)?;
    set_lasting(&file, Lasting::Persistent, 1)?;
    Ok(file)
}

/// Has a file that was opened at [`PATH`] be one of the device with that name, which is made if it is not there.
pub fn attach(file: impl AsFd, name: &str, flags: i32) -> io::Result<()> {
    let mut request = request(flags);
    // The last byte ends the name.
    let room = request.ifr_name.len() - 1;
    for (to, from) in request.ifr_name[..room].iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    // SAFETY: the kernel reads and writes the ifreq at the address, which is ours.
    check(unsafe { libc::ioctl(file.as_fd().as_raw_fd(), libc::TUNSETIFF, &raw mut request) }.into()).map(drop)
}

fn request(flags: i32) -> libc::ifreq {
    // SAFETY: all-zero is a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_ifru.ifru_flags = flags as i16;
    request
}

/// Name and flags of the device that a file has, if it has one.
pub fn device_of(file: impl AsFd) -> io::Result<Option<(String, i32)>> {
    let mut request = request(0);
    // SAFETY: the kernel writes the ifreq at the address, which is ours.
    let asked = check(unsafe { libc::ioctl(file.as_fd().as_raw_fd(), libc::TUNGETIFF, &raw mut request) }.into());
    match asked {
        Err(e) if e.raw_os_error() == Some(libc::EBADFD) => return Ok(None),
        other => other?,
    };
    let name: Vec<u8> = request.ifr_name.iter().take_while(|byte| **byte != 0).map(|byte| *byte as u8).collect();
    // SAFETY: the kernel has written the flags.
    let flags = i32::from(unsafe { request.ifr_ifru.ifru_flags } as u16);
    Ok(Some((String::from_utf8_lossy(&name).into_owned(), flags)))
}

/// Has the device leave out the queue that a file is.
pub fn leave_out(file: impl AsFd) -> io::Result<()> {
    let mut request = request(libc::IFF_DETACH_QUEUE);
    // SAFETY: the kernel reads the ifreq at the address, which is ours.
    check(unsafe { libc::ioctl(file.as_fd().as_raw_fd(), libc::TUNSETQUEUE, &raw mut request) }.into()).map(drop)
}

/// Asks for a number.
pub fn get(file: impl AsFd, number: Number) -> io::Result<i32> {
    let mut value = 0i32;
    // SAFETY: the kernel writes one int.
    check(unsafe { libc::ioctl(file.as_fd().as_raw_fd(), number.get, &raw mut value) }.into())?;
    Ok(value)
}

/// Sets a number.
pub fn set(file: impl AsFd, number: Number, value: i32) -> io::Result<()> {
    // SAFETY: the kernel reads one int.
    check(unsafe { libc::ioctl(file.as_fd().as_raw_fd(), number.set, &raw const value) }.into()).map(drop)
}

/// Sets what belongs to the device of a file.
pub fn set_lasting(file: impl AsFd, what: Lasting, value: u32) -> io::Result<()> {
    let (request, value) = (what as libc::c_ulong, libc::c_ulong::from(value));
    // SAFETY: the argument is a number.
    check(unsafe { libc::ioctl(file.as_fd().as_raw_fd(), request, value) }.into()).map(drop)
}
