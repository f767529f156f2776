"""script/fault-table makes the table of faults from tests and figures, and finds what is missing or made up."""

import json
import pathlib
import subprocess
import sys
import tempfile
import unittest

TABLE = pathlib.Path(__file__).resolve().parents[2] / "script" / "fault-table"
REQUIRED = range(1, 74)


def row(fault, figure="1 row"):
    return f"| F{fault} | a fault | a rule | `tests/all.rs` | {figure} |"


def page(rows):
    return "# Faults\n\n| id | fault | must hold | test | figure |\n|---|---|---|---|---|\n" + "\n".join(rows) + "\n"


def source(faults):
    return "".join(f"#[test]\nfn f{fault:02}_is_met() {{}}\n" for fault in faults)


def line(test, process=1, binary="daemon-0123abcd", **what):
    return json.dumps({"binary": binary, "test": f"module::{test}", "process": process, **what})


def oracle(messages, again, kills=1, sent=None):
    return {"kills": kills, "oracle": {
        "messages": messages, "requests": messages + again, "requests_after_2xx": again,
        "requests_extra_allowed": 100 * kills, "sent": messages if sent is None else sent,
        "dead": 0, "cancelled": 0, "unsent": 0, "retrying": 0, "accepted": 0}}


class FaultTable(unittest.TestCase):
    def setUp(self):
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.root = pathlib.Path(directory.name)
        for name in ("docs", "tests", "src", "actors", "adapters", "settings"):
            (self.root / name).mkdir()
        self.write("docs/faults.md", page(row(fault) for fault in REQUIRED))
        self.write("tests/all.rs", source(REQUIRED))

    def write(self, name, text):
        (self.root / name).write_text(text)

    def run_table(self, *arguments):
        return subprocess.run([sys.executable, TABLE, "--root", self.root, *arguments], capture_output=True, text=True)

    def make(self, lines):
        self.write("figures", "\n".join(lines) + "\n")
        result = self.run_table("--figures", self.root / "figures", "--output", self.root / "made.md")
        return result, (self.root / "made.md").read_text()

    def assert_problem(self, result, problem):
        self.assertEqual(result.returncode, 1, result.stdout)
        self.assertIn(problem, result.stderr)
        self.assertEqual(len(result.stderr.splitlines()), 1, result.stderr)

    def test_a_page_that_agrees_with_the_tests_passes(self):
        result = self.run_table()
        self.assertEqual((result.returncode, result.stderr), (0, ""))

    def test_what_is_missing_is_named(self):
        rows = [row(fault) for fault in REQUIRED]
        for name, text, problem in (
                ("docs/faults.md", page(rows[1:]), "F1 has"),
                ("docs/faults.md", page([row(1, ""), *rows[1:]]), "F1 has no figure"),
                ("docs/faults.md", page([row(1, "`f01_is_gone`: 1 row"), *rows[1:]]), "no test `f01_is_gone`"),
                ("docs/faults.md", page([*rows, "| F34 | a | b | `src/a.rs` | |"]), "src/a.rs has no test of F34"),
                ("docs/faults.md", page(["| F1 | a | b | c |", *rows]), "F1 has 4 cells"),
                ("tests/all.rs", source(REQUIRED) + "fn f6_is_met() {}\n", "two digits"),
                ("tests/all.rs", source([*REQUIRED, 90]), "F90 has tests and no row")):
            with self.subTest(problem=problem):
                before = (self.root / name).read_text()
                self.write(name, text)
                result = self.run_table()
                self.write(name, before)
                self.assertEqual(result.returncode, 1)
                self.assertIn(problem, result.stderr)

    def test_a_fault_without_a_test_is_named(self):
        self.write("docs/faults.md", page([*(row(fault) for fault in REQUIRED[1:]), "| F1 | a | b | none yet | 1 row |"]))
        self.write("tests/all.rs", source(REQUIRED[1:]))
        self.assert_problem(self.run_table(), "F1 has no test")

    def test_each_fault_gets_its_tests_and_the_figures_of_their_last_runs(self):
        self.write("src/more.rs", "crash_points! {\n    f02_f14_crash_here f02_and_there: World::new;\n}\n")
        every = [line(f"f{fault:02}_is_met", text="1 row") for fault in REQUIRED if fault != 2]
        result, made = self.make([
            *every,
            line("f02_is_met", process=1, text="an earlier run"),
            line("f02_is_met", process=2, binary="daemon-4567cdef", text="5 rows"),
            line("f02_f14_crash_here", process=3, counts=oracle(1000, 2)),
            line("f02_and_there", text="0 rows"),
            line("f02_f14_crash_here", process=3, counts=oracle(500, 1)),
        ])
        self.assertEqual((result.returncode, result.stderr), (0, ""))
        counted = "oracle: 2 worlds, 2 kills, 1,500 messages, 1,503 requests; 0 lost, 3 sent again after a 2xx (200 may be)"
        self.assertIn(f"| F2 | a fault | a rule | `src/more.rs`, `tests/all.rs` | `f02_and_there`: 0 rows<br>`f02_is_met`: 5 rows<br>{counted} |", made)
        self.assertIn(f"| `f14_is_met`: 1 row<br>{counted} |", made)

    def test_a_message_without_a_state_is_lost(self):
        _, made = self.make([line("f02_is_met", counts=oracle(1000, 0, kills=0, sent=998))])
        self.assertIn("oracle: 1 world, 1,000 messages, 1,000 requests; 2 lost, 0 sent again after a 2xx |", made)

    def test_a_fault_without_a_figure_in_this_run_keeps_its_own_and_is_named(self):
        result, made = self.make([line(f"f{fault:02}_is_met", text="2 rows") for fault in REQUIRED[1:]])
        self.assert_problem(result, "F1 has no figure in this run")
        self.assertIn("| F1 | a fault | a rule | `tests/all.rs` | 1 row |", made)

    def test_a_line_that_is_no_figure_is_named(self):
        self.write("figures", "{\n")
        result = self.run_table("--figures", self.root / "figures", "--output", self.root / "made.md")
        self.assertIn("figures:1: not a figure", result.stderr)


if __name__ == "__main__":
    unittest.main()
