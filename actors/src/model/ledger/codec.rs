//! How a record and its history are stored.
//!
//! A record's body is what changes with its messages; the rest (`accepted_at`, `not_before`, fence, holder) is the
//! store's to keep in columns or attributes, where it can be found by. Version 1, varints in LEB128:
//!
//! ```text
//! version   u8 = 1
//! losses    u8
//! begun     varint(index + 1), 0: none
//! rendered  varint(fence) varint(at)
//! states    runs: varint(count) state, until there are as many as messages
//! tries     likewise
//! sent      of each message whose state says that it was sent: first all statuses, in runs
//!           varint(count) varint(status), then per message zigzag varint(after_ms - previous after_ms)
//! others    per message varint(index - previous) flags, then what the flags name, in their order:
//!           1 zigzag varint(not_before - previous not_before, first accepted_at)  2 varint(drive)  4 varint(redriven_at)  8 losses losses_alone
//!           16 varint(at) varint(status) reason cause varint(number of its detail, from 1; 0: none), and behind the
//!              number that comes next of all so far: varint(bytes) detail
//! ```
//!
//! Receivers say the same of many messages: each text is there once.

use std::collections::{BTreeMap, HashMap};

use super::{
    record::{Death, Exception, Holder, Record, Rendered, RowNumbers, Sent},
    settle::Failure,
};
use crate::model::{
    batch::{StateVector, put_varint, take_varint},
    codec::{Damaged, decode_row_numbers, encode_row_numbers},
    outcome::{Attempt, DeathCause, Reason},
    state::MessageState,
    time::UnixMs,
};

const VERSION: u8 = 1;

const NOT_BEFORE: u8 = 1;
const DRIVE: u8 = 2;
const REDRIVEN_AT: u8 = 4;
const LOSSES: u8 = 8;
const DEATH: u8 = 16;

/// What a store keeps of a record outside its body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Head {
    /// How many messages.
    pub count: u32,
    /// See [`Record::accepted_at`].
    pub accepted_at: UnixMs,
    /// See [`Record::not_before`].
    pub not_before: UnixMs,
    /// See [`Record::fence`].
    pub fence: u64,
    /// See [`Record::holder`].
    pub holder: Option<Holder>,
}

/// Writes a record's body.
pub fn encode(record: &Record) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(64 + 2 * record.sent.len());
    bytes.extend([VERSION, record.losses]);
    put_varint(&mut bytes, record.begun.map_or(0, |index| u64::from(index) + 1));
    put_varint(&mut bytes, record.rendered.fence);
    put_varint(&mut bytes, record.rendered.at.0);
    put_runs(&mut bytes, &record.states.0);
    put_runs(&mut bytes, &record.tries);
    put_sent(&mut bytes, record);
    let (mut previous, mut due, mut texts) = (0, record.accepted_at, HashMap::new());
    for (&index, exception) in &record.exceptions {
        put_varint(&mut bytes, u64::from(index - previous));
        put_exception(&mut bytes, exception, &mut due, &mut texts);
        previous = index;
    }
    bytes
}

/// Reads back what [`encode`] wrote; without a body nothing was recorded yet.
pub fn decode(head: Head, body: Option<&[u8]>) -> Result<Record, Damaged> {
    let Head { count, accepted_at, not_before, fence, holder } = head;
    let mut record = Record { fence, holder, ..Record::new(count, accepted_at, not_before) };
    match body {
        Some(body) => decode_body(&mut record, body).map(|()| record).ok_or(Damaged("batch record")),
        None => Ok(record),
    }
}

fn decode_body(record: &mut Record, body: &[u8]) -> Option<()> {
    let count = record.len();
    let [VERSION, losses, ..] = *body else { return None };
    record.losses = losses;
    let mut at = 2;
    let begun = take_varint(body, &mut at)?;
    record.begun = begun.checked_sub(1).map(u32::try_from).transpose().ok()?;
    let (fence, rendered_at) = (take_varint(body, &mut at)?, UnixMs(take_varint(body, &mut at)?));
    record.rendered = Rendered { fence, at: rendered_at };
    record.states = StateVector(take_runs(body, &mut at, count)?);
    if record.states.0.iter().any(|&state| MessageState::from_byte(state).is_none()) {
        return None;
    }
    record.tries = take_runs(body, &mut at, count)?;
    record.sent = take_sent(body, &mut at, &record.states.0)?;
    let (mut index, mut due, mut texts) = (0u32, record.accepted_at, Vec::new());
    while at < body.len() {
        index = index.checked_add(u32::try_from(take_varint(body, &mut at)?).ok()?)?;
        let exception = take_exception(body, &mut at, &mut due, &mut texts)?;
        if index as usize >= count || record.exceptions.insert(index, exception).is_some() {
            return None;
        }
    }
    Some(())
}

fn put_runs(bytes: &mut Vec<u8>, values: &[u8]) {
    for run in values.chunk_by(|left, right| left == right) {
        put_varint(bytes, run.len() as u64);
        bytes.push(run[0]);
    }
}

fn take_runs(bytes: &[u8], at: &mut usize, count: usize) -> Option<Vec<u8>> {
    let mut values = Vec::with_capacity(count);
    while values.len() < count {
        let run = usize::try_from(take_varint(bytes, at)?).ok()?;
        let value = *bytes.get(*at)?;
        *at += 1;
        if run == 0 || run > count - values.len() {
            return None;
        }
        values.resize(values.len() + run, value);
    }
    Some(values)
}

fn put_sent(bytes: &mut Vec<u8>, record: &Record) {
    let is_sent = |(state, _): &(&u8, &Sent)| **state >= MessageState::Sent as u8;
    let mut sent: Vec<Sent> = Vec::with_capacity(record.sent.len());
    sent.extend(record.states.0.iter().zip(&record.sent).filter(is_sent).map(|(_, sent)| sent));
    for run in sent.chunk_by(|left, right| left.status == right.status) {
        put_varint(bytes, run.len() as u64);
        put_varint(bytes, u64::from(run[0].status));
    }
    let mut last_ms = 0u64;
    for sent in sent {
        put_varint(bytes, zigzag(sent.after_ms.wrapping_sub(last_ms).cast_signed()));
        last_ms = sent.after_ms;
    }
}

fn take_sent(bytes: &[u8], at: &mut usize, states: &[u8]) -> Option<Vec<Sent>> {
    let is_sent = |state: &u8| *state >= MessageState::Sent as u8;
    let count = states.iter().filter(|state| is_sent(state)).count();
    if count == 0 {
        return Some(Vec::new());
    }
    let mut statuses = Vec::with_capacity(count);
    while statuses.len() < count {
        let run = usize::try_from(take_varint(bytes, at)?).ok()?;
        let status = u16::try_from(take_varint(bytes, at)?).ok()?;
        if run == 0 || run > count - statuses.len() {
            return None;
        }
        statuses.resize(statuses.len() + run, status);
    }
    let mut sent = vec![Sent::default(); states.len()];
    let mut after_ms = 0u64;
    let places = states.iter().zip(&mut sent).filter(|(state, _)| is_sent(state));
    for ((_, place), status) in places.zip(statuses) {
        after_ms = after_ms.wrapping_add(unzigzag(take_varint(bytes, at)?).cast_unsigned());
        *place = Sent { status, after_ms };
    }
    Some(sent)
}

/// Small numbers of either sign as small numbers.
fn zigzag(value: i64) -> u64 {
    ((value << 1) ^ (value >> 63)).cast_unsigned()
}

fn unzigzag(value: u64) -> i64 {
    (value >> 1).cast_signed() ^ -(value & 1).cast_signed()
}

/// `due` is the last due time that was written: messages of a round are due together. `texts` numbers those that were.
fn put_exception<'a>(
    bytes: &mut Vec<u8>,
    exception: &'a Exception,
    due: &mut UnixMs,
    texts: &mut HashMap<&'a str, u64>,
) {
    let Exception { not_before, drive, redriven_at, death, losses, losses_alone } = exception;
    let has = |flag: u8, is_there: bool| if is_there { flag } else { 0 };
    let has_losses = (*losses, *losses_alone) != (0, 0);
    bytes.push(
        has(NOT_BEFORE, not_before.0 > 0)
            | has(DRIVE, *drive > 0)
            | has(REDRIVEN_AT, redriven_at.is_some())
            | has(LOSSES, has_losses)
            | has(DEATH, death.is_some()),
    );
    if not_before.0 > 0 {
        put_varint(bytes, zigzag(not_before.0.wrapping_sub(due.0).cast_signed()));
        *due = *not_before;
    }
    if *drive > 0 {
        put_varint(bytes, u64::from(*drive));
    }
    if let Some(at) = redriven_at {
        put_varint(bytes, at.0);
    }
    if has_losses {
        bytes.extend([*losses, *losses_alone]);
    }
    if let Some(Death { attempt, cause, detail }) = death {
        put_attempt(bytes, attempt);
        bytes.push(*cause as u8);
        put_detail(bytes, detail.as_deref(), texts);
    }
}

fn put_detail<'a>(bytes: &mut Vec<u8>, detail: Option<&'a str>, texts: &mut HashMap<&'a str, u64>) {
    let Some(detail) = detail else { return put_varint(bytes, 0) };
    let next = texts.len() as u64 + 1;
    let number = *texts.entry(detail).or_insert(next);
    put_varint(bytes, number);
    if number == next {
        put_varint(bytes, detail.len() as u64);
        bytes.extend_from_slice(detail.as_bytes());
    }
}

/// The text with this number, from 1; the next one is new.
fn take_text<'a>(bytes: &'a [u8], at: &mut usize, number: u64, texts: &mut Vec<&'a str>) -> Option<&'a str> {
    let index = usize::try_from(number).ok()?.checked_sub(1)?;
    if index == texts.len() {
        let len = usize::try_from(take_varint(bytes, at)?).ok()?;
        let end = at.checked_add(len)?;
        texts.push(str::from_utf8(bytes.get(*at..end)?).ok()?);
        *at = end;
    }
    texts.get(index).copied()
}

fn take_exception<'a>(
    bytes: &'a [u8],
    at: &mut usize,
    due: &mut UnixMs,
    texts: &mut Vec<&'a str>,
) -> Option<Exception> {
    let flags = take_byte(bytes, at)?;
    let mut exception = Exception::default();
    if flags & NOT_BEFORE != 0 {
        *due = UnixMs(due.0.wrapping_add(unzigzag(take_varint(bytes, at)?).cast_unsigned()));
        exception.not_before = *due;
    }
    if flags & DRIVE != 0 {
        exception.drive = u32::try_from(take_varint(bytes, at)?).ok()?;
    }
    if flags & REDRIVEN_AT != 0 {
        exception.redriven_at = Some(UnixMs(take_varint(bytes, at)?));
    }
    if flags & LOSSES != 0 {
        (exception.losses, exception.losses_alone) = (take_byte(bytes, at)?, take_byte(bytes, at)?);
    }
    if flags & DEATH != 0 {
        let attempt = take_attempt(bytes, at)?;
        let cause = DeathCause::from_byte(take_byte(bytes, at)?)?;
        let detail = match take_varint(bytes, at)? {
            0 => None,
            number => Some(take_text(bytes, at, number, texts)?.into()),
        };
        exception.death = Some(Death { attempt, cause, detail });
    }
    (flags < DEATH * 2).then_some(exception)
}

fn put_attempt(bytes: &mut Vec<u8>, attempt: &Attempt) {
    put_varint(bytes, attempt.at.0);
    put_varint(bytes, u64::from(attempt.status));
    bytes.push(attempt.reason as u8);
}

fn take_attempt(bytes: &[u8], at: &mut usize) -> Option<Attempt> {
    let ended = UnixMs(take_varint(bytes, at)?);
    let status = u16::try_from(take_varint(bytes, at)?).ok()?;
    Some(Attempt { at: ended, status, reason: Reason::from_byte(take_byte(bytes, at)?)? })
}

fn take_byte(bytes: &[u8], at: &mut usize) -> Option<u8> {
    let byte = *bytes.get(*at)?;
    *at += 1;
    Some(byte)
}

/// Writes one recorded group's failed attempts, a chunk of a batch's history (B3): `version`, then runs of failures
/// that ended alike: `varint(drive) varint(attempt number) varint(status) reason varint(failures)` and per failure
/// `varint(index) zigzag varint(at - previous at)`; "previous" starts at 0. Chunks are never rewritten.
pub fn encode_history(failures: &[Failure]) -> Vec<u8> {
    let like = |failure: &Failure| {
        (failure.drive, failure.attempt_number, failure.attempt.status, failure.attempt.reason as u8)
    };
    let mut sorted: Vec<&Failure> = failures.iter().collect();
    sorted.sort_by_key(|failure| (like(failure), failure.index));
    let mut bytes = vec![VERSION];
    let mut last_at = 0u64;
    for run in sorted.chunk_by(|left, right| like(left) == like(right)) {
        let (drive, number, status, reason) = like(run[0]);
        put_varint(&mut bytes, u64::from(drive));
        put_varint(&mut bytes, u64::from(number));
        put_varint(&mut bytes, u64::from(status));
        bytes.push(reason);
        put_varint(&mut bytes, run.len() as u64);
        for failure in run {
            put_varint(&mut bytes, u64::from(failure.index));
            put_varint(&mut bytes, zigzag(failure.attempt.at.0.wrapping_sub(last_at).cast_signed()));
            last_at = failure.attempt.at.0;
        }
    }
    bytes
}

/// Reads back what [`encode_history`] wrote, in no certain order.
pub fn decode_history(bytes: &[u8]) -> Result<Vec<Failure>, Damaged> {
    let read = || {
        let mut at = (*bytes.first()? == VERSION).then_some(1)?;
        let mut failures = Vec::new();
        let mut last_at = 0u64;
        while at < bytes.len() {
            let drive = u32::try_from(take_varint(bytes, &mut at)?).ok()?;
            let attempt_number = u32::try_from(take_varint(bytes, &mut at)?).ok()?;
            let status = u16::try_from(take_varint(bytes, &mut at)?).ok()?;
            let reason = Reason::from_byte(take_byte(bytes, &mut at)?)?;
            for _ in 0..take_varint(bytes, &mut at)? {
                let index = u32::try_from(take_varint(bytes, &mut at)?).ok()?;
                last_at = last_at.wrapping_add(unzigzag(take_varint(bytes, &mut at)?).cast_unsigned());
                let attempt = Attempt { at: UnixMs(last_at), status, reason };
                failures.push(Failure { index, drive, attempt_number, attempt });
            }
        }
        Some(failures)
    };
    read().ok_or(Damaged("attempt history"))
}

/// The failed attempts of the message at `index`, the oldest first, from all chunks of its batch's history.
pub fn failures_of<'a>(
    chunks: impl IntoIterator<Item = &'a [u8]>,
    index: u32,
) -> Result<Vec<Attempt>, Damaged> {
    // By drive and number: a chunk that was written twice says the same twice.
    let mut failures: BTreeMap<(u32, u32), Attempt> = BTreeMap::new();
    for chunk in chunks {
        let own = decode_history(chunk)?.into_iter().filter(|failure| failure.index == index);
        failures.extend(own.map(|failure| ((failure.drive, failure.attempt_number), failure.attempt)));
    }
    Ok(failures.into_values().collect())
}

/// Writes a batch's row numbers as far as its first row and its count don't say them already.
pub fn encode_rows(rows: &RowNumbers) -> Option<Vec<u8>> {
    match rows {
        RowNumbers::Whole { .. } => None,
        RowNumbers::Gaps(rows) => Some(encode_row_numbers(rows)),
    }
}

/// Reads back what [`encode_rows`] wrote.
pub fn decode_rows(first: u64, count: u32, gaps: Option<&[u8]>) -> Result<RowNumbers, Damaged> {
    let Some(gaps) = gaps else { return Ok(RowNumbers::Whole { first, count }) };
    let rows = decode_row_numbers(gaps)?;
    let fits = rows.len() == count as usize && rows.first() == Some(&first);
    if fits { Ok(RowNumbers::Gaps(rows)) } else { Err(Damaged("list of row numbers")) }
}
