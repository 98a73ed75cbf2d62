"""The page of predictions: which rows it shows, hostile texts, and its filters in a real browser."""

import collections
import html.parser
import io
import json

import numpy as np
import PIL.Image
import pytest
from browser import Browser, needs_browser

from fastvlm_jax.evaluate.benchmark import Mark, Picture, Result, Row
from fastvlm_jax.report.predictions import choose, verdict, write_page

HOSTILE = "</script><script>document.title = 'broken'</script>"
NAME = """images/"quoted" '<img src=x onerror=alert(1)>'.png"""


def png(width, height, colour, mode="RGB"):
    buffer = io.BytesIO()
    PIL.Image.new(mode, (width, height), colour).save(buffer, "PNG")
    return buffer.getvalue()


def fail():
    raise ValueError("it is no image")


def result(number, mark, *, answer="red", images=(), name=None, groups=None, references=("red",), prompt=None):
    pictures = tuple(
        Picture(name or f"images/{number}-{i}.png", (lambda data: lambda: data)(data) if data else fail)
        for i, data in enumerate(images)
    )
    row = Row(f"row{number}", "what?", pictures, references, groups=groups or {})
    return Result(row, prompt or f"user: <image>\nquestion {number}?", answer, mark)


def summary(name, score, n, **changes):
    return {
        "benchmark": name, "title": f"{name}, test", "metric": "accuracy, %", "score": score, "standard_error": 2.5,
        "protocol": {"name": "paper", "version": "lmms-eval 0.2.2", "rule": "equal"}, "n": n, "not_scored": None,
        "unparsed": 0.25, "left_out": {"questions": 3},
        "figures": {"perception_score": 1234.25, "perception_score_stderr": 12.5, "parts": {}},
        "groups": {"color": {"red": {"score": 50.0, "standard_error": 1.25, "n": 2}}},
    } | changes  # fmt: skip


def evaluated():
    """Two benchmarks: six rows of one, with hostile texts, and sixty of another."""
    marks = [Mark(1, "red"), Mark(0, "blue"), Mark(0.5, "re"), Mark(0, None), None, Mark(1, "red")]
    texts = ["red", "blue", HOSTILE, "\u202eabc\x07", "A & B <b>", "x" * 20000]
    images = [
        [png(1600, 900, "red")],
        [png(64, 48, "blue")],
        [png(64, 48, "blue"), png(900, 1600, "red")],
        [None],
        [],
        [],
    ]
    first = [
        result(i, mark, answer=text, images=own, groups={"color": "red" if i < 2 else "</option>"})
        for i, (mark, text, own) in enumerate(zip(marks, texts, images, strict=True))
    ]
    first[1] = result(1, marks[1], answer=texts[1], images=images[1], name=NAME, groups={"color": "red"})
    first[4] = result(4, None, answer=texts[4], references=None, prompt="user: a text alone")
    second = [result(i, Mark(i % 3 > 0, "red"), references=("red", "red", "green")) for i in range(60)]
    return [(summary("one", 50.0, 5), first), (summary("two", 66.7, 60, unparsed=0.0, groups={}), second)]


class Script(html.parser.HTMLParser):
    """Collects the attributes and the contents of the scripts of a page."""

    def __init__(self, page):
        super().__init__()
        self.scripts = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        if tag == "script":
            self.scripts.append([dict(attributes), ""])

    def handle_data(self, data):
        if self.lasttag == "script" and self.scripts:
            self.scripts[-1][1] += data


@pytest.mark.parametrize("count, expected", [(100, (80, 15, 5)), (10, (8, 1, 1)), (7, (6, 1, 0)), (1, (1, 0, 0))])
def test_the_rows_that_are_drawn_hold_right_and_wrong_answers_in_their_proportion(count, expected):
    marks = [Mark(0.0 if i % 20 < 3 else 0.5 if i % 20 == 10 else 1.0, "x") for i in range(1000)]
    results = [result(i, mark) for i, mark in enumerate(marks)]
    drawn = choose(results, count)
    counts = collections.Counter(verdict(each.mark) for each in drawn)
    assert tuple(counts[name] for name in ("right", "wrong", "partly")) == expected
    places = [results.index(each) for each in drawn]
    assert places == sorted(set(places)) and drawn == choose(results, count)
    # They are drawn from everywhere, not from the start.
    assert count < 10 or max(places) > 800


def test_few_rows_are_all_shown_and_unparsed_and_unscored_ones_keep_their_share():
    results = [result(i, None if i % 2 else Mark(0, None if i % 4 else "x")) for i in range(40)]
    assert choose(results, 40) == results and choose(results, 50) == results
    drawn = choose(results, 20)
    assert [sum(each.mark is None for each in drawn), sum(each.mark == Mark(0, None) for each in drawn)] == [10, 5]


def test_the_page_holds_hostile_texts_as_data_alone_and_its_images_are_small_jpegs(tmp_path):
    page = write_page(tmp_path / "new", evaluated(), rows=12)
    assert page == tmp_path / "new/predictions.html"
    (kind, data), (_, script) = Script(page.read_text()).scripts
    assert kind["type"] == "application/json" and "onerror" not in script
    rows = json.loads(data)["rows"]
    assert [row["answer"] for row in rows[:5]] == ["red", "blue", HOSTILE, "\u202eabc\x07", "A & B <b>"]
    assert len(rows[5]["answer"]) < 8100 and "12,000 more characters" in rows[5]["answer"]
    assert [row["verdict"] for row in rows[:6]] == ["right", "wrong", "partly", "wrong", "not scored", "right"]
    assert collections.Counter(row["verdict"] for row in rows[6:]) == {"right": 8, "wrong": 4}
    shown = [(image["width"], image["height"]) for row in rows for image in row["images"] if "file" in image]
    assert shown == [(768, 432), (64, 48), (64, 48), (432, 768)]
    assert rows[3]["images"] == [{"name": "images/3-0.png", "error": "it is no image"}]
    files = {image["file"] for row in rows for image in row["images"] if "file" in image}
    assert len(files) == 3 and {f"predictions_images/{path.name}" for path in (page.parent).glob("*/*")} == files
    for file in files:
        image = PIL.Image.open(page.parent / file)
        assert image.format == "JPEG" and max(image.size) <= 768
        pixel = np.array(image)[5, 5].astype(int)
        assert np.abs(pixel - ((0, 0, 255) if image.size == (64, 48) else (255, 0, 0))).max() < 8


def test_a_transparent_image_is_shown_on_white(tmp_path):
    write_page(tmp_path, [(summary("one", 1.0, 1), [result(0, Mark(1, ""), images=[png(8, 8, (9, 9, 9, 0), "RGBA")])])])
    (file,) = tmp_path.glob("predictions_images/*.jpg")
    assert np.array(PIL.Image.open(file)).min() > 250


TEXTS = "[...document.querySelectorAll('article')].map(row => row.querySelector('.where > span').textContent)"
COUNTS = """Object.fromEntries([...document.querySelectorAll('[data-verdict]')].filter(button => !button.hidden)
  .map(button => [button.dataset.verdict || 'all', Number(button.lastElementChild.textContent)]))"""
COUNT = "document.getElementById('count').textContent"


def press(browser, selector):
    browser.run(f"document.querySelector({json.dumps(selector)}).click()")


def choose_value(browser, name, value, event):
    script = f"e.value = {json.dumps(value)}; e.dispatchEvent(new Event('{event}'))"
    browser.run(f"(e => {{ {script} }})(document.getElementById('{name}'))")


@needs_browser
def test_the_page_shows_and_filters_its_rows_in_a_browser(tmp_path):
    page = write_page(tmp_path / 'with "quotes" & #', evaluated(), rows=30)
    with Browser() as browser:
        browser.open(page)
        # All rows of one benchmark and 30 of the other; they are added as one scrolls.
        assert browser.run(COUNT) == "36 of 36 rows on this page, mean score 0.643"
        assert browser.run(COUNTS) == {
            "all": 36, "right": 22, "partly": 1, "wrong": 12, "unparsed": 1, "not scored": 1
        }  # fmt: skip
        assert browser.run("document.title") == "Predictions: one, two"
        assert "questions the page shows 30, drawn" in browser.run("document.body.textContent.replace(/\\s+/g, ' ')")
        heads = browser.run("[...document.querySelectorAll('.benchmark')].map(b => b.innerText)")
        assert (
            "50.0± 2.5" in heads[0]
            and "accuracy, %" in heads[0]
            and "6 questions, protocol paper (lmms-eval 0.2.2)" in heads[0]
        )
        assert "3 could not be asked" in heads[0] and "perception score 1,234 ± 12" in heads[0]
        assert "25.0 % of the answers could not be parsed" in heads[0] and "30 on this page, 30 of them" in heads[1]

        press(browser, "[data-verdict=wrong]")
        assert browser.run(COUNT) == "12 of 36 rows on this page, mean score 0.000"
        assert "verdict=wrong" in browser.run("location.hash")
        press(browser, "[data-benchmark='0']")
        assert browser.run(TEXTS) == ["row1", "row3"]
        assert browser.run(COUNTS) == {
            "all": 6, "right": 2, "partly": 1, "wrong": 2, "unparsed": 1, "not scored": 1
        }  # fmt: skip
        assert browser.run("[...document.querySelectorAll('option')].map(o => o.textContent)") == [
            "all groups", "color: </option> (1)", "color: red (1)"
        ]  # fmt: skip
        choose_value(browser, "group", "color: red", "change")
        assert browser.run(TEXTS) == ["row1"]
        # The image of that row is there, with its hostile name as text.
        browser.wait("document.querySelector('article img').naturalWidth === 64")
        assert browser.run("document.querySelector('article img').alt") == NAME

        press(browser, "[data-verdict='']")
        choose_value(browser, "group", "", "change")
        choose_value(browser, "search", "</SCRIPT>", "input")
        assert browser.run(TEXTS) == ["row2"]
        assert browser.run("document.querySelector('.answer').textContent") == HOSTILE
        # The filters lie in the address: another view of the page opens as it was.
        browser.open(page, "#verdict=not+scored")
        browser.wait(f"{COUNT} === '1 of 36 rows on this page'")
        shown = browser.run("document.querySelector('article').innerText")
        assert "a text alone" in shown and "A & B <b>" in shown and "not public" in shown
        assert browser.run("document.querySelectorAll('article img').length") == 0
        browser.open(page, "#benchmark=0&verdict=unparsed")
        browser.wait(f"{COUNT}.startsWith('1 of')")
        shown = browser.run("document.querySelector('article').innerText")
        assert "images/3-0.png: it is no image" in shown and r"\u202eabc\u0007" in shown and "nothing" in shown
        browser.open(page, "#benchmark=1&search=question+7")
        browser.wait(f"{COUNT}.includes('mean')")
        assert "red \u00d7 2\ngreen" in browser.run("document.querySelector('article').innerText")
        loaded = browser.run("performance.getEntriesByType('resource').map(r => r.name)")
        assert all(name.startswith("file:") for name in loaded)
        assert browser.complaints == []


@needs_browser
def test_the_page_fits_a_phone_and_rows_are_added_while_one_scrolls(tmp_path):
    page = write_page(tmp_path, evaluated(), rows=100)
    with Browser(width=375, height=700) as browser:
        browser.open(page)
        assert browser.run("document.documentElement.scrollWidth") == 375
        assert browser.run("document.querySelectorAll('article').length") == 40
        browser.run("window.scrollTo(0, document.body.scrollHeight)")
        browser.wait("document.querySelectorAll('article').length === 66")
        assert browser.run("document.getElementById('more').hidden") and browser.complaints == []
        assert "drawn" not in browser.run("document.querySelector('p').textContent")
