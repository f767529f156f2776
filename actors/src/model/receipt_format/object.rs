//! Finds the fields of a JSON object without building it: numbers keep their digits, and what no field
//! wants is read for its form alone.

use std::{borrow::Cow, fmt};

use serde::de::{DeserializeSeed, Deserializer, Error, MapAccess, Visitor};
use serde_json::value::RawValue;

use super::{
    FieldPath,
    fields::{FieldValue, Fields},
    mapping::FIELDS,
};
use crate::model::formats::{Checked, KeySeed, OpenKeys, TWICE};

/// A field that is looked for behind some keys.
#[derive(Clone, Copy)]
struct Wanted<'a> {
    place: usize,
    keys: &'a [String],
}

/// What was found so far, as raw text.
struct Raw<'de> {
    values: [Option<&'de RawValue>; FIELDS],
    /// Found under a key of the whole name, which comes before several keys.
    whole: [bool; FIELDS],
}

/// The values of the fields at `paths`.
pub(super) fn find<'a>(text: &'a [u8], paths: &[Option<&FieldPath>; FIELDS]) -> Result<Fields<'a>, String> {
    let text = std::str::from_utf8(text)
        .map_err(|error| format!("invalid UTF-8 at byte {} of the receipt", error.valid_up_to() + 1))?;
    if !text.trim_ascii_start().starts_with('{') {
        return Err("the receipt is not a JSON object".into());
    }
    let wanted: Vec<_> =
        (0..FIELDS).filter_map(|place| paths[place].map(|path| Wanted { place, keys: &path.keys })).collect();
    let mut raw = Raw { values: [None; FIELDS], whole: [false; FIELDS] };
    let mut keys = OpenKeys::default();
    let level = Level { wanted: &wanted, paths: Some(paths), raw: &mut raw, keys: &mut keys };
    level.read(text).map_err(|error| {
        // `serde_json` sees each receipt as line 1, which would mislead.
        format!("invalid JSON: {error}").replace(" at line 1 column", " at column")
    })?;
    let mut fields = Fields::default();
    for ((field, raw), path) in fields.iter_mut().zip(raw.values).zip(paths) {
        if let (Some(raw), Some(path)) = (raw, path) {
            *field = value(raw.get(), path)?;
        }
    }
    Ok(fields)
}

fn value<'a>(raw: &'a str, path: &FieldPath) -> Result<Option<FieldValue<'a>>, String> {
    Ok(Some(match raw.as_bytes()[0] {
        b'"' => {
            // Borrowed if it can be: `Cow` alone would always allocate.
            let text = match serde_json::from_str::<&str>(raw) {
                Ok(text) => Cow::Borrowed(text),
                Err(_) => serde_json::from_str(raw)
                    .map(Cow::Owned)
                    .map_err(|_| format!("`{path}` holds an escape that is not valid Unicode"))?,
            };
            FieldValue::Text(text)
        }
        b'n' => return Ok(None),
        b't' => FieldValue::Boolean(true),
        b'f' => FieldValue::Boolean(false),
        b'{' => FieldValue::Nested("an object"),
        b'[' => FieldValue::Nested("an array"),
        _ => FieldValue::Number(raw),
    }))
}

/// One object on the way to the fields.
struct Level<'a, 'b, 'de> {
    wanted: &'b [Wanted<'a>],
    /// At the top level, where a key may be a field's whole name.
    paths: Option<&'b [Option<&'a FieldPath>; FIELDS]>,
    raw: &'b mut Raw<'de>,
    keys: &'b mut OpenKeys,
}

impl<'de> Level<'_, '_, 'de> {
    fn read(self, text: &'de str) -> serde_json::Result<()> {
        let mut reader = serde_json::Deserializer::from_str(text);
        self.deserialize(&mut reader).and_then(|()| reader.end())
    }
}

impl<'de> DeserializeSeed<'de> for Level<'_, '_, 'de> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<(), D::Error> {
        from.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Level<'_, '_, 'de> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let Self { wanted, paths, raw, keys } = self;
        let mark = keys.mark();
        let mut inside = Vec::new();
        while map.next_key_seed(KeySeed(&mut *keys))?.is_some() {
            let key = keys.last();
            let is_whole = |wanted: &Wanted<'_>| {
                wanted.keys.len() > 1
                    && paths.is_some_and(|paths| paths[wanted.place].is_some_and(|path| path.text == key))
            };
            let is_near = |wanted: &Wanted<'_>| is_whole(wanted) || wanted.keys[0] == key;
            if !wanted.iter().any(is_near) {
                map.next_value_seed(Checked(&mut *keys))?;
                continue;
            }
            // What the fields hold is kept as text, so that numbers keep their digits.
            let value: &RawValue = map.next_value()?;
            for wanted in wanted {
                if is_whole(wanted) {
                    raw.values[wanted.place] = Some(value);
                    raw.whole[wanted.place] = true;
                } else if wanted.keys[0] == key && !raw.whole[wanted.place] {
                    match &wanted.keys[1..] {
                        [] => raw.values[wanted.place] = Some(value),
                        rest => inside.push(Wanted { place: wanted.place, keys: rest }),
                    }
                }
            }
            // The depth is that of a path, not of the input.
            if !inside.is_empty() && value.get().starts_with('{') {
                Level { wanted: &inside, paths: None, raw, keys }
                    .read(value.get())
                    .map_err(A::Error::custom)?;
            }
            inside.clear();
        }
        if keys.close(mark) { Ok(()) } else { Err(A::Error::custom(TWICE)) }
    }
}
