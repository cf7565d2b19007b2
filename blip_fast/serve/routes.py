"""The routes of the API under /v1/."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from blip_fast.serve.http.forms import (
    AskFields,
    CaptionFields,
    ExplainFields,
    Fields,
    Link,
    Picture,
    ScoreFields,
    SearchFields,
    body_of,
    read_form,
)
from blip_fast.serve.refusals import Refused, bad_value, timed_out
from blip_fast.serve.service import Service

NDJSON = "application/x-ndjson"

routes = APIRouter(prefix="/v1")


async def service_of(request: Request) -> Service:
    return request.app.state.service


Served = Annotated[Service, Depends(service_of)]


@routes.get("/info", summary="What this server does, and what it takes")
async def info(service: Served) -> JSONResponse:
    return JSONResponse(service.info())


@routes.post("/caption", summary="Captions of pictures",
             openapi_extra=body_of(CaptionFields, "one or several"))
async def caption(request: Request, service: Served) -> Response:
    """`{"results": [{"index": 0, "captions": [{"text": …, "score": …}]}, {"index": 1, "error": {…}}]}`, in
    the order of the pictures; `score` is the mean log-probability of a token. With
    `Accept: application/x-ndjson` each row is a line, sent when it is finished. A request all of whose
    pictures are refused is refused itself, unless rows are lines.
    """
    fields, pictures = await read_form(request, CaptionFields, service.settings.limits)
    if not pictures:
        raise bad_value("image: no picture was sent.")
    request.scope["seat"].take(len(pictures) - 1)
    if NDJSON in request.headers.get("accept", ""):
        return StreamingResponse(_lines(service, pictures, fields, request.scope["seat"].deadline),
                                 media_type=NDJSON)
    rows = _caption_tasks(service, pictures, fields)
    try:
        done = await asyncio.gather(*rows)
    finally:
        _cancel(rows)
    refused = [row for row in done if isinstance(row, Refused)]
    if len(refused) == len(done):
        raise refused[0]
    return JSONResponse({"results": [_result_row(place, row) for place, row in enumerate(done)]})


@routes.post("/score", summary="How well texts describe a picture", openapi_extra=body_of(ScoreFields, "one"))
async def score(request: Request, service: Served) -> JSONResponse:
    """`{"scores": [{"text": …, "itm": …, "itc": …}]}` in the order of the texts: `itm` is the probability
    that text and picture match, `itc` the cosine of their features."""
    fields, picture = await _one(request, service, ScoreFields)
    return JSONResponse((await service.about("score", picture, fields.model_dump()))[0])


@routes.post("/ask", summary="An answer to a question about a picture",
             openapi_extra=body_of(AskFields, "one"))
async def ask(request: Request, service: Served) -> JSONResponse:
    """`{"answer": …, "score": …}`"""
    fields, picture = await _one(request, service, AskFields)
    return JSONResponse((await service.about("ask", picture, fields.model_dump()))[0])


@routes.post("/search", summary="Indexed pictures by a text or a picture",
             openapi_extra=body_of(SearchFields, "one, or none with a text"))
async def search(request: Request, service: Served) -> JSONResponse:
    """`{"hits": [{"id": …, "name": …, "score": …, "cosine": …, "image": "/v1/indexed/ID"}]}`, best first."""
    fields, pictures = await read_form(request, SearchFields, service.settings.limits)
    if len(pictures) + (fields.text is not None) != 1:
        raise bad_value("text: search by a text or by one picture.")
    hits = await service.search(pictures[0] if pictures else None, fields.model_dump())
    return JSONResponse({"hits": hits})


@routes.get("/indexed/{number}", summary="A hit's picture, as JPEG", response_class=Response)
async def indexed(number: str, service: Served) -> Response:
    return Response(await service.thumbnail(number), media_type="image/jpeg")


@routes.post("/explain", summary="Where in a picture a text's words are seen, as PNG",
             response_class=Response, openapi_extra=body_of(ExplainFields, "one"))
async def explain(request: Request, service: Served) -> Response:
    """A heat map over the picture for `word`, or a sheet of those of the text and all of its words."""
    fields, picture = await _one(request, service, ExplainFields)
    _, drawn = await service.about("explain", picture, fields.model_dump())
    return Response(drawn, media_type="image/png")


async def _one(request: Request, service: Service, model: type[Fields]) -> tuple[Fields, Picture | Link]:
    """The fields, and the one picture that the request must contain."""
    fields, pictures = await read_form(request, model, service.settings.limits)
    if len(pictures) != 1:
        raise bad_value(f"image: {len(pictures)} pictures were sent, send one.")
    return fields, pictures[0]


def _caption_tasks(service: Service, pictures: Sequence[Picture | Link],
                   fields: CaptionFields) -> list[asyncio.Future[Any]]:
    return [asyncio.ensure_future(_captions_or_refusal(service, picture, fields)) for picture in pictures]


async def _captions_or_refusal(service: Service, picture: Picture | Link,
                               fields: CaptionFields) -> list[dict[str, Any]] | Refused:
    try:
        return await service.caption(picture, fields.num, fields.prompt)
    except Refused as refused:
        return refused


def _result_row(place: int, row: list[dict[str, Any]] | Refused) -> dict[str, Any]:
    return {"index": place, **(row.body() if isinstance(row, Refused) else {"captions": row})}


async def _lines(service: Service, pictures: Sequence[Picture | Link], fields: CaptionFields,
                 deadline: float) -> AsyncIterator[str]:
    """JSON lines in the order in which they finish; at the deadline, an error for each of the others."""
    rows, loop = _caption_tasks(service, pictures, fields), asyncio.get_running_loop()
    places = {row: place for place, row in enumerate(rows)}
    try:
        while places:
            done, _ = await asyncio.wait(places, timeout=deadline - loop.time(),
                                         return_when=asyncio.FIRST_COMPLETED)
            for row in done or list(places):
                result = row.result() if row in done else timed_out(service.settings.limits.seconds)
                yield json.dumps(_result_row(places.pop(row), result)) + "\n"
    finally:
        _cancel(rows)


def _cancel(rows: Sequence[asyncio.Future[Any]]) -> None:
    for row in rows:
        row.cancel()
