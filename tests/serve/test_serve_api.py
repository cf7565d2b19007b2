"""The API with real workers: results equal the offline commands', and every refusal is a clear 4xx."""

import asyncio
import io
import json
import os
import re
import signal

import numpy as np
import pytest
from odd_files import bomb, encoded, picture
from PIL import Image

pytest.importorskip("fastapi")
pytest.importorskip("httpx")
pytest.importorskip("prometheus_client")
pytest.importorskip("python_multipart")

from serving import IMAGE_SIZE, as_zip, files, in_json, photos, running, settings_of, write_model

from blip_fast.generate import GenerationConfig
from blip_fast.media.images import load_image
from blip_fast.report.heat import overlay, panel_size
from blip_fast.search import Index
from blip_fast.serve.app import PAGE
from blip_fast.serve.http.fetching import Fetcher
from blip_fast.serve.http.guard import CSP
from blip_fast.tasks.answerer import Answerer
from blip_fast.tasks.captioner import Captioner
from blip_fast.tasks.explainer import Explainer
from blip_fast.tasks.matcher import Matcher

GENERATION = GenerationConfig(beams=3, max_length=20, min_length=5, n_best=3)
TEXTS = ["a red ball on a table", "two dogs run over the green grass", "a man"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Two models, and an index of twelve pictures in two folders, of which the last is in a tar."""
    root = tmp_path_factory.mktemp("serving")
    write_model(root / "model", "tied")
    write_model(root / "answerer", "untied")
    (root / "photos" / "beach").mkdir(parents=True)
    for i, content in enumerate(photos(12, "PNG")):
        (root / "photos" / ("beach" if i % 2 else "") / f"{i:02}.png").write_bytes(content)
    index = Index.create(root / "index", root / "model", dtype="float32")
    index.add([root / "photos"])
    index.close()
    return root


@pytest.fixture(scope="module")
def server(root):
    settings = settings_of("--model", root / "model", "--answerer", root / "answerer",
                           "--index", root / "index", "--explain", "--batch-size", 4, "--max-images", 8,
                           "--max-upload-mb", 1,
                           "--max-pixels", 1_000_000, "--url-hosts", "pictures.example", "--decoders", 1)
    fetch = Fetcher(settings.url_hosts, 1_000_000, 5.0, resolve=lambda host, port: ["127.0.0.1"])
    with running(settings, fetch=fetch) as server:
        yield server


@pytest.fixture(scope="module")
def captioner(root) -> Captioner:
    return Captioner.from_pretrained(root / "model", dtype="float32")


def code(response, status: int) -> str:
    assert response.status_code == status, response.text
    told = response.json()["error"]
    assert set(told) == {"code", "message"} and told["message"].endswith(".")
    return told["code"]


def offline(captioner, pictures, prompt="a picture of") -> list[list[str]]:
    found = captioner([load_image(content) for content in pictures], prompt, GENERATION)
    return [[caption.caption, *(other.caption for other in caption.others)] for caption in found]


def test_captions_are_the_offline_ones(server, captioner):
    """In order and with their scores, for every form of request."""
    pictures = [*photos(6), *photos(2, "WEBP")]
    expected = offline(captioner, pictures)
    assert len({captions[0] for captions in expected}) > 2
    for response in (server.post("/v1/caption", files=files(pictures), data={"num": "3"}),
                     server.post("/v1/caption", json=in_json(pictures, num=3))):
        rows = response.json()["results"]
        assert [row["index"] for row in rows] == list(range(8))
        assert [[caption["text"] for caption in row["captions"]] for row in rows] == expected
    best = captioner(load_image(pictures[0]), generation=GENERATION)[0]
    assert rows[0]["captions"][0]["score"] == pytest.approx(best.score, abs=1e-5)
    (row,) = server.post("/v1/caption", files=files(pictures[:1])).json()["results"]
    assert [caption["text"] for caption in row["captions"]] == expected[0][:1]


def test_prompts(server, captioner):
    pictures = photos(2)
    asked = server.post("/v1/caption", json=in_json(pictures, prompt="two dogs", num=3)).json()["results"]
    assert [[caption["text"] for caption in row["captions"]] for row in asked] == offline(captioner, pictures,
                                                                                         "two dogs")
    long = server.post("/v1/caption", json=in_json(pictures, prompt="a dog " * 30))
    assert code(long, 422) == "bad_value" and "max_length" in long.json()["error"]["message"]


def test_many_at_once_are_as_each_alone(server, captioner):
    """The requests of 40 clients share one batch."""
    pictures = photos(40)

    async def all_at_once():
        return await asyncio.gather(*(server.client.post("/v1/caption", files=files([content]))
                                      for content in pictures))

    responses = server.run(all_at_once())
    assert [response.json()["results"][0]["captions"][0]["text"] for response in responses] == [
        captions[0] for captions in offline(captioner, pictures)]


def test_rows_are_streamed(server, captioner):
    pictures = [*photos(5), b"no picture"]
    response = server.post("/v1/caption", files=files(pictures), headers={"Accept": "application/x-ndjson"})
    assert response.headers["content-type"].startswith("application/x-ndjson")
    rows = {row["index"]: row for row in map(json.loads, response.text.splitlines())}
    assert sorted(rows) == list(range(6)) and rows[5]["error"]["code"] == "not_an_image"
    assert [rows[i]["captions"][0]["text"] for i in range(5)] == [
        captions[0] for captions in offline(captioner, pictures[:5])]


def test_one_bad_picture_among_good_ones(server):
    rows = server.post("/v1/caption",
                       files=files([photos(1)[0], bomb(), photos(1)[0] + as_zip()])).json()["results"]
    assert "captions" in rows[0]
    assert [row["error"]["code"] for row in rows[1:]] == ["too_many_pixels", "not_an_image"]


def test_scores_are_the_offline_ones(server, root):
    (content,) = photos(1)
    expected = Matcher.from_pretrained(root / "model", dtype="float32").score(load_image(content), TEXTS)
    for options in ({"files": files([content]), "data": {"texts": TEXTS}},
                    {"json": in_json([content], texts=TEXTS)}):
        scores = server.post("/v1/score", **options).json()["scores"]
        assert [row["text"] for row in scores] == TEXTS
        np.testing.assert_allclose([row["itm"] for row in scores], expected.itm[0], atol=1e-6)
        np.testing.assert_allclose([row["itc"] for row in scores], expected.itc[0], atol=1e-6)


def test_answers_are_the_offline_ones(server, root):
    answerer, pictures = Answerer.from_pretrained(root / "answerer", dtype="float32"), photos(3)
    for content, question in zip(pictures, ["is the man left of the horse", "two dogs", "red?"], strict=True):
        expected = answerer(load_image(content), question)[0]
        told = server.post("/v1/ask", files=files([content]), data={"question": question}).json()
        assert told["answer"] == expected.answer and told["score"] == pytest.approx(expected.score, abs=1e-5)


def test_questions_and_scores_of_many_are_computed_together(server, root):
    """Each result is the same as alone, and only the request that does not fit is refused."""
    pictures, answerer = photos(12), Answerer.from_pretrained(root / "answerer", dtype="float32")
    matcher = Matcher.from_pretrained(root / "model", dtype="float32")
    texts = [TEXTS[: 1 + i % 3] for i in range(11)] + [[TEXTS[0], "\u200b"]]

    async def all_at_once():
        asked = [server.client.post("/v1/ask", files=files([content]), data={"question": f"is it {i} dogs"})
                 for i, content in enumerate(pictures)]
        scored = [server.client.post("/v1/score", files=files([content]), data={"texts": mine})
                  for content, mine in zip(pictures, texts, strict=True)]
        return await asyncio.gather(*asked), await asyncio.gather(*scored)

    before = together(server)
    asked, scored = server.run(all_at_once())
    images = [load_image(content) for content in pictures]
    expected = answerer(images, [f"is it {i} dogs" for i in range(12)])
    assert [response.json()["answer"] for response in asked] == [answer.answer for answer in expected]
    assert code(scored.pop(), 422) == "bad_value"
    for response, image, mine in zip(scored, images, texts, strict=False):
        rows, alone = response.json()["scores"], matcher.score(image, mine)
        assert [row["text"] for row in rows] == mine
        np.testing.assert_allclose([row["itm"] for row in rows], alone.itm[0], atol=1e-6)
        np.testing.assert_allclose([row["itc"] for row in rows], alone.itc[0], atol=1e-6)
    assert all(count > before[task] for task, count in together(server).items())


def together(server) -> dict[str, float]:
    """How many questions and score requests were computed together with others."""
    lines, name = metrics(server.get("/metrics")), 'blip_fast_batch_images_{}{{{}task="{}"}}'
    return {task: float(lines.get(name.format("count", "", task), 0))
            - float(lines.get(name.format("bucket", 'le="1.0",', task), 0)) for task in ("ask", "score")}


def metrics(response) -> dict[str, str]:
    """The metrics' values by name and labels."""
    return dict(line.rsplit(" ", 1) for line in response.text.splitlines() if not line.startswith("#"))


def test_hits_are_the_offline_ones(server, root):
    index = Index.open(root / "index")
    (content,) = photos(1, "PNG")
    for options, query in (({"json": {"text": TEXTS[0], "k": 5}}, {"text": TEXTS[0]}),
                           ({"files": files([content]), "data": {"k": "5"}}, {"image": load_image(content)})):
        hits = server.post("/v1/search", **options).json()["hits"]
        expected = index.query(**query, top=5)
        assert [hit["name"] for hit in hits] == ["/".join(hit.image.name.split("/")[-2:]) for hit in expected]
        np.testing.assert_allclose([hit["score"] for hit in hits], [hit.score for hit in expected], atol=1e-5)
        np.testing.assert_allclose([hit["cosine"] for hit in hits], [hit.itc for hit in expected], atol=1e-5)
        assert str(root) not in json.dumps(hits)
    shown = server.get(hits[0]["image"])
    assert shown.headers["content-type"] == "image/jpeg"
    assert Image.open(io.BytesIO(shown.content)).size == expected[0].image.load().size
    assert len(server.post("/v1/search", json={"text": "a dog"}).json()["hits"]) == 12


@pytest.mark.parametrize("number", ["0", "..%2f..%2fetc%2fpasswd", "%2e%2e", "a" * 500, "photos%2f00.png"])
def test_only_hits_can_be_shown(server, number):
    assert code(server.get(f"/v1/indexed/{number}"), 404) == "not_found"


def test_heat_maps_are_the_offline_ones(server, root):
    explainer, (content,) = Explainer.from_pretrained(root / "model"), photos(1)
    response = server.post("/v1/explain", files=files([content]), data={"text": TEXTS[0], "word": "ball"})
    assert response.headers["content-type"] == "image/png"
    shown = np.asarray(Image.open(io.BytesIO(response.content)))
    image = load_image(content)
    heat = explainer(image, TEXTS[0], ["ball"]).words[0].map.numpy()
    difference = np.abs(shown.astype(int) - np.asarray(overlay(panel_size(image), heat)).astype(int))
    assert difference.max() <= 2
    whole = server.post("/v1/explain", files=files([content]), data={"text": TEXTS[0], "word": ""})
    assert Image.open(io.BytesIO(whole.content)).width > shown.shape[1]
    missing = server.post("/v1/explain", files=files([content]), data={"text": TEXTS[0], "word": "cat"})
    assert code(missing, 422) == "bad_value"


def test_info_says_what_there_is(server):
    told = server.get("/v1/info").json()
    assert told["features"] == dict.fromkeys(("score", "ask", "search", "explain", "caption"), True)
    assert told["limits"]["upload_bytes"] == 1_000_000 and told["limits"]["captions"] == 3
    assert told["model"] == "model" and told["auth"] is False


FORM = {"Content-Type": "multipart/form-data; boundary=b"}
REFUSED = {
    "no picture": ({"data": {"num": "1"}, "files": {"x": b""}}, 400, "broken_body"),
    "nothing": ({"json": {}}, 422, "bad_value"),
    "an empty picture": ({"files": files([b""])}, 415, "not_an_image"),
    "svg": ({"files": files([b"<svg xmlns='http://www.w3.org/2000/svg'/>"])}, 415, "not_an_image"),
    "html": ({"files": files([b"<!doctype html><script>alert(1)</script>"])}, 415, "not_an_image"),
    "pdf": ({"files": files([b"%PDF-1.7\n%%EOF"])}, 415, "not_an_image"),
    "a named picture": ({"files": {"image": ("../../etc/x.png", b"GIF89a<script>", "image/png")}}, 415,
                        "not_an_image"),
    "a polyglot": ({"files": files([encoded(picture(), "JPEG") + as_zip()])}, 415, "not_an_image"),
    "a bomb": ({"files": files([bomb()])}, 422, "too_many_pixels"),
    "too many pixels": ({"files": files([encoded(picture(1100, 1000), "JPEG")])}, 422, "too_many_pixels"),
    "too many pictures": ({"files": files(photos(9))}, 422, "too_many_images"),
    "too large": ({"files": files([bytes(1_000_001)])}, 413, "too_large"),
    "too large in parts": ({"files": files([bytes(200_000)] * 6)}, 413, "too_large"),
    "num 0": ({"json": in_json(photos(1), num=0)}, 422, "bad_value"),
    "num 4": ({"json": in_json(photos(1), num=4)}, 422, "bad_value"),
    "num twice": ({"files": files(photos(1)), "data": {"num": ["1", "2"]}}, 422, "bad_value"),
    "num is a word": ({"json": in_json(photos(1), num="many")}, 422, "bad_value"),
    "an unknown field": ({"json": in_json(photos(1), colour="red")}, 422, "bad_value"),
    "half a character": ({"content": b'{"images": [], "prompt": "\\ud800"}',
                          "headers": {"Content-Type": "application/json"}}, 422, "bad_value"),
    "a long text": ({"json": in_json(photos(1), prompt="a" * 501)}, 422, "bad_value"),
    "no base64": ({"json": {"images": [{"base64": "%%%"}]}}, 400, "broken_body"),
    "no picture object": ({"json": {"images": ["x"]}}, 400, "broken_body"),
    "two sources": ({"json": {"images": [{"base64": "", "url": "http://pictures.example"}]}}, 400,
                    "broken_body"),
    "a private address": ({"json": {"images": [{"url": "http://pictures.example/a.jpg"}]}}, 422,
                          "url_refused"),
    "an unlisted host": ({"json": {"images": [{"url": "http://evil.example/a.jpg"}]}}, 422, "url_refused"),
    "a file URL": ({"json": {"images": [{"url": "file:///etc/passwd"}]}}, 422, "url_refused"),
    "no JSON": ({"content": b"{", "headers": {"Content-Type": "application/json"}}, 400, "broken_body"),
    "deep JSON": ({"content": b"[" * 100_000, "headers": {"Content-Type": "application/json"}}, 400,
                  "broken_body"),
    "a JSON list": ({"json": []}, 400, "broken_body"),
    "another type": ({"content": b"x", "headers": {"Content-Type": "image/jpeg"}}, 415, "unknown_type"),
    "no type": ({"content": b"x"}, 415, "unknown_type"),
    "no boundary": ({"content": b"x", "headers": {"Content-Type": "multipart/form-data"}}, 400,
                    "broken_body"),
    "a broken form": ({"content": b"--b\r\nbroken", "headers": FORM}, 400, "broken_body"),
    "a form that is cut off": (
        {"content": b'--b\r\nContent-Disposition: form-data; name="num"\r\n\r\n1\r\n--b\r\n',
         "headers": FORM},
        400, "broken_body"),
    "an unknown field that is no text": ({"content": b'{"\\ud800\\n": 1}',
                                          "headers": {"Content-Type": "application/json"}}, 422, "bad_value"),
    "a nameless part": (
        {"content": b'--b\r\nContent-Disposition: form-data; filename="x"\r\n\r\nx\r\n--b--\r\n',
         "headers": FORM}, 400, "broken_body"),
    "an odd charset": ({"content": b"--b\r\n", "headers": {
        "Content-Type": "multipart/form-data; boundary=b; charset=\xff\xfe".encode("latin-1")}}, 400,
                       "broken_body"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(server, name):
    options, status, expected = REFUSED[name]
    response = server.post("/v1/caption", **options)
    assert code(response, status) == expected
    assert response.headers["content-security-policy"] == CSP
    assert response.headers["content-type"] == "application/json"


@pytest.mark.parametrize(("path", "fields"), [
    ("score", {}), ("score", {"texts": []}), ("score", {"texts": [""]}), ("score", {"texts": ["a"] * 65}),
    ("score", {"texts": "a"}), ("score", {"texts": [1]}), ("ask", {}), ("ask", {"question": " "}),
    ("ask", {"question": None}), ("search", {"text": "a dog"}), ("search", {"k": 101}), ("explain", {}),
    ("explain", {"text": "a dog", "word": "cat"})])
def test_fields_that_do_not_fit(server, path, fields):
    assert code(server.post(f"/v1/{path}", json=in_json(photos(1), **fields)), 422) == "bad_value"
    for pictures in ([], photos(2)):
        if path != "search":
            assert code(server.post(f"/v1/{path}", json=in_json(pictures, **fields)), 422) == "bad_value"


def test_texts_are_not_markup(server):
    """Whatever is sent comes back only as JSON."""
    evil = "<script>alert(1)</script>"
    response = server.post("/v1/score", json=in_json(photos(1), texts=[evil]))
    assert response.json()["scores"][0]["text"] == evil
    assert response.headers["content-type"] == "application/json"


@pytest.mark.parametrize("path", ["/nothing", "/static/..%2fapp.py", "/static/../app.py",
                                  "/static/page.css%00.js",
                                  "/static/%2e%2e/app.py", "/static/app.py", "/v1/nothing", "/static/"])
def test_no_other_files(server, path):
    assert code(server.get(path), 404) == "not_found"


def test_methods(server):
    response = server.get("/v1/caption")
    assert code(response, 405) == "wrong_method" and response.headers["allow"] == "POST"


def test_reference(server):
    """/docs loads nothing external, and the description contains every route."""
    described = server.get("/openapi.json").json()
    assert {"/v1/caption", "/v1/score", "/v1/ask", "/v1/search", "/v1/explain", "/v1/info",
            "/health", "/ready", "/metrics"} <= set(described["paths"])
    content = described["paths"]["/v1/caption"]["post"]["requestBody"]["content"]
    assert {"num", "prompt", "image"} == set(content["multipart/form-data"]["schema"]["properties"])
    page = server.get("/docs").text
    assert "/v1/caption" in page and "curl" in page
    assert re.findall(r'(?:src|href)="([^"]*)"', page) and all(
        link.startswith("/") for link in re.findall(r'(?:src|href)="([^"]*)"', page))
    assert "<script" not in page and "style=" not in page


def test_the_pages_files_need_nothing_from_outside():
    """Only the server's own addresses, nothing that turns text into markup, no inline script or style."""
    sources = {path.name: path.read_text(encoding="utf-8") for path in PAGE.iterdir()}
    assert {"index.html", "page.css", "page.js"} <= set(sources)
    for name, text in sources.items():
        text = text.replace('xmlns="http://www.w3.org/2000/svg"', "")
        assert not re.search(r"(?i)https?:|//\w+\.|innerHTML|outerHTML|insertAdjacent|document\.write|eval\(",
                             text), (
            name)
    assert not re.search(r"(?i)<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)", sources["index.html"])


def test_health_and_metrics(server):
    assert server.get("/health").json() == {"status": "alive"}
    assert server.get("/ready").json() == {"status": "ready"}
    server.post("/v1/caption", files=files(photos(2)))
    response = server.get("/metrics")
    lines = metrics(response)
    assert response.headers["content-type"].startswith("text/plain")
    assert float(lines['blip_fast_images_total{task="caption"}']) >= 2
    assert float(lines['blip_fast_requests_total{route="/v1/caption",status="200"}']) >= 1
    assert float(lines['blip_fast_request_seconds_count{route="/v1/caption"}']) >= 1
    assert float(lines['blip_fast_batch_images_count{task="caption"}']) >= 2
    assert lines["blip_fast_queue_length"] == "0.0"
    assert lines['blip_fast_processes_ready{processes="workers"}'] == "1.0"


def test_images_of_all_sizes(server, captioner):
    """From one pixel up, and grey, transparent and animated ones: the same results as offline."""
    pictures = [encoded(Image.new("RGB", (1, 1)), "PNG"), encoded(Image.new("RGB", (999, 1)), "BMP"),
                encoded(picture().convert("L"), "PNG"), encoded(picture().convert("RGBA"), "WEBP"),
                encoded(picture(), "GIF", save_all=True, append_images=[picture(seed=1)]),
                encoded(Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), (120, 120, 120)), "PNG")]
    rows = server.post("/v1/caption", files=files(pictures), data={"num": "3"}).json()["results"]
    assert [[caption["text"] for caption in row["captions"]] for row in rows] == offline(captioner, pictures)


def test_captions_that_nobody_waits_for_are_dropped(server):
    """In the queue, in the worker and in its batch; the next caption is written at once."""
    crew, pixels = server.service.workers, bytes(3 * IMAGE_SIZE**2)
    head = {"kind": "caption", "size": IMAGE_SIZE, "prompt": None}

    async def check() -> float:
        jobs = [asyncio.ensure_future(crew.do(head, pixels)) for _ in range(2000)]
        await server.until(lambda: any(job.done() for job in jobs))
        for job in jobs:
            job.cancel()
        done = await asyncio.gather(*jobs, return_exceptions=True)
        assert crew.waiting == 0
        await crew.do(head, pixels)
        await server.until(lambda: not crew._members[0].jobs)
        return sum(isinstance(each, tuple) for each in done)

    assert server.run(check()) < 500


def test_a_decoder_that_dies_costs_one_picture(server):
    """The next picture is opened by another process."""
    os.kill(server.service.decoders.pids[0], signal.SIGKILL)
    server.run(server.until(lambda: server.service.decoders.restarts > 0 and server.service.ready))
    assert server.post("/v1/caption", files=files(photos(1))).status_code == 200


def test_tasks_that_are_not_served(root):
    """The key is required first; a task without a model says so."""
    settings = settings_of("--answerer", root / "answerer", "--api-key", "a long secret", "--decoders", 1)
    with running(settings) as server:
        assert code(server.post("/v1/ask", files=files(photos(1)), data={"question": "red?"}),
                    401) == "unauthorized"
        key = {"Authorization": "Bearer a long secret"}
        told = server.get("/v1/info").json()
        assert told["auth"] is True and [name for name, there in told["features"].items() if there] == ["ask"]
        for task, fields in (("caption", {}), ("score", {"texts": ["a"]}), ("explain", {"text": "a"})):
            response = server.post(f"/v1/{task}", json=in_json(photos(1), **fields), headers=key)
            assert code(response, 404) == "not_served"
        assert code(server.post("/v1/search", json={"text": "a"}, headers=key), 404) == "no_index"
        asked = server.post("/v1/ask", files=files(photos(1)), data={"question": "red?"}, headers=key)
        assert asked.status_code == 200
