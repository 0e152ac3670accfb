"""The page in a real browser: what pointing shows, what moves, what is asked for (nothing), at every
width, in light and dark, on paper. Skipped where there is no Chromium: apt-get install chromium."""

import base64
import json
import math
import re

import numpy as np
import pytest

from cli.browser import Browser, found_browser
from cli.logs import made_line, write_lines
from distclip.cli import main

STEPS, SPIKE, BAD = 2000, 812, 1500
LAYERS = [f"model.layers.{i}.weight" for i in range(30)]
EVIL = "</script><script>hacked=1</script><img src=x onerror=hacked=2>"


@pytest.fixture(scope="module")
def browser():
    if found_browser() is None:
        pytest.skip("no Chromium here: apt-get install chromium, or name one in DISTCLIP_BROWSER")
    browser = Browser()
    yield browser
    browser.close()


def norms_of(seed, steps=STEPS):
    return 0.7 * np.exp(0.2 * np.random.default_rng(seed).standard_normal(steps))


def run_lines(seed, spike=SPIKE, layers=LAYERS, note="shard 17"):
    draw = np.random.default_rng(100 + seed)
    for step, norm in enumerate(norms_of(seed).tolist(), 1):
        more = {}
        if step in (spike, BAD) or step % 50 == 0:
            own = draw.random(len(layers))
            own[11] = 60.0 if step == spike else own[11]
            more = {"layers": layers, "layer_norms": own.tolist()}
        if step == spike:
            norm = 60.0
            more |= {
                "notes": [{"rank": 3, "step": step, "note": note, "cut": False}],
                "outlier_rank": 3,
            }
        if step == BAD:
            norm = math.nan
            more["layer_norms"][5] = math.nan
            more["culprits"] = [
                {"parameter": layers[5], "rank": 1, "kind": "inf", "before": None, "after": None}
            ]
        yield made_line(step, norm, **more)


def made(folder, *runs):
    """The page of these runs: name → lines."""
    logs = [
        write_lines(folder / f"{i}.jsonl", lines, {"run": name})
        for i, (name, lines) in enumerate(runs)
    ]
    page = folder / "page.html"
    assert main(["report", *map(str, logs), "--output", str(page)]) == 0
    return page


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    return made(folder, ("first", run_lines(0)), ("second", run_lines(1, spike=400)))


def tip(browser):
    """What is shown beside the pointer: run, heading, and its facts."""
    return browser.js(
        """(() => {
        const tip = document.getElementById("tip");
        if (tip.hidden) return null;
        const facts = {};
        for (const name of tip.querySelectorAll("dl:not(.others) dt")) facts[name.textContent] = name.nextSibling.textContent;
        const others = {};
        for (const name of tip.querySelectorAll(".others dt")) others[name.textContent] = name.nextSibling.textContent;
        const head = tip.querySelector(".tip-head");
        return {run: head.textContent, heading: tip.querySelector("strong").textContent, facts, others};
    })()""".replace("textContent", "textContent.replaceAll('\\u00a0', ' ')")
    )


def window_of(browser):
    return browser.js(
        "[Number(document.getElementById('from').value), Number(document.getElementById('to').value)]"
    )


def place(browser, figure, step, share=0.5):
    """x and y in the window of a step on a figure, by its frame alone."""
    browser.js(f"document.getElementById('{figure}').scrollIntoView({{block: 'center'}})")
    browser.settle()
    low, high = window_of(browser)
    x, y, width, height = browser.box(f"#plot-{figure} .u-over")
    return x + (step - low) / (high - low) * width, y + share * height


def point(browser, figure, step, share=0.5):
    x, y = place(browser, figure, step, share)
    browser.mouse("move", x, y - 1)
    browser.mouse("move", x, y)
    browser.settle()
    return tip(browser)


def only(browser, *names):
    """Switch these runs on and the others off, as a reader does."""
    for i, name in enumerate(
        browser.js("[...document.querySelectorAll('.runs label')].map(l => l.textContent)")
    ):
        if browser.js(f"document.getElementById('run-{i}').checked") != (name in names):
            browser.js(f"document.getElementById('run-{i}').click()")
    browser.settle()


def test_nothing_is_asked_for_and_nothing_goes_wrong(browser, two):
    browser.open(two)
    for figure in ("norm", "coefficient", "clip_rate", "layers-1"):
        point(browser, figure, 500)
    browser.js("document.querySelectorAll('button').forEach(button => button.click())")
    browser.js("document.querySelectorAll('summary').forEach(summary => summary.click())")
    browser.settle()
    assert browser.requests == [two.as_uri()] and browser.problems == []
    assert (
        browser.js("fetch('https://example.com').then(() => 'asked', () => 'refused')") == "refused"
    )
    browser.requests.clear()
    browser.problems.clear()


def test_pointing_at_a_spike_shows_its_numbers(browser, two):
    browser.open(two)
    shown = point(browser, "norm", SPIKE, 0.02)
    assert (shown["run"], shown["heading"]) == ("first", "step 812, clipped")
    median = np.median(norms_of(0)[SPIKE - 51 : SPIKE + 50])
    draw = np.random.default_rng(100)
    for _ in range(SPIKE // 50):
        draw.random(30)
    layers = draw.random(30)
    layers[11] = 60.0
    share = 3600 / (layers**2).sum()
    assert shown["facts"] == {
        "norm": "60", "× running median": f"{60 / median:.3g}", "threshold": "1", "coefficient": f"{1 / 60:.5g}",
        "largest part": f"model.layers.11.weight, {100 * share:.1f} %", "clip rate": "25 %",
    }  # fmt: skip
    assert shown["others"] == {"second": f"{norms_of(1)[SPIKE - 1]:.5g}"}
    assert point(browser, "norm", 400, 0.02)["run"] == "second", "the one that is nearest"
    shown = point(browser, "norm", BAD, 0.02)
    assert shown["heading"] == f"step {BAD:,}, skipped" and shown["facts"]["norm"] == "not finite"
    assert shown["facts"]["largest part"] == "model.layers.5.weight, not finite"


@pytest.mark.parametrize("figure", ["norm", "coefficient", "clip_rate"])
def test_every_step_can_be_pointed_at_once_it_has_a_pixel(browser, two, figure):
    browser.open(two)
    only(browser, "first")
    browser.js(
        "document.getElementById('from').value = 1000; document.getElementById('to').value = 1040"
    )
    browser.js("document.getElementById('to').dispatchEvent(new Event('change'))")
    browser.settle()
    assert window_of(browser) == [1000, 1040]
    norms = norms_of(0)
    for step in (1003, 1017, 1038):
        shown = point(browser, figure, step)
        assert shown["heading"].startswith(f"step {step:,}") and shown["run"] == "first"
        assert shown["facts"]["norm"] == f"{norms[step - 1]:.5g}"
        assert shown["facts"]["coefficient"] == f"{min(1, 1 / norms[step - 1]):.5g}"
        cross, dot = browser.box(f"#plot-{figure} .cross"), browser.box(f"#plot-{figure} .dot")
        assert abs(cross[0] - place(browser, figure, step)[0]) < 1.5
        assert abs(dot[0] + dot[2] / 2 - cross[0]) < 1.5, "the point is marked"


def test_zoom_and_pan_are_linked_over_all_figures(browser, two):
    browser.open(two)
    assert window_of(browser) == [1, 2000]
    left, y = place(browser, "coefficient", 500)
    right, _ = place(browser, "coefficient", 1000)
    browser.drag(left, right, y)
    low, high = window_of(browser)
    assert abs(low - 500) < 5 and abs(high - 1000) < 5
    for figure in ("norm", "clip_rate", "layers-1", "layers-2"):
        for step in (520, 980):
            shown = point(browser, figure, step)
            first = int(re.search(r"[\d,]+", shown["heading"])[0].replace(",", ""))
            assert abs(first - step) < (40 if figure.startswith("layers") else 5), figure
    here, y = place(browser, "norm", 700)
    browser.drag(here, here - (right - left) / 2, y, modifiers=8)  # Shift
    moved = window_of(browser)
    assert moved[0] > low + 50 and abs((moved[1] - moved[0]) - (high - low)) <= 2
    x, y = place(browser, "norm", sum(moved) / 2)
    browser.mouse("wheel", x, y, deltaX=0, deltaY=-300, modifiers=2)  # Ctrl
    browser.settle()
    closer = window_of(browser)
    assert closer[1] - closer[0] < 0.7 * (moved[1] - moved[0])
    browser.mouse("wheel", x, y, deltaX=0, deltaY=120)
    browser.settle()
    assert window_of(browser) == closer, "the wheel alone scrolls the page"
    for count in (1, 2):
        browser.send(
            "Input.dispatchMouseEvent",
            type="mousePressed",
            x=x,
            y=y,
            button="left",
            buttons=1,
            clickCount=count,
        )
        browser.send(
            "Input.dispatchMouseEvent",
            type="mouseReleased",
            x=x,
            y=y,
            button="left",
            clickCount=count,
        )
    browser.settle()
    assert window_of(browser) == [1, 2000]


def test_a_row_of_the_table_moves_the_figures_there(browser, two):
    browser.open(two)
    only(browser, "second")
    browser.js("scrollTo(0, 1e6)")
    rows = browser.js("[...document.querySelectorAll('.steps tbody tr')].map(row => row.innerText)")
    assert (
        rows[0].startswith("812\t60\t")
        and "rank 3: shard 17" in rows[0]
        and "model.layers.11.weight" in rows[0]
    )
    browser.js("document.querySelector('.steps tbody tr td').scrollIntoView()")
    browser.settle()
    x, y, width, height = browser.box(".steps tbody tr td")
    browser.click(x + width / 2, y + height / 2)
    browser.settle()
    low, high = window_of(browser)
    assert low < SPIKE < high and high - low <= 60
    assert browser.js("document.getElementById('run-0').checked"), "its run is on again"
    x, y, width, height = browser.box("#plot-norm")
    assert y >= 0 and y + height <= 900, "the figure is in the window"
    cross = browser.box("#plot-norm .cross")
    assert abs(cross[0] - place(browser, "norm", SPIKE)[0]) < 1.5
    browser.js(
        "[...document.querySelectorAll('.go')].find(go => go.textContent === '1,500').focus()"
    )
    browser.key("Enter", code="Enter", windowsVirtualKeyCode=13, text="\r")
    browser.settle()
    low, high = window_of(browser)
    assert low < BAD < high, "by the keyboard too, from the table of skipped steps"


def test_runs_are_switched_on_and_off(browser, two):
    browser.open(two)

    def has_colour(run):
        """Whether the norm's canvas has pixels of the run's own colour."""
        return browser.js(f"""(() => {{
            const hex = getComputedStyle(document.documentElement).getPropertyValue("--s{run}").trim();
            const [r, g, b] = [1, 3, 5].map(i => parseInt(hex.slice(i, i + 2), 16));
            const canvas = document.querySelector("#plot-norm canvas");
            const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
            for (let i = 0; i < data.length; i += 4)
                if (data[i + 3] > 250 && Math.abs(data[i] - r) + Math.abs(data[i + 1] - g) + Math.abs(data[i + 2] - b) < 12) return true;
            return false;
        }})()""")

    assert has_colour(0) and has_colour(1)
    only(browser, "second")
    assert not has_colour(0) and has_colour(1)
    assert point(browser, "norm", SPIKE, 0.02)["run"] == "second"
    only(browser)
    assert not has_colour(0) and not has_colour(1) and browser.problems == []
    browser.js(
        "[...document.querySelectorAll('fieldset button')].find(b => b.textContent === 'all').click()"
    )
    browser.settle()
    assert has_colour(0) and has_colour(1)


def test_a_step_that_is_not_finite_is_marked(browser, two):
    browser.open(two)
    only(browser, "second")
    where = browser.js(f"""(() => {{
        const over = document.querySelector("#plot-norm .u-over"), canvas = document.querySelector("#plot-norm canvas");
        const x = over.offsetLeft + ({BAD} - 1) / 1999 * over.clientWidth, y = over.offsetTop + 7;
        const data = canvas.getContext("2d").getImageData(x - 5, y - 5, 10, 10).data, out = [];
        for (let i = 0; i < 100; i++) if (data[4 * i + 3] > 200 && data[4 * i] > 150 && data[4 * i + 1] < 120) out.push([i % 10, Math.floor(i / 10)]);
        return out;
    }})()""")
    sides = {(x > 4, y > 4) for x, y in where}
    assert len(where) >= 10 and len(sides) == 4, "all four arms of the ×"


def test_axes_are_logarithmic_or_linear(browser, two):
    browser.open(two)
    only(browser, "first")

    def height_of(step, share):
        assert point(browser, "norm", step, share)["heading"].startswith(f"step {step:,}")
        dot, over = browser.box("#plot-norm .dot"), browser.box("#plot-norm .u-over")
        return 1 - (dot[1] + dot[3] / 2 - over[1]) / over[3]

    norms = norms_of(0)
    least = int(np.nanargmin(norms)) + 1
    spread = math.log(60 / norms.min()) / math.log(60 / norms.min() * 1.25**2)
    assert height_of(SPIKE, 0.02) - height_of(least, 0.98) == pytest.approx(spread, abs=0.02)
    browser.js(
        "(() => { const s = document.querySelector('#norm select'); s.value = 'linear'; s.dispatchEvent(new Event('change')); })()"
    )
    browser.settle()
    top = 60 + 0.06 * (60 - norms.min())
    assert height_of(SPIKE, 0.02) == pytest.approx(60 / top, abs=0.02)


def test_all_of_it_works_with_the_keyboard(browser, two):
    browser.open(two)
    browser.js("document.getElementById('to').focus()")
    for _ in range(4):  # the axis' choice lies before the figure
        if browser.js("document.activeElement.id") == "plot-norm":
            break
        browser.key("Tab", code="Tab", windowsVirtualKeyCode=9)
    assert browser.js("document.activeElement.id") == "plot-norm"
    assert browser.js("getComputedStyle(document.activeElement).outlineStyle") == "solid", "seen"
    first = tip(browser)
    assert first["run"] == "first" and first["heading"] == "step 812, clipped", (
        "it begins at the largest"
    )
    browser.key("ArrowDown")
    assert tip(browser)["run"] == "second"
    browser.key("ArrowUp")
    for _ in range(6):
        browser.key("+")
    low, high = window_of(browser)
    assert high - low < 40 and low < SPIKE < high
    browser.key("ArrowRight")
    assert tip(browser)["heading"].startswith("step 813")
    browser.key("ArrowLeft")
    browser.key("ArrowLeft")
    assert tip(browser)["heading"].startswith("step 811")
    browser.key("ArrowRight", modifiers=8)
    assert window_of(browser)[0] > low
    browser.key("0")
    assert window_of(browser) == [1, 2000]
    browser.key("Escape")
    assert tip(browser) is None


def touch(browser, kind, *points):
    points = [{"x": x, "y": y, "id": i} for i, (x, y) in enumerate(points)]
    browser.send("Input.dispatchTouchEvent", type=f"touch{kind}", touchPoints=points)
    browser.settle()


def test_fingers_move_and_zoom(browser, two):
    browser.open(two, 375)
    browser.send("Emulation.setTouchEmulationEnabled", enabled=True)
    try:
        only(browser, "first")
        x, y = place(browser, "norm", 1000)
        touch(browser, "Start", (x - 20, y), (x + 20, y))
        touch(browser, "Move", (x - 60, y), (x + 60, y))
        touch(browser, "End")
        low, high = window_of(browser)
        assert 500 < high - low < 900 and abs((low + high) / 2 - 1000) < 60
        touch(browser, "Start", (x, y))
        assert tip(browser)["run"] == "first"
        for by in (20, 40, 60):
            touch(browser, "Move", (x - by, y))
        touch(browser, "End")
        moved = window_of(browser)
        assert moved[0] > low + 50 and abs((moved[1] - moved[0]) - (high - low)) <= 2
        assert browser.problems == []
    finally:
        browser.send("Emulation.setTouchEmulationEnabled", enabled=False)


def test_a_heat_map_shows_the_layer_of_a_spike(browser, two):
    browser.open(two)
    rows = browser.js("JSON.parse(document.getElementById('data').textContent).heats[0]")
    shown = rows["byLargest"]
    row = shown.index(rows["names"].index("model.layers.11.weight"))
    found = point(browser, "layers-1", SPIKE, (row + 0.5) / len(shown))
    assert found["heading"] == "step 812" and found["run"] == "first"
    assert found["facts"]["layer"] == "model.layers.11.weight"
    assert float(found["facts"]["share"].split()[0]) > 99 - 0.5
    bad = shown.index(rows["names"].index("model.layers.5.weight"))
    assert (
        point(browser, "layers-1", BAD, (bad + 0.5) / len(shown))["facts"]["share"] == "not finite"
    )
    pixel = browser.js(f"""(() => {{
        const over = document.querySelector("#plot-layers-1 .u-over"), canvas = document.querySelector("#plot-layers-1 canvas");
        const scale = canvas.width / canvas.clientWidth;
        const x = (over.offsetLeft + ({SPIKE} - 1) / 1999 * over.clientWidth) * scale;
        const y = (over.offsetTop + {(row + 0.5) / len(shown)} * over.clientHeight) * scale;
        return [...canvas.getContext("2d").getImageData(x, y, 1, 1).data];
    }})()""")
    assert pixel[0] > 200 and pixel[1] > 200 and pixel[2] < 80, "as bright as it gets"
    browser.js(
        "(() => { const s = document.querySelector('#layers-1 select'); s.value = 'mean'; s.dispatchEvent(new Event('change')); })()"
    )
    browser.settle()
    assert len(rows["byMean"]) == 24 and rows["byMean"] != shown
    assert browser.problems == []


@pytest.fixture(scope="module")
def evil(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evil")
    layers = [EVIL, *LAYERS[1:]]
    layers[11] = EVIL + "11"
    policy = {"policy": EVIL, "launcher": EVIL, "device": EVIL, "versions": {EVIL: EVIL}}
    logs = [
        write_lines(
            folder / f"{i}.jsonl",
            run_lines(i, layers=layers, note=[EVIL]),
            {"run": EVIL + str(i), **policy},
        )
        for i in (0, 1)
    ]
    assert main(["report", *map(str, logs), "--output", str(folder / "page.html")]) == 0
    return folder / "page.html"


def test_no_script_comes_from_a_name(browser, evil):
    browser.open(evil)
    shown = point(browser, "norm", SPIKE, 0.02)
    assert shown["run"].startswith(EVIL) and EVIL in shown["facts"]["largest part"], "it is text"
    point(browser, "layers-1", SPIKE)
    browser.js("document.querySelectorAll('button, summary').forEach(one => one.click())")
    browser.settle()
    assert browser.js("typeof hacked") == "undefined"
    assert browser.js("document.querySelectorAll('img').length + document.scripts.length") == 3
    assert browser.requests == [evil.as_uri()] and browser.problems == []
    assert EVIL in browser.js("document.body.innerText")


WIDTHS = (375, 768, 1280, 1920)
CONTRASTS = """(() => {
    const parse = (text) => { const n = text.match(/[\\d.]+/g).map(Number); return n.length < 4 ? [...n, 1] : n; };
    const light = (c) => c.slice(0, 3).map(v => { v /= 255; return v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4; })
        .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
    const ratio = (a, b) => { const [x, y] = [light(a), light(b)].sort((p, q) => q - p); return (x + .05) / (y + .05); };
    const behind = (node) => { for (; node; node = node.parentElement) { const c = parse(getComputedStyle(node).backgroundColor); if (c[3] > .99) return c; } return null; };
    const out = [];
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
        const text = walker.currentNode.data.trim(), node = walker.currentNode.parentElement;
        if (!text || !node.checkVisibility() || ["SCRIPT", "STYLE", "OPTION"].includes(node.tagName)) continue;
        out.push([ratio(parse(getComputedStyle(node).color), behind(node)), text.slice(0, 40)]);
    }
    const root = getComputedStyle(document.documentElement), page = behind(document.body);
    const colour = (name) => { const h = root.getPropertyValue(name).trim(); return [1, 3, 5].map(i => parseInt(h.slice(i, i + 2), 16)); };
    for (const name of ["--ink", ...Array.from({length: 8}, (_, i) => `--s${i}`)]) out.push([ratio(colour(name), page), name]);
    return out;
})()"""


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_every_width_in_light_and_dark(browser, two, width, dark):
    browser.open(two, width, dark=dark)
    browser.js("document.querySelectorAll('details').forEach(one => one.open = true)")
    point(browser, "norm", SPIKE, 0.02)
    assert browser.js("document.documentElement.scrollWidth") == width, "nothing sticks out"
    boxes = browser.js(
        "[...document.querySelectorAll('.plot .uplot')].map(p => p.getBoundingClientRect().width)"
    )
    assert len(boxes) == 5 and min(boxes) > 0.8 * min(width, 1500) - 60
    frames = [
        browser.box(f"#plot-{name} .u-over")
        for name in ("norm", "coefficient", "clip_rate", "layers-1", "layers-2")
    ]
    assert all(abs(frame[i] - frames[0][i]) <= 1 for frame in frames for i in (0, 2)), "one x axis"
    x, _, shown, _ = browser.box("#tip")
    assert x >= 0 and x + shown <= width
    contrasts = browser.js(CONTRASTS)
    assert len(contrasts) > 150
    assert [one for one in contrasts if one[0] < 4.5] == []
    back = browser.js("getComputedStyle(document.body).backgroundColor")
    assert (back == "rgb(255, 255, 255)") != dark
    assert browser.problems == []


def test_a_narrower_window_draws_the_figures_again(browser, two):
    browser.open(two, 1280)
    wide = browser.box("#plot-norm .uplot")[2]
    browser.resize(700)
    browser.wait("document.querySelector('#plot-norm .uplot').getBoundingClientRect().width < 700")
    assert browser.box("#plot-norm .uplot")[2] < wide
    assert point(browser, "norm", SPIKE, 0.02)["heading"].startswith("step 812")


def test_it_can_be_printed(browser, two):
    browser.open(two, 1280, dark=True)
    page = base64.b64decode(browser.send("Page.printToPDF", printBackground=False)["data"])
    assert page[:5] == b"%PDF-" and len(page) > 50_000
    assert browser.js("document.documentElement.dataset.print") is None, "as it was, afterwards"
    browser.resize(1280, dark=True, media="print")
    browser.wait("document.documentElement.dataset.print === 'yes'")
    browser.settle()
    assert browser.js("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert browser.js("getComputedStyle(document.querySelector('.toolbar')).display") == "none"
    assert browser.js("[...document.querySelectorAll('details')].every(one => one.open)")
    assert browser.box("#plot-norm .uplot")[2] == 680
    browser.resize(1280)
    browser.wait("document.documentElement.dataset.print === undefined")
    assert not browser.js("[...document.querySelectorAll('details')].every(one => one.open)")


def test_more_than_eight_runs_are_told_apart(browser, tmp_path):
    lines = [made_line(step, 1.0 + step % 5) for step in range(1, 60)]
    browser.open(made(tmp_path, *((f"run {i}", lines) for i in range(20))))
    swatches = browser.js(
        "[...document.querySelectorAll('.runs .swatch')].map(canvas => canvas.toDataURL())"
    )
    assert len(set(swatches)) == 20
    names = browser.js(
        "[...document.querySelectorAll('.runs label')].map(label => label.textContent)"
    )
    assert names[0] == "1 · run 0" and names[19] == "20 · run 19"
    assert browser.js("document.querySelectorAll('.card[open]').length") == 3


def test_every_spike_of_a_long_run_is_there_at_any_zoom(browser, tmp_path):
    """Two spikes side by side, of which a stretch keeps one alone if it is thinned by its
    extremes."""
    steps = 60_000
    norms = norms_of(5, steps)
    spikes = {20_000: 40.0, 30_001: 90.0, 30_003: 70.0, 59_000: 30.0}
    for step, norm in spikes.items():
        norms[step - 1] = norm
    page = made(
        tmp_path, ("long", (made_line(i, norm) for i, norm in enumerate(norms.tolist(), 1)))
    )
    assert page.stat().st_size < 2_000_000
    browser.open(page)
    data = json.loads(browser.js("document.getElementById('data').textContent"))
    assert data["runs"][0]["kept"] < steps / 2, "vacuous"
    for half in (steps, 3000, 400, 20):
        for step, norm in spikes.items():
            if step == 30_003 and half > 20:
                continue  # within a pixel of a higher one
            low, high = max(1, step - half), min(steps, step + half)
            browser.js(
                f"document.getElementById('from').value = {low}; document.getElementById('to').value = {high}"
            )
            browser.js("document.getElementById('to').dispatchEvent(new Event('change'))")
            browser.settle()
            shown = point(browser, "norm", step, 0.02)
            assert (shown["heading"], shown["facts"]["norm"]) == (
                f"step {step:,}, clipped",
                f"{norm:g}",
            )
