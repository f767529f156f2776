//! Which receipts were taken, so that what comes again is taken once.
//!
//! Events are digests: in an index each has a place of its own, so taking two thousand would write more than a thousand
//! pages. They are kept as they came instead, a row per arrival, and in memory ([`FreshEvents`]). Once there are many they
//! are merged in order into blocks, a bounded part with each arrival, and a page that is written gets all that belong there.
//!
//! The day on which an event was taken is kept, not the moment: retention would otherwise write each block again and again.
//! What is damaged here is an event that is forgotten at worst: its receipt is taken again, and changes nothing (I7).

use std::{
    collections::BTreeSet,
    ops::Bound::{Excluded, Included, Unbounded},
};

use postrider_actors::model::{receipt::EventId, time::UnixMs};
use rusqlite::{Connection, OptionalExtension as _, params};

use super::fresh::{EventKey, FreshEvents, Merge};
use crate::tx::{Tx, TxError, int};

/// An event in a block: its key, and the day in big endian.
type Entry = [u8; ENTRY_BYTES];
const KEY_BYTES: usize = 16;
const ENTRY_BYTES: usize = KEY_BYTES + 2;

/// How many bytes of a key all events of one id share, as of an [`EventId`].
const ID_BYTES: usize = 8;

/// Entries of a block. SQLite keeps a row of up to 2,030 bytes within its page.
const BLOCK_EVENTS_MAX: usize = 110;

/// The same of one that was just divided.
const BLOCK_EVENTS_NEW: usize = 80;

/// Of this many events a merge goes on at least, however few arrive.
const MERGE_STEP_MIN: usize = 16;

const DAY_MS: u64 = 24 * 60 * 60 * 1_000;

/// What was known of an event before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Memory {
    New,
    /// Another event brought the same id.
    NewOfKnownId,
    Known,
}

/// The events within a transaction.
pub(super) struct Events<'a> {
    connection: &'a Connection,
    fresh: &'a mut FreshEvents,
}

impl<'a> Events<'a> {
    /// Reads what is not in memory yet: after a restart, or because a command wrote it.
    pub(super) fn open(tx: &'a mut Tx<'_>) -> Result<Self, TxError> {
        Self::read(tx.connection, &mut tx.caches.events)
    }

    fn read(connection: &'a Connection, fresh: &'a mut FreshEvents) -> Result<Self, TxError> {
        let mut select = connection
            .prepare_cached("SELECT seq, day, body FROM receipt_events_fresh WHERE seq > ?1 ORDER BY seq")?;
        let mut rows = select.query([fresh.read_until])?;
        while let Some(row) = rows.next()? {
            let day = row.get(1)?;
            let keys = row.get_ref(2)?.as_blob().map_err(rusqlite::Error::from)?.as_chunks::<KEY_BYTES>().0;
            fresh.days.extend(keys.iter().map(|key| (*key, day)));
            fresh.read_until = row.get(0)?;
        }
        drop(rows);
        Ok(Self { connection, fresh })
    }

    /// Whether an event was taken.
    pub(super) fn is_known(&self, source: i64, event: EventId) -> Result<bool, TxError> {
        Ok(self.look_up(&key(source, event))? == Memory::Known)
    }

    /// Makes events known; what was known of each. Of two that are the same the first is new.
    pub(super) fn remember(
        &mut self,
        source: i64,
        at: UnixMs,
        events: &[EventId],
    ) -> Result<Vec<Memory>, TxError> {
        let mut keys: Vec<_> = events.iter().map(|&event| key(source, event)).enumerate().collect();
        // Neighbours in a block one after the other.
        keys.sort_by_key(|&(_, key)| key);
        let mut memories = vec![Memory::Known; events.len()];
        let mut new = Vec::new();
        for (index, key) in keys {
            memories[index] = self.look_up(&key)?;
            if memories[index] != Memory::Known {
                self.fresh.days.insert(key, day(at));
                new.push(key);
            }
        }
        if !new.is_empty() {
            self.fresh.read_until = self
                .connection
                .prepare_cached("INSERT INTO receipt_events_fresh (day, body) VALUES (?1, ?2)")?
                .insert(params![day(at), new.as_flattened()])?;
            // Twice as many as came: a merge is done before half as many are fresh again.
            self.merge(2 * new.len() + MERGE_STEP_MIN)?;
        }
        Ok(memories)
    }

    fn look_up(&self, key: &EventKey) -> Result<Memory, TxError> {
        if self.fresh.days.contains_key(key) {
            return Ok(Memory::Known);
        }
        let (mut least, mut greatest) = (*key, *key);
        least[ID_BYTES..].fill(0);
        greatest[ID_BYTES..].fill(u8::MAX);
        let mut is_id_known = self.fresh.days.range(least..=greatest).next().is_some();
        let mut select = self.connection.prepare_cached(SELECT_BLOCK)?;
        let mut rows = select.query([&key[..]])?;
        if let Some(row) = rows.next()? {
            let entries = entries(row.get_ref(1)?.as_blob().map_err(rusqlite::Error::from)?);
            match entries.binary_search_by(|entry| key_of(entry).cmp(key)) {
                Ok(_) => return Ok(Memory::Known),
                Err(place) => {
                    let neighbours = &entries[place.saturating_sub(1)..entries.len().min(place + 1)];
                    is_id_known |= neighbours.iter().any(|entry| entry[..ID_BYTES] == key[..ID_BYTES]);
                }
            }
        }
        Ok(if is_id_known { Memory::NewOfKnownId } else { Memory::New })
    }

    /// Goes on with the merge by up to `left` events, or begins one if it is time.
    fn merge(&mut self, mut left: usize) -> Result<(), TxError> {
        let FreshEvents { days, read_until, merge, max } = &mut *self.fresh;
        if merge.is_none() && days.len() < *max {
            return Ok(());
        }
        let at = merge.get_or_insert(Merge { rows_until: *read_until, next: EventKey::default() });
        let mut select_end = self
            .connection
            .prepare_cached("SELECT start FROM receipt_events WHERE start > ?1 ORDER BY start LIMIT 1")?;
        while left > 0 {
            let Some((&first, _)) = days.range(at.next..).next() else {
                self.connection
                    .prepare_cached("DELETE FROM receipt_events_fresh WHERE seq <= ?1")?
                    .execute([at.rows_until])?;
                *merge = None;
                return Ok(());
            };
            let block = Block::of(self.connection, &first)?;
            let end: Option<EventKey> = select_end.query_row([&first[..]], |row| row.get(0)).optional()?;
            let range = (Included(first), end.map_or(Unbounded, Excluded));
            let more: Vec<_> = days.range(range).take(left).map(|(key, day)| entry(key, *day)).collect();
            for entry in &more {
                days.remove(key_of(entry));
            }
            left -= more.len();
            at.next = *more.last().map_or(&first, key_of);
            let mut entries = block.entries.clone();
            entries.extend(more);
            // Two sorted runs, which this makes use of. What was merged before a restart is there twice.
            entries.sort_by_key(|entry| *key_of(entry));
            entries.dedup_by_key(|entry| *key_of(entry));
            block.replace(self.connection, &entries)?;
        }
        Ok(())
    }

    /// Forgets events, as if they had never been taken.
    pub(super) fn forget(&mut self, events: impl Iterator<Item = (i64, EventId)>) -> Result<(), TxError> {
        let keys: BTreeSet<_> = events.map(|(source, event)| key(source, event)).collect();
        for key in &keys {
            self.fresh.days.remove(key);
            let block = Block::of(self.connection, key)?;
            let mut entries = block.entries.clone();
            entries.retain(|entry| key_of(entry) != key);
            if entries.len() < block.entries.len() {
                block.replace(self.connection, &entries)?;
            }
        }
        // It is rare, so that looking through all of them is good enough.
        let mut select = self.connection.prepare_cached("SELECT seq, body FROM receipt_events_fresh")?;
        let mut rows = select.query([])?;
        let mut changed = Vec::new();
        while let Some(row) = rows.next()? {
            let body = row.get_ref(1)?.as_blob().map_err(rusqlite::Error::from)?.as_chunks::<KEY_BYTES>().0;
            if body.iter().any(|key| keys.contains(key)) {
                let left: Vec<_> = body.iter().copied().filter(|key| !keys.contains(key)).collect();
                changed.push((row.get::<_, i64>(0)?, left));
            }
        }
        drop(rows);
        let mut update =
            self.connection.prepare_cached("UPDATE receipt_events_fresh SET body = ?2 WHERE seq = ?1")?;
        for (seq, left) in changed {
            update.execute(params![seq, left.as_flattened()])?;
        }
        Ok(())
    }

    /// Forgets which events were taken on the days before `before`: those of a row or a block together, so roughly `limit`;
    /// how many.
    pub(super) fn forget_before(&mut self, before: UnixMs, limit: usize) -> Result<usize, TxError> {
        let last_day = int(before.0 / DAY_MS);
        let mut forgotten = 0;
        let mut select_fresh = self
            .connection
            .prepare_cached("SELECT seq, body, day FROM receipt_events_fresh ORDER BY seq LIMIT 1")?;
        let mut delete = self.connection.prepare_cached("DELETE FROM receipt_events_fresh WHERE seq = ?1")?;
        while forgotten < limit {
            let mut rows = select_fresh.query([])?;
            let Some(row) = rows.next()?.filter(|row| row.get(2).is_ok_and(|day: i64| day <= last_day))
            else {
                break;
            };
            let seq: i64 = row.get(0)?;
            let keys = row.get_ref(1)?.as_blob().map_err(rusqlite::Error::from)?.as_chunks::<KEY_BYTES>().0;
            for key in keys {
                self.fresh.days.remove(key);
            }
            // An empty row counts, so that a caller who repeats this until nothing is left does stop.
            forgotten += keys.len().max(1);
            drop(rows);
            delete.execute([seq])?;
        }
        let blocks = limit.saturating_sub(forgotten).div_ceil(BLOCK_EVENTS_MAX);
        let old: Vec<EventKey> = self
            .connection
            .prepare_cached(
                "SELECT start FROM receipt_events INDEXED BY receipt_events_by_age WHERE oldest <= ?1
                 ORDER BY oldest LIMIT ?2",
            )?
            .query_map([last_day, int(blocks as u64)], |row| row.get(0))?
            .collect::<Result<_, _>>()?;
        for start in old {
            let block = Block::of(self.connection, &start)?;
            let mut entries = block.entries.clone();
            entries.retain(|entry| i64::from(day_of(entry)) > last_day);
            forgotten += block.entries.len() - entries.len();
            block.replace(self.connection, &entries)?;
        }
        Ok(forgotten)
    }
}

/// The block that a key belongs into: with the greatest start that is not greater.
const SELECT_BLOCK: &str =
    "SELECT start, body FROM receipt_events WHERE start <= ?1 ORDER BY start DESC LIMIT 1";

/// A row of `receipt_events`: of all keys from its start on, up to the start of the next one.
struct Block {
    start: EventKey,
    entries: Vec<Entry>,
}

impl Block {
    /// The block that `key` belongs into. The first one, of which the start is zero, need not be there.
    fn of(connection: &Connection, key: &EventKey) -> Result<Self, TxError> {
        let mut select = connection.prepare_cached(SELECT_BLOCK)?;
        let mut rows = select.query([&key[..]])?;
        Ok(match rows.next()? {
            Some(row) => {
                let entries = entries(row.get_ref(1)?.as_blob().map_err(rusqlite::Error::from)?).to_vec();
                Self { start: row.get(0)?, entries }
            }
            None => Self { start: EventKey::default(), entries: Vec::new() },
        })
    }

    /// Puts `new` in place of its entries: splits into several blocks if need be, and leaves no empty one.
    fn replace(&self, connection: &Connection, new: &[Entry]) -> Result<(), TxError> {
        let (mut start, mut rest) = (self.start, new);
        if rest.is_empty() {
            connection
                .prepare_cached("DELETE FROM receipt_events WHERE start = ?1")?
                .execute([&start[..]])?;
        } else if rest.len() <= BLOCK_EVENTS_MAX && oldest(rest) == oldest(&self.entries) {
            // The index by age stays as it is.
            connection
                .prepare_cached("UPDATE receipt_events SET body = ?2 WHERE start = ?1")?
                .execute(params![&start[..], rest.as_flattened()])?;
            return Ok(());
        }
        let mut put = connection.prepare_cached(
            "INSERT INTO receipt_events (start, oldest, body) VALUES (?1, ?2, ?3)
             ON CONFLICT (start) DO UPDATE SET oldest = excluded.oldest, body = excluded.body",
        )?;
        while !rest.is_empty() {
            let (part, more) = rest.split_at(cut(rest));
            put.execute(params![&start[..], oldest(part), part.as_flattened()])?;
            if let (Some(last), Some(next)) = (part.last(), more.first()) {
                start = *key_of(next);
                if last[..ID_BYTES] != next[..ID_BYTES] {
                    // Whatever comes of this id belongs into that block too.
                    start[ID_BYTES..].fill(0);
                }
            }
            rest = more;
        }
        Ok(())
    }
}

/// How many of `entries` go into one block: all, or a part that ends between two ids, unless one id has too many.
fn cut(entries: &[Entry]) -> usize {
    if entries.len() <= BLOCK_EVENTS_MAX {
        return entries.len();
    }
    let even = entries.len().div_ceil(entries.len().div_ceil(BLOCK_EVENTS_NEW));
    let is_between_ids = |&place: &usize| entries[place - 1][..ID_BYTES] != entries[place][..ID_BYTES];
    let before = (1..=even).rev().find(is_between_ids);
    before.or_else(|| (even..=BLOCK_EVENTS_MAX).find(is_between_ids)).unwrap_or(even)
}

/// Two sources may use the same event id, so the source is part of the digest. Digests stay evenly distributed, and those of one id stay
/// next to each other.
fn key(source: i64, event: EventId) -> EventKey {
    let mut key = event.0;
    let mix = source.cast_unsigned().wrapping_mul(0x9e37_79b9_7f4a_7c15).to_be_bytes();
    for (byte, mix) in key.iter_mut().zip(mix) {
        *byte ^= mix;
    }
    key
}

/// The day that was not over at that time: nothing of it is forgotten before it is.
fn day(at: UnixMs) -> u16 {
    u16::try_from(at.0 / DAY_MS + 1).unwrap_or(u16::MAX)
}

fn entry(key: &EventKey, day: u16) -> Entry {
    let mut entry = [0; ENTRY_BYTES];
    entry[..KEY_BYTES].copy_from_slice(key);
    entry[KEY_BYTES..].copy_from_slice(&day.to_be_bytes());
    entry
}

fn entries(body: &[u8]) -> &[Entry] {
    body.as_chunks().0
}

fn key_of(entry: &Entry) -> &EventKey {
    entry.first_chunk().expect("a key is shorter than an entry")
}

fn day_of(entry: &Entry) -> u16 {
    u16::from_be_bytes([entry[KEY_BYTES], entry[KEY_BYTES + 1]])
}

fn oldest(entries: &[Entry]) -> Option<u16> {
    entries.iter().map(day_of).min()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use rand::{RngExt as _, SeedableRng as _, rngs::SmallRng};

    use super::*;

    fn database() -> Connection {
        let connection = Connection::open_in_memory().unwrap();
        connection.execute_batch(include_str!("../schema.sql")).unwrap();
        connection
    }

    fn count(connection: &Connection, what: &str) -> usize {
        let found: i64 = connection.query_row(&format!("SELECT {what}"), [], |row| row.get(0)).unwrap();
        usize::try_from(found).unwrap()
    }

    fn small() -> FreshEvents {
        FreshEvents { max: 300, ..FreshEvents::default() }
    }

    /// Ids in the first half, as `EventId::saying` makes them.
    fn event(id: u64, says: u64) -> EventId {
        let digest = |number: u64| number.wrapping_mul(0xbf58_476d_1ce4_e5b9).to_be_bytes();
        EventId([digest(id), digest(says)].as_flattened().try_into().unwrap())
    }

    #[test]
    fn f51_events_are_remembered_across_merges_restarts_and_retention() {
        for seed in 0..20 {
            let rng = &mut SmallRng::seed_from_u64(seed);
            let connection = database();
            let mut fresh = small();
            // By id and what it says: the day on which it was taken.
            let mut model: BTreeMap<(u64, u64), u64> = BTreeMap::new();
            let mut today = 20;
            // One id that everything has, or very many ids.
            let ids = if rng.random_bool(0.3) { 2 } else { 1 << rng.random_range(8..14) };
            for _ in 0..150 {
                let mut events = Events::read(&connection, &mut fresh).unwrap();
                match rng.random_range(0..20) {
                    0 => fresh = small(),
                    1 => today += 1,
                    2 => {
                        let some: Vec<_> = model.keys().copied().filter(|_| rng.random_bool(0.01)).collect();
                        let named = some.iter().map(|&(id, says)| (3, event(id, says)));
                        events.forget(named).unwrap();
                        model.retain(|event, _| !some.contains(event));
                    }
                    3 => {
                        let before = UnixMs(today * DAY_MS - DAY_MS);
                        let mut forgotten = 0;
                        while let some @ 1.. = events.forget_before(before, 100).unwrap() {
                            forgotten += some;
                        }
                        let known = model.len();
                        model.retain(|_, day| *day > today - 2);
                        assert!(forgotten >= known - model.len(), "{seed}");
                    }
                    _ => {
                        let some: Vec<_> = (0..rng.random_range(1..200))
                            .map(|_| (rng.random_range(0..ids), rng.random_range(0..1_000 / ids.min(500))))
                            .collect();
                        let named: Vec<_> = some.iter().map(|&(id, says)| event(id, says)).collect();
                        let memories = events.remember(3, UnixMs(today * DAY_MS + 7), &named).unwrap();
                        let before = model.clone();
                        for (&(id, says), memory) in some.iter().zip(memories) {
                            let is_known = model.contains_key(&(id, says));
                            assert_eq!(memory == Memory::Known, is_known, "{seed}: {id} {says}");
                            // Of those that came together any may be the first; an id that fills blocks may be missed.
                            let is_id_known = before.range((id, 0)..=(id, u64::MAX)).next().is_some();
                            assert!(memory != Memory::New || !is_id_known || ids == 2, "{seed}: {id} {says}");
                            model.entry((id, says)).or_insert(today);
                        }
                    }
                }
            }
            let events = Events::read(&connection, &mut fresh).unwrap();
            for (id, says) in (0..ids.min(400)).flat_map(|id| (0..500).map(move |says| (id, says))) {
                let is_known = events.is_known(3, event(id, says)).unwrap();
                assert_eq!(is_known, model.contains_key(&(id, says)), "{seed}: {id} {says}");
                assert!(!events.is_known(4, event(id, says)).unwrap(), "of another source");
            }
            assert!(fresh.days.len() < 2_000, "{seed}: fresh ones are bounded: {}", fresh.days.len());
        }
    }

    #[test]
    fn a_merge_leaves_no_row_behind_and_one_page_for_many_events() {
        let connection = database();
        let mut fresh = FreshEvents { max: 20_000, ..FreshEvents::default() };
        for arrival in 0..30 {
            let events: Vec<_> = (0..2_000).map(|number| event(arrival * 2_000 + number, 0)).collect();
            let memories =
                Events::read(&connection, &mut fresh).unwrap().remember(1, UnixMs(DAY_MS), &events).unwrap();
            assert!(memories.iter().all(|memory| *memory == Memory::New));
            assert!(fresh.days.len() <= 32_000);
        }
        let in_blocks = count(&connection, &format!("sum(length(body)) / {ENTRY_BYTES} FROM receipt_events"));
        let in_rows =
            count(&connection, &format!("sum(length(body)) / {KEY_BYTES} FROM receipt_events_fresh"));
        assert!(in_blocks >= 40_000, "{in_blocks}");
        assert!(in_blocks + fresh.days.len() == 60_000 && in_rows >= fresh.days.len(), "{in_rows}");
        let blocks = count(&connection, "count(*) FROM receipt_events");
        assert!(in_blocks / blocks > BLOCK_EVENTS_MAX / 2, "{blocks}");
        let longest = count(&connection, "max(length(body)) FROM receipt_events");
        assert!(longest <= BLOCK_EVENTS_MAX * ENTRY_BYTES);
    }
}
