"""The server's page, driven in a real headless Chromium; skipped where Playwright or Chromium is missing."""

import base64
import json
import shutil
from collections.abc import Iterator

import pytest
from conftest import ROOT

from llama3v_mlx.demo import IMAGES
from llama3v_mlx.evaluate import served

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")

pytestmark = [pytest.mark.browser, pytest.mark.skipif(not CHROMIUM, reason="no Chromium")]

STARS, CROSS = IMAGES / "two-red-stars.jpg", IMAGES / "one-purple-cross.jpg"
DROP = """([data, name]) => {
    const transfer = new DataTransfer();
    const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
    transfer.items.add(new File([bytes], name, {type: "image/jpeg"}));
    document.querySelector("main").dispatchEvent(new DragEvent("drop", {dataTransfer: transfer, bubbles: true}));
}"""


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with served("llama3v_mlx.server", "--temp", "0", cwd=ROOT) as (server, port, _):
        assert server.poll() is None
        yield f"http://127.0.0.1:{port}/"


@pytest.fixture
def page(address: str) -> Iterator:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        context = browser.new_context(viewport={"width": 900, "height": 800})
        context.grant_permissions(["clipboard-read", "clipboard-write"])
        page = context.new_page()
        errors = []
        page.on("pageerror", lambda error: errors.append(error))
        page.goto(address)
        yield page
        browser.close()
    assert not errors


def drop(page, path) -> None:
    page.evaluate(DROP, [base64.b64encode(path.read_bytes()).decode(), path.name])
    page.wait_for_selector("#waiting img")


def answer(page, question: str) -> str:
    """Ask by keyboard, and read the answer when its figures are there."""
    page.get_by_role("textbox", name="Question").fill(question)
    before = page.locator(".figures span").count()
    page.keyboard.press("Enter")
    page.locator(".figures span").nth(before).wait_for(state="attached")
    return page.locator("article:not(.human) .text").last.inner_text().strip()


def test_images_and_turns(page) -> None:
    drop(page, STARS)
    assert answer(page, "What is this image?") == "Two red stars on a yellow background."
    assert "first token" in page.locator(".figures").last.inner_text()
    assert answer(page, "What color is the background?") == "The background is yellow."
    with page.expect_file_chooser() as chosen:
        page.get_by_label("Add images").click()
    chosen.value.set_files(CROSS)
    page.wait_for_selector("#waiting img")
    assert answer(page, "What is this image?").startswith("One purple cross")
    page.get_by_role("button", name="Copy").last.click()
    assert page.evaluate("navigator.clipboard.readText()").startswith("One purple cross")
    page.get_by_role("button", name="Clear").click()
    assert page.locator("article").count() == 0 and page.get_by_role("textbox", name="Question").is_visible()


def test_what_the_model_sees(page) -> None:
    drop(page, STARS)
    page.get_by_role("button", name="What the model sees").click()
    page.wait_for_selector("figure svg rect")
    assert page.locator("figure svg rect").count() == 4
    assert "505×433: the whole at 56×56, and 2×2 slices" in page.locator("figcaption").inner_text()
    page.get_by_role("button", name="What the model sees").click()
    assert page.locator("figure svg").count() == 0
    page.get_by_role("button", name="Remove").click()
    assert page.locator("figure").count() == 0


def test_an_answer_is_text(page) -> None:
    """Whatever a server says, it is never taken for HTML."""
    said = {"choices": [{"delta": {"content": "<img src=x onerror=alert(1)>\n<b>"}}]}
    body = f"data: {json.dumps(said)}\n\ndata: [DONE]\n\n"
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=body, content_type="text/event-stream"))
    assert answer(page, "Hello") == said["choices"][0]["delta"]["content"]
    assert page.locator("article img, article b").count() == 0


def test_errors_are_said_and_nothing_is_lost(page) -> None:
    page.route("**/v1/chat/completions", lambda route: route.fulfill(status=400, json={"error": {"message": "no"}}))
    drop(page, STARS)
    page.get_by_role("textbox", name="Question").fill("What is it?")
    page.get_by_role("button", name="Ask").click()
    assert page.get_by_role("alert").inner_text() == "no"
    assert page.get_by_role("textbox", name="Question").input_value() == "What is it?"
    assert page.locator("#waiting img").count() == 1


def test_stop(page) -> None:
    page.route("**/v1/chat/completions", lambda route: None)  # never answered
    page.get_by_role("textbox", name="Question").fill("Hello")
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Stop").click()
    page.wait_for_selector("text=stopped")
    assert page.get_by_role("button", name="Ask").is_visible()


def test_phone_width(page) -> None:
    page.set_viewport_size({"width": 360, "height": 640})
    drop(page, STARS)
    answer(page, "What is this image?")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
