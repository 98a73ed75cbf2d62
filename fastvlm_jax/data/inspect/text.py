"""Formats the results of an inspection as text of 100 columns."""

import itertools
from collections.abc import Sequence

from fastvlm_jax.data.inspect.contents import Contents, Counts
from fastvlm_jax.data.inspect.usage import Choice, Usage, choice_table
from fastvlm_jax.data.rejected import Reasons

_WIDTH = 100  # columns of a line
_BAR = 16  # columns of the longest bar


def visible(text: str) -> str:
    """Returns text with unprintable characters escaped.

    They are line breaks, terminal escapes, and marks that turn the direction of writing:

        "a\\x1b[31m\\u202e"  ->  r"a\\x1b[31m\\u202e"
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def describe(sets: Sequence[Contents], usage: Usage | None) -> str:
    """Returns the text of an inspection; `usage` is None without a run."""
    blocks = [block for contents in sets for block in _contents(contents)]
    return "\n\n".join("\n".join(block) for block in [*blocks, *(_usage(usage) if usage else [])])


def percent(share: float) -> str:
    """Returns a fraction in percent, such as "83 %"; only 0 and 1 themselves become "0 %" and "100 %"."""
    if share in (0, 1) or 0.0095 < share < 0.995:
        return f"{100 * share:.0f} %"
    return f"{min(max(100 * share, 0.1), 99.9):.1f} %"


def plural(count: int, one: str, many: str = "") -> str:
    """Returns a count with its noun, such as "1 record" or "2,000 records"."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def held(c: Contents) -> str:
    """Returns the numbers of records, images, bytes and shards of a data set."""
    records, images, shards = plural(c.records, "record"), plural(c.images, "image"), plural(c.shards, "shard")
    return f"{records}, {images}, {_bytes(c.bytes)} in {shards}"


def overlong(u: Usage) -> str:
    """Returns a sentence about the texts that are longer than a row."""
    if not u.overlong:
        return f"none of {u.segments:,} texts is longer than a row of {u.row_length:,} tokens"
    left_out = f"; {u.truncated:,} of them lose their oldest questions" if u.truncated else ""
    return f"{u.overlong:,} of {u.segments:,} texts are longer than a row of {u.row_length:,} tokens{left_out}"


def _contents(c: Contents) -> list[list[str]]:
    checked = "checksums are right" if c.verified else "sizes are right, --verify compares checksums"
    head = [
        visible(f"{c.folder}, split {c.split}"),
        f"  {held(c)} ({checked})",
    ]
    if c.largest:
        head += [visible(f"  largest image   {c.largest}"), visible(f"  smallest image  {c.smallest}")]
    blocks = [head]
    drawn = [
        _bars("longer side, px", c.longer_side),
        _bars("width / height", c.aspect),
        _bars("images per record", c.images_per_record),
        _bars(f"turns{_of_read(c)}", c.turns),
        _bars(f"formats{_of_read(c)}", c.formats),
    ]
    drawn = [bars for bars in drawn if len(bars) > 1]
    blocks += [_beside(*pair) for pair in itertools.zip_longest(drawn[::2], drawn[1::2], fillvalue=[])]
    if c.rejected:
        blocks.append(
            [f"rejected when the data set was written: {plural(c.rejected, 'entry', 'entries')}", *_reasons(c.reasons)]
        )
    if c.damaged:
        blocks.append(
            [
                f"damaged: {len(c.damaged):,} of {c.read:,} records read",
                *(_line(item.removeprefix(f"{c.folder}/")) for item in c.damaged[:10]),
            ]
        )
    return blocks


def _of_read(c: Contents) -> str:
    return "" if c.read == c.records else f", of {c.read:,} records"


def _usage(u: Usage) -> list[list[str]]:
    lost = f"{plural(u.unusable, 'record')} cannot be used" if u.unusable else "every record can be used"
    blocks = [
        [
            f"the schedule at {u.image_size} px: {u.batches_per_epoch:,} batches of {u.groups:,} groups an epoch",
            f"  token slots {percent(u.token_fill)} used, image slots {percent(u.image_fill)}; {lost}",
        ],
        [*_beside(_bars("tokens of a text and its images", u.lengths), _quantiles(u.quantiles)), f"  {overlong(u)}"],
    ]
    if u.reasons:
        blocks.append(["records that cannot be used, and are replaced:", *_reasons(u.reasons)])
    if len(u.sets) > 1:
        rows = [
            (
                visible(s.name), f"{s.records:,}", f"{s.unusable:,}", f"{s.drawn:,}", f"{s.passes:.2f}",
                percent(s.token_share), percent(s.image_share),
            )
            for s in u.sets
        ]  # fmt: skip
        header = ("data set", "records", "unusable", "drawn per epoch", "passes", "token share", "image share")
        blocks.append(_table(header, rows))
    rows = [
        (
            f"{b.width} x {b.height}", f"{b.tokens_per_image:,}", f"{b.images_per_group:,}", f"{b.batches:,.0f}",
            f"{b.records_per_batch:,.1f}", percent(b.token_fill), percent(b.image_fill),
        )
        for b in u.buckets
    ]  # fmt: skip
    header = ("images", "tokens each", "slots/group", "batches", "records/batch", "token fill", "image fill")
    note = [] if u.counted == u.batches_per_epoch else [f"  counted in {u.counted:,} of the batches, drawn at random"]
    blocks.append(_table(header, rows) + note)
    return [*blocks, _choices(u)] if u.choices else blocks


def _quantiles(quantiles: dict[str, int]) -> list[str]:
    return ["quantiles, tokens", *(f"{name:>13} {tokens:>10,}" for name, tokens in quantiles.items())]


def _choices(u: Usage) -> list[str]:
    lengths, cells = choice_table(u)
    rows = [(f"{images}", *(_choice(choice, u) for choice in own)) for images, own in cells.items()]
    header = ("images_per_group", *(f"row_length {length:,} " for length in lengths))
    title = f"other settings, tried with {u.compared:,} records: token slots used, image slots used, records per group"
    lost = any(choice.lost for choice in u.choices)
    note = "  [the config's own]" + "; -N %: share of records that cannot be used" * lost
    return [title, *("  " + line for line in _table(header, rows)), note]


def _choice(choice: Choice | None, u: Usage) -> str:
    if choice is None:
        return "nothing fits "
    lost = f" -{percent(choice.lost)}" if choice.lost else ""
    cell = f"{percent(choice.token_fill)} {percent(choice.image_fill):>6} {choice.records_per_group:6.1f}{lost}"
    own = (choice.images_per_group, choice.row_length) == (u.images_per_group, u.row_length)
    return f"[{cell}]" if own else f"{cell} "


def _bars(title: str, counts: Counts) -> list[str]:
    """Returns the lines of a histogram, 48 columns wide."""
    total, most = max(sum(counts.values()), 1), max(counts.values(), default=1)
    lines = [title]
    for label, count in counts.items():
        bar = "█" * round(_BAR * count / most) or "▏" * bool(count)
        lines.append(f"{visible(label):>13} {count:>10,} {percent(count / total):>6}  {bar}")
    return lines


def _beside(left: list[str], right: list[str]) -> list[str]:
    pairs = itertools.zip_longest(left, right, fillvalue="")
    return [f"{a:<49}  {b}".rstrip() for a, b in pairs]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = []
    for first, *rest in (header, *rows):
        cells = [f"{first:<{widths[0]}}", *(f"{c:>{w}}" for c, w in zip(rest, widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return lines


def _reasons(reasons: Reasons) -> list[str]:
    return [_line(f"{count:>9,}  {reason}") for count, reason in reasons]


def _line(text: str) -> str:
    text = visible(text)
    return "  " + (text if len(text) <= _WIDTH - 2 else text[: _WIDTH - 5] + "...")


def _bytes(count: int) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"
