-- Schema version 1. An operator may read this database at any time (read-only, please); the words are
-- those of docs and CLI. Times are Unix milliseconds unless named `_mono`.

-- One row. `depth` is the number of messages without a final state, kept in every transaction that
-- changes it, so that the gate in front of the parser costs one read however deep the backlog is.
CREATE TABLE counters (
    one     INTEGER PRIMARY KEY CHECK (one = 1),
    depth   INTEGER NOT NULL CHECK (depth >= 0)
) STRICT;
INSERT INTO counters VALUES (1, 0);

CREATE TABLE destinations (
    seq             INTEGER PRIMARY KEY,
    name            TEXT NOT NULL UNIQUE,
    disabled_at     INTEGER,            -- NULL: enabled
    disabled_reason TEXT
) STRICT;

CREATE TABLE files (
    seq         INTEGER PRIMARY KEY,
    id          BLOB NOT NULL UNIQUE,   -- 16 bytes
    feed        TEXT NOT NULL,
    name        TEXT NOT NULL,
    bytes       INTEGER NOT NULL,
    sha256      TEXT NOT NULL,
    claimed_at  INTEGER NOT NULL,
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
    PRIMARY KEY (file, destination),
    CHECK (sent + dead + retrying <= accepted)
) STRICT, WITHOUT ROWID;

-- What batches have in common, as it was when their rows were accepted (I4).
CREATE TABLE headers (
    seq         INTEGER PRIMARY KEY,
    file        INTEGER NOT NULL,
    destination INTEGER NOT NULL,
    json        TEXT NOT NULL           -- model::batch::BatchHeader
) STRICT;
CREATE INDEX headers_by_file ON headers (file, destination);

-- Never updated: SQLite would rewrite the whole chain of pages. Batches of the same rows for several
-- destinations share one.
CREATE TABLE payloads (
    seq     INTEGER PRIMARY KEY,
    body    BLOB NOT NULL,              -- model::batch payload encoding
    history BLOB                        -- codec::encode_history; NULL for a first attempt
) STRICT;

CREATE TABLE batches (
    seq         INTEGER PRIMARY KEY,
    id          BLOB NOT NULL UNIQUE,   -- 16 bytes
    root        BLOB,                   -- NULL: it is its own root (drive 0, attempt 0)
    file        INTEGER NOT NULL,
    destination INTEGER NOT NULL,
    header      INTEGER NOT NULL,
    payload     INTEGER NOT NULL,
    first_row   INTEGER NOT NULL,
    count       INTEGER NOT NULL,
    drive       INTEGER NOT NULL,
    attempt     INTEGER NOT NULL,
    accepted_at INTEGER NOT NULL,
    not_before  INTEGER NOT NULL,
    phase       INTEGER NOT NULL,       -- 0 outstanding, 1 queued, 2 leased, 3 settled
    unsettled   INTEGER NOT NULL CHECK (unsettled >= 0),
    fence       INTEGER NOT NULL DEFAULT 0,
    losses      INTEGER NOT NULL DEFAULT 0,
    holder      TEXT,                   -- of the lease, while leased
    lease_until_mono INTEGER            -- meaningful only to the process that leased it
) STRICT;
-- Partial, so that what is settled costs nothing.
CREATE INDEX batches_outstanding ON batches (not_before) WHERE phase = 0;
CREATE INDEX batches_queued ON batches (destination, not_before) WHERE phase = 1;
CREATE INDEX batches_leased ON batches (seq) WHERE phase = 2;
CREATE INDEX batches_by_root ON batches (root) WHERE root IS NOT NULL;
CREATE INDEX batches_by_row ON batches (file, destination, first_row) WHERE root IS NULL;

-- What was recorded of a batch; absent until something was: then every message is `accepted`.
CREATE TABLE results (
    batch   INTEGER PRIMARY KEY,
    states  BLOB NOT NULL,              -- one byte per message: model::state::MessageState
    sent    BLOB                        -- codec::SentTimes, NULL until one was sent
) STRICT;

-- One row per message given up and not redriven.
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
