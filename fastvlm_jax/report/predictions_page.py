"""Holds the HTML page of predictions: its style, its script, which filters the rows, and the template around both."""

import base64
import hashlib
from typing import Any

import jinja2
import markupsafe

STYLE = """
 :root { --ink: #1d2330; --soft: #5f6b7e; --line: #e3e6ec; --wash: #f6f7f9; --accent: #2f5fb3;
         --right: #14692f; --partly: #8a5a00; --wrong: #b3261e; --unscored: #5f6b7e }
 * { box-sizing: border-box }
 body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: #fff; max-width: 1180px;
        margin: 1.6em auto; padding: 0 1.2em }
 h1 { font-size: 1.5em; margin: 0 0 .2em } p { margin: .3em 0 } .soft { color: var(--soft) }
 .benchmarks { display: grid; grid-template-columns: repeat(auto-fill, minmax(265px, 1fr)); gap: .8em; margin: 1em 0 }
 button, select, input { font: inherit; color: inherit; border: 1px solid var(--line); background: #fff;
        border-radius: 8px; padding: .35em .8em; min-width: 0 }
 button { cursor: pointer; text-align: left } button:hover { border-color: var(--accent) }
 button:focus-visible, select:focus-visible, input:focus-visible { outline: 2px solid var(--accent) }
 button[aria-pressed=true] { border-color: var(--accent); box-shadow: inset 0 0 0 1px var(--accent) }
 .benchmark { background: var(--wash); padding: .7em 1em; overflow-wrap: anywhere; line-height: 1.4; display: flex;
        flex-direction: column; justify-content: start }
 .benchmark strong { font-size: 1.6em; line-height: 1.3; margin-right: .25em }
 .benchmark small { color: var(--soft); font-size: .83em; margin-top: .25em }
 table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9em; margin: .4em 0 }
 td, th { padding: .2em .9em; text-align: right; border-bottom: 1px solid var(--line); overflow-wrap: anywhere }
 td:first-child, th:first-child { text-align: left; padding-left: 0 } summary { cursor: pointer; color: var(--soft) }
 .filters { position: sticky; top: 0; background: #fffffff2; padding: .7em 0; border-bottom: 1px solid var(--line);
        display: flex; flex-wrap: wrap; gap: .5em; align-items: center; z-index: 2 }
 .filters input { flex: 1 1 12em } .filters select { max-width: 19em; text-overflow: ellipsis }
 .verdicts { display: flex; flex-wrap: wrap; gap: .4em } .verdicts button { padding: .35em .65em }
 .verdicts span { color: var(--soft); font-variant-numeric: tabular-nums }
 #count { margin: .8em 0; color: var(--soft) }
 .row { display: grid; grid-template-columns: minmax(0, 24em) minmax(0, 1fr); gap: 1em 1.6em; padding: 1.1em 1.2em;
        margin: 0 0 1em; border: 1px solid var(--line); border-left: 5px solid var(--soft); border-radius: 10px }
 .row.right { border-left-color: var(--right) } .row.partly { border-left-color: var(--partly) }
 .row.wrong { border-left-color: var(--wrong) } .row.text { grid-template-columns: minmax(0, 1fr) }
 .images { display: flex; flex-wrap: wrap; gap: .6em; align-content: start; align-items: start }
 .images img { display: block; height: auto; max-width: 100%; border: 1px solid var(--line); border-radius: 4px }
 .images .small { image-rendering: pixelated }
 .unread { background: #fdecea; border-radius: 6px; padding: .4em .8em; overflow-wrap: anywhere; font-size: .9em }
 .where { grid-column: 1 / -1; display: flex; flex-wrap: wrap; gap: .1em 1.2em; font-size: .86em; color: var(--soft) }
 .where > * { overflow-wrap: anywhere } .where b { color: var(--ink) }
 dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: .45em 1em; margin: 0;
        align-content: start }
 dt { color: var(--soft); font-size: .86em; line-height: 1.75 }
 dd { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; max-height: 18em;
        overflow-y: auto } .answer { font-weight: 600 } .none { color: var(--soft); font-weight: 400 }
 .right .answer, .right .score { color: var(--right) } .partly .answer, .partly .score { color: var(--partly) }
 .wrong .answer, .wrong .score { color: var(--wrong) }
 #more { display: block; margin: 1.5em auto }
 @media (max-width: 640px) {
  body { padding: 0 .7em; margin-top: .8em }
  .benchmarks { display: flex; overflow-x: auto; padding: 2px } .benchmark { flex: 0 0 16em }
  .filters { position: static } .filters select, .filters input { flex: 1 1 100%; max-width: none }
  .row { grid-template-columns: minmax(0, 1fr); padding: .8em }
  dl { grid-template-columns: minmax(0, 1fr); gap: 0 } dd { margin-bottom: .5em }
 }
"""

# Every text of a row becomes a text node, so that none of it is read as HTML.
SCRIPT = r"""
"use strict";
const {benchmarks, rows, verdicts} = JSON.parse(document.getElementById("data").textContent);
const STEP = 40;  // rows that are added to the page at a time
const by = id => document.getElementById(id);
const filters = ["benchmark", "group", "verdict", "search"];
let state = {}, found = [], shown = 0;

function visible(text) {
  // Control characters and marks that turn the direction of writing are written out, line breaks and tabs are kept.
  return text.replace(/[\0-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]/g,
    c => "\\u" + c.charCodeAt(0).toString(16).padStart(4, "0"));
}
function element(tag, name, ...content) {
  const made = document.createElement(tag);
  if (name) made.className = name;
  made.append(...content.map(part => typeof part === "string" ? visible(part) : part));
  return made;
}
const groupsOf = row => Object.entries(row.groups).map(([name, value]) => name + ": " + value);
for (const row of rows) {
  row.keys = new Set(groupsOf(row));
  row.text = [row.id, row.prompt, row.answer, row.parsed, row.references.join("\n"), ...row.images.map(i => i.name)]
    .join("\n").toLowerCase();
}
const tests = {
  benchmark: (row, value) => row.benchmark === Number(value),
  group: (row, value) => row.keys.has(value),
  verdict: (row, value) => value === "unparsed" ? row.unparsed : row.verdict === value,
  search: (row, value) => row.text.includes(value.toLowerCase()),
};
const passing = left_out => rows.filter(row =>
  filters.every(name => name === left_out || !state[name] || tests[name](row, state[name])));
const written = number => number.toLocaleString("en");

function counted(values) {
  const counts = new Map();
  for (const value of values) counts.set(value, (counts.get(value) || 0) + 1);
  return counts;
}
function showRow(row) {
  const images = element("div", "images");
  for (const image of row.images) {
    if (image.error) { images.append(element("div", "unread", image.name + ": " + image.error)); continue; }
    const link = element("a", ""), picture = element("img", ""), small = Math.max(image.width, image.height) <= 128;
    Object.assign(picture, {loading: "lazy", src: image.file, alt: image.name, title: image.name,
      width: image.width, height: image.height});
    // At most so high, in em; tiny images are enlarged.
    const most = (row.images.length > 1 ? 11 : small ? 13 : 26) * image.width / image.height + "em";
    picture.style.width = small ? most : "min(" + image.width + "px, " + most + ")";
    if (small) picture.className = "small";
    Object.assign(link, {href: image.file, target: "_blank"});
    link.append(picture);
    images.append(link);
  }
  const where = element("div", "where", element("b", "", benchmarks[row.benchmark].name), element("span", "", row.id),
    ...groupsOf(row).map(text => element("span", "", text)));
  const list = element("dl", "");
  const line = (name, text, style, none) =>
    list.append(element("dt", "", name), element("dd", style + (text ? "" : " none"), text || none));
  line("prompt", row.prompt, "", "(empty)");
  line("answer", row.answer, "answer", "(empty)");
  if (row.verdict !== "not scored") line("parsed", row.parsed, "", row.unparsed ? "nothing" : "(empty)");
  const times = n => n > 1 ? " \u00d7 " + n : "";
  const references = [...counted(row.references)].map(([text, n]) => (text || "(empty)") + times(n));
  line("references", references.join("\n"), "", "not public");
  line("score", row.verdict === "not scored" ? "" : row.score + ", " + row.verdict, "score", "not scored");
  const style = row.verdict + (row.images.length ? "" : " text");
  const article = element("article", "row " + style.replace("not scored", "unscored"), where);
  if (row.images.length) article.append(images);
  article.append(list);
  return article;
}
function more() {
  by("rows").append(...found.slice(shown, shown += STEP).map(showRow));
  by("more").hidden = shown >= found.length;
}
function showGroups() {
  const counts = counted(passing("group").flatMap(row => [...row.keys]));
  if (state.group && !counts.has(state.group)) counts.set(state.group, 0);
  const options = [...counts].sort((a, b) => a[0] < b[0] ? -1 : 1).map(([key, n]) => {
    const option = element("option", "", key + " (" + written(n) + ")");
    option.value = key;
    return option;
  });
  const all = element("option", "", "all groups");
  all.value = "";
  by("group").replaceChildren(all, ...options);
  by("group").value = state.group;
  by("group").hidden = !options.length;
}
function show() {
  found = passing();
  shown = 0;
  by("rows").replaceChildren();
  more();
  const all = passing("verdict");
  for (const button of document.querySelectorAll("[data-verdict]")) {
    const value = button.dataset.verdict, n = value ? all.filter(row => tests.verdict(row, value)).length : all.length;
    button.setAttribute("aria-pressed", String(state.verdict === value));
    button.lastElementChild.textContent = written(n);
    button.hidden = !n && value !== state.verdict && !["right", "wrong"].includes(value);
  }
  const each = counted(passing("benchmark").map(row => row.benchmark));
  for (const button of document.querySelectorAll("[data-benchmark]")) {
    const value = button.dataset.benchmark;
    button.setAttribute("aria-pressed", String(state.benchmark === value));
    button.querySelector("[data-count]").textContent = written(each.get(Number(value)) || 0);
  }
  showGroups();
  if (by("search").value !== state.search) by("search").value = state.search;
  const scored = found.filter(row => row.verdict !== "not scored");
  const mean = scored.reduce((sum, row) => sum + row.score, 0) / scored.length;
  by("count").textContent = written(found.length) + " of " + written(rows.length) + " rows on this page" +
    (scored.length ? ", mean score " + mean.toFixed(3) : "");
}
function read() {
  const asked = new URLSearchParams(location.hash.slice(1));
  state = Object.fromEntries(filters.map(name => [name, asked.get(name) || ""]));
  show();
}
function set(changed) {
  Object.assign(state, changed);
  const kept = new URLSearchParams(Object.entries(state).filter(([, value]) => value));
  history.replaceState(null, "", "#" + kept);
  show();
}
for (const button of document.querySelectorAll("[data-benchmark]"))
  button.onclick = () =>
    set({benchmark: state.benchmark === button.dataset.benchmark ? "" : button.dataset.benchmark, group: ""});
for (const button of document.querySelectorAll("[data-verdict]"))
  button.onclick = () => set({verdict: button.dataset.verdict});
by("group").onchange = () => set({group: by("group").value});
by("search").oninput = () => set({search: by("search").value});
by("more").onclick = more;
new IntersectionObserver(seen => seen.some(s => s.isIntersecting) && more(), {rootMargin: "600px"}).observe(by("more"));
window.onhashchange = read;
read();
"""
# A browser runs this script alone, and loads nothing but images.
_DIGEST = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
POLICY = f"default-src 'none'; img-src 'self' file:; style-src 'unsafe-inline'; script-src 'sha256-{_DIGEST}'"
PAGE = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
    """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{{ policy }}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title><style>{{ style }}</style></head><body>
<h1>{{ title }}</h1>
<div class="benchmarks">
{% for b in data.benchmarks %}
<button class="benchmark" data-benchmark="{{ loop.index0 }}" aria-pressed="false"><b>{{ b.title }}</b>
<span>{% if b.score %}<strong>{{ b.score }}</strong>{% if b.error %}± {{ b.error }}{% endif %}
{% else %}{{ b.why }}{% endif %}</span>
<small>{{ b.metric }}</small>
{% if b.figures %}<small>{{ b.figures }}</small>{% endif %}
<small>{{ "{:,}".format(b.n) }} questions, protocol {{ b.protocol }}
{%- if b.left_out %}; {{ "{:,}".format(b.left_out) }} could not be asked{% endif %}</small>
<small>{{ b.rule }}</small>
{% if b.unparsed %}<small>{{ b.unparsed }} of the answers could not be parsed</small>{% endif %}
<small>{{ "{:,}".format(b.shown) }} on this page, <span data-count></span> of them selected</small></button>
{% endfor %}
</div>
{% for b in data.benchmarks if b.groups %}
<details><summary>{{ b.title }}: scores of its groups</summary><table>
<tr><th>group<th>score<th>standard error<th>questions</tr>
{% for name, score, error, n in b.groups %}
<tr><td>{{ name }}<td>{{ score }}<td>{{ error }}<td>{{ "{:,}".format(n) }}</tr>
{% endfor %}
</table></details>
{% endfor %}
<p class="soft">± is the standard error of the score.
{% if drawn %}
Of a benchmark with more than {{ "{:,}".format(rows) }} questions the page shows {{ "{:,}".format(rows) }}, drawn with a
fixed seed, with right and wrong answers in their real proportion (<code>--page_rows</code> changes the number).
{% endif %}</p>
<noscript><p>The rows are shown by a script of this page: allow scripts.</p></noscript>
<div class="filters"><div class="verdicts" role="group" aria-label="verdict">
<button data-verdict="">all <span></span></button>
{% for verdict in data.verdicts %}
<button data-verdict="{{ verdict }}">{{ verdict }} <span></span></button>
{% endfor %}
</div><select id="group" aria-label="group"></select>
<input id="search" type="search" placeholder="search prompts, answers, references, ids" aria-label="search"></div>
<p id="count" aria-live="polite"></p>
<main id="rows"></main>
<button id="more">show more rows</button>
<script type="application/json" id="data">{{ data | tojson }}</script>
<script>{{ script }}</script>
</body></html>
"""
)


def render(data: dict[str, Any], rows: int) -> str:
    """Returns the page.

    Args:
      data: JSON values: "benchmarks" for the head, "rows" for the script, and "verdicts", which a row may have.
      rows: most rows of a benchmark.
    """
    style, script = markupsafe.Markup(STYLE), markupsafe.Markup(SCRIPT)
    title = f"Predictions: {', '.join(benchmark['name'] for benchmark in data['benchmarks'])}"
    drawn = any(benchmark["shown"] < benchmark["n"] for benchmark in data["benchmarks"])
    return PAGE.render(title=title, style=style, script=script, policy=POLICY, data=data, rows=rows, drawn=drawn)
