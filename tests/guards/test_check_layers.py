"""script/check-layers finds each break of the dependency rules, and nothing in a tree that keeps them."""

import pathlib
import subprocess
import sys
import tempfile
import unittest

CHECK = pathlib.Path(__file__).resolve().parents[2] / "script" / "check-layers"

CLEAN = {
    "actors/src/lib.rs": "pub mod model;\n",
    "actors/src/model/ids.rs": "use super::time::UnixMs;\nuse std::fmt; // not std::fs\n",
    "actors/src/model/time.rs": "pub struct UnixMs;\n#[cfg(test)]\nmod tests { use std::fs; }\n",
    "actors/src/ports/clock.rs": "use crate::model::time::UnixMs;\nuse std::io;\n",
    "actors/src/messages/mod.rs": "use crate::{model::ids, ports::Clock};\n",
    "actors/src/parser.rs": "use crate::{flow::Gate, messages::X, model::ids, supervision::Drain};\nuse actix::Actor;\n",
    "actors/src/batcher/mod.rs": "mod inner;\nuse super::messages::X;\ncrate::failpoint!(\"x\");\n",
    "actors/src/batcher/inner.rs": "use super::X;\n",
    "actors/src/supervision/mod.rs": "use crate::model::ids;\n",
    "actors/src/flow.rs": "use crate::model::time::UnixMs;\n",
    "actors/src/testing/mod.rs": "use crate::{parser, supervision::Drain};\n",
}

BREAKS = [
    ("actors/src/model/ids.rs", "use crate::ports::Clock;", "`model` must not import `ports`"),
    ("actors/src/model/ids.rs", "use super::super::messages::X;", "`model` must not import `messages`"),
    ("actors/src/model/ids.rs", "fn f() { crate::parser::f() }", "`model` must not import `parser`"),
    ("actors/src/model/ids.rs", "use actix::Actor;", "`model` must not know `actix`"),
    ("actors/src/model/ids.rs", "use std::{\n    time::SystemTime,\n};", "`model` must not know `SystemTime`"),
    ("actors/src/ports/clock.rs", "use tokio::time::sleep;", "`ports` must not know `tokio::time`"),
    ("actors/src/ports/clock.rs", "fn f() { std::fs::read(\"x\"); }", "`ports` must not know `std::fs`"),
    ("actors/src/messages/mod.rs", "use crate::parser::P;", "`messages` must not import `parser`"),
    ("actors/src/parser.rs", "use crate::{\n    model::{ids, time},\n    batcher::B,\n};", "`parser` must not import `batcher`"),
    ("actors/src/parser.rs", "use super::batcher::B;", "`parser` must not import `batcher`"),
    ("actors/src/batcher/inner.rs", "use super::super::parser::P;", "`batcher` must not import `parser`"),
    ("actors/src/parser.rs", "use crate::testing::T;", "`parser` must not import `testing`"),
    ("actors/src/supervision/mod.rs", "use crate::parser::P;", "`supervision` must not import `parser`"),
    ("actors/src/flow.rs", "use crate::messages::M;", "`flow` must not import `messages`"),
]


def check(files):
    with tempfile.TemporaryDirectory() as directory:
        for name, text in files.items():
            path = pathlib.Path(directory) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return subprocess.run([sys.executable, CHECK, "--root", directory, "--no-tree"], capture_output=True, text=True)


class CheckLayers(unittest.TestCase):
    def test_a_tree_that_keeps_the_rules_passes(self):
        result = check(CLEAN)
        self.assertEqual((result.returncode, result.stderr), (0, ""))

    def test_each_break_is_found_and_named(self):
        for path, line, problem in BREAKS:
            with self.subTest(path=path, line=line):
                result = check({**CLEAN, path: line + "\n" + CLEAN[path]})
                self.assertEqual(result.returncode, 1)
                self.assertIn(problem, result.stderr)
                self.assertIn(f"{path}:", result.stderr)
                self.assertEqual(len(result.stderr.splitlines()), 1, result.stderr)


if __name__ == "__main__":
    unittest.main()
