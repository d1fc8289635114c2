//! Locks between processes, room on the disk, files that appear as a whole.

use std::fs::{self, File};
use std::path::Path;

use crate::{Error, Listener, Progress, Result};

/// Held as long as it lives; other processes that want the same lock wait.
pub(crate) struct Lock(#[allow(dead_code)] File);

/// Takes the lock `path`, a file that is made.
pub(crate) fn lock(path: &Path, listener: &Listener<'_>) -> Result<Lock> {
    let fail = |e| Error::disk(path, e);
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).map_err(fail)?;
    }
    let file = File::options().create(true).truncate(false).write(true).open(path).map_err(fail)?;
    if file.try_lock().is_err() {
        listener(Progress::Note("another process fetches the same files; waiting for it".into()));
        file.lock().map_err(fail)?;
    }
    Ok(Lock(file))
}

/// Fails if `needed` bytes have no room in `directory`, which exists. `variable` names the place.
pub(crate) fn check_room(directory: &Path, needed: u64, variable: &'static str) -> Result<()> {
    // Room for the system, and for small files beside.
    const SPARE: u64 = 64 << 20;
    match free(directory) {
        Some(free) if needed > 0 && free < needed.saturating_add(SPARE) => {
            Err(Error::NoRoom { path: directory.into(), needed, free, variable })
        }
        _ => Ok(()),
    }
}

#[cfg(unix)]
fn free(directory: &Path) -> Option<u64> {
    let stat = rustix::fs::statvfs(directory).ok()?;
    Some(stat.f_bavail.saturating_mul(stat.f_frsize))
}

#[cfg(not(unix))]
fn free(_: &Path) -> Option<u64> {
    None
}

/// Makes the folder of `path`.
pub(crate) fn make_parent(path: &Path) -> Result<()> {
    path.parent().map_or(Ok(()), |parent| fs::create_dir_all(parent).map_err(|e| Error::disk(parent, e)))
}

/// Writes a small file so that it is never seen half written.
pub(crate) fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    make_parent(path)?;
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}.tmp", std::process::id()));
    let temporary = path.with_file_name(name);
    fs::write(&temporary, bytes).map_err(|e| Error::disk(&temporary, e))?;
    fs::rename(&temporary, path).map_err(|e| Error::disk(path, e))
}
