"""The pages opened, clicked and photographed in headless Chromium: on a desk, on a phone, in the dark, on paper."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import Browser
from photos import write_photos, write_store
from PIL import Image
from run_folders import summary_json, write_run

from ferkd.cli import main
from ferkd.inspection import inspect_store
from ferkd.recipes import TrainConfig
from ferkd.regions import Region, RegionPolicy
from ferkd.store import LabelStore

HOSTILE = "</script><script>window.hacked=1</script><img src=x onerror='window.hacked=1'>&\"é"
POLICY = RegionPolicy(0.4, 0.6)
FLAGS = ["--discard-below", "0.4", "--calibrate-below", "0.6"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    opened = Browser()
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos") / "data")


@pytest.fixture(scope="module")
def store(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> LabelStore:
    classes = ("blue", "green", "red", HOSTILE)
    return write_store(photos, tmp_path_factory.mktemp("labels") / "store", classes=classes, k=3, unreadable=5)


@pytest.fixture(scope="module")
def store_page(photos: Path, store: LabelStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    page = tmp_path_factory.mktemp("pages") / "store.html"
    main(["inspect", str(store.path), *FLAGS, "--data", str(photos), "--page", str(page)])
    return page


@pytest.fixture(scope="module")
def runs_page(photos: Path, store: LabelStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    known = store.manifest_sha256
    for seed in (0, 1):
        write_run(root / f"FKD-{seed}", store=known, config=TrainConfig(seed=seed))
    write_run(
        root / HOSTILE.replace("/", "∕"), 200, store=known, config=TrainConfig(policy=POLICY), summary=summary_json(200, student=HOSTILE)
    )
    (root / "FKD-1" / "summary.json").unlink()
    page = root / "report.html"
    runs = sorted(str(folder) for folder in root.iterdir())
    main(["report", *runs, "--data", str(photos), "--labels", str(store.path), "--out", str(page)])
    return page


def check_at_peace(browser: Browser, page: Path) -> None:
    """Nothing on the console, nothing fetched but the page itself, nothing of a hostile name run."""
    assert browser.complaints() == []
    assert set(browser.requests()) <= {page.resolve().as_uri()}
    assert browser.run("return window.hacked") is None


def is_photograph(path: Path, darkest: int | None = None, lightest: int | None = None) -> bool:
    """Whether a PNG shows something, on a light or dark ground."""
    pixels = np.asarray(Image.open(path).convert("L"))
    ground = float(np.median(pixels))
    return pixels.std() > 5 and (darkest is None or ground < darkest) and (lightest is None or ground > lightest)


@pytest.mark.parametrize("kind", ["store", "runs"])
@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (1200, "dark"), (390, "light")])
def test_pages_fit_desks_and_phones_light_and_dark(
    browser: Browser, request: pytest.FixtureRequest, tmp_path: Path, kind: str, width: int, scheme: str
) -> None:
    page = request.getfixturevalue(f"{kind}_page")
    browser.open(page, width, scheme=scheme)
    shot = browser.photograph(tmp_path / "page.png")
    assert is_photograph(shot, darkest=60) if scheme == "dark" else is_photograph(shot, lightest=200)
    assert browser.overflows() == 0
    assert len(browser.all(".photo .picture image")) == 8
    texts = [
        float(size) for size in browser.run("return [...document.querySelectorAll('.tick')].map(t => t.getBoundingClientRect().height)")
    ]
    assert min(texts) > 9  # readable, not shrunk with the drawing
    check_at_peace(browser, page)


@pytest.mark.parametrize("kind", ["store", "runs"])
def test_pages_print(browser: Browser, request: pytest.FixtureRequest, tmp_path: Path, kind: str) -> None:
    page = request.getfixturevalue(f"{kind}_page")
    browser.open(page, scheme="dark")
    pdf = browser.print(tmp_path / "page.pdf").read_bytes()
    assert pdf.startswith(b"%PDF")
    assert 2 <= pdf.count(b"/Type /Page\n") <= 8
    browser.emulate_paper()
    shot = browser.photograph(tmp_path / "paper.png")
    assert is_photograph(shot, lightest=200)
    assert browser.overflows() == 0
    assert not any(element.is_displayed() for element in browser.all("input[type=range], .no-print"))
    check_at_peace(browser, page)


def shown(browser: Browser) -> list[list[str]]:
    return [[cell.text for cell in row.find_elements("css selector", "td")] for row in browser.all("#regions tbody tr")]


def set_value(browser: Browser, name: str, value: float | str) -> None:
    browser.run(
        "const box = document.getElementById(arguments[0]); box.value = arguments[1]; box.dispatchEvent(new Event('change'))", name, value
    )


def test_moved_thresholds_count_what_ferkd_inspect_counts(
    browser: Browser, store: LabelStore, store_page: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    browser.open(store_page)
    assert browser.one("#flags").get_attribute("value") == "--discard-below 0.4 --calibrate-below 0.6"
    for policy in (
        POLICY,
        RegionPolicy(0.5, 0.75, 0.999),
        RegionPolicy(0.123, 0.456, confidence="target"),
        RegionPolicy(),
        RegionPolicy(1.0, 1.0),
    ):
        browser.one(f"#by_{policy.confidence}").click()
        for name in ("discard_below", "calibrate_below", "discard_above"):
            set_value(browser, name, {"discard_below": 0, "calibrate_below": 0, "discard_above": 1}[name])
        for name in ("discard_above", "calibrate_below", "discard_below"):
            set_value(browser, name, getattr(policy, name))
        inspection = inspect_store(store, policy)
        for row, count, agree in zip(shown(browser), inspection.regions, inspection.region_agree, strict=True):
            assert row[:2] == [f"{count:,}", f"{count / inspection.crops:.1%}"]
            assert row[2] == (f"{agree / count:.1%}" if count else "–")
        if policy.discard_above == 1.0:
            assert browser.one("#lost").text.startswith(f"{inspection.images_without_survivor} of 23 images")
        flags = browser.one("#flags").get_attribute("value").split()
        main(["inspect", str(store.path), *flags, "--json"])
        counted = json.loads(capsys.readouterr().out)
        assert counted["regions"] == {region.name.lower(): int(inspection.regions[region]) for region in Region}
    check_at_peace(browser, store_page)


def test_sliders_buttons_and_keys(browser: Browser, store_page: Path) -> None:
    from selenium.webdriver.common.keys import Keys

    browser.open(store_page)
    slider = browser.one("#discard_below_slider")
    before, colours = shown(browser), browser.run("return [...document.querySelectorAll('.photo rect')].map(r => r.className.baseVal)")
    slider.send_keys(Keys.ARROW_RIGHT)
    assert browser.one("#discard_below").get_attribute("value") == "0.401"
    assert slider.get_attribute("aria-valuetext") == "0.401"
    slider.send_keys(Keys.END)  # pushes the others before it, so that ferkd train would take the flags
    assert [browser.one(f"#{name}").get_attribute("value") for name in ("discard_below", "calibrate_below", "discard_above")] == ["1"] * 3
    assert browser.run("return [...document.querySelectorAll('.photo rect')].map(r => r.className.baseVal)") != colours
    browser.one("#reset").click()
    assert shown(browser) == before
    browser.one("#candidates_target tbody tr:nth-child(6) button").click()
    assert browser.one("#flags").get_attribute("value") == "--discard-below 0.05 --calibrate-below 0.3 --confidence target"
    set_value(browser, "discard_below", "")
    assert browser.one("#discard_below").get_attribute("value") == "0.05"
    browser.one("#copy").click()
    assert browser.one("#flags").get_attribute("value") == browser.run("return getSelection().toString()")
    browser.one("#magnify").click()
    chart = browser.one("#histogram svg")
    chart.send_keys(Keys.HOME)
    assert "0.00–0.01" in browser.one("#histogram output").text
    chart.send_keys(Keys.ARROW_RIGHT)
    assert "0.01–0.02" in browser.one("#histogram output").text
    check_at_peace(browser, store_page)


def last_values(browser: Browser, chart: int) -> list[str]:
    return [entry.text for entry in browser.all("#curves figure")[chart].find_elements("css selector", ".entry")]


def test_curves_are_read_switched_and_hidden(browser: Browser, runs_page: Path) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    browser.open(runs_page)
    assert [value.split()[-1] for value in last_values(browser, 0)] == ["133.33%", "66.67%", "66.67%"]
    charts = browser.all("#curves figure svg")
    reading = browser.all("#curves output")[2]
    ActionChains(browser.driver).move_to_element(charts[2]).perform()
    pointed = reading.text
    assert pointed.startswith("step ")
    charts[2].send_keys(Keys.HOME)
    assert reading.text.startswith("step 10:")
    charts[2].send_keys(Keys.ARROW_RIGHT)
    assert reading.text.startswith("step 20:")
    for axis, says in (("crops", "crops 240:"), ("seconds", "time 5 s:"), ("step", "step 20:")):
        browser.run("arguments[0].click()", browser.one(f"input[value={axis}]"))  # the pointer stays
        assert reading.text.startswith(says)
    charts[2].send_keys(Keys.END)
    assert [value.split()[-1] for value in last_values(browser, 2)] == ["0.2727", "ended", "ended"]
    browser.one("#legend input").click()
    assert len(last_values(browser, 0)) == 2
    assert browser.all("#curves figure")[2].find_elements("css selector", "path.line").__len__() == 2
    browser.one("#legend input").click()
    assert len(browser.all("#regions figure")) == 3
    check_at_peace(browser, runs_page)


def test_photographs_follow_the_chosen_runs_policy(browser: Browser, runs_page: Path) -> None:
    browser.open(runs_page)
    kinds = "return [...new Set([...document.querySelectorAll('.photo rect')].map(r => r.className.baseVal.trim()))].sort()"
    assert browser.run(kinds) == ["calibrated", "discarded", "kept"]
    browser.run("const s = document.getElementById('policies'); s.value = 1; s.dispatchEvent(new Event('change'))")
    assert browser.run(kinds) == ["kept"]
    check_at_peace(browser, runs_page)


def test_every_control_is_reached_by_the_keyboard_and_has_a_name(browser: Browser, runs_page: Path, store_page: Path) -> None:
    for page in (runs_page, store_page):
        browser.open(page)
        nameless: list[Any] = browser.run(
            "const all = [...document.querySelectorAll('input, button, select, textarea, svg[role=img]')];"
            "return all.filter(e => !(e.labels?.length || e.getAttribute('aria-label') || e.textContent.trim())).map(e => e.outerHTML)"
        )
        assert nameless == []
        assert browser.run("return [...document.querySelectorAll('figure > svg:not(.picture)')].every(e => e.tabIndex === 0)")


def test_without_scripts_the_tables_are_there(browser: Browser, store_page: Path) -> None:
    browser.driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        browser.open(store_page)
        assert "JavaScript" in browser.one("noscript").text
        assert not browser.one("#controls").is_displayed()
        assert "discarded" in browser.one("#regions").text
    finally:
        browser.driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
