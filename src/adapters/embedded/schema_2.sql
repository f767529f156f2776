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

-- Until when a claim holds, by the wall clock: the deadline of a leased batch whose `lease_until_mono` is NULL,
-- for then another queue carries it. It means nothing otherwise.
ALTER TABLE batches ADD COLUMN claimed_until INTEGER;

-- 1: the batch was archived. Its row stays for what became of its messages; of its payload only the numbers of
-- the rows are left, once all batches that share it are archived.
ALTER TABLE batches ADD COLUMN archived INTEGER NOT NULL DEFAULT 0;
-- Both are written when a batch is appended and when it is archived, and not in between.
CREATE INDEX batches_kept ON batches (seq) WHERE archived = 0;
CREATE INDEX batches_kept_by_destination ON batches (destination, seq) WHERE archived = 0;
