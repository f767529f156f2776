#!/usr/bin/env python3
"""Proves what Postrider did with the files it was given, from the outside.

    oracle.py --manifest M.json --log RECEIVER.log [--log …] (--store postrider.db | --files-json F.json)
              [--scan LOGFILE …] [--earlier STATES.json …] [--dump STATES.json]

It shares no code with the product. It derives every id again, from the manifest (what was dropped and
how each row must end), reads what receivers logged before they answered, and what the store says,
and checks the invariants of the design, section 5. Standard output is one JSON summary; violations go
to standard error, at most `SHOWN_MAX` of each kind. Exit status: 0 all hold, 1 one does not, 2 usage.

The manifest:

    attempt_cap     retry.max_attempts
    lost_lease_cap  requests per message that may be lost in deaths of workers and processes
    kills           how often the daemon was killed (or crashed by a failpoint)
    window          messages that one kill may repeat: in flight + unrecorded, all destinations together
    unknown         further messages whose answer may have been lost on the way (resets, timeouts); 0
    redrives        rounds of redrive; 0
    quiescent       whether everything must be terminal (I9); true
    signed          whether every request must have been verified by the receiver; true
    secrets         texts that no scanned file may hold (I10)
    destinations    {name: URL path}; a path belongs to one destination
    files           [{feed, name, sha256, destinations, state, columns, rows}]; `state` is how the file
                    must end, "ingested" by default. `columns` (csv with the default body) or null.
                    `rows[n - 1]` is row n: [kind, recipient, cells], kind one of ok (sent or dead), sent,
                    dead, unsent, cancelled (each of these two: or sent, or dead), rejected, duplicate; recipient and cells only where a message is expected.
"""

import argparse
import collections
import hashlib
import json
import pathlib
import re
import sys

import dynamodb as dynamodb_reader
import store as store_reader
from store import ACCEPTED, CANCELLED, DEAD, RETRYING, SENT, STATES, UNSENT

SHOWN_MAX = 20
# Shorter recipients ("1", "ann") occur in any log by chance, so I10 can't be judged by them.
SCANNED_CHARS_MIN = 6
TOKEN = re.compile(r"[\w.@+-]+")
# Statuses that speak of a request's content: a bundle is divided until the message is found that is refused.
DIVIDED = (400, 413, 422)


class Violations:
    """What does not hold: counted without bound, kept up to SHOWN_MAX of each invariant."""

    def __init__(self):
        self.counts = collections.Counter()
        self.shown = collections.defaultdict(list)

    def add(self, invariant, text):
        self.counts[invariant] += 1
        if len(self.shown[invariant]) < SHOWN_MAX:
            self.shown[invariant].append(text)


def file_id(feed, sha256_hex):
    """SHA-256 over the length-prefixed (u64, little-endian) feed name and content digest, 128 bits of it."""
    digest = hashlib.sha256()
    for part in (feed.encode(), bytes.fromhex(sha256_hex)):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()[:32]


def message_id(file, row):
    return f"msg_{file}_{row}"


def bundle_id(messages):
    """SHA-256 over the ids of a bundle's messages, each with a line feed behind it, 128 bits of it (B15)."""
    return "bundle_" + hashlib.sha256("".join(f"{message}\n" for message in messages).encode()).hexdigest()[:32]


def default_body(feed, message, recipient, columns, cells):
    """The body of a csv row without a template."""
    body = {"id": message, "feed": feed, "recipient": recipient, "data": dict(zip(columns, cells))}
    return json.dumps(body, separators=(",", ":"), ensure_ascii=False).encode()


class Expectation:
    """What the manifest says of one message at one destination."""

    __slots__ = ("kind", "recipient", "body_sha256")

    def __init__(self, kind, recipient, body_sha256):
        self.kind = kind
        self.recipient = recipient
        self.body_sha256 = body_sha256


class Manifest:
    """The manifest with every id derived."""

    def __init__(self, raw):
        self.attempt_cap = raw["attempt_cap"]
        self.lost_lease_cap = raw["lost_lease_cap"]
        self.kills = raw.get("kills", 0)
        self.window = raw.get("window", 0)
        self.unknown = raw.get("unknown", 0)
        self.redrives = raw.get("redrives", 0)
        self.quiescent = raw.get("quiescent", True)
        self.signed = raw.get("signed", True)
        self.secrets = raw.get("secrets", [])
        self.paths = {path: name for name, path in raw["destinations"].items()}
        self.files = {}
        # (destination, message id) → Expectation, for the rows that become messages.
        self.messages = {}
        self.recipients = set()
        for file in raw["files"]:
            identity = file_id(file["feed"], file["sha256"])
            self.files[identity] = file
            columns = file.get("columns")
            for number, row in enumerate(file["rows"], 1):
                kind, recipient, cells = (list(row) + [None, None])[:3]
                if recipient:
                    self.recipients.add(recipient)
                if kind not in ("ok", "sent", "dead", "unsent", "cancelled"):
                    continue
                message = message_id(identity, number)
                body = None
                if columns and cells is not None:
                    text = default_body(file["feed"], message, recipient, columns, cells)
                    body = hashlib.sha256(text).hexdigest()
                for destination in file["destinations"]:
                    self.messages[destination, message] = Expectation(kind, recipient, body)

    def allowance(self):
        """I6: how many requests the kills may have added."""
        return self.kills * self.window + self.unknown


class Requests:
    """What the receivers logged, per destination and message id, in order."""

    def __init__(self, logs, manifest, violations):
        self.total = 0
        self.bundle = []
        self.statuses = collections.defaultdict(list)
        bodies = {}
        for log in logs:
            with open(log, "rb") as lines:
                for number, line in enumerate(lines, 1):
                    self._take(f"{log}:{number}", line, manifest, bodies, violations)

    def _take(self, where, line, manifest, bodies, violations):
        try:
            entry = json.loads(line)
            message, path, status = entry["id"], entry["path"], entry["status"]
            body, verified = entry["body_sha256"], entry["verified"]
        except (ValueError, KeyError, TypeError) as error:
            violations.add("log", f"{where}: not a request line: {error!r}")
            return
        self.total += 1
        if "bundle" in entry:
            self._take_bundled(where, entry, violations)
        destination = manifest.paths.get(path.partition("?")[0])
        if destination is None:
            violations.add("I3", f"{where}: request to {path}, where no destination points")
            return
        expected = manifest.messages.get((destination, message))
        if expected is None:
            violations.add("I3", f"{where}: {destination} got {message}, which no input row produced")
            return
        if manifest.signed and verified is not True:
            violations.add("signature", f"{where}: {message} was not verified (verified = {verified})")
        if "body" in entry:
            text = entry["body"].encode()
            if hashlib.sha256(text).hexdigest() != body:
                violations.add("log", f"{where}: body_sha256 is not the body's digest")
        first = bodies.setdefault((destination, message), body)
        if first != body:
            violations.add("I4", f"{where}: {message} had body {first} before, now {body}")
        if expected.body_sha256 not in (None, body):
            violations.add("body", f"{where}: {message} carries a body that is not its row's")
        # A bundle that is refused for its content is divided, and that is no attempt.
        if entry.get("of", 1) == 1 or status not in DIVIDED:
            self.statuses[destination, message].append(status)

    def _take_bundled(self, where, entry, violations):
        """A bundle's messages are logged one after the other; its id is made of theirs."""
        self.bundle.append((entry["bundle"], entry["path"], entry["id"]))
        if len(self.bundle) < entry["of"]:
            return
        messages = [message for _, _, message in self.bundle]
        if any((bundle, path) != (entry["bundle"], entry["path"]) for bundle, path, _ in self.bundle):
            violations.add("log", f"{where}: the messages of {entry['bundle']} are not together")
        elif bundle_id(messages) != entry["bundle"]:
            violations.add("B15", f"{where}: {entry['bundle']} is not made of its {len(messages)} messages")
        self.bundle = []

    def answered_2xx(self, key):
        return any(200 <= status < 300 for status in self.statuses.get(key, ()))


def check_requests(manifest, requests, view, violations):
    """I5 and I6."""
    cap = manifest.attempt_cap * (1 + manifest.redrives) + manifest.lost_lease_cap
    repeated = 0
    unrecorded = 0
    for key, statuses in requests.statuses.items():
        if len(statuses) > cap:
            violations.add("I5", f"{key[0]}: {key[1]} was requested {len(statuses)} times, the caps allow {cap}")
        succeeded = [n for n, status in enumerate(statuses) if 200 <= status < 300]
        if succeeded:
            repeated += len(statuses) - 1 - succeeded[0]
        if view.has_messages:
            # A 410 holds its message and is charged to none: the destination's record says it.
            charged = sum(1 for status in statuses if status != 410)
            unrecorded += max(0, charged - view.attempts[key])
    allowed = manifest.allowance()
    if repeated > allowed:
        violations.add("I6", f"{repeated} requests came after a 2xx of the same message; "
                             f"{manifest.kills} kills allow {allowed}")
    if unrecorded > allowed:
        violations.add("I6", f"{unrecorded} requests are in no record; {manifest.kills} kills allow {allowed}")
    return repeated, unrecorded


def is_still_read(manifest, view, identity):
    """In the middle of the job a file may not be taken yet, or not read to its end."""
    return not manifest.quiescent and (identity not in view.files or view.files[identity].state == "ingesting")


def check_messages(manifest, requests, view, violations):
    """I1, I2, I7 and I9, message by message."""
    lost_successes = []
    for key, expected in manifest.messages.items():
        destination, message = key
        state = view.states.get(key)
        if state is None:
            if is_still_read(manifest, view, message[len("msg_"):].partition("_")[0]):
                continue
            violations.add("I1", f"{destination}: {message} ({expected.kind} expected) has no state")
            continue
        if state in (ACCEPTED, RETRYING):
            if manifest.quiescent:
                word = "accepted" if state == ACCEPTED else "retrying"
                violations.add("I9", f"{destination}: {message} is still {word}")
        elif state == SENT:
            if not requests.answered_2xx(key):
                violations.add("I2", f"{destination}: {message} is sent, but the receiver answered "
                                     f"{requests.statuses.get(key, 'nothing')}")
            if expected.kind == "dead":
                violations.add("I1", f"{destination}: {message} is sent, dead expected")
        elif state in (UNSENT, CANCELLED):
            if requests.answered_2xx(key):
                lost_successes.append(key)
            if expected.kind != STATES[state]:
                violations.add("I1", f"{destination}: {message} is {STATES[state]}, {expected.kind} expected")
        elif state == DEAD:
            if requests.answered_2xx(key):
                lost_successes.append(key)
            if expected.kind == "sent":
                violations.add("I1", f"{destination}: {message} is dead, sent expected")
        else:
            violations.add("I1", f"{destination}: {message} is in state {state} without any receipt")
    # A 2xx may be lost in a kill before it is recorded; every other one outranks a failure.
    if len(lost_successes) > manifest.allowance():
        violations.add("I7", f"{len(lost_successes)} messages are given up though the receiver answered 2xx, "
                             f"{manifest.allowance()} may be; one is {lost_successes[0]}")
    for destination, message in view.states.keys() - manifest.messages.keys():
        violations.add("I1", f"{destination}: {message} is in the store, but no input row produced it")
    for key, count in view.batches.items():
        if count > 1:
            violations.add("I1", f"{key[0]}: {key[1]} is in {count} batches")


def check_refused_rows(manifest, view, violations):
    """I1 for the rows that must not become messages."""
    for identity, file in manifest.files.items():
        for kind, found in (("rejected", view.rejected), ("duplicate", view.duplicates)):
            expected = {number for number, row in enumerate(file["rows"], 1) if row[0] == kind}
            listed = found.get(identity, [])
            rows = set(listed)
            if len(listed) != len(rows):
                violations.add("I1", f"{file['name']}: {len(listed) - len(rows)} rows are {kind} twice")
            unread = is_still_read(manifest, view, identity)
            for row in sorted(expected - rows) if not unread else ():
                violations.add("I1", f"{file['name']}: row {row} is not {kind}, as expected")
            for row in sorted(rows - expected):
                violations.add("I1", f"{file['name']}: row {row} is {kind}, {row_kind(file, row)} expected")


def row_kind(file, row):
    return file["rows"][row - 1][0] if 0 < row <= len(file["rows"]) else "no such row"


def check_files(manifest, view, violations):
    """I1 by the counters that operators are shown, and I9 for the files themselves."""
    for identity in view.files.keys() - manifest.files.keys():
        violations.add("I1", f"file {identity} is in the store, but was not dropped")
    derived = collections.defaultdict(collections.Counter)
    for (destination, message), state in view.states.items():
        derived[message[len("msg_"):].partition("_")[0], destination][state] += 1
    for identity, file in manifest.files.items():
        name, shown = file["name"], view.files.get(identity)
        if is_still_read(manifest, view, identity):
            continue
        if shown is None:
            violations.add("I1", f"{name} ({identity}) is not in the store")
            continue
        wanted = file.get("state", "ingested")
        if shown.state != wanted:
            violations.add("I9" if shown.state == "ingesting" else "I1",
                           f"{name} is {shown.state}, {wanted} expected")
        kinds = collections.Counter(row[0] for row in file["rows"])
        for what, count in (("rows", len(file["rows"])), ("rejected", kinds["rejected"]),
                            ("duplicates", kinds["duplicate"])):
            if getattr(shown, what) != count:
                violations.add("I1", f"{name}: {what} = {getattr(shown, what)}, {count} expected")
        if set(shown.destinations) != set(file["destinations"]):
            violations.add("I1", f"{name}: destinations {sorted(shown.destinations)}, "
                                 f"{sorted(file['destinations'])} expected")
        for destination, counts in shown.destinations.items():
            states = derived[identity, destination] if view.has_messages else None
            check_counts(manifest, f"{name} at {destination}", counts, shown, states, violations)


def check_counts(manifest, where, counts, shown, derived, violations):
    total = sum(counts) + shown.rejected + shown.duplicates
    if total != shown.rows or counts.pending < 0:
        violations.add("I1", f"{where} does not balance: {counts} and {shown.rejected} rejected, "
                             f"{shown.duplicates} duplicates of {shown.rows} rows")
    if manifest.quiescent and counts.retrying + counts.pending:
        violations.add("I9", f"{where}: {counts.retrying} retrying, {counts.pending} pending")
    if derived is None:
        return
    for word, state in (("sent", SENT), ("dead", DEAD), ("retrying", RETRYING), ("pending", ACCEPTED),
                        ("unsent", UNSENT), ("cancelled", CANCELLED)):
        if getattr(counts, word) != derived[state]:
            violations.add("I1", f"{where}: the counter says {getattr(counts, word)} {word}, "
                                 f"the states say {derived[state]}")


def check_earlier(manifest, path, view, violations):
    """I7 over time: no state is lower than it was in an earlier dump."""
    for text, was in json.loads(pathlib.Path(path).read_text()).items():
        destination, _, message = text.partition(" ")
        now = view.states.get((destination, message))
        redriven = manifest.redrives and was == DEAD
        if now is None or (now < was and not redriven):
            violations.add("I7", f"{destination}: {message} was in state {was}, now in {now}")


def check_scans(manifest, paths, violations):
    """I10: no recipient and no secret in what the daemon wrote for people."""
    recipients = {text for text in manifest.recipients if len(text) >= SCANNED_CHARS_MIN}
    phrases = [text for text in recipients if not TOKEN.fullmatch(text)]
    for path in paths:
        with open(path, encoding="utf-8", errors="replace") as lines:
            for number, line in enumerate(lines, 1):
                found = recipients.intersection(TOKEN.findall(line))
                # A recipient may be a part of a larger token: `user-1.` or `to=a.b`.
                found.update(text for token in TOKEN.findall(line) for text in token.split(".")
                             if text in recipients)
                found.update(text for text in phrases if text in line)
                if found:
                    violations.add("I10", f"{path}:{number}: names recipient {sorted(found)[0]!r}")
                if any(secret in line for secret in manifest.secrets):
                    violations.add("I10", f"{path}:{number}: holds a secret")


def judge(manifest, logs, view, scans=(), earlier=()):
    """All checks. Returns the violations and the summary."""
    violations = Violations()
    requests = Requests(logs, manifest, violations)
    repeated, unrecorded = check_requests(manifest, requests, view, violations)
    check_files(manifest, view, violations)
    if view.has_messages:
        check_messages(manifest, requests, view, violations)
        check_refused_rows(manifest, view, violations)
        for problem in view.problems:
            violations.add("store", problem)
        for path in earlier:
            check_earlier(manifest, path, view, violations)
    check_scans(manifest, scans, violations)
    states = collections.Counter(view.states.values())
    return violations, {
        "ok": not violations.counts,
        "violations": dict(sorted(violations.counts.items())),
        "files": len(manifest.files),
        "messages": len(manifest.messages),
        "requests": requests.total,
        "requests_after_2xx": repeated,
        "requests_unrecorded": unrecorded,
        "requests_extra_allowed": manifest.allowance(),
        "sent": states[SENT],
        "dead": states[DEAD],
        "retrying": states[RETRYING],
        "unsent": states[UNSENT],
        "cancelled": states[CANCELLED],
        "accepted": states[ACCEPTED],
    }


def main(arguments):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--manifest", required=True)
    parser.add_argument("--log", action="append", default=[], help="a receiver's log")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--store", help="the store's database")
    source.add_argument("--dynamodb", nargs=2, metavar=("ENDPOINT", "TABLE"), help="the store's tables")
    source.add_argument("--files-json", help="what `postrider files --json` printed: I1 and I9 by counters only")
    parser.add_argument("--scan", action="append", default=[], help="a log that must name nobody (I10)")
    parser.add_argument("--earlier", action="append", default=[], help="a dump that states must not fall behind")
    parser.add_argument("--dump", help="write every message's state to this file")
    options = parser.parse_args(arguments)

    manifest = Manifest(json.loads(pathlib.Path(options.manifest).read_text()))
    if options.store:
        view = store_reader.read_sqlite(options.store)
    elif options.dynamodb:
        view = dynamodb_reader.read_dynamodb(*options.dynamodb)
    else:
        view = store_reader.read_files_json(options.files_json)
    violations, summary = judge(manifest, options.log, view, options.scan, options.earlier)
    if options.dump:
        states = {f"{destination} {message}": state for (destination, message), state in view.states.items()}
        pathlib.Path(options.dump).write_text(json.dumps(states))
    for invariant, texts in sorted(violations.shown.items()):
        for text in texts:
            print(f"{invariant}: {text}", file=sys.stderr)
        hidden = violations.counts[invariant] - len(texts)
        if hidden:
            print(f"{invariant}: and {hidden} more", file=sys.stderr)
    print(json.dumps(summary))
    return 0 if summary["ok"] else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
