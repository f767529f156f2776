"""One measured life of `postrider run`: its own state, one feed, one destination, one file."""

import json
import os
import pathlib
import signal
import socket
import statistics
import subprocess
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
BINARY = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "release" / "postrider"
SECRET = "whsec_dGhpcyBpcyBvbmx5IGEgdGVzdCBzZWNyZXQsIDMyIGI="
DEADLINE_S = 600
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def build():
    subprocess.run(["cargo", "build", "--release", "--features", "full", "--quiet"], cwd=ROOT, check=True)


def wait_for(what, check, deadline_s=DEADLINE_S, poll_s=0.02):
    end = time.monotonic() + deadline_s
    while True:
        found = check()
        if found:
            return found
        if time.monotonic() > end:
            raise SystemExit(f"waited {deadline_s} s in vain for {what}")
        time.sleep(poll_s)


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def answers(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def cpu_s(pid):
    """User and system time of a process so far, all threads."""
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_S


def peak_rss_mib(pid):
    for line in pathlib.Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise SystemExit("/proc has no VmHWM")


def stop(process):
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class Run:
    """A daemon and its directories; a context manager that stops it. Without `url` the destination is no webhook, and
    `destination` says what it is."""

    def __init__(self, url, feed_format="csv", destination=(), more="", environment=None, migrate=False):
        self.environment = os.environ | (environment or {})
        self.migrate = migrate
        self.directory = tempfile.TemporaryDirectory(prefix="postrider-bench-")
        self.path = pathlib.Path(self.directory.name)
        self.inbox = self.path / "inbox"
        self.inbox.mkdir()
        recipient = "" if feed_format == "text" else 'recipient = "user_id"\n'
        webhook = [f'url = "{url}"', 'allow = ["127.0.0.1/32"]', 'secrets = ["env:POSTRIDER_BENCH_SECRET"]'] if url else []
        lines = "".join(f"{line}\n" for line in [*webhook, *destination])
        (self.path / "postrider.toml").write_text(
            f'[state]\ndir = "{self.path}/state"\n[log]\nlevel = "warn"\n[canary]\nenabled = false\n{more}\n'
            f'[feeds.bench]\npath = "{self.inbox}"\nformat = "{feed_format}"\n{recipient}'
            f'destinations = ["bench"]\n'
            f'[destinations.bench]\n{lines}')
        self.notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.notify.bind(str(self.path / "notify"))
        self.notify.settimeout(30)

    def __enter__(self):
        environment = self.environment | {
            "POSTRIDER_BENCH_SECRET": SECRET, "NOTIFY_SOCKET": str(self.path / "notify")}
        if self.migrate:
            subprocess.run([BINARY, "migrate", "-c", self.path / "postrider.toml"], env=environment, check=True,
                           stdout=subprocess.DEVNULL)
        self.process = subprocess.Popen(
            [BINARY, "run", "-c", self.path / "postrider.toml"], env=environment,
            stdout=subprocess.DEVNULL, stderr=open(self.path / "log", "w"))
        try:
            while b"READY=1" not in self.notify.recv(4096):
                pass
        except TimeoutError:
            raise SystemExit(f"postrider did not become ready: {(self.path / 'log').read_text()}") from None
        # Nobody reads on: a full socket would make the daemon drop its notifications, not wait.
        return self

    def __exit__(self, *_):
        stop(self.process)
        self.notify.close()
        self.directory.cleanup()

    def drop(self, content, name):
        """Writes a file elsewhere and renames it into the feed; returns the time of the rename in s."""
        return self.drop_into(self.inbox, content, name)

    def drop_into(self, directory, content, name):
        """The same for another directory."""
        staged = self.path / "staged"
        staged.write_bytes(content)
        at = time.time()
        staged.rename(directory / name)
        return at

    def report(self, name):
        """The file's report, once it is in done/."""
        path = self.inbox / "done" / f"{name}.report.json"
        failed = self.inbox / "failed" / f"{name}.report.json"
        if failed.exists():
            raise SystemExit(f"the file failed: {failed.read_text()}")
        return json.loads(path.read_text()) if path.exists() else None

    def wait_report(self, name, settled):
        """Waits until every row is in the outbox, or (`settled`) every message has its final state."""
        def look():
            if self.process.poll() is not None:
                raise SystemExit(f"postrider exited: {(self.path / 'log').read_text()}")
            report = self.report(name)
            if report and (report["settled_at"] if settled else report["closed_at"]):
                return report
            return None
        return wait_for(f"the report of {name}", look)


class Emulators:
    """SQS and DynamoDB on free ports; a context manager that stops them."""

    def __init__(self):
        self.directory = tempfile.TemporaryDirectory(prefix="postrider-emulators-")
        self.processes = []

    def __enter__(self):
        sqs, dynamodb = free_port(), free_port()
        self._start("POSTRIDER_MINISTACK", [], sqs, {
            "GATEWAY_PORT": str(sqs), "BIND_HOST": "127.0.0.1", "STATE_DIR": self.directory.name})
        self._start("POSTRIDER_DYNOXIDE", ["serve", "--port", str(dynamodb)], dynamodb, {})
        self.environment = {
            "AWS_ENDPOINT_URL_SQS": f"http://127.0.0.1:{sqs}",
            "AWS_ENDPOINT_URL_DYNAMODB": f"http://127.0.0.1:{dynamodb}",
            "AWS_REGION": "us-east-1", "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
        return self

    def _start(self, variable, arguments, port, environment):
        program = os.environ.get(variable)
        if not program:
            raise SystemExit(f"set {variable} to the emulator's executable; script/test installs it")
        self.processes.append(subprocess.Popen(
            [program, *arguments], env=os.environ | environment, cwd=self.directory.name,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        wait_for(program, lambda: answers(port), 30)

    def __exit__(self, *_):
        for process in self.processes:
            stop(process)
        self.directory.cleanup()


def describe(values, unit, digits=0):
    """Median and range, human-readable."""
    return (f"{statistics.median(values):,.{digits}f} {unit} "
            f"(of {len(values)}: {min(values):,.{digits}f} to {max(values):,.{digits}f})")
