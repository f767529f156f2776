//! Dead letters: finding them and sending them again.

use std::{collections::BTreeMap, fmt};

use postrider_actors::{
    model::{
        batch::{NewBatch, PayloadWriter, Rows},
        ids::{BatchId, FileId},
        outcome::{Attempt, DeathCause, Reason},
        time::UnixMs,
    },
    ports::{Fetched, StoreError},
};

use super::{
    draft::{Draft, Known, Stop},
    item::{Damaged, Reading, SK, payload_damaged, text},
    schema,
    settle::fits,
    state::Shared,
};

/// Batches with dead messages that are looked at together; their payloads are in memory at once.
const BATCHES_MAX: i32 = 25;

/// How often a redrive is worked out anew when records have moved on.
const ROUNDS: usize = 10;

/// Which dead letters; all that is set must hold.
#[derive(Clone, Debug, Default)]
pub struct DeadWish {
    /// Of one file.
    pub file: Option<FileId>,
    /// Of one destination.
    pub destination: Option<String>,
    /// Whose last attempt failed for this reason.
    pub reason: Option<Reason>,
    /// That were given up for this cause.
    pub cause: Option<DeathCause>,
    /// That were given up before.
    pub before: Option<UnixMs>,
    /// That were given up then or later.
    pub since: Option<UnixMs>,
}

/// Where in the order of dead letters (file, destination, first row of the batch, row) a walk stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeadPlace {
    /// The batch's range key in the list.
    sk: String,
    /// The index of the last letter that was seen; `None`: all of the batch were.
    index: Option<u32>,
}

impl fmt::Display for DeadPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.index {
            Some(index) => write!(f, "{}|{index}", self.sk),
            None => write!(f, "{}|", self.sk),
        }
    }
}

impl std::str::FromStr for DeadPlace {
    type Err = StoreError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let parse = || {
            let (sk, index) = text.rsplit_once('|')?;
            let index = if index.is_empty() { None } else { Some(index.parse().ok()?) };
            Some(Self { sk: sk.to_owned(), index })
        };
        parse().ok_or_else(|| StoreError::Permanent(format!("{text:?} is no place among dead letters")))
    }
}

/// A message that was given up.
#[derive(Clone, PartialEq, Eq)]
pub struct DeadLetter {
    /// Where a walk that has seen it goes on.
    pub place: DeadPlace,
    /// The file its row came from.
    pub file: FileId,
    /// Where it was to go.
    pub destination: String,
    /// Its row.
    pub row: u64,
    /// The batch that holds it.
    pub batch: BatchId,
    /// Its index there.
    pub index: u32,
    /// Attempts that were made in its last drive.
    pub attempts: u32,
    /// The last of them.
    pub last: Attempt,
    /// Why there is no other.
    pub cause: DeathCause,
    /// What the destination itself said of it, where its words are kept.
    pub detail: Option<Box<str>>,
}

impl fmt::Debug for DeadLetter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DeadLetter({}_{} to {})", self.file, self.row, self.destination)
    }
}

impl DeadWish {
    fn takes(&self, last: &Attempt, cause: DeathCause) -> bool {
        self.reason.is_none_or(|reason| last.reason == reason)
            && self.cause.is_none_or(|wanted| cause == wanted)
            && self.before.is_none_or(|before| last.at < before)
            && self.since.is_none_or(|since| last.at >= since)
    }

    /// What the range keys of the list begin with.
    fn prefix(&self) -> String {
        match (&self.file, &self.destination) {
            (Some(file), Some(destination)) => format!("{file}#{destination}#"),
            (Some(file), None) => format!("{file}#"),
            (None, _) => String::new(),
        }
    }

    fn takes_destination(&self, sk: &str) -> bool {
        self.destination.as_ref().is_none_or(|wanted| sk.split('#').nth(1) == Some(wanted))
    }
}

impl Shared {
    /// One page of batches that hold dead messages: their ids, and where the walk goes on.
    async fn dead_batches(
        &self,
        wish: &DeadWish,
        place: Option<&DeadPlace>,
    ) -> Result<(Vec<(String, BatchId)>, Option<DeadPlace>), StoreError> {
        let prefix = wish.prefix();
        // After the whole batch, or from it on; never before what is wished for.
        let from = place.map_or_else(
            || prefix.clone(),
            |place| if place.index.is_some() { place.sk.clone() } else { format!("{}\u{1}", place.sk) },
        );
        let (from, to) = (from.max(prefix.clone()), format!("{prefix}~"));
        if from > to {
            return Ok((Vec::new(), None));
        }
        let call = self
            .calls
            .client
            .query()
            .table_name(&self.calls.tables.ledger)
            .key_condition_expression("Pk = :pk AND Sk BETWEEN :from AND :to")
            .expression_attribute_values(":pk", text(schema::DEAD_PK))
            .expression_attribute_values(":from", text(if from.is_empty() { "!".to_owned() } else { from }))
            .expression_attribute_values(":to", text(to))
            .consistent_read(true)
            .limit(BATCHES_MAX);
        let (items, next) = self.calls.query("listing dead letters", call).await?;
        let mut batches = Vec::new();
        let mut last = None;
        for item in &items {
            let sk = Reading(item).text(SK)?;
            last = Some(DeadPlace { sk: sk.to_owned(), index: None });
            if wish.takes_destination(sk) {
                let id = sk.rsplit_once('#').and_then(|(_, id)| id.parse().ok()).ok_or(Damaged(SK))?;
                batches.push((sk.to_owned(), id));
            }
        }
        Ok((batches, last.filter(|_| next.is_some())))
    }

    pub(super) async fn dead_letters(
        &self,
        wish: &DeadWish,
        place: Option<&DeadPlace>,
        limit: usize,
    ) -> Result<Vec<DeadLetter>, StoreError> {
        let mut place = place.cloned();
        let mut letters = Vec::new();
        while letters.len() < limit {
            let (batches, next) = self.dead_batches(wish, place.as_ref()).await?;
            let mut known = Known::new();
            self.know(&mut known, batches.iter().map(|(_, id)| *id), false).await?;
            for (sk, id) in batches {
                let seen = place.as_ref().filter(|place| place.sk == sk).and_then(|place| place.index);
                let news = letters_of(&known, wish, id);
                letters.extend(news.into_iter().filter(|letter| seen.is_none_or(|seen| letter.index > seen)));
            }
            match next {
                Some(next) => place = Some(next),
                None => break,
            }
        }
        letters.truncate(limit);
        Ok(letters)
    }

    pub(super) async fn redrive(
        &self,
        wish: &DeadWish,
        limit: usize,
        now: UnixMs,
    ) -> Result<usize, StoreError> {
        let mut redriven = 0;
        let mut place = None;
        while redriven < limit {
            let (batches, next) = self.dead_batches(wish, place.as_ref()).await?;
            let ids: Vec<_> = batches.into_iter().map(|(_, id)| id).collect();
            if !ids.is_empty() {
                redriven += self.redrive_some(wish, &ids, limit - redriven, now).await?;
            }
            match next {
                Some(next) => place = Some(next),
                None => break,
            }
        }
        Ok(redriven)
    }

    async fn redrive_some(
        &self,
        wish: &DeadWish,
        ids: &[BatchId],
        limit: usize,
        now: UnixMs,
    ) -> Result<usize, StoreError> {
        let mut bodies = BTreeMap::new();
        for (id, fetched) in self.get(ids).await? {
            match fetched {
                Fetched::Batch(batch) => {
                    let rows = Rows::decode(batch.payload.clone()).map_err(payload_damaged)?;
                    bodies.insert(id, (batch, rows));
                }
                Fetched::Missing => {
                    tracing::error!(batch = %id, "dead letters can't be redriven: their rows are gone");
                }
                Fetched::Unprocessed => {
                    return Err(StoreError::Retryable(format!("batch {id} was not read")));
                }
            }
        }
        // Messages of one root travel together, so that redriving many needs few batches. What is left over
        // of a round is redriven by the next: the lists get shorter.
        let mut done = 0;
        for round in 0..ROUNDS {
            let mut lane = self.lane.lock().await;
            let mut known = Known::new();
            self.know(&mut known, bodies.keys().copied(), false).await?;
            let mut groups: BTreeMap<BatchId, Vec<DeadLetter>> = BTreeMap::new();
            let mut taken = 0;
            for id in bodies.keys() {
                for letter in letters_of(&known, wish, *id) {
                    if done + taken < limit
                        && let Some(Some(record)) = known.get(id)
                    {
                        taken += 1;
                        groups.entry(record.root).or_default().push(letter);
                    }
                }
            }
            if groups.is_empty() {
                return Ok(done);
            }
            let mut draft = Draft::default();
            let mut messages = 0;
            let mut files = Vec::new();
            for (root, mut letters) in groups {
                letters.sort_by_key(|letter| letter.row);
                let mut next = draft.clone();
                self.redrive_group(&mut next, &mut known, root, &letters, &bodies, now).await?;
                if !fits(&next) {
                    if draft.is_empty() {
                        return Err(StoreError::Permanent(format!(
                            "the dead letters of batch {root} do not fit into a transaction"
                        )));
                    }
                    break;
                }
                draft = next;
                messages += letters.len();
                files.push(letters[0].file);
            }
            if lane.write_redrive(self, &draft).await? {
                done += messages;
                drop(lane);
                self.open_again(&files).await?;
            } else {
                drop(lane);
                super::retry::back_off(round as u32).await;
            }
        }
        Ok(done)
    }

    async fn redrive_group(
        &self,
        draft: &mut Draft,
        known: &mut Known,
        root: BatchId,
        letters: &[DeadLetter],
        bodies: &BTreeMap<BatchId, (NewBatch, Rows)>,
        now: UnixMs,
    ) -> Result<(), StoreError> {
        let batch = redriven(known, root, letters, bodies, now)?;
        let dead: Vec<_> = letters.iter().map(|letter| (letter.batch, letter.index)).collect();
        loop {
            let mut next = draft.clone();
            match next.redrive(known, batch.clone(), &dead) {
                Ok(()) => {
                    *draft = next;
                    return Ok(());
                }
                Err(Stop::Need(id)) => self.know(known, [id], false).await?,
                Err(Stop::Refused(error)) => return Err(error),
            }
        }
    }

    /// Lists files as open whose report was written: their owner has to write it again.
    async fn open_again(&self, files: &[FileId]) -> Result<(), StoreError> {
        for &id in files {
            if let Some(file) = self.read_file(id).await?
                && file.reported.is_some()
            {
                self.calls.put_all("opening a file again", vec![file.open_item()]).await?;
            }
        }
        Ok(())
    }
}

fn letters_of(known: &Known, wish: &DeadWish, id: BatchId) -> Vec<DeadLetter> {
    let Some(Some(record)) = known.get(&id) else { return Vec::new() };
    let taken = record.deaths.iter().filter(|(_, (last, cause))| wish.takes(last, *cause));
    taken
        .map(|(&index, &(last, cause))| DeadLetter {
            place: DeadPlace {
                sk: schema::dead_sk(record.file, &record.destination, record.first_row, id),
                index: Some(index),
            },
            file: record.file,
            destination: record.destination.to_string(),
            row: record.row(index as usize),
            batch: id,
            index,
            attempts: record.attempt + 1,
            last,
            cause,
            detail: record.details.get(&index).cloned(),
        })
        .collect()
}

/// The batch that carries dead letters on, which are in the order of their rows.
fn redriven(
    known: &Known,
    root: BatchId,
    letters: &[DeadLetter],
    bodies: &BTreeMap<BatchId, (NewBatch, Rows)>,
    now: UnixMs,
) -> Result<NewBatch, StoreError> {
    let mut payload = PayloadWriter::default();
    let mut history = Vec::with_capacity(letters.len());
    let mut drive = 0;
    for letter in letters {
        let (batch, rows) = bodies.get(&letter.batch).ok_or_else(|| {
            StoreError::Permanent(format!(
                "row {} can't be redriven: batch {} is gone",
                letter.row, letter.batch
            ))
        })?;
        let index = letter.index as usize;
        payload.push(letter.row, rows.bytes(index));
        let mut attempts = batch.history.get(index).cloned().unwrap_or_default();
        attempts.push(letter.last);
        history.push(attempts);
        let record = known.get(&letter.batch).and_then(Option::as_ref);
        drive = drive.max(record.map_or(0, |record| record.drive) + 1);
    }
    let header = bodies[&letters[0].batch].0.header.clone();
    let first_row = letters[0].row;
    Ok(NewBatch {
        id: BatchId::derive(header.file, &header.destination, first_row, drive, 0),
        root,
        first_row,
        count: payload.count(),
        drive,
        attempt: 0,
        // Its age counts from now, or it would die of it at once.
        accepted_at: now,
        not_before: now,
        payload: payload.finish(),
        history,
        header,
    })
}
