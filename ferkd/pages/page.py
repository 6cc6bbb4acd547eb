"""One HTML file out of a title, tables, figures and scripts."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import html
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from ferkd import __version__
from ferkd.errors import InputError
from ferkd.remote import refuse_url

_LOADS_NOTHING = "default-src 'none'; img-src data:; base-uri 'none'; form-action 'none'"


class Markup(str):
    """HTML that is meant as such. Every other text is escaped on its way into a page."""

    __slots__ = ()


def escaped(text: object) -> Markup:
    """Any text as HTML shows it; a file name's bytes that are no UTF-8 become question marks."""
    if isinstance(text, Markup):
        return text
    return Markup(html.escape(str(text).encode("utf-8", "replace").decode("utf-8")))


def table(head: Sequence[object], rows: Iterable[Sequence[object]], caption: str, *, names: int = 1, id: str = "") -> Markup:
    """A table whose first `names` columns are texts, the first of them the row's heading, and the others figures."""
    text_kind = "name" if names == 1 else "name long"
    kind = [f' class="{text_kind}"' if place < names else "" for place in range(len(head))]
    heads = "".join(f'<th scope="col"{of}>{escaped(text)}</th>' for text, of in zip(head, kind, strict=True))
    body = "".join(
        f'<tr><th scope="row"{kind[0]}>{escaped(row[0])}</th>'
        + "".join(f"<td{of}>{escaped(cell)}</td>" for cell, of in zip(row[1:], kind[1:], strict=True))
        + "</tr>\n"
        for row in rows
    )
    return Markup(
        f'<div class="wide" tabindex="0" role="region" aria-label="{escaped(caption)}"><table{f" id={id}" if id else ""}>'
        f"<caption>{escaped(caption)}</caption><thead><tr>{heads}</tr></thead>\n<tbody>\n{body}</tbody></table></div>\n"
    )


def page(title: str, body: Markup, figures: Mapping[str, Any], scripts: Sequence[str]) -> str:
    """The text of a page: `body` below the title, `figures` for its `scripts` (files of this folder, run in this order)."""
    here = files("ferkd.pages")
    style = here.joinpath("page.css").read_text("utf-8")
    script = '"use strict";\n' + "\n".join(here.joinpath(name).read_text("utf-8") for name in scripts)
    policy = f"{_LOADS_NOTHING}; style-src {_hash(style)}; script-src {_hash(script)}"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escaped(title)}</title>
<style>{style}</style>
</head>
<body>
<main>
<h1>{escaped(title)}</h1>
<noscript><p class="note">Charts and sliders need JavaScript, which is off here; the tables are complete without it.</p></noscript>
{body}
</main>
<footer>Made by ferkd {__version__}. This file needs no network and sends nothing.</footer>
<script type="application/json" id="figures">{embedded_json(figures)}</script>
<script>{script}</script>
</body>
</html>
"""


def embedded_json(value: Any) -> str:
    """JSON that can stand inside a script element: no character of it means anything to HTML, and NaN and infinities are null."""
    text = json.dumps(_finite(value), separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def check_page_path(path: Path) -> None:
    """Raises InputError unless a page may be written there: only a name that says HTML is ever replaced."""
    refuse_url(path, "page")
    if path.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"{path}: a page's name ends with .html, so that no other file is overwritten")
    if path.is_dir():
        raise InputError(f"{path}: is a folder; give the page the name of a file in it")


def write_page(path: Path, text: str) -> None:
    """The file appears whole or not at all."""
    check_page_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(text, "utf-8")
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _finite(value: Any) -> Any:
    """The same with null in place of numbers that JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return value
