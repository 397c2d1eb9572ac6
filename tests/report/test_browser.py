"""The report in a real browser: drawn, sorted, in light and dark, wide and narrow."""

import shutil
from typing import Any

import pytest

pytest.importorskip("selenium", reason="selenium is not installed: pip install selenium")

from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By

from bitknap.report.run_page import report

CHROMIUM, DRIVER = shutil.which("chromium") or "", shutil.which("chromedriver") or ""
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="no chromium: apt-get install chromium chromium-driver"
)
HOSTILE = "<a href='http://x.example'>x</a></script><script>document.title = 1</script>"
SIZES = {"wide": 1400, "narrow": 400}


@pytest.fixture(scope="module")
def browser():
    options = Options()
    options.binary_location = CHROMIUM
    # Root, as in containers, has no sandbox.
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    # On a busy machine a page takes long, and is right all the same.
    remote: Any = driver.command_executor
    remote.client_config.timeout = 500
    driver.set_page_load_timeout(400)
    driver.set_script_timeout(400)
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def page(browser, document_of, plan_of, tmp_path_factory):
    """The page of a small model, opened."""
    plans = {f"{bits:g}bpw": plan_of(bits) for bits in (2.0, 2.5)}
    path = tmp_path_factory.mktemp("report") / "small.html"
    document = document_of()
    for row in document["rows"]:
        if row["strategy"] == "random":
            row["strategy"] = HOSTILE
    path.write_text(report(document, plans))
    return opened(browser, path)


def opened(browser, path):
    resize(browser, SIZES["wide"])
    browser.get(path.as_uri())
    settle(browser)
    return browser


def settle(browser):
    """Wait until plots have followed what was changed."""
    browser.execute_async_script("setTimeout(arguments[0], 400)")


def resize(browser, width):
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def scheme(browser, name):
    features = [{"name": "prefers-color-scheme", "value": name}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def column(browser, index):
    script = """
    const rows = [...document.querySelector(".sorted").tBodies[0].rows];
    return rows.map(row => row.cells[arguments[0]] ? row.cells[arguments[0]].dataset.v ?? "" : "");
    """
    return browser.execute_script(script, index)


def head(browser, name):
    for found in browser.find_elements(By.CSS_SELECTOR, ".sorted th"):
        if found.text.rstrip(" ↑↓") == name:
            return found
    raise AssertionError(name)


def test_every_plot_is_drawn_and_nothing_is_loaded_or_complained_about(page):
    assert page.get_log("browser") == []
    assert page.execute_script("return performance.getEntriesByType('resource').length") == 0
    plots = page.find_elements(By.CSS_SELECTOR, ".plotly-graph-div")
    assert len(plots) == 8
    for plot in plots:
        (svg, *_) = plot.find_elements(By.CSS_SELECTOR, ".main-svg")
        assert svg.size["width"] > 300
    marks = "return document.querySelectorAll('#plot-size-against-loss .point').length"
    assert page.execute_script(marks) == 45
    maps = "return document.querySelectorAll('#plot-plan-0 .heatmaplayer image').length"
    assert page.execute_script(maps) == 4


def test_a_click_on_a_head_sorts(page):
    kl = head(page, "KL").find_element(By.TAG_NAME, "button")
    before = column(page, 0)
    kl.click()
    assert head(page, "KL").get_attribute("aria-sort") == "ascending"
    up = column(page, 5)
    assert up[-2:] == ["", ""]
    numbers = [float(text) for text in up[:-2]]
    assert numbers == sorted(numbers)
    kl.click()
    assert head(page, "KL").get_attribute("aria-sort") == "descending"
    assert column(page, 5) == [*reversed(up[:-2]), "", ""]
    head(page, "strategy").find_element(By.TAG_NAME, "button").click()
    assert head(page, "KL").get_attribute("aria-sort") is None
    names = column(page, 0)
    assert names == sorted(before)


def test_what_the_pointer_shows_is_text(page):
    script = """
    const plot = document.getElementById(arguments[0]);
    const number = plot.data.findIndex(trace => trace.name === arguments[1]);
    const place = number < 0 ? {xval: 3, yval: 1} : [{curveNumber: number, pointNumber: 0}];
    Plotly.Fx.hover(plot, place, "xy");
    const shown = [...plot.querySelectorAll(".hovertext")].map(x => x.textContent).join("");
    return [shown, plot.querySelectorAll(".hoverlayer a").length];
    """
    shown, links = page.execute_script(script, "plot-size-against-loss", "random")
    assert HOSTILE in shown
    assert links == 0
    shown, _ = page.execute_script(script, "plot-plan-0", "")
    assert "layer 1, expert 3int" in shown
    assert "bpw" in shown
    assert page.title == "Bits of reference:mixtral"
    assert not page.find_elements(By.CSS_SELECTOR, "td a")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("name", "ink", "paper"),
    [
        ("light", "rgb(27, 31, 36)", "rgb(255, 255, 255)"),
        ("dark", "rgb(230, 237, 243)", "rgb(13, 17, 23)"),
    ],
)
def test_by_day_and_night_wide_and_narrow(page, size, name, ink, paper):
    resize(page, SIZES[size])
    scheme(page, name)
    settle(page)
    body = page.find_element(By.TAG_NAME, "body")
    seen = [
        page.execute_script(f"return getComputedStyle(arguments[0]).{what}", where)
        for where, what in (
            (body, "backgroundColor"),
            (page.find_element(By.CSS_SELECTOR, ".xtick text"), "fill"),
            (page.find_element(By.CSS_SELECTOR, ".legendtext"), "fill"),
            (page.find_element(By.CSS_SELECTOR, ".cbaxis text"), "fill"),
        )
    ]
    assert seen == [paper, ink, ink, ink]
    width, inside = page.execute_script("return [innerWidth, document.documentElement.scrollWidth]")
    assert inside <= width == SIZES[size]
    wider = """
    return [...document.querySelectorAll(".plot")].filter(x => x.scrollWidth > x.clientWidth).length
    """
    assert page.execute_script(wider) == 0
    assert page.get_log("browser") == []


def test_labels_are_whole_and_apart_on_narrow_screens(page):
    resize(page, SIZES["narrow"])
    settle(page)
    script = """
    const cut = [];
    for (const plot of document.querySelectorAll(".plotly-graph-div")) {
      const box = plot.getBoundingClientRect();
      for (const text of plot.querySelectorAll("text:not(.hoverlayer text)")) {
        const place = text.getBoundingClientRect();
        if (place.width && (place.left < box.left - 1 || place.right > box.right + 1
            || place.bottom > box.bottom + 1 || place.top < box.top - 1)) {
          cut.push(plot.id + ": " + text.textContent);
        }
      }
    }
    return cut;
    """
    assert page.execute_script(script) == []
    script = """
    const near = [];
    for (const axis of document.querySelectorAll(".xaxislayer-above, .yaxislayer-above")) {
      const boxes = [...axis.querySelectorAll("text")].map(text => text.getBoundingClientRect());
      boxes.forEach((a, i) => boxes.slice(i + 1).forEach(b => {
        if (a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom) {
          near.push(axis.closest(".plotly-graph-div").id);
        }
      }));
    }
    return near;
    """
    assert page.execute_script(script) == []


def test_maps_of_many_experts_unfold(browser, document_of, plan_of, tmp_path):
    plans = {f"{bits:g}bpw": plan_of(bits, layers=48, experts=128) for bits in (2.0, 3.0)}
    path = tmp_path / "large.html"
    path.write_text(report(document_of(layers=48, experts=128), plans))
    opened(browser, path)
    assert browser.find_elements(By.CSS_SELECTOR, "#plot-plan-0 .heatmaplayer image")
    folded = browser.find_element(By.ID, "plot-plan-1")
    assert not folded.is_displayed()
    browser.execute_script("arguments[0].closest('details').open = true", folded)
    settle(browser)
    assert folded.is_displayed()
    around = browser.execute_script("return arguments[0].parentElement.clientWidth", folded)
    svg = folded.find_element(By.CSS_SELECTOR, ".main-svg")
    assert around - 8 <= svg.size["width"] <= around
    assert browser.get_log("browser") == []
