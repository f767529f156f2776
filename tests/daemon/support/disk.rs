//! Disks that tests treat badly. Mounting takes root, as in CI.

use std::{
    fs::{self, File},
    io::{ErrorKind, Write},
    path::{Path, PathBuf},
    process::Command,
};

use postrider_actors::testing::figure;

/// The figure of a test that is skipped: the table of faults says so.
const NOT_RUN: &str = "not run: no disk can be mounted here";

/// Room for names: filling them up takes no time.
const INODES: usize = 512;

/// A tmpfs of its own; unmounted when dropped. Declare it behind the world whose directories it holds.
pub(crate) struct SmallDisk {
    path: PathBuf,
}

impl SmallDisk {
    /// Mounts one of that size at `path`, which is made if need be; `None`, with a message, if this process may not mount.
    pub(crate) fn mount(path: &Path, size: &str) -> Option<Self> {
        fs::create_dir_all(path).expect("the directory is ours");
        let options = format!("size={size},nr_inodes={INODES},mode=0755");
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
        Some(Self { path: path.to_owned() })
    }

    /// Leaves neither a byte nor a name free.
    pub(crate) fn fill(&self) {
        let mut filler = File::create(self.filler()).expect("there is a name left");
        for chunk in [1 << 20, 4096, 1] {
            let bytes = vec![0; chunk];
            loop {
                match filler.write(&bytes) {
                    Ok(_) => {}
                    Err(error) if error.kind() == ErrorKind::StorageFull => break,
                    Err(error) => panic!("filling {}: {error}", self.path.display()),
                }
            }
        }
        fs::create_dir_all(self.names()).expect("there is a name left");
        for number in 0.. {
            match File::create(self.names().join(number.to_string())) {
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::StorageFull => break,
                Err(error) => panic!("filling {}: {error}", self.path.display()),
            }
        }
    }

    /// Frees what `fill` took.
    pub(crate) fn free(&self) {
        fs::remove_dir_all(self.names()).expect("it is ours");
        fs::remove_file(self.filler()).expect("it is ours");
    }

    /// Hidden, so that a feed ignores it.
    fn filler(&self) -> PathBuf {
        self.path.join(".filler")
    }

    fn names(&self) -> PathBuf {
        self.path.join(".names")
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
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
