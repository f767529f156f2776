-- Schema version 3.

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
    state       INTEGER NOT NULL,       -- model::state::MessageState: the maximum of all it was told
    recorded    INTEGER NOT NULL,       -- what delivery said: 1 retrying, 2 dead, 3 sent
    attempts    INTEGER NOT NULL,
    status      INTEGER NOT NULL,       -- HTTP status of the last, 0: no answer
    reason      INTEGER,                -- model::outcome::Reason
    detail      TEXT,
    recipient   TEXT NOT NULL,
    provider_id TEXT,                   -- the destination's own id for it
    accepted_at INTEGER NOT NULL,
    recorded_at INTEGER NOT NULL,       -- when the last attempt ended
    updated_at  INTEGER NOT NULL,
    told        INTEGER NOT NULL DEFAULT 0, -- 1: it was told of a failure, 2: of a delivery
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
CREATE INDEX messages_without_receipt ON messages (destination, state, recorded_at) WHERE state = 3 OR state = 4;

-- Where receipts come from, and how far each was read.
CREATE TABLE receipt_sources (
    seq         INTEGER PRIMARY KEY,
    name        TEXT NOT NULL UNIQUE,
    destination INTEGER NOT NULL,       -- of what it brought last
    cursor      TEXT,
    receipts_at INTEGER,                -- when receipts or rejects last came
    cursor_at   INTEGER                 -- when the cursor last moved
) STRICT;

-- Which receipts were taken, so that what comes again is taken once.
CREATE TABLE receipt_events (
    source      INTEGER NOT NULL,
    event       BLOB NOT NULL,          -- 16 bytes
    at          INTEGER NOT NULL,
    PRIMARY KEY (source, event)
) STRICT, WITHOUT ROWID;
CREATE INDEX receipt_events_by_age ON receipt_events (at);

-- Receipts that are not joined with their message. One that is leaves nothing but its facts and its event.
CREATE TABLE receipts (
    seq         INTEGER PRIMARY KEY,
    phase       INTEGER NOT NULL,       -- 0 in the inbox, 1 parked, 2 orphan
    since       INTEGER NOT NULL,       -- taken, or parked: an orphan keeps that
    source      INTEGER NOT NULL,
    event       BLOB NOT NULL,          -- 16 bytes
    destination INTEGER NOT NULL,
    file        BLOB,                   -- the message: 16 bytes, and its row,
    row         INTEGER,
    provider_id TEXT,                   -- or the destination's own id for it
    state       INTEGER NOT NULL,       -- 3 sent (an interim report), 5 failed, 6 delivered
    at          INTEGER,
    provider_status  TEXT,
    carrier          TEXT,
    response         TEXT,
    provider_sent_at INTEGER,
    price            INTEGER,
    CHECK ((file IS NULL) = (row IS NULL) AND (file IS NULL) <> (provider_id IS NULL))
) STRICT;
CREATE INDEX receipts_waiting ON receipts (seq) WHERE phase = 0;
CREATE INDEX receipts_parked_by_message ON receipts (file, row, destination) WHERE phase > 0 AND file IS NOT NULL;
CREATE INDEX receipts_parked_by_provider_id ON receipts (destination, provider_id)
    WHERE phase > 0 AND provider_id IS NOT NULL;
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

-- New states that somebody is to be told of. AUTOINCREMENT: no number is given twice.
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

-- What the destination itself said of the last attempt, where its words are kept (a table).
ALTER TABLE dead ADD COLUMN detail TEXT;
