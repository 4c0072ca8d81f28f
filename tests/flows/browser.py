"""A real browser on the UI of a `nst serve`: what a person clicks, found by the words that are on the page."""

import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

from tests.flows.served import Served

FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
WIDE, NARROW, HEIGHT = 1440, 390, 900
PATIENCE_MS = 40_000  # for a page that two busy cores draw


@contextmanager
def open_browser() -> Iterator[Browser]:
    """The machine's Chromium or Chrome, else the one that Playwright installed; skips, saying so, where there is none."""
    expect.set_options(timeout=PATIENCE_MS)
    with sync_playwright() as playwright:
        own = shutil.which("chromium") or shutil.which("google-chrome")
        if own is None and not Path(playwright.chromium.executable_path).exists():
            pytest.skip("no chromium or google-chrome here, and none of Playwright's; `make test` installs one")
        browser = playwright.chromium.launch(executable_path=own, args=list(FLAGS))
        try:
            yield browser
        finally:
            browser.close()


class UI:
    """One window on a `nst serve`."""

    def __init__(self, browser: Browser, served: Served, pictures: Path, width: int = WIDE) -> None:
        self.page: Page = browser.new_page(viewport={"width": width, "height": HEIGHT}, timezone_id="UTC")
        self.page.set_default_timeout(PATIENCE_MS)
        self.broken: list[str] = []  # what the pages' scripts threw
        self.page.on("pageerror", lambda error: self.broken.append(str(error)))
        self._served, self._pictures, self._width = served, pictures, width

    def open(self, path: str) -> None:
        """Go to a page of the UI."""
        self.page.goto(f"http://127.0.0.1:{self._served.port}/v2/{path}")

    def picture(self, name: str) -> None:
        """Keep what the page looks like, all of it."""
        self.page.screenshot(path=self._pictures / f"{name}-{self._width}.png", full_page=True)

    def fits(self, part: Locator) -> bool:
        """Whether a part of the page is drawn within the window's width, which the page keeps to."""
        box = part.bounding_box()
        wide = self.page.evaluate("document.documentElement.scrollWidth")
        return (
            box is not None and box["width"] > 100 and box["x"] >= 0 and box["x"] + box["width"] <= self._width >= wide
        )

    def button(self, name: str) -> Locator:
        """A button, by all that is written on it."""
        return self.page.get_by_role("button", name=name, exact=True)

    def open_deployment(self, name: str) -> None:
        """A deployment's page, from the address that `nst serve` says."""
        (address,) = re.findall(r"UI: +(http\S+)", self._served.said)
        self.page.goto(address)
        self.page.get_by_role("link", name=name, exact=True).first.click()
        expect(self.button("Run")).to_be_visible()

    def open_form(self, deployment: str) -> None:
        """The form that runs a deployment, from its page."""
        self.open_deployment(deployment)
        self.button("Run").click()
        self.page.get_by_role("menuitem", name="Custom run").click()
        expect(self.button("Submit")).to_be_visible()

    def field(self, title: str) -> Locator:
        """A field of a form, with its title and description."""
        label = self.page.get_by_text(f"{title} (Optional)", exact=True)
        return self.page.locator("div.group").filter(has=label).last

    def choices(self, title: str) -> list[str]:
        """What a field with a list offers."""
        self.page.get_by_label(f"Select {title}", exact=True).click()
        options = self.page.get_by_role("option")
        expect(options.first).to_be_visible()
        found = options.all_inner_texts()
        self.page.keyboard.press("Escape")
        return found

    def choose(self, title: str, value: str) -> None:
        """Choose from a field's list."""
        select = self.page.get_by_label(f"Select {title}", exact=True)
        select.click()
        self.page.get_by_role("option", name=value, exact=True).click()
        expect(select).to_have_text(value)

    def write_list(self, title: str, values: Sequence[str]) -> None:
        """Add an entry for each value to a field that is a list."""
        field = self.field(title)
        entries = field.get_by_role("textbox")
        for value in values:
            n = entries.count()
            field.get_by_role("button", name="Add item").click()
            expect(entries).to_have_count(n + 1)
            entries.nth(n).fill(value)

    def copy_run(self, overrides: Sequence[str]) -> None:
        """Open the form as the run whose page is open had it, and see it filled in."""
        self.do("Copy to new run")
        entries = self.field("Overrides").get_by_role("textbox")
        expect(entries).to_have_count(len(overrides))
        assert [entry.input_value() for entry in entries.all()] == list(overrides)

    def submit(self) -> str:
        """Send the form, and follow the link to the run; its id. Looks away then."""
        expect(self.page.get_by_role("textbox", name="Run Name")).not_to_have_value("")
        self.button("Submit").click()
        self.page.get_by_role("link", name="View run").click()
        self.page.wait_for_url("**/runs/flow-run/*")
        run = self.page.url.partition("/flow-run/")[2][:36]
        self.look_away()
        return run

    def look_away(self) -> None:
        """Leave the page: the moving picture of a run that works takes half a core to draw."""
        self.page.goto("about:blank")

    def open_run(self, run: str, tab: str = "") -> None:
        """A run's page."""
        self.open(f"runs/flow-run/{run}" + (f"?tab={tab}" if tab else ""))
        expect(self.button("Open menu")).to_be_visible()

    def do(self, action: str) -> None:
        """Choose from the menu of the run whose page is open."""
        self.button("Open menu").click()
        self.page.get_by_role("menuitem", name=action, exact=True).click()

    def confirm(self, answer: str) -> None:
        """Answer what the UI asks before it does something, and see its question go."""
        asked = self.page.get_by_role("alertdialog")
        asked.get_by_role("button", name=answer, exact=True).click()
        expect(asked).to_have_count(0)
