use proptest::prelude::*;

use super::*;
use crate::model::state::MessageState;
use crate::model::{
    file::FileState,
    ids::{FileId, MessageId},
    receipt::{PROVIDER_ID_BYTES_MAX, Price, RESPONSE_BYTES_MAX, ReceiptKey, WORD_BYTES_MAX},
    time::UnixMs,
};

#[expect(clippy::unnecessary_wraps, reason = "as a mapping has it")]
fn path(text: &str) -> Option<FieldPath> {
    Some(FieldPath::parse(text).unwrap())
}

fn mapping() -> ReceiptMapping {
    let words = [
        ("DELIVERED", StatusMeaning::Delivered),
        ("UNDELIV", StatusMeaning::Failed),
        ("QUEUED", StatusMeaning::Sent),
        ("READ", StatusMeaning::Ignored),
        ("0", StatusMeaning::Delivered),
    ];
    ReceiptMapping {
        message_id: path("ref"),
        provider_id: path("notification.messageId"),
        event_id: path("event"),
        status: FieldPath::parse("status").unwrap(),
        time: path("notification.timestamp"),
        carrier: path("delivery.phoneCarrier"),
        response: path("delivery.providerResponse"),
        sent_at: path("sent"),
        price: path("delivery.priceInUSD"),
        statuses: words.map(|(word, meaning)| (word.to_owned(), meaning)).into(),
        otherwise: UnknownStatus::Reject,
    }
}

fn format() -> ReceiptFormat {
    ReceiptFormat::new("sms".into(), mapping()).unwrap()
}

fn read(text: &str) -> Result<Option<Receipt>, String> {
    format().read_object(text.as_bytes(), Around::default())
}

fn refusal(text: &str) -> String {
    read(text).expect_err(text)
}

const ID: MessageId = MessageId { file: FileId([7; 16]), row: 12 };

#[test]
fn s0_3_every_fact_of_a_delivery_log_is_kept() {
    let text = r#"{"notification":{"messageId":"p-1","timestamp":"2016-06-28 00:40:34.558"},
        "delivery":{"phoneCarrier":"My Phone \u0026 Co","mnc":270,"destination":"+1XXX5550100",
            "priceInUSD":0.00645,"providerResponse":"Message has been accepted","dwellTimeMs":599},
        "sent":1467074434,"status":"DELIVERED"}"#;
    let receipt = read(text).unwrap().unwrap();
    assert_eq!(receipt.key, ReceiptKey::Provider("p-1".into()));
    assert_eq!((receipt.state, receipt.at), (MessageState::Delivered, Some(UnixMs(1_467_074_434_558))));
    assert_eq!(receipt.facts.status.as_deref(), Some("DELIVERED"));
    assert_eq!(receipt.facts.carrier.as_deref(), Some("My Phone & Co"));
    assert_eq!(receipt.facts.response.as_deref(), Some("Message has been accepted"));
    assert_eq!(receipt.facts.sent_at, Some(UnixMs(1_467_074_434_000)));
    assert_eq!(receipt.facts.price, Some(Price(645_000)));
    assert_eq!(receipt.event, EventId::of_text("sms", text.as_bytes()));
}

#[test]
fn s0_3_what_is_missing_empty_or_null_is_none() {
    let bare = read(&format!(r#"{{"ref":"{ID}","status":"UNDELIV"}}"#)).unwrap().unwrap();
    assert_eq!((&bare.key, bare.state, bare.at), (&ReceiptKey::Message(ID), MessageState::Failed, None));
    for empty in ["null", "\"\"", "\" \\t\""] {
        let text = format!(
            r#"{{"ref":"{ID}","status":"UNDELIV","event":{empty},"sent":{empty},
            "notification":{{"messageId":{empty},"timestamp":{empty}}},
            "delivery":{{"phoneCarrier":{empty},"providerResponse":{empty},"priceInUSD":{empty}}}}}"#
        );
        let receipt = read(&text).unwrap().unwrap();
        assert_eq!(receipt.event, EventId::of_text("sms", text.as_bytes()));
        assert_eq!(Receipt { event: bare.event, ..receipt }, bare, "{empty}");
    }
    // Nothing at all where an object was expected.
    let text = format!(r#"{{"ref":"{ID}","status":"UNDELIV","delivery":null,"notification":7}}"#);
    assert_eq!(read(&text).unwrap().unwrap().facts, bare.facts);
}

#[test]
fn the_providers_words_mean_what_the_mapping_says() {
    let state = |word: &str| read(&format!(r#"{{"ref":"{ID}","status":{word}}}"#));
    assert_eq!(state("\"QUEUED\"").unwrap().unwrap().state, MessageState::Sent);
    assert_eq!(state("0").unwrap().unwrap().state, MessageState::Delivered, "a number is its digits");
    assert_eq!(state("\"READ\""), Ok(None));
    let why = state("\"delivered\"").unwrap_err();
    assert_eq!(why, "`status` is \"delivered\", which the source's `statuses` do not have");
    let mut lenient = mapping();
    lenient.otherwise = UnknownStatus::Sent;
    let lenient = ReceiptFormat::new("sms".into(), lenient).unwrap();
    let text = format!(r#"{{"ref":"{ID}","status":"{}"}}"#, "ü".repeat(80));
    let receipt = lenient.read_object(text.as_bytes(), Around::default()).unwrap().unwrap();
    assert_eq!(receipt.state, MessageState::Sent);
    assert_eq!(receipt.facts.status.unwrap().len(), WORD_BYTES_MAX);
}

#[test]
fn identity_comes_from_the_receipt_then_from_around_it_then_from_its_text() {
    let with = format!(r#"{{"ref":"{ID}","status":"READ2","event":"e-1"}}"#).replace("READ2", "QUEUED");
    let without = format!(r#"{{"ref":"{ID}","status":"QUEUED"}}"#);
    let around = EventId::named("sms", "around");
    let event = |text: &str, event| {
        let around = Around { event, at: None };
        format().read_object(text.as_bytes(), around).unwrap().unwrap().event
    };
    let (least, greatest) = EventId::named("sms", "e-1").same_id();
    assert!((least..=greatest).contains(&event(&with, Some(around))));
    assert_eq!(event(&with, Some(around)), event(&with.replace(':', " : "), None));
    let other = with.replace("QUEUED", "DELIVERED");
    assert!((least..=greatest).contains(&event(&other, None)) && event(&other, None) != event(&with, None));
    assert_eq!(event(&without, Some(around)), around);
    assert_eq!(event(&without, None), EventId::of_text("sms", without.as_bytes()));
}

#[test]
fn a_receipt_without_a_time_has_that_of_its_surroundings() {
    let around = Around { event: None, at: Some(UnixMs(5)) };
    let at = |text: &str| format().read_object(text.as_bytes(), around).unwrap().unwrap().at;
    assert_eq!(at(&format!(r#"{{"ref":"{ID}","status":"QUEUED"}}"#)), Some(UnixMs(5)));
    let own = format!(r#"{{"ref":"{ID}","status":"QUEUED","notification":{{"timestamp":1700000000}}}}"#);
    assert_eq!(at(&own), Some(UnixMs(1_700_000_000_000)));
}

/// The mapping, corrected: it knows one word more.
fn corrected() -> ReceiptFormat {
    let mut mapping = mapping();
    mapping.statuses.insert("LOST".to_owned(), StatusMeaning::Failed);
    ReceiptFormat::new("sms".into(), mapping).unwrap()
}

#[test]
fn a_reject_that_is_read_again_is_the_receipt_that_a_corrected_mapping_would_have_read() {
    let csv = format!(
        "ref;status;delivery.providerResponse;event\n{ID};LOST;\"a \"\"word\"\",\nü\";\n{ID};LOST;;e-1\n{ID};GONE;;\n"
    );
    let ndjson = format!(
        "{{\"ref\":\"{ID}\", \"status\":\"LOST\"}}\n{{\"status\":\"LOST\",\"event\":\"e-1\",\"ref\":\"{ID}\"}}\n{{\"status\":\"GONE\"}}\n"
    );
    for (kind, text) in KINDS.into_iter().zip([ndjson, csv]) {
        let rejects = read_file(kind, text.as_bytes(), 1000, 9).unwrap().rejects;
        let mut rows = ReceiptRows::new(corrected(), kind, "f".into(), 400);
        let mut expected = ReadReceipts::default();
        rows.read(text.as_bytes(), true, 9, &mut expected).unwrap();
        assert_eq!((rejects.len(), expected.receipts.len()), (3, 2));
        assert!(rejects.iter().all(|reject| reject.text.is_whole), "{rejects:?}");
        let again: Vec<_> = rejects.iter().map(|reject| corrected().read_again(reject)).collect();
        let [Ok(Some(one)), Ok(Some(two)), Err(why)] = &again[..] else { panic!("{again:?}") };
        assert_eq!([one, two], [&expected.receipts[0], &expected.receipts[1]]);
        assert!(why.contains("GONE"), "{why}");
        // An unchanged mapping reads none of them.
        assert!(rejects.iter().all(|reject| format().read_again(reject).as_ref() == Err(&reject.reason)));
    }
    let around = Around { event: Some(EventId::named("sms", "log event")), at: Some(UnixMs(7)) };
    let mut read = ReadReceipts::default();
    let text = format!(r#"{{"ref":"{ID}","status":"LOST"}}"#);
    format().read_into(text.as_bytes(), around, || "group event".to_owned(), &mut read);
    let again = corrected().read_again(&read.rejects[0]).unwrap().unwrap();
    assert_eq!(Some(again), corrected().read_object(text.as_bytes(), around).unwrap());
}

#[test]
fn what_is_no_receipt_is_kept_for_a_person_alone() {
    for kind in KINDS {
        let read = read_file(kind, &sample(kind), 1 << 20, 1000).unwrap();
        let whole: Vec<_> = read.rejects.iter().map(|reject| reject.text.is_whole).collect();
        match kind {
            ReceiptFileFormat::Ndjson => assert_eq!(whole, [false, false, true, false]),
            ReceiptFileFormat::Csv { .. } => assert_eq!(whole, [false, false, true]),
        }
        assert!(read.rejects.iter().all(|reject| !reject.text.text.is_empty()));
    }
    let file = format().reject_file(b"digest", "f".into(), "changed".into());
    assert_eq!((&*file.text.text, file.text.is_whole), ("", false));
}

#[test]
fn a_read_ends_when_it_holds_enough_text_of_rejects() {
    let long = "x".repeat(crate::model::receipt::REJECTED_BYTES_MAX);
    let text = format!("{{\"status\":\"{long}\"}}\n").repeat(400);
    let mut rows = ReceiptRows::new(format(), KINDS[0], "f".into(), 1 << 20);
    let (mut at, mut reads, mut rejects) = (0, 0, 0);
    while at < text.len() {
        let mut read = ReadReceipts::default();
        at += rows.read(&text.as_bytes()[at..], true, 1000, &mut read).unwrap();
        assert!(text_bytes(&read.rejects) <= REJECTS_BYTES_MAX + long.len());
        assert!(read.is_full(1000) || at == text.len());
        reads += 1;
        rejects += read.rejects.len();
    }
    assert_eq!((reads, rejects), (2, 400));
    let mut read = ReadReceipts { ignored: 2, ..ReadReceipts::default() };
    assert!(read.is_full(2) && !read.is_full(3));
    read.ignored = 0;
    assert!(!read.is_full(1));
}

#[test]
fn f52_what_is_wrong_is_said_with_field_finding_and_expectation() {
    let sound = format!(r#"{{"ref":"{ID}","status":"DELIVERED","#);
    for (text, parts) in [
        (format!(r#"{sound}"sent":"yesterday"}}"#), ["`sent`", "\"yesterday\"", "RFC 3339"]),
        (
            format!(r#"{sound}"notification":{{"timestamp":-5}}}}"#),
            ["`notification.timestamp`", "\"-5\"", "Unix seconds"],
        ),
        (
            format!(r#"{sound}"delivery":{{"priceInUSD":"0,5 €"}}}}"#),
            ["`delivery.priceInUSD`", "\"0,5 €\"", "decimal number"],
        ),
        (format!(r#"{sound}"event":"a\u0000b"}}"#), ["`event`", "NUL", "no text may have"]),
        (
            format!(r#"{sound}"delivery":{{"providerResponse":"\u0000"}}}}"#),
            ["`delivery.providerResponse`", "NUL", ""],
        ),
        (format!(r#"{sound}"sent":{{"at":1}}}}"#), ["`sent`", "an object", "text or a number"]),
        (format!(r#"{sound}"event":"\ud800"}}"#), ["", "escape", ""]),
        (
            r#"{"ref":"msg_7","status":"DELIVERED"}"#.into(),
            ["`ref`", "\"msg_7\"", "msg_<32 hex digits>_<row>"],
        ),
        (
            format!(r#"{{"ref":"{}9223372036854775808","status":"DELIVERED"}}"#, &ID.to_string()[..37]),
            ["`ref`", "msg_0707", "msg_<32 hex digits>_<row>"],
        ),
        (
            format!(r#"{{"notification":{{"messageId":"{}"}},"status":"DELIVERED"}}"#, "x".repeat(201)),
            ["`notification.messageId`", "201 bytes", "at most 200"],
        ),
        (
            r#"{"status":"DELIVERED"}"#.into(),
            ["`ref` or `notification.messageId`", "missing", "message's id"],
        ),
        (format!(r#"{{"ref":"{ID}"}}"#), ["`status`", "missing or empty", "the status"]),
        (format!(r#"{{"ref":"{ID}","status":"\u001b[2J{}"}}"#, "x".repeat(99)), ["\\u{1b}[2J", "…", ""]),
        ("[]".into(), ["not a JSON object", "", ""]),
        ("{".into(), ["invalid JSON", "at column", ""]),
    ] {
        let why = refusal(&text);
        assert!(parts.iter().all(|part| why.contains(part)), "{text}: {why}");
        assert!(!why.contains('\u{1b}') && why.len() < 200, "{why}");
    }
}

#[test]
fn f52_texts_at_their_bounds_are_taken() {
    let id = "é".repeat(PROVIDER_ID_BYTES_MAX / 2);
    let text = format!(
        r#"{{"notification":{{"messageId":"{id}"}},"status":"DELIVERED",
        "delivery":{{"phoneCarrier":"{}","providerResponse":"{}"}}}}"#,
        "é".repeat(WORD_BYTES_MAX),
        "x".repeat(RESPONSE_BYTES_MAX + 1),
    );
    let receipt = read(&text).unwrap().unwrap();
    assert_eq!(receipt.key, ReceiptKey::Provider(id.into()));
    assert_eq!(receipt.facts.carrier.unwrap().len(), WORD_BYTES_MAX);
    assert_eq!(receipt.facts.response.unwrap().len(), RESPONSE_BYTES_MAX);
}

#[test]
fn f23_depth_and_duplicate_keys_are_refused_where_a_field_lies_and_beside_it() {
    let sound = format!(r#"{{"ref":"{ID}","status":"DELIVERED""#);
    let deep = format!("{}{}", "[".repeat(10_000), "]".repeat(10_000));
    for extra in [
        r#""status":"UNDELIV""#.to_owned(),
        r#""delivery":{"priceInUSD":1,"priceInUSD":2}"#.to_owned(),
        r#""delivery":{"other":{"a":1,"a":2}}"#.to_owned(),
        r#""other":{"a":1,"a":2}"#.to_owned(),
        format!(r#""other":{deep}"#),
        format!(r#""delivery":{{"other":{deep}}}"#),
        format!(r#""sent":{deep}"#),
    ] {
        assert!(read(&format!("{sound},{extra}}}")).is_err(), "{extra}");
    }
}

#[test]
fn a_key_of_the_whole_name_comes_before_keys_with_dots_between_them() {
    let both = |first: &str, second: &str| format!(r#"{{"status":"DELIVERED",{first},{second}}}"#);
    let (whole, nested) = (r#""notification.messageId":"whole""#, r#""notification":{"messageId":"nested"}"#);
    for text in [both(whole, nested), both(nested, whole)] {
        assert_eq!(read(&text).unwrap().unwrap().key, ReceiptKey::Provider("whole".into()), "{text}");
    }
    // Only at the top.
    let text = r#"{"status":"DELIVERED","x":{"notification.messageId":"no"}}"#;
    assert!(read(text).is_err());
}

#[test]
fn f51_an_event_id_that_is_another_field_is_refused() {
    for (field, of) in
        [("notification.messageId", "provider_id"), ("ref", "message_id"), ("status", "status")]
    {
        let mapping = ReceiptMapping { event_id: path(field), ..mapping() };
        let refused = ReceiptFormat::new("sms".into(), mapping).unwrap_err();
        assert_eq!(refused, MappingError::SamePath(field.to_owned(), of));
    }
}

#[test]
fn two_fields_may_be_one_and_one_may_lie_in_another() {
    let mut mapping = mapping();
    mapping.provider_id = path("a");
    mapping.sent_at = path("a");
    mapping.carrier = path("b.c");
    mapping.response = path("b.c.d");
    let format = ReceiptFormat::new("sms".into(), mapping).unwrap();
    let read = |text: &str| format.read_object(text.as_bytes(), Around::default());
    let receipt = read(r#"{"a":"1","status":"0","b":{"c":"x"}}"#).unwrap().unwrap();
    assert_eq!((receipt.key, receipt.facts.sent_at), (ReceiptKey::Provider("1".into()), Some(UnixMs(1_000))));
    assert_eq!((receipt.facts.carrier.as_deref(), receipt.facts.response), (Some("x"), None));
    assert!(
        read(r#"{"a":"1","status":"0","b":{"c":{"d":"x"}}}"#).unwrap_err().contains("`b.c` is an object")
    );
}

#[test]
fn a_mapping_that_cannot_work_is_refused() {
    let base = mapping();
    let none = ReceiptMapping { message_id: None, provider_id: None, ..base.clone() };
    assert_eq!(none.check(), Err(MappingError::NoId));
    let idle = ReceiptMapping { statuses: [("READ".into(), StatusMeaning::Ignored)].into(), ..base };
    assert_eq!(idle.check(), Err(MappingError::NoFinalStatus));
    for text in ["", ".", "a.", ".a", "a..b", "a.b.c.d.e.f.g.h.i", "a\0"] {
        assert!(matches!(FieldPath::parse(text), Err(MappingError::Path(_))), "{text}");
    }
    assert_eq!(FieldPath::parse("a.b.c.d.e.f.g.h").unwrap().as_str(), "a.b.c.d.e.f.g.h");
}

fn read_file(
    kind: ReceiptFileFormat,
    text: &[u8],
    chunk: usize,
    max: usize,
) -> Result<ReadReceipts, ReceiptFileError> {
    let mut rows = ReceiptRows::new(format(), kind, "f".into(), 400);
    let mut read = ReadReceipts::default();
    let (mut buffer, mut rest) = (Vec::new(), text);
    loop {
        let (more, behind) = rest.split_at(chunk.min(rest.len()));
        buffer.extend_from_slice(more);
        rest = behind;
        let mut some = ReadReceipts::default();
        let consumed = rows.read(&buffer, rest.is_empty(), max, &mut some)?;
        buffer.drain(..consumed);
        assert!(some.len() <= max);
        let is_done = rest.is_empty() && buffer.is_empty();
        read.receipts.append(&mut some.receipts);
        read.rejects.append(&mut some.rejects);
        read.ignored += some.ignored;
        if is_done {
            assert_eq!(rows.rows(), read.len() as u64);
            return Ok(read);
        }
    }
}

fn sample(kind: ReceiptFileFormat) -> Vec<u8> {
    let mut text = Vec::new();
    match kind {
        ReceiptFileFormat::Ndjson => {
            for row in 1..=20 {
                let id = MessageId { row, ..ID };
                text.extend_from_slice(format!(r#"{{"ref":"{id}","status":"DELIVERED"}}"#).as_bytes());
                text.extend_from_slice(if row % 3 == 0 { b"\r\n\n" } else { b"\n" });
            }
            text.extend_from_slice(b"{\"nul\":\"\0\"}\n\xff\n{\"ref\":5}\n");
            text.extend_from_slice(&[b'x'; 1000]);
        }
        ReceiptFileFormat::Csv { .. } => {
            text.extend_from_slice(b"ref;delivery.providerResponse;status\n");
            for row in 1..=20 {
                let id = MessageId { row, ..ID };
                text.extend_from_slice(format!("{id};\"two\nlines; yes\";DELIVERED\r\n\n").as_bytes());
            }
            text.extend_from_slice(b"a;b\nx;\xff;READ\nmsg_1;;DELIVERED\n");
        }
    }
    text
}

const KINDS: [ReceiptFileFormat; 2] = [ReceiptFileFormat::Ndjson, ReceiptFileFormat::Csv { delimiter: b';' }];

#[test]
fn f52_in_a_file_only_the_bad_ones_are_rejected_each_with_its_line() {
    let places = |kind| {
        let read = read_file(kind, &sample(kind), 1 << 20, 1000).unwrap();
        assert_eq!(read.receipts.len(), 20);
        read.rejects.into_iter().map(|reject| (reject.place, reject.reason)).collect::<Vec<_>>()
    };
    let [nul, utf8, id, long] = &places(KINDS[0])[..] else { panic!("{:?}", places(KINDS[0])) };
    assert_eq!([&*nul.0, &*utf8.0, &*id.0, &*long.0], ["f:27", "f:28", "f:29", "f:30"]);
    assert!(nul.1.contains("NUL") && utf8.1.contains("UTF-8") && id.1.contains("`status` is missing"));
    assert!(long.1.contains("1000 bytes"), "{}", long.1);
    let [count, utf8, id] = &places(KINDS[1])[..] else { panic!("{:?}", places(KINDS[1])) };
    assert_eq!([&*count.0, &*utf8.0, &*id.0], ["f:62", "f:63", "f:64"]);
    assert!(count.1.contains("expected 3 cells") && utf8.1.contains("column 2"), "{count:?}");
    assert!(id.1.contains("`ref` is \"msg_1\""), "{}", id.1);
}

#[test]
fn a_cell_says_what_a_key_says() {
    let kind = KINDS[1];
    let text = format!("event;ref;status;sent;delivery.priceInUSD;x\ne-1;{ID};QUEUED;1700000000;0.5;y\n");
    let read = read_file(kind, text.as_bytes(), 1000, 10).unwrap();
    let [receipt] = &read.receipts[..] else { panic!("{read:?}") };
    assert_eq!(receipt.event, EventId::named("sms", "e-1").saying(receipt));
    assert_eq!(receipt.state, MessageState::Sent);
    assert_eq!(receipt.facts.sent_at, Some(UnixMs(1_700_000_000_000)));
    assert_eq!((receipt.facts.price, &receipt.facts.carrier), (Some(Price(50_000_000)), &None));
}

#[test]
fn a_file_that_can_bring_no_receipt_is_refused_as_a_whole() {
    let why = |text: &str| read_file(KINDS[1], text.as_bytes(), 99, 9).unwrap_err().to_string();
    let no_status = why("ref;state\n");
    assert_eq!(
        no_status,
        "line 1: no column is named `status`; the header has 2 columns, namely: ref, state"
    );
    let state = FileState::Failed(no_status);
    let logged = state.reason_to_log();
    assert_eq!(logged, Some("line 1: no column is named `status`; the header has 2 columns"), "I10");
    let why = why("status;id\nDELIVERED;1\n");
    let says = "`ref` or `notification.messageId`; the header has 2 columns, namely: status, id";
    assert!(why.contains(says), "{why}");
    assert!(read_file(KINDS[0], b"\xff\xfe{\0", 99, 9).unwrap_err().to_string().contains("UTF-16"));
}

#[test]
fn a_file_is_gone_on_with_behind_what_was_taken() {
    for kind in KINDS {
        let text = sample(kind);
        let all = read_file(kind, &text, text.len(), 1000).unwrap();
        for skip in [0, 1, 19, 20, 21, 23] {
            let mut rows = ReceiptRows::new(format(), kind, "f".into(), 400).skip_rows(skip);
            let mut read = ReadReceipts::default();
            assert_eq!(rows.read(&text, true, 1000, &mut read).unwrap(), text.len());
            let receipts = &all.receipts[(skip as usize).min(20)..];
            assert_eq!(read.receipts, receipts);
            assert_eq!(read.rejects, all.rejects[(skip as usize).saturating_sub(20)..], "{skip}");
        }
    }
}

#[test]
fn a_body_is_one_receipt_or_an_array_of_them() {
    let one = format!(r#"{{"ref":"{ID}","status":"DELIVERED"}}"#);
    let body = |text: &str, max| format().read_body(text.as_bytes(), max, |item| format!("#{item}"));
    assert_eq!(body(&format!("\n {one}\r\n"), 1).unwrap().receipts.len(), 1);
    let read = body(&format!(r#"[{one}, 5, {{"status":"READ"}}, {{"ref":"x","status":"0"}}]"#), 4).unwrap();
    assert_eq!((read.receipts.len(), read.ignored, read.len()), (1, 1, 4));
    let places: Vec<_> = read.rejects.iter().map(|reject| &*reject.place).collect();
    assert_eq!(places, ["#1", "#3"]);
    assert!(body("[]", 1).unwrap().is_empty());
    assert_eq!(body(&format!("[{one},{one}]"), 1), Err(BodyError::TooMany { found: 2, max: 1 }));
    let cut = &one[..one.len() - 1];
    for bad in ["", "  ", "nonsense", "\"text\"", "[", "[1,]", "[{}] x", cut, "{", "{} x", "{\"a\":}"] {
        assert!(matches!(body(bad, 9), Err(BodyError::Invalid(_))), "{bad}");
    }
    let read = body("{}", 1).unwrap();
    assert_eq!(read.rejects.len(), 1, "JSON that is not a receipt is rejected");
}

#[test]
fn a_notification_is_unwrapped_and_nothing_else() {
    let text =
        r#"{"Type":"Notification","MessageId":"1","TopicArn":"arn:x","Message":"{\"a\":\"\\u00e9\"}"}"#;
    assert_eq!(notification(text.as_bytes()).as_deref(), Some(r#"{"a":"\u00e9"}"#));
    for other in [
        r#"{"Type":"Notification"}"#,
        r#"{"Type":"SubscriptionConfirmation","TopicArn":"arn:x","Message":"Notification"}"#,
        r#"{"Type":"Notification","TopicArn":"arn:x","Message":{}}"#,
        r#"["Notification"]"#,
        "",
    ] {
        assert_eq!(notification(other.as_bytes()), None, "{other}");
    }
}

proptest! {
    #[test]
    fn how_a_file_is_cut_into_pieces_never_matters(chunk in 1usize..500, max in 1usize..30) {
        for kind in KINDS {
            let text = sample(kind);
            prop_assert_eq!(read_file(kind, &text, chunk, max).unwrap(), read_file(kind, &text, text.len(), 1000).unwrap());
        }
    }

    #[test]
    fn whatever_comes_is_read_or_refused(text: Vec<u8>) {
        let _ = format().read_object(&text, Around::default()); // it must not panic
        let _ = format().read_body(&text, 10, |item| item.to_string());
        let _ = notification(&text);
        for kind in KINDS {
            let _ = read_file(kind, &text, 7, 3);
        }
    }
}
