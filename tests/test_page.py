"""The page at / in a real browser: a mouse, a keyboard, a phone."""

from __future__ import annotations

import base64

import pytest
from endpoint import Slow, alone, png

from pipelines.serving.keys import new_key
from pipelines.serving.options import Room, Serving

SECRET, KEY = new_key("browser")
SETTINGS = Serving(room=Room(tokens=8192, requests=8, pictures=16))


@pytest.fixture(scope="module")
def address(model_folder):
    with alone(model_folder, SETTINGS, {KEY.sha256: KEY}) as (address, _):
        yield address


@pytest.fixture
def page(chromium, address):
    """A page with its key; what it complains of fails the test."""
    context = chromium.new_context(viewport={"width": 1000, "height": 800})
    page = context.new_page()
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.goto(f"{address}/#key={SECRET}")
    page.wait_for_function("() => document.getElementById('state').textContent === 'owl'")
    assert "key" not in page.url
    yield page
    assert wrong == []
    context.close()


def add(page, *pictures: bytes) -> None:
    files = [{"name": f"{n}.png", "mimeType": "image/png", "buffer": data} for n, data in enumerate(pictures)]
    before = page.locator("#chosen figure").count()
    page.set_input_files("#file", files)
    page.wait_for_function("n => document.querySelectorAll('#chosen figure').length === n", arg=before + len(pictures))


def answered(page, count: int = 1) -> None:
    page.wait_for_function("n => document.querySelectorAll('article.assistant .foot button').length >= n", arg=count)


def test_a_question_about_two_pictures_its_retry_its_edit_and_where_it_looked(page):
    add(page, png(1), png(2), png(3))
    page.get_by_role("button", name="Remove picture 2").click()
    assert page.locator("#chosen figure").count() == 2
    page.fill("#words", "what color is the circle ?")
    page.keyboard.press("Enter")
    answered(page)
    said = page.locator("article.assistant .said").inner_text()
    assert said
    assert "tokens" in page.locator("article.assistant .foot").inner_text()
    page.get_by_role("button", name="Where it looked", exact=True).click()
    assert page.locator("article.assistant figure canvas").count() == 2
    assert "most at the" in page.locator("article.assistant figure img").first.get_attribute("alt")
    page.get_by_role("button", name="Retry").click()
    answered(page)
    assert page.locator("article.assistant .said").inner_text() == said  # the temperature is 0
    page.get_by_role("button", name="Edit").click()
    assert page.input_value("#words") == "what color is the circle ?"
    assert page.locator("#chosen figure").count() == 2
    assert page.locator("article").count() == 0
    page.keyboard.press("Enter")
    answered(page)
    page.get_by_role("button", name="New").click()
    assert page.locator("article").count() == 0


def test_pictures_come_by_drop_and_by_paste(page):
    data = base64.b64encode(png(5)).decode()
    for kind in ("drop", "paste"):
        page.evaluate(
            """([kind, data]) => {
                const bytes = Uint8Array.from(atob(data), c => c.charCodeAt(0)), moved = new DataTransfer();
                moved.items.add(new File([bytes], "a.png", {type: "image/png"}));
                const how = {bubbles: true, cancelable: true};
                document.body.dispatchEvent(kind === "drop" ? new DragEvent("drop", {dataTransfer: moved, ...how})
                    : new ClipboardEvent("paste", {clipboardData: moved, ...how}));
            }""",
            [kind, data],
        )
    page.wait_for_function("() => document.querySelectorAll('#chosen figure').length === 2")


def test_a_picture_from_the_camera(page):
    page.get_by_role("button", name="Take a picture").click()
    page.wait_for_function("() => document.getElementById('view').videoWidth > 0")
    page.get_by_role("button", name="Take it").click()
    assert page.locator("#chosen figure").count() == 1


def test_an_answer_is_stopped_and_an_error_is_told(chromium, model_folder, processor):
    word = processor.encode([{"role": "user", "content": "circle"}], prompt=True).ids[-3]
    with alone(model_folder, SETTINGS, engine=lambda: Slow(word, 0.05, deaths=(400, 3))) as (address, engine):
        page = chromium.new_page()
        page.goto(address)
        page.fill("#words", "hello")
        page.keyboard.press("Enter")
        page.wait_for_function("() => document.querySelector('article.assistant .said')?.textContent.length > 3")
        page.keyboard.press("Escape")
        answered(page)
        assert "stopped" in page.locator("article.assistant .foot").inner_text()
        page.wait_for_timeout(300)
        assert engine.asked == 0
        page.fill("#words", "again")
        page.keyboard.press("Enter")
        page.wait_for_selector("article[role=alert]")
        assert "went away" in page.locator("article[role=alert] .said").inner_text()
        page.close()


def test_without_a_key_it_asks_for_one(chromium, address):
    page = chromium.new_page()
    page.goto(address)
    page.wait_for_selector("#options[open]")
    page.fill("#key", SECRET)
    page.keyboard.press("Enter")
    page.wait_for_function("() => document.getElementById('state').textContent === 'owl'")
    page.close()


def test_a_phone_a_keyboard_and_names_for_everything(chromium, address):
    context = chromium.new_context(viewport={"width": 360, "height": 640}, color_scheme="dark", has_touch=True)
    page = context.new_page()
    page.goto(f"{address}/#key={SECRET}")
    add(page, png(1), png(2), png(3), png(4))
    page.fill("#words", "a rather long question " * 20)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.focus("#words")
    reached = []
    for _ in range(4):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id"))
    assert reached[:3] == ["add", "shoot", "send"]
    assert page.evaluate(UNNAMED) == []
    assert min(page.evaluate(CONTRASTS)) >= 4.5  # WCAG 2.2, 1.4.3
    context.close()


UNNAMED = """() => [...document.querySelectorAll("button, input:not([hidden]), select, textarea, img")]
    .filter(node => !(node.textContent.trim() || node.ariaLabel || node.alt || node.labels?.length || node.hidden))
    .map(node => node.outerHTML)"""
CONTRASTS = """() => {
    const part = value => (value /= 255) <= .04045 ? value / 12.92 : ((value + .055) / 1.055) ** 2.4;
    const light = color => {
        const [r, g, b] = color.match(/\\d+/g).map(part);
        return .2126 * r + .7152 * g + .0722 * b;
    };
    const style = name => getComputedStyle(document.querySelector(name));
    const ratio = (a, b) => (Math.max(light(a), light(b)) + .05) / (Math.min(light(a), light(b)) + .05);
    const page = style("body").backgroundColor;
    return [
        ratio(style("body").color, page),
        ratio(style("#state").color, page),
        ratio(style("#send").color, style("#send").backgroundColor),
    ];
}"""
