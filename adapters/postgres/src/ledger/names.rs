//! The numbers of destinations and sources in rows. A name's number never changes.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::{Arc, Mutex, MutexGuard},
};

use super::{
    connect::{Connections, within},
    error::Failure,
    settings::Timeouts,
};

/// Destinations come from the configuration, and so do their names' number.
#[derive(Default)]
pub(super) struct Names(Mutex<KnownNames>);

#[derive(Default)]
struct KnownNames {
    by_name: HashMap<Arc<str>, i32>,
    by_id: HashMap<i32, Arc<str>>,
}

impl Names {
    fn known(&self) -> MutexGuard<'_, KnownNames> {
        self.0.lock().expect("nobody panics while holding it")
    }

    fn learn(&self, name: &str, id: i32) -> Arc<str> {
        let mut known = self.known();
        if let Some(name) = known.by_id.get(&id) {
            return name.clone();
        }
        let name: Arc<str> = name.into();
        known.by_name.insert(name.clone(), id);
        known.by_id.insert(id, name.clone());
        name
    }

    /// The numbers of destinations; those that have none get one.
    pub(super) async fn destination_ids<'a>(
        &self,
        connections: &Connections,
        timeouts: Timeouts,
        wanted: impl IntoIterator<Item = &'a str>,
    ) -> Result<BTreeMap<&'a str, i32>, Failure> {
        let wanted: BTreeSet<&str> = wanted.into_iter().collect();
        let (mut ids, mut unknown) = (BTreeMap::new(), Vec::new());
        {
            let known = self.known();
            for name in wanted {
                match known.by_name.get(name) {
                    Some(&id) => drop(ids.insert(name, id)),
                    None => unknown.push(name),
                }
            }
        }
        if unknown.is_empty() {
            return Ok(ids);
        }
        let held = connections.hold().await?;
        within(timeouts, async {
            let client = held.client();
            // In the names' order (I: everybody's order), and only what is missing: a conflict costs a number.
            let insert = "INSERT INTO destinations (name) SELECT name FROM unnest($1::text[]) name \
                          WHERE NOT EXISTS (SELECT FROM destinations d WHERE d.name = name.name) \
                          ORDER BY name ON CONFLICT DO NOTHING";
            client.execute(insert, &[&unknown]).await?;
            let found =
                client.query("SELECT name, id FROM destinations WHERE name = ANY($1)", &[&unknown]).await?;
            for row in found {
                let (name, id): (&str, i32) = (row.get(0), row.get(1));
                self.learn(name, id);
                if let Some(name) = unknown.iter().find(|unknown| **unknown == name) {
                    ids.insert(*name, id);
                }
            }
            Ok(())
        })
        .await?;
        held.keep();
        Ok(ids)
    }

    /// A destination's number, if it has one.
    pub(super) async fn destination_id(
        &self,
        connections: &Connections,
        timeouts: Timeouts,
        name: &str,
    ) -> Result<Option<i32>, Failure> {
        if let Some(&id) = self.known().by_name.get(name) {
            return Ok(Some(id));
        }
        let held = connections.hold().await?;
        let query = "SELECT id FROM destinations WHERE name = $1";
        let found = within(timeouts, async { Ok(held.client().query_opt(query, &[&name]).await?) }).await?;
        held.keep();
        Ok(found.map(|row| {
            let id = row.get(0);
            self.learn(name, id);
            id
        }))
    }

    /// A name that a row brought along.
    pub(super) fn destination_name(&self, id: i32, name: &str) -> Arc<str> {
        self.learn(name, id)
    }
}
