//! Opening the database: pragmas, schema versions, and refusing what is not ours or not whole.

use std::{
    fmt::Write as _,
    fs::{self, File, OpenOptions, Permissions},
    io::{self, Read},
    os::unix::{
        ffi::OsStrExt as _,
        fs::{FileExt as _, OpenOptionsExt as _, PermissionsExt as _},
    },
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use rusqlite::{Connection, ErrorCode, OpenFlags, config::DbConfig};

use super::tx::TxError;

/// The database's name in the state directory.
pub const DATABASE: &str = "postrider.db";

/// `Ptrd`: what `file(1)` and we know the database by.
const APPLICATION_ID: i32 = 0x5074_7264;

/// 3.51.3 fixed a rare loss of committed frames when a WAL is reset under two connections.
const SQLITE_VERSION_MIN: i32 = 3_051_003;

/// Not decided by speed: `benches/store.rs` found no difference between 4, 8 and 16 KiB. Larger pages need fewer
/// of them for a payload, smaller ones less log for a commit of little; this is the middle.
const PAGE_BYTES: u32 = 8192;

/// Steps from one schema version to the next; `user_version` counts those applied. Never edit one that
/// was released: append.
const MIGRATIONS: [&str; SCHEMA_VERSION as usize] = [include_str!("schema.sql")];

/// The schema version that this program reads and writes.
pub const SCHEMA_VERSION: i32 = 1;

/// Another process may be writing: the CLI beside the daemon, or the other way round. Its transactions
/// are bounded, so this is far beyond what waiting takes.
const BUSY_TIMEOUT: Duration = Duration::from_secs(10);

/// Between two tries. SQLite's own waits grow to 100 ms and meet no gap between the transactions of a command that works
/// through millions: whoever waits longest would wait on.
const BUSY_PAUSE: Duration = Duration::from_millis(1);

/// <https://www.sqlite.org/fileformat2.html#the_write_ahead_log>.
const WAL_HEADER_BYTES: usize = 32;
const WAL_FRAME_HEADER_BYTES: usize = 24;

/// Why the store could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// It does not exist yet.
    #[error(
        "there is no store at {}; is state.dir right, and has `postrider run` been started once?", .0.display()
    )]
    Missing(PathBuf),
    /// It is not one of our databases.
    #[error(
        "{} is not a Postrider database (application id {found:#x}, expected {APPLICATION_ID:#x}); it was left \
         untouched: give Postrider a state.dir of its own", path.display()
    )]
    Foreign {
        /// The file.
        path: PathBuf,
        /// Its application id.
        found: i32,
    },
    /// It is damaged. Never repaired or recreated unasked (F15).
    #[error(
        "{} is damaged: {detail}. It was left untouched. Stop Postrider, copy {DATABASE}* away, restore a \
         backup or try `sqlite3 {DATABASE} .recover`; starting without it would send every file again",
        path.display()
    )]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// What was found.
        detail: String,
    },
    /// A newer program wrote it (F16).
    #[error(
        "{} has schema version {found}, this program knows up to {SCHEMA_VERSION}: it was written by a newer \
         Postrider; run that version", path.display()
    )]
    Newer {
        /// The file.
        path: PathBuf,
        /// Its schema version.
        found: i32,
    },
    /// An older program wrote it, and this caller may not migrate it.
    #[error(
        "{} has schema version {found}, this program reads {SCHEMA_VERSION}; run `postrider migrate` (the \
         daemon does so when it starts)", path.display()
    )]
    Older {
        /// The file.
        path: PathBuf,
        /// Its schema version.
        found: i32,
    },
    /// The linked SQLite is too old to be trusted.
    #[error(
        "SQLite {found} is linked, {SQLITE_VERSION_MIN} or newer is needed; build Postrider with its bundled SQLite"
    )]
    Library {
        /// `sqlite3_libversion_number()`.
        found: i32,
    },
    /// The disk, the permissions or SQLite said no.
    #[error("can't open {}: {detail}; check that this user may read and write it and its directory", path.display())]
    Unavailable {
        /// The file.
        path: PathBuf,
        /// What was said.
        detail: String,
    },
}

impl OpenError {
    fn from_sqlite(path: &Path, error: &rusqlite::Error) -> Self {
        let (path, detail) = (path.to_owned(), error.to_string());
        match error.sqlite_error_code() {
            Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => Self::Corrupt { path, detail },
            _ => Self::Unavailable { path, detail },
        }
    }

    /// The same of a transaction.
    pub(crate) fn from_tx(path: &Path, error: &TxError) -> Self {
        match error {
            TxError::Sqlite(error) => Self::from_sqlite(path, error),
            other => Self::Unavailable { path: path.to_owned(), detail: other.to_string() },
        }
    }
}

/// What a connection is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    /// The daemon's writer: makes and migrates the database.
    Own,
    /// A command beside it: writes, but neither makes nor migrates.
    Write,
    /// Reads only.
    Read,
}

/// Opens the database in `state_dir`.
pub(crate) fn open(state_dir: &Path, access: Access) -> Result<Connection, OpenError> {
    let library = rusqlite::version_number();
    if library < SQLITE_VERSION_MIN {
        return Err(OpenError::Library { found: library });
    }
    let path = state_dir.join(DATABASE);
    match fs::metadata(&path) {
        // It is made whole under another name: neither a crash nor a power cut leaves an empty one.
        Ok(metadata) if metadata.len() == 0 => {
            return Err(OpenError::Corrupt { path, detail: "it is empty".into() });
        }
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound && access == Access::Own => create(&path)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(OpenError::Missing(path)),
        Err(error) => return Err(OpenError::Unavailable { path, detail: error.to_string() }),
    }
    if access == Access::Own {
        make_readable(&path)
            .map_err(|error| OpenError::Unavailable { path: path.clone(), detail: error.to_string() })?;
    }
    check_wal_header(&path)?;
    let flags = OpenFlags::SQLITE_OPEN_NO_MUTEX
        | match access {
            Access::Own | Access::Write => OpenFlags::SQLITE_OPEN_READ_WRITE,
            Access::Read => OpenFlags::SQLITE_OPEN_READ_ONLY,
        };
    let sql = |error: rusqlite::Error| OpenError::from_sqlite(&path, &error);
    let mut connection = Connection::open_with_flags(&path, flags).map_err(sql)?;
    if access == Access::Read && needs_a_log(&connection) && is_closed(&path) {
        connection = open_unchanging(&path).map_err(sql)?;
    }
    connection.busy_handler(Some(wait_for_others)).map_err(sql)?;
    connection.set_prepared_statement_cache_capacity(96);
    let number = |pragma: &str| -> Result<i32, OpenError> {
        connection.pragma_query_value(None, pragma, |row| row.get(0)).map_err(sql)
    };
    let (found, version) = (number("application_id")?, number("user_version")?);
    if found != APPLICATION_ID {
        return Err(OpenError::Foreign { path, found });
    }
    if version > SCHEMA_VERSION {
        return Err(OpenError::Newer { path, found: version });
    }
    if version < SCHEMA_VERSION && access != Access::Own {
        return Err(OpenError::Older { path, found: version });
    }
    configure(&connection, access).map_err(sql)?;
    if access == Access::Own {
        let lost = lost_commits(&connection, &path)?;
        if lost.commits > 0 {
            tracing::error!(
                store = ?path.display(),
                frame = lost.frame,
                commits = lost.commits,
                "the store's log is not whole: the commits from this frame on are lost. After a power cut nothing of them \
                 was acknowledged; without one the disk is failing: compare done/ with `postrider files`, and drop again \
                 what is missing there"
            );
        }
        migrate(&mut connection).map_err(sql)?;
    }
    Ok(connection)
}

/// Whether it is worth another try after so many.
fn wait_for_others(tries: i32) -> bool {
    thread::sleep(BUSY_PAUSE);
    u128::try_from(tries).is_ok_and(|tries| tries < BUSY_TIMEOUT.as_millis() / BUSY_PAUSE.as_millis())
}

/// Makes an empty store, whole or not at all: under another name, which it loses once everything of it is on the disk.
fn create(path: &Path) -> Result<(), OpenError> {
    refuse_orphaned_wal(path)?;
    let unavailable =
        |error: io::Error| OpenError::Unavailable { path: path.to_owned(), detail: error.to_string() };
    let new = beside(path, ".new");
    // What an earlier try left.
    for left in [new.clone(), beside(&new, "-journal")] {
        match fs::remove_file(left) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(unavailable(error)),
            _ => {}
        }
    }
    make_readable(&new).map_err(unavailable)?;
    let sql = |error: rusqlite::Error| OpenError::from_sqlite(path, &error);
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let mut connection = Connection::open_with_flags(&new, flags).map_err(sql)?;
    connection.pragma_update(None, "page_size", PAGE_BYTES).map_err(sql)?;
    // Without a log yet: every commit is in the file itself.
    migrate(&mut connection).map_err(sql)?;
    connection.close().map_err(|(_, error)| sql(error))?;
    File::open(&new).and_then(|file| file.sync_all()).map_err(unavailable)?;
    fs::rename(&new, path).map_err(unavailable)?;
    let directory = path.parent().expect("the database is in the state directory");
    File::open(directory).and_then(|directory| directory.sync_all()).map_err(unavailable)
}

/// Whether reading fails for want of the log's files, which a reader who may not write there can't make.
fn needs_a_log(connection: &Connection) -> bool {
    let read = connection.query_row("SELECT count(*) FROM sqlite_schema", [], |row| row.get::<_, i64>(0));
    let code = read.err().and_then(|error| error.sqlite_error_code());
    matches!(code, Some(ErrorCode::CannotOpen | ErrorCode::ReadOnly))
}

/// Whether everything is in the database: who closed it last has emptied its log.
fn is_closed(path: &Path) -> bool {
    match fs::metadata(wal_path(path)) {
        Ok(metadata) => metadata.len() == 0,
        Err(error) => error.kind() == io::ErrorKind::NotFound,
    }
}

/// Opens a database that nobody has open, without a log (<https://www.sqlite.org/uri.html>, `immutable`). A daemon that starts
/// just now writes to its log first: what is read here is as it was before.
fn open_unchanging(path: &Path) -> rusqlite::Result<Connection> {
    let mut uri = "file:".to_owned();
    for byte in path.as_os_str().as_bytes() {
        if byte.is_ascii_alphanumeric() || b"/-._~".contains(byte) {
            uri.push(char::from(*byte));
        } else {
            write!(uri, "%{byte:02X}").expect("strings take everything");
        }
    }
    uri.push_str("?immutable=1");
    let flags =
        OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_URI | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    Connection::open_with_flags(uri, flags)
}

/// What the group of the daemon may do whatever the umask: commands read. SQLite gives its log the same.
const MODE: u32 = 0o640;

/// Makes the file if need be, and sets its permissions.
fn make_readable(path: &Path) -> io::Result<()> {
    let file = OpenOptions::new().write(true).create(true).truncate(false).mode(MODE).open(path)?;
    match file.set_permissions(Permissions::from_mode(MODE)) {
        // It belongs to somebody else, who decides.
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Ok(()),
        done => done,
    }
}

fn configure(connection: &Connection, access: Access) -> rusqlite::Result<()> {
    // The bundled SQLite replans a cached SELECT whenever other values are bound to it (STAT4): a sixth of
    // the writer's time, for the same plan. It also keeps the partial indexes in use whatever is bound.
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_ENABLE_QPSG, true)?;
    // KiB. Small, so that memory is the same for a short file as for a long one (I8).
    let cache_kib = if access == Access::Own { 2048 } else { 512 };
    connection.pragma_update(None, "cache_size", -cache_kib)?;
    connection.pragma_update(None, "temp_store", "MEMORY")?;
    // The WAL is checkpointed by the writer's own hand: SQLite hides errors of automatic checkpoints, and
    // an fsync that failed once must never be repeated as if nothing had happened.
    connection.pragma_update(None, "wal_autocheckpoint", 0)?;
    if access == Access::Read {
        return connection.pragma_update(None, "query_only", true);
    }
    connection.pragma_update_and_check(None, "journal_mode", "WAL", |row| row.get::<_, String>(0))?;
    // FULL: with NORMAL, 500 of 500 acknowledged commits were lost at a power cut (design §7).
    connection.pragma_update(None, "synchronous", "FULL")?;
    connection.pragma_update(None, "journal_size_limit", 64 * 1024 * 1024)?;
    connection.pragma_update(None, "cell_size_check", true)
}

/// Brings the schema up to date, each step in a transaction of its own.
fn migrate(connection: &mut Connection) -> rusqlite::Result<()> {
    loop {
        let transaction = connection.transaction_with_behavior(rusqlite::TransactionBehavior::Immediate)?;
        let version: i32 = transaction.pragma_query_value(None, "user_version", |row| row.get(0))?;
        let Some(step) = usize::try_from(version).ok().and_then(|version| MIGRATIONS.get(version)) else {
            return Ok(());
        };
        transaction.execute_batch(step)?;
        transaction.pragma_update(None, "application_id", APPLICATION_ID)?;
        transaction.pragma_update(None, "user_version", version + 1)?;
        transaction.commit()?;
    }
}

/// The schema version of the store in `state_dir`.
pub fn schema_version(state_dir: &Path) -> Result<i32, OpenError> {
    let path = state_dir.join(DATABASE);
    if !path.exists() {
        return Err(OpenError::Missing(path));
    }
    check_wal_header(&path)?;
    let sql = |error: rusqlite::Error| OpenError::from_sqlite(&path, &error);
    let connection = Connection::open_with_flags(&path, OpenFlags::SQLITE_OPEN_READ_ONLY).map_err(sql)?;
    connection.pragma_query_value(None, "user_version", |row| row.get(0)).map_err(sql)
}

fn beside(path: &Path, ending: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(ending);
    name.into()
}

fn wal_path(path: &Path) -> PathBuf {
    beside(path, "-wal")
}

/// A log without its database: somebody removed the database. SQLite would delete the log, and with it
/// commits that were acknowledged.
fn refuse_orphaned_wal(path: &Path) -> Result<(), OpenError> {
    let wal = wal_path(path);
    match fs::metadata(&wal) {
        Ok(metadata) if metadata.len() > 0 => Err(OpenError::Corrupt {
            path: path.to_owned(),
            detail: format!("it is missing, while its log {} is there", wal.display()),
        }),
        _ => Ok(()),
    }
}

/// SQLite takes a log with a damaged header for an empty one and would silently forget every commit in it (F15). It syncs
/// the header before it writes anything behind it, so that a power cut leaves a damaged one alone, if at all.
fn check_wal_header(path: &Path) -> Result<(), OpenError> {
    let wal = wal_path(path);
    let unavailable =
        |error: io::Error| OpenError::Unavailable { path: wal.clone(), detail: error.to_string() };
    let mut file = match File::open(&wal) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(unavailable(error)),
    };
    let length = file.metadata().map_err(unavailable)?.len();
    let mut header = [0; WAL_HEADER_BYTES];
    if length <= header.len() as u64 {
        return Ok(());
    }
    file.read_exact(&mut header).map_err(unavailable)?;
    if wal_header_is_whole(&header) {
        return Ok(());
    }
    Err(OpenError::Corrupt { path: wal, detail: "the header of the write-ahead log is wrong".into() })
}

/// What SQLite left out of the log when it recovered.
pub(crate) struct LostCommits {
    /// The first frame that is not whole, or the one behind the last, counted from 1.
    pub(crate) frame: u64,
    pub(crate) commits: u64,
}

/// What follows a frame of the log that is not whole SQLite forgets. After a power cut that is what nobody was promised:
/// commits that were not synced. If the frame was damaged later it may be more, and nothing in the log tells the two
/// apart: so it is said, with what to look at (F15). Frames of a transaction that did not end are no commit.
pub(crate) fn lost_commits(connection: &Connection, path: &Path) -> Result<LostCommits, OpenError> {
    let sql = |error: rusqlite::Error| OpenError::from_sqlite(path, &error);
    let whole: i64 =
        connection.query_row("PRAGMA wal_checkpoint(NOOP)", [], |row| row.get(1)).map_err(sql)?;
    let page_bytes: u32 = connection.pragma_query_value(None, "page_size", |row| row.get(0)).map_err(sql)?;
    let wal = wal_path(path);
    // -1: there is no log.
    let whole = u64::try_from(whole).unwrap_or(0);
    let frame_bytes = WAL_FRAME_HEADER_BYTES as u64 + u64::from(page_bytes);
    let commits = commits_behind(&wal, whole, frame_bytes)
        .map_err(|error| OpenError::Unavailable { path: wal, detail: error.to_string() })?;
    Ok(LostCommits { frame: whole + 1, commits })
}

/// How many commits of the log's present run are behind its first `whole` frames.
fn commits_behind(wal: &Path, whole: u64, frame_bytes: u64) -> io::Result<u64> {
    let file = match File::open(wal) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
        Err(error) => return Err(error),
    };
    let length = file.metadata()?.len();
    if length <= WAL_HEADER_BYTES as u64 {
        return Ok(0);
    }
    let mut salts = [0; 8];
    file.read_exact_at(&mut salts, 16)?;
    let mut commits = 0;
    let mut at = WAL_HEADER_BYTES as u64 + whole * frame_bytes;
    while at + frame_bytes <= length {
        let mut frame = [0; WAL_FRAME_HEADER_BYTES];
        file.read_exact_at(&mut frame, at)?;
        // Bytes 4 to 8 are the size of the database in the last frame of a commit, else zero.
        commits += u64::from(frame[8..16] == salts && frame[4..8] != [0; 4]);
        at += frame_bytes;
    }
    Ok(commits)
}

/// <https://www.sqlite.org/fileformat2.html#wal_file_format>: magic, format, and a checksum over the
/// first 24 bytes in the byte order that the magic's last bit says.
fn wal_header_is_whole(header: &[u8; WAL_HEADER_BYTES]) -> bool {
    let word = |at: usize| [header[at], header[at + 1], header[at + 2], header[at + 3]];
    let magic = u32::from_be_bytes(word(0));
    if magic & !1 != 0x377f_0682 || u32::from_be_bytes(word(4)) != 3_007_000 {
        return false;
    }
    let read = if magic & 1 == 1 { u32::from_be_bytes } else { u32::from_le_bytes };
    let (mut s0, mut s1) = (0u32, 0u32);
    for at in (0..24).step_by(8) {
        s0 = s0.wrapping_add(read(word(at))).wrapping_add(s1);
        s1 = s1.wrapping_add(read(word(at + 4))).wrapping_add(s0);
    }
    u32::from_be_bytes(word(24)) == s0 && u32::from_be_bytes(word(28)) == s1
}
