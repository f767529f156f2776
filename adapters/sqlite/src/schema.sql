-- Schema version 1. An operator may read this database at any time (read-only, please); the words are
-- those of docs and CLI. Times are Unix milliseconds unless named `_mono`.

-- `open` is the number of messages without a final state, kept in every transaction that changes it, so that the
-- gate in front of the parser costs one read however deep the backlog is.
CREATE TABLE destinations (
    seq             INTEGER PRIMARY KEY,
    name            TEXT NOT NULL UNIQUE,
    open            INTEGER NOT NULL DEFAULT 0 CHECK (open >= 0),
    disabled_at     INTEGER,            -- NULL: enabled
    disabled_reason TEXT,
    -- What operators have set; NULL: as the configuration has it.
    rate_per_s      INTEGER,
    concurrency     INTEGER             -- 0: auto
) STRICT;

CREATE TABLE files (
    seq         INTEGER PRIMARY KEY,
    id          BLOB NOT NULL UNIQUE,   -- 16 bytes
    feed        TEXT NOT NULL,
    name        TEXT NOT NULL,
    bytes       INTEGER NOT NULL,
    sha256      TEXT NOT NULL,
    claimed_at  INTEGER NOT NULL,
    terms       TEXT,                   -- model::terms::Terms; NULL: its messages go at any time
    expires_at  INTEGER,                -- of them: what is open then ends as unsent
    finish_by   INTEGER,                -- of them: when it is to be done
    priority    INTEGER NOT NULL,       -- model::priority::Priority, as it was dropped
    state       INTEGER NOT NULL,       -- 0 ingesting, 1 ingested, 2 failed, 3 source-lost
    reason      TEXT,
    offset      INTEGER NOT NULL,       -- the checkpoint
    rows        INTEGER NOT NULL,
    rejected    INTEGER NOT NULL,
    duplicates  INTEGER NOT NULL,
    closed_at   INTEGER,
    settled_at  INTEGER,                -- set while no message of the file is open
    reported    INTEGER NOT NULL DEFAULT 0
) STRICT;
CREATE INDEX files_by_name ON files (name);
CREATE INDEX files_expiring ON files (expires_at) WHERE expires_at IS NOT NULL AND settled_at IS NULL;
CREATE INDEX files_timed ON files (finish_by) WHERE finish_by IS NOT NULL AND settled_at IS NULL;
CREATE INDEX files_unreported ON files (feed, seq) WHERE settled_at IS NOT NULL AND reported = 0;

-- I1, held by the database itself: no count is negative and nothing is counted twice.
CREATE TABLE file_destinations (
    file        INTEGER NOT NULL,
    destination INTEGER NOT NULL,
    position    INTEGER NOT NULL,       -- in the file's list
    accepted    INTEGER NOT NULL DEFAULT 0,
    sent        INTEGER NOT NULL DEFAULT 0 CHECK (sent >= 0),
    dead        INTEGER NOT NULL DEFAULT 0 CHECK (dead >= 0),
    retrying    INTEGER NOT NULL DEFAULT 0 CHECK (retrying >= 0),
    unsent      INTEGER NOT NULL DEFAULT 0 CHECK (unsent >= 0),
    cancelled   INTEGER NOT NULL DEFAULT 0 CHECK (cancelled >= 0),
    -- Which of its batches wait though they are due: one row, however many (B11). Together NULL: none.
    held_from   INTEGER,                -- those that begin with this row or a later one
    held_since  INTEGER,
    held_cause  INTEGER,                -- model::hold::HoldCause
    held_reason TEXT,
    -- All of them wait while the clock is between these: no request may begin now, by the file's terms.
    closed_from INTEGER,
    closed_until INTEGER,
    priority    INTEGER,                -- as an operator has ordered; NULL: the file's
    PRIMARY KEY (file, destination),
    CHECK (sent + dead + retrying + unsent + cancelled <= accepted)
) STRICT, WITHOUT ROWID;
CREATE INDEX files_held ON file_destinations (held_since) WHERE held_since IS NOT NULL;
-- Those of which something is open: they are asked for all the time.
CREATE INDEX files_prioritized ON file_destinations (file)
    WHERE priority IS NOT NULL AND sent + dead + unsent + cancelled - accepted < 0;

-- What operators ordered. AUTOINCREMENT: the order of the lines is that of the orders.
CREATE TABLE audit (
    seq     INTEGER PRIMARY KEY AUTOINCREMENT,
    at      INTEGER NOT NULL,
    by      TEXT NOT NULL,
    verb    TEXT NOT NULL,
    subject TEXT NOT NULL,
    detail  TEXT NOT NULL
) STRICT;

-- What batches have in common, as it was when their rows were accepted (I4).
CREATE TABLE headers (
    seq         INTEGER PRIMARY KEY,
    file        INTEGER NOT NULL,
    destination INTEGER NOT NULL,
    json        TEXT NOT NULL,          -- model::batch::BatchHeader
    sum         INTEGER NOT NULL        -- CRC-32 of it
) STRICT;
CREATE INDEX headers_by_file ON headers (file, destination);

-- Written once and read until it is archived, never updated: SQLite would rewrite the whole chain of pages. Batches of
-- the same rows for several destinations share one. AUTOINCREMENT: no number is given twice, for who walks over the
-- batches remembers numbers.
CREATE TABLE payloads (
    seq     INTEGER PRIMARY KEY AUTOINCREMENT,
    body    BLOB NOT NULL,              -- model::batch payload encoding
    sum     INTEGER NOT NULL            -- CRC-32 of it
) STRICT;

-- One row per batch for its whole life: a retry is the same batch, due again.
CREATE TABLE batches (
    seq         INTEGER PRIMARY KEY,
    id          BLOB NOT NULL UNIQUE,   -- 16 bytes
    file        INTEGER NOT NULL,
    destination INTEGER NOT NULL,
    header      INTEGER NOT NULL,
    payload     INTEGER,                -- NULL: archived
    first_row   INTEGER NOT NULL,
    count       INTEGER NOT NULL,
    gaps        BLOB,                   -- ledger::codec::encode_rows; NULL: all rows from the first on
    accepted_at INTEGER NOT NULL,
    not_before  INTEGER NOT NULL,
    due         INTEGER,                -- when its first open message may be tried; NULL: settled
    retry       INTEGER NOT NULL DEFAULT 0, -- 1: an open message was tried or redriven: the lane of retries
    -- Where it waits in its lane: first attempts with their file, retries at their time.
    place       INTEGER GENERATED ALWAYS AS (iif(retry, due, file)) VIRTUAL,
    fence       INTEGER NOT NULL DEFAULT 0,
    holder      TEXT,                   -- of the lease; NULL: not leased
    lease_until_mono INTEGER,           -- meaningful only to the process that leased it
    quarantined TEXT                    -- why it can't be read; it is due never then, and its messages stay open
) STRICT;
-- Partial, so that what is settled costs nothing. `holder` is NULL in every entry; with it, counting needs no row. By file,
-- so that a lease looks at one entry of each, however many batches it has; with file and first row, none is looked at of
-- retries that wait because their file is held.
CREATE INDEX batches_waiting ON batches (destination, retry, holder, place, due, file, first_row)
    WHERE due IS NOT NULL AND holder IS NULL;
CREATE INDEX batches_quarantined ON batches (seq) WHERE quarantined IS NOT NULL;
CREATE INDEX batches_leased ON batches (seq) WHERE holder IS NOT NULL;
-- Both are written when a batch is appended, the second also when it is archived, and not in between.
CREATE INDEX batches_by_row ON batches (file, destination, first_row);
CREATE INDEX batches_kept ON batches (payload) WHERE payload IS NOT NULL;

-- What is recorded of a batch; absent until something is: then every message is `accepted`.
CREATE TABLE results (
    batch   INTEGER PRIMARY KEY,
    body    BLOB NOT NULL,              -- ledger::codec::encode
    sum     INTEGER NOT NULL            -- CRC-32 of it
) STRICT;

-- Failed attempts, a chunk per recorded group, never rewritten (B3).
CREATE TABLE attempts (
    seq     INTEGER PRIMARY KEY,
    batch   INTEGER NOT NULL,
    body    BLOB NOT NULL               -- ledger::codec::encode_history
) STRICT;
CREATE INDEX attempts_by_batch ON attempts (batch);

-- One row per message given up and not redriven: what commands filter by. The record has the same.
CREATE TABLE dead (
    file        INTEGER NOT NULL,
    destination INTEGER NOT NULL,
    row         INTEGER NOT NULL,
    batch       INTEGER NOT NULL,
    at          INTEGER NOT NULL,
    attempts    INTEGER NOT NULL,       -- made in its last drive
    status      INTEGER NOT NULL,       -- HTTP status of the last, 0: no answer
    reason      INTEGER NOT NULL,       -- model::outcome::Reason
    cause       INTEGER NOT NULL,       -- model::outcome::DeathCause
    PRIMARY KEY (file, destination, row)
) STRICT, WITHOUT ROWID;

-- Rejected rows in chunks, in row order.
CREATE TABLE rejects (
    seq         INTEGER PRIMARY KEY,
    file        INTEGER NOT NULL,
    last_row    INTEGER NOT NULL,
    body        BLOB NOT NULL           -- codec::encode_rejects
) STRICT;
CREATE UNIQUE INDEX rejects_by_row ON rejects (file, last_row);

-- Numbers of the rows left out as duplicates, in chunks.
CREATE TABLE duplicates (
    seq         INTEGER PRIMARY KEY,
    file        INTEGER NOT NULL,
    last_row    INTEGER NOT NULL,
    body        BLOB NOT NULL           -- codec::encode_row_numbers
) STRICT;
CREATE UNIQUE INDEX duplicates_by_row ON duplicates (file, last_row);

-- The entries of inbound queues that were taken, so that one that comes twice is taken once.
CREATE TABLE entries (
    feed    TEXT NOT NULL,
    id      TEXT NOT NULL,              -- the queue's own id for it
    file    INTEGER NOT NULL,
    at      INTEGER NOT NULL,
    PRIMARY KEY (feed, id)
) STRICT, WITHOUT ROWID;
CREATE INDEX entries_by_age ON entries (at);

-- The ledger of rows, for destinations that report on messages later. Nothing here is written where no receipts
-- are expected.

-- Files that have rows here, by small numbers; a file has one feed. It is here for as long as its rows are.
CREATE TABLE ledger_files (
    seq         INTEGER PRIMARY KEY,
    id          BLOB NOT NULL UNIQUE,   -- 16 bytes
    feed        TEXT NOT NULL,
    last_at     INTEGER NOT NULL        -- of what was recorded last: its age
) STRICT;
CREATE INDEX ledger_files_by_age ON ledger_files (last_at);

-- One row per message and destination.
CREATE TABLE messages (
    file        INTEGER NOT NULL,       -- ledger_files
    row         INTEGER NOT NULL,
    destination INTEGER NOT NULL,
    state       INTEGER NOT NULL,       -- model::state::MessageState: the maximum of all reports
    recorded    INTEGER NOT NULL,       -- what delivery said
    attempts    INTEGER NOT NULL,
    status      INTEGER NOT NULL,       -- HTTP status of the last, 0: no answer
    reason      INTEGER,                -- model::outcome::Reason
    detail      TEXT,
    recipient   TEXT NOT NULL,
    provider_id TEXT,                   -- the destination's own id for it
    accepted_at INTEGER NOT NULL,
    recorded_at INTEGER NOT NULL,       -- when the last attempt ended
    updated_at  INTEGER NOT NULL,
    reported    INTEGER NOT NULL DEFAULT 0, -- final states that receipts reported, 1: failed, 2: delivered
    -- The greatest receipt; NULL until there was one.
    receipt_state    INTEGER,
    receipt_at       INTEGER,           -- NULL: the provider left it out
    receipt_event    BLOB,              -- 16 bytes
    provider_status  TEXT,
    carrier          TEXT,
    response         TEXT,
    provider_sent_at INTEGER,
    price            INTEGER,           -- in units of 1e-8
    PRIMARY KEY (file, row, destination)
) STRICT, WITHOUT ROWID;
CREATE INDEX messages_by_provider_id ON messages (destination, provider_id) WHERE provider_id IS NOT NULL;
-- Sent or expired, which is: without a final receipt.
CREATE INDEX messages_without_receipt ON messages (destination, state, recorded_at) WHERE state = 5 OR state = 6;

-- Where receipts come from, and how far each was read.
CREATE TABLE receipt_sources (
    seq         INTEGER PRIMARY KEY,
    name        TEXT NOT NULL UNIQUE,
    destination INTEGER NOT NULL,       -- of what it brought last
    cursor      TEXT,
    receipts_at INTEGER,                -- when receipts or rejects last came
    cursor_at   INTEGER                 -- when the cursor last moved
) STRICT;

-- Which receipts were taken, so that what comes again is taken once: events as they came, a row per arrival, until there
-- are so many that they are merged into `receipt_events` (receipts/events.rs). AUTOINCREMENT: who has read them remembers
-- up to which number.
CREATE TABLE receipt_events_fresh (
    seq         INTEGER PRIMARY KEY AUTOINCREMENT,
    day         INTEGER NOT NULL,       -- since 1970, at the end of which they were taken
    body        BLOB NOT NULL           -- 16 bytes each: the event, mixed with its source's number
) STRICT;

-- The others: a row for all from `start` to the next row's.
CREATE TABLE receipt_events (
    start       BLOB PRIMARY KEY,       -- 16 bytes; 0: the first row
    oldest      INTEGER NOT NULL,       -- the least of their days
    body        BLOB NOT NULL           -- 18 bytes each, in order: as above, and the day
) STRICT, WITHOUT ROWID;
CREATE INDEX receipt_events_by_age ON receipt_events (oldest);

-- Receipts that were taken and not applied, hundreds to a row as they came.
CREATE TABLE receipt_inbox (
    seq         INTEGER PRIMARY KEY,
    source      INTEGER NOT NULL,
    destination INTEGER NOT NULL,
    receipts    INTEGER NOT NULL,       -- how many
    body        BLOB NOT NULL           -- model::codec::encode_receipts
) STRICT;

-- Receipts whose message is not known. One that is applied leaves nothing but its facts and its event.
CREATE TABLE receipts (
    seq         INTEGER PRIMARY KEY,
    phase       INTEGER NOT NULL,       -- 1 parked, 2 orphan
    since       INTEGER NOT NULL,       -- parked: an orphan keeps that
    source      INTEGER NOT NULL,
    event       BLOB NOT NULL,          -- 16 bytes
    destination INTEGER NOT NULL,
    file        BLOB,                   -- the message: 16 bytes, and its row,
    row         INTEGER,
    provider_id TEXT,                   -- or the destination's own id for it
    state       INTEGER NOT NULL,       -- sent (an interim report), failed or delivered
    at          INTEGER,
    provider_status  TEXT,
    carrier          TEXT,
    response         TEXT,
    provider_sent_at INTEGER,
    price            INTEGER,
    CHECK ((file IS NULL) = (row IS NULL) AND (file IS NULL) <> (provider_id IS NULL))
) STRICT;
CREATE INDEX receipts_parked_by_message ON receipts (file, row, destination) WHERE file IS NOT NULL;
CREATE INDEX receipts_parked_by_provider_id ON receipts (destination, provider_id) WHERE provider_id IS NOT NULL;
CREATE INDEX receipts_parked_by_age ON receipts (since) WHERE phase = 1;
CREATE INDEX receipts_given_up ON receipts (since) WHERE phase = 2;

CREATE TABLE receipt_rejects (
    source      INTEGER NOT NULL,
    event       BLOB NOT NULL,          -- 16 bytes
    place       TEXT NOT NULL,
    reason      TEXT NOT NULL,
    at          INTEGER NOT NULL,
    happened_at INTEGER,                -- by what is around it
    text        TEXT NOT NULL,          -- at most 16 KiB; '': nothing is kept
    is_whole    INTEGER NOT NULL,       -- whether that can be read again
    PRIMARY KEY (source, event)
) STRICT;
CREATE INDEX receipt_rejects_by_age ON receipt_rejects (at);

-- Status changes that are to be delivered. AUTOINCREMENT: no number is given twice.
CREATE TABLE status_changes (
    number      INTEGER PRIMARY KEY AUTOINCREMENT,
    file        BLOB NOT NULL,          -- 16 bytes: the change outlives the row
    row         INTEGER NOT NULL,
    destination INTEGER NOT NULL,
    provider_id TEXT,
    before      INTEGER NOT NULL,
    state       INTEGER NOT NULL,
    at          INTEGER NOT NULL
) STRICT;
