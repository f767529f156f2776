use ratatui::{Terminal, backend::TestBackend};
use serde_json::json;

use super::{super::draw::draw, *};

fn seen(view: usize, rows: Vec<Value>, total: Option<u64>) -> Seen {
    let overview = json!({
        "open": 48_211, "done_at": "2026-11-30T18:22:04.071Z", "sent_per_s": 512.4, "dead": 0, "failed_percent": null,
        "ceiling": { "text": "rate_per_s = 500" }, "ceiling_of": "push", "alarms": [],
    });
    Seen { view, overview, rows, total }
}

fn file(name: &str, rows: u64) -> Value {
    json!({ "id": format!("id-of-{name}"), "feed": "f", "name": name, "state": "sending", "rows": rows, "percent": 12.5,
            "left_s": null, "ceiling": { "text": "rate_per_s = 500", "remedy": "raise it" } })
}

fn press(top: &mut Top, keys: &str) -> Effect {
    let mut effect = Effect::Draw;
    for key in keys.chars() {
        let code = match key {
            '\n' => KeyCode::Enter,
            '\u{1b}' => KeyCode::Esc,
            '\t' => KeyCode::Tab,
            key => KeyCode::Char(key),
        };
        effect = top.press(KeyEvent::new(code, KeyModifiers::NONE));
    }
    effect
}

fn screen(top: &Top, width: u16) -> String {
    let mut terminal = Terminal::new(TestBackend::new(width, 30)).unwrap();
    terminal.draw(|frame| draw(top, frame)).unwrap();
    terminal.backend().to_string()
}

fn top(files: &[(&str, u64)]) -> Top {
    let mut top = Top::new();
    top.see(seen(0, files.iter().map(|(name, rows)| file(name, *rows)).collect(), None));
    top
}

#[test]
fn the_answer_comes_first_and_what_is_not_known_is_no_number() {
    let top = top(&[("spring.csv", 1_000_000)]);
    let screen = screen(&top, 140);
    for words in [
        "48,211 messages are open; about 18:22:04Z they are sent.",
        "push: rate_per_s = 500",
        "No alarm.",
        "1,000,000",
        "– % of attempts fail",
        "Showing 1",
    ] {
        assert!(screen.contains(words), "{words}: {screen}");
    }
}

#[test]
fn without_contact_it_claims_nothing() {
    let mut top = top(&[("spring.csv", 5)]);
    top.lost = Some("connection refused".to_owned());
    let screen = screen(&top, 140);
    assert!(screen.contains("No contact with the daemon (connection refused)"), "{screen}");
    assert!(!screen.contains("they are sent") && !screen.contains("No alarm."), "{screen}");
}

#[test]
fn what_is_chosen_stays_chosen_when_rows_move() {
    let mut top = top(&[("a", 1), ("b", 2), ("c", 3)]);
    press(&mut top, "j");
    assert_eq!(top.place(), Some(1));
    top.see(seen(0, vec![file("new", 9), file("a", 1), file("b", 2)], None));
    assert_eq!(top.place(), Some(2));
    // It is gone: the first is.
    top.see(seen(0, vec![file("new", 9)], None));
    assert_eq!(top.place(), Some(0));
    // What belongs to another view changes no row.
    top.see(seen(1, vec![json!({ "name": "push" })], None));
    assert_eq!(top.rows().len(), 1);
    assert_eq!(top.rows()[0]["name"], "new");
}

#[test]
fn rows_are_sorted_by_any_column_with_the_unknown_last() {
    let mut top = top(&[("a", 10), ("b", 9), ("c", 100)]);
    let mut unknown = file("d", 0);
    unknown["rows"] = Value::Null;
    let mut rows: Vec<_> = top.rows().into_iter().cloned().collect();
    rows.insert(0, unknown);
    top.see(seen(0, rows, None));
    let names =
        |top: &Top| top.rows().iter().map(|row| row["name"].as_str().unwrap().to_owned()).collect::<String>();
    assert_eq!(names(&top), "dabc", "as the daemon lists them");
    press(&mut top, "sssss");
    assert_eq!((names(&top), top.sorted), ("cabd".to_owned(), Some((4, true))));
    press(&mut top, "S");
    assert_eq!(names(&top), "bacd");
    press(&mut top, &"s".repeat(VIEWS[0].columns.len() - 4));
    assert_eq!((names(&top), top.sorted), ("dabc".to_owned(), None));
}

#[test]
fn a_filter_narrows_and_a_cut_list_says_so() {
    let mut top = top(&[("spring.csv", 1), ("autumn.csv", 2)]);
    press(&mut top, "/aut");
    assert!(screen(&top, 120).contains("Filter: aut_"));
    press(&mut top, "\n");
    assert_eq!(top.rows().len(), 1);
    assert!(screen(&top, 120).contains("Showing 1 of 2   filter: aut"), "{}", screen(&top, 120));
    press(&mut top, "\u{1b}");
    assert_eq!(top.rows().len(), 2);
    top.see(seen(0, vec![file("a", 1)], Some(48_211)));
    assert!(screen(&top, 120).contains("Showing 1 of 48,211"));
}

#[test]
fn a_verb_waits_for_a_yes_and_what_is_final_for_the_name() {
    let mut top = top(&[("spring.csv", 1)]);
    press(&mut top, "h");
    assert!(screen(&top, 120).contains("hold spring.csv: nothing more of it goes until it is released"));
    assert_eq!(press(&mut top, "n"), Effect::Draw);
    assert_eq!(top.mode, Mode::Table);
    let Effect::Give(order) = press(&mut top, "hy") else { panic!("it was confirmed") };
    assert_eq!(order.path, ["files", "id-of-spring.csv", "hold"]);
    press(&mut top, "c");
    assert!(screen(&top, 120).contains("Type its name, spring.csv"));
    assert_eq!(press(&mut top, "y\n"), Effect::Draw, "a yes is not enough");
    press(&mut top, "\u{1b}c");
    let Effect::Give(order) = press(&mut top, "spring.csv\n") else { panic!("it was named") };
    assert_eq!(order.path[2], "cancel");
    assert_eq!(press(&mut top, "x"), Effect::Draw, "no verb of files");
}

#[test]
fn a_redrive_takes_the_whole_group_and_says_how_many() {
    let mut top = Top::new();
    assert_eq!(press(&mut top, "3"), Effect::Look);
    let group = json!({ "file": "00ff", "file_name": "spring.csv", "destination": "push", "reason": "status", "status": 500,
                        "cause": "attempts", "messages": 48_211 });
    top.see(seen(2, vec![group], None));
    press(&mut top, "R");
    assert!(screen(&top, 120).contains("redrive 48,211 messages of spring.csv"));
    let Effect::Give(Order { path, body }) = press(&mut top, "y") else { panic!("it was confirmed") };
    assert_eq!(path, ["dead", "redrive"]);
    let filter = json!({ "file": "00ff", "destination": "push", "reason": "status", "status": 500, "cause": "attempts" });
    assert_eq!(body, filter);
}

#[test]
fn one_thing_is_shown_with_all_that_is_known_of_it() {
    let mut top = top(&[("spring.csv", 1)]);
    assert_eq!(press(&mut top, "\n"), Effect::LookAt(vec!["files".into(), "id-of-spring.csv".into()]));
    let mut one = file("spring.csv", 1);
    one["destinations"] = json!({ "push": { "sent": 1, "dead": 0, "retrying": 0, "pending": 2,
                                            "held": { "reason": "31 % 404" } } });
    top.see_one(one);
    let screen = screen(&top, 120);
    for words in ["raise it", "at push", "1 sent, 0 dead, 0 retrying, 2 pending – 31 % 404"] {
        assert!(screen.contains(words), "{words}: {screen}");
    }
    press(&mut top, "jj");
    let scrolled = self::screen(&top, 120);
    assert!(!scrolled.contains("feed  ") && scrolled.contains("raise it"), "{scrolled}");
    assert!(matches!(press(&mut top, "h"), Effect::Draw));
    assert!(matches!(top.mode, Mode::Confirm(_)), "verbs work here too");
    press(&mut top, "\u{1b}");
    assert_eq!(press(&mut top, "\t"), Effect::Look);
    assert_eq!(top.shows().name, "Destinations");
}

#[test]
fn a_file_that_was_never_registered_can_not_be_steered() {
    let mut top = Top::new();
    let mut unread = file("unread.csv", 0);
    unread["id"] = Value::Null;
    top.see(seen(0, vec![unread], None));
    assert_eq!(press(&mut top, "h"), Effect::Draw);
    assert_eq!(top.mode, Mode::Table);
    assert!(screen(&top, 120).contains("it was never registered"));
}

#[test]
fn f27_names_can_not_drive_the_terminal_and_any_size_is_drawn() {
    let mut top = top(&[("a\u{1b}[2J\nb.csv", 1)]);
    for mode in ["", "c", "\u{1b}?", "\n\n", "/\u{7}"] {
        press(&mut top, mode);
        for width in [1, 20, 80, 200] {
            let screen = screen(&top, width);
            assert!(!screen.replace('\n', "").contains(char::is_control), "{screen:?}");
        }
    }
}
