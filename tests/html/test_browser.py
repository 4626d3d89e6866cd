"""The pages in a real browser: on a phone and a desktop, in light and dark, nothing overflows and no plot is empty."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmlite.html.compare import compare
from llmlite.html.page import run_page
from tests.html.browser import Browser, Page, find_browser, running_browser
from tests.html.test_page import evaluated, report

PAPER = 702  # pixels of A4 between margins of 12 mm
LAYOUT = """(() => {
  const box = e => e.getBoundingClientRect();
  const outside = [...document.querySelectorAll("body *:not(svg *)")].filter(e => box(e).right > innerWidth + 1 && !e.closest(".wide, pre"));
  const plots = [...document.querySelectorAll("svg")].map(e => {
    const texts = [...e.querySelectorAll("text")].filter(t => t.textContent.trim());
    const over = (a, b) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > 2 && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 3;
    return { title: e.getAttribute("aria-label"), box: [box(e).left, box(e).top + scrollY, box(e).right, box(e).bottom + scrollY],
      outside: texts.filter(t => box(t).right > box(e).right + 2 || box(t).left < box(e).left - 2).map(t => t.textContent),
      overlapping: texts.flatMap((t, i) => texts.slice(i + 1).filter(u => over(box(t), box(u))).map(u => t.textContent + " / " + u.textContent)) };
  });
  const scrolling = [...document.querySelectorAll(".wide, pre")].filter(e => e.scrollWidth > e.clientWidth + 1).map(e => e.className || e.tagName);
  return { outside: outside.map(e => e.tagName + " " + e.textContent.slice(0, 40)), plots, scrolling };
})()"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with running_browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run that `llmlite evaluate` has measured."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "page.html").write_text(run_page(report(folder), evaluated(folder)), encoding="utf-8")
    return folder / "page.html"


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six runs whose figures are near to each other and whose long names differ at the end, beside each other."""
    folder = tmp_path_factory.mktemp("compared")
    places = [folder / f"smollm2-135m-instruct-pruned-and-distilled-with-seed-{seed}" for seed in range(6)]
    for number, place in enumerate(places):
        place.mkdir()
        made = report(place)
        base, step, last = (dataclasses.replace(row, parameters=134_515_008, prefill_tokens_per_second=15_034.0) for row in made.rows)
        last = dataclasses.replace(
            last, bytes_on_disk=3_600_000 + 9_000 * number, perplexity=21 + 0.02 * (number % 3), decode_tokens_per_second=10.5 + number / 9
        )
        made.rows = [base, dataclasses.replace(step, name="prune.structured"), dataclasses.replace(step, name="distill.whitebox"), last]
        made.save()
    (folder / "page.html").write_text(compare(places).page(), encoding="utf-8")
    return folder / "page.html"


def require_readable(page: Page, plots: int) -> dict[str, Any]:
    """Nothing sticks out, no two texts of a plot lie on each other, and each plot shows pixels with a hue: axes and words have none."""
    found: dict[str, Any] = page.evaluate(LAYOUT)
    picture = page.picture()
    assert found["outside"] == []
    assert len(found["plots"]) == plots
    for plot in found["plots"]:
        assert plot["outside"] == plot["overlapping"] == [], plot["title"]
        left, top, right, bottom = plot["box"]
        assert right - left > 200
        assert bottom - top > 60
        area = picture.crop((int(left), int(top), int(right), int(bottom)))
        drawn = sum(count for count, colour in area.getcolors(1 << 20) if max(colour) - min(colour) > 40)
        assert drawn > 0.001 * area.width * area.height, plot["title"]
    return found


@pytest.mark.parametrize("width", [390, 1200])
def test_nothing_overflows_and_no_plot_of_a_run_is_empty(browser: Browser, run: Path, width: int) -> None:
    page = browser.open(run)
    page.show(width)
    found = require_readable(page, 9)
    assert width < 700 or found["scrolling"] == []


STEPS = ("prune.structured", "distill.whitebox", "quantize", "correct", "merge")


@pytest.mark.parametrize(("width", "dark"), [(390, False), (390, True), (PAPER, False), (1200, False), (1200, True)])
def test_every_step_measured_again_has_a_column_that_can_be_read_on_a_phone_on_paper_and_on_a_desktop(
    browser: Browser, tmp_path: Path, width: int, dark: bool
) -> None:
    found = evaluated(tmp_path, STEPS)
    found.models["this"]["step"] = "6. finetune"
    for model in found.models.values():
        model["answers"] = [model["answers"][0] | {"answer": "It is blue, because air scatters blue light more than red. " * 4}]
    (tmp_path / "page.html").write_text(run_page(report(tmp_path), found), encoding="utf-8")
    page = browser.open(tmp_path / "page.html")
    page.show(width, dark=dark, paper=width == PAPER)
    layout = require_readable(page, 9)
    assert width < 700 or "wide" not in layout["scrolling"]  # seven columns and their names fit a desktop and paper; a phone scrolls the table alone
    heads = "[...[...document.querySelectorAll('table')].at(-1).querySelectorAll('th')].map(e => [e.textContent, e.getBoundingClientRect().width])"
    columns = page.evaluate(heads)
    assert [name.replace("\u200b", "") for name, _ in columns] == ["", "base", *(f"{n}. {name}" for n, name in enumerate(STEPS, 1)), "6. finetune = this"]
    assert min(wide for _, wide in columns) > 40
    answers = "[...document.querySelectorAll('.beside > div')].map(e => e.getBoundingClientRect().width)"
    given = page.evaluate(answers)
    assert len(given) == 7
    assert min(given) > 200


@pytest.mark.parametrize("width", [390, PAPER, 1200])
def test_nothing_overflows_in_a_comparison_and_its_numbered_points_can_be_told_apart(browser: Browser, comparison: Path, width: int) -> None:
    page = browser.open(comparison)
    page.show(width, paper=width == PAPER)
    found = require_readable(page, 2)
    assert width < 700 or found["scrolling"] == []
    numbers = "[...document.querySelectorAll('svg')].map(e => [...e.querySelectorAll('text')].map(t => t.textContent).filter(t => /^[0-6]$/.test(t)).sort())"
    assert page.evaluate(numbers) == [list("0123456")] * 2


def test_in_the_dark_paper_is_dark_and_ink_light(browser: Browser, run: Path, comparison: Path) -> None:
    for file, plots in ((run, 9), (comparison, 2)):
        page = browser.open(file)
        page.show(1200, dark=True)
        require_readable(page, plots)
        paper, ink = page.evaluate("[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.querySelector('svg text')).fill]")
        assert brightness(paper) < 60
        assert brightness(ink) > 190


def test_on_paper_the_whole_recipe_stands_and_the_table_of_many_steps_fits(browser: Browser, tmp_path: Path) -> None:
    long = report(tmp_path)
    long.rows = [long.rows[0], *(dataclasses.replace(long.rows[1], name=f"{name}.structured") for name in ("prune", "distil", "quantize", "correct", "again"))]
    long.recipe["note"] = "a-setting-without-a-blank-" * 12
    (tmp_path / "page.html").write_text(run_page(long, evaluated(tmp_path)), encoding="utf-8")
    page = browser.open(tmp_path / "page.html")
    recipe = "[...document.querySelectorAll('details pre')].map(e => e.checkVisibility({ contentVisibilityAuto: true }) && e.getBoundingClientRect().height)"
    page.show(1200)
    assert page.evaluate(recipe) == [False]  # folded on a screen
    assert "wide" not in page.evaluate(LAYOUT)["scrolling"]  # six columns fit a desktop too
    page.show(PAPER, paper=True)
    assert require_readable(page, 16)["scrolling"] == []
    assert page.evaluate(recipe)[0] > 100


def brightness(colour: str) -> float:
    """Mean of the channels of a CSS colour, rgb(1, 2, 3)."""
    return sum(map(int, colour.removeprefix("rgb(").removesuffix(")").split(", "))) / 3


def test_without_a_browser_these_tests_are_skipped_at_home_and_fail_in_continuous_integration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception):
        find_browser()
    monkeypatch.setenv("CI", "1")
    with pytest.raises(pytest.fail.Exception, match="no Chromium here"):
        find_browser()
