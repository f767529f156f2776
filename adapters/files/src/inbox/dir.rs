//! A directory that is held open, and what is done in it. Names are looked up in the open directory and
//! links are never followed, so that whoever may write to a feed's directory can't lead us out of it.

use std::{
    ffi::{OsStr, OsString},
    fs::File,
    io::{self, Read, Write},
    os::{fd::OwnedFd, unix::ffi::OsStrExt},
    path::{Path, PathBuf},
};

use rustix::{
    fs::{Access, AtFlags, FileType, Mode, OFlags, RawMode, RenameFlags, Stat},
    io::Errno,
};

/// An open directory. `path` is for messages.
#[derive(Debug)]
pub(super) struct Dir {
    fd: OwnedFd,
    path: PathBuf,
}

/// Says what was being done when an error came, and keeps its kind.
pub(super) fn while_doing(error: impl Into<io::Error>, doing: impl std::fmt::Display) -> io::Error {
    let error = error.into();
    io::Error::new(error.kind(), format!("{doing}: {error}"))
}

/// A path for messages: what a dropper put into a name can't write to a terminal or start a line (F27).
pub(super) fn escaped(path: &Path) -> String {
    path.to_string_lossy().escape_debug().to_string()
}

const FLAGS: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);

impl Dir {
    /// Opens a directory that the configuration names; links on the way to it are the operator's.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let fd = rustix::fs::open(path, FLAGS, Mode::empty())
            .map_err(|error| while_doing(error, format_args!("directory {}", escaped(path))))?;
        Ok(Self { fd, path: path.to_owned() })
    }

    /// Opens a directory in this one. A link or a file of that name is an error.
    pub(super) fn child(&self, name: impl AsRef<OsStr>) -> io::Result<Self> {
        let name = name.as_ref();
        let path = self.path.join(name);
        let fd = rustix::fs::openat(&self.fd, name, FLAGS | OFlags::NOFOLLOW, Mode::empty())
            .map_err(|error| while_doing(error, format_args!("directory {}", escaped(&path))))?;
        Ok(Self { fd, path })
    }

    /// Opens a directory in this one and makes it if need be.
    pub(super) fn make_child(&self, name: impl AsRef<OsStr>, mode: RawMode) -> io::Result<Self> {
        match self.child(&name) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                match self.make_new_child(&name, mode) {
                    // Another feed was faster.
                    Err(error) if error.kind() == io::ErrorKind::AlreadyExists => self.child(name),
                    made => made,
                }
            }
            found => found,
        }
    }

    /// Fails if this process may not make, rename and remove names in it, as far as that can be told without trying.
    pub(super) fn check_writable(&self) -> io::Result<()> {
        let access = Access::WRITE_OK | Access::EXEC_OK;
        rustix::fs::accessat(&self.fd, ".", access, AtFlags::EACCESS)
            .map_err(|error| while_doing(error, format_args!("can't write to {}", escaped(&self.path))))
    }

    /// Makes a directory in this one; `AlreadyExists` if the name is taken.
    pub(super) fn make_new_child(&self, name: impl AsRef<OsStr>, mode: RawMode) -> io::Result<Self> {
        let name = name.as_ref();
        rustix::fs::mkdirat(&self.fd, name, Mode::from_raw_mode(mode))
            .map_err(|error| while_doing(error, format_args!("can't make directory {}", self.at(name))))?;
        self.child(name)
    }

    /// The path of `name`.
    pub(super) fn path_of(&self, name: impl AsRef<OsStr>) -> PathBuf {
        self.path.join(name.as_ref())
    }

    /// The path of `name`, for messages.
    pub(super) fn at(&self, name: impl AsRef<OsStr>) -> String {
        escaped(&self.path_of(name))
    }

    /// The entry `name`, links not followed; `None` if it does not exist.
    pub(super) fn stat(&self, name: impl AsRef<OsStr>) -> io::Result<Option<Stat>> {
        let name = name.as_ref();
        match rustix::fs::statat(&self.fd, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => Ok(Some(stat)),
            Err(Errno::NOENT) => Ok(None),
            Err(error) => Err(while_doing(error, format_args!("{}", self.at(name)))),
        }
    }

    /// Opens a file for reading without waiting for whoever writes to it, if it is a FIFO after all.
    pub(super) fn read(&self, name: impl AsRef<OsStr>) -> rustix::io::Result<File> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        rustix::fs::openat(&self.fd, name.as_ref(), flags, Mode::empty()).map(File::from)
    }

    /// Reads a small file; `None` if it does not exist, an error if it holds more than `max` bytes.
    pub(super) fn read_small(&self, name: impl AsRef<OsStr>, max: u64) -> io::Result<Option<Vec<u8>>> {
        let name = name.as_ref();
        let doing = || self.at(name);
        let file = match self.read(name) {
            Ok(file) => file,
            Err(Errno::NOENT) => return Ok(None),
            Err(error) => return Err(while_doing(error, doing())),
        };
        let mut bytes = Vec::new();
        file.take(max + 1).read_to_end(&mut bytes).map_err(|error| while_doing(error, doing()))?;
        if bytes.len() as u64 > max {
            let error = io::Error::new(io::ErrorKind::InvalidData, format!("longer than {max} bytes"));
            return Err(while_doing(error, doing()));
        }
        Ok(Some(bytes))
    }

    /// Makes a file for writing; whatever had that name is replaced.
    pub(super) fn create(&self, name: impl AsRef<OsStr>, mode: RawMode) -> io::Result<File> {
        let name = name.as_ref();
        self.remove(name)?;
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        rustix::fs::openat(&self.fd, name, flags, Mode::from_raw_mode(mode))
            .map(File::from)
            .map_err(|error| while_doing(error, format_args!("can't write {}", self.at(name))))
    }

    /// Writes a whole file.
    pub(super) fn write(&self, name: impl AsRef<OsStr>, bytes: &[u8], sync: bool) -> io::Result<()> {
        let name = name.as_ref();
        let mut file = self.create(name, 0o644)?;
        file.write_all(bytes)
            .and_then(|()| if sync { file.sync_all() } else { Ok(()) })
            .map_err(|error| while_doing(error, format_args!("can't write {}", self.at(name))))
    }

    /// Moves `name` to `new` in `to`; whatever stood there is replaced.
    pub(super) fn rename(
        &self,
        name: impl AsRef<OsStr>,
        to: &Self,
        new: impl AsRef<OsStr>,
    ) -> rustix::io::Result<()> {
        rustix::fs::renameat(&self.fd, name.as_ref(), &to.fd, new.as_ref())
    }

    /// Moves `name` to `new` in `to` unless that exists (`EXIST`).
    pub(super) fn rename_new(
        &self,
        name: impl AsRef<OsStr>,
        to: &Self,
        new: impl AsRef<OsStr>,
    ) -> rustix::io::Result<()> {
        let (name, new) = (name.as_ref(), new.as_ref());
        match rustix::fs::renameat_with(&self.fd, name, &to.fd, new, RenameFlags::NOREPLACE) {
            // A file system without that flag: looking first is the best there is.
            Err(Errno::INVAL | Errno::NOSYS) => {
                match rustix::fs::statat(&to.fd, new, AtFlags::SYMLINK_NOFOLLOW) {
                    Ok(_) => Err(Errno::EXIST),
                    Err(Errno::NOENT) => self.rename(name, to, new),
                    Err(error) => Err(error),
                }
            }
            done => done,
        }
    }

    /// Removes a file; one that is not there is not an error.
    pub(super) fn remove(&self, name: impl AsRef<OsStr>) -> io::Result<()> {
        self.unlink(name.as_ref(), AtFlags::empty())
    }

    /// Removes an empty directory; one that is not there is not an error.
    pub(super) fn remove_dir(&self, name: impl AsRef<OsStr>) -> io::Result<()> {
        self.unlink(name.as_ref(), AtFlags::REMOVEDIR)
    }

    fn unlink(&self, name: &OsStr, flags: AtFlags) -> io::Result<()> {
        match rustix::fs::unlinkat(&self.fd, name, flags) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(error) => Err(while_doing(error, format_args!("can't remove {}", self.at(name)))),
        }
    }

    /// Starts to list the names in it.
    pub(super) fn walk(&self) -> io::Result<rustix::fs::Dir> {
        rustix::fs::Dir::read_from(&self.fd)
            .map_err(|error| while_doing(error, format_args!("{}", escaped(&self.path))))
    }

    /// Every name in it, sorted. For directories that only we write to.
    pub(super) fn names(&self) -> io::Result<Vec<OsString>> {
        let mut names = Vec::new();
        for entry in self.walk()? {
            let entry = entry.map_err(|error| while_doing(error, format_args!("{}", escaped(&self.path))))?;
            let name = OsStr::from_bytes(entry.file_name().to_bytes());
            if name != "." && name != ".." {
                names.push(name.to_owned());
            }
        }
        names.sort_unstable();
        Ok(names)
    }

    /// Makes renames in it survive a power cut.
    pub(super) fn sync(&self) -> io::Result<()> {
        rustix::fs::fsync(&self.fd)
            .map_err(|error| while_doing(error, format_args!("can't sync {}", escaped(&self.path))))
    }
}

/// Why something is no file that may be read; `None` if it is one (F26).
pub(super) fn objection(stat: &Stat) -> Option<&'static str> {
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile if stat.st_nlink == 1 => None,
        FileType::RegularFile => {
            Some("it has several names (hard links), so it could change while it is read")
        }
        FileType::Symlink => Some("it is a symbolic link"),
        FileType::Directory => Some("it is a directory"),
        FileType::Fifo => Some("it is a FIFO"),
        FileType::CharacterDevice | FileType::BlockDevice => Some("it is a device"),
        FileType::Socket => Some("it is a socket"),
        FileType::Unknown => Some("it is not a regular file"),
    }
}
