//! Moving a file away once it is read, and the report beside it.

use std::{
    ffi::OsStr,
    fs,
    io::{self, Read as _},
    path::Path,
};

use postrider_actors::{
    failpoint,
    model::{
        file::{FileReport, FileState},
        ids::FileId,
        time::{UnixMs, as_rfc3339},
    },
    ports::ClaimedFile,
};
use rustix::{fs::FileType, io::Errno};

use super::{
    DONE, DirectoryInbox, TERMS, claim,
    dir::{Dir, while_doing},
    page::page,
    sidecar_name,
};

/// A file system's limit on names, in bytes.
const NAME_BYTES_MAX: usize = 255;
/// What is left of that beside the longest thing that is put around it, a hidden report's name.
const PLACE_BYTES_MAX: usize = NAME_BYTES_MAX - ".".len() - ".report.json.01234567".len();
/// Beside the reports: which follow another, whose file has the same bytes. `COPIES/ID/PLACE` holds the name under which
/// the copy was dropped.
const COPIES: &str = ".copies";
/// A report is some counters per destination.
const REPORT_BYTES_MAX: u64 = 16 << 20;

/// The name that a file and what belongs to it have in `done/` or `failed/`.
pub(super) struct FinishedName(String);

impl FinishedName {
    fn report(&self) -> String {
        format!("{}.report.json", self.0)
    }

    fn page(&self) -> String {
        format!("{}.report.html", self.0)
    }

    /// The name of the export of rejected rows.
    pub(super) fn rejects(&self) -> String {
        format!("{}.rejects.csv", self.0)
    }
}

/// The directory that a file goes to by its state.
pub(super) fn target(inbox: &DirectoryInbox, report: &FileReport) -> io::Result<Dir> {
    let name = match report.state {
        FileState::Ingesting | FileState::Ingested => "done",
        FileState::Failed(_) | FileState::SourceLost(_) => "failed",
    };
    inbox.directory()?.make_child(name, 0o755)
}

/// A report as it is written for this drop of its file: the same bytes may have come before under another name.
pub(super) fn as_dropped(file: &ClaimedFile, report: &FileReport) -> FileReport {
    named(file.display_name(), report)
}

fn named(name: String, report: &FileReport) -> FileReport {
    let mut own = report.clone();
    own.file.name = name;
    own
}

/// Finds the place of a file, or reserves one by writing its report there. A name that another file has
/// taken gets the start of the file id behind it. Found by name and id, so a repetition after a crash, or a
/// day later, finds the same place. A report that is there is left: it may be the final one.
pub(super) fn reserve(dir: &Dir, report: &FileReport) -> io::Result<FinishedName> {
    for place in places(report) {
        loop {
            match look(dir, &place, report.file.id)? {
                Found::Ours { .. } => return Ok(place),
                Found::Taken => break,
                Found::Torn => {
                    write_report(dir, &place, report, false)?;
                    return Ok(place);
                }
                Found::Free => {}
            }
            let hidden = write_hidden(dir, &place, report, false)?;
            match dir.rename_new(&hidden, dir, place.report()) {
                Ok(()) => return Ok(place),
                // Somebody who finishes a file at the same time was faster; it may be this one's final report.
                Err(Errno::EXIST) => dir.remove(&hidden)?,
                Err(error) => return Err(cant_write(dir, &place, error)),
            }
        }
    }
    let text = format!("no free name for {}", dir.at(&report.file.name));
    Err(io::Error::new(io::ErrorKind::AlreadyExists, text))
}

/// The places that a file may have, the first that is free or its own being the one.
fn places(report: &FileReport) -> [FinishedName; 3] {
    let (name, hex) = (&report.file.name, report.file.id.to_string());
    [String::new(), format!(".{}", &hex[..8]), format!(".{hex}")].map(|suffix| {
        let mut length = name.len().min(PLACE_BYTES_MAX - suffix.len());
        while !name.is_char_boundary(length) {
            length -= 1;
        }
        // The suffix keeps long names that differ only behind the cut apart, like equal ones.
        FinishedName(format!("{}{suffix}", &name[..length]))
    })
}

/// What is in a place.
enum Found {
    Free,
    /// Something of another file, or of nobody here.
    Taken,
    /// A report that a power cut has torn, and no file.
    Torn,
    Ours {
        is_final: bool,
    },
}

/// All that is needed of a report.
#[derive(serde::Deserialize)]
struct ReportHead {
    id: FileId,
    #[serde(with = "as_rfc3339::option", default)]
    settled_at: Option<UnixMs>,
}

/// The file whose report lies in `done` or `failed` of a feed's directory under this name, which need not be the one that it
/// was read under: the same bytes may have come before.
pub fn reported(directory: &Path, name: &str) -> Option<FileId> {
    if name.contains('/') {
        return None;
    }
    ["done", "failed"].into_iter().find_map(|place| {
        let path = directory.join(place).join(FinishedName(name.to_owned()).report());
        fs::symlink_metadata(&path).ok().filter(fs::Metadata::is_file)?;
        let mut text = Vec::new();
        fs::File::open(path).ok()?.take(REPORT_BYTES_MAX).read_to_end(&mut text).ok()?;
        serde_json::from_slice::<ReportHead>(&text).ok().map(|head| head.id)
    })
}

fn look(dir: &Dir, place: &FinishedName, id: FileId) -> io::Result<Found> {
    let is_no_file = |stat: rustix::fs::Stat| FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile;
    if dir.stat(place.report())?.is_some_and(is_no_file) {
        return Ok(Found::Taken); // a directory, say: nothing of ours
    }
    let has_file = dir.stat(&place.0)?.is_some();
    match dir.read_small(place.report(), REPORT_BYTES_MAX) {
        Ok(Some(bytes)) => Ok(match serde_json::from_slice::<ReportHead>(&bytes) {
            Ok(head) if head.id == id => Found::Ours { is_final: head.settled_at.is_some() },
            Err(_) if !has_file => Found::Torn,
            _ => Found::Taken,
        }),
        Ok(None) if !has_file => Ok(Found::Free),
        Ok(None) => Ok(Found::Taken),
        // Longer than any report.
        Err(error) if error.kind() == io::ErrorKind::InvalidData => Ok(Found::Taken),
        Err(error) => Err(error),
    }
}

/// Writes a report under a hidden name.
fn write_hidden(dir: &Dir, place: &FinishedName, report: &FileReport, sync: bool) -> io::Result<String> {
    // Two files may compete for one place.
    let hidden = format!(".{}.{}", place.report(), &report.file.id.to_string()[..8]);
    let mut text = serde_json::to_vec_pretty(&report.view()?)?;
    text.push(b'\n');
    dir.write(&hidden, &text, sync)?;
    Ok(hidden)
}

/// A final report comes with a page for people, which is there first. Only the report is synced: it is the proof.
fn write_report(dir: &Dir, place: &FinishedName, report: &FileReport, sync: bool) -> io::Result<()> {
    // A file may have been dropped under the page's name: that one has a report of its own.
    let is_taken = || dir.stat(FinishedName(place.page()).report()).map(|found| found.is_some());
    if report.settled_at.is_some() && !is_taken()? {
        let hidden = format!(".{}.{}", place.page(), &report.file.id.to_string()[..8]);
        dir.write(&hidden, page(report).as_bytes(), false)?;
        dir.rename(hidden, dir, place.page()).map_err(|error| cant_write(dir, place, error))?;
    }
    let hidden = write_hidden(dir, place, report, sync)?;
    dir.rename(hidden, dir, place.report()).map_err(|error| cant_write(dir, place, error))
}

fn cant_write(dir: &Dir, place: &FinishedName, error: Errno) -> io::Error {
    while_doing(error, format_args!("can't write {}", dir.at(place.report())))
}

/// Writes the report, then moves the file and its sidecars. Nothing is synced: until its last message has
/// settled (`rewrite_reports`), everything here can be made again from the store and the claim.
pub(super) fn finish(inbox: &DirectoryInbox, file: &ClaimedFile, report: &FileReport) -> io::Result<()> {
    let dir = target(inbox, report)?;
    let own = as_dropped(file, report);
    let place = reserve(&dir, &own)?;
    if own.file.name != report.file.name {
        note_copy(&dir, &place, &own, report)?;
    }
    failpoint!("inbox.reported");
    let path = file.directory();
    let Some(home) = claim::home(inbox, path)? else { return Ok(()) };
    // Without its note a directory that is empty is one that is finished, not one whose file was lost.
    claim::forget(&home)?;
    move_out(&home, &file.name, &dir, &place.0)?;
    failpoint!("inbox.moved");
    for ending in [DONE, TERMS] {
        move_out(&home, &sidecar_name(&file.name, ending), &dir, &format!("{}{ending}", place.0))?;
    }
    claim::release(inbox, path)
}

/// Sees to it that the report of a copy follows the first one's, which may be final already, become so just now, or later.
fn note_copy(dir: &Dir, place: &FinishedName, own: &FileReport, first: &FileReport) -> io::Result<()> {
    let copies = dir.make_child(COPIES, 0o755)?.make_child(own.file.id.to_string(), 0o755)?;
    copies.write(&place.0, own.file.name.as_bytes(), true)?;
    if own.settled_at.is_some() {
        return write_report(dir, place, own, true);
    }
    for of_first in places(first) {
        if let Found::Ours { is_final: true } = look(dir, &of_first, own.file.id)? {
            // Whoever rewrote it may have looked for copies before there was this one.
            let bytes = dir.read_small(of_first.report(), REPORT_BYTES_MAX)?.unwrap_or_default();
            return rewrite_copies(dir, &serde_json::from_slice(&bytes)?);
        }
    }
    Ok(())
}

/// Replaces the reports of a file's copies, with the same counts.
fn rewrite_copies(dir: &Dir, report: &FileReport) -> io::Result<()> {
    let copies = match dir.child(COPIES).and_then(|all| all.child(report.file.id.to_string())) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        copies => copies?,
    };
    for place in copies.names()? {
        let name = copies.read_small(&place, REPORT_BYTES_MAX)?.unwrap_or_default();
        let own = named(String::from_utf8_lossy(&name).into_owned(), report);
        write_report(dir, &FinishedName(place.to_string_lossy().into_owned()), &own, true)?;
    }
    Ok(())
}

/// Moves a file, to another file system too; one that vanished is not an error.
fn move_out(home: &Dir, name: &OsStr, dir: &Dir, new: &str) -> io::Result<()> {
    match home.rename(name, dir, new) {
        Ok(()) | Err(Errno::NOENT | Errno::NAMETOOLONG) => Ok(()),
        // Linux looks at the file systems before it looks for the name: nothing may be there to be moved.
        Err(Errno::XDEV) if home.stat(name)?.is_none() => Ok(()),
        Err(Errno::XDEV) => {
            let hidden = format!(".{new}.tmp");
            claim::copy(home, dir, name, OsStr::new(&hidden))?;
            dir.rename(&hidden, dir, new).map_err(io::Error::from)?;
            home.remove(name)
        }
        Err(error) => {
            Err(while_doing(error, format_args!("can't move {} to {}", home.at(name), dir.at(new))))
        }
    }
}

/// Replaces the reports of finished files and syncs them. A report that is not there any more is written
/// anew: it is the proof. Returns those that could not be written.
pub(super) fn rewrite_reports(inbox: &DirectoryInbox, reports: &[FileReport]) -> Vec<(FileId, io::Error)> {
    let mut failed = Vec::new();
    let mut written: Vec<(Dir, Vec<FileId>)> = Vec::new();
    for report in reports {
        match rewrite(inbox, report) {
            Ok(dir) => match written.iter_mut().find(|(known, _)| known.path_of("") == dir.path_of("")) {
                Some((_, files)) => files.push(report.file.id),
                None => written.push((dir, vec![report.file.id])),
            },
            Err(error) => failed.push((report.file.id, error)),
        }
    }
    for (dir, files) in written {
        if let Err(error) = dir.sync() {
            failed.extend(files.into_iter().map(|file| (file, while_doing(error.kind(), &error))));
        }
    }
    failed
}

/// Replaces one report; the directory that it is in.
fn rewrite(inbox: &DirectoryInbox, report: &FileReport) -> io::Result<Dir> {
    let dir = target(inbox, report)?;
    let place = reserve(&dir, report)?;
    write_report(&dir, &place, report, true)?;
    rewrite_copies(&dir, report)?;
    Ok(dir)
}
