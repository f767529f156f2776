-- Schema version 2.

-- The entries of inbound queues that were taken, so that one that comes twice is taken once.
CREATE TABLE entries (
    feed    TEXT NOT NULL,
    id      TEXT NOT NULL,              -- the queue's own id for it
    file    INTEGER NOT NULL,
    at      INTEGER NOT NULL,
    PRIMARY KEY (feed, id)
) STRICT, WITHOUT ROWID;
CREATE INDEX entries_by_age ON entries (at);
