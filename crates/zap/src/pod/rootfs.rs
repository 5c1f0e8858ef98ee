//! What a pod sees as its file system.

/// The tmpfs mounts of a pod, as it names them, whose contents travel in an image.
pub fn tmpfs_mounts() -> &'static [&'static str] {
    &["/tmp", "/run", "/dev/shm"]
}
