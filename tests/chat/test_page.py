"""The page in Chromium: images by drop, paste and camera, answers as they come, errors, and nothing from elsewhere."""

import json
import urllib.parse

import numpy as np
import PIL.Image
import pytest
from browser import Browser, needs_browser
from page_client import MAX_TOKENS, Endless, request, served

from fastvlm_jax.generate import generate

pytestmark = needs_browser
ANSWERED = "!document.getElementById('ask').disabled && document.querySelectorAll('.again').length === 1"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), np.uint8)
        PIL.Image.fromarray(pixels).resize((64, 64), 0).save(folder / f"{number}.png")
    (folder / "broken.png").write_bytes((folder / "0.png").read_bytes()[:90])
    return folder


@pytest.fixture
def browser(address):
    with Browser(width=900, height=800) as browser:
        browser.open(address)
        browser.wait("document.title === 'little'")
        yield browser
        own = urllib.parse.urlsplit(address).netloc
        hosts = {
            urllib.parse.urlsplit(url).netloc for url in browser.requests if not url.startswith(("blob:", "data:"))
        }
        assert hosts == {own} and len(browser.requests) > 2


def drop(browser, *files):
    """Drops files on the page, as from a file manager."""
    data = {"items": [], "files": [str(file) for file in files], "dragOperationsMask": 1}
    for kind in ("dragEnter", "dragOver", "drop"):
        browser.send("Input.dispatchDragEvent", type=kind, x=300, y=300, data=data)


def uploaded(count):
    return f"document.querySelectorAll('#waiting figure:not(.loading)').length === {count}"


def ask(browser, text):
    """Types a question and returns the answer."""
    browser.run("document.getElementById('text').focus()")
    browser.send("Input.insertText", text=text)
    for kind in ("rawKeyDown", "keyUp"):
        browser.send("Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", windowsVirtualKeyCode=13)
    browser.wait("document.getElementById('text').value === ''")
    browser.wait(ANSWERED, 60)
    return last(browser, "p")


def last(browser, part):
    return browser.run(f"[...document.querySelectorAll('.assistant {part}')].pop().textContent")


def test_an_image_is_dropped_and_its_answer_read_over_several_turns(browser, pictures, loaded):
    drop(browser, pictures / "0.png")
    browser.wait(uploaded(1))
    talk = [("user", (0, "is it red?"))]
    text = ask(browser, "is it red?")
    assert [text] == generate(*loaded, pictures / "0.png", [talk], max_tokens=MAX_TOKENS) and len(text) > 3
    assert browser.run("document.querySelector('.user img').naturalWidth") == 64
    times = last(browser, ".times")
    assert "First token after" in times and "4 of images" in times and "kept" not in times
    assert all(f"{part} 0." in times for part in ("encoder", "prefill"))
    assert f"{MAX_TOKENS} tokens" in times and "cut there by --max_tokens" in times

    drop(browser, pictures / "1.png", pictures / "2.png")
    browser.wait(uploaded(2))
    talk += [("assistant", (text,)), ("user", (1, 2, "what is it?"))]
    second = ask(browser, "what is it?")
    files = [pictures / f"{i}.png" for i in range(3)]
    assert [second] == generate(*loaded, files, [talk], max_tokens=MAX_TOKENS) and second != text
    assert "were kept from before" in last(browser, ".times") and "12 of images" in last(browser, ".times")
    assert browser.run("document.querySelectorAll('.turn').length") == 4
    browser.run("document.querySelector('.again').click()")  # greedy: the same again
    browser.wait(ANSWERED)
    assert last(browser, "p") == second and browser.run("document.querySelectorAll('.turn').length") == 4
    browser.run("document.getElementById('new').click()")
    assert browser.run("document.querySelectorAll('.turn').length") == 0
    assert browser.complaints == []


def test_an_image_is_pasted_or_photographed_and_may_be_removed(browser, address):
    browser.run(
        """(async () => {
          const canvas = document.createElement("canvas");
          const blob = await new Promise(done => canvas.toBlob(done));
          const clipboardData = new DataTransfer();
          clipboardData.items.add(new File([blob], "pasted.png", {type: "image/png"}));
          document.dispatchEvent(new ClipboardEvent("paste", {clipboardData, cancelable: true}));
        })()"""
    )
    browser.wait(uploaded(1))
    assert browser.run("document.querySelector('#waiting img').alt") == "pasted.png"
    browser.run("document.querySelector('#waiting button').click()")
    assert browser.run(uploaded(0))
    browser.run("document.getElementById('camera').click()")
    browser.wait("document.getElementById('video').videoWidth > 0")
    assert browser.run("document.getElementById('camera-view').open")
    browser.run("document.getElementById('take').click()")
    browser.wait(uploaded(1))
    assert browser.run("!document.getElementById('camera-view').open && !document.getElementById('video').srcObject")
    assert len(ask(browser, "what is it?")) > 3
    assert browser.complaints == []


def test_an_answer_is_stopped_and_a_server_that_has_ended_is_told(address):
    endless, about = Endless(), json.loads(request(address, "GET", "/model")[2])
    with Browser() as browser:
        with served(endless, about) as (own, _):
            browser.open(own)
            browser.wait("document.title === 'little'")
            browser.run("document.getElementById('text').value = 'no'")
            browser.run("document.getElementById('form').requestSubmit()")
            browser.wait("document.querySelector('.assistant p')?.textContent.length > 5")
            browser.run("document.getElementById('stop').click()")
            browser.wait(ANSWERED)
            assert endless.ended.wait(5) and set(last(browser, "p:first-child")) == {"a"}
            assert last(browser, ".state") == "stopped"
        browser.run("document.getElementById('text').value = 'why?'")
        browser.run("document.getElementById('form').requestSubmit()")
        browser.wait("document.querySelector('.wrong') !== null")
        assert last(browser, ".wrong") == "the server does not answer: is it running?"
        assert browser.run("document.getElementById('text').value") == "why?"


def test_what_cannot_be_read_is_told_and_left_out(browser, pictures):
    drop(browser, pictures / "broken.png", pictures / "0.png")
    browser.wait("!document.getElementById('trouble').hidden")
    trouble = browser.run("document.getElementById('trouble').textContent")
    assert trouble.startswith("broken.png: the image cannot be read: ")
    browser.wait(uploaded(1))
    text = "red " * 40_000  # longer than the model's context
    browser.run(f"document.getElementById('text').value = {json.dumps(text)}")
    browser.run("document.getElementById('form').requestSubmit()")
    browser.wait("document.querySelector('.wrong') !== null")
    assert "tokens long, more than the" in browser.run("document.querySelector('.wrong').textContent")
    assert browser.run("document.getElementById('text').value") == text.strip()  # to be shortened and asked again
    browser.wait(uploaded(1))


def test_the_page_tells_the_lineage_and_reads_no_text_as_html(browser, address):
    assert browser.run("document.getElementById('origin').textContent") == (
        "About this model: little (step 3) ← less (step 1)"
    )
    told = json.loads(request(address, "GET", "/model")[2])
    assert json.loads(browser.run("document.getElementById('lineage').textContent")) == told["lineage"]
    ask(browser, "<img src=x onerror=alert(1)> no")
    assert browser.run("document.querySelector('.user p').textContent") == "<img src=x onerror=alert(1)> no"
    assert browser.run("document.querySelectorAll('.turn img').length") == 0
    refused = browser.run(
        "fetch('http://127.0.0.2:9/').then(() => 'sent', () => 'refused')"  # the policy of the page forbids it
    )
    assert refused == "refused" and browser.complaints
    assert all("Content Security Policy" in complaint for complaint in browser.complaints)
    assert not any("127.0.0.2" in url for url in browser.requests)
    unnamed = browser.run(
        "[...document.querySelectorAll('button, input, textarea, img')]"
        ".filter(x => !(x.textContent || x.labels?.length || x.ariaLabel || x.alt || x.hidden)).length"
    )
    assert unnamed == 0
