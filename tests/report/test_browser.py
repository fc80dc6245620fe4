"""One page in a real browser: no errors, nothing that overflows, two themes, tables that sort and search."""

import os
import shutil

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait
from support.reports import llama_report

# Chrome first: where both are installed, as on the runners of GitHub, chromedriver is that of Chrome.
BROWSER = next(
    filter(None, map(shutil.which, ("google-chrome", "chromium", "chromium-browser"))), None
)
DRIVER = shutil.which("chromedriver")
FOUND = BROWSER and DRIVER


@pytest.mark.skipif(
    not (FOUND or os.environ.get("CI")),
    reason="no browser: `bash .ci/browser` installs one on Debian",
)
def test_a_page_in_a_browser(tmp_path):
    assert FOUND, "CI must have a browser and its driver: see .ci/browser"
    report = llama_report(30)
    report.save(tmp_path / "page.html")
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    try:
        colors = set()  # of the page, and of figures
        for theme in THEMES:
            for width in (1100, 400):
                colors.update(look_at(driver, tmp_path / "page.html", width, theme))
        assert len(colors) == 2 * len(THEMES)

        names = [layer.name for layer in report.layers]
        driver.find_element(By.CSS_SELECTOR, '[aria-label="Pruned layers"] th button').click()
        assert column(driver) == sorted(names, key=lambda name: (int(name.split(".")[2]), name))
        search = driver.find_element(
            By.CSS_SELECTOR, '[aria-label="Search the table: Pruned layers"]'
        )
        search.send_keys("Q_PROJ layers.1")
        assert sorted(column(driver)) == sorted(
            [name for name in names if "q_proj" in name and "layers.1" in name]
        )
    finally:
        driver.quit()


THEMES = ("light", "dark")


def look_at(driver, page, width, theme):
    """The colors of the page and of the labels in its figures."""
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    scheme = [{"name": "prefers-color-scheme", "value": theme}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
    driver.get(page.as_uri())
    # `get` may return before the page is there if the machine is busy.
    WebDriverWait(driver, 30).until(
        lambda driver: driver.find_elements(By.CSS_SELECTOR, "table tbody tr")
    )
    assert [
        entry for entry in driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")
    ] == []
    assert driver.execute_script("return document.documentElement.scrollWidth") <= width
    if width > 1000:  # no table is cut off
        script = "return [...document.querySelectorAll('.scroll')].every((e) => e.scrollWidth <= e.clientWidth + 1)"
        assert driver.execute_script(script)
    label = """
        const label = [...document.querySelectorAll("figure text")].find((e) => e.textContent === "q_proj");
        return [getComputedStyle(document.body).backgroundColor, getComputedStyle(label).fill];
    """
    return driver.execute_script(label)


def column(driver):
    """The names of the layers that the table shows."""
    script = """
        const table = document.querySelector('table[aria-label="Pruned layers"]');
        return [...table.tBodies[0].rows].filter((row) => !row.hidden).map((row) => row.cells[0].textContent);
    """
    return driver.execute_script(script)
