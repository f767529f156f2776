//! What a test of a fault measured, for the table in `docs/faults.md`.

use std::{
    env,
    fmt::Display,
    fs::OpenOptions,
    io::Write as _,
    path::{Path, PathBuf},
    process, thread,
};

use serde_json::{Value, json};

/// Names the file that figures go to, a JSON line each. Without it nothing is written.
const FILE: &str = "POSTRIDER_FIGURES";

/// Reports what the running test measured: a short text such as `12 kills, 20,000 rows: 0 lost`. Call it behind the
/// assertions that hold the figure to its bound, on the test's own thread: the test's name is the thread's.
pub fn figure(text: impl Display) {
    report("text", text.to_string().into());
}

/// Reports what an independent judge counted after a fault; the table adds such counts up over a fault's tests.
pub fn counts(counts: Value) {
    report("counts", counts);
}

/// `script/fault-table` reads these lines. Of a test that ran several times the last process counts.
fn report(what: &str, value: Value) {
    let Some(path) = env::var_os(FILE).map(PathBuf::from) else { return };
    let thread = thread::current();
    let mut entry = json!({
        "binary": env::current_exe().ok().as_deref().and_then(Path::file_name).map(|name| name.to_string_lossy()),
        "test": thread.name(),
        "process": process::id(),
    });
    entry[what] = value;
    let line = format!("{entry}\n");
    // One write to a file that is appended to: lines of other processes stay whole.
    let written = OpenOptions::new()
        .create(true)
        .append(true)
        .open(&path)
        .and_then(|mut file| file.write_all(line.as_bytes()));
    written.unwrap_or_else(|error| panic!("{FILE} = {}: {error}", path.display()));
}
