//! The alarms as they stand, for whoever looks at them from outside. Clones share them.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use postrider_actors::model::alarm::board::AlarmNotes;

use crate::shapes::Alarm;

/// See the module.
#[derive(Clone, Debug, Default)]
pub(crate) struct AlarmBoard(Arc<Mutex<AlarmNotes>>);

impl AlarmBoard {
    fn notes(&self) -> MutexGuard<'_, AlarmNotes> {
        // Replaced as a whole.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How they stand now.
    pub(crate) fn set(&self, notes: AlarmNotes) {
        *self.notes() = notes;
    }

    /// Those that are raised, the most severe first, then the oldest.
    pub(crate) fn raised(&self) -> Vec<Alarm> {
        let mut raised: Vec<_> = self.notes().raised.iter().map(Alarm::from).collect();
        raised.sort_by_key(|alarm| (alarm.severity, alarm.since));
        raised
    }

    /// Those that were cleared, the latest first.
    pub(crate) fn cleared(&self) -> Vec<Alarm> {
        self.notes().cleared.iter().map(Alarm::from).collect()
    }
}
