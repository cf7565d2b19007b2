"""A request's content: its fields, validated, and its pictures as bytes that have not been decoded yet."""

from __future__ import annotations

import base64
import binascii
import json
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from fastapi import Request
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, ValidationInfo
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartParser

from blip_fast.search.store import printable
from blip_fast.serve.refusals import Refused, bad_value, broken_body
from blip_fast.serve.settings import Limits

MULTIPART, JSON = "multipart/form-data", "application/json"
MOST_FIELDS = 1000  # of a form, counted before validation
LISTS = ("texts",)  # fields that may be repeated

Picture = bytes | Refused  # Refused stands for one bad picture among several: the others still get results
Fields = TypeVar("Fields", bound="Empty")


@dataclass(frozen=True)
class Link:
    """A picture to be fetched by its URL."""

    url: str


def _limits(info: ValidationInfo) -> Limits:
    assert info.context is not None  # passed by `read_form`
    return info.context["limits"]


def _text(value: str, info: ValidationInfo) -> str:
    most = _limits(info).text_characters
    if len(value) > most:
        raise ValueError(f"{len(value):,} characters are more than {most:,}")
    if not value.strip():
        raise ValueError("a text needs a word")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError("half a character (a lone surrogate) is no text") from None
    return value


def _number(value: int, info: ValidationInfo) -> int:
    most = _limits(info).captions
    if value > most:
        raise ValueError(f"this server writes {most} captions of a picture at most")
    return value


def _texts(value: list[str], info: ValidationInfo) -> list[str]:
    most = _limits(info).texts
    if len(value) > most:
        raise ValueError(f"{len(value):,} texts are more than {most:,}")
    return value


Text = Annotated[str, AfterValidator(_text)]


class Empty(BaseModel):
    """A request with pictures only."""

    model_config = ConfigDict(extra="forbid")


class CaptionFields(Empty):
    num: Annotated[int, AfterValidator(_number)] = Field(1, ge=1, description="Alternatives, best first")
    prompt: Text | None = Field(None, description="What captions begin with; the server's own unless given")


class ScoreFields(Empty):
    texts: Annotated[list[Text], AfterValidator(_texts)] = Field(
        min_length=1, description="Texts to hold against it")


class AskFields(Empty):
    question: Text = Field(description="About the picture")


class SearchFields(Empty):
    text: Text | None = Field(None, description="Find pictures that it describes; or send a picture")
    k: int = Field(12, ge=1, le=100, description="Pictures wanted")


class ExplainFields(Empty):
    text: Text = Field(description="What the picture shows")
    word: Text | None = Field(None, description="The word of it whose place is shown; all words unless given")


async def read_form(request: Request, model: type[Fields],
                    limits: Limits) -> tuple[Fields, list[Picture | Link]]:
    """The fields and the pictures of a multipart or JSON request.

    Raises Refused: `broken_body`, `too_many_images`, `bad_value`; `unknown_type` for another kind of body.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == MULTIPART:
        fields, pictures = await _multipart(request, limits)
    elif kind == JSON:
        fields, pictures = _json(await request.body())
    else:
        raise Refused(415, "unknown_type", f"The body's Content-Type must be {MULTIPART} or {JSON}.")
    if len(pictures) > limits.images:
        raise Refused(422, "too_many_images", f"{len(pictures):,} pictures are more than {limits.images}: "
                      "send them in several requests.")
    try:
        return model.model_validate(fields, context={"limits": limits}), pictures
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        place = printable(".".join(str(part) for part in first["loc"])[:50]) or "body"
        raise bad_value(f"{place}: {first['msg'].removeprefix('Value error, ')}") from None


def body_of(model: type[Empty], pictures: str) -> dict[str, Any]:
    """The request body's OpenAPI description; `pictures` describes the field of pictures."""
    fields = model.model_json_schema()
    file = {"type": "array", "items": {"type": "string", "format": "binary"}, "description": pictures}
    one = {"type": "object", "properties": {"base64": {"type": "string"}, "url": {"type": "string"}},
           "description": "one of the two; url where the server allows it"}
    listed = {"type": "array", "items": one, "description": pictures}
    return {"requestBody": {"required": True, "content": {
        MULTIPART: {"schema": {**fields, "properties": {"image": file, **fields.get("properties", {})}}},
        JSON: {"schema": {**fields, "properties": {"images": listed, **fields.get("properties", {})}}}}}}


class _WholeForm(MultiPartParser):
    """Records whether the form is complete: the base class silently drops a truncated form's last part."""

    whole = False

    def on_end(self) -> None:
        self.whole = True


async def _multipart(request: Request, limits: Limits) -> tuple[dict[str, Any], list[Picture | Link]]:
    parser = _WholeForm(request.headers, request.stream(), max_files=MOST_FIELDS, max_fields=MOST_FIELDS,
                        max_part_size=4 * limits.text_characters + 1000)
    try:
        form = await parser.parse()
    except Refused:
        raise
    except Exception as error:  # a broken body can make the parser raise anything
        raise broken_body(f"it is no {MULTIPART} ({type(error).__name__})") from None
    try:
        if not parser.whole:
            raise broken_body("it ends before its last boundary")
        return await _form_fields(form)
    finally:
        await form.close()


async def _form_fields(form: FormData) -> tuple[dict[str, Any], list[Picture | Link]]:
    """Fields and pictures of a form. An empty field counts as missing, since browsers send untouched inputs
    that way. A repeated field becomes a list, which validation refuses unless the field is one of `LISTS`."""
    fields: dict[str, list[str]] = {}
    pictures: list[Picture | Link] = []
    for name, value in form.multi_items():
        if (name == "image") != isinstance(value, UploadFile):
            raise broken_body("pictures, and nothing else, come as files named image")
        if isinstance(value, UploadFile):
            pictures.append(await value.read())
        elif value or name in LISTS:
            fields.setdefault(name, []).append(value)
    return {name: value if name in LISTS or len(value) > 1 else value[0]
            for name, value in fields.items()}, pictures


def _json(body: bytes) -> tuple[dict[str, Any], list[Picture | Link]]:
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        raise broken_body("it is no JSON") from None
    if not isinstance(fields, dict):
        raise broken_body("it is no JSON object")
    pictures = fields.pop("images", [])
    if not isinstance(pictures, list):
        raise broken_body("images is no list")
    return fields, [_picture(picture) for picture in pictures]


def _picture(given: Any) -> Picture | Link:
    match given:
        case {"base64": str(text), **others} if not others:
            try:
                return base64.b64decode(text, validate=True)
            except (binascii.Error, ValueError):
                return broken_body("a picture is no base64")
        case {"url": str(url), **others} if not others:
            return Link(url)
    raise broken_body('each of images must be {"base64": "…"} or {"url": "…"}')
