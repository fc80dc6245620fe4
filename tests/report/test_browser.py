"""Pages in a real browser: no errors, nothing that overflows, tables that sort and search."""

import shutil

import pytest
from support.reports import llama_report
from support.zoo import ZOO

pytest.importorskip("matplotlib", reason="pages need the extra report")
pytest.importorskip("selenium", reason="selenium is not installed")

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from wanda_lightning import prune

# Chrome first: where both are installed, as on the runners of GitHub, chromedriver is that of Chrome.
BROWSER = next(filter(None, map(shutil.which, ("google-chrome", "chromium", "chromium-browser"))), None)
DRIVER = shutil.which("chromedriver")
pytestmark = [
    pytest.mark.skipif(not (BROWSER and DRIVER), reason="no browser: apt-get install chromium chromium-driver"),
    pytest.mark.xdist_group("browser"),  # which starts in one worker, once
]


@pytest.fixture(scope="module")
def browser():
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A report with everything, and one of a mixture of experts."""
    folder, experts = tmp_path_factory.mktemp("pages"), ZOO["mixtral"]
    llama_report(30).to_html(folder / "full.html")
    prune(experts.build(), experts.batches(), 0.5, progress=False).to_html(folder / "experts.html")
    return folder


def show(browser, page, width=1400, theme="light", scripts=True):
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": not scripts})
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    )
    scheme = [{"name": "prefers-color-scheme", "value": theme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
    browser.get(page.as_uri())
    # `get` may return before the page is there if the machine is busy.
    WebDriverWait(browser, 30).until(lambda browser: browser.find_elements(By.CSS_SELECTOR, "table tbody tr"))


NAMES = ("full", "experts")


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("name", NAMES)
def test_nothing_overflows_and_nothing_fails(browser, pages, name, width, theme):
    show(browser, pages / f"{name}.html", width, theme)
    assert [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    beyond = """
        const scrolls = (e) => e && (getComputedStyle(e).overflowX === "auto" || scrolls(e.parentElement));
        return [...document.querySelectorAll("body *")].filter((e) => {
            const box = e.getBoundingClientRect();
            return box.width > 0 && (box.left < -0.5 || box.right > innerWidth + 0.5) && !scrolls(e);
        }).map((e) => e.outerHTML.slice(0, 120));
    """
    assert browser.execute_script(beyond) == []
    assert "experts.0" not in browser.title


@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("name", NAMES)
def test_labels_of_figures_do_not_cover_each_other(browser, pages, name, width):
    show(browser, pages / f"{name}.html", width)
    covered = """
        const found = [];
        for (const figure of document.querySelectorAll("figure svg")) {
            const texts = [...figure.querySelectorAll("text")].filter((e) => e.getBoundingClientRect().width > 0);
            const boxes = texts.map((e) => e.getBoundingClientRect());
            boxes.forEach((a, i) => boxes.slice(0, i).forEach((b, j) => {
                const wide = Math.min(a.right, b.right) - Math.max(a.left, b.left);
                const high = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
                if (wide > 2 && high > 4) found.push([texts[i].textContent, texts[j].textContent]);
            }));
        }
        return found;
    """
    assert browser.execute_script(covered) == []


def column(browser, label, number):
    script = """
        const table = document.querySelector(`table[aria-label="${arguments[0]}"]`);
        const rows = [...table.tBodies[0].rows].filter((row) => !row.hidden);
        return rows.map((row) => row.cells[arguments[1]].textContent);
    """
    return browser.execute_script(script, label, number)


def test_tables_sort_by_numbers_and_names(browser, pages):
    show(browser, pages / "full.html")
    names, weights = column(browser, "Pruned layers", 0), column(browser, "Pruned layers", 2)
    number = [int(text.replace(",", "")) for text in weights]
    headings = browser.find_elements(By.CSS_SELECTOR, 'table[aria-label="Pruned layers"] th button')
    headings[2].click()
    assert column(browser, "Pruned layers", 2) == [
        weights[i] for i in sorted(range(len(number)), key=number.__getitem__)
    ]
    headings[2].click()
    assert [int(text.replace(",", "")) for text in column(browser, "Pruned layers", 2)] == sorted(number, reverse=True)
    headings[0].click()
    in_order = sorted(names, key=lambda name: (int(name.split(".")[2]), name))
    assert column(browser, "Pruned layers", 0) == in_order
    sorted_by = browser.find_elements(By.CSS_SELECTOR, "th[aria-sort]")
    assert [(each.text.split()[0], each.get_attribute("aria-sort")) for each in sorted_by] == [("Layer", "ascending")]


def test_tables_are_searched_by_words(browser, pages):
    show(browser, pages / "full.html")
    names = column(browser, "Pruned layers", 0)
    search = browser.find_element(By.CSS_SELECTOR, '[aria-label="Search the table: Pruned layers"]')
    search.send_keys("Q_PROJ layers.1")
    expected = [name for name in names if "q_proj" in name and "layers.1" in name]
    assert column(browser, "Pruned layers", 0) == expected
    assert f"{len(expected)} of 210 rows" in browser.find_element(By.CSS_SELECTOR, ".search").text


def test_pages_are_readable_without_scripts(browser, pages):
    show(browser, pages / "full.html", scripts=False)
    text = browser.find_element(By.TAG_NAME, "main").text
    show(browser, pages / "full.html")
    assert "Perplexity on python-docs" in text
    assert "model.layers.29.mlp.down_proj" in text
    assert "an <escaped> note & a second half" in text


def test_themes_differ_in_page_and_figures(browser, pages):
    colors = []
    for theme in ("light", "dark"):
        show(browser, pages / "full.html", theme=theme)
        script = """
            const label = [...document.querySelectorAll("figure .wide text")].find((e) => e.textContent === "q_proj");
            return [getComputedStyle(document.body).backgroundColor, getComputedStyle(label).fill];
        """
        colors.append(browser.execute_script(script))
    assert all(light != dark for light, dark in zip(*colors, strict=True))


def test_a_page_prints_on_paper(browser, pages):
    show(browser, pages / "full.html", theme="dark")
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print", "features": []})
    assert browser.execute_script("return getComputedStyle(document.querySelector('.search')).display") == "none"
    assert browser.execute_script("return getComputedStyle(document.querySelector('.scroll')).maxHeight") == "none"
    assert browser.execute_cdp_cmd("Page.printToPDF", {})["data"].startswith("JVBER")
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
