"""The page at /docs: every route of the API, from its OpenAPI description. It loads nothing external."""

from __future__ import annotations

import json
import re
from html import escape
from typing import Any

from blip_fast.serve.http.forms import MULTIPART

BODIES = ('Bodies are forms (`multipart/form-data`), or JSON with the same fields and, in place of '
          '`image`, `"images": [{"base64": "…"}]` or `[{"url": "…"}]`. What is refused is told as `{"error": '
          '{"code": "…", "message": "…"}}`.')
CURL = {"/v1/caption": "curl -F image=@photo.jpg -F num=3",
        "/v1/score": 'curl -F image=@photo.jpg -F "texts=a dog"',
        "/v1/ask": 'curl -F image=@photo.jpg -F "question=how many dogs are there?"',
        "/v1/search": 'curl -F "text=a dog on grass"',
        "/v1/explain": 'curl -F image=@photo.jpg -F "text=a dog on grass" -F word=dog -o seen.png'}


def reference_page(openapi: dict[str, Any]) -> str:
    """An OpenAPI description, as FastAPI makes it, as HTML."""
    routes = [_route(path, method, operation) for path, methods in openapi["paths"].items()
              for method, operation in methods.items()]
    return (f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
            f'content="width=device-width"><title>API of blip-fast</title><link rel="stylesheet" '
            f'href="/static/page.css"></head><body><main class="reference"><h1>API of blip-fast '
            f'{escape(openapi["info"]["version"])}</h1><p>{_text(BODIES)} For programs: <a '
            'href="/openapi.json">openapi.json</a>. <a href="/">To the '
            f'page</a>.</p>{"".join(routes)}</main></body></html>')


def _route(path: str, method: str, operation: dict[str, Any]) -> str:
    parts = [f"<h2>{escape(method.upper())} {escape(path)}</h2><p>{_text(operation.get('summary', ''))}</p>"]
    if "description" in operation:
        parts.append(f"<p>{_text(operation['description'])}</p>")
    if "requestBody" in operation:
        parts.append(f"<dl>{_fields(operation['requestBody']['content'][MULTIPART]['schema'])}</dl>")
    if path in CURL:
        parts.append(f"<pre>{escape(CURL[path])} http://localhost:8000{escape(path)}</pre>")
    return f"<section>{''.join(parts)}</section>"


def _fields(schema: dict[str, Any]) -> str:
    required = schema.get("required", ())
    return "".join(f"<dt><code>{escape(name)}</code></dt><dd>{_text(field['description'])}{_default(field)}"
                   f"{' (needed)' if name in required else ''}</dd>"
                   for name, field in schema["properties"].items())


def _default(field: dict[str, Any]) -> str:
    return "" if field.get("default") is None else f" (default: {escape(json.dumps(field['default']))})"


def _text(text: str) -> str:
    """Escaped, with text between backticks as code."""
    return re.sub("`([^`]*)`", r"<code>\1</code>", escape(text))
