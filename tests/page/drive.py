#!/usr/bin/env python3
"""Drives the operator's page in a real headless Chromium: `drive.py SCENARIO URL [KEY=VALUE…]`.

Each scenario does what a person would, and fails with what was on the page. Every one of them also fails on a script
error, on a breach of the content security policy, and on a dialog that a script opened (F56). `POSTRIDER_SHOTS` names a
directory for screenshots.
"""

import os
import pathlib
import re
import sys
import time

from playwright.sync_api import expect, sync_playwright

WITHIN_MS = 20_000
VIEWS = ["now", "files", "dead", "destinations", "pipeline", "receipts", "alarms", "audit", "find", "more"]


class Page:
    """A browser at the page, and what must never happen in it."""

    def __init__(self, browser, url, token=None, **context):
        self.context = browser.new_context(**{"viewport": {"width": 1360, "height": 850}, **context})
        self.url = url
        self.wrong = []
        self.page = self.context.new_page()
        self.page.set_default_timeout(WITHIN_MS)
        self.page.on("pageerror", lambda error: self.wrong.append(f"script: {error}"))
        self.page.on("console", lambda line: self.wrong.append(line.text) if line.type == "error" and "401" not in line.text else None)
        self.page.on("dialog", lambda dialog: (self.wrong.append(f"a script opened: {dialog.message}"), dialog.dismiss()))
        # All it asks for must be at its own place.
        self.page.on("request", lambda request: None if request.url.startswith(url) else self.wrong.append(f"asked {request.url}"))
        self.page.add_init_script(
            "window.shifts = []; new PerformanceObserver((list) => list.getEntries().forEach((e) => e.hadRecentInput || shifts.push([e.value, ...e.sources.map((s) => `${s.node?.parentElement?.className}>${s.node?.nodeName}.${s.node?.className}: ${s.node?.textContent?.slice(0, 40)}`)])))"
            ".observe({ type: 'layout-shift', buffered: true });")
        self.page.goto(url)
        if token:
            self.page.get_by_role("textbox", name="Token").fill(token)
            self.page.keyboard.press("Enter")
        expect(self.page.locator(".live")).to_contain_text("live", timeout=WITHIN_MS)

    def go(self, view):
        self.page.evaluate("(hash) => { location.hash = hash; }", f"/{view}")
        self.page.wait_for_timeout(100)

    def see(self, where, text):
        expect(self.page.locator(where).first).to_contain_text(text, timeout=WITHIN_MS)

    def press(self, *keys):
        for key in keys:
            self.page.keyboard.press(key)

    def shot(self, name):
        if shots := os.environ.get("POSTRIDER_SHOTS"):
            self.page.screenshot(path=f"{shots}/{name}.png")

    def confirm(self, verb):
        """Says yes to the dialog by keyboard alone: focus begins on what changes nothing."""
        dialog = self.page.locator("dialog[open]")
        expect(dialog.locator(":focus")).to_have_count(1)
        focused = dialog.locator(":focus").inner_text()
        assert focused.startswith("Keep as it is"), f"focus begins on {focused!r}"
        button = dialog.get_by_role("button", name=re.compile(verb))
        while not button.evaluate("(it) => it === document.activeElement"):
            self.press("Tab")
        self.press("Enter")
        expect(dialog).to_have_count(0, timeout=60_000)

    def done(self):
        assert not self.wrong, self.wrong
        self.context.close()


def progress(it, name):
    """The percent of a file grows, and nothing on the page moves meanwhile."""
    row = it.page.locator("#view .t-files .row", has_text=name).first
    expect(row).to_be_visible(timeout=WITHIN_MS)
    it.page.wait_for_timeout(1_500)
    it.page.evaluate("shifts.length = 0")
    percent = lambda: float(row.locator(".prog b").inner_text().split()[0])
    # What binds now, and what to do about it, in the words of the status.
    def binds():
        ceiling = it.page.evaluate("fetch('/api/v1/overview').then((answer) => answer.json()).then((overview) => overview.ceiling)")
        return [ceiling["text"], ceiling["remedy"]]

    end = time.monotonic() + WITHIN_MS / 1_000
    while not all(words and words in it.page.locator(".because").inner_text() for words in binds()):
        assert time.monotonic() < end, (binds(), it.page.locator(".because").inner_text())
        it.page.wait_for_timeout(200)
    before, end = percent(), time.monotonic() + 15
    while percent() <= before:
        assert time.monotonic() < end, f"it stays at {before} %"
        it.page.wait_for_timeout(200)
    it.page.wait_for_timeout(3_000)
    assert percent() > before
    shifts = it.page.evaluate("shifts")
    assert sum(shift[0] for shift in shifts) < 0.001, f"layout shifts: {shifts}"
    it.shot("now")
    row.get_by_role("link").first.click()
    it.see("h1", name)
    it.see(".ledger .ver", "Balanced so far")
    it.shot("file")


def steer(it, destination):
    """A destination is paused, by keyboard, and resumed; both are in its audit."""
    it.go(f"destinations/{destination}")
    it.press("p")
    it.see("dialog[open] h2", f"Pause {destination}?")
    it.press("Escape")
    expect(it.page.locator("dialog[open]")).to_have_count(0)
    it.press("p")
    it.confirm("^Pause$")
    it.see("h1", f"{destination} is paused")
    it.see(".toast", "In the audit")
    it.shot("paused")
    it.press("p")
    it.confirm("^Resume$")
    expect(it.page.locator("h1")).not_to_contain_text("is paused", timeout=WITHIN_MS)
    it.see(".t-audit", "pause")


def release(it, name):
    """A file that its canary held is released from where it is seen."""
    it.go("files")
    row = it.page.locator("#view .row", has_text=name).first
    expect(row).to_contain_text("held", timeout=WITHIN_MS)
    it.shot("held")
    row.get_by_role("button", name="Release").focus()
    it.press("Enter")
    it.confirm("^Release$")
    expect(row).not_to_contain_text("Release", timeout=WITHIN_MS)


def redrive(it, count, status):
    """All dead letters that match are sent again by one action, whose dialog says how many."""
    words = f"{int(count):,}"
    it.go("dead")
    it.see("h1", "dead letters")
    it.page.locator("select[name=status]").select_option(status)
    it.see(".match", words)
    it.see(".foot", f"of {words}")
    it.shot("dead")
    it.page.locator("h1").click()
    it.press("R")
    it.see("dialog[open] h2", f"Redrive {words} messages?")
    it.shot("redrive")
    it.confirm(f"^Redrive {words}$")
    it.see(".toast", f"{words} messages redriven")
    it.see("h1", "No dead letters")


def alarm(it, words, state):
    """An alarm is seen as raised, in one line that is always there, and later as cleared."""
    if state == "raised":
        expect(it.page.locator(".alarmline").first).to_contain_text("alarm", timeout=60_000)
        it.go("alarms")
        expect(it.page.locator("section[aria-label=Raised]")).to_contain_text(words, timeout=60_000)
        it.shot("alarm")
    else:
        it.go("alarms")
        expect(it.page.locator("section[aria-label=Cleared]")).to_contain_text(words, timeout=90_000)


def keyboard(it, name):
    """Everything is reached without a mouse."""
    titles = ["", "Files", "dead letter", "", "", "eceipt", "larm", "Audit"]
    for number, title in enumerate(titles, start=1):
        it.press(str(number))
        expect(it.page.locator("nav [aria-current=page]").first).to_have_attribute("title", f"key {number}")
        it.see("h1", title)
    it.press("2")
    expect(it.page.locator("#view .row").first).to_be_visible(timeout=WITHIN_MS)
    it.press("j", "j", "k")
    assert it.page.evaluate("document.activeElement.matches('#view .row .name')"), "j and k move through the rows"
    while name not in it.page.evaluate("document.activeElement.closest('.row').innerText"):
        it.press("j")
    it.press("Enter")
    it.see("h1", name)
    it.press("Escape")
    it.see("h1", "Files")
    it.press("/")
    expect(it.page.locator("#find")).to_be_focused()
    it.press("Tab", "Shift+Tab")
    it.page.locator("h1").click()
    it.press("?")
    it.see("dialog[open] h2", "Keys")
    it.press("Escape")
    before = it.page.evaluate("getComputedStyle(document.body).backgroundColor")
    it.press("t")
    assert it.page.evaluate("getComputedStyle(document.body).backgroundColor") != before, "t turns the theme"
    it.press("5")
    # Mailboxes and busy shares come once they are measured.
    parser = it.page.locator(".pipe .nd", has_text="parser")
    expect(parser).to_contain_text(re.compile(r"mailbox \d+ / \d+.*busy \d+ %", re.S), timeout=WITHIN_MS)
    it.shot("pipeline")
    it.press("1")
    it.press("f")
    it.see(".live", "frozen")
    it.press("f")
    it.see(".live", "live")
    it.press("1")
    chart = it.page.get_by_role("slider", name=re.compile("Throughput")).first
    chart.focus()
    it.press("ArrowLeft", "ArrowLeft")
    assert re.match(r"\d\d:", chart.get_attribute("aria-valuetext")), chart.get_attribute("aria-valuetext")


def many(it, total):
    """10,000 files: few are drawn, all are reached, and the footer says how many there are."""
    words = f"{int(total):,}"
    it.go("files")
    it.see(".foot", f"{words} files")
    rows = it.page.locator("#view .row")
    expect(rows.first).to_be_visible(timeout=WITHIN_MS)
    end = time.monotonic() + 120
    while f"Showing {words} of" not in it.page.locator(".foot").inner_text():
        assert time.monotonic() < end, it.page.locator(".foot").inner_text()
        it.page.evaluate("scrollTo(0, document.documentElement.scrollHeight)")
        it.page.wait_for_timeout(50)
        assert rows.count() < 120, f"{rows.count()} rows are drawn"
    it.page.evaluate("scrollTo(0, document.documentElement.scrollHeight / 2)")
    it.page.wait_for_timeout(300)
    assert 5 < rows.count() < 120, f"{rows.count()} rows are drawn"
    begun = time.monotonic()
    for _ in range(30):
        it.press("j")
    assert time.monotonic() - begun < 15
    it.page.locator("input[name=q]").fill("-00042")
    it.see(".foot", "Showing 1 of ")


def text(it, name, recipient, answer, row):
    """F27, F56: what a file is called, who a row is for, what is rejected and what a receiver answers is shown as text."""
    for view in ["now", "files"]:
        it.go(view)
        it.see("#view", name)
    it.page.locator("#view .row .name").first.click()
    rejected = "section[aria-label='Rejected rows']"
    for words in [row, "the recipient holds a control character", "user-2\\u{202e}\\u{7}"]:
        it.see(f"{rejected} table", words)
    it.see(f"{rejected} .foot", "Showing 2 of 2 rejected rows")
    it.shot("rejected")
    it.go("dead")
    it.see("#view .t-letters", recipient)
    it.see("#view .t-letters", name)
    for table in [".t-groups", ".t-letters"]:
        it.see(f"#view {table}", answer)
    it.page.locator("#view .t-letters .name").first.click()
    it.see("#view", recipient)
    it.see("#view .ev", answer)
    for view in VIEWS:
        it.go(view)
        it.page.wait_for_timeout(500)
        assert it.page.locator("#app img, #app script, #app iframe, #app object").count() == 0, view
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202e]", it.page.locator("#app").inner_text()), view


def axe(it):
    """axe finds nothing serious, in dark and light, wide and narrow; nothing is wider than a phone."""
    source = pathlib.Path(os.environ["POSTRIDER_AXE"]).read_text()
    browser, url = it.context.browser, it.url
    found = []
    for scheme in ["light", "dark"]:
        for width in [1360, 400, 360]:
            at = Page(browser, url, color_scheme=scheme, viewport={"width": width, "height": 800}, bypass_csp=True)
            at.page.evaluate(source)
            links = at.page.eval_on_selector_all("#view .row .name", "(all) => all.map((it) => it.hash).filter(Boolean)")
            details = [next((link[2:] for link in links if link.startswith(f"#/{view}/")), None) for view in ["files", "destinations"]]
            for view in [*VIEWS, *filter(None, details)]:
                at.go(view)
                at.page.wait_for_timeout(700)
                at.shot(f"{view.split('/')[0] + ('-one' if '/' in view else '')}-{scheme}-{width}")
                result = at.page.evaluate("axe.run(document, { runOnly: ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa', 'best-practice'] })")
                assert len(result["passes"]) > 15, "axe looked at something"
                found += [f"{scheme} {width} {view}: {it['impact']} {it['id']}: {it['nodes'][0]['html'][:200]}" for it in result["violations"]]
                wide = at.page.evaluate("document.documentElement.scrollWidth")
                assert wide <= width, f"{view} is {wide} px wide at {width}"
                unsaid = at.page.locator("#view table.t:not([role=table]), #view table.t tr:not([role=row]), #view table.t td:not([role=cell])").count()
                assert unsaid == 0, f"{view}: a table that a phone would lose"
            at.done()
    assert not found, "\n".join(found)


def token(it, token):
    """Without a token it asks for one; it keeps it for the tab, and never as a cookie or in an address."""
    it.go("files")
    it.see("h1", "Files")
    assert it.context.cookies() == [], "no cookie"
    assert token not in it.page.url and it.page.evaluate("localStorage.length") == 0
    it.page.reload()
    it.see(".live", "live")


def main():
    scenario, url, *rest = sys.argv[1:]
    values = dict(item.split("=", 1) for item in rest)
    executable = os.environ.get("POSTRIDER_CHROMIUM", "/usr/bin/chromium")
    with sync_playwright() as playwright:
        # Without its sandbox, because a container's root has none; it sees nothing but our own page.
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"])
        it = Page(browser, url, token=values.get("token"))
        try:
            globals()[scenario](it, **values)
            it.done()
        except Exception:
            print(it.page.locator("body").inner_text()[:3_000], it.wrong, sep="\n", file=sys.stderr)
            raise
        finally:
            browser.close()


if __name__ == "__main__":
    main()
