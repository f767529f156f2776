"""Judges requests with the public Standard Webhooks library (PyPI `standardwebhooks`).

Reads one JSON object per line: {"secret": str, "raw": bool, "headers": {name: value}, "body": base64}.
Writes "ok" or the library's refusal for each. `raw` says that the secret's bytes are the key.
"""

import base64
import json
import sys

from standardwebhooks.webhooks import Webhook, WebhookVerificationError

for line in sys.stdin:
    case = json.loads(line)
    secret = case["secret"].encode() if case["raw"] else case["secret"]
    try:
        Webhook(secret).verify(base64.b64decode(case["body"]), case["headers"], json_parse=False)
        print("ok")
    except WebhookVerificationError as error:
        print(f"refused: {error}")
