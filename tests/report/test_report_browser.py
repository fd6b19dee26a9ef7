"""The report in a browser: it draws, fits, asks the network for nothing, and works from the keyboard."""

import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from pondera.lab import compare

CHROMIUM, DRIVER = Path("/usr/bin/chromium"), Path("/usr/bin/chromedriver")
QUIET = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync")
QUIETER = ("--disable-background-networking", "--disable-component-update")
LONG = "a name as long as they get: " + "very " * 12 + "long: init=xavier_normal"
PLOTS = "return [...document.querySelectorAll('.plot')]"

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not (CHROMIUM.exists() and DRIVER.exists()), reason="no Chromium with its driver here"),
]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a tiny comparison with a name made of markup, a long name and a failed recipe."""
    recipes = [
        "",
        "<script>alert(1)</script>: init=orthogonal",
        LONG.replace(": very", " very", 1),
        "optim=SGD(momentum=0.9)",
    ]
    options: dict[str, Any] = {"store": "sqlite://", "workers": 1, "progress": False, "rates": [1e-3, 1e-2, 1e-1]}
    c = compare("digits", recipes, seeds=2, budget=10, **options)
    rows = list(c.rows)
    why = {0: "diverged: training loss became nan at step 7", 1: "memory: out of it"}
    rows[3] = replace(rows[3], scores=[float("nan")] * 2, failed=why, difference=None, at_equal_time=None)
    return replace(c, rows=rows).report(tmp_path_factory.mktemp("report") / "report.html")


DRAWN = f"{PLOTS}.every((p) => p.querySelector('svg.main-svg'))"


def open_page(page: Path, width: int, scheme: str = "light", drawn: str = DRAWN) -> Any:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    profile = page.parent / f"profile-{width}-{scheme}"
    for argument in (*QUIET, *QUIETER, f"--user-data-dir={profile}"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(str(DRIVER)))
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    driver.get(page.as_uri())
    wait_for(driver, drawn if drawn.startswith("return") else f"return {drawn}")
    return driver


def wait_for(driver: Any, script: str) -> None:
    until = time.monotonic() + 20
    while not driver.execute_script(script):
        assert time.monotonic() < until, f"never true: {script}"
        time.sleep(0.05)


@pytest.fixture(scope="module", params=[1280, 400])
def browser(request: pytest.FixtureRequest, page: Path) -> Iterator[Any]:
    driver = open_page(page, request.param)
    driver.wide = request.param
    yield driver
    driver.quit()
    shutil.rmtree(page.parent / f"profile-{request.param}-light", ignore_errors=True)


def test_nothing_is_asked_of_the_network_and_nothing_is_wrong(browser: Any, page: Path) -> None:
    asked = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [m["params"] for m in asked if m["method"] == "Network.requestWillBeSent"]
    ours = [m["request"]["url"] for m in sent if m["documentURL"] == page.as_uri()]  # not the browser's own new tab
    assert page.as_uri() in ours
    assert [url for url in ours if url != page.as_uri() and not url.startswith(("data:", "blob:"))] == []
    assert [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []


def test_the_verdict_is_seen_without_scrolling(browser: Any) -> None:
    """On a phone of 400 x 800 too: title, lead and the first group whole, with nothing but one line above."""
    boxes = browser.execute_script(
        """scrollTo(0, 0); return ['h1', '.lead', '.card'].map((s) => {
        const r = document.querySelector(s).getBoundingClientRect(); return [r.top, r.bottom]; })"""
    )
    assert boxes[0][0] < (60 if browser.wide == 400 else 110)
    assert all(bottom < 800 for _, bottom in boxes)
    assert all(a[1] <= b[0] + 1 for a, b in pairwise(boxes))


def test_no_number_stands_twice_along_an_axis(browser: Any) -> None:
    ticks = browser.execute_script(
        PLOTS + ".map((p) => [p.id, [...p.querySelectorAll('.xtick text')].map((t) => t.textContent)])"
    )
    for which, words in ticks:
        assert len(set(words)) == len(words) > 0, which
    along = dict(ticks)
    assert along["signal"] == ["1", "2", "3", "4", "5"]
    assert all(w.isdigit() for w in along["curves"])


def test_every_figure_is_drawn_inside_the_page(browser: Any) -> None:
    plots = browser.execute_script(
        PLOTS
        + """.map((p) => {
        const box = p.querySelector('svg.main-svg').getBoundingClientRect();
        const marks = [...p.querySelectorAll('.scatterlayer .trace path')].map((m) => m.getBoundingClientRect());
        const seen = marks.filter((m) => m.width > 0 || m.height > 0);
        return {id: p.id, width: box.width, height: box.height, left: box.left, right: box.right, marks: seen.length,
                from: Math.min(...seen.map((m) => m.left)), to: Math.max(...seen.map((m) => m.right))};
    })"""
    )
    assert [p["id"] for p in plots] == ["differences", "curves", *(f"rate{i}" for i in range(4)), "signal"]
    for p in plots:
        assert p["width"] > 200, p
        assert p["height"] > 150, p
        assert p["marks"] > 0, p
        assert p["left"] >= 0, p
        assert p["right"] <= browser.wide, p
        assert p["from"] >= -1, p
        assert p["to"] <= browser.wide + 1, p


def test_no_sideways_scrolling_but_of_the_table_and_the_code(browser: Any) -> None:
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    table = browser.execute_script("const s = document.querySelector('.scroll'); return [s.scrollWidth, s.clientWidth]")
    if browser.wide == 400:
        assert table[0] > table[1]
    spill = browser.execute_script(
        """return [...document.querySelectorAll('main *, header *')].filter((e) => !e.closest('.scroll, pre, svg'))
        .filter((e) => e.getBoundingClientRect().right > innerWidth + 1).map((e) => e.outerHTML.slice(0, 120))"""
    )
    assert spill == []


def test_words_on_figures_are_not_cut_off(browser: Any) -> None:
    cut = browser.execute_script(
        """return [...document.querySelectorAll('.plot text')].filter((t) => {
        const r = t.getBoundingClientRect(), p = t.closest('.plot').getBoundingClientRect();
        return r.width && (r.left < p.left - 1 || r.right > p.right + 1);
    }).map((t) => t.textContent)"""
    )
    assert cut == []


def test_structure_for_screen_readers(browser: Any) -> None:
    assert browser.execute_script("return document.documentElement.lang") == "en"
    levels = browser.execute_script("return [...document.querySelectorAll('h1,h2,h3,h4')].map((h) => +h.tagName[1])")
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b <= a + 1 for a, b in pairwise(levels))
    scopes = browser.execute_script("return [...document.querySelectorAll('th')].map((t) => t.scope)")
    assert scopes.count("col") == 8
    assert scopes.count("row") == 4
    named = browser.execute_script(
        f"{PLOTS}.every((p) => p.getAttribute('role') === 'img' && p.getAttribute('aria-label').length > 20)"
    )
    assert named
    assert browser.execute_script("return document.querySelectorAll('figure:not(:has(figcaption))').length") == 0
    assert "<script>alert(1)</script>" in browser.execute_script("return document.querySelector('table').textContent")


def test_the_keyboard_reaches_everything(browser: Any) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    def focused(script: str) -> Any:
        return browser.execute_script(f"return document.activeElement.{script}")

    browser.execute_script("document.activeElement.blur(); scrollTo(0, 0)")
    body = browser.find_element(By.TAG_NAME, "body")
    body.send_keys(Keys.TAB)
    assert focused("className") == "skip"
    assert focused("getBoundingClientRect().top") >= 0
    reached = []
    for _ in range(60):
        browser.switch_to.active_element.send_keys(Keys.TAB)
        reached.append(focused("outerHTML.slice(0, 60)"))
        if 'class="skip"' in reached[-1] or focused("tagName") == "BODY":
            break
    for what in (
        'name="horizontal"',
        'name="vertical"',
        "data-recipe",
        'class="scroll"',
        "<summary",
        "copy",
        'href="#method"',
    ):
        assert any(what in r for r in reached), what


def test_curves_turn_to_seconds_and_recipes_hide(browser: Any) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    def lines() -> int:
        return browser.execute_script("return document.querySelectorAll('#curves .scatterlayer .trace').length")

    def title() -> str:
        return browser.execute_script("return document.querySelector('#curves .xtitle').textContent")

    def top() -> float:
        return browser.execute_script("return document.getElementById('curves').layout.yaxis.range[0]")

    before, low = lines(), top()
    assert title() == "optimisation steps"
    browser.find_element(By.CSS_SELECTOR, "input[value=step]").send_keys(Keys.ARROW_RIGHT)
    wait_for(browser, "return document.querySelector('#curves .xtitle').textContent.startsWith('seconds')")
    assert lines() == before
    browser.find_element(By.CSS_SELECTOR, "input[value=all]").send_keys(Keys.ARROW_RIGHT)
    assert top() > low
    button = browser.find_element(By.CSS_SELECTOR, "#learning ~ figure button[data-recipe='1']")
    button.send_keys(Keys.ENTER)
    assert button.get_attribute("aria-pressed") == "false"
    assert lines() < before
    button.send_keys(Keys.SPACE)
    assert button.get_attribute("aria-pressed") == "true"
    assert lines() == before


def test_words_stand_out_on_light_and_dark(page: Path) -> None:
    """Contrast of 4.5 for words and 3 for the colours of the figures (WCAG 2.2, 1.4.3 and 1.4.11)."""
    grounds = []
    for scheme in ("light", "dark"):
        driver = open_page(page, 1280, scheme)
        try:
            css = "const s = getComputedStyle(document.documentElement); return n => s.getPropertyValue(n).trim()"
            names = ["--paper", "--raised", "--ink", "--soft", "--link", "--good", "--bad", "--warn"]
            names += [f"--c{i}" for i in range(7)]
            value = dict(
                zip(names, driver.execute_script(f"return arguments[0].map((() => {{ {css} }})())", names), strict=True)
            )
            fill = driver.execute_script("return getComputedStyle(document.querySelector('#curves .xtick text')).fill")
        finally:
            driver.quit()
        grounds.append(luminance(value["--paper"]))
        for name in names[2:]:
            for ground in ("--paper", "--raised"):
                least = 3.0 if name.startswith("--c") else 4.5
                assert contrast(value[name], value[ground]) >= least, (scheme, name, ground)
        tick = "#" + "".join(f"{int(v):02x}" for v in fill[4:-1].split(","))
        assert contrast(tick, value["--paper"]) >= 4.5
    assert grounds[0] > 0.8 > 0.05 > grounds[1]


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


# -- the page of findings that inspect writes ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def findings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    from torch import nn

    from pondera.doctor import inspect, rank_starts

    torch.manual_seed(0)
    net = nn.Sequential(*(m for _ in range(12) for m in (nn.Linear(20, 20), nn.Tanh())), nn.Linear(20, 5))
    found = inspect(net, torch.randn(64, 20), target=torch.arange(64) % 5)
    ranking = rank_starts("deep", ["init=lsuv", "init=zero"], seconds=5)
    return found.report(tmp_path_factory.mktemp("found") / "found.html", ranking, "a <b>plain</b> net")


@pytest.mark.parametrize("width", [1280, 400])
def test_findings_are_drawn_inside_the_page_and_ask_for_nothing(findings: Path, width: int) -> None:
    driver = open_page(findings, width)
    try:
        sent = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
        urls = [
            m["params"]["request"]["url"]
            for m in sent
            if m["method"] == "Network.requestWillBeSent" and m["params"]["documentURL"] == findings.as_uri()
        ]
        assert findings.as_uri() in urls
        assert [u for u in urls if u != findings.as_uri() and not u.startswith(("data:", "blob:"))] == []
        assert [entry for entry in driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []
        boxes = driver.execute_script(
            PLOTS + ".map((p) => [p.id, p.querySelector('svg.main-svg').getBoundingClientRect().toJSON()])"
        )
        assert [key for key, _ in boxes] == ["signal", "jacobian", "ntk", "bias"]
        for _, box in boxes:
            assert box["left"] >= 0
            assert box["right"] <= width
            assert box["width"] > 200
        assert driver.execute_script("return document.documentElement.scrollWidth") <= width
        assert driver.execute_script("return document.querySelectorAll('h1 b').length") == 0
    finally:
        driver.quit()


# -- pages with still figures --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def still(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from pondera.report._comparison import write
    from tests.report.test_report import ALL

    return write(ALL, tmp_path_factory.mktemp("still") / "still.html", small=True)


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (400, "dark")])
def test_still_figures_are_drawn_once_inside_the_page(still: Path, width: int, scheme: str) -> None:
    driver = open_page(still, width, scheme, "document.querySelector('.plot > svg')")
    try:
        assert [entry for entry in driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []
        assert driver.execute_script("return document.documentElement.scrollWidth") <= width
        shown = driver.execute_script(
            PLOTS
            + """.map((p) => [p.id, p.getBoundingClientRect().toJSON(), [...p.children].map((s) => s.getBoundingClientRect())
            .filter((r) => r.width).map((r) => [r.left, r.right, r.height])])"""
        )
        assert len(shown) == 9
        for which, place, boxes in shown:
            assert len(boxes) == 1, which
            left, right, height = boxes[0]
            assert 0 <= place["left"] <= left < right <= place["right"] + 1 <= width + 1
            assert height > 150
        words = driver.execute_script(
            """return [...document.querySelectorAll('.plot > svg text')].filter((t) => t.getBoundingClientRect().width)
            .map((t) => { const r = t.getBoundingClientRect(), p = t.closest('svg').getBoundingClientRect();
            const s = getComputedStyle(t).fontSize.slice(0, -2) * p.width / t.closest('svg').viewBox.baseVal.width;
            return [t.textContent, s, r.left - p.left, p.right - r.right]; })"""
        )
        assert [w for w in words if w[1] < 10 or w[2] < -1 or w[3] < -1] == []  # of a readable size, and not cut off
        ink = driver.execute_script("return getComputedStyle(document.querySelector('.plot > svg text')).fill")
        assert ink == ("rgb(22, 25, 29)" if scheme == "light" else "rgb(233, 236, 240)")
    finally:
        driver.quit()
