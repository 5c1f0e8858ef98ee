//! Mounts of an image made again, in the builder, before any file is opened.

use std::ffi::CString;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use super::capture::path_of;
use super::{FileSystem, MountState, Source};
use crate::error::{Context, RebuildError};
use crate::files::mounts::as_path;
use crate::image::ImageReader;
use crate::layer;
use crate::sys::mount;

/// Makes every mount. Nobody else is in the pod yet.
pub fn make(image: &ImageReader, states: &[MountState]) -> Result<(), RebuildError> {
    // Before anything covers what is bound.
    let mut ready: Vec<Option<OwnedFd>> = Vec::with_capacity(states.len());
    for state in states {
        let shown = as_path(&state.point).display();
        ready.push(match &state.source {
            Source::Bind(path) => Some(mount::copy_mount(as_path(path), false).rebuilding("binding", shown)?),
            Source::New(system) => Some(new(image, system)?),
            Source::Part(..) => None,
        });
    }
    let mut parts = Vec::with_capacity(states.len());
    for state in states {
        let Source::Part(first, rest) = &state.source else {
            parts.push(None);
            continue;
        };
        let missing = || RebuildError::Damaged(format!("mount {first} is not in it"));
        let whole = ready.get(*first).and_then(Option::as_ref).ok_or_else(missing)?;
        let inside = path_of(whole).join(as_path(rest.strip_prefix(b"/").unwrap_or(rest)));
        let shown = as_path(&state.point).display();
        parts.push(Some(mount::copy_mount(&inside, false).rebuilding("binding", shown)?));
    }
    for ((state, mounted), part) in states.iter().zip(ready).zip(parts) {
        let point = as_path(&state.point);
        let Some(mounted) = mounted.or(part) else { continue };
        let propagation = match (state.shared, state.unbindable) {
            (true, _) => libc::MS_SHARED,
            (_, true) => libc::MS_UNBINDABLE,
            _ => 0,
        };
        mount::shape(mounted.as_fd(), state.attributes, 0).rebuilding("setting the options of", point.display())?;
        mount::attach(&mounted, point).rebuilding("mounting", point.display())?;
        if propagation != 0 {
            mount::shape(mounted.as_fd(), state.attributes, propagation)
                .rebuilding("setting the propagation of", point.display())?;
        }
    }
    Ok(())
}

fn new(image: &ImageReader, system: &FileSystem) -> Result<OwnedFd, RebuildError> {
    let text = |text: &str| CString::new(text).map_err(|_| RebuildError::Damaged("an option has a NUL in it".into()));
    let kind = text(&system.kind)?;
    let source = CString::new(system.device.clone());
    let source = source.map_err(|_| RebuildError::Damaged("a device has a NUL in it".into()))?;
    let mut options = vec![(text("source")?, Some(source))];
    for (key, value) in &system.options {
        options.push((text(key)?, value.as_deref().map(text).transpose()?));
    }
    let options: Vec<_> = options.iter().map(|(key, value)| (key.as_c_str(), value.as_deref())).collect();
    let mounted = mount::new_mount(&kind, &options, 0).rebuilding("making", &system.kind)?;
    let root = Path::new(".").join(as_path(system.root.strip_prefix(b"/").unwrap_or(&system.root)));
    let top = path_of(&mounted).join(&root);
    if let Some(archive) = &system.contents {
        std::fs::create_dir_all(&top).rebuilding("making", &system.kind)?;
        let mut archive = image.layer(archive).map_err(|e| RebuildError::Damaged(e.to_string()))?;
        layer::unpack(&mut archive, &top)?;
    }
    match system.root.as_slice() {
        b"/" => Ok(mounted),
        _ => mount::copy_mount(&top, false).rebuilding("binding", &system.kind),
    }
}
