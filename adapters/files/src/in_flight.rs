//! What this process has in flight, in a memory-mapped file (port `InFlight`, B17).
//!
//! Noting a message costs three stores into memory and no system call. They are in the page cache at once, so they
//! survive the process however it ends; they need not survive the machine: a file of an earlier boot is ignored.
//!
//! ```text
//! header  magic, boot id (two words), whether it ran out of slots, slots ever used     64 bytes
//! slots   batch id (two words), index + 2 (1: several messages, 0: nothing), 0   32 bytes each
//! ```

use std::{
    fs::{self, OpenOptions},
    io::{self, Write as _},
    path::Path,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use memmap2::{MmapOptions, MmapRaw};
use postrider_actors::{
    model::{ids::BatchId, ledger::Evidence},
    ports::InFlight,
};

/// The file's name in the state directory.
pub const IN_FLIGHT_FILE: &str = "in-flight";

/// `Ptrd`, `fly`, version 1.
const MAGIC: u64 = u64::from_le_bytes(*b"Ptrdfly1");

/// As many as requests can be in flight (`delivery.concurrency`).
const SLOTS: usize = 65_536;

const HEADER_WORDS: usize = 8;
/// The indexes of the header's words.
const BOOT: usize = 1;
const RAN_OUT: usize = 3;
const USED: usize = 4;

const SLOT_WORDS: usize = 4;
const WORDS: usize = HEADER_WORDS + SLOTS * SLOT_WORDS;

/// A slot that nobody has: what is noted in it is lost.
const NO_SLOT: u32 = u32::MAX;

/// What the third word of a slot says of messages that travel together.
const SEVERAL: u64 = 1;

/// Names this boot of the machine; random(4).
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// The file, mapped.
pub struct InFlightFile {
    map: MmapRaw,
    free: Mutex<Free>,
}

#[derive(Default)]
struct Free {
    returned: Vec<u32>,
    /// Slots that were ever used.
    used: u32,
}

impl InFlightFile {
    /// Opens the file in `state_dir`, which this process must have locked, and says what an earlier process left in it.
    /// It is empty from then on.
    pub fn open(state_dir: &Path) -> io::Result<(Self, Evidence)> {
        let path = state_dir.join(IN_FLIGHT_FILE);
        let mut file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
        let is_whole = file.metadata()?.len() == (WORDS * 8) as u64;
        if !is_whole {
            // Written, not only made longer: a store into a hole that a full disk can't fill would be a SIGBUS.
            file.set_len(0)?;
            file.write_all(&vec![0; WORDS * 8])?;
        }
        let map = MmapOptions::new().len(WORDS * 8).map_raw(&file)?;
        let this = Self { map, free: Mutex::default() };
        let boot = boot_id();
        let evidence = if is_whole { this.evidence(boot) } else { Evidence::unknown() };
        // Only what was ever used: the rest takes no memory.
        for word in &this.words()[..HEADER_WORDS + this.slots_used() * SLOT_WORDS] {
            word.store(0, Ordering::Relaxed);
        }
        if let Some([high, low]) = boot {
            this.word(BOOT).store(high, Ordering::Relaxed);
            this.word(BOOT + 1).store(low, Ordering::Relaxed);
            this.word(0).store(MAGIC, Ordering::Release);
        }
        Ok((this, evidence))
    }

    fn slots_used(&self) -> usize {
        usize::try_from(self.word(USED).load(Ordering::Acquire)).unwrap_or(SLOTS).min(SLOTS)
    }

    fn evidence(&self, boot: Option<[u64; 2]>) -> Evidence {
        let header: Vec<u64> = (0..4).map(|at| self.word(at).load(Ordering::Acquire)).collect();
        let Some([high, low]) = boot else { return Evidence::unknown() };
        if header != [MAGIC, high, low, 0] {
            return Evidence::unknown();
        }
        let slots = self.words()[HEADER_WORDS..].chunks_exact(SLOT_WORDS);
        Evidence::of(slots.take(self.slots_used()).filter_map(|slot| {
            let what = slot[2].load(Ordering::Acquire);
            let (high, low) = (slot[0].load(Ordering::Relaxed), slot[1].load(Ordering::Relaxed));
            let mut id = [0; 16];
            id[..8].copy_from_slice(&high.to_le_bytes());
            id[8..].copy_from_slice(&low.to_le_bytes());
            match what {
                0 => None,
                SEVERAL => Some((BatchId(id), None)),
                index => Some((BatchId(id), u32::try_from(index - 2).ok())),
            }
        }))
    }

    #[expect(unsafe_code, reason = "words of a mapped file that are shared without a lock: see the proof")]
    #[expect(clippy::cast_ptr_alignment, reason = "a mapping begins at a page")]
    fn words(&self) -> &[AtomicU64] {
        // SAFETY: the mapping begins at a page, so it is aligned for `AtomicU64`; it was made `WORDS * 8` bytes long, is
        // writable, and lives as long as `self`. Every pattern of bytes is a valid `AtomicU64`. Nothing else in this
        // process refers to it: it is read and written through these atomics alone. What else makes a mapped file unsafe
        // is another process that changes or shortens it; this one is in the state directory, which is locked (F13), and
        // its content is only ever taken for numbers.
        unsafe { std::slice::from_raw_parts(self.map.as_mut_ptr().cast::<AtomicU64>(), WORDS) }
    }

    fn word(&self, at: usize) -> &AtomicU64 {
        &self.words()[at]
    }

    fn slot(&self, slot: u32) -> Option<&[AtomicU64]> {
        let at = HEADER_WORDS + slot as usize * SLOT_WORDS;
        self.words().get(at..at + SLOT_WORDS)
    }
}

/// Which boot of the machine this is; `None` if the system does not say.
fn boot_id() -> Option<[u64; 2]> {
    let text = fs::read_to_string(BOOT_ID).ok()?;
    let id = u128::from_str_radix(&text.trim().replace('-', ""), 16).ok()?;
    Some([(id >> 64) as u64, id as u64])
}

impl InFlight for InFlightFile {
    fn enter(&self) -> u32 {
        // Changed by single pushes and pops only.
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(slot) = free.returned.pop() {
            return slot;
        }
        if free.used as usize == SLOTS {
            // Somebody is in flight unnoted: what the file says is not all there is.
            self.word(RAN_OUT).store(1, Ordering::Release);
            return NO_SLOT;
        }
        free.used += 1;
        self.word(USED).store(free.used.into(), Ordering::Release);
        free.used - 1
    }

    fn begin(&self, slot: u32, batch: BatchId, index: Option<u32>) {
        let Some(slot) = self.slot(slot) else { return };
        let (high, low) = batch.0.split_at(8);
        let word = |half: &[u8]| u64::from_le_bytes(half.try_into().expect("half of 16 bytes"));
        slot[0].store(word(high), Ordering::Relaxed);
        slot[1].store(word(low), Ordering::Relaxed);
        slot[2].store(index.map_or(SEVERAL, |index| u64::from(index) + 2), Ordering::Release);
    }

    fn end(&self, slot: u32) {
        if let Some(slot) = self.slot(slot) {
            slot[2].store(0, Ordering::Release);
        }
    }

    fn leave(&self, slot: u32) {
        if slot != NO_SLOT {
            self.end(slot);
            self.free.lock().unwrap_or_else(PoisonError::into_inner).returned.push(slot);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BATCH: BatchId = BatchId([7; 16]);

    #[test]
    fn what_was_in_flight_is_known_to_the_next_life() {
        let dir = tempfile::tempdir().unwrap();
        let (first, before) = InFlightFile::open(dir.path()).unwrap();
        assert_eq!(before, Evidence::unknown(), "there was no file");
        let (a, b, c) = (first.enter(), first.enter(), first.enter());
        first.begin(a, BATCH, Some(0));
        first.begin(b, BATCH, Some(499));
        first.begin(c, BatchId([9; 16]), None);
        first.end(a);
        drop(first); // as a kill would: nothing is written at the end

        let (second, before) = InFlightFile::open(dir.path()).unwrap();
        assert_eq!(before, Evidence::of([(BATCH, Some(499)), (BatchId([9; 16]), None)]));
        let slot = second.enter();
        second.begin(slot, BATCH, Some(1));
        second.leave(slot);
        assert_eq!(second.enter(), slot, "slots are used again");
        drop(second);
        let (_, before) = InFlightFile::open(dir.path()).unwrap();
        assert_eq!(before, Evidence::of([]), "the last life left nothing");
    }

    #[test]
    fn a_file_of_another_boot_or_of_another_length_says_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let (file, _) = InFlightFile::open(dir.path()).unwrap();
        file.begin(file.enter(), BATCH, Some(1));
        file.word(BOOT + 1).fetch_add(1, Ordering::Relaxed);
        drop(file);
        assert_eq!(InFlightFile::open(dir.path()).unwrap().1, Evidence::unknown());
        fs::write(dir.path().join(IN_FLIGHT_FILE), b"short").unwrap();
        assert_eq!(InFlightFile::open(dir.path()).unwrap().1, Evidence::unknown());
    }

    #[test]
    fn without_a_slot_the_evidence_is_not_whole() {
        let dir = tempfile::tempdir().unwrap();
        let (file, _) = InFlightFile::open(dir.path()).unwrap();
        file.free.lock().unwrap().used = SLOTS as u32;
        let slot = file.enter();
        file.begin(slot, BATCH, Some(1));
        file.leave(slot);
        drop(file);
        assert_eq!(InFlightFile::open(dir.path()).unwrap().1, Evidence::unknown());
    }
}
