"""Reads what the store says, without the product: the SQLite file itself, or `postrider files --json`."""

import collections
import json
import pathlib
import shutil
import sqlite3
import tempfile

# What the stores number.
STATES = ["accepted", "retrying", "unsent", "cancelled", "dead", "sent", "expired", "failed", "delivered"]
ACCEPTED, RETRYING, UNSENT, CANCELLED, DEAD, SENT = (
    STATES.index(word) for word in ("accepted", "retrying", "unsent", "cancelled", "dead", "sent"))

Counts = collections.namedtuple("Counts", "sent dead retrying pending unsent cancelled")


class File:
    """One file as the operator is shown it."""

    def __init__(self, state, rows, rejected, duplicates):
        self.state = state
        self.rows = rows
        self.rejected = rejected
        self.duplicates = duplicates
        self.destinations = {}


class View:
    """Everything the oracle wants to know of a store. Keys of messages: (destination, message id)."""

    def __init__(self, has_messages):
        # Whether the fields below `files` are filled: `files --json` knows counters only.
        self.has_messages = has_messages
        # File id → File.
        self.files = {}
        # The state that its batch holds for a message.
        self.states = {}
        # How many attempts are recorded: those that failed, and the one that succeeded.
        self.attempts = collections.Counter()
        # How many batches hold a message.
        self.batches = collections.Counter()
        # File id → row numbers, repetitions kept.
        self.rejected = collections.defaultdict(list)
        self.duplicates = collections.defaultdict(list)
        # What can't be read at all.
        self.problems = []

    def add_message(self, key, state, failures):
        """One message in one batch."""
        self.states[key] = max(state, self.states.get(key, ACCEPTED))
        self.batches[key] += 1
        self.attempts[key] += failures + (state >= SENT)

    def add_batch(self, name, destination, file, rows, record, chunks):
        """One batch: its row numbers, the body of its record (None: nothing is recorded) and its history."""
        states, tries = read_record(record, len(rows)) if record is not None else (bytes(len(rows)),) * 2
        failures = read_history(chunks)
        for index, (row, state, made) in enumerate(zip(rows, states, tries)):
            own = failures.get(index, set())
            last = sum(1 for drive, _ in own if drive == max(drive for drive, _ in own))
            fits = {
                ACCEPTED: made == 0 and not own,
                # A redrive starts the count over.
                RETRYING: made in (0, last),
                DEAD: made == last,
            }
            # All tries failed but one; all, if that one was an earlier try whose answer came late.
            if not fits.get(state, made in (1, last, last + 1)):
                self.problems.append(f"batch {name}, message {index}: {made} tries, failures {sorted(own)}")
            self.add_message((destination, f"msg_{file}_{row}"), state, len(own))


def read_files_json(path):
    """The view that `postrider files --json` gives."""
    view = View(has_messages=False)
    for report in json.loads(pathlib.Path(path).read_text()):
        file = File(report["state"], report["rows"], report["rejected"], report["duplicates"])
        for name, counts in report["destinations"].items():
            sent, dead, retrying, unsent, cancelled = (
                counts[word] for word in ("sent", "dead", "retrying", "unsent", "cancelled"))
            pending = counts["accepted"] - sent - dead - retrying - unsent - cancelled
            file.destinations[name] = Counts(sent, dead, retrying, pending, unsent, cancelled)
        view.files[report["id"]] = file
    return view


def varint(data, at):
    """Reads an unsigned LEB128 value at `at`; returns it and where it ends."""
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def payload_rows(payload):
    """The row numbers of a payload (version 1: gap to the row before, length, bytes)."""
    check_version(payload)
    rows, row, at = [], 0, 1
    while at < len(payload):
        gap, at = varint(payload, at)
        length, at = varint(payload, at)
        row += gap
        at += length
        rows.append(row)
    if at != len(payload):
        raise ValueError("payload is cut off")
    return rows


def runs(body, at, count):
    """Bytes in runs: how many, which."""
    values = bytearray()
    while len(values) < count:
        length, at = varint(body, at)
        values += bytes([body[at]]) * length
        at += 1
    if len(values) != count:
        raise ValueError("a run is too long")
    return bytes(values), at


def read_record(body, count):
    """The states and the tries of a batch record (version 1: losses, begun, then both in runs)."""
    check_version(body)
    _begun, at = varint(body, 2)
    states, at = runs(body, at, count)
    tries, at = runs(body, at, count)
    return states, tries


def read_history(chunks):
    """Index → {(drive, number of the attempt)} of the attempts that failed."""
    failures = collections.defaultdict(set)
    for body in chunks:
        check_version(body)
        at = 1
        while at < len(body):
            drive, at = varint(body, at)
            number, at = varint(body, at)
            _status, at = varint(body, at)
            at += 1  # the reason
            length, at = varint(body, at)
            for _failure in range(length):
                index, at = varint(body, at)
                _at, at = varint(body, at)
                failures[index].add((drive, number))
    return failures


def row_numbers(body):
    """The row numbers of a chunk of duplicates (version 1: gaps)."""
    check_version(body)
    rows, row, at = [], 0, 1
    while at < len(body):
        gap, at = varint(body, at)
        row += gap
        rows.append(row)
    return rows


def rejected_rows(body):
    """The row numbers of a chunk of rejects (version 1: row, line, reason, raw row)."""
    check_version(body)
    rows, at = [], 1
    while at < len(body):
        row, at = varint(body, at)
        _line, at = varint(body, at)
        for _text in range(2):
            length, at = varint(body, at)
            at += length
        rows.append(row)
    if at != len(body):
        raise ValueError("cut off")
    return rows


def check_version(body):
    if body[0] != 1:
        raise ValueError(f"version {body[0]}")


SCHEMA = 1
FILE_STATES = ("ingesting", "ingested", "failed", "source-lost")


def open_read_only(path, scratch):
    """Opens the database without changing it. What a killed daemon left in the WAL is seen too: a
    read-only connection may be unable to recover it, so then a copy is read."""
    path = pathlib.Path(path)
    try:
        connection = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)
        connection.execute("SELECT count(*) FROM files").fetchone()
        return connection
    except sqlite3.OperationalError:
        for suffix in ("", "-wal"):
            source = path.with_name(path.name + suffix)
            if source.exists():
                shutil.copy(source, pathlib.Path(scratch) / source.name)
        return sqlite3.connect(pathlib.Path(scratch) / path.name)


def read_sqlite(path):
    """The view that the embedded store's file gives."""
    with tempfile.TemporaryDirectory() as scratch:
        connection = open_read_only(path, scratch)
        try:
            connection.execute("BEGIN")  # One state of the store, whatever the daemon does meanwhile.
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            if version != SCHEMA:
                raise SystemExit(f"{path} has schema {version}, the oracle reads {SCHEMA}")
            return read_tables(connection)
        finally:
            connection.close()


def read_tables(connection):
    view = View(has_messages=True)
    for (problem,) in connection.execute("PRAGMA integrity_check(10)"):
        if problem != "ok":
            view.problems.append(f"integrity check: {problem}")
    files, destinations = {}, {}
    for sequence, identity, state, rows, rejected, duplicates in connection.execute(
            "SELECT seq, id, state, rows, rejected, duplicates FROM files"):
        files[sequence] = identity.hex()
        view.files[identity.hex()] = File(FILE_STATES[state], rows, rejected, duplicates)
    for sequence, name in connection.execute("SELECT seq, name FROM destinations"):
        destinations[sequence] = name
    for file, destination, accepted, sent, dead, retrying, unsent, cancelled in connection.execute(
            "SELECT file, destination, accepted, sent, dead, retrying, unsent, cancelled FROM file_destinations"):
        pending = accepted - sent - dead - retrying - unsent - cancelled
        counts = Counts(sent, dead, retrying, pending, unsent, cancelled)
        view.files[files[file]].destinations[destinations[destination]] = counts
    read_batches(connection, files, destinations, view)
    for table, decode, found in (("rejects", rejected_rows, view.rejected),
                                 ("duplicates", row_numbers, view.duplicates)):
        for sequence, file, body in connection.execute(f"SELECT seq, file, body FROM {table} ORDER BY seq"):
            try:
                found[files[file]].extend(decode(body))
            except (IndexError, ValueError) as error:
                view.problems.append(f"{table} {sequence} can't be read: {error}")
    check_dead_letters(connection, files, destinations, view)
    check_depth(connection, view)
    return view


def read_batches(connection, files, destinations, view):
    chunks = collections.defaultdict(list)
    for batch, body in connection.execute("SELECT batch, body FROM attempts"):
        chunks[batch].append(body)
    query = ("SELECT b.seq, b.file, b.destination, b.first_row, b.count, b.gaps, b.due, p.body, r.body"
             " FROM batches b LEFT JOIN payloads p ON p.seq = b.payload LEFT JOIN results r ON r.batch = b.seq")
    for sequence, file, destination, first_row, count, gaps, due, payload, record in connection.execute(query):
        try:
            rows = row_numbers(gaps) if gaps is not None else list(range(first_row, first_row + count))
            if len(rows) != count or rows[:1] != [first_row]:
                raise ValueError(f"{len(rows)} rows from {rows[:1]}, {count} from {first_row} expected")
            if payload is not None and payload_rows(payload) != rows:
                raise ValueError("its payload has other rows")
            view.add_batch(sequence, destinations[destination], files[file], rows, record, chunks[sequence])
        except (IndexError, ValueError) as error:
            view.problems.append(f"batch {sequence} can't be read: {error}")
            continue
        states = read_record(record, count)[0] if record is not None else bytes(count)
        is_open = any(state in (ACCEPTED, RETRYING) for state in states)
        if is_open != (due is not None):
            view.problems.append(f"batch {sequence} is due at {due}, its states are {sorted(set(states))}")


def check_dead_letters(connection, files, destinations, view):
    """The dead letters that operators see are exactly the messages whose state is dead."""
    listed = {(destinations[destination], f"msg_{files[file]}_{row}") for file, destination, row
              in connection.execute("SELECT file, destination, row FROM dead")}
    dead = {key for key, state in view.states.items() if state == DEAD}
    for key in sorted(listed - dead)[:10]:
        view.problems.append(f"dead letter {key} is in state {view.states.get(key)}")
    for key in sorted(dead - listed)[:10]:
        view.problems.append(f"{key} is dead but no dead letter")


def check_depth(connection, view):
    depth = connection.execute("SELECT coalesce(sum(open), 0) FROM destinations").fetchone()[0]
    still_open = sum(1 for state in view.states.values() if state in (ACCEPTED, RETRYING))
    if depth != still_open:
        view.problems.append(f"the depth counter says {depth}, the states say {still_open}")
