"""The page of `nst lineage --html` in a real browser: 500 artifacts, and a run with real images."""

import itertools
import re
from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, Locator, Page, expect

from storage.lineage import Lineage, read_lineage
from storage.objects import Store
from storage.runs import set_ref
from tasks.inspection.lineage_page import PageLimits, write_page
from tests.flows.browser import open_browser
from tests.lineage_stores import experiments, publish
from tests.tasks.report_runs import HOSTILE, RunBuilder, each_iteration

WIDE, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}
NUM_ARTIFACTS = 500
SELECTION = {"min_confidence": 0.6, "images_per_class": 15, "on_empty_class": "skip"}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with open_browser() as found:
        yield found


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunBuilder:
    """A run of two iterations with real images, of classes with hostile names; its selections have refs."""
    run = each_iteration(tmp_path_factory.mktemp("run") / "store")
    run.add_labels(2, "1/student")
    run.add_selection(2, {**SELECTION, "min_confidence": 0.7})
    run.add_model("2/student", 0.81, roles={"selection": "2/select"})
    for name, manifest in run.inputs.items():
        set_ref(run.store, f"animals/{name}", manifest.kind, manifest.key)
    return run


@pytest.fixture(scope="module")
def run_page(run: RunBuilder, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of the first iteration's selection."""
    file = tmp_path_factory.mktemp("page") / "run.html"
    write_page(run.store, read_lineage(run.store), run.inputs["1/select"].key, PageLimits(samples=16), file)
    return file.as_uri()


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Lineage:
    """More than 500 artifacts, most of them made from the same data sets."""
    store = Store(str(tmp_path_factory.mktemp("large") / "store"))
    for name, stages in experiments(NUM_ARTIFACTS + 20):
        publish(store, name, stages)
    return read_lineage(store)


@pytest.fixture(scope="module")
def large_page(large: Lineage, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of 500 artifacts around a selection."""
    file = tmp_path_factory.mktemp("page") / "large.html"
    key = next(key for key, node in large.nodes.items() if node.name == "birds-0002/1/select")
    data = next(iter(large.nodes[key].inputs.values()))
    shown, total = write_page(Store("/nowhere"), large, data, PageLimits(NUM_ARTIFACTS, 0, 0), file)
    assert shown == NUM_ARTIFACTS < total
    return file.as_uri()


class Window:
    """A page in a window of its own, with what went wrong in it and what it asked for."""

    def __init__(self, browser: Browser, url: str, **options: Any) -> None:
        self.page: Page = browser.new_page(**{"viewport": WIDE, **options})
        self.page.set_default_timeout(15_000)
        self.errors: list[str] = []
        self.requests: list[str] = []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda said: self.errors.append(said.text) if said.type == "error" else None)
        self.page.on("dialog", lambda dialog: self.errors.append(f"dialog: {dialog.message}"))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(url)

    @property
    def panel(self) -> Locator:
        return self.page.locator("#panel")

    @property
    def title(self) -> Locator:
        return self.page.locator("#panel-title")

    def box(self, name: str) -> Locator:
        """The box of the artifact of that name."""
        return self.page.locator(f'#nodes .node[aria-label^="{name},"]')

    def open(self, name: str) -> None:
        """Click on an artifact's box, wherever it is."""
        self.page.get_by_role("button", name="All", exact=True).click()
        self.box(name).click()
        expect(self.title).to_have_text(name)

    @property
    def focused(self) -> str:
        """The name of the box that has the focus."""
        label = self.page.evaluate("document.activeElement.getAttribute('aria-label') || ''")
        return str(label).partition(",")[0]

    @property
    def view(self) -> list[float]:
        """x, y, scale."""
        found = self.page.locator("#world").get_attribute("transform") or ""
        return [float(number) for number in re.findall(r"-?[\d.]+(?:e-?\d+)?", found)]

    def section(self, title: str) -> Locator:
        """A section of the panel by its heading."""
        return self.panel.locator("section").filter(has=self.page.locator("h3", has_text=re.compile(f"^{title}")))

    def column(self, place: int) -> list[str]:
        """The cells of a column of the class table."""
        return self.section("Classes").locator(f"tbody tr > :nth-child({place})").all_inner_texts()


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Any]:
    """Opens windows; at the end no script has failed and nothing but the page itself was asked for."""
    windows: list[Window] = []

    def act(url: str, **options: Any) -> Window:
        windows.append(Window(browser, url, **options))
        return windows[-1]

    yield act
    for window in windows:
        assert window.errors == []
        assert [url for url in window.requests if not url.startswith("data:")] == [window.page.url.partition("#")[0]]
        window.page.close()


def test_five_hundred_artifacts_are_drawn_in_layers_and_none_covers_another(open_page: Any, large_page: str) -> None:
    page = open_page(large_page).page
    places = page.evaluate(
        "[...document.querySelectorAll('#nodes .node')].map(n => n.transform.baseVal[0].matrix).map(m => [m.e, m.f])"
    )
    assert len(places) == NUM_ARTIFACTS
    columns: dict[float, list[float]] = {}
    for x, y in places:
        columns.setdefault(x, []).append(y)
    assert len(columns) > 10
    for own in columns.values():
        own.sort()
        assert all(b - a >= 70 for a, b in itertools.pairwise(own))
    edges = page.locator("#edges path").evaluate_all(
        "all => all.map(e => e.getAttribute('d').match(/-?[\\d.]+/g).map(Number))"
    )
    assert len(edges) > NUM_ARTIFACTS
    assert all(numbers[0] < numbers[-2] for numbers in edges)


def test_the_graph_is_panned_and_zoomed_by_mouse_buttons_and_keys(open_page: Any, large_page: str) -> None:
    window = open_page(large_page)
    x, y, scale = window.view
    window.page.mouse.move(600, 400)
    window.page.mouse.wheel(0, -300)
    assert window.view[2] > scale
    x, y, scale = window.view
    window.page.mouse.down()
    window.page.mouse.move(500, 450, steps=4)
    window.page.mouse.up()
    assert window.view == pytest.approx([x - 100, y + 50, scale], abs=1)
    expect(window.panel).to_be_hidden()
    window.page.get_by_role("button", name="All", exact=True).click()
    assert window.view[2] < 0.4
    box = window.page.locator("#nodes").bounding_box()
    graph = window.page.locator("#graph").bounding_box()
    assert box["x"] >= graph["x"] - 1
    assert box["x"] + box["width"] <= graph["x"] + graph["width"] + 1
    window.page.get_by_role("button", name=re.compile("^Home")).click()
    assert window.view[2] == 1
    window.page.keyboard.press("-")
    assert window.view[2] == pytest.approx(0.8)


def test_arrow_keys_follow_the_edges_enter_opens_and_escape_comes_back(open_page: Any, run_page: str) -> None:
    window = open_page(run_page)
    window.page.locator("#nodes .node[tabindex='0']").focus()
    assert window.focused == "animals/1/select"
    window.page.keyboard.press("ArrowLeft")
    assert window.focused == "animals/1/label"
    window.page.keyboard.press("ArrowRight")
    assert window.focused == "animals/1/select"
    window.page.keyboard.press("ArrowRight")
    assert window.focused == "animals/1/student"
    window.page.keyboard.press("Enter")
    expect(window.title).to_have_text("animals/1/student")
    assert window.page.evaluate("document.activeElement.id") == "panel"
    window.page.keyboard.press("Escape")
    expect(window.panel).to_be_hidden()
    assert window.focused == "animals/1/student"
    assert window.page.locator("#nodes .node[tabindex='0']").count() == 1


def test_search_is_a_key_away_and_says_what_it_found(open_page: Any, large_page: str) -> None:
    window = open_page(large_page)
    window.page.keyboard.press("/")
    window.page.keyboard.type("birds-0003 select")
    expect(window.page.get_by_role("status").first).to_have_text(f"3 of {NUM_ARTIFACTS} artifacts, 0 images found")
    assert window.page.locator("#nodes .node.found").count() == 3
    window.page.keyboard.press("ArrowDown")
    window.page.keyboard.press("ArrowDown")
    window.page.keyboard.press("Enter")
    expect(window.title).to_have_text("birds-0003/2/select")
    expect(window.page.locator("#results")).to_be_hidden()
    window.page.keyboard.press("/")
    window.page.keyboard.press("Escape")
    assert window.page.locator("#graph.searched").count() == 0


def test_an_artifact_shows_manifest_numbers_settings_figures_and_the_difference_to_its_predecessor(
    open_page: Any, run: RunBuilder, run_page: str
) -> None:
    window = open_page(run_page)
    window.open("animals/2/select")
    metrics = run.inputs["2/select"].metrics
    expect(window.section("Numbers").get_by_role("row", name=re.compile(f"^kept {metrics['kept']}$"))).to_be_visible()
    change = window.section("Difference")
    expect(change).to_contain_text("animals/1/select")
    expect(change.get_by_role("row", name="setting min_confidence 0.6 0.7")).to_be_visible()
    expect(window.section("Settings").get_by_role("row", name="min_confidence 0.7")).to_be_visible()
    charts = window.section("Figures").locator("img")
    assert charts.count() == 2
    assert all(charts.nth(n).evaluate("image => image.naturalWidth > 400 && image.alt.length > 40") for n in range(2))
    window.panel.get_by_text("Manifest").click()
    expect(window.panel.locator("pre")).to_contain_text(f'"key": "{run.inputs["2/select"].key}"')
    window.section("Made from").get_by_role("button", name="animals/2/label").click()
    expect(window.title).to_have_text("animals/2/label")
    window.panel.get_by_role("button", name="Back").click()
    expect(window.title).to_have_text("animals/2/select")
    assert window.page.url.endswith(f"#{run.inputs['2/select'].key}")


def test_what_an_opened_artifact_is_made_from_and_what_is_made_of_it_lights_up(
    open_page: Any, run: RunBuilder, run_page: str
) -> None:
    window = open_page(run_page)
    window.open("animals/1/student")
    near = window.page.locator("#nodes .node.near").evaluate_all("boxes => boxes.map(box => box.dataset.key)")
    assert set(near) == read_lineage(run.store).around(run.inputs["1/student"].key)


def test_the_class_table_is_sorted_and_filtered(open_page: Any, run: RunBuilder, run_page: str) -> None:
    window = open_page(f"{run_page}#{run.inputs['1/select'].key}")
    expect(window.title).to_have_text("animals/1/select")
    classes = window.section("Classes")
    assert window.column(1) == list(HOSTILE)
    names = classes.locator("thead th").all_inner_texts()
    kept = run.inputs["1/select"].metrics["per_class"]["kept"]
    place = names.index("kept") + 1
    classes.get_by_role("button", name="kept", exact=True).click()
    assert window.column(place) == [str(number) for number in sorted(kept, reverse=True)]
    assert classes.locator("th[aria-sort='descending']").inner_text() == "kept"
    classes.get_by_role("button", name="kept", exact=True).click()
    assert window.column(place) == [str(number) for number in sorted(kept)]
    classes.get_by_label("Only classes whose name has").fill("DOG")
    assert window.column(1) == [HOSTILE[1]]
    classes.get_by_label("Only classes whose name has").fill("")
    classes.get_by_label("Column of the least value").select_option("kept")
    classes.get_by_label("Least value", exact=True).fill(str(max(kept)))
    expect(classes.get_by_role("status")).to_have_text(f"{kept.count(max(kept))} of 3 classes")


def test_an_images_biography_is_found_by_its_key_with_what_each_selection_made_of_it(
    open_page: Any, run: RunBuilder, run_page: str
) -> None:
    window = open_page(run_page)
    window.open("animals/1/select")
    tiles = window.section("Images").locator("button")
    assert tiles.count() == 16
    key = tiles.first.get_attribute("data-image")
    window.page.keyboard.press("Escape")
    window.page.keyboard.press("/")
    window.page.keyboard.type(key)
    window.page.keyboard.press("Enter")
    expect(window.title).to_have_text(f"Image {key}")
    rows = window.section("Biography").locator(".fate").all_inner_texts()
    expected = [next(row for row in run.decisions(n) if row["key"] == key) for n in (1, 2)]
    assert len(rows) == 2
    for number, (text, row) in enumerate(zip(rows, expected, strict=True), 1):
        teacher = "animals/0/teacher" if number == 1 else "animals/1/student"
        for words in (f"animals/{number}/select", teacher, HOSTILE[row["label"]], f"{row['confidence']:.4f}"):
            assert words in text
        assert ("kept" in text and "trained on by" in text) == (row["copies"] > 0)
        assert f"animals/{number}/student" in text
    expect(window.panel).to_contain_text(f"nst sample {key}")
    assert window.panel.locator("img.portrait").evaluate("image => image.naturalWidth") == 8


def test_names_are_text_and_never_run(open_page: Any, run: RunBuilder, run_page: str) -> None:
    window = open_page(f"{run_page}#{run.inputs['1/select'].key}")
    expect(window.section("Classes")).to_contain_text("<script>alert(1)</script>")
    assert window.page.locator("script").count() == 2


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_ground_in_both_color_schemes(
    open_page: Any, run: RunBuilder, run_page: str, scheme: str
) -> None:
    """WCAG's contrast of 4.5 for every piece of text of the panel, the tools and the list."""
    window = open_page(f"{run_page}#{run.inputs['1/select'].key}", color_scheme=scheme)
    expect(window.title).to_be_visible()
    for view in ("Graph", "List"):
        window.page.get_by_role("button", name=view, exact=True).click()
        assert window.page.evaluate(CONTRASTS) == []
    ground = window.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", ground))) < 200) == (scheme == "dark")


CONTRASTS = """() => {
  const channels = color => color.match(/[\\d.]+/g).map(Number);
  const light = color => channels(color).slice(0, 3).map(c => c / 255)
    .map(c => c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4).reduce((sum, c, n) => sum + c * [.2126, .7152, .0722][n], 0);
  const ground = element => {
    for (let here = element; here; here = here.parentElement) {
      const color = getComputedStyle(here).backgroundColor;
      if (!/^rgba\\(.*, 0\\)$/.test(color)) return color;
    }
    return "rgb(255, 255, 255)";
  };
  const poor = new Set();
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some(node => node.nodeType === 3 && node.textContent.trim());
    if (!own || element.closest("svg, script, .hidden") || !element.checkVisibility()) continue;
    const [a, b] = [light(getComputedStyle(element).color), light(ground(element))].sort((x, y) => y - x);
    const ratio = (a + .05) / (b + .05);
    if (ratio < 4.5) poor.add(`${element.tagName} ${element.className} ${ratio.toFixed(2)}`);
  }
  return [...poor];
}"""


def test_every_control_has_a_name_and_the_tab_key_reaches_tools_graph_and_panel(
    open_page: Any, run: RunBuilder, run_page: str
) -> None:
    window = open_page(f"{run_page}#{run.inputs['1/select'].key}")
    expect(window.title).to_be_visible()
    nameless = "elements => elements.filter(e => !(e.getAttribute('aria-label') || e.textContent.trim() || e.labels?.length)).length"
    assert window.page.locator("button, input, select, [role=button], [role=application]").evaluate_all(nameless) == 0
    assert window.page.locator("img:not([alt])").count() == 0
    expect(window.page.get_by_role("complementary", name="animals/1/select")).to_be_visible()
    window.page.locator("#search").focus()
    reached = set()
    for _ in range(25):
        window.page.keyboard.press("Tab")
        reached.add(window.page.evaluate("document.activeElement.closest('[id]')?.id"))
    assert {"as-graph", "zoom-in", "nodes", "panel"} <= reached


def test_on_a_phone_the_list_comes_first_and_nothing_is_wider_than_the_screen(
    open_page: Any, run: RunBuilder, run_page: str
) -> None:
    window = open_page(run_page, viewport=PHONE, has_touch=True, is_mobile=True)
    expect(window.page.locator("#graph")).to_be_hidden()
    entry = window.page.locator("#list").get_by_role("button", name="animals/1/select")
    entry.tap()
    expect(window.title).to_have_text("animals/1/select")
    wide = "() => document.documentElement.scrollWidth"
    assert window.page.evaluate(wide) <= PHONE["width"]
    box = window.panel.bounding_box()
    assert (box["x"], box["width"]) == (0, PHONE["width"])
    assert window.page.evaluate("() => document.querySelector('#list').inert")
    window.panel.get_by_role("button", name="Close").tap()
    expect(window.panel).to_be_hidden()
    window.page.get_by_role("button", name="Graph").tap()
    expect(window.page.locator("#graph")).to_be_visible()
    assert window.page.evaluate(wide) <= PHONE["width"]
    sizes = window.page.locator("#zoom-in, #as-list").evaluate_all(
        "all => all.map(e => e.getBoundingClientRect().height)"
    )
    assert min(sizes) >= 40


def test_without_scripts_the_list_of_artifacts_is_there(browser: Browser, run: RunBuilder, run_page: str) -> None:
    context = browser.new_context(java_script_enabled=False, viewport=WIDE)
    page = context.new_page()
    page.goto(run_page)
    listed = page.locator("#list li b").all_inner_texts()
    assert sorted(listed) == sorted(f"animals/{name}" for name in run.inputs)
    expect(page.get_by_text("need JavaScript")).to_be_visible()
    context.close()
