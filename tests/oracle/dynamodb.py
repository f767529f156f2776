"""Reads what the DynamoDB store says, without the product and without an SDK: scans of both tables. For
emulators, which check no signature. The layout is documented in the product's `schema` module."""

import base64
import hashlib
import json
import urllib.request

from store import ACCEPTED, DEAD, RETRYING, Counts, File, View, payload_rows, read_record, rejected_rows, row_numbers

SCHEMA = 1
HEADERS = {
    "content-type": "application/x-amz-json-1.0",
    "authorization": "AWS4-HMAC-SHA256 Credential=test/20000101/us-east-1/dynamodb/aws4_request, "
                     "SignedHeaders=host, Signature=0",
    "x-amz-date": "20000101T000000Z",
}


def call(endpoint, operation, request):
    headers = HEADERS | {"x-amz-target": f"DynamoDB_20120810.{operation}"}
    with urllib.request.urlopen(
            urllib.request.Request(endpoint, json.dumps(request).encode(), headers), timeout=60) as answer:
        return json.load(answer)


def scan(endpoint, table):
    """Every item of a table, its values unwrapped."""
    request = {"TableName": table, "ConsistentRead": True}
    while True:
        page = call(endpoint, "Scan", request)
        for item in page["Items"]:
            yield {name: unwrap(value) for name, value in item.items()}
        if "LastEvaluatedKey" not in page:
            return
        request["ExclusiveStartKey"] = page["LastEvaluatedKey"]


def unwrap(value):
    (kind, content), = value.items()
    if kind == "N":
        return int(content)
    return base64.b64decode(content) if kind == "B" else content


def read_dynamodb(endpoint, table):
    """The view that the two tables give. They are read one after the other: nothing may write meanwhile."""
    view = View(has_messages=True)
    batches, chunks, listed, nodes, depth = {}, {}, set(), {}, 0
    for item in scan(endpoint, f"{table}-ledger"):
        partition, _, identity = item["Pk"].partition("#")
        part, _, rest = item["Sk"].partition("#")
        if (partition, part) == ("schema", "version") and item["Version"] != SCHEMA:
            raise SystemExit(f"{table} has schema {item['Version']}, the oracle reads {SCHEMA}")
        elif (partition, part) == ("batch", "history"):
            chunks.setdefault(identity, []).append(item["Body"])
        elif partition == "batch":
            batches[identity] = item
        elif (partition, part) == ("file", "file") and not rest:
            file = File(json.loads(item["State"])["state"], item["RowsRead"], item["Rejected"], item["Duplicates"])
            file.names = json.loads(item["Record"])["to"]
            view.files[identity] = file
        elif (partition, part) == ("file", "file"):
            destination = rest.rpartition("#")[0]
            counts = nodes.setdefault((identity, destination), [0, 0, 0, 0, 0])
            for at, name in enumerate(("Sent", "Dead", "Retrying", "Unsent", "Cancelled")):
                counts[at] += item.get(name, 0)
        elif partition == "file" and part in ("rejects", "duplicates"):
            decode, found = ((rejected_rows, view.rejected) if part == "rejects"
                             else (row_numbers, view.duplicates))
            try:
                found[identity].extend(decode(item["Body"]))
            except (IndexError, ValueError) as error:
                view.problems.append(f"{item['Pk']} {item['Sk']} can't be read: {error}")
        elif partition == "dead":
            listed.add(item["Sk"].rpartition("#")[2])
        elif partition == "depth":
            depth += sum(count for name, count in item.items() if name.startswith("Messages#"))
    for identity, file in view.files.items():
        accepted = file.rows - file.rejected - file.duplicates
        for name in file.names:
            sent, dead, retrying, unsent, cancelled = nodes.get((identity, name), (0, 0, 0, 0, 0))
            pending = accepted - sent - dead - retrying - unsent - cancelled
            file.destinations[name] = Counts(sent, dead, retrying, pending, unsent, cancelled)
    for identity, item in batches.items():
        read_batch(identity, item, chunks.get(identity, ()), view)
    still_open = sum(1 for state in view.states.values() if state in (ACCEPTED, RETRYING))
    if depth != still_open:
        view.problems.append(f"the depth counters say {depth}, the states say {still_open}")
    for identity, item in batches.items():
        states = read_record(item["Body"], item["Count"])[0] if "Body" in item else b""
        if (DEAD in states) != (identity in listed):
            view.problems.append(f"batch {identity}: dead letters and its states disagree")
    check_outbox(endpoint, table, batches, view)
    return view


def read_batch(identity, item, chunks, view):
    count, first_row = item["Count"], item["FirstRow"]
    try:
        rows = row_numbers(item["Rows"]) if "Rows" in item else list(range(first_row, first_row + count))
        if len(rows) != count or rows[:1] != [first_row]:
            raise ValueError(f"{len(rows)} rows from {rows[:1]}, {count} from {first_row} expected")
        view.add_batch(identity, item["Topic"], item["File"], rows, item.get("Body"), chunks)
    except (IndexError, ValueError) as error:
        view.problems.append(f"batch {identity} can't be read: {error}")


def check_outbox(endpoint, table, batches, view):
    """What every batch carries is in the outbox, by the digest of its content, for as long as the batch says at least;
    and every batch is on one side of dispatching, or archived."""
    payloads = {}
    for item in scan(endpoint, table):
        payloads[item["Digest"]] = item
        content = item["Header"].encode()
        digest = hashlib.sha256(len(content).to_bytes(8, "little") + content + item["Payload"]).hexdigest()[:32]
        if item["Digest"] != digest:
            view.problems.append(f"payload {item['Digest']} has the digest {digest}")
        if json.loads(item["Header"])["destination"]:
            view.problems.append(f"payload {digest} names a destination")
    for identity, record in batches.items():
        if "TopicShard" not in record:
            continue
        if ("OutstandingCreatedTime" in record) == ("DeliveryTime" in record):
            view.problems.append(f"batch {identity} is neither outstanding nor dispatched, or both")
        payload = payloads.get(record["Digest"])
        if payload is None:
            view.problems.append(f"batch {identity} has no payload")
            continue
        rows = payload_rows(payload["Payload"])
        if len(rows) != record["Count"] or rows[0] != record["FirstRow"]:
            view.problems.append(f"batch {identity}: outbox and ledger disagree about its rows")
        if payload["ExpiresAt"] < record["KeptUntil"]:
            view.problems.append(f"the payload of batch {identity} expires before the batch says so")
