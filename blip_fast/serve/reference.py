"""The page at /docs: every route of the API, from its OpenAPI description, and nothing from outside."""

from __future__ import annotations

import json
from html import escape
from typing import Any

CURL = {"/v1/caption": "curl -F image=@photo.jpg -F num=3", "/v1/score": 'curl -F image=@photo.jpg -F "texts=a dog"',
        "/v1/ask": 'curl -F image=@photo.jpg -F "question=how many dogs are there?"',
        "/v1/search": 'curl -F "text=a dog on grass"',
        "/v1/explain": 'curl -F image=@photo.jpg -F "text=a dog on grass" -F word=dog -o seen.png'}


def reference_page(openapi: dict[str, Any]) -> str:
    """HTML of an OpenAPI description as FastAPI makes it."""
    sections = [_operation(path, method, operation) for path, methods in openapi["paths"].items()
                for method, operation in methods.items()]
    return (f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
            f'content="width=device-width"><title>API of blip-fast</title><link rel="stylesheet" '
            f'href="/static/page.css"></head><body><main><h1>API of blip-fast {escape(openapi["info"]["version"])}</h1>'
            f'<p>For programs: <a href="/openapi.json">openapi.json</a>. <a href="/">To the page</a>.</p>'
            f"{''.join(sections)}</main></body></html>")


def _operation(path: str, method: str, operation: dict[str, Any]) -> str:
    parts = [f"<section><h2>{escape(method.upper())} {escape(path)}</h2><p>{escape(operation.get('summary', ''))}</p>"]
    if "description" in operation:
        parts.append(f"<p>{escape(operation['description'])}</p>")
    for kind, content in operation.get("requestBody", {}).get("content", {}).items():
        parts.append(f"<h3>{escape(kind)}</h3><dl>{_fields(content['schema'])}</dl>")
    if path in CURL:
        parts.append(f"<pre>{escape(CURL[path])} http://localhost:8000{escape(path)}</pre>")
    return "".join([*parts, "</section>"])


def _fields(schema: dict[str, Any]) -> str:
    required = schema.get("required", ())
    return "".join(f"<dt>{escape(name)}{' (needed)' if name in required else ''}</dt>"
                   f"<dd>{escape(field.get('description', ''))} {_default(field)}</dd>"
                   for name, field in schema.get("properties", {}).items())


def _default(field: dict[str, Any]) -> str:
    return "" if field.get("default") is None else f"(default: {escape(json.dumps(field['default']))})"
