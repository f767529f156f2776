//! Disks that tests treat badly. Mounting takes root, as in CI.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
};

use postrider_actors::testing::figure;

use super::{LIVENESS, keeps, wait_until};

/// The figure of a test that is skipped: the table of faults says so.
const NOT_RUN: &str = "not run: no disk can be mounted here";

/// A tmpfs of its own; unmounted when dropped. Declare it behind the world whose directories it holds.
pub(crate) struct SmallDisk {
    path: PathBuf,
    /// Its size when it is not full, as mount options.
    size: String,
}

impl SmallDisk {
    /// Mounts one of that size at `path`, which is made if need be; `None`, with a message, if this process may not mount.
    pub(crate) fn mount(path: &Path, size: &str) -> Option<Self> {
        fs::create_dir_all(path).expect("the directory is ours");
        let size = format!("size={size},nr_inodes=100k");
        let options = format!("{size},mode=0755");
        let output = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &options, "tmpfs"])
            .arg(path)
            .output()
            .expect("util-linux is there");
        if !output.status.success() {
            let why = String::from_utf8_lossy(&output.stderr);
            eprintln!(
                "SKIPPED: a full disk needs a file system to fill, and none can be mounted here: {why}"
            );
            figure(NOT_RUN);
            return None;
        }
        Some(Self { path: path.to_owned(), size })
    }

    /// Leaves neither a byte nor a name free: it becomes as small as what is on it.
    pub(crate) fn fill(&self) {
        // Somebody may write meanwhile, and then that is too small.
        wait_until(LIVENESS, "the disk to be full", || {
            let used = rustix::fs::statvfs(&self.path).expect("it is mounted");
            // Of size 0 it would be without limits.
            let pages = (used.f_blocks - used.f_bfree).max(1);
            let (bytes, names) = (pages * used.f_bsize, used.f_files - used.f_ffree);
            self.resize(&format!("size={bytes},nr_inodes={names}"))
        });
    }

    /// Frees what `fill` took.
    pub(crate) fn free(&self) {
        assert!(self.resize(&self.size), "it was as large before");
    }

    fn resize(&self, size: &str) -> bool {
        let mut mount = Command::new("mount");
        mount.args(["-o", &format!("remount,{size}")]).arg(&self.path).stderr(Stdio::null());
        mount.status().is_ok_and(|status| status.success())
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        if thread::panicking() && keeps() {
            eprintln!("still mounted: {}", self.path.display());
            return;
        }
        unmount(&self.path);
    }
}

/// An ext4 in a file, whose power can be cut.
pub(crate) struct LoopDisk {
    image: PathBuf,
    path: PathBuf,
}

impl LoopDisk {
    /// Makes one in `directory`; `None`, with a message, if this process may not mount.
    pub(crate) fn mount(directory: &Path, size: u64) -> Option<Self> {
        let (image, path) = (directory.join("disk.img"), directory.join("disk"));
        let made = File::create(&image).and_then(|file| file.set_len(size));
        made.and_then(|()| fs::create_dir(&path)).expect("the directory is ours");
        assert!(succeeds("mkfs.ext4", &["-q", &image.display().to_string()]), "e2fsprogs is there");
        if !attach(&image, &path) {
            eprintln!("SKIPPED: a power cut needs a disk of its own, and none can be mounted here");
            figure(NOT_RUN);
            return None;
        }
        Some(Self { image, path })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Brings what was written so far onto the disk.
    pub(crate) fn sync(&self) {
        assert!(succeeds("sync", &["--file-system", &self.path.display().to_string()]));
    }

    /// From now on nothing is written any more; what was not synced is lost (`EXT4_IOC_SHUTDOWN`, without a flush of
    /// the journal).
    pub(crate) fn cut(&self) {
        const SCRIPT: &str = "import fcntl, os, struct, sys; \
             fcntl.ioctl(os.open(sys.argv[1], os.O_RDONLY), 0x8004587D, struct.pack('I', 2))";
        assert!(succeeds("python3", &["-c", SCRIPT, &self.path.display().to_string()]));
    }

    /// Power is back: mounted again, with its journal replayed. Nobody may have a file of it open.
    pub(crate) fn restore(&self) {
        assert!(succeeds("umount", &[&self.path.display().to_string()]));
        assert!(attach(&self.image, &self.path), "it was mounted before");
    }
}

impl Drop for LoopDisk {
    fn drop(&mut self) {
        unmount(&self.path);
    }
}

fn attach(image: &Path, path: &Path) -> bool {
    succeeds("mount", &["-o", "loop", &image.display().to_string(), &path.display().to_string()])
}

/// Lazily: a daemon that a failed test left behind may still have files open there.
fn unmount(path: &Path) {
    if !succeeds("umount", &["--lazy", &path.display().to_string()]) {
        eprintln!("{} is still mounted", path.display());
    }
}

fn succeeds(program: &str, arguments: &[&str]) -> bool {
    Command::new(program).args(arguments).status().is_ok_and(|status| status.success())
}
