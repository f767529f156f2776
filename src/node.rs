//! The identity of this process among several that share an outbox.
//!
//! The state directory holds a node id, made at the first start, and counts the starts. `PROCESS`, which
//! begins the names of holders of claims and of rate leases, is `<node>-<start>`: unique per start, and
//! an earlier start of the same node is recognisable. Whoever meets a claim of an earlier start knows
//! that its holder is gone and need not wait for it to run out.
//!
//! That knowledge must not be wrong: two machines with the same node id would take each other for an
//! earlier life, and take each other's batches. So the id is bound to where it was made, to the machine
//! and to the file's own inode. A copy of the state directory (an image, a restored backup) begins
//! as a new node; claims of the old one then expire, which costs one lease and nothing else.

use std::{
    fmt,
    fs::{self, File},
    io::{self, Write as _},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    str::FromStr,
};

use sha2::{Digest as _, Sha256};

/// The file's name in the state directory.
pub const NODE_FILE: &str = "node";

/// What systemd calls the machine (machine-id(5)); confidential, so only a digest of it is kept.
const MACHINE_ID: &str = "/etc/machine-id";

/// The first word of the file.
const VERSION: &str = "postrider-node-1";

/// Bytes of the file; far more than it ever has.
const FILE_BYTES_MAX: u64 = 4_096;

/// A node: what keeps one state directory. Sixteen hex digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct NodeId(u64);

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl fmt::Debug for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// One start of one node, as `<node>-<start>`: `model::lease::is_earlier_life` reads it so.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Process {
    /// The node.
    pub node: NodeId,
    /// Which start of it this is, from 1.
    pub start: u64,
}

impl fmt::Display for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.node, self.start)
    }
}

impl fmt::Debug for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Text that names no process.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("not a process id (expected <16 hex digits>-<start>)")]
pub struct ParseProcessError;

impl FromStr for Process {
    type Err = ParseProcessError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let parse = || {
            let (node, start) = text.split_once('-')?;
            let is_node = node.len() == 16 && node.bytes().all(|byte| byte.is_ascii_hexdigit());
            let is_start = start.bytes().all(|byte| byte.is_ascii_digit());
            let node = is_node.then(|| u64::from_str_radix(node, 16).ok())??;
            Some(Self { node: NodeId(node), start: is_start.then(|| start.parse().ok())?? })
        };
        parse().ok_or(ParseProcessError)
    }
}

/// Why the node's file could not be kept.
#[derive(Debug, thiserror::Error)]
#[error("{}: {error}; check that this user may write to state.dir and that the disk is not full", path.display())]
pub struct NodeError {
    /// The file.
    pub path: PathBuf,
    /// Why.
    pub error: io::Error,
}

/// A start that was counted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Started {
    /// Who this process is.
    pub process: Process,
    /// Why the node is a new one although there was a file; worth a line in the log.
    pub replaced: Option<&'static str>,
}

/// Counts a start of the node in `state_dir`, which the caller has locked, and makes the node if there is
/// none. Durable before it returns: no two starts ever have the same name.
pub fn start(state_dir: &Path) -> Result<Started, NodeError> {
    let machine = fs::read(MACHINE_ID).unwrap_or_default();
    start_on(state_dir, &machine)
}

fn start_on(state_dir: &Path, machine_id: &[u8]) -> Result<Started, NodeError> {
    let path = state_dir.join(NODE_FILE);
    let failed = |error| NodeError { path: path.clone(), error };
    let machine = machine_digest(machine_id);
    let (before, replaced) = match read(&path) {
        Ok(Some(record)) if record.machine != machine => (None, Some("it was made on another machine")),
        Ok(Some(record)) if record.inode != record.found_inode => (None, Some("it is a copy")),
        Ok(Some(record)) => (Some(record.process), None),
        Ok(None) => (None, Some("it can't be understood")),
        Err(error) if error.kind() == io::ErrorKind::NotFound => (None, None),
        Err(error) => return Err(failed(error)),
    };
    let process = match before {
        // A start that can't be counted on is a node of its own.
        Some(Process { node, start }) if start < u64::MAX => Process { node, start: start + 1 },
        _ => Process { node: NodeId(rand::random()), start: 1 },
    };
    write(state_dir, &path, process, &machine).map_err(failed)?;
    Ok(Started { process, replaced })
}

/// What the file says, and where it was found.
struct NodeFile {
    process: Process,
    machine: String,
    inode: u64,
    found_inode: u64,
}

/// `None` if what is there was not written by [`write`].
fn read(path: &Path) -> io::Result<Option<NodeFile>> {
    let file = File::open(path)?;
    let metadata = file.metadata()?;
    if metadata.len() > FILE_BYTES_MAX {
        return Ok(None);
    }
    let Ok(text) = String::from_utf8(fs::read(path)?) else { return Ok(None) };
    let parse = || {
        let [version, process, machine, inode] = text.strip_suffix('\n')?.split(' ').collect::<Vec<_>>()[..]
        else {
            return None;
        };
        (version == VERSION).then_some(())?;
        Some(NodeFile {
            process: process.parse().ok()?,
            machine: machine.to_owned(),
            inode: inode.parse().ok()?,
            found_inode: metadata.ino(),
        })
    };
    Ok(parse())
}

/// Written beside it, synced and renamed: a crash leaves the old file or the new one.
fn write(state_dir: &Path, path: &Path, process: Process, machine: &str) -> io::Result<()> {
    let fresh = state_dir.join(format!("{NODE_FILE}.new"));
    let mut file = File::create(&fresh)?;
    let inode = file.metadata()?.ino();
    writeln!(file, "{VERSION} {process} {machine} {inode}")?;
    file.sync_all()?;
    fs::rename(&fresh, path)?;
    File::open(state_dir)?.sync_all()
}

/// machine-id(5): an application should keep no more than a keyed digest of it.
fn machine_digest(machine_id: &[u8]) -> String {
    let mut hash = Sha256::new();
    hash.update(b"postrider node\0");
    hash.update(machine_id.trim_ascii());
    let digest = hash.finalize();
    let first = u64::from_be_bytes(std::array::from_fn(|index| digest[index]));
    format!("{first:016x}")
}

#[cfg(test)]
mod tests {
    use postrider_actors::model::ledger::is_earlier_life;

    use super::*;

    #[test]
    fn each_start_has_a_name_of_its_own_and_later_ones_know_earlier_ones() {
        let dir = tempfile::tempdir().unwrap();
        let starts: Vec<_> = (0..3).map(|_| start_on(dir.path(), b"m").unwrap()).collect();
        assert!(starts.iter().all(|start| start.replaced.is_none()));
        assert_eq!(starts.iter().map(|start| start.process.start).collect::<Vec<_>>(), [1, 2, 3]);
        let (first, last) = (starts[0].process, starts[2].process);
        let is_earlier =
            |one: Process, other: Process| is_earlier_life(&format!("{one}/w"), &format!("{other}/w"));
        assert!(is_earlier(first, last) && !is_earlier(last, first) && !is_earlier(last, last));
        let other = start_on(tempfile::tempdir().unwrap().path(), b"m").unwrap().process;
        assert!(other.node != first.node && !is_earlier(other, last) && !is_earlier(last, other));
        assert_eq!(last.to_string(), format!("{}-3", first.node));
        assert_eq!(last.to_string().parse(), Ok(last));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_copy_and_another_machine_are_nodes_of_their_own() {
        let dir = tempfile::tempdir().unwrap();
        let first = start_on(dir.path(), b"m").unwrap().process;
        let elsewhere = start_on(dir.path(), b"n").unwrap();
        assert_eq!(elsewhere.replaced, Some("it was made on another machine"));
        assert!(elsewhere.process.node != first.node && elsewhere.process.start == 1);

        let copy = tempfile::tempdir().unwrap();
        fs::copy(dir.path().join(NODE_FILE), copy.path().join(NODE_FILE)).unwrap();
        let copied = start_on(copy.path(), b"n").unwrap();
        assert_eq!(copied.replaced, Some("it is a copy"));
        assert_ne!(copied.process.node, elsewhere.process.node);
        // The original continues.
        assert_eq!(start_on(dir.path(), b"n").unwrap().process.node, elsewhere.process.node);
    }

    #[test]
    fn what_can_not_be_understood_is_replaced_and_said() {
        let dir = tempfile::tempdir().unwrap();
        for damage in ["", "\n", "postrider-node-1 x y z\n", "postrider-node-2 0000000000000001-1 m 1\n"] {
            fs::write(dir.path().join(NODE_FILE), damage).unwrap();
            let started = start_on(dir.path(), b"m").unwrap();
            assert_eq!(started.replaced, Some("it can't be understood"), "{damage:?}");
            assert_eq!(started.process.start, 1);
        }
        fs::write(dir.path().join(NODE_FILE), vec![b'x'; 5_000]).unwrap();
        assert!(start_on(dir.path(), b"m").unwrap().replaced.is_some());
    }

    #[test]
    fn a_directory_that_can_not_be_written_is_an_error_that_names_the_file() {
        let error = start_on(Path::new("/nowhere/postrider"), b"m").unwrap_err();
        assert!(error.to_string().starts_with("/nowhere/postrider/node: "), "{error}");
    }

    #[test]
    fn only_a_process_s_own_spelling_is_read() {
        for text in ["", "-", "1-1", "0000000000000001-", "0000000000000001-+1", "+000000000000001-1", "é-1"]
        {
            assert_eq!(text.parse::<Process>(), Err(ParseProcessError), "{text}");
        }
    }
}
