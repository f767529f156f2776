-- Version 1. Run with the schema as the search path, in one transaction. Never edit it once it was released: append a step.

-- What the schema is. One row.
CREATE TABLE meta (
    only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    version integer NOT NULL,
    -- How many days a new partition takes.
    partition_days integer NOT NULL CHECK (partition_days BETWEEN 1 AND 366)
);

-- Names, so that a message's row and its index entries hold four bytes instead.
CREATE TABLE destinations (
    id integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    name text COLLATE "C" NOT NULL UNIQUE
);

-- Where receipts come from, and how far that was read.
CREATE TABLE sources (
    id integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    name text COLLATE "C" NOT NULL UNIQUE,
    destination integer NOT NULL,
    cursor text,
    -- When receipts or rejects last came, and when the cursor last moved.
    receipts_at timestamptz,
    cursor_at timestamptz
);

-- The partitions of `messages`, as make_partition and drop_partition keep them.
CREATE TABLE partitions (
    first_day date PRIMARY KEY,
    end_day date NOT NULL CHECK (end_day > first_day),
    relation text NOT NULL,
    -- When a message in it was recorded last; that may have been up to an hour later.
    last_recorded timestamptz NOT NULL DEFAULT '-infinity'
);

-- In which partition a file's messages live: the one that took its first record. It never changes, so that a
-- message has one place.
CREATE TABLE files (
    file uuid PRIMARY KEY,
    day date NOT NULL REFERENCES partitions (first_day),
    feed text NOT NULL
);
CREATE INDEX files_day ON files (day);

-- A row per message and destination. Wide columns first: no padding.
CREATE TABLE messages (
    file uuid NOT NULL,
    row bigint NOT NULL,
    -- When its row was accepted, when its last attempt ended, when anything last changed.
    accepted_at timestamptz NOT NULL,
    recorded_at timestamptz NOT NULL,
    updated_at timestamptz NOT NULL,
    -- The first day of its partition.
    day date NOT NULL,
    destination integer NOT NULL,
    attempts integer NOT NULL,
    -- The maximum of what delivery (`recorded`), receipts and expiry said; numbers as in state_word.
    state smallint NOT NULL,
    recorded smallint NOT NULL,
    status smallint NOT NULL,
    reason smallint,
    -- Which final states receipts reported: 1 failed, 2 delivered, 3 both.
    reported smallint NOT NULL DEFAULT 0,
    -- Whether the sweeper has looked at its age: 0 not yet, 1 yes and it had no final receipt, 2 yes and there is nothing
    -- more to find.
    sweep smallint NOT NULL DEFAULT 0,
    -- The greatest receipt, by these three.
    receipt_state smallint,
    receipt_at timestamptz,
    receipt_event uuid,
    provider_sent_at timestamptz,
    recipient text NOT NULL,
    provider_id text COLLATE "C",
    detail text,
    provider_status text,
    carrier text,
    response text,
    price numeric(20, 8),
    PRIMARY KEY (day, file, row, destination)
) PARTITION BY RANGE (day);

-- Receipts that name the provider's id. It comes first: nearly all comparisons end with it.
CREATE INDEX messages_provider_id ON messages (provider_id, destination) WHERE provider_id IS NOT NULL;

-- What may expire, and what gaps shows. No receipt changes a column of any index, nor of a condition of one: so its
-- update stays in its page and touches no index (HOT), and only the sweeper takes rows out, in the order of the index.
CREATE INDEX messages_unswept ON messages (destination, sweep, recorded_at, file, row) WHERE sweep < 2;

-- Receipts that were taken and not applied, hundreds to a row as they came: each column but the first three is an array of
-- what a column of receipt_parked holds.
CREATE TABLE receipt_inbox (
    number bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    source integer NOT NULL,
    destination integer NOT NULL,
    event uuid[] NOT NULL,
    file uuid[] NOT NULL,
    row bigint[] NOT NULL,
    at timestamptz[] NOT NULL,
    sent_at timestamptz[] NOT NULL,
    price bigint[] NOT NULL,
    bytes integer[] NOT NULL,
    state smallint[] NOT NULL,
    provider_id text[] NOT NULL,
    status text[] NOT NULL,
    carrier text[] NOT NULL,
    response text[] NOT NULL,
    CHECK (cardinality(event) = ALL (ARRAY[
        cardinality(file), cardinality(row), cardinality(at), cardinality(sent_at), cardinality(price),
        cardinality(bytes), cardinality(state), cardinality(provider_id), cardinality(status), cardinality(carrier),
        cardinality(response)])),
    CHECK (array_position(event, NULL) IS NULL AND cardinality(event) > 0)
) WITH (autovacuum_vacuum_scale_factor = 0.0, autovacuum_vacuum_threshold = 1000,
        toast.autovacuum_vacuum_scale_factor = 0.0, toast.autovacuum_vacuum_threshold = 50000);
-- They are read once: to compress them costs more than it saves.
ALTER TABLE receipt_inbox
    ALTER event SET STORAGE EXTERNAL, ALTER file SET STORAGE EXTERNAL, ALTER row SET STORAGE EXTERNAL,
    ALTER at SET STORAGE EXTERNAL, ALTER sent_at SET STORAGE EXTERNAL, ALTER price SET STORAGE EXTERNAL,
    ALTER bytes SET STORAGE EXTERNAL, ALTER state SET STORAGE EXTERNAL, ALTER provider_id SET STORAGE EXTERNAL,
    ALTER status SET STORAGE EXTERNAL, ALTER carrier SET STORAGE EXTERNAL, ALTER response SET STORAGE EXTERNAL;

-- Receipts whose message is not known. An orphan has waited for too long: nobody looks for its message any more, but
-- it joins when that comes.
CREATE TABLE receipt_parked (
    number bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    event uuid NOT NULL,
    file uuid,
    row bigint,
    at timestamptz,
    sent_at timestamptz,
    -- In units of 10^-8.
    price bigint,
    source integer NOT NULL,
    destination integer NOT NULL,
    bytes integer NOT NULL,
    state smallint NOT NULL,
    provider_id text COLLATE "C",
    status text,
    carrier text,
    response text,
    since timestamptz NOT NULL,
    orphan boolean NOT NULL DEFAULT false,
    CHECK ((file IS NULL) = (row IS NULL) AND (file IS NULL) <> (provider_id IS NULL))
);
CREATE INDEX receipt_parked_message ON receipt_parked (file, row, destination) WHERE file IS NOT NULL;
CREATE INDEX receipt_parked_provider_id ON receipt_parked (destination, provider_id) WHERE provider_id IS NOT NULL;
CREATE INDEX receipt_parked_number ON receipt_parked (number) WHERE NOT orphan;
CREATE INDEX receipt_parked_since ON receipt_parked (orphan, since);

-- Receipts that could not be read.
CREATE TABLE receipt_rejects (
    source integer NOT NULL,
    event uuid NOT NULL,
    at timestamptz NOT NULL,
    -- By what is around it.
    happened_at timestamptz,
    -- Whether `text` is a whole receipt, which can be read again.
    is_whole boolean NOT NULL,
    place text NOT NULL,
    reason text NOT NULL,
    -- At most 16 KiB; '': nothing is kept.
    text text NOT NULL,
    PRIMARY KEY (source, event)
);
CREATE INDEX receipt_rejects_at ON receipt_rejects (at);

-- Which receipts were taken, so that none is taken twice.
CREATE TABLE receipt_events (
    event uuid NOT NULL,
    at timestamptz NOT NULL,
    source integer NOT NULL,
    PRIMARY KEY (source, event)
);
CREATE INDEX receipt_events_at ON receipt_events (at);

-- Status changes that are to be delivered.
CREATE TABLE status_changes (
    number bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    file uuid NOT NULL,
    row bigint NOT NULL,
    at timestamptz NOT NULL,
    destination integer NOT NULL,
    before smallint NOT NULL,
    state smallint NOT NULL,
    provider_id text
);

-- Makes the partition that takes a day, unless there is one; its first day. ATTACH lets readers and writers of other
-- partitions continue, CREATE TABLE … PARTITION OF would stop them. It runs as the owner: the daemon's role may not
-- make tables.
CREATE FUNCTION make_partition(wanted date) RETURNS date
LANGUAGE plpgsql SECURITY DEFINER SET search_path FROM CURRENT AS $$
DECLARE
    width integer;
    lower_day date;
    upper_day date;
    name text;
BEGIN
    SELECT first_day INTO lower_day FROM partitions WHERE first_day <= wanted AND wanted < end_day;
    IF FOUND THEN
        RETURN lower_day;
    END IF;
    PERFORM pg_advisory_xact_lock(hashtextextended('postrider partitions ' || current_schema(), 0));
    SELECT first_day INTO lower_day FROM partitions WHERE first_day <= wanted AND wanted < end_day;
    IF FOUND THEN
        RETURN lower_day;
    END IF;
    SELECT partition_days INTO STRICT width FROM meta;
    lower_day := date '1970-01-01' + width * floor((wanted - date '1970-01-01')::numeric / width)::integer;
    -- Neighbours may be of another width.
    SELECT greatest(lower_day, max(end_day)) INTO STRICT lower_day FROM partitions WHERE end_day <= wanted;
    SELECT least(lower_day + width, min(first_day)) INTO STRICT upper_day FROM partitions WHERE first_day > wanted;
    name := 'messages_' || to_char(lower_day, 'YYYYMMDD');
    -- Room for another version of every row, half as long again: one transaction brings the receipts of all of a page.
    EXECUTE format('CREATE TABLE %I (LIKE messages INCLUDING ALL) WITH (fillfactor = 36)', name);
    EXECUTE format('ALTER TABLE messages ATTACH PARTITION %I FOR VALUES FROM (%L) TO (%L)', name, lower_day, upper_day);
    INSERT INTO partitions VALUES (lower_day, upper_day, name);
    RETURN lower_day;
END $$;

-- The partitions that end by `before`, and in which nothing was recorded since.
CREATE FUNCTION partitions_due(before date) RETURNS SETOF partitions
LANGUAGE sql STABLE SET search_path FROM CURRENT SET timezone = 'UTC' AS $$
    SELECT * FROM partitions WHERE end_day <= before AND last_recorded + interval '1 hour' < before ORDER BY first_day
$$;

-- Drops a partition that is due and has no files; roughly how many rows it had, at least 1, and 0 if it stays.
-- DROP stops the whole table for the moment that it takes, and whoever comes while it waits: it gives up at once.
CREATE FUNCTION drop_partition(doomed date, before date) RETURNS bigint
LANGUAGE plpgsql SECURITY DEFINER SET search_path FROM CURRENT SET lock_timeout = '100ms' AS $$
DECLARE
    found_there partitions%ROWTYPE;
    messages_about bigint;
BEGIN
    PERFORM pg_advisory_xact_lock(hashtextextended('postrider partitions ' || current_schema(), 0));
    SELECT * INTO found_there FROM partitions_due(before) WHERE first_day = doomed;
    IF NOT FOUND OR EXISTS (SELECT FROM files WHERE day = doomed) THEN
        RETURN 0;
    END IF;
    SELECT greatest(reltuples::bigint, 1) INTO messages_about FROM pg_class
     WHERE oid = to_regclass(quote_ident(found_there.relation));
    EXECUTE format('DROP TABLE %I', found_there.relation);
    DELETE FROM partitions WHERE first_day = doomed;
    RETURN coalesce(messages_about, 1);
END $$;

REVOKE ALL ON FUNCTION make_partition(date), drop_partition(date, date) FROM PUBLIC;

-- The word for a state (model::state::MessageState).
CREATE FUNCTION state_word(state smallint) RETURNS text LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE AS $$
    SELECT (ARRAY['accepted', 'retrying', 'unsent', 'cancelled', 'dead', 'sent', 'expired', 'failed', 'delivered'])[state + 1]
$$;

-- For people: words instead of numbers.
CREATE VIEW message_words AS
SELECT 'msg_' || replace(m.file::text, '-', '') || '_' || m.row AS id,
       f.feed,
       d.name AS destination,
       m.recipient,
       state_word(m.state) AS state,
       m.reported = 3 AS conflict,
       m.attempts,
       nullif(m.status, 0) AS http_status,
       (ARRAY['status', 'timeout', 'connect', 'dns', 'tls', 'reset', 'protocol', 'render', 'panic', 'poison',
              'refused', 'unavailable'])[m.reason]
           AS reason,
       m.detail,
       m.provider_id,
       m.accepted_at,
       m.recorded_at,
       m.updated_at,
       m.receipt_at,
       m.provider_status,
       m.carrier,
       m.response,
       m.provider_sent_at,
       m.price
  FROM messages m
  LEFT JOIN files f ON f.file = m.file
  LEFT JOIN destinations d ON d.id = m.destination;
