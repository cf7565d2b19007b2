"""The page of `blip-fast serve` in Chromium, with a small model: used by mouse, keyboard and clipboard, on a
phone, in dark mode, and with files that are not pictures. Screenshots are in runs/screenshots."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from itertools import pairwise

import pytest

pytest.importorskip("fastapi", reason="no server: pip install 'blip-fast[serve]'")
pytest.importorskip("playwright.sync_api", reason="no browser to drive: pip install 'blip-fast[dev]'")

import httpx
from playwright.sync_api import Browser, Page, expect, sync_playwright
from serve_browser import (
    CONTRAST,
    DROP,
    NAMED_ROLES,
    PASTE,
    Watched,
    captioned,
    card,
    choose,
    chromium,
    everything,
    filled,
    post,
    tab_to,
    upload,
    watched_page,
)
from serving import served


@pytest.fixture(scope="module")
def arguments(tmp_path_factory) -> tuple[object, ...]:
    return everything(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def origin(arguments) -> Iterator[str]:
    with served(*arguments) as server:
        yield server.wait()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium())
        yield browser
        browser.close()


@pytest.fixture
def watched(browser: Browser, origin: str, request) -> Iterator[Watched]:
    with watched_page(browser, origin, request.node.name) as watched:
        yield watched


@pytest.fixture
def page(watched: Watched) -> Page:
    return watched.page


def test_upload(page, origin):
    """A chosen picture is shown with the API's results: three captions, best first, and their scores."""
    file = upload("sea.png")
    choose(page, file)
    captioned(page, "sea.png")
    (row,) = post(origin, "/v1/caption", file, num=3)["results"]
    lines = card(page, "sea.png").locator(".captions li")
    assert lines.locator(".text").all_text_contents() == [caption["text"] for caption in row["captions"]]
    shown = [float(text.replace("−", "-")) for text in lines.locator(".number").all_text_contents()]
    assert shown == pytest.approx([caption["score"] for caption in row["captions"]], abs=0.006)
    assert len(shown) == 3
    image = card(page, "sea.png").locator("img.picture")
    assert image.evaluate("image => [image.naturalWidth, image.naturalHeight]") == [240, 160]
    expect(image).to_have_attribute("alt", row["captions"][0]["text"])
    expect(page.get_by_role("status")).to_have_text(f"sea.png: {row['captions'][0]['text']}")
    expect(page.locator("#progress")).to_have_text("1")


def test_options(page, origin):
    """The number of captions and the prompt are passed to the server."""
    file = upload("sea.png")
    page.get_by_label("Captions for each").select_option("2")
    page.get_by_label("Captions begin with").fill("two dogs")
    choose(page, file)
    captioned(page, "sea.png")
    (row,) = post(origin, "/v1/caption", file, num=2, prompt="two dogs")["results"]
    expected = [caption["text"] for caption in row["captions"]]
    assert card(page, "sea.png").locator(".captions .text").all_text_contents() == expected
    assert len(row["captions"]) == 2


def test_paste(page):
    """Ctrl+V with a picture on the clipboard; text pasted into a field remains text."""
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.evaluate(PASTE, list(upload("any")["buffer"]))
    page.keyboard.press("Control+v")
    captioned(page, "image.png")
    page.evaluate("navigator.clipboard.writeText('how many?')")
    question = card(page, "image.png").get_by_label("Ask a question")
    question.focus()
    page.keyboard.press("Control+v")
    expect(question).to_have_value("how many?")
    expect(page.get_by_role("article")).to_have_count(1)


def test_three_pictures_at_once(page, watched):
    """Dropped together, they are captioned in one request and shown in order; later ones come before them."""
    files = [upload(f"{name}.png", seed) for seed, name in enumerate(["one", "two", "three"])]
    transfer = page.evaluate_handle(DROP, [{**file, "buffer": list(file["buffer"])} for file in files])
    page.dispatch_event("#drop", "dragover", {"dataTransfer": transfer})
    expect(page.locator("#drop")).to_have_class("drop over")
    page.dispatch_event("#drop", "drop", {"dataTransfer": transfer})
    expect(page.locator("#drop")).to_have_class("drop")
    captioned(page, "one.png", "two.png", "three.png")
    assert watched.sent("/v1/caption") == 1
    choose(page, upload("four.png", 3))
    captioned(page, "four.png")
    names = page.get_by_role("article").locator(".name").all_text_contents()
    assert names == ["four.png", "one.png", "two.png", "three.png"]
    expect(page.locator("#progress")).to_have_text("4")


def test_more_pictures_than_a_request_may_hold(page, watched):
    """They are sent in several requests, one after another."""
    watched.change_info(limits={"images": 2})
    names = [f"{i}.png" for i in range(5)]
    choose(page, *[upload(name, seed, 40, 30) for seed, name in enumerate(names)])
    captioned(page, *names)
    assert watched.sent("/v1/caption") == 3


def test_removed(page):
    """A removed picture disappears, and the next one's button is focused."""
    choose(page, upload("one.png", 1), upload("two.png", 2))
    captioned(page, "one.png", "two.png")
    page.get_by_role("button", name="Remove one.png").click()
    expect(card(page, "one.png")).to_have_count(0)
    expect(page.get_by_role("button", name="Remove two.png")).to_be_focused()
    page.get_by_role("button", name="Remove two.png").click()
    expect(page.get_by_label("Choose pictures")).to_be_focused()
    expect(page.locator("#progress")).to_have_text("None yet.")


def test_wrong_files(page, watched):
    """Files of other types are refused at once, a false picture by the server; others are captioned."""
    choose(page, {"name": "notes.txt", "mimeType": "text/plain", "buffer": b"a dog"},
           {"name": "drawing.svg", "mimeType": "image/svg+xml",
            "buffer": b"<svg xmlns='http://www.w3.org/2000/svg'/>"},
           {"name": "empty.png", "mimeType": "image/png", "buffer": b""})
    for name, words in [("notes.txt", "text/plain"), ("drawing.svg", "image/svg"),
                        ("empty.png", "This file is empty")]:
        expect(card(page, name).get_by_role("alert")).to_contain_text(words)
        expect(card(page, name).get_by_role("button")).to_have_count(1)  # to remove it
    assert watched.sent("/v1/caption") == 0
    choose(page, {"name": "page.jpg", "mimeType": "image/jpeg", "buffer": b"<html>not found</html>"},
           upload("good.png"))
    captioned(page, "good.png")
    expect(card(page, "page.jpg")).to_have_attribute("data-state", "failed")
    # the server's sentence
    expect(card(page, "page.jpg").get_by_role("alert")).to_contain_text("send a whole JPEG")
    expect(card(page, "page.jpg").get_by_role("button", name="Try again")).to_be_hidden()


def test_too_large(page, watched, origin):
    """Bytes and pixels beyond the limits are refused without an upload; the server refuses them too."""
    limit = httpx.get(origin + "/v1/info").json()["limits"]["upload_bytes"]
    large = {"name": "large.png", "mimeType": "image/png", "buffer": b"\x89PNG" + bytes(limit)}
    choose(page, large)
    expect(card(page, "large.png").get_by_role("alert")).to_contain_text("at most")
    assert watched.sent("/v1/caption") == 0
    watched.change_info(limits={"upload_bytes": 2 * limit, "pixels": 1000})
    choose(page, upload("wide.png", 0, 40, 30))
    expect(card(page, "wide.png").get_by_role("alert")).to_contain_text(
        "40 × 30 pixels, and at most 1000 pixels")
    assert watched.sent("/v1/caption") == 0
    watched.expected = {413}
    choose(page, large)
    expect(card(page, "large.png")).to_have_attribute("data-state", "failed")
    expect(card(page, "large.png").get_by_role("alert")).to_contain_text(re.compile("large|bytes|MB"))
    assert watched.sent("/v1/caption") == 1


def test_a_server_that_does_not_answer(page):
    """The card says so, and tries again on request."""
    page.context.set_offline(True)
    choose(page, upload("sea.png"))
    expect(card(page, "sea.png").get_by_role("alert")).to_contain_text("could not be reached")
    page.context.set_offline(False)
    card(page, "sea.png").get_by_role("button", name="Try again").click()
    captioned(page, "sea.png")
    expect(card(page, "sea.png").get_by_role("alert")).to_have_count(0)


def test_question(page, origin):
    """The newest answer is shown first, as the API returned it."""
    file = upload("sea.png")
    choose(page, file)
    form = card(page, "sea.png").locator(".ask")
    for question in ("how many dogs?", "<b>what</b> colour?"):
        form.get_by_label("Ask a question").fill(question)
        form.get_by_role("button", name="Ask").click()
        expect(form.locator("dt").first).to_have_text(question)
        expected = post(origin, "/v1/ask", file, question=question)
        expect(form.locator("dd .text").first).to_have_text(expected["answer"])
    assert form.locator("dt").all_text_contents() == ["<b>what</b> colour?", "how many dogs?"]
    form.get_by_label("Ask a question").fill("w" * 501)
    form.get_by_role("button", name="Ask").click()
    expect(form.get_by_role("alert")).to_contain_text("Make it shorter")


def test_ranking(page, origin):
    """Texts in the order of their matching probability, with bars of that length."""
    file, texts = upload("sea.png"), ["a red ball on a table", "two dogs", "a man rides a horse"]
    choose(page, file)
    form = card(page, "sea.png").locator(".rank")
    form.get_by_label("Which text fits best?").fill("\n".join(["", *texts, " "]))
    form.get_by_role("button", name="Rank").click()
    expect(form.locator("li")).to_have_count(3)
    scores = post(origin, "/v1/score", file, texts=texts)["scores"]
    ranked = sorted(scores, key=lambda row: -row["itm"])
    assert form.locator("li .text").all_text_contents() == [row["text"] for row in ranked]
    shares = [bar.evaluate("bar => bar.offsetWidth / bar.parentElement.offsetWidth")
              for bar in form.locator("i").all()]
    assert shares == pytest.approx([row["itm"] for row in ranked], abs=0.01)
    for row, shown in zip(ranked, form.locator("li .score").all_text_contents(), strict=True):
        if shown not in ("< 1 %", "> 99 %"):
            assert float(shown.split()[0]) == pytest.approx(100 * row["itm"], abs=0.51)


def test_words(page):
    """A word's button shows its heat map; pressed again, it shows the picture."""
    choose(page, upload("sea.png"))
    captioned(page, "sea.png")
    here = card(page, "sea.png")
    buttons = here.get_by_role("group", name="Where is it seen?").get_by_role("button")
    words = re.findall(r"[\w'-]+", here.locator(".captions .text").first.inner_text())
    assert buttons.all_inner_texts() == list(dict.fromkeys(words))
    buttons.first.click()
    heat = here.get_by_role("img", name=f"where “{words[0]}” is seen")
    expect(heat).to_be_visible()
    assert heat.evaluate("image => image.decode().then(() => image.naturalWidth)") > 0
    expect(here.locator("img.picture")).to_be_hidden()
    expect(buttons.first).to_have_attribute("aria-pressed", "true")
    buttons.first.click()
    expect(here.locator("img.picture")).to_be_visible()
    expect(heat).to_be_hidden()


def test_search(page, origin):
    """A grid of the API's hits, by text and by picture; after a search by picture the results are focused."""
    page.get_by_role("searchbox", name="Search the index").fill("a red ball")
    page.keyboard.press("Enter")
    heading = page.get_by_role("heading", name="Pictures for “a red ball”")
    expect(heading).to_be_visible()
    hits = post(origin, "/v1/search", text="a red ball")["hits"]
    assert page.locator("#hits .name").all_text_contents() == [hit["name"] for hit in hits] and hits
    for image in page.locator("#hits img").all():
        expect(image).to_have_attribute("src", re.compile("blob:"))
        assert image.evaluate("image => image.decode().then(() => image.naturalWidth)") > 0
    choose(page, upload("sea.png"))
    page.get_by_role("button", name="Find similar pictures").click()
    expect(page.get_by_role("heading", name="Pictures like sea.png")).to_be_focused()
    page.get_by_role("button", name="Close results").click()
    expect(page.locator("#hits")).to_be_hidden()


def test_only_what_the_server_can_do(page, watched):
    """Without an index, answers or explanations, their controls are hidden."""
    watched.change_info(features={"search": False, "explain": False, "ask": False})
    choose(page, upload("sea.png"))
    captioned(page, "sea.png")
    for hidden in ("#search", ".words", ".ask", ".similar"):
        expect(page.locator(hidden)).to_be_hidden()
    expect(page.locator(".rank")).to_be_visible()


def test_a_server_that_loads_its_model(page, watched):
    """The page waits for it."""
    watched.expected = {503}
    answers = iter([503, 503])

    def answer(route) -> None:
        status = next(answers, None)
        route.continue_() if status is None else route.fulfill(
            status=status, json={"error": {"code": "not_ready", "message": "The model is being loaded."}})

    page.route("**/ready", answer)
    page.reload()
    expect(page.locator("#broken")).to_have_text("The model is being loaded.")
    expect(page.locator("#model")).to_contain_text("model · blip_fast")
    expect(page.locator("#broken")).to_be_hidden()


def test_a_server_that_is_busy(page, watched):
    """Pictures wait as long as the server says, and are then captioned."""
    watched.expected = {429}
    refusals, asked = iter([429, 429]), []

    def answer(route) -> None:
        asked.append(time.monotonic())
        status = next(refusals, None)
        route.continue_() if status is None else route.fulfill(
            status=status, headers={"Retry-After": "1"},
            json={"error": {"code": "busy", "message": "Try again."}})

    page.route("**/v1/caption", answer)
    choose(page, upload("sea.png"), upload("hill.png"))
    expect(card(page, "sea.png").locator(".state")).to_have_text("Waiting for its turn …")
    captioned(page, "sea.png")
    captioned(page, "hill.png")
    assert len(asked) == 3 and all(later - earlier > 0.9 for earlier, later in pairwise(asked))


def test_an_api_key(browser, arguments, request):
    """Without the key the card shows the server's refusal; with it, captions and thumbnails come."""
    with (served(*arguments, "--api-key", "open sesame") as server,
          watched_page(browser, server.wait(), request.node.name) as watched):
        watched.expected, page = {401}, watched.page
        choose(page, upload("sea.png"))
        expect(card(page, "sea.png").get_by_role("alert")).to_be_visible()
        page.get_by_label("API key").fill("open sesame")
        card(page, "sea.png").get_by_role("button", name="Try again").click()
        captioned(page, "sea.png")
        page.get_by_role("button", name="Find similar pictures").click()
        expect(page.locator("#hits img").first).to_have_attribute("src", re.compile("blob:"))
        page.reload()
        expect(page.get_by_label("API key")).to_have_value("")


def test_keyboard_only(page):
    """From the skip link to the heat map without a mouse."""
    tab_to(page, ".skip")
    expect(page.get_by_role("link", name="Skip to the pictures")).to_be_in_viewport()
    tab_to(page, "#files")
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Enter")
    chooser.value.set_files(upload("sea.png"))
    captioned(page, "sea.png")
    tab_to(page, ".word")
    page.keyboard.press("Space")
    expect(page.locator("img.heat")).to_be_visible()
    tab_to(page, ".ask input")
    page.keyboard.type("how many?")
    page.keyboard.press("Enter")
    expect(page.locator(".answers dt")).to_have_text("how many?")
    tab_to(page, ".rank textarea")
    page.keyboard.type("a dog\na horse")
    tab_to(page, ".rank button")
    page.keyboard.press("Enter")
    expect(page.locator(".ranking li")).to_have_count(2)
    tab_to(page, ".find")
    page.keyboard.press("Enter")
    expect(page.locator("#found-heading")).to_be_focused()
    tab_to(page, ".remove")
    page.keyboard.press("Enter")
    expect(page.locator("#files")).to_be_focused()


def test_a_phone(page):
    """380 pixels are enough: nothing is wider, and controls are large enough for a finger."""
    page.set_viewport_size({"width": 380, "height": 800})
    filled(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 380
    sizes = page.locator("button:visible, .button, input:visible:not(.unseen), select").evaluate_all(
        "all => all.map(each => Math.min(each.offsetWidth, each.offsetHeight))")
    assert min(sizes) >= 24  # WCAG 2.2, 2.5.8


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(page, scheme):
    """Every text against its background (WCAG 1.4.3), in light and dark mode."""
    page.emulate_media(color_scheme=scheme)
    filled(page)
    ratios = page.evaluate(CONTRAST)
    assert len(ratios) > 25 and min(ratios)[0] >= 4.5, min(ratios)
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    red, green, blue = map(int, re.findall(r"\d+", colour))
    assert (red + green + blue > 600) == (scheme == "light")


def test_reduced_motion(page):
    """With reduced motion the progress bar does not move."""
    page.route("**/v1/caption", lambda route: None)  # never answered
    choose(page, upload("sea.png"))
    bar = "getComputedStyle(document.querySelector('.state'), '::after').animationName"
    assert page.evaluate(bar) == "passing"
    page.emulate_media(reduced_motion="reduce")
    assert page.evaluate(bar) == "none"


def test_a_screen_reader_finds_names(page):
    """In the browser's accessibility tree controls and images have names, and no heading level is skipped."""
    filled(page)
    nodes = page.context.new_cdp_session(page).send("Accessibility.getFullAXTree")["nodes"]
    named = [(node["role"]["value"], node.get("name", {}).get("value", ""))
             for node in nodes if not node["ignored"]]
    operated = [pair for pair in named if pair[0] in NAMED_ROLES]
    assert len(operated) > 15
    assert [role for role, name in operated if not name] == []
    levels = page.locator("h1, h2, h3").evaluate_all("all => all.map(each => Number(each.tagName[1]))")
    assert levels[0] == 1 and levels.count(1) == 1 and all(b - a <= 1 for a, b in pairwise(levels))


def test_names_are_no_markup(page):
    """A file name is shown as text everywhere."""
    name = '<img src=x onerror="document.title=1">.png'
    choose(page, {**upload("any"), "name": name})
    expect(page.locator(".card .name")).to_have_text(name)
    captioned(page, name)
    expect(page.locator("img[src=x]")).to_have_count(0)
    expect(page).to_have_title("blip_fast")


def test_reference(page):
    """/docs complies with the content security policy too, and fits a phone."""
    page.set_viewport_size({"width": 380, "height": 800})
    page.goto("/docs")
    expect(page.get_by_role("heading", name="POST /v1/caption")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 380
