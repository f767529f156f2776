//! A small disk that a test fills up.

use std::{
    fs::{self, File},
    io::Write as _,
    path::{Path, PathBuf},
    process::Command,
};

/// A tmpfs of its own; unmounted when dropped. Mounting takes root, as in CI.
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

fn run(program: &str, arguments: &[&str]) {
    let status = Command::new(program).args(arguments).status();
    assert!(
        status.is_ok_and(|status| status.success()),
        "{program} {arguments:?} failed; tests with disks need root"
    );
}
