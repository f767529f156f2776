#!/usr/bin/env python3
"""Proves what a ledger of rows says after receipts, from the outside.

    receipts.py --manifest M.json --log RECEIVER.log [--log …] --receipts R.ndjson [--receipts …]
                (--postgres PSQL URL SCHEMA | --store postrider.db) [--expired]

It shares no code with the product. From the manifest and the receivers' logs it derives what delivery must have
recorded of each message; from the receipts as they were handed over, how each message must have ended: the
greatest receipt by state, time and event, whatever the order in which they came. Then it reads every row, and
every receipt without a row, and compares. Standard output is one JSON summary, violations go to standard error.
Exit status: 0 all hold, 1 one does not, 2 usage.

A receipt: {"event", "message_id" | "provider_id", "status", "at", "response"}; `status` is one of STATUSES, `at` is
Unix milliseconds or null. With --expired, messages without a final receipt must be expired.
"""

import argparse
import collections
import csv
import hashlib
import io
import json
import sqlite3
import subprocess
import sys

from oracle import Manifest, Violations
from store import STATES

# Of an event's bytes those that its id makes; the rest is what the receipt says.
ID_BYTES = 8

# A receipt's words and the states they mean; the tests configure the same.
STATUSES = {"QUEUED": "sent", "UNDELIV": "failed", "DELIVRD": "delivered"}


def provider_id(message):
    """What `postrider receiver --answer-ids` calls a message."""
    return "prv-" + hashlib.sha256(message.encode()).hexdigest()[:24]


def event_id(source, event):
    """SHA-256 over the length-prefixed source, kind and text, 64 bits of it: the id's half of an event."""
    digest = hashlib.sha256()
    for part in (source.encode(), b"id", event.encode()):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()[:ID_BYTES]


def sent_by_log(logs, paths):
    """(destination, message id) of every request that was answered 2xx."""
    sent = set()
    for log in logs:
        with open(log, "rb") as lines:
            for line in lines:
                entry = json.loads(line)
                if 200 <= entry["status"] < 300 and entry["path"] in paths:
                    sent.add((paths[entry["path"]], entry["id"]))
    return sent


class Expected:
    """What receipts say, by message of one destination."""

    def __init__(self, source, destination, receipts, messages):
        by_provider = {provider_id(message): message for message in messages}
        self.destination = destination
        self.best = {}
        self.reported = collections.defaultdict(set)
        self.unknown = set()
        self.events = set()
        for name in receipts:
            with open(name, encoding="utf-8") as lines:
                for line in lines:
                    receipt = json.loads(line)
                    event = event_id(source, receipt["event"])
                    message = receipt.get("message_id") or by_provider.get(receipt.get("provider_id"))
                    self.events.add(event)
                    if message not in messages:
                        self.unknown.add(event)
                        continue
                    state = STATUSES[receipt["status"]]
                    rank = (STATES.index(state), receipt.get("at") or 0, event)
                    if message not in self.best or rank > self.best[message][0]:
                        self.best[message] = (rank, receipt)
                    if state != "sent":
                        self.reported[message].add(state)

    def conflicts(self):
        return sum(1 for reported in self.reported.values() if len(reported) == 2)


def read_postgres(psql, url, schema):
    """Rows as (destination, message id, state, response, conflict), and the events without a message."""

    def copy(query):
        command = [psql, url, "-X", "-q", "-v", "ON_ERROR_STOP=1", "-c", f"COPY ({query}) TO STDOUT (FORMAT csv)"]
        output = subprocess.run(command, check=True, capture_output=True, text=True, timeout=600).stdout
        return csv.reader(io.StringIO(output))

    rows = copy(
        f"SELECT d.name, 'msg_' || replace(m.file::text, '-', '') || '_' || m.\"row\", m.state, m.response, m.reported"
        f" FROM {schema}.messages m JOIN {schema}.destinations d ON d.id = m.destination"
    )
    events = "SELECT replace(event::text, '-', '') FROM"
    held = copy(f"{events} {schema}.receipt_parked")
    waiting = copy(f"SELECT coalesce(sum(cardinality(event)), 0) FROM {schema}.receipt_inbox")
    return (
        [(row[0], row[1], STATES[int(row[2])], row[3] or None, int(row[4]) == 3) for row in rows],
        [bytes.fromhex(row[0])[:ID_BYTES] for row in held],
        int(next(waiting)[0]),
    )


def read_store(path):
    """The same from the embedded store."""
    store = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    rows = store.execute(
        'SELECT d.name, hex(f.id), m."row", m.state, m.response, m.reported FROM messages m'
        " JOIN destinations d ON d.seq = m.destination JOIN ledger_files f ON f.seq = m.file"
    )
    found = [(row[0], f"msg_{row[1].lower()}_{row[2]}", STATES[row[3]], row[4], row[5] == 3) for row in rows]
    held = [row[0][:ID_BYTES] for row in store.execute("SELECT event FROM receipts")]
    (waiting,) = store.execute("SELECT coalesce(sum(receipts), 0) FROM receipt_inbox").fetchone()
    return found, held, waiting


def main():
    parser = argparse.ArgumentParser(description="Proves what a ledger of rows says.")
    parser.add_argument("--manifest", required=True)
    parser.add_argument("--log", action="append", required=True)
    parser.add_argument("--receipts", action="append", default=[])
    parser.add_argument("--source", required=True)
    parser.add_argument("--destination", required=True)
    engine = parser.add_mutually_exclusive_group(required=True)
    engine.add_argument("--postgres", nargs=3, metavar=("PSQL", "URL", "SCHEMA"))
    engine.add_argument("--store")
    parser.add_argument("--expired", action="store_true")
    arguments = parser.parse_args()

    violations = Violations()
    with open(arguments.manifest, encoding="utf-8") as text:
        manifest = Manifest(json.load(text))
    sent = sent_by_log(arguments.log, manifest.paths)
    messages = {message for destination, message in manifest.messages if destination == arguments.destination}
    expected = Expected(arguments.source, arguments.destination, arguments.receipts, messages)
    if arguments.postgres:
        rows, held, waiting = read_postgres(*arguments.postgres)
    else:
        rows, held, waiting = read_store(arguments.store)

    counts = collections.Counter()
    seen = set()
    for destination, message, state, response, conflict in rows:
        if (destination, message) in seen:
            violations.add("R1", f"{message} to {destination} has two rows")
        seen.add((destination, message))
        if (destination, message) not in manifest.messages:
            violations.add("R2", f"{message} to {destination}: no input row made it")
            continue
        counts[state] += 1
        recorded = "sent" if (destination, message) in sent else "dead"
        best, reported = (None, set()) if destination != expected.destination else (
            expected.best.get(message), expected.reported.get(message, set()))
        wanted = recorded
        # An interim receipt brings facts; that a message was sent only the receiver's 2xx says (I2).
        if best and best[0][0] > STATES.index("sent"):
            wanted = STATES[best[0][0]]
        if arguments.expired and wanted == "sent":
            wanted = "expired"
        if state != wanted:
            violations.add("R3", f"{message} to {destination} is {state}, must be {wanted}")
        if best and response != best[1].get("response"):
            violations.add("R4", f"{message} has the response {response!r}, must be {best[1].get('response')!r}")
        if conflict != (len(reported) == 2):
            violations.add("R5", f"{message}: conflict is {conflict}, receipts reported {sorted(reported)}")
    for destination, message in manifest.messages:
        if (destination, message) not in seen and destination == expected.destination:
            violations.add("R6", f"{message} to {destination} has no row")
    if waiting:
        violations.add("R7", f"{waiting} receipts wait in the inbox")
    if set(held) != expected.unknown or len(held) != len(set(held)):
        odd = set(held) ^ expected.unknown
        violations.add("R8", f"{len(held)} receipts have no message, must be {len(expected.unknown)}; {len(odd)} differ")

    json.dump(
        {
            "messages": len(manifest.messages),
            "rows": len(rows),
            "states": dict(counts),
            "events": len(expected.events),
            "unknown": len(expected.unknown),
            "conflicts": expected.conflicts(),
            "violations": dict(violations.counts),
        },
        sys.stdout,
        indent=2,
    )
    print()
    for invariant in sorted(violations.shown):
        for text in violations.shown[invariant]:
            print(f"{invariant}: {text}", file=sys.stderr)
    return 1 if violations.counts else 0


if __name__ == "__main__":
    sys.exit(main())
