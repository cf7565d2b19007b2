"""Helpers for tests of the page: a server, a Chromium page watched for errors, and scripts for it."""

from __future__ import annotations

import base64
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from odd_files import encoded, picture, save_pictures
from playwright.sync_api import Browser, Locator, Page, Request, Response, expect
from serving import write_model

from blip_fast.search import Index

SCREENSHOTS = Path(__file__).parents[2] / "runs" / "screenshots"
PATIENCE = 300_000  # milliseconds to wait for an expected state of the page

# Puts a PNG (a list of bytes) on the clipboard.
PASTE = """bytes => navigator.clipboard.write([
  new ClipboardItem({"image/png": new Blob([new Uint8Array(bytes)], {type: "image/png"})})])"""

# The DataTransfer of a browser when these files are dropped.
DROP = """files => {
  const transfer = new DataTransfer();
  for (const {name, mimeType, buffer} of files)
    transfer.items.add(new File([new Uint8Array(buffer)], name, {type: mimeType}));
  return transfer;
}"""

# Whether the focused element has an outline (a hidden control: its label has), and whether it is the one
# looked for.
FOCUS = """selector => {
  const focused = document.activeElement;
  const drawn = focused.classList.contains("unseen") ? document.querySelector(`label[for=${focused.id}]`) : focused;
  const {outlineStyle, outlineWidth} = getComputedStyle(drawn);
  return {what: focused.outerHTML.slice(0, 80), reached: focused.matches(selector),
          visible: focused === document.body || (outlineStyle !== "none" && parseFloat(outlineWidth) >= 2)};
}"""

# [contrast ratio, text] of all visible text, placeholders included (WCAG 2.2, relative luminance and contrast
# ratio).
CONTRAST = """() => {
  const rgba = colour => (colour.match(/[\\d.]+/g) ?? [0, 0, 0, 0]).map(Number);
  const luminance = colour => {
    const [r, g, b] = rgba(colour).map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = element => {
    for (let at = element; at; at = at.parentElement) {
      const [, , , alpha = 1] = rgba(getComputedStyle(at).backgroundColor);
      if (alpha === 1) return getComputedStyle(at).backgroundColor;
      if (alpha > 0) throw new Error("half transparent: " + at.outerHTML.slice(0, 80));
    }
  };
  const ratio = (element, colour) => {
    const [dark, light] = [luminance(colour), luminance(behind(element))].sort((a, b) => a - b);
    return (light + 0.05) / (dark + 0.05);
  };
  const found = [];
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const element = texts.currentNode.parentElement;
    if (!texts.currentNode.data.trim() || !element.checkVisibility() || element.closest(".unseen, noscript")) continue;
    found.push([ratio(element, getComputedStyle(element).color), texts.currentNode.data.trim()]);
  }
  for (const field of document.querySelectorAll("input:not(.unseen), textarea"))
    if (field.checkVisibility() && field.placeholder)
      found.push([ratio(field, getComputedStyle(field, "::placeholder").color), field.placeholder]);
  return found;
}"""

# Roles of the accessibility tree that must have names.
NAMED_ROLES = {"button", "link", "textbox", "searchbox", "combobox", "image", "img", "article",
               "group", "region", "heading"}


@dataclass
class Watched:
    """A page, its requests, and the errors that must not happen in it."""

    page: Page
    origin: str
    requests: list[Request] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    expected: set[int] = field(default_factory=set)  # error statuses that the test provokes

    def watch(self) -> None:
        self.page.on("request", lambda request: self.requests.append(request))
        self.page.on("response", self._see)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda message: self._hear(message.type, message.text))

    def sent(self, path: str) -> int:
        """The requests to a path so far."""
        return sum(urlsplit(request.url).path == path for request in self.requests)

    def change_info(self, **parts: dict) -> None:
        """Reload the page with other features or limits in /v1/info than the server's."""
        def change(route) -> None:
            info = route.fetch().json()
            route.fulfill(json={**info, **{name: {**info[name], **part} for name, part in parts.items()}})

        self.page.unroute_all()
        self.page.route("**/v1/info", change)
        open_page(self.page)

    def assert_clean(self) -> None:
        """No errors in the console, no exceptions, no unexpected 4xx or 5xx, no requests to other hosts."""
        assert self.errors == []
        own = (self.origin + "/", "blob:", "data:")
        assert [request.url for request in self.requests if not request.url.startswith(own)] == []

    def _see(self, response: Response) -> None:
        if response.status >= 400 and response.status not in self.expected:
            self.errors.append(f"{response.status} for {response.url}")

    def _hear(self, kind: str, text: str) -> None:
        # counted by `_see`
        if kind in ("error", "warning") and not text.startswith("Failed to load resource"):
            self.errors.append(text)


@contextmanager
def watched_page(browser: Browser, origin: str, name: str) -> Iterator[Watched]:
    """A page of the server at `origin`. At the end it must be clean; a screenshot is saved as `name`."""
    context = browser.new_context(base_url=origin, viewport={"width": 1200, "height": 900})
    context.set_default_timeout(PATIENCE)
    expect.set_options(timeout=PATIENCE)
    watched = Watched(context.new_page(), origin)
    watched.watch()
    open_page(watched.page)
    yield watched
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    watched.page.screenshot(path=SCREENSHOTS / f"{re.sub(r'[^a-z0-9]+', '_', name)}.png", full_page=True)
    watched.assert_clean()
    context.close()


def open_page(page: Page) -> None:
    """Load the page, and wait until it knows the server's features."""
    page.goto("/")
    page.get_by_text("blip_fast 0").wait_for()


def everything(directory: Path) -> tuple[object, ...]:
    """The arguments of a server with all features: random models, and an index of twelve pictures."""
    model = write_model(directory / "model", "tied")
    (directory / "photos").mkdir()
    index = Index.create(directory / "index", model, dtype="float32")
    index.add([save_pictures(directory / "photos", 12)])
    index.close()
    return ("--model", model, "--answerer", write_model(directory / "answerer", "untied"),
            "--index", directory / "index", "--explain", "--max-upload-mb", 1)


def post(origin: str, path: str, *files: dict, **fields: Any) -> Any:
    """The API's answer to another client, in another form than the page's."""
    images = [{"base64": base64.b64encode(file["buffer"]).decode()} for file in files]
    answer = httpx.post(origin + path, json={"images": images, **fields}, timeout=PATIENCE / 1000)
    assert answer.status_code == 200, answer.text
    return answer.json()


def chromium() -> str:
    """The system's browser. Skips the test if there is none."""
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("there is no chromium on the PATH (Debian: apt install chromium)")
    return path


def upload(name: str, seed: int = 0, width: int = 240, height: int = 160) -> dict:
    """A picture as `set_input_files` takes it."""
    return {"name": name, "mimeType": "image/png", "buffer": encoded(picture(width, height, seed), "PNG")}


def card(page: Page, name: str) -> Locator:
    return page.get_by_role("article", name=name)


def choose(page: Page, *files: dict) -> None:
    page.get_by_label("Choose pictures").set_input_files(list(files))


def captioned(page: Page, *names: str) -> None:
    """Wait until the cards have captions."""
    for name in names:
        expect(card(page, name)).to_have_attribute("data-state", "done")


def tab_to(page: Page, selector: str) -> None:
    """Press Tab until the element is focused. Every focused element on the way must be visibly focused."""
    for _ in range(60):
        page.keyboard.press("Tab")
        focus = page.evaluate(FOCUS, selector)
        assert focus["visible"], f"nothing shows that {focus['what']} has the focus"
        if focus["reached"]:
            return
    raise AssertionError(f"Tab does not reach {selector}")


def filled(page: Page) -> None:
    """Fill a page: a captioned card with answer, ranking and heat map, a refused one, and search hits."""
    choose(page, upload("a very long name of a picture " + 60 * "x" + ".png"),
           {"name": "notes.txt", "mimeType": "text/plain", "buffer": b"a dog"})
    here = page.get_by_role("article").first
    expect(here).to_have_attribute("data-state", "done")
    here.get_by_label("Ask a question").fill("how many " + 100 * "w" + "?")
    here.get_by_role("button", name="Ask").click()
    here.get_by_label("Which text").fill("a dog\n" + 100 * "o")
    here.get_by_role("button", name="Rank").click()
    expect(here.locator(".answers dt")).to_be_visible()
    expect(here.locator(".ranking li")).to_have_count(2)
    here.locator(".word").first.click()
    expect(here.locator("img.heat")).to_be_visible()
    page.get_by_role("searchbox").fill("a red ball")
    page.keyboard.press("Enter")
    expect(page.locator("#hits img").first).to_have_attribute("src", re.compile("blob:"))
