"""Documents: transcriptions, places, splits and answers, each found again by other means than those that drew them."""

import collections
import importlib.util
import itertools
import json
import pathlib
import re
from decimal import ROUND_HALF_UP, Decimal

import numpy as np
import pytest
from command import fastvlm
from fontTools import agl
from matplotlib.font_manager import FontProperties
from matplotlib.ft2font import FT2Font
from matplotlib.textpath import TextPath

from fastvlm_jax.data.sets.documents import data_sets, look, numbers, pages, receipts, texts, write
from fastvlm_jax.data.sets.documents.canvas import Canvas, Placed, check
from fastvlm_jax.data.sets.documents.data_sets import printed, read_data_sets
from fastvlm_jax.data.sets.documents.fonts import FONTS, drawing, path_of
from fastvlm_jax.data.sets.documents.page import Page
from fastvlm_jax.data.sets.documents.texts import read_texts
from fastvlm_jax.data.sets.documents.write import write_documents
from fastvlm_jax.data.sources import read_shards
from fastvlm_jax.text.tokenizer import load_tokenizer

COUNT = 48


@pytest.fixture(scope="module")
def drawn():
    """The first pages of the test split, and some for tiny models."""
    return [*(pages.draw(0, "test", n) for n in range(COUNT)), *(numbers.draw(0, "test", n) for n in range(4))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("documents") / "set"
    assert write_documents(folder, pages=16) == {"train": 16, "validation": 1, "test": 2}
    return folder


def of_kind(drawn, kind):
    found = [page for page in drawn if page.kind == kind]
    assert len(found) > 3
    return found


def test_fonts_draw_the_characters_that_they_are_asked_for():
    """The name of each glyph, as the font has it, is that of the character: Computer Modern's "<" is another."""
    for name, characters in FONTS.items():
        font = FT2Font(path_of(name))
        glyphs = font.get_charmap()
        names = {character: agl.toUnicode(font.get_glyph_name(glyphs[ord(character)])) for character in characters}
        alike = {"'": "\N{RIGHT SINGLE QUOTATION MARK}"} if name.startswith("cm") else {}
        assert {found: c for c, found in names.items() if found not in (c, alike.get(c))} == {}, name
    assert "cmr10" not in drawing("a < b") and "cmti10" not in drawing("$5") and set(drawing("12.5 (a)")) == set(FONTS)


def test_a_page_by_hand_is_read_in_lines():
    canvas = Canvas((200, 100), (255, 255, 255), (0, 0, 0))
    title = canvas.write("Sales", (100, 30), "cmr10", 20, "ms")
    left, right = canvas.write("north", (10, 70), "DejaVuSans", 16), canvas.write("4.5", (190, 70), "cmtt10", 16, "rs")
    page = Page("table", canvas.picture, ((title,), (left, right)), 16, "hand")
    assert page.text == "Sales\nnorth 4.5"
    assert left.box[0] >= 10 and right.box[2] <= 190 and abs(title.box[0] + title.box[2] - 200) <= 2
    assert page.png().startswith(b"\x89PNG")


def test_text_that_leaves_the_page_or_touches_other_text_is_refused():
    canvas = Canvas((100, 40), (255, 255, 255), (0, 0, 0))
    canvas.write("one", (10, 30), "DejaVuSans", 16)
    with pytest.raises(ValueError, match=r"'two' at .* touches 'one'"):
        canvas.write("two", (20, 30), "DejaVuSans", 16)
    for at in ((80, 30), (-2, 30), (10, 7), (10, 38)):
        with pytest.raises(ValueError, match=r"'gap' at .* leaves the page of 100 x 40 pixels"):
            canvas.write("gap", at, "DejaVuSans", 16)
    check(Placed("b", (10, 0, 20, 10)), [Placed("a", (0, 0, 10, 10))], (100, 40))  # side by side


def test_boxes_fit_the_outlines_that_matplotlib_gives_the_text():
    """Hinting moves each of the ten glyphs by up to half a pixel, and edges lie on whole pixels."""
    for name, size in itertools.product(FONTS, (12, 20, 47)):
        text = "Rgj 0.25-m"
        left, top, right, bottom = Canvas((800, 100), (0, 0, 0), (9, 9, 9)).write(text, (20, 60), name, size).box
        ink = TextPath((20, -60), text, size, prop=FontProperties(fname=path_of(name))).get_extents()
        assert abs(top + ink.y1) <= 2 and abs(bottom + ink.y0) <= 2, (name, size)
        assert -5 <= ink.x0 - left <= 5 + size / 8 and -5 <= right - ink.x1 <= 5 + size / 8, (name, size)


def test_all_ink_of_a_page_lies_in_the_boxes_of_its_text(drawn):
    for page in drawn:
        pixels = np.asarray(page.picture).astype(int)
        paper = pixels[0, 0]
        height, width, _ = pixels.shape
        assert min(height, width) >= 256 and max(height, width) <= 512
        boxes = [placed.box for line in page.lines for placed in line]
        for left, top, right, bottom in boxes:
            assert 0 <= left < right <= width and 0 <= top < bottom <= height
            assert np.abs(pixels[top:bottom, left:right] - paper).max() > 60
        for (l1, t1, r1, b1), (l2, t2, r2, b2) in itertools.combinations(boxes, 2):
            assert r1 <= l2 or r2 <= l1 or b1 <= t2 or b2 <= t1
        for left, top, right, bottom in boxes:
            pixels[top:bottom, left:right] = paper
        if page.kind != "chart":
            assert len(np.unique(pixels @ [1, 256, 65536])) <= 2  # the paper, and the color of rules


def test_pages_show_every_kind_size_and_shade(drawn):
    assert {page.kind for page in drawn} == {"table", "words", "receipt", "chart", "numbers"}
    first = [np.asarray(page.picture)[0, 0].mean() for page in drawn]
    assert 6 < sum(shade < 128 for shade in first) < COUNT / 2
    sizes = [page.font_size for page in drawn if page.kind != "numbers"]
    assert min(sizes) == look.SMALLEST and 40 < max(sizes) <= look.LARGEST
    assert {page.picture.size for page in drawn if page.kind != "numbers"} == set(look.SIZES)


def test_a_source_belongs_to_one_split(drawn):
    for room in (data_sets.SPLITS, texts.SPLITS):
        assert sorted(room) == ["test", "train", "validation"]
        names = [name for split in room.values() for name in split]
        assert len(set(names)) == len(names)
    own = {source.name for source in read_data_sets("test")} | set(texts.SPLITS["test"])
    assert {page.source for page in drawn if page.kind != "numbers"} <= own


def test_no_run_of_words_of_a_split_stands_in_another():
    held = {
        split: {
            tuple(words[i : i + 6])
            for own in read_texts(split).values()
            for words in (re.findall(r"\S+", paragraph.casefold()) for paragraph in own)
            for i in range(len(words) - 5)
        }
        for split in texts.SPLITS
    }
    assert all(len(runs) > 1500 for runs in held.values()) and len(held["train"]) > 20_000
    assert not any(one & other for one, other in itertools.combinations(held.values(), 2))


def test_numbers_are_those_of_the_files():
    iris, cars = read_data_sets("test")[0], next(own for own in read_data_sets("train") if own.name == "vega/cars")
    assert iris.columns["petal width"][:3] == ("0.2", "0.2", "0.2") and iris.rows == 150 and iris.labels == ()
    assert (cars.labels[0], cars.columns["Weight in lbs"][0]) == ("chevrolet chevelle malibu", "3504")
    shown = [17.99, 0.2654, 135450.0, -4.89396411092985, 1326.53, 0.0, 3.0, 0.006399, 999.96]
    assert list(map(printed, shown)) == ["17.99", "0.2654", "135450", "-4.894", "1327", "0", "3", "0.006399", "1000"]


def test_numbers_for_tiny_models_are_the_first_digits_of_those_and_in_one_split_only():
    with open(pathlib.Path(importlib.util.find_spec("vega_datasets").origin).parent / "_data" / "ohlc.json") as file:
        opened = {f"{row['open']:.2f}".replace(".", "") for row in json.load(file)}
    found = {split: numbers.read_numbers(split) for split in ("train", "validation", "test")}
    whole = {split: {number for own in found[split] for number in own} for split in found}
    assert len(opened & whole["test"]) > 20 and "3536" in whole["test"]  # iowa-electricity has 35361
    for own in found.values():
        assert all(number[0] == str(first) for first, same in enumerate(own, 1) for number in same)
        assert all(len(number) == 4 and number.isdigit() for same in own for number in same)
    assert all(whole[one].isdisjoint(whole[other]) for one, other in itertools.combinations(whole, 2))


def test_each_digit_for_a_tiny_model_stands_in_its_cell_and_is_a_token(folder):
    """Four lines of four cells of 80 pixels; what is drawn does not reach over the edge of a cell."""
    for page in (numbers.draw(0, "test", 0), numbers.draw(0, "train", 1, numbers.LARGE)):
        assert [len(line) for line in page.text.split("\n")] == [4, 4, 4, 4]
        ink = np.asarray(page.picture)[..., 0] < 128
        cells = ink.reshape(4, 80, 4, 80).any((1, 3))
        assert cells.all() and not ink[79::80].any() and not ink[:, 79::80].any()
        for part in ("numbers", "large_numbers"):
            assert len(load_tokenizer(folder / part).encode(page.text)) == 19
    sizes = [numbers.draw(0, "train", n).font_size for n in range(20)]
    assert min(sizes) >= 8 and min(numbers.draw(0, "train", n, numbers.LARGE).font_size for n in range(20)) >= 30


def test_pages_for_the_first_steps_hold_one_two_or_four_numbers_from_the_top(folder):
    counts = collections.Counter()
    for n in range(60):
        page = numbers.draw(0, "train", n, numbers.LARGE, numbers.FIRST)
        count = len(page.text.split("\n"))
        filled = (np.asarray(page.picture)[..., 0] < 128).reshape(4, 80, 4, 80).any((1, 3))
        assert filled[:count].all() and not filled[count:].any()
        counts[count] += 1
    assert set(counts) == {1, 2, 4} and min(counts.values()) > 10
    written = [record.turns[1][1][0] for record in read_shards(folder / "large_numbers", "train")]
    assert {len(text.split("\n")) for text in written} == {1, 2, 4}


def test_texts_are_those_of_the_modules():
    import calendar

    own = read_texts("test")["calendar"]
    assert any("Return the month's calendar" in text or "Return a matrix" in text for text in own)
    spoken = " ".join((getattr(calendar.Calendar, name).__doc__ or "") for name in dir(calendar.Calendar)).split()
    assert sum(set(text.split()) <= {word.strip("`*") for word in spoken} for text in own) >= 3


def test_answers_about_tables_follow_from_their_transcriptions(drawn):
    for page in of_kind(drawn, "table"):
        lines = [[placed.text for placed in line] for line in page.lines]
        header = [] if all(re.fullmatch(r"-?[\d.]+", line[-1]) for line in lines) else lines.pop(0)
        for kind, question, answer in page.questions:
            if kind == "count":
                assert answer == str(len(lines))
                continue
            name = re.search(r"column (\d+)", question)
            asked = question.replace("largest ", "").replace("?", " ")
            at = int(name[1]) - 1 if name else next(i for i, own in enumerate(header) if f"the {own} " in asked)
            column = [line[at] for line in lines]
            rows = [int(found) - 1 for found in re.findall(r"row (\d+)", question)]
            if kind == "cell":
                assert answer == column[rows[0]]
            elif kind == "largest":
                assert Decimal(answer) == max(map(Decimal, column)) and answer in column
            elif kind == "label":
                label = question.removesuffix("?").partition(" of ")[2]
                assert [line[at] for line in lines if line[0] == label] == [answer]
            else:
                assert answer == ("yes" if Decimal(column[rows[0]]) > Decimal(column[rows[1]]) else "no")


def test_receipts_add_up_and_their_answers_follow(drawn):
    for page in of_kind(drawn, "receipt"):
        shop, *lines = page.text.split("\n")
        amounts = [(line.rpartition(" ")[0], Decimal(line.rpartition(" ")[2])) for line in lines]
        items = [(name.split(" ", 1), amount) for name, amount in amounts if name[0].isdigit()]
        total = sum(amount for _, amount in items)
        rest = dict(amounts[len(items) :])
        if "Subtotal" in rest:
            assert rest.pop("Subtotal") == total
            (percent,) = [int(re.fullmatch(r"Tax (\d+)%", name)[1]) for name in rest if name != "Total"]
            tax = (total * percent / 100).quantize(Decimal("0.01"), ROUND_HALF_UP)
            assert rest.pop(f"Tax {percent}%") == tax
            total += tax
        assert rest == {"Total": total} and shop.isalpha()
        asked = {kind: (text, answer) for kind, text, answer in page.questions}
        assert asked["total"][1] == str(total)
        bought = {name: (count, amount) for (count, name), amount in items}
        assert len(bought) == len(items) >= 2
        name = re.fullmatch(r"How much was paid for (\w+)\?", asked["cell"][0])[1]
        assert (asked["count"][1], asked["cell"][1]) == (bought[name][0], str(bought[name][1]))
        limit = Decimal(re.fullmatch(r"Is the total more than ([\d.]+)\?", asked["yes/no"][0])[1])
        assert asked["yes/no"][1] == ("yes" if total > limit else "no") and limit != total


def test_prices_are_digits_of_real_numbers():
    assert list(map(receipts.cents, ["17.99", "-0.1184", "135450", "870", "5.1", "0"])) == [
        1799, 1184, 1354, 870, 5100, 500,
    ]  # fmt: skip
    assert [receipts.money(cents) for cents in (5, 1799, 120000)] == ["0.05", "17.99", "1200.00"]
    half = receipts.Receipt("Shop", (receipts.Item("Pear", 1, 50), receipts.Item("Plum", 2, 100)), 5)
    assert (half.subtotal, half.tax, half.total) == (250, 13, 263)  # 12.5 cents of tax


def test_answers_about_charts_and_words_follow_from_their_transcriptions(drawn):
    for page in of_kind(drawn, "chart"):
        _, *rows = [[placed.text for placed in line] for line in page.lines]
        values = {label: Decimal(value) for label, value in rows}
        for kind, question, answer in page.questions:
            named = [label for label in values if re.search(rf"of {re.escape(label)}( |\?)", question)]
            if kind == "count":
                assert answer == str(len(rows))
            elif kind == "cell":
                assert [answer] == [value for label, value in rows if label in named]
            elif kind == "largest":
                assert [answer] == [label for label, value in values.items() if value == max(values.values())]
            else:
                one, other = re.fullmatch(r"Is the value of (.*) larger than that of (.*)\?", question).groups()
                assert answer == ("yes" if values[one] > values[other] else "no")
    for page in of_kind(drawn, "words"):
        lines = page.text.split("\n")
        source = " ".join(read_texts("test")[page.source])
        assert " ".join(lines) in source
        for kind, question, answer in page.questions:
            if kind == "count":
                assert answer == str(len(lines))
            elif kind == "cell":
                assert answer == lines[int(re.search(r"line (\d+)", question)[1]) - 1].split()[-1]
            else:
                word = re.fullmatch(r'Is the word "(\w+)" on the page\?', question)[1]
                assert answer == ("yes" if word in re.findall(r"[A-Za-z]+", page.text) else "no")


def test_answers_are_not_told_by_their_questions(drawn):
    answers = [question.answer for page in drawn for question in page.questions if question.kind == "yes/no"]
    assert 0.35 < answers.count("yes") / len(answers) < 0.65


def test_other_processes_draw_the_same_pages(drawn, tmp_path, monkeypatch):
    monkeypatch.setattr(write, "_CHUNK", 4)
    part, done = write.PARTS["pages"], []
    jobs = list(write._jobs(tmp_path, part, 0, "test", 6))
    write._run(jobs, 2, lambda *drawn: done.append(drawn))
    found = [record for job in jobs for record in write._read(job)]
    assert found == [write.record(part, "test", number, page) for number, page in enumerate(drawn[:6])]
    assert sorted(done) == [(2, 6), (4, 6)]
    jobs[0].file.unlink()  # as if the run had been killed while it drew these
    write._run(jobs, 1, lambda *drawn: done.append(drawn))
    assert [record for job in jobs for record in write._read(job)] == found and done[2:] == [(4, 4)]
    assert pages.draw(1, "test", 0).png() != drawn[0].png() != pages.draw(0, "validation", 0).png()


def test_the_written_set_holds_the_pages(folder, drawn):
    source = read_shards(folder, "test")
    page, record = drawn[1], source[1]
    assert (record.key, record.images, len(source)) == ("test/1", (page.png(),), 2)
    assert record.turns[:2] == (("user", (0, "Transcribe the page.")), ("assistant", (page.text,)))
    texts = ["".join(content) for _, content in record.turns[2:]]
    assert texts == [text for question in page.questions for text in (question.text, question.answer)]
    assert record.extra["asked"] == ["transcription", *(question.kind for question in page.questions)]
    small = read_shards(folder / "numbers", "train")
    assert small[0].turns == (("user", (0,)), ("assistant", (numbers.draw(0, "train", 0).text,))) and len(small) == 16
    for part in (folder, folder / "numbers"):
        assert load_tokenizer(part).decode(load_tokenizer(part).encode(page.text)) == page.text


def test_a_smaller_set_is_the_beginning_of_a_larger_one_and_parts_can_be_added(folder, tmp_path):
    write_documents(tmp_path, pages=2, parts=["numbers"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["documents.json", "numbers"]
    write_documents(tmp_path, pages=2)
    for part in ("", "numbers", "large_numbers"):
        small, large = read_shards(tmp_path / part, "train"), read_shards(folder / part, "train")
        assert [small[n] for n in range(2)] == [large[n] for n in range(2)]


def test_two_commands_at_once_do_not_write_to_one_folder(tmp_path):
    def another(*drawn):
        write_documents(tmp_path, pages=2, parts=["numbers"])

    with pytest.raises(ValueError, match=f"another process is writing to {tmp_path}: wait for its end, or stop it"):
        write_documents(tmp_path, pages=2, parts=["numbers"], progress=another)
    write_documents(tmp_path, pages=2, parts=["numbers"])  # the lock ended with the first
    assert len(read_shards(tmp_path / "numbers", "train")) == 2


def test_writing_again_changes_nothing_and_goes_on_where_it_stopped(folder):
    def stamps():
        return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}

    before, fingerprint = stamps(), read_shards(folder, "test").fingerprint
    write_documents(folder, pages=16)
    assert stamps() == before
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["splits"]["test"]  # as if it had been killed before the last split
    (folder / "manifest.json").write_text(json.dumps(manifest))
    write_documents(folder, pages=16)
    assert read_shards(folder, "test").fingerprint == fingerprint
    assert not [path for path in folder.rglob(".*")]


@pytest.mark.parametrize(
    "flags, status, message",
    [
        (["--seed=1"], 1, "already holds a set with seed=0, not 1: choose another folder"),
        (["--pages=17"], 1, "already holds a set with pages=16, not 17: choose another folder"),
        (["--pages=0"], 2, "--pages=0: 0 is not a positive integer"),
        (["--seed=-1"], 2, "--seed=-1: -1 is not a non-negative integer"),
        (["--parts=pages,words"], 1, "parts 'pages,words': choose from pages, numbers, large_numbers"),
        (["--parts="], 1, "parts '': choose from pages, numbers, large_numbers"),
        (["--output=/proc/none"], 1, "/proc/none"),
        (["--output={folder}/manifest.json"], 1, "manifest.json is a file: choose a folder"),
        (["--output={folder}/index/.."], 0, ""),
    ],
)
def test_what_does_not_fit_is_told_in_a_line(folder, monkeypatch, capsys, flags, status, message):
    flags = [f"--output={folder}", "--pages=16", *(flag.format(folder=folder) for flag in flags)]
    found, _, err = fastvlm(monkeypatch, capsys, "data", "documents", *flags)
    assert found == status and message in err and err.count("\n") == (status > 0), err


def test_other_data_and_a_damaged_description_are_left_alone(easy_vqa, tmp_path):
    with pytest.raises(ValueError, match="already holds another data set: choose another folder"):
        write_documents(easy_vqa, pages=2)
    (tmp_path / "documents.json").write_text("{")
    with pytest.raises(ValueError, match=r"documents.json is damaged: delete .* and write the data set again"):
        write_documents(tmp_path, pages=2)


@pytest.mark.parametrize("module, package", [("sklearn", "scikit-learn"), ("vega_datasets", "vega-datasets")])
def test_a_missing_package_names_the_mend(monkeypatch, tmp_path, module, package):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == module else find(name))
    read_data_sets.cache_clear()
    with pytest.raises(ValueError, match=rf"{package} is missing: pip install 'fastvlm_jax\[documents\]'"):
        write_documents(tmp_path / "new", pages=2)
    assert not (tmp_path / "new").exists()
