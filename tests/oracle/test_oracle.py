"""The oracle's own tests: a run that holds is passed, and each single fault put into it is found."""

import copy
import hashlib
import io
import itertools
import json
import pathlib
import sqlite3
import sys
import tempfile
import unittest
from contextlib import redirect_stderr, redirect_stdout

sys.path.insert(0, str(pathlib.Path(__file__).parent))

import oracle  # noqa: E402
import store  # noqa: E402

COLUMNS = ["user_id", "name"]
RECIPIENTS = [f"user-{n:05}" for n in range(1, 9)]
SHA = hashlib.sha256(b"a file").hexdigest()
FILE = oracle.file_id("alerts", SHA)


def put_varint(value):
    data = bytearray()
    while value >= 0x80:
        data.append(value & 0x7F | 0x80)
        value >>= 7
    data.append(value)
    return bytes(data)


def payload(rows):
    """`rows`: {number: bytes}, ascending."""
    data, previous = b"\x01", 0
    for row, content in rows.items():
        data += put_varint(row - previous) + put_varint(len(content)) + content
        previous = row
    return data


def runs(values):
    """Bytes in runs of equal ones."""
    return b"".join(put_varint(len(list(run))) + bytes([value]) for value, run in itertools.groupby(values))


def gaps(rows):
    """The row numbers of a batch, unless they have no gaps."""
    if rows[-1] - rows[0] + 1 == len(rows):
        return None
    return b"\x01" + b"".join(put_varint(row - before) for before, row in zip([0, *rows], rows))


SCHEMA = """
PRAGMA user_version = 1;
CREATE TABLE destinations (seq INTEGER, name TEXT, open INTEGER);
CREATE TABLE files (seq INTEGER, id BLOB, state INTEGER, rows INTEGER, rejected INTEGER, duplicates INTEGER);
CREATE TABLE file_destinations (file INTEGER, destination INTEGER, accepted INTEGER, sent INTEGER, dead INTEGER,
                                retrying INTEGER, unsent INTEGER, cancelled INTEGER);
CREATE TABLE payloads (seq INTEGER, body BLOB);
CREATE TABLE batches (seq INTEGER, file INTEGER, destination INTEGER, payload INTEGER, first_row INTEGER,
                      count INTEGER, gaps BLOB, due INTEGER);
CREATE TABLE results (batch INTEGER, body BLOB);
CREATE TABLE attempts (batch INTEGER, body BLOB);
CREATE TABLE dead (file INTEGER, destination INTEGER, row INTEGER);
CREATE TABLE rejects (seq INTEGER, file INTEGER, body BLOB);
CREATE TABLE duplicates (seq INTEGER, file INTEGER, body BLOB);
"""


class World:
    """Eight rows: 1–5 and 8 messages (2 after a retry, 4 dead after two tries), 6 rejected, 7 duplicate."""

    def __init__(self):
        rows = [["ok", name, [name, f"Näme {n}\""]] for n, name in enumerate(RECIPIENTS, 1)]
        rows[5], rows[6] = ["rejected"], ["duplicate"]
        self.manifest = {
            "attempt_cap": 2, "lost_lease_cap": 1, "kills": 0, "window": 0,
            "secrets": ["whsec_c2VjcmV0"], "destinations": {"support": "/hook"},
            "files": [{"feed": "alerts", "name": "a.csv", "sha256": SHA, "destinations": ["support"],
                       "columns": COLUMNS, "rows": rows}],
        }
        self.log = [self.request(1), self.request(2, 503), self.request(3), self.request(4, 503),
                    self.request(5), self.request(8), self.request(2), self.request(4, 500)]
        self.file = [1, bytes.fromhex(FILE), 1, 8, 1, 1]
        self.counts = [1, 1, 6, 5, 1, 0, 0, 0]
        # seq: rows, states, tries
        self.batches = {1: ([1, 2, 3, 4, 5, 8], [5, 5, 5, 4, 5, 5], [1, 2, 1, 2, 1, 1])}
        # batch, drive, number of the attempt, index
        self.failures = [(1, 0, 1, 1), (1, 0, 1, 3), (1, 0, 2, 3)]
        # Whether batches say that they are due, whatever their states.
        self.due = False
        self.dead = [4]
        self.depth = 0
        self.rejects = [6]
        self.duplicates = [7]
        # A row in a payload; None: the payload is archived.
        self.row = b"x" * 200
        self.scan = ["started", "file a.csv done"]
        self.earlier = {}

    def request(self, row, status=200):
        message = oracle.message_id(FILE, row)
        name = RECIPIENTS[row - 1]
        body = oracle.default_body("alerts", message, name, COLUMNS, [name, f"Näme {row}\""])
        return {"at": 1, "id": message, "timestamp": "1", "path": "/hook", "status": status, "bytes": len(body),
                "verified": True, "body_sha256": hashlib.sha256(body).hexdigest()}

    def write_store(self, path):
        connection = sqlite3.connect(path)
        connection.executescript(SCHEMA)

        def insert(table, *values):
            connection.execute(f"INSERT INTO {table} VALUES ({','.join('?' * len(values))})", values)

        insert("destinations", 1, "support", self.depth)
        insert("files", *self.file)
        insert("file_destinations", *self.counts)
        for sequence, (rows, states, tries) in self.batches.items():
            if self.row is not None:
                insert("payloads", sequence, payload({row: self.row for row in rows}))
            due = 1 if min(states) < store.UNSENT or self.due else None
            insert("batches", sequence, 1, 1, None if self.row is None else sequence, rows[0], len(rows),
                   gaps(rows), due)
            if any(states):
                insert("results", sequence, bytes([1, 0, 0]) + runs(states) + runs(tries) + b"\0")
        for batch, drive, number, index in self.failures:
            insert("attempts", batch, bytes([1, drive, number]) + put_varint(503) + bytes([1, 1, index, 2]))
        for row in self.dead:
            insert("dead", 1, 1, row)
        for row in self.rejects:
            insert("rejects", row, 1, b"\x01" + put_varint(row) + put_varint(row + 1) + put_varint(2) + b"no"
                   + put_varint(1) + b"?")
        for row in self.duplicates:
            insert("duplicates", row, 1, b"\x01" + put_varint(row))
        connection.commit()
        connection.close()

    def judge(self):
        """Runs the oracle as a program; returns its exit status, summary and violations."""
        with tempfile.TemporaryDirectory() as directory:
            directory = pathlib.Path(directory)
            self.write_store(directory / "postrider.db")
            (directory / "manifest.json").write_text(json.dumps(self.manifest))
            lines = [line if isinstance(line, str) else json.dumps(line) for line in self.log]
            (directory / "log").write_text("".join(line + "\n" for line in lines))
            (directory / "scan").write_text("\n".join(self.scan))
            (directory / "earlier").write_text(json.dumps(self.earlier))
            out, err = io.StringIO(), io.StringIO()
            with redirect_stdout(out), redirect_stderr(err):
                status = oracle.main([
                    "--manifest", str(directory / "manifest.json"), "--log", str(directory / "log"),
                    "--store", str(directory / "postrider.db"), "--scan", str(directory / "scan"),
                    "--earlier", str(directory / "earlier")])
            return status, json.loads(out.getvalue()), err.getvalue()


class Identities(unittest.TestCase):
    def test_a_file_id_is_the_digest_of_length_prefixed_parts(self):
        parts = (6).to_bytes(8, "little") + b"alerts" + (32).to_bytes(8, "little") + bytes.fromhex(SHA)
        self.assertEqual(FILE, hashlib.sha256(parts).hexdigest()[:32])

    def test_payloads_of_large_rows_and_gaps_are_read(self):
        rows = {3: b"a", 4: b"b" * 300, 70_000: b""}
        self.assertEqual(store.payload_rows(payload(rows)), list(rows))
        with self.assertRaises((ValueError, IndexError)):
            store.payload_rows(payload(rows)[:-5])


class Schema(unittest.TestCase):
    def test_the_product_s_schema_has_what_the_oracle_reads(self):
        directory = pathlib.Path(__file__).resolve().parents[2] / "adapters/sqlite/src"
        steps = [(directory / "schema.sql").read_text()]
        with tempfile.TemporaryDirectory() as directory:
            path = pathlib.Path(directory) / "postrider.db"
            connection = sqlite3.connect(path)
            # An older library does not know STRICT, which changes nothing for a reader.
            for step in steps:
                connection.executescript(step.replace("STRICT, ", "").replace("STRICT", ""))
            connection.execute(f"PRAGMA user_version = {store.SCHEMA}")
            connection.close()
            view = store.read_sqlite(path)
        self.assertEqual((view.files, view.states, view.problems), ({}, {}, []))


class Oracle(unittest.TestCase):
    def setUp(self):
        self.world = World()

    def holds(self):
        status, summary, violations = self.world.judge()
        self.assertEqual((status, violations), (0, ""))
        return summary

    def violates(self, invariant, text=""):
        status, summary, violations = self.world.judge()
        self.assertEqual(status, 1, "nothing was found")
        self.assertIn(invariant, summary["violations"], violations)
        self.assertIn(text, violations)

    def test_of_an_archived_batch_all_is_known_but_its_payload(self):
        self.world.row = None
        self.holds()

    def test_a_run_that_holds_passes(self):
        summary = self.holds()
        self.assertEqual((summary["sent"], summary["dead"], summary["requests"]), (5, 1, 8))

    def test_i1_a_row_without_a_state(self):
        self.world.batches[1] = ([1, 2, 3, 4, 5], [5, 5, 5, 4, 5], [1, 2, 1, 2, 1])
        self.world.log = [line for line in self.world.log if not line["id"].endswith("_8")]
        self.violates("I1", "_8 (ok expected) has no state")

    def test_i1_a_message_that_no_row_produced(self):
        self.world.batches[3] = ([9], [3], [1])
        self.violates("I1", "_9 is in the store")

    def test_i1_a_row_both_rejected_and_sent(self):
        self.world.rejects = [5, 6]
        self.violates("I1", "row 5 is rejected, ok expected")

    def test_i1_a_rejected_row_that_is_missing(self):
        self.world.rejects = []
        self.violates("I1", "row 6 is not rejected")

    def test_i1_a_row_rejected_twice(self):
        self.world.rejects = [6, 6]
        self.violates("I1", "rejected twice")

    def test_i1_a_duplicate_that_is_missing(self):
        self.world.duplicates = []
        self.violates("I1", "row 7 is not duplicate")

    def test_i1_a_counter_that_is_wrong(self):
        self.world.counts[3:5] = [4, 2]
        self.violates("I1", "the counter says 4 sent")

    def test_i1_a_file_that_does_not_balance(self):
        self.world.file[3] = 9
        self.violates("I1", "does not balance")

    def test_i1_a_file_that_was_not_dropped(self):
        self.world.manifest["files"][0]["sha256"] = "00" * 32
        self.violates("I1", "was not dropped")

    def test_i1_a_message_in_two_batches(self):
        self.world.manifest["quiescent"] = False
        self.world.batches[3] = ([2], [0], [0])
        self.violates("I1", "is in 2 batches")

    def test_i1_a_message_that_came_to_the_wrong_end(self):
        self.world.manifest["files"][0]["rows"][3][0] = "sent"
        self.violates("I1", "dead, sent expected")
        self.world = World()
        self.world.manifest["files"][0]["rows"][0][0] = "dead"
        self.violates("I1", "sent, dead expected")

    def test_i2_sent_without_a_2xx(self):
        self.world.log[0]["status"] = 500
        self.violates("I2", "is sent, but the receiver answered [500]")

    def test_i2_sent_without_any_request(self):
        del self.world.log[0]
        self.violates("I2", "answered nothing")

    def test_i3_an_id_that_no_row_produced(self):
        self.world.log.append({**self.world.log[0], "id": oracle.message_id(FILE, 6)})
        self.violates("I3", "which no input row produced")

    def test_i3_a_message_at_the_wrong_destination(self):
        self.world.log[0]["path"] = "/elsewhere"
        self.violates("I3", "no destination points")

    def test_i4_a_body_that_changes(self):
        self.world.log[6]["body_sha256"] = "00" * 32
        self.violates("I4", "had body")

    def test_a_body_of_another_row(self):
        self.world.log[0]["body_sha256"] = self.world.log[2]["body_sha256"]
        self.violates("body", "not its row's")

    def test_a_request_without_a_valid_signature(self):
        self.world.log[0]["verified"] = False
        self.violates("signature")
        self.world.manifest["signed"] = False
        self.holds()

    def bundle(self, *places):
        """Lets these lines of the log be one bundle."""
        lines = [self.world.log[place] for place in places]
        name = oracle.bundle_id([line["id"] for line in lines])
        for line in lines:
            line.update(bundle=name, of=len(lines))
        return lines

    def test_b15_a_bundle_is_its_list_of_messages(self):
        self.bundle(0, 1, 2)
        self.holds()
        self.world.log[0], self.world.log[1] = self.world.log[1], self.world.log[0]
        self.violates("B15", "is not made of its 3 messages")

    def test_b16_a_refused_bundle_is_no_attempt_of_its_messages(self):
        refused = [{**self.world.request(row, 413), "of": 2} for row in (1, 2)]
        for line in refused:
            line["bundle"] = oracle.bundle_id([line["id"] for line in refused])
        self.world.log[0:0] = refused
        self.holds()
        for line in refused:
            line["status"] = 404
        self.violates("I6", "2 requests are in no record")

    def test_i5_too_many_requests(self):
        self.world.log[6:6] = [self.world.request(2, 503)] * 2
        self.world.manifest.update(kills=1, window=5)
        self.violates("I5", "4 times, the caps allow 3")

    def test_i6_a_repetition_without_a_kill(self):
        self.world.log.append(self.world.request(1))
        self.violates("I6", "1 requests came after a 2xx")

    def test_i6_repetitions_within_the_window_of_a_kill(self):
        self.world.log += [self.world.request(1), self.world.request(3)]
        self.world.manifest.update(kills=1, window=2)
        self.holds()
        self.world.manifest.update(kills=1, window=1)
        self.violates("I6")

    def test_i6_a_failed_request_that_is_in_no_record(self):
        self.world.log.insert(0, self.world.request(1, 503))
        self.violates("I6", "1 requests are in no record")

    def test_i7_dead_in_spite_of_a_2xx(self):
        self.world.log[7]["status"] = 200
        self.violates("I7", "given up though the receiver answered 2xx")

    def test_i7_a_state_that_fell(self):
        self.world.earlier = {f"support {oracle.message_id(FILE, 4)}": store.SENT}
        self.violates("I7", "was in state 5, now in 4")

    def test_i7_a_redrive_may_lower_a_dead_letter(self):
        self.world.manifest.update(redrives=1, quiescent=False)
        self.world.batches[1] = ([1, 2, 3, 4, 5, 8], [5, 5, 5, 1, 5, 5], [1, 2, 1, 0, 1, 1])
        self.world.dead, self.world.depth, self.world.counts = [], 1, [1, 1, 6, 5, 0, 1, 0, 0]
        self.world.earlier = {f"support {oracle.message_id(FILE, 4)}": store.DEAD}
        self.holds()

    def test_i9_what_is_still_open(self):
        self.world.batches[1] = ([1, 2, 3, 4, 5, 8], [0, 5, 5, 4, 5, 5], [0, 2, 1, 2, 1, 1])
        self.violates("I9", "_1 is still accepted")
        self.world = World()
        self.world.batches[1] = ([1, 2, 3, 4, 5, 8], [5, 5, 5, 1, 5, 5], [1, 2, 1, 2, 1, 1])
        self.violates("I9", "_4 is still retrying")

    def test_i9_a_file_that_is_still_being_read(self):
        self.world.file[2] = 0
        self.violates("I9", "is ingesting")

    def test_in_the_middle_of_the_job_a_file_may_be_half_read(self):
        self.world.manifest["quiescent"] = False
        self.world.file[2] = 0
        self.holds()

    def test_i10_a_recipient_in_a_log(self):
        for line in ("sending to user-00003.", "to=user-00003", '{"recipient":"user-00003"}'):
            self.world.scan = [line]
            self.violates("I10", "user-00003")

    def test_i10_a_secret_in_a_log(self):
        self.world.scan = ["signing with whsec_c2VjcmV0 now"]
        self.violates("I10", "holds a secret")

    def test_a_log_line_that_is_torn(self):
        self.world.log.append('{"at": 1, "id"')
        self.violates("log")

    def test_a_dead_letter_list_that_is_wrong(self):
        self.world.dead = []
        self.violates("store", "is dead but no dead letter")
        self.world.dead = [3, 4]
        self.violates("store", "is in state 5")

    def test_a_depth_that_is_wrong(self):
        self.world.depth = 2
        self.violates("store", "depth")

    def test_a_batch_whose_record_does_not_fit(self):
        self.world.batches[1] = ([1, 2, 3, 4, 5, 8], [5] * 5, [1] * 6)
        self.violates("store", "batch 1 can't be read")

    def test_a_batch_whose_history_does_not_fit(self):
        del self.world.failures[2]
        self.violates("store", "message 3: 2 tries, failures [(0, 1)]")

    def test_a_batch_that_is_due_though_nothing_is_open(self):
        self.world.due = True
        self.violates("store", "batch 1 is due at 1")

    def give_up_row_8(self, state):
        self.world.batches[1][1][5], self.world.batches[1][2][5] = state, 0
        self.world.counts = [1, 1, 6, 4, 1, 0, int(state == store.UNSENT), int(state == store.CANCELLED)]
        self.world.log = [request for request in self.world.log if not request["id"].endswith("_8")]

    def test_a_message_that_was_given_up_where_one_may_be(self):
        for state in (store.UNSENT, store.CANCELLED):
            self.setUp()
            self.world.manifest["files"][0]["rows"][7][0] = store.STATES[state]
            self.give_up_row_8(state)
            self.holds()

    def test_a_message_that_was_given_up_for_no_reason(self):
        for state, word in ((store.UNSENT, "unsent"), (store.CANCELLED, "cancelled")):
            self.setUp()
            self.give_up_row_8(state)
            self.violates("I1", f"_8 is {word}, ok expected")

    def test_a_message_that_was_cancelled_and_not_unsent(self):
        self.world.manifest["files"][0]["rows"][7][0] = "unsent"
        self.give_up_row_8(store.CANCELLED)
        self.violates("I1", "_8 is cancelled, unsent expected")

    def test_violations_are_shown_up_to_a_bound_and_counted_beyond(self):
        self.world.log += [self.world.request(1) | {"id": f"msg_{n}"} for n in range(50)]
        status, summary, violations = self.world.judge()
        self.assertEqual((status, summary["violations"]["I3"]), (1, 50))
        self.assertIn("I3: and 30 more", violations)


class FilesJson(unittest.TestCase):
    def test_counters_alone_are_judged_too(self):
        world = World()
        report = {"id": FILE, "state": "ingested", "rows": 8, "rejected": 1, "duplicates": 1,
                  "destinations": {"support": {"accepted": 6, "sent": 5, "dead": 1, "retrying": 0, "unsent": 0,
                                               "cancelled": 0}}}
        for change, found in (({}, {}), ({"rows": 7}, {"I1": 2}), ({"state": "ingesting"}, {"I9": 1})):
            with tempfile.TemporaryDirectory() as directory:
                path = pathlib.Path(directory) / "files.json"
                path.write_text(json.dumps([copy.deepcopy(report) | change]))
                violations, _ = oracle.judge(oracle.Manifest(world.manifest), [], store.read_files_json(path))
                self.assertEqual(dict(violations.counts), found)


if __name__ == "__main__":
    unittest.main()
