"""Writes the HTML page of an inspection: one file without scripts, which loads nothing else."""

import base64
import io
import pathlib
from collections.abc import Iterable, Sequence

import jinja2
import markupsafe
import numpy as np
import PIL.Image

from fastvlm_jax.data.inspect.contents import Contents
from fastvlm_jax.data.inspect.samples import Piece, Sample
from fastvlm_jax.data.inspect.text import held, overlong, percent, plural, visible
from fastvlm_jax.data.inspect.usage import Usage, choice_table
from fastvlm_jax.files import write_whole

_LOSSLESS = 256  # longer side in pixels up to which views are stored without loss
_HEAD, _TAIL = 500, 150  # pieces shown at the start and at the end of a long text
_TEXTS = 3  # texts of a record that are shown unfolded

STYLE = """
 :root { --ink: #1d2330; --soft: #667085; --line: #e3e6ec; --paper: #fff; --wash: #f6f7f9; --bar: #5b7fc7;
         --learnt: #c9efd2; --learnt2: #b4e6c1; --image: #fbe3b5; --special: #dfe3ee }
 * { box-sizing: border-box }
 body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 1180px;
        margin: 2.2em auto; padding: 0 1.2em }
 h1 { font-size: 1.5em; margin: 0 } h2 { font-size: 1.15em; margin: 2.4em 0 .7em }
 h3 { font-size: .92em; margin: 0 0 .5em; font-weight: 600 }
 .soft { color: var(--soft) } .path { overflow-wrap: anywhere }
 .figures { display: flex; flex-wrap: wrap; gap: .8em; margin: 1.2em 0 }
 .figure { background: var(--wash); border-radius: 8px; padding: .6em 1em; min-width: 8.5em }
 .figure b { display: block; font-size: 1.35em; line-height: 1.3 } .figure span { color: var(--soft); font-size: .85em }
 .charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(330px, 1fr)); gap: 1.6em 2.6em }
 .bars { display: grid; grid-template-columns: max-content max-content 1fr; gap: 2px .7em; font-size: .84em;
         align-items: center; font-variant-numeric: tabular-nums }
 .bars span { text-align: right } .bars i { background: var(--bar); height: 11px; border-radius: 2px; min-width: 1px }
 table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92em }
 th, td { padding: .3em .95em; text-align: right; border-bottom: 1px solid var(--line) }
 th { font-weight: 600; color: var(--soft) } th:first-child, td:first-child { text-align: left; padding-left: .2em }
 td.own { outline: 2px solid var(--ink); outline-offset: -2px; border-radius: 4px }
 td small { color: var(--soft); display: block }
 .list td { text-align: left } .list td:first-child { text-align: right }
 .sample { border: 1px solid var(--line); border-radius: 10px; margin: 1.1em 0; padding: 1em 1.2em }
 .sample header { display: flex; flex-wrap: wrap; gap: .1em 1.4em; align-items: baseline; font-size: .88em;
                  color: var(--soft); margin-bottom: .8em }
 .sample header b { color: var(--ink); font-size: 1.1em; overflow-wrap: anywhere }
 .replaced { background: #fdecea; border-radius: 6px; padding: .4em .8em; margin: 0 0 .8em; overflow-wrap: anywhere }
 .content { display: flex; flex-wrap: wrap; gap: 1.2em }
 .views { flex: 0 1 auto; max-width: 420px; display: flex; flex-wrap: wrap; gap: 0 12px; align-content: start }
 .texts { flex: 1 1 420px; min-width: 0 }
 figure { margin: 0 0 .8em } figcaption { font-size: .8em; color: var(--soft); margin-top: .2em }
 .view { display: grid; gap: 2px; width: max-content; max-width: 100% } .view .first { grid-column: 1 / -1 }
 .view img { display: block; width: 100%; border: 1px solid var(--line); cursor: zoom-in; outline: 0 }
 .view .small { image-rendering: pixelated }
 .view img:focus { position: fixed; inset: 0; margin: auto; width: auto; height: auto; max-width: 96vw;
                   max-height: 96vh; min-width: min(60vw, 60vh); z-index: 9; cursor: zoom-out;
                   box-shadow: 0 0 0 100vmax #000b }
 .text { margin: 0 0 .9em } .text > small { color: var(--soft); display: block; margin-bottom: .15em }
 .tokens { font: 13.5px/1.75 ui-monospace, "DejaVu Sans Mono", monospace; white-space: pre-wrap;
           overflow-wrap: anywhere; direction: ltr; background: var(--wash); border-radius: 6px; padding: .5em .7em }
 .tokens > * { font-style: normal; font-weight: inherit; unicode-bidi: isolate; padding: 2px 0; border-radius: 2px;
               box-shadow: inset 1px 0 #fff } .tokens u { text-decoration: none }
 .tokens u { background: #e9ebf0 } .tokens i { background: var(--learnt) }
 .tokens i:nth-of-type(even) { background: var(--learnt2) }
 .tokens b { background: var(--special); color: #4a5470; font-size: .86em; padding: 2px 4px; border-radius: 8px }
 .tokens b.l { background: var(--learnt2); color: #17612c }
 .tokens s { background: var(--image); color: #6d4a00; text-decoration: none; padding: 2px 7px; border-radius: 8px;
             font-size: .9em; white-space: nowrap }
 .tokens em { color: #0006 } .legend { display: inline-block; white-space: normal; padding: .4em .7em }
 summary { cursor: pointer; color: var(--soft) }
"""
_ENVIRONMENT = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
_ENVIRONMENT.filters |= {f.__name__: f for f in (held, overlong, percent, plural, visible)}
PAGE = _ENVIRONMENT.from_string(
    """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title><style>{{ style }}</style></head><body>
{% macro bars(title, counts, note="") %}{% if counts %}
<div><h3>{{ title }} <span class="soft">{{ note }}</span></h3><div class="bars">
{% for label, count in counts.items() %}
<span>{{ label | visible }}</span><span>{{ "{:,}".format(count) }}</span>
<i style="width:{{ "%.1f" % (100 * count / (counts.values() | max)) }}%"></i>
{% endfor %}
</div></div>
{% endif %}{% endmacro %}
{% macro figure(value, name) %}<div class="figure"><b>{{ value }}</b><span>{{ name }}</span></div>{% endmacro %}
{% macro reasons(list) %}<table class="list">
{% for count, reason in list %}<tr><td>{{ "{:,}".format(count) }}<td class="path">{{ reason | visible }}</tr>
{% endfor %}</table>{% endmacro %}

<h1>{{ title }}</h1>
<div class="figures">
{{ figure("{:,}".format(sets | sum(attribute="records")), "records") }}
{{ figure("{:,}".format(sets | sum(attribute="images")), "images") }}
{{ figure("{:,}".format(usage.batches_per_epoch), "batches an epoch") }}
{{ figure(usage.token_fill | percent, "of token slots used") }}
{{ figure(usage.image_fill | percent, "of image slots used") }}
{{ figure("{:,}".format(usage.unusable), "records cannot be used") }}
</div>

<p><a href="#samples">samples</a> · <a href="#schedule">schedule and other settings</a> ·
<a href="#contents">contents</a></p>

<h2 id="samples">Samples as the model sees them</h2>
<p class="tokens legend"><u> text </u> <i> supervised </i> <b>special token</b> <b class="l">supervised special
token</b> <s>image &times; tokens, slot</s></p>
<p class="soft">Pixels and tokens come from the arrays of the batches. The green tokens are supervised, so they
count in the loss. Click an image to enlarge it.</p>
{% for sample in samples %}
<section class="sample"><header><b>{{ (sample.key or "(no key)") | visible }}</b>
<span>{{ sample.place | visible }}</span>
<span>bucket {{ sample.size.width }} &times; {{ sample.size.height }}</span>
<span>batch {{ sample.batch }}, group {{ sample.group }}</span></header>
{% if sample.replaced %}
<p class="replaced">This record cannot be used, another one takes its place: {{ sample.replaced | visible }}</p>
{% endif %}
<div class="content">
{% if sample.views %}<div class="views">
{% for view in sample.views %}
<figure><div class="view" style="grid-template-columns: repeat({{ view.columns }}, {{ view.across }}px)">
{% for uri in view.pictures %}
<img src="{{ uri }}" tabindex="0" alt="slot {{ view.slot + loop.index0 }}"
 class="{{ "first " if loop.first }}{{ "small" if view.small }}">
{% endfor %}
</div><figcaption>slot{{ "s %d to %d" % (view.slot, view.last) if view.last > view.slot else " %d" % view.slot }}
{{- ": " ~ view.original if view.original }}</figcaption></figure>
{% endfor %}
</div>{% endif %}
<div class="texts">
{% for text in sample.texts %}
{% if loop.index0 == shown %}<details><summary>{{ loop.length - shown }} more texts</summary>{% endif %}
<div class="text"><small>row {{ text.row }}, tokens {{ text.start }} to {{ text.stop - 1 }}
{{- ", " ~ text.learnt ~ " supervised" }}{{ ", oldest questions dropped" if text.cut }}</small>
<div class="tokens">{{ text.html }}</div></div>
{% if loop.last and loop.length > shown %}</details>{% endif %}
{% endfor %}
</div></div></section>
{% endfor %}

<h2 id="schedule">How the schedule uses the data</h2>
<div class="charts">
{{ bars("tokens of a text and its images", usage.lengths, "at %d px" % usage.image_size) }}
<div><h3>quantiles, tokens</h3><table>
{% for name, tokens in usage.quantiles.items() %}<tr><td>{{ name }}<td>{{ "{:,}".format(tokens) }}</tr>
{% endfor %}</table>
<p class="soft">{{ usage | overlong }}.</p></div>
</div>
{% if usage.reasons %}<br><h3>Records that cannot be used, and are replaced</h3>{{ reasons(usage.reasons) }}{% endif %}
<br><table><tr><th>image size<th>tokens per image<th>slots per group<th>batches<th>records per batch
<th>token slots used<th>image slots used</tr>
{% for b in usage.buckets %}
<tr><td>{{ b.width }} &times; {{ b.height }}<td>{{ b.tokens_per_image }}<td>{{ b.images_per_group }}
<td>{{ "{:,.0f}".format(b.batches) }}<td>{{ "{:,.1f}".format(b.records_per_batch) }}
<td>{{ b.token_fill | percent }}<td>{{ b.image_fill | percent }}</tr>
{% endfor %}</table>
{% if usage.sets | length > 1 %}<br><table>
<tr><th>data set<th>records<th>unusable<th>drawn per epoch<th>passes<th>share of tokens<th>share of images</tr>
{% for s in usage.sets %}
<tr><td>{{ s.name | visible }}<td>{{ "{:,}".format(s.records) }}<td>{{ "{:,}".format(s.unusable) }}
<td>{{ "{:,}".format(s.drawn) }}<td>{{ "%.2f" % s.passes }}<td>{{ s.token_share | percent }}
<td>{{ s.image_share | percent }}</tr>
{% endfor %}</table>{% endif %}
{% if usage.choices %}
<h3 style="margin-top: 1.6em">Other settings <span class="soft">tried with {{ "{:,}".format(usage.compared) }} records:
token slots and image slots used, records per group; the config's own values are framed</span></h3>
<table><tr><th>data.images_per_group
{% for length in lengths %}<th>row_length {{ "{:,}".format(length) }}{% endfor %}</tr>
{% for images, cells in choices.items() %}
<tr><td>{{ images }}{% for c in cells %}
{% if c is none %}<td class="soft">nothing fits
{% else %}
<td{% if c.images_per_group == usage.images_per_group and c.row_length == usage.row_length %} class="own"{% endif %}
 style="background: rgb(91 127 199 / {{ "%.2f" % (0.45 * c.token_fill * (c.image_fill or 1)) }})">
{{ c.token_fill | percent }} · {{ c.image_fill | percent }}
<small>{{ "%.1f" % c.records_per_group }} records{{ ", " ~ (c.lost | percent) ~ " unusable" if c.lost }}</small>
{% endif %}{% endfor %}</tr>
{% endfor %}</table>{% endif %}

<div id="contents"></div>
{% for c in sets %}
<h2 class="path">{{ c.folder | visible }}, split {{ c.split | visible }}</h2>
<p class="soft">{{ c | held }}{{ ", checksums are right" if c.verified }}
{%- if c.largest %}. Images from {{ c.smallest | visible }} to {{ c.largest | visible }}{% endif %}.</p>
<div class="charts">
{% set note = "" if c.read == c.records else "of %d records" % c.read %}
{{ bars("longer side, px", c.longer_side) }}{{ bars("width / height", c.aspect) }}
{{ bars("images per record", c.images_per_record) }}{{ bars("turns", c.turns, note) }}
{{ bars("formats", c.formats, note) }}
</div>
{% if c.rejected %}<h3>Rejected when the data set was written: {{ c.rejected | plural("entry", "entries") }}</h3>
{{ reasons(c.reasons) }}{% endif %}
{% if c.damaged %}<h3>{{ c.damaged | length }} of {{ c.read }} records read are damaged</h3>
<p class="path">{{ c.damaged[:10] | join("; ") | visible }}</p>{% endif %}
{% endfor %}
</body></html>
"""
)


def write_page(path: pathlib.Path, sets: Sequence[Contents], usage: Usage, samples: Iterable[Sample]) -> None:
    """Writes the page, atomically."""
    lengths, choices = choice_table(usage)
    html = PAGE.render(
        title=f"fastvlm data inspect: {', '.join(each.name for each in usage.sets)}",
        style=markupsafe.Markup(STYLE),
        sets=sets,
        usage=usage,
        samples=[_sample(sample, usage) for sample in samples],
        shown=_TEXTS,
        lengths=lengths,
        choices=choices,
    )
    write_whole(path, html.encode())


def _sample(sample: Sample, usage: Usage) -> dict[str, object]:
    """Returns a sample as the template reads it, with its pixels encoded."""
    views = [
        {
            "original": view.original,
            "slot": view.slot,
            "last": view.slot + len(view.pixels) - 1,
            "columns": view.columns,
            "across": (300 if len(sample.views) == 1 else 200) // view.columns,
            "small": max(view.pixels.shape[1:3]) <= _LOSSLESS,
            "pictures": [data_uri(pixels) for pixels in view.pixels],
        }
        for view in sample.views
    ]
    texts = [
        {
            **text._asdict(),
            "learnt": sum(len(piece.tokens) for piece in text.pieces if piece.learnt),
            "html": tokens_html(text.pieces),
        }
        for text in sample.texts
    ]
    place = f"{usage.sets[sample.source].name}: {sample.where.rpartition('/')[2]}"
    return {**sample._asdict(), "place": place, "views": views, "texts": texts}


def data_uri(pixels: np.ndarray) -> str:
    """Returns an image, uint8 [H, W, 3], as a data URI: PNG up to _LOSSLESS pixels a side, else lossy WebP."""
    buffer = io.BytesIO()
    image, small = PIL.Image.fromarray(pixels), max(pixels.shape[:2]) <= _LOSSLESS
    if small:
        image.save(buffer, "PNG")
    else:
        image.save(buffer, "WEBP", quality=85, method=2)
    return f"data:image/{'png' if small else 'webp'};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def tokens_html(pieces: Sequence[Piece]) -> markupsafe.Markup:
    """Returns the pieces of a text as coloured HTML; the middle of a very long text is left out."""
    if len(pieces) <= _HEAD + _TAIL:
        return markupsafe.Markup("").join(map(_piece, pieces))
    left_out = sum(max(piece.count, len(piece.tokens)) for piece in pieces[_HEAD:-_TAIL])
    gap = markupsafe.Markup("<em> ... {} more tokens ... </em>").format(f"{left_out:,}")
    return tokens_html(pieces[:_HEAD]) + gap + tokens_html(pieces[-_TAIL:])


def _piece(piece: Piece) -> markupsafe.Markup:
    ids = " ".join(map(str, piece.tokens))
    if piece.kind == "image":
        return markupsafe.Markup('<s title="{}">&lt;image &times; {}, slot {}&gt;</s>').format(
            ids, piece.count, piece.slot
        )
    if piece.kind == "special":
        mark = markupsafe.Markup(' class="l"' if piece.learnt else "")
        return markupsafe.Markup('<b{} title="{}">{}</b>').format(mark, ids, visible(piece.text))
    # A line break is shown as a mark, and then breaks the line.
    lines = [markupsafe.escape(visible(line)) for line in piece.text.split("\n")]
    text = markupsafe.Markup("<em>⏎</em>\n").join(lines)
    tag = "i" if piece.learnt else "u"
    return markupsafe.Markup('<{0} title="{1}">{2}</{0}>').format(markupsafe.Markup(tag), ids, text)
