"""Reports: what stands in the files, and what a real browser makes of them (headless Chromium, where there is one)."""

import base64
import html
import json
import re
import shutil
from dataclasses import asdict, replace
from io import BytesIO
from types import SimpleNamespace
from urllib.parse import unquote

import numpy as np
import pytest
import torch
from pymatgen.analysis.structure_matcher import StructureMatcher
from pymatgen.core import Lattice, Structure

from cfrl.commands.retrieve import retrieve
from cfrl.commands.screen import screen
from cfrl.config import FinetuneConfig, RetrieveConfig, ScreenConfig
from cfrl.crystals.crystal import CrystalBatch
from cfrl.crystals.fingerprint import fingerprints
from cfrl.errors import UserError
from cfrl.io.datasets import load_dataset
from cfrl.io.storage import append_crystals, read_columns, read_crystals, write_crystals
from cfrl.reports import finetune as finetune_report
from cfrl.reports import monitor
from cfrl.reports import retrieve as retrieve_report
from cfrl.reports import screen as screen_report
from cfrl.reports.figures import Figure, PeriodicTable, Series, histogram, place
from cfrl.reports.labels import number_text, space_group_symbol, subscripts
from cfrl.reports.page import PRINTED_ROWS, Page
from cfrl.reports.pareto import pareto, pareto_front, quantities
from cfrl.reports.report import newest_reportable, write_report
from cfrl.reports.scene import cif_links, scene
from cfrl.rewards import RewardContext, build_reward
from cfrl.runs.folder import RunFolder
from cfrl.screening.ranking import rate_ranking
from tests.tiny import tuned_run

HOSTILE = '</script><script>document.title="broken"</script>'


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> dict[str, RunFolder]:
    """One real run of each command that has a page."""
    folder = tmp_path_factory.mktemp("reports")
    finetune = tuned_run(folder)
    write_report(finetune)
    crystals = load_dataset("prototypes")[:80]
    crystals.ids[0] = HOSTILE
    crystals.ids[1] = "mp-149"
    columns = {"density": crystals.densities().double()}
    write_crystals(folder / "known.h5", crystals, columns=columns)
    settings = RetrieveConfig(
        run=str(finetune.path), dataset=str(folder / "known.h5"), samples=30, reward_crystals=50, device="cpu"
    )
    retrieved = retrieve(settings, root=folder / "runs")
    write_crystals(folder / "input.h5", crystals[:12])
    config = ScreenConfig(relax=False, stability=False, rank="density", workers=1, device="cpu")
    screened = RunFolder.open(screen(str(folder / "input.h5"), config, output=str(folder / "screened")))
    write_report(screened)
    return {"finetune": finetune, "retrieve": retrieved, "screen": screened}


# ---- in a browser


@pytest.fixture(scope="module")
def browser():
    chromium, driver = (shutil.which(name) for name in ("chromium", "chromedriver"))
    if not (chromium and driver):
        pytest.skip("needs Chromium and its driver (Debian: chromium, chromium-driver)")
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (
        "headless=new",
        "no-sandbox",
        "disable-dev-shm-usage",
        "enable-unsafe-swiftshader",
        "window-size=1320,900",
    ):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chrome = webdriver.Chrome(options, webdriver.ChromeService(driver))
    chrome.set_page_load_timeout(240)
    chrome.set_script_timeout(240)
    yield chrome
    chrome.quit()


@pytest.fixture(params=["finetune", "retrieve", "screen"])
def page(request, browser, reports):
    """The browser with a report open, and what was logged on the way."""
    for kind in ("browser", "performance"):
        browser.get_log(kind)
    browser.get((reports[request.param].path / "report.html").as_uri())
    browser.execute_async_script("requestAnimationFrame(() => setTimeout(arguments[0], 100))")
    return SimpleNamespace(name=request.param, browser=browser, run=reports[request.param])


def pixels(element) -> np.ndarray:
    """(h, w, 3) of what the browser shows of an element."""
    from matplotlib.image import imread

    return imread(BytesIO(base64.b64decode(element.screenshot_as_base64)), format="png")[..., :3]


def test_report_opens_without_fault_or_request(page):
    entries = page.browser.get_log("browser")
    # The graphics driver of a machine without a GPU complains of its own slowness.
    faults = [entry for entry in entries if entry["level"] != "INFO" and entry["source"] != "rendering"]
    messages = [json.loads(entry["message"])["message"] for entry in page.browser.get_log("performance")]
    asked = {m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"}
    assert faults == []
    assert {url for url in asked if not url.startswith(("data:", "blob:"))} == {page.browser.current_url}
    assert page.browser.title != "broken"
    figures = page.browser.execute_script(
        "return [...document.querySelectorAll('.plot')].map((p) => [p.id, p.querySelectorAll('.main-svg path').length])"
    )
    assert len(figures) >= 3
    assert [name for name, paths in figures if paths < 2] == []
    assert overflow(page.browser) <= 0


def overflow(browser) -> int:
    """Pixels by which the page is wider than the window."""
    return browser.execute_script("return document.documentElement.scrollWidth - innerWidth")


@pytest.fixture
def emulated(browser):
    """Sets the width of the screen, the colour scheme and the medium, for one test."""

    def emulate(width: int = 1200, scheme: str = "light", media: str = "screen"):
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        scheme = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": scheme})
        return browser

    yield emulate
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": []})


def test_nothing_is_wider_than_a_phone(emulated, reports):
    browser = emulated(width=400)
    for run in reports.values():
        browser.get((run.path / "report.html").as_uri())
        assert overflow(browser) <= 0
        wide = "return [...document.querySelectorAll('main > *')].filter((e) => e.getBoundingClientRect().right > 400)"
        assert browser.execute_script(wide) == []


# Relative luminances (WCAG 2.1) of the ink of everything with text, and of the page behind it.
LUMINANCE = """
const part = (c) => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
const luminance = (color) => {
  const [r, g, b] = color.match(/[\\d.]+/g).map(Number);
  return 0.2126 * part(r) + 0.7152 * part(g) + 0.0722 * part(b);
};
const behind = (e) => {
  for (; e; e = e.parentElement) {
    const color = getComputedStyle(e).backgroundColor;
    if (e instanceof HTMLElement && color !== "rgba(0, 0, 0, 0)") return luminance(color);
  }
  return 1;
};
const kinds = "h1, h2, h3, p, dt, dd, td, th, b, a, text.legendtext, .xtick text, .ytick text";
const texts = [...document.querySelectorAll(kinds)];
const shown = texts.filter((e) => e.textContent.trim() && e.getBoundingClientRect().width);
return shown.map((e) => {
  const style = getComputedStyle(e);
  return [e.textContent.slice(0, 30), luminance(e instanceof SVGElement ? style.fill : style.color), behind(e)];
});
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_can_be_read(emulated, reports, scheme):
    """A contrast of 4.5 to 1, as the Web Content Accessibility Guidelines ask; bright on dark in dark mode."""
    browser = emulated(scheme=scheme)
    for run in reports.values():
        browser.get((run.path / "report.html").as_uri())
        found = browser.execute_script(LUMINANCE)
        assert len(found) > 50
        poor = [entry for entry in found if (max(entry[1:]) + 0.05) / (min(entry[1:]) + 0.05) < 4.5]
        assert poor == []
        assert (found[-1][2] < 0.1) == (scheme == "dark")  # the page behind the last text


def test_print_is_ink_on_paper_with_fifty_rows(emulated, reports):
    browser = emulated(width=720, scheme="dark", media="print")
    browser.get((reports["retrieve"].path / "report.html").as_uri())
    shown = "[...t.tBodies[0].rows].map((row) => row.offsetHeight > 0)"
    tables = browser.execute_script(f"return [...document.querySelectorAll('table')].map((t) => {shown})")
    assert max(map(len, tables)) > PRINTED_ROWS
    assert [sum(table) for table in tables] == [min(len(table), PRINTED_ROWS) for table in tables]
    assert f"The first {PRINTED_ROWS} of {max(map(len, tables))} rows." in browser.find_element("tag name", "main").text
    ink = browser.execute_script("return getComputedStyle(document.querySelector('h2')).color")
    assert sum(map(int, re.findall(r"\d+", ink)[:3])) < 200
    browser.execute_script("dispatchEvent(new Event('beforeprint'))")
    undrawn = "return [...document.querySelectorAll('.view')].filter((v) => !v.querySelector('canvas')).length"
    assert browser.execute_script(undrawn) == 0  # also those that nobody has scrolled to
    boxes = "return [...document.querySelectorAll('.plot .main-svg')].every((s) => s.hasAttribute('viewBox'))"
    assert browser.execute_script(boxes)


def test_the_legend_is_beside_the_structure(page):
    view, legend = (page.browser.find_element("css selector", f".crystal {kind}") for kind in (".view", ".elements"))
    page.browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", view)
    page.browser.execute_async_script("requestAnimationFrame(() => setTimeout(arguments[0], 500))")
    assert legend.text
    assert legend.rect["y"] >= view.rect["y"] + view.rect["height"] - 1
    drawn = np.abs(pixels(view) - pixels(view)[4, 4]).sum(-1) > 0.1
    inner = drawn[10:-2, 10:-10]  # without the card's round corners
    edges = inner[0], inner[-1], inner[:, 0], inner[:, -1]
    assert not np.concatenate(edges).any()  # nothing is cut off


def test_crystals_are_drawn_and_turn(page):
    from selenium.webdriver import ActionChains

    view = page.browser.find_element("css selector", ".view")
    page.browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", view)
    page.browser.execute_async_script("requestAnimationFrame(() => setTimeout(arguments[0], 500))")
    assert view.find_elements("tag name", "canvas")
    before = pixels(view)
    background = np.abs(before - before[4, 4]).sum(-1) < 0.02
    assert 0.2 < background.mean() < 0.995  # something is drawn, and it does not fill the view
    ActionChains(page.browser).drag_and_drop_by_offset(view, 60, 25).perform()
    after = pixels(view)
    assert (np.abs(before - after).sum(-1) > 0.1).mean() > 0.005


def test_a_click_sorts_the_table(page):
    table = page.browser.find_element("css selector", "table.sortable")
    headers = table.find_elements("tag name", "th")

    def column(index: int) -> list[str]:
        script = "return [...arguments[0].tBodies[0].rows].map((row) => row.cells[arguments[1]].dataset.value)"
        return page.browser.execute_script(script, table, index)

    names = [header.text for header in headers]
    number, word = names.index("rank" if "rank" in names else "density (g/cm³)"), names.index("formula")
    original = column(word)
    click = "arguments[0].click()"
    for direction in ("descending", "ascending"):
        page.browser.execute_script(click, headers[number])
        values = [float(value) for value in column(number)]
        assert values == sorted(values, reverse=direction == "descending")
        assert headers[number].get_attribute("aria-sort") == direction
    page.browser.execute_script(click, headers[word])
    assert sorted(column(word)) == sorted(original)
    assert column(word)[0] == min(original, key=str.lower)
    assert headers[number].get_attribute("aria-sort") is None


def test_the_filter_hides_rows(browser, reports):
    browser.get((reports["retrieve"].path / "report.html").as_uri())
    box = browser.find_element("css selector", "input.filter")
    box.send_keys("mp-149")
    table = browser.find_element("id", box.get_attribute("data-table"))
    shown = [row for row in table.find_elements("css selector", "tbody tr") if row.is_displayed()]
    assert len(shown) == 1
    assert (
        shown[0].find_element("tag name", "a").get_attribute("href") == "https://materialsproject.org/materials/mp-149"
    )


# ---- the files


def figures_of(run: RunFolder) -> dict[str, dict]:
    """The figures of a written report, as plotly gets them."""
    text = (run.path / "report.html").read_text(encoding="utf-8")
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text).group(1))["figures"]


def test_report_is_one_file_that_names_no_other(reports):
    for run in reports.values():
        text = (run.path / "report.html").read_text(encoding="utf-8")
        head = text.partition("<main>")[0]
        assert "Content-Security-Policy" in head
        assert "default-src 'none'" in head
        assert not re.search(r"<(script|img|iframe|link)[^>]+(src|href)=[\"'](?!data:)", text)
        assert len(text) < 3_000_000


def test_figures_for_papers_lie_beside_the_report(reports):
    for run in reports.values():
        vector, raster = (sorted(p.stem for p in (run.path / "plots").glob(f"*.{end}")) for end in ("svg", "png"))
        assert vector == raster
        assert len(vector) >= 3
    svg = (reports["finetune"].path / "plots" / "kl.svg").read_text(encoding="utf-8")
    assert "KL (nats)" in svg  # as text that can be edited, not as outlines
    assert ">step<" in svg


def test_report_is_found_and_written_again(reports, tmp_path):
    run = newest_reportable(reports["retrieve"].path.parent)
    assert run.path == reports["retrieve"].path
    with pytest.raises(UserError, match="no run of finetune"):
        newest_reportable(tmp_path)
    with pytest.raises(UserError, match="not a run folder"):
        write_report(tmp_path)


def test_any_run_with_metrics_has_a_report(tmp_path):
    run = RunFolder.create("pretrain", config=None, root=tmp_path)
    with pytest.raises(UserError, match="no metrics yet"):
        write_report(run)
    for step in range(3):
        run.log(step, {"loss/train": 3.0 - step, "loss/validation": float("nan"), "lr": 1e-3})
    write_report(run)
    figures = figures_of(run)
    assert set(figures) == {"loss", "lr"}
    assert figures["loss"]["data"][0]["y"] == [3, 2, 1]


# ---- fine-tuning


def scored_run(folder, reward: str, before: CrystalBatch, after: CrystalBatch) -> RunFolder:
    """A run folder as fine-tuning leaves it, of crystals that a reward really scored, one metrics row per half."""
    run = RunFolder.create("finetune", config=FinetuneConfig(reward=reward), root=folder)
    score = build_reward(reward, context=RewardContext(device=torch.device("cpu")))
    for step, (name, crystals) in enumerate((("before", before), ("after", after)), 1):
        result = score(crystals)
        terms = {name: torch.as_tensor(values) for name, values in result.terms.items()}
        known = {"reward": torch.as_tensor(result.total), "valid": torch.ones(len(crystals)).double(), **terms}
        crystals = replace(crystals, properties=known)
        write_crystals(run.path / f"{name}.h5", crystals, columns={"status": result.status})
        steps = torch.full((len(crystals),), float(step), dtype=torch.float64)
        rows = replace(crystals, properties={**known, "step": steps})
        append_crystals(run.path / "rollouts.h5", rows, columns={"status": result.status})
        means = {f"reward/{term}": float(np.nanmean(result.terms[term])) for term in result.terms}
        run.log(step, {"reward/mean": 1e6 * step, "valid": 0.125, "unique": 0.375, "kl": 2.0 * step, **means})
    return run


def test_the_first_reward_of_the_readme_has_its_pareto_plot(tmp_path):
    """The two quantities are parts of one term, and the report says of them what progress plots do."""
    crystals = load_dataset("prototypes")
    oxides = crystals[((crystals.species == 8).any(1) & (crystals.num_sites <= 4)).numpy()][:24]
    run = scored_run(tmp_path, "dielectric_bandgap", oxides[:12], oxides[12:])
    monitor.plot(run)
    write_report(run)
    assert (run.path / "pareto.png").stat().st_size > 5000
    assert (run.path / "plots" / "pareto.svg").exists()
    drawn = figures_of(run)["pareto"]["data"]
    for traces, name in ((drawn[:2], "before.h5"), (drawn[2:], "after.h5")):
        columns = read_columns(run.path / name)
        gap, eps = (columns[f"dielectric_bandgap/{part}"] for part in ("band_gap", "dielectric"))
        assert traces[0]["x"] == pytest.approx(gap)
        assert traces[0]["y"] == pytest.approx(eps)
        assert traces[1]["x"] == pytest.approx(gap[pareto_front(gap, eps)])


def test_quantities_of_a_reward():
    terms = ["dielectric_bandgap", *(f"dielectric_bandgap/{part}" for part in ("spread", "band_gap", "dielectric"))]
    assert quantities(terms) == ["dielectric_bandgap/band_gap", "dielectric_bandgap/dielectric"]
    assert quantities(["band_gap", "band_gap/spread", "ehull"]) == ["band_gap", "ehull"]


@pytest.mark.parametrize(
    ("reward", "signs"),
    [
        (lambda gap, hull: gap - hull, (1, -1)),
        (lambda gap, hull: gap * hull, (1, 1)),
        (lambda gap, hull: -gap - 3 * hull, (-1, -1)),
        (lambda gap, hull: -abs(gap - 1.5), None),  # a target: neither more nor less is better
    ],
)
def test_a_front_goes_the_way_of_the_reward(reward, signs):
    rng = np.random.default_rng(0)
    gap, hull = rng.uniform(0, 3, (2, 200))
    columns = {"band_gap": gap, "ehull": hull, "reward": reward(gap, hull)}
    (figure,) = pareto({"before": columns, "after": columns}, ["band_gap", "ehull"])
    fronts = [series for series in figure.series if series.kind == "line"]
    if signs is None:
        assert fronts == []
        assert figure.note == ""
        return
    points = np.stack([signs[0] * gap, signs[1] * hull], 1)
    best = [i for i, p in enumerate(points) if not ((points >= p).all(1) & (points > p).any(1)).any()]
    assert sorted(fronts[0].x) == sorted(gap[best])
    assert f"{'more' if signs[0] > 0 else 'less'} band gap" in figure.note


def test_no_front_of_one_quantity():
    columns = {"density": np.arange(3.0), "reward": np.arange(3.0)}
    assert pareto({"before": columns, "after": columns}, ["density"]) == []


def test_headline_is_of_fresh_crystals_not_of_single_batches(tmp_path):
    crystals = load_dataset("prototypes")[:40]
    repeated = crystals[[*range(20), *range(20)]]
    run = scored_run(tmp_path, "density", crystals, repeated)
    before, after = (float(c.densities().double().mean()) for c in (crystals, repeated))
    text = write_report(run).read_text(encoding="utf-8")
    tiles = dict((name, value) for value, name in re.findall(r'<div class="tile"><b>(.*?)</b><span>(.*?)</span>', text))
    unique = len(set(fingerprints(crystals))) / 40, len(set(fingerprints(repeated))) / 40
    assert tiles["mean reward, fresh crystals"] == f"{number_text(before)} → {number_text(after)}"
    cells = re.findall(r'data-value="(.*?)"', text.partition("<tbody>")[2].partition("</tbody>")[0])
    shares = {cells[i]: [float(value) for value in cells[i + 1 : i + 4]] for i in range(0, len(cells), 4)}
    assert shares["valid"] == [100, 100, 0]
    assert shares["unique"] == [
        round(100 * unique[0], 1),
        round(100 * unique[1], 1),
        round(100 * (unique[1] - unique[0]), 1),
    ]
    for name in ("before.h5", "after.h5"):
        (run.path / name).unlink()
    text = write_report(run).read_text(encoding="utf-8")
    assert f"{number_text(1e6)} → {number_text(2e6)}" in text  # of the steps, where there is nothing better


def test_the_best_crystals_are_not_one_element_eight_times(tmp_path, capsys):
    sites = [("Im-3m", [0, 0, 0]), ("Fm-3m", [0, 0, 0]), ("Pm-3m", [0, 0, 0]), ("Fd-3m", [0, 0, 0])]
    lithium = [Structure.from_spacegroup(g, Lattice.cubic(4 + i), ["Li"], [x]) for i, (g, x) in enumerate(sites)]
    crystals = CrystalBatch.cat([CrystalBatch.from_structures(lithium), load_dataset("prototypes")[:30]])
    run = scored_run(tmp_path, "0 - density", crystals, crystals)
    monitor.summarise(run)
    shown = capsys.readouterr().out.partition("Best crystals")[2].splitlines()
    assert sum(line.split()[:1] == ["Li"] for line in shown) == 1
    assert write_report(run).read_text(encoding="utf-8").count("<h3>Li</h3>") == 1


# ---- verdicts


def verdict_of(run: RunFolder) -> str:
    text = (run.path / "report.html").read_text(encoding="utf-8")
    return re.search(r'<p class="verdict">(.*?)</p>', text).group(1)


def test_every_report_says_what_it_comes_to(reports):
    assert "mean reward" in verdict_of(reports["finetune"])
    result = json.loads((reports["retrieve"].path / "retrieval.json").read_text(encoding="utf-8"))
    assert html.unescape(verdict_of(reports["retrieve"])) == retrieve_report.verdict(result)[0]
    screened = reports["screen"]
    candidates = int(read_columns(screened.path / "screen.h5")["candidate"].sum())
    assert verdict_of(screened).startswith(f"{candidates} of 12 crystals are candidates")


def with_rewards(values: np.ndarray) -> CrystalBatch:
    crystals = load_dataset("prototypes")[: len(values)]
    values = torch.as_tensor(values)
    return replace(crystals, properties={"reward": values, "density": values, "valid": torch.ones(len(values))})


def test_a_gain_is_told_from_chance():
    rng = np.random.default_rng(0)
    before = rng.normal(size=60)
    for after, said in (
        (before + 1, "Tuning raised the mean reward from"),
        (before - 1, "Tuning lowered the mean reward from"),
        (rng.permutation(before), "No gain beyond chance"),
        (np.full(60, np.nan), "Too few"),
    ):
        text = finetune_report.verdict({"before": with_rewards(before), "after": with_rewards(after)}, ["density"], 2.5)
        assert text.startswith(said)
        assert ("at a KL of 2.5 nats" in text) == (said != "Too few")


def test_a_ranking_is_told_from_chance():
    rng = np.random.default_rng(0)
    good = rng.permutation(np.arange(1000) < 50)

    def told(scores: np.ndarray) -> tuple[str, bool]:
        verdicts = [asdict(rate_ranking("likelihood ratio", scores, good))]
        result = {"verdicts": verdicts, "property": "-e_above_hull", "correlation": {"crystals": 0}}
        return retrieve_report.verdict(json.loads(json.dumps(result)))

    noise = [told(rng.normal(size=1000)) for _ in range(200)]
    assert sum(text.startswith("The ranking is no better than chance") for text, _ in noise) >= 180
    assert sum(right for _, right in noise) <= 20
    found, right = told(good + 0.1 * rng.normal(size=1000))
    assert right
    assert found.startswith(
        "The ranking finds what was asked for: 50 of its first 100 are among the 50 (5%) with the lowest"
    )
    assert "where chance gives 5 (p < 0.001), 10 times chance" in found
    worse, right = told(rng.normal(size=1000) - 2 * good)
    assert worse.startswith("The ranking is worse than chance")
    assert right is False


def test_a_ranking_without_labels_is_held_against_the_reward():
    for rho, said in ((0.3, "follows"), (-0.3, "runs against"), (0.05, "is no better than chance")):
        text, right = retrieve_report.verdict({"correlation": {"all": rho, "crystals": 200}, "property": ""})
        assert said in text
        assert right is (rho == 0.3)
    nothing = {"correlation": {"all": None, "within": None, "crystals": 0}, "property": ""}
    text, right = retrieve_report.verdict(nothing)
    assert "cannot be said" in text
    assert right is None


def test_a_screening_says_how_many_of_how_many():
    counts = {
        "all": 40,
        "valid": 38,
        "unique": 30,
        "within 0.1 eV/atom": 12,
        "unflagged": 9,
        "candidates": 9,
        "stable": 2,
    }
    text = screen_report.verdict(counts, 9, 3, "band_gap > 1")
    assert text.startswith(
        "9 of 40 crystals (22%) are candidates for a DFT calculation: valid, unique, within 0.1 eV/atom"
    )
    assert text.endswith(
        "unflagged, band_gap > 1; 2 of them are on the hull or below it; 3 more are held back by flags."
    )
    assert screen_report.verdict({"all": 5, "valid": 0}, 0, 0).startswith("None of 5 crystals is a candidate")


# ---- parts


def test_a_link_yields_the_crystal(reports):
    """What a browser would save under the CIF link of a card, read by pymatgen."""
    text = (reports["retrieve"].path / "report.html").read_text(encoding="utf-8")
    shown = read_crystals(reports["retrieve"].path / "retrieved.h5")[:12]
    links = re.findall(r'<a class="cif" href="data:chemical/x-cif,([^"]*)" download="([^"]*)\.cif">', text)
    assert len(links) == 12
    for (cif, name), formula, structure in zip(links, shown.formulas(), shown.to_structures(), strict=True):
        assert name.startswith(formula)
        assert "_symmetry_equiv_pos_as_xyz" in unquote(cif)
        assert StructureMatcher().fit(Structure.from_str(unquote(cif), fmt="cif"), structure)
    assert cif_links(CrystalBatch.empty()) == []


def test_scene_of_rock_salt():
    """Conventional cell with all its faces: 27 atoms, 54 nearest-neighbour bonds, 12 edges."""
    salt = CrystalBatch(
        torch.tensor([225]),
        torch.tensor([[1, 2]]),
        torch.tensor([[11, 17]]),
        torch.tensor([[[0.0, 0, 0], [0.5, 0.5, 0.5]]]),
        torch.tensor([[5.64, 5.64, 5.64, 90, 90, 90]]),
    )
    drawn = scene(salt)
    assert sorted(atom[0] for atom in drawn["atoms"]) == ["Cl"] * 13 + ["Na"] * 14
    assert len(drawn["bonds"]) == 54
    points = np.array([atom[1:] for atom in drawn["atoms"]])
    assert np.linalg.norm(points[[i for i, _ in drawn["bonds"]]] - points[[j for _, j in drawn["bonds"]]], axis=1) == (
        pytest.approx(2.82, abs=1e-3)
    )
    assert [np.linalg.norm(np.subtract(*edge)) for edge in drawn["box"]] == pytest.approx([5.64] * 12)


def test_periodic_table_has_one_place_for_each_element():
    known = {
        1: (1, 1),
        2: (18, 1),
        5: (13, 2),
        13: (13, 3),
        21: (3, 4),
        57: (3, 8.4),
        72: (4, 6),
        104: (4, 7),
        118: (18, 7),
    }
    assert {z: place(z) for z in known} == known
    assert len({place(z) for z in range(1, 119)}) == 118
    table = PeriodicTable("t", "", {8: 2.0, 26: -1.0}, "", diverging=True).to_plotly()
    colored = table["data"][1]
    assert colored["text"] == ["O", "Fe"]
    assert colored["marker"]["color"] == [2.0, -1.0]
    assert (colored["marker"]["cmin"], colored["marker"]["cmax"]) == (-2.0, 2.0)


def test_pareto_front_against_all_pairs():
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 12, 50).astype(float), rng.integers(0, 12, 50).astype(float)
    x[:3] = np.nan
    points = [(a, b) for a, b in zip(x, y, strict=True) if np.isfinite(a)]
    best = {p for p in points if not any(q[0] >= p[0] and q[1] >= p[1] and q != p for q in points)}
    rows = pareto_front(x, y)
    assert {(x[row], y[row]) for row in rows} == best
    assert len(pareto_front(np.full(2, np.nan), np.ones(2))) == 0


def test_histograms_share_bins_and_count_everyone():
    rng = np.random.default_rng(0)
    figure = histogram("h", "", "", {"a": np.append(rng.normal(size=500), [np.nan, 1e9]), "b": rng.normal(size=50)})
    first, second = figure.series
    assert (first.x == second.x).all()
    assert sum(first.y) == pytest.approx(1)
    assert "501" in first.name
    assert histogram("h", "", "", {"a": np.array([np.nan])}) is None


def test_nan_becomes_a_gap():
    figure = Figure("f", "", "", "", [Series([0, 1, 2], np.array([1.0, np.nan, np.inf]))])
    assert figure.to_plotly()["data"][0]["y"] == [1.0, None, None]


def test_text_of_strangers_is_text():
    page = Page(HOSTILE, "", {"command": HOSTILE})
    page.table({"id": [HOSTILE], "formula": [HOSTILE], HOSTILE: [1.0]})
    assert HOSTILE not in page.html()


def test_formulas_and_space_groups():
    assert subscripts("Ca3(PO4)2") == "Ca<sub>3</sub>(PO<sub>4</sub>)<sub>2</sub>"
    assert space_group_symbol(14) == "P2<sub>1</sub>/c"
    assert space_group_symbol(225) == "Fm3\N{COMBINING OVERLINE}m"
