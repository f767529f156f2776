//! Where receipts come from, and what they say.

use std::{collections::BTreeMap, ops::Deref, path::PathBuf, time::Duration};

use postrider_actors::model::receipt_format::{
    FieldPath, ReceiptFileFormat, ReceiptMapping, StatusMeaning, UnknownStatus,
};
use postrider_settings::{
    CloudwatchSource, Keys as _, Need, QueueAddress, SecretSource, Section, choice, delimiter, duration,
    given, queue, required_path, secrets, settings, shown_text, unset,
};

use super::needed_if;

/// What a source is, as it is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SourceWord {
    /// Files that are dropped.
    Directory,
    /// Requests.
    Http,
    /// A queue.
    Sqs,
    /// Log groups.
    Cloudwatch,
}

/// What the files of a directory look like, as it is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FormatWord {
    /// One object per line.
    Ndjson,
    /// With a header.
    Csv,
}

/// How a sender proves who it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HttpAuth {
    /// By the Standard Webhooks signature with any of the secrets.
    Signature,
    /// By any of the secrets as a bearer token.
    Bearer,
}

settings! {
    /// What all sources have in common.
    SourceKeys {
        /// "dir" (files that are dropped) | "http" (requests to /receipts/NAME) | "sqs" | "cloudwatch".
        kind: Option<SourceWord> = unset("\"dir\"", kind);
        /// The destination whose messages the receipts are about.
        destination: String = unset("\"support\"", destination);
        /// The files of kind = "dir": one object per line, or with a header. The others bring JSON.
        format: FormatWord = choice(&[("ndjson", FormatWord::Ndjson), ("csv", FormatWord::Csv)]);
        /// One ASCII character between the cells of a csv: "," or ";" or "\t" or "|".
        delimiter: u8 = given("\",\"", delimiter);
        /// The meaning of any status that is not in `[receipts.sources.NAME.statuses]`.
        other_statuses: UnknownStatus = choice(&[("reject", UnknownStatus::Reject), ("sent", UnknownStatus::Sent)]);
    }

    /// A watched directory.
    DirectorySource {
        /// kind = "dir": the directory; an absolute path. Finished files go to `done` and `failed` in it.
        path: PathBuf = unset("\"/srv/postrider/receipts\"", required_path);
        /// How long size and mtime must be unchanged before a file is claimed.
        stable_after: Duration = duration("2s", "0s"..="1h");
    }

    /// Requests to `/receipts/NAME`.
    HttpSource {
        /// kind = "http": Standard Webhooks' signature, or a bearer token. How senders of receipts authenticate.
        auth: HttpAuth = choice(&[("signature", HttpAuth::Signature), ("bearer", HttpAuth::Bearer)]);
        /// Where signing secrets or tokens are kept, up to 8, any of which is enough: "env:NAME", "file:/PATH",
        /// "credential:NAME".
        secrets: Vec<SecretSource> = unset("[\"credential:receipts\"]", sender_secrets);
    }

    /// A queue.
    SqsSource {
        /// kind = "sqs": the queue's name, or its address (https://…/NAME) for a queue of another account; its entries
        /// are objects, arrays of them, or SNS notifications of them.
        queue: QueueAddress = unset("\"receipts\"", queue);
    }

    /// Where each field is in a receipt: a column, a top-level key, or keys joined by dots
    /// (`delivery.providerResponse`). "" = it has none. `message_id` or `provider_id`, and `status`, are needed.
    Fields {
        /// Our id, msg_….
        message_id: Option<FieldPath> = given("\"\"", field);
        /// The provider's id, as `destinations.NAME.provider_id` found it in the answer.
        provider_id: Option<FieldPath> = given("\"\"", field);
        /// The receipt's own id, by which repeats are recognised. Without it, receipts with the same text are
        /// repeats.
        event_id: Option<FieldPath> = given("\"\"", field);
        /// The provider's word for the message's status.
        status: Option<FieldPath> = given("\"\"", field);
        /// When that was: RFC 3339, or Unix seconds or milliseconds.
        at: Option<FieldPath> = given("\"\"", field);
        /// The carrier.
        carrier: Option<FieldPath> = given("\"\"", field);
        /// The carrier's or provider's own words.
        response: Option<FieldPath> = given("\"\"", field);
        /// When the provider sent the message.
        sent_at: Option<FieldPath> = given("\"\"", field);
        /// What it charged, a decimal number.
        price: Option<FieldPath> = given("\"\"", field);
    }
}

/// Where receipts come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReceiptSource {
    /// `[a-z0-9_-]{1,64}`
    pub name: String,
    /// What all sources have in common.
    pub settings: SourceKeys,
    /// What it is.
    pub kind: SourceKind,
    /// What the files of a directory look like.
    pub format: ReceiptFileFormat,
    /// Where each field is in a receipt, and what the provider's words mean.
    pub mapping: ReceiptMapping,
}

impl ReceiptSource {
    /// What its senders prove themselves by.
    pub fn secrets(&self) -> &[SecretSource] {
        match &self.kind {
            SourceKind::Http(http) => &http.secrets,
            _ => &[],
        }
    }
}

impl Deref for ReceiptSource {
    type Target = SourceKeys;

    fn deref(&self) -> &SourceKeys {
        &self.settings
    }
}

/// What a source of receipts is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SourceKind {
    /// Files that are dropped.
    Directory(DirectorySource),
    /// Requests to `/receipts/NAME`.
    Http(HttpSource),
    /// A queue.
    Sqs(SqsSource),
    /// Log groups.
    Cloudwatch(CloudwatchSource),
}

/// Reads `[receipts.sources.NAME]`. Every key is read whatever the kind: `[receipts.sources."*"]` sets
/// defaults for all kinds.
pub(super) fn source(section: &mut Section<'_>, name: &str) -> ReceiptSource {
    let settings = SourceKeys::read(section);
    let (need, is_csv) = (section.need, settings.format == FormatWord::Csv);
    let delimiter_key = section.key("delimiter");
    if !is_csv && need == Need::Required && section.reader().is_own(&delimiter_key) {
        let advice = "only format = \"csv\" has a delimiter: remove it";
        section.reader().note(&delimiter_key, None, advice);
    }
    let need_of = |section: &mut Section<'_>, kind| {
        section.need = needed_if(need == Need::Required && settings.kind == Some(kind));
    };
    need_of(section, SourceWord::Directory);
    let directory = DirectorySource::read(section);
    need_of(section, SourceWord::Http);
    let http = HttpSource::read(section);
    need_of(section, SourceWord::Sqs);
    let sqs = SqsSource::read(section);
    need_of(section, SourceWord::Cloudwatch);
    let cloudwatch = CloudwatchSource::read(section);
    section.need = need;
    let mapping = mapping(section, settings.other_statuses);
    ReceiptSource {
        name: name.to_owned(),
        kind: match settings.kind {
            None | Some(SourceWord::Directory) => SourceKind::Directory(directory),
            Some(SourceWord::Http) => SourceKind::Http(http),
            Some(SourceWord::Sqs) => SourceKind::Sqs(sqs),
            Some(SourceWord::Cloudwatch) => SourceKind::Cloudwatch(cloudwatch),
        },
        format: match settings.format {
            FormatWord::Csv => ReceiptFileFormat::Csv { delimiter: settings.delimiter },
            FormatWord::Ndjson => ReceiptFileFormat::Ndjson,
        },
        settings,
        mapping,
    }
}

fn kind(section: &mut Section<'_>, key: &'static str) -> Option<SourceWord> {
    let kinds = [
        ("dir", SourceWord::Directory),
        ("http", SourceWord::Http),
        ("sqs", SourceWord::Sqs),
        ("cloudwatch", SourceWord::Cloudwatch),
    ];
    let kind = section.choice(key, &kinds);
    section.require(key, "write \"dir\", \"http\", \"sqs\" or \"cloudwatch\"");
    kind
}

fn destination(section: &mut Section<'_>, key: &'static str) -> String {
    let destination = section.text(key).unwrap_or_default();
    section.require(key, "name the destination whose messages these receipts are about");
    destination
}

fn sender_secrets(section: &mut Section<'_>, key: &'static str) -> Vec<SecretSource> {
    let secrets = secrets(section, key);
    if section.need == Need::Required && secrets.is_empty() {
        let advice = "write where the signing secrets or tokens are kept, such as [\"credential:NAME\"]: receipts \
                      from anybody would prove nothing";
        section.reader().note(&section.key(key), None, advice);
    }
    secrets
}

fn field(section: &mut Section<'_>, key: &'static str) -> Option<FieldPath> {
    let text = section.text(key).filter(|text| !text.is_empty())?;
    FieldPath::parse(&text)
        .map_err(|error| section.reader().note(&section.key(key), None, error.to_string()))
        .ok()
}

fn mapping(section: &mut Section<'_>, otherwise: UnknownStatus) -> ReceiptMapping {
    let (reader, path) = (section.reader(), section.key("fields"));
    let fields = Fields::read_table(section, "fields");
    if section.need == Need::Required {
        let key = |key: &str| format!("{path}.{key}");
        // What is there and wrong was noted.
        let is_empty = |name: &str| !reader.is_unread(&key(name));
        if fields.message_id.is_none()
            && fields.provider_id.is_none()
            && is_empty("message_id")
            && is_empty("provider_id")
        {
            let advice =
                "say where a receipt names its message: message_id (ours, msg_…) or provider_id (theirs)";
            reader.note(&key("message_id"), None, advice);
        }
        if fields.status.is_none() && is_empty("status") {
            reader.note(&key("status"), None, "say where a receipt says what became of its message");
        }
    }
    ReceiptMapping {
        message_id: fields.message_id,
        provider_id: fields.provider_id,
        event_id: fields.event_id,
        status: fields.status.unwrap_or_else(|| FieldPath::parse("status").expect("it is a key")),
        time: fields.at,
        carrier: fields.carrier,
        response: fields.response,
        sent_at: fields.sent_at,
        price: fields.price,
        statuses: statuses(section),
        otherwise,
    }
}

/// What a provider's word may mean.
const WORDS: [(&str, StatusMeaning); 4] = [
    ("delivered", StatusMeaning::Delivered),
    ("failed", StatusMeaning::Failed),
    ("sent", StatusMeaning::Sent),
    ("ignored", StatusMeaning::Ignored),
];

/// The words of `[receipts.sources.NAME.statuses]`.
fn statuses(section: &mut Section<'_>) -> BTreeMap<String, StatusMeaning> {
    let (reader, need) = (section.reader(), section.need);
    let (mut statuses, mut wrong) = (BTreeMap::new(), false);
    let key = section.key("statuses");
    for (path, word, meaning) in section.private_texts("statuses") {
        if let Some((_, meaning)) = WORDS.iter().find(|(known, _)| *known == meaning) {
            statuses.insert(word, *meaning);
        } else {
            let advice = "write what the word means: \"delivered\", \"failed\", \"sent\" or \"ignored\"";
            reader.note(&path, Some(shown_text(&meaning)), advice);
            wrong = true;
        }
    }
    let is_final =
        |meaning: &StatusMeaning| matches!(meaning, StatusMeaning::Delivered | StatusMeaning::Failed);
    if need == Need::Required && !wrong && !statuses.values().any(is_final) {
        let advice = "say what the provider's words mean: DELIVERED = \"delivered\", UNDELIV = \"failed\", …";
        reader.note(&key, None, advice);
    }
    statuses
}
