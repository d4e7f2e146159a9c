"""Reports: what stands in the files, and what a real browser makes of them (headless Chromium, where there is one)."""

import base64
import json
import re
import shutil
from dataclasses import replace
from io import BytesIO
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pymatgen.core import Lattice, Structure

from cfrl.commands.retrieve import retrieve
from cfrl.commands.screen import screen
from cfrl.config import FinetuneConfig, RetrieveConfig, ScreenConfig
from cfrl.crystals.crystal import CrystalBatch
from cfrl.crystals.fingerprint import fingerprints
from cfrl.errors import UserError
from cfrl.io.datasets import load_dataset
from cfrl.io.storage import append_crystals, read_columns, write_crystals
from cfrl.reports import monitor
from cfrl.reports.figures import Figure, PeriodicTable, Series, histogram, pareto, pareto_front, place
from cfrl.reports.page import Page, number_text, scene, space_group_symbol, subscripts
from cfrl.reports.report import newest_reportable, write_report
from cfrl.rewards import RewardContext, build_reward
from cfrl.runs.folder import RunFolder
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
    overflow = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert page.browser.execute_script(overflow) <= 0


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


@pytest.mark.parametrize(
    ("gap", "eps"),
    [("band_gap", "dielectric(kind=electronic)"), ("dielectric_bandgap(kind=total)/band_gap", "a/dielectric")],
)
def test_pareto_terms_are_found_by_their_names(gap, eps):
    columns = {"reward": np.zeros(3), "dielectric_bandgap": np.ones(3), gap: np.arange(3.0), eps: np.arange(2.0, 5)}
    figure = pareto({"before": columns, "after": columns})
    assert figure.series[0].x.tolist() == [0, 1, 2]
    assert figure.series[0].y.tolist() == [2, 3, 4]
    del columns[eps]
    assert pareto({"before": columns, "after": columns}) is None


def test_headline_is_of_fresh_crystals_not_of_single_batches(tmp_path):
    crystals = load_dataset("prototypes")[:40]
    repeated = crystals[[*range(20), *range(20)]]
    run = scored_run(tmp_path, "density", crystals, repeated)
    before, after = (float(c.densities().double().mean()) for c in (crystals, repeated))
    text = write_report(run).read_text(encoding="utf-8")
    tiles = dict((name, value) for value, name in re.findall(r'<div class="tile"><b>(.*?)</b><span>(.*?)</span>', text))
    unique = len(set(fingerprints(crystals))) / 40, len(set(fingerprints(repeated))) / 40
    assert tiles["mean reward, fresh crystals"] == f"{number_text(before)} → {number_text(after)}"
    assert tiles["unique, fresh crystals"] == f"{number_text(unique[0])} → {number_text(unique[1])}"
    assert tiles["valid, fresh crystals"] == "1 → 1"
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


# ---- parts


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
