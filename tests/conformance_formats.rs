//! The parsers judged by corpora that other people made. See `tests/corpus/README.md`.

use std::{collections::BTreeMap, fs, path::PathBuf};

use postrider_actors::model::{
    batch::MessageData,
    formats::{Format, RowBlock, RowParser},
};

fn corpus(name: &str) -> PathBuf {
    let dir = std::env::var_os("POSTRIDER_CORPORA")
        .expect("POSTRIDER_CORPORA names the directory that `script/fetch-corpora DIR` filled");
    let path = PathBuf::from(dir).join(name);
    assert!(path.is_dir(), "{} is missing: run `script/fetch-corpora DIR`", path.display());
    path
}

fn csv(recipient: &str) -> Format {
    Format::Csv { delimiter: b',', recipient: recipient.into() }
}

/// The rows of a CSV file as objects of text.
fn read_csv(bytes: &[u8], recipient: &str) -> Vec<BTreeMap<String, String>> {
    let mut parser = RowParser::new(&csv(recipient), 65536);
    let mut block = RowBlock::new(1000);
    assert_eq!(parser.parse(bytes, true, &mut block).unwrap(), bytes.len());
    assert!(block.rejects.is_empty(), "{:?}", block.rejects);
    let layout = parser.layout().unwrap();
    let object = |bytes| match layout.read(bytes).unwrap().data {
        MessageData::Columns(names, cells) => names.iter().cloned().zip(cells.map(str::to_owned)).collect(),
        other => panic!("{other:?}"),
    };
    block.iter().map(|(_, bytes)| object(bytes)).collect()
}

#[test]
#[ignore = "needs script/fetch-corpora"]
fn csv_spectrum() {
    let dir = corpus("csv-spectrum");
    let mut judged = 0;
    for entry in fs::read_dir(dir.join("csvs")).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_stem().unwrap().to_string_lossy().into_owned();
        // The corpus's own slip: the JSON beside it is of another row.
        if name == "location_coordinates" {
            let rows = read_csv(&fs::read(&path).unwrap(), "Cities");
            assert_eq!((rows.len(), rows[0]["Contact Phone Number"].as_str()), (1, "2095257564"));
            continue;
        }
        let json = fs::read(dir.join(format!("json/{name}.json"))).unwrap();
        let expected: Vec<BTreeMap<String, String>> = serde_json::from_slice(&json).unwrap();
        let bytes = fs::read(&path).unwrap();
        // Any column will do for the recipient whose cells may be one: not empty, no line break.
        let mut columns = expected[0].keys();
        let fits = |column: &&String| {
            expected.iter().all(|row| !row[*column].is_empty() && !row[*column].contains(char::is_control))
        };
        let recipient = columns.find(fits).unwrap_or_else(|| panic!("{name} has no such column"));
        assert_eq!(read_csv(&bytes, recipient), expected, "{name}");
        judged += 1;
    }
    assert!(judged >= 11, "the corpus has {judged} files only");
}

/// Why a row that holds nothing but `line` is rejected; `None` if it is accepted.
fn verdict(line: &str) -> Option<String> {
    let mut parser = RowParser::new(&Format::Ndjson { recipient: "who".into() }, 1 << 20);
    let mut block = RowBlock::new(1000);
    assert_eq!(parser.parse(line.as_bytes(), true, &mut block).unwrap(), line.len());
    assert_eq!(block.rows.len() + block.rejects.len(), 1, "{line}");
    block.rejects.pop().map(|reject| reject.reason)
}

#[test]
#[ignore = "needs script/fetch-corpora"]
fn json_test_suite() {
    #[derive(serde::Deserialize)]
    struct Case {
        name: String,
        input: String,
    }
    let text = fs::read_to_string(corpus("json-test-suite").join("data/parsing.js")).unwrap();
    let json = text.split_once("export default").expect("it is a JavaScript module of one array").1;
    let cases: Vec<Case> = serde_json::from_str(json.trim().trim_end_matches(';')).unwrap();
    // Stricter than the suite, and said so in docs/formats.md: readers disagree about which one counts.
    let twice = ["y_object_duplicated_key.json", "y_object_duplicated_key_and_value.json"];
    let (mut accepted, mut refused) = (0, 0);
    for Case { name, input } in cases {
        // A row has no line breaks, and a text that lost its bytes says nothing.
        let input = input.trim_matches(['\n', '\r', ' ', '\t']);
        if input.contains(['\n', '\u{fffd}']) {
            continue;
        }
        // The text as the value of a key.
        let verdict_inside = verdict(&format!("{{\"who\":1,\"x\":{input}}}"));
        if name.starts_with("y_") && !twice.contains(&name.as_str()) {
            assert_eq!(verdict_inside, None, "{name}");
            accepted += 1;
            // The object itself: nothing is wrong with it but that it has no recipient.
            if input.starts_with('{') {
                assert!(verdict(input).unwrap().contains("no key `who`"), "{name}");
            }
        } else if !name.starts_with("i_") {
            assert!(verdict_inside.is_some(), "{name}");
            refused += 1;
            // A line of nothing or a mark alone is blank, which is no row.
            if !input.trim_start_matches('\u{feff}').is_empty() {
                assert!(verdict(input).is_some(), "{name}");
            }
        }
    }
    assert!(accepted >= 85 && refused >= 150, "the corpus has {accepted} and {refused} cases only");
}
