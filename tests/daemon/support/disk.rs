//! Disks that tests treat badly. Mounting takes root, as in CI.

use std::{
    fs::{self, File},
    io::Write as _,
    path::{Path, PathBuf},
    process::Command,
};

/// A tmpfs of its own; unmounted when dropped.
pub(crate) struct SmallDisk {
    path: PathBuf,
}

impl SmallDisk {
    pub(crate) fn mount(path: &Path, size: &str) -> Self {
        fs::create_dir_all(path).expect("the directory is ours");
        run("mount", &["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs", &path.display().to_string()]);
        Self { path: path.to_owned() }
    }

    fn filler(&self) -> PathBuf {
        self.path.join("filler")
    }

    /// Leaves no byte free.
    pub(crate) fn fill(&self) {
        let mut filler = File::create(self.filler()).expect("a name needs no room");
        while filler.write(&[0; 4096]).is_ok_and(|written| written > 0) {}
    }

    /// Frees what `fill` took.
    pub(crate) fn free(&self) {
        fs::remove_file(self.filler()).expect("it was filled");
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Lazily: the daemon may still be running.
        run("umount", &["--lazy", &self.path.display().to_string()]);
    }
}

/// An ext4 in a file, whose power can be cut.
pub(crate) struct LoopDisk {
    image: PathBuf,
    path: PathBuf,
}

impl LoopDisk {
    /// Makes one in `directory`.
    pub(crate) fn mount(directory: &Path, size: u64) -> Self {
        let (image, path) = (directory.join("disk.img"), directory.join("disk"));
        let made = File::create(&image).and_then(|file| file.set_len(size));
        made.and_then(|()| fs::create_dir(&path)).expect("the directory is ours");
        run("mkfs.ext4", &["-q", &image.display().to_string()]);
        let disk = Self { image, path };
        disk.attach();
        disk
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    fn attach(&self) {
        run("mount", &["-o", "loop", &self.image.display().to_string(), &self.path.display().to_string()]);
    }

    /// Brings what was written so far onto the disk.
    pub(crate) fn sync(&self) {
        run("sync", &["--file-system", &self.path.display().to_string()]);
    }

    /// From now on nothing is written any more; what was not synced is lost (`EXT4_IOC_SHUTDOWN`, without a flush of
    /// the journal).
    pub(crate) fn cut(&self) {
        const SCRIPT: &str = "import fcntl, os, struct, sys; \
             fcntl.ioctl(os.open(sys.argv[1], os.O_RDONLY), 0x8004587D, struct.pack('I', 2))";
        run("python3", &["-c", SCRIPT, &self.path.display().to_string()]);
    }

    /// Power is back: mounted again, with its journal replayed. Nobody may have a file of it open.
    pub(crate) fn restore(&self) {
        run("umount", &[&self.path.display().to_string()]);
        self.attach();
    }
}

impl Drop for LoopDisk {
    fn drop(&mut self) {
        run("umount", &["--lazy", &self.path.display().to_string()]);
    }
}

fn run(program: &str, arguments: &[&str]) {
    let status = Command::new(program).args(arguments).status();
    assert!(
        status.is_ok_and(|status| status.success()),
        "{program} {arguments:?} failed; tests with disks need root"
    );
}
