//! Dead letters: finding them and sending them again.

use std::{
    collections::{BTreeMap, HashMap, hash_map::Entry},
    fmt,
    sync::Arc,
};

use postrider_actors::{
    flow::back_off,
    model::{
        batch::Rendering,
        ids::{BatchId, FileId},
        ledger::Death,
        time::UnixMs,
    },
    ports::{
        Fetched, StoreError,
        console::{DeadFilter, DeadLetter, FileSelector, Position, Rerendered},
    },
};

use super::{
    draft::Draft,
    item::{BODY, Damaged, Reading, SK},
    keys,
    payload::NewPayload,
    record::{Records, StoredBatch},
    retry::BUDGET,
    settle::fits,
    state::Shared,
};

/// Batches with dead messages that are looked at together.
const BATCHES_MAX: i32 = 25;

/// How often a redrive is worked out anew when records have moved on.
const ROUNDS: usize = 10;

/// Where in the order of dead letters (file, destination, first row of the batch, row) a walk stands.
#[derive(Clone, Debug, PartialEq, Eq)]
struct DeadPlace {
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
        parse().ok_or_else(|| StoreError::Permanent(format!("{text:?} is not a place among dead letters")))
    }
}

/// What the range keys of the list begin with.
fn prefix(filter: &DeadFilter, file: Option<FileId>) -> String {
    match (file, &filter.destination) {
        (Some(file), Some(destination)) => format!("{file}#{destination}#"),
        (Some(file), None) => format!("{file}#"),
        (None, _) => String::new(),
    }
}

impl Shared {
    /// One page of batches that hold dead messages: their ids, and where the walk goes on.
    async fn dead_batches(
        &self,
        filter: &DeadFilter,
        file: Option<FileId>,
        place: Option<&DeadPlace>,
    ) -> Result<(Vec<(String, BatchId)>, Option<DeadPlace>), StoreError> {
        let prefix = prefix(filter, file);
        // After the whole batch, or from it on; never before what is asked for.
        let from = place.map_or_else(
            || prefix.clone(),
            |place| if place.index.is_some() { place.sk.clone() } else { format!("{}\u{1}", place.sk) },
        );
        let (from, to) = (from.max(prefix.clone()), format!("{prefix}~"));
        if from > to {
            return Ok((Vec::new(), None));
        }
        let from = if from.is_empty() { "!".to_owned() } else { from };
        let range = [(":from", from), (":to", to)];
        let call =
            self.calls.in_partition(keys::DEAD_PK, "Sk BETWEEN :from AND :to", range).limit(BATCHES_MAX);
        let (items, next) = self.calls.query("listing dead letters", call).await?;
        let mut batches = Vec::new();
        let mut last = None;
        for item in &items {
            let sk = Reading(item).text(SK)?;
            last = Some(DeadPlace { sk: sk.to_owned(), index: None });
            let destination = filter.destination.as_deref();
            if destination.is_none_or(|wanted| sk.split('#').nth(1) == Some(wanted)) {
                let id = sk.rsplit_once('#').and_then(|(_, id)| id.parse().ok()).ok_or(Damaged(SK))?;
                batches.push((sk.to_owned(), id));
            }
        }
        Ok((batches, last.filter(|_| next.is_some())))
    }

    /// The files that a filter names, in the order of the list; `None` for all.
    async fn files_of_filter(&self, filter: &DeadFilter) -> Result<Vec<Option<FileId>>, StoreError> {
        let mut files = match &filter.file {
            None => return Ok(vec![None]),
            Some(FileSelector::Id(id)) => vec![*id],
            Some(FileSelector::Name(name)) => self.file_ids(Some(name), usize::MAX).await?,
        };
        files.sort_unstable_by_key(ToString::to_string);
        files.dedup();
        Ok(files.into_iter().map(Some).collect())
    }

    /// Up to `limit` dead letters after `position`, in the order of file, destination and batch.
    pub(super) async fn dead_letters(
        &self,
        filter: &DeadFilter,
        position: &Position,
        limit: usize,
    ) -> Result<Vec<DeadLetter>, StoreError> {
        let after: Option<DeadPlace> = if position.0.is_empty() { None } else { Some(position.0.parse()?) };
        let mut letters = Vec::new();
        for file in self.files_of_filter(filter).await? {
            // A walk that is beyond a file finds nothing more in it.
            let mut place = after.clone();
            while letters.len() < limit {
                let (batches, next) = self.dead_batches(filter, file, place.as_ref()).await?;
                let mut known = Records::new();
                self.look_up_all(&mut known, batches.iter().map(|(_, id)| *id), false).await?;
                for (sk, id) in batches {
                    let seen = place.as_ref().filter(|place| place.sk == sk).and_then(|place| place.index);
                    let news = letters_of(&known, filter, id).into_iter();
                    let news = news.filter(|(index, _)| seen.is_none_or(|seen| *index > seen));
                    letters.extend(news.map(|(_, letter)| letter));
                }
                match next {
                    Some(next) => place = Some(next),
                    None => break,
                }
            }
        }
        letters.truncate(limit);
        let mut names: HashMap<FileId, String> = HashMap::new();
        for letter in &mut letters {
            let name = match names.entry(letter.file) {
                Entry::Occupied(known) => known.into_mut(),
                Entry::Vacant(unknown) => {
                    let stored = match self.cached_file(letter.file) {
                        Some(stored) => Some(stored),
                        None => self.read_file(letter.file).await?,
                    };
                    unknown.insert(stored.map(|stored| stored.record.name).unwrap_or_default())
                }
            };
            letter.file_name.clone_from(name);
        }
        Ok(letters)
    }

    /// Sends up to `limit` dead letters again; how many.
    pub(super) async fn redrive(
        &self,
        filter: &DeadFilter,
        limit: usize,
        now: UnixMs,
    ) -> Result<usize, StoreError> {
        let mut redriven = 0;
        for file in self.files_of_filter(filter).await? {
            let mut place = None;
            while redriven < limit {
                let (batches, next) = self.dead_batches(filter, file, place.as_ref()).await?;
                let ids: Vec<_> = batches.into_iter().map(|(_, id)| id).collect();
                if !ids.is_empty() {
                    redriven += self.redrive_some(filter, &ids, limit - redriven, now).await?;
                }
                match next {
                    Some(next) => place = Some(next),
                    None => break,
                }
            }
        }
        Ok(redriven)
    }

    /// Sends up to `limit` dead letters again with new bodies, those that were never sent.
    pub(super) async fn rerender(
        &self,
        filter: &DeadFilter,
        renderings: &BTreeMap<String, Rendering>,
        limit: usize,
        now: UnixMs,
        dry_run: bool,
    ) -> Result<Rerendered, StoreError> {
        let mut done = Rerendered::default();
        for file in self.files_of_filter(filter).await? {
            let mut place = None;
            while done.redriven + done.refused < limit {
                let (batches, next) = self.dead_batches(filter, file, place.as_ref()).await?;
                for (_, id) in batches {
                    let left = limit - done.redriven - done.refused;
                    let Rerendered { redriven, refused } =
                        self.rerender_one(filter, renderings, id, left, now, dry_run).await?;
                    done.redriven += redriven;
                    done.refused += refused;
                }
                match next {
                    Some(next) => place = Some(next),
                    None => break,
                }
            }
        }
        Ok(done)
    }

    /// The same of one batch.
    async fn rerender_one(
        &self,
        filter: &DeadFilter,
        renderings: &BTreeMap<String, Rendering>,
        id: BatchId,
        limit: usize,
        now: UnixMs,
        dry_run: bool,
    ) -> Result<Rerendered, StoreError> {
        for round in 1..=ROUNDS as u32 {
            let mut lane = self.lane.lock().await;
            let mut known = Records::new();
            self.look_up_all(&mut known, [id], false).await?;
            let letters = letters_of(&known, filter, id);
            let indexes: Vec<u32> = letters.iter().take(limit).map(|(index, _)| *index).collect();
            let refused = Rerendered { redriven: 0, refused: indexes.len() };
            let Some(Some(stored)) = known.get(&id).filter(|_| !indexes.is_empty()) else {
                return Ok(refused);
            };
            let history = self.history(id).await?;
            let chunks = history.iter().map(|chunk| Reading(chunk).bytes(BODY));
            let chunks = chunks.collect::<Result<Vec<_>, _>>()?;
            let keeps = stored.record.keeps_bodies(chunks).map_err(|_| Damaged(BODY))?;
            let rendering = renderings.get(&*stored.destination).filter(|_| keeps.is_none());
            let carried = self.payloads_of(&[stored]).await?.remove(&id);
            let (Some(rendering), Some(Fetched::Batch(mut batch))) = (rendering, carried) else {
                return Ok(refused);
            };
            batch.header = Arc::new(batch.header.rendered_by(rendering));
            let redriven = Rerendered { redriven: indexes.len(), refused: 0 };
            if dry_run {
                return Ok(redriven);
            }
            let new = NewPayload::of(&batch)?;
            let payload = new.id;
            // Before its record says so.
            let kept = self.put_payloads(vec![new]).await?;
            let mut draft = Draft::default();
            draft.rerender(&known, id, &indexes, (payload, kept[&payload]), now);
            if lane.write_change(self, &draft).await? {
                drop(lane);
                self.open_again(&[stored.file]).await?;
                return Ok(redriven);
            }
            drop(lane);
            back_off(BUDGET.backoff, round).await;
        }
        Err(StoreError::Retryable("dead letters keep being changed by others".into()))
    }

    async fn redrive_some(
        &self,
        filter: &DeadFilter,
        ids: &[BatchId],
        limit: usize,
        now: UnixMs,
    ) -> Result<usize, StoreError> {
        let mut left = self.with_payloads(ids).await?;
        let mut done = 0;
        for round in 0..ROUNDS {
            let mut lane = self.lane.lock().await;
            let mut known = Records::new();
            self.look_up_all(&mut known, left.iter().copied(), false).await?;
            let mut draft = Draft::default();
            let (mut messages, mut files, mut drafted) = (0, Vec::new(), 0);
            for id in &left {
                let letters = letters_of(&known, filter, *id);
                let indexes: Vec<u32> = letters.iter().map(|(index, _)| *index).collect();
                let indexes = &indexes[..indexes.len().min(limit - done - messages)];
                let mut next = draft.clone();
                let opened = next.redrive(&known, *id, indexes, now);
                if !fits(&next) {
                    break; // the next round goes on
                }
                draft = next;
                messages += opened;
                drafted += 1;
                files.extend(letters.first().map(|(_, letter)| letter.file));
            }
            if lane.write_change(self, &draft).await? {
                drop(lane);
                done += messages;
                left.drain(..drafted);
                self.open_again(&files).await?;
                if left.is_empty() || done >= limit {
                    return Ok(done);
                }
            } else {
                drop(lane);
                back_off(BUDGET.backoff, round as u32 + 1).await;
            }
        }
        Ok(done)
    }

    /// Those batches whose rows are still stored, and kept for as long as they may be needed now; the others can't be
    /// sent again.
    async fn with_payloads(&self, ids: &[BatchId]) -> Result<Vec<BatchId>, StoreError> {
        let mut known = Records::new();
        self.look_up_all(&mut known, ids.iter().copied(), true).await?;
        let found: Vec<_> = known.values().flatten().collect();
        self.keep_payloads(found.iter().map(|stored| (stored.id, stored.payload, stored.kept_until))).await?;
        let there = self.stored_payloads(found.iter().map(|stored| stored.payload)).await?;
        let mut stored = Vec::with_capacity(ids.len());
        for &id in ids {
            if known[&id].as_ref().is_some_and(|stored| there.contains(&stored.payload)) {
                stored.push(id);
            } else {
                tracing::error!(batch = %id, "dead letters can't be redriven: their rows are gone");
            }
        }
        Ok(stored)
    }

    /// Lists files as open whose report was written: their owner has to write it again.
    async fn open_again(&self, files: &[FileId]) -> Result<(), StoreError> {
        let mut files = files.to_vec();
        files.sort_unstable();
        files.dedup();
        for id in files {
            if let Some(file) = self.read_file(id).await?
                && file.reported.is_some()
            {
                self.calls
                    .put_all("opening a file again", &self.calls.tables.ledger, vec![file.open_item()])
                    .await?;
            }
        }
        Ok(())
    }
}

/// The dead messages of a batch that are asked for, in the order of their rows, with their indexes. Of their files only
/// the ids are known.
fn letters_of(known: &Records, filter: &DeadFilter, id: BatchId) -> Vec<(u32, DeadLetter)> {
    let Some(Some(stored)) = known.get(&id) else { return Vec::new() };
    let StoredBatch { file, destination, rows, record, .. } = stored;
    let deaths =
        record.exceptions.iter().filter_map(|(&index, exception)| Some((index, exception.death.as_ref()?)));
    let letter = |(index, death): (u32, &Death)| {
        let place = DeadPlace { sk: keys::dead_sk(*file, destination, rows.row(0), id), index: Some(index) };
        let letter = DeadLetter {
            position: Position(place.to_string()),
            file: *file,
            file_name: String::new(),
            destination: destination.to_string(),
            row: rows.row(index as usize),
            attempts: record.tries[index as usize].into(),
            last: death.attempt,
            cause: death.cause,
            detail: death.detail.clone().map(Into::into),
            batch: id,
        };
        (index, letter)
    };
    deaths.filter(|(_, death)| filter.takes(&death.attempt, death.cause)).map(letter).collect()
}
