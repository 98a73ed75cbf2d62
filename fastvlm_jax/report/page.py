"""Holds the HTML page of runs and sweeps: sortable tables, pictures, and values shown beside the points of a drawing.

The page is one file that loads nothing but the pictures named in it; its only script is the one here.
"""

import base64
import dataclasses
import hashlib
import re
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence

import jinja2
import markupsafe

STYLE = """
 :root { --ink: #1d2330; --soft: #5f6b7e; --line: #e3e6ec; --wash: #f6f7f9; --accent: #2f5fb3 }
 * { box-sizing: border-box }
 body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: #fff; max-width: 1180px;
        margin: 1.6em auto; padding: 0 1.2em }
 h1 { font-size: 1.5em; margin: 0 0 .3em; overflow-wrap: anywhere } h2 { font-size: 1.15em; margin: 2em 0 .5em }
 p { margin: .35em 0; overflow-wrap: anywhere } .soft { color: var(--soft) } .wide { overflow-x: auto }
 .lead p { border-left: 4px solid var(--accent); padding-left: .8em }
 table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92em }
 td, th { padding: .25em .8em; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top;
        overflow-wrap: break-word; max-width: 34em }
 td.short { white-space: nowrap } td.number, th.number { text-align: right }
 th { cursor: pointer; color: var(--soft); font-weight: 600; user-select: none }
 th:hover, th:focus-visible { color: var(--accent) }
 th[aria-sort=ascending]::after { content: " \\2191" } th[aria-sort=descending]::after { content: " \\2193" }
 figure { margin: 0 } figure img { max-width: 100%; min-width: 600px }
 figure svg { width: 100%; height: auto; display: block }
 [data-tip] { cursor: pointer } [data-tip]:focus { outline: none } [data-tip]:hover, [data-tip]:focus { opacity: .6 }
 #tip { position: absolute; background: #fff; border: 1px solid var(--soft); border-radius: 6px; padding: .4em .7em;
        white-space: pre-line; font-size: .88em; line-height: 1.4; box-shadow: 0 2px 8px #0003; max-width: 22em;
        pointer-events: none; z-index: 3; overflow-wrap: anywhere }
 pre { overflow-x: auto; font-size: 13px; background: var(--wash); padding: .7em } summary { cursor: pointer }
 @media (max-width: 640px) { body { padding: 0 .7em; margin-top: .8em } td, th { padding: .25em .5em } }
"""
SCRIPT = r"""
"use strict";
// Tables: a click on a head sorts by its column, a second one the other way round; what is no number goes last.
const number = text => parseFloat(text.replace(/,/g, ""));
const numeric = text => /^-?[\d,]*\.?\d+(e[-+]?\d+)?($|[ ,%])/.test(text);  // "71.2 ± 1.1" and "512 (2x2)" too
for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  const column = i => [...body.rows].map(row => row.cells[i].textContent.trim());
  heads.forEach((head, i) => {
    const values = column(i).filter(text => text !== "-" && text !== "");
    const numbers = values.length > 0 && values.every(numeric);
    if (numbers) for (const row of table.rows) row.cells[i].classList.add("number");
    for (const row of body.rows) row.cells[i].classList.toggle("short", row.cells[i].textContent.length < 32);
    head.tabIndex = 0;
    const sort = () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      heads.forEach(other => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const empty = text => text === "-" || text === "";
      body.append(...[...body.rows].sort((one, two) => {
        const a = one.cells[i].textContent.trim(), b = two.cells[i].textContent.trim();
        if (empty(a) || empty(b)) return empty(a) - empty(b);
        return (up ? 1 : -1) * (numbers ? number(a) - number(b) : a.localeCompare(b, "en", {numeric: true}));
      }));
    };
    head.onclick = sort;
    head.onkeydown = event => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); sort(); } };
  });
}
// Drawings: the values of the point under the pointer, tapped or focused.
const tip = document.getElementById("tip");
function show(point) {
  tip.textContent = point.dataset.tip;
  tip.hidden = false;
  const box = point.getBoundingClientRect(), most = document.documentElement.clientWidth - tip.offsetWidth - 4;
  tip.style.left = Math.max(4, Math.min(box.right + 8, most)) + scrollX + "px";
  tip.style.top = Math.max(4, box.top - tip.offsetHeight - 6) + scrollY + "px";
}
for (const point of document.querySelectorAll("[data-tip]")) {
  point.addEventListener("pointerenter", () => show(point));
  point.addEventListener("focus", () => show(point));
  point.addEventListener("pointerleave", () => { tip.hidden = true; });
  point.addEventListener("blur", () => { tip.hidden = true; });
}
document.addEventListener("keydown", event => { if (event.key === "Escape") tip.hidden = true; });
"""


@dataclasses.dataclass(frozen=True)
class Table:
    """Holds a table of texts under a title; `note` stands below it. Without rows it is left out."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[object]]
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Picture:
    """Holds a picture under a title: an SVG made by `inline_svg`, or the name of a file beside the page."""

    title: str
    file: str = ""
    svg: str = ""
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Texts:
    """Holds texts, as name -> text, that are unfolded by a click."""

    title: str
    texts: Sequence[tuple[str, str]]


def policy(script: str) -> str:
    """Returns a Content-Security-Policy: a browser runs this script alone, and loads nothing but images."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return f"default-src 'none'; img-src 'self' file:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


PAGE = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
    """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{{ policy }}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>fastvlm_jax: {{ title }}</title><style>{{ style }}</style></head><body>
<h1>{{ title }}</h1>
{% for line in soft %}
<p class="soft">{{ line }}</p>
{% endfor %}
{% if lead %}<div class="lead">
{% for line in lead %}
<p>{{ line }}</p>
{% endfor %}
</div>{% endif %}
{% for part in parts %}
<h2>{{ part.title }}</h2>
{% if part.head %}
<div class="wide"><table>
<thead><tr>{% for name in part.head %}<th>{{ name }}</th>{% endfor %}</tr></thead><tbody>
{% for row in part.rows %}
<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
{% elif part.texts %}
{% for name, text in part.texts %}
<details><summary>{{ name }}</summary><pre>{{ text }}</pre></details>
{% endfor %}
{% else %}
<figure><div class="wide">
{% if part.svg %}{{ part.svg }}{% else %}<img src="{{ part.file | urlencode }}" alt="{{ part.title }}">{% endif %}
</div></figure>
{% endif %}
{% if part.note %}
<p class="soft">{{ part.note }}</p>
{% endif %}
{% endfor %}
<div id="tip" role="status" hidden></div>
<script>{{ script }}</script>
</body></html>
"""
)


def render(
    title: str, parts: Sequence[Table | Picture | Texts], lead: Sequence[str] = (), soft: Sequence[str] = ()
) -> str:
    """Returns the page: title, lines of what it is about, what was found, then the parts; all texts are escaped."""
    shown = [part for part in parts if not isinstance(part, Table) or part.rows]
    style, script = markupsafe.Markup(STYLE), markupsafe.Markup(SCRIPT)
    return PAGE.render(
        title=title, parts=shown, lead=lead, soft=soft, style=style, script=script, policy=policy(SCRIPT)
    )


def inline_svg(svg: str, name: str, tips: Mapping[str, str], title: str) -> markupsafe.Markup:
    """Returns an SVG for the inside of a page.

    Args:
      svg: SVG as matplotlib writes it.
      name: put before the ids that something refers to, so that those of several drawings differ; others are dropped.
      tips: id of an element -> values that the page shows beside it.
      title: what it shows, for people who do not see it.
    """
    ET.register_namespace("", "http://www.w3.org/2000/svg")
    ET.register_namespace("xlink", "http://www.w3.org/1999/xlink")
    root = ET.fromstring(svg)
    root.attrib.pop("height")
    wide = float(root.attrib.pop("width").removesuffix("pt")) * 4 / 3
    # On a phone it is scrolled sideways rather than made too small to read.
    style = f"max-width: {1.15 * wide:.0f}px; min-width: {min(600, wide):.0f}px"
    root.attrib |= {"role": "group", "aria-label": title, "style": style}
    referred = set(re.findall(r"""(?:url\(#|href="#)([^)"]+)""", svg))
    for parent in root.iter():
        for child in [each for each in parent if each.tag.endswith("}metadata")]:
            parent.remove(child)
        for key, value in list(parent.attrib.items()):
            if key == "id" and value in tips:
                parent.attrib |= {"data-tip": tips[value], "aria-label": tips[value], "tabindex": "0", "role": "img"}
            if key == "id" and value not in {*tips, *referred}:
                del parent.attrib[key]
            elif key == "id":
                parent.attrib[key] = f"{name}-{value}"
            elif key.endswith("href") and value.startswith("#"):
                parent.attrib[key] = f"#{name}-{value[1:]}"
            elif key in ("clip-path", "style"):
                parent.attrib[key] = re.sub(r"url\(#([^)]*)\)", rf"url(#{name}-\1)", value)
    return markupsafe.Markup(ET.tostring(root, encoding="unicode"))
