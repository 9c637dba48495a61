"""The report command: its files, bad input, text that must not become markup, and the page."""

import csv
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from report_runs import make_run
from support import unpadded

from mdistiller.cli import report as command
from mdistiller.report.build import build_report

EVIL = "<script>alert(1)<_script>|`x`"  # of a folder, so without a slash
WIDTHS = (360, 1280)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Plain training, a grid of DKD and KD under an evil name, up to three seeds each."""
    folder = tmp_path_factory.mktemp("runs")
    for seed in (0, 1, 2):
        plain = [20.0 + seed, 65.0, 70.0 + seed]
        make_run(folder / f"plain,seed:{seed}", plain, "DISTILLER.TYPE", "NONE", seed=seed)
        evil = ("DISTILLER.TYPE", "KD", "DISTILLER.TEACHER_CKPT", "<img src=x onerror=alert(1)>")
        make_run(folder / f"{EVIL},seed:{seed}", [30.0, 74.0 + seed], *evil, seed=seed)
    for beta in (1, 2, 4, 8):
        for t in (1, 4):
            pairs = ("DISTILLER.TYPE", "DKD", "DKD.BETA", beta, "DKD.T", t)
            name = f"DKD with a long name of its own,BETA={beta},T={t},seed:0"
            make_run(folder / name, [40.0, 70.0 + beta + t / 4], *pairs, teacher=79.42)
    return folder


@pytest.fixture(scope="module")
def html(runs, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "new" / "page.html"
    assert command.main([str(runs), "--baseline", "plain", "--html", str(path)]) == 0
    return path


def test_markdown_is_printed_and_files_are_written(runs, tmp_path, capsys):
    assert command.main([str(runs)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("# Comparison of runs\n")
    assert "| plain | 3 | 71.0 ± 2.5 |" in unpadded(printed)
    md, table = tmp_path / "r.md", tmp_path / "r.csv"
    assert command.main([str(runs), "--md", str(md), "--csv", str(table)]) == 0
    assert capsys.readouterr().out == f"wrote {md}\nwrote {table}\n"
    assert md.read_text() == printed
    with table.open(newline="") as file:
        rows = {row["group"]: row for row in csv.DictReader(file)}
    assert len(rows) == 10
    assert rows["plain"]["last_mean"] == "71.0"


def evaluation(path, *networks):
    """A file as `eval --json` writes it, of weights with an accuracy and an agreement each."""
    found = [
        {"weights": str(weights), "top1": top1, "nll": 0.5, "teacher": {"agreement": a, "kl": 0.25}}
        for weights, top1, a in networks
    ]
    path.write_text(json.dumps({"teacher": "resnet56 released", "networks": found}))
    return str(path)


def test_agreement_with_the_teacher_is_over_seeds_and_of_the_compared_epoch(runs, tmp_path, capsys):
    plain = [runs / f"plain,seed:{seed}" for seed in (0, 1, 2)]
    last = [(run / "student_latest", 70.0 + seed, 80.0 + seed) for seed, run in enumerate(plain)]
    best = [(run / "student_best", 70.1 + seed, 50.0) for seed, run in enumerate(plain)]
    file = evaluation(tmp_path / "e.json", *last)
    other = evaluation(tmp_path / "f.json", *best, (tmp_path / "other", 1.0, 1.0))
    assert command.main([str(runs), "--evaluation", file, "--evaluation", other]) == 0
    printed = capsys.readouterr().out
    assert "## Answers" in printed
    assert (
        "| plain | 0.5000 ± 0.0000 | 81.0 ± 2.5 | 0.2500 ± 0.0000 | resnet56 released |"
        in unpadded(printed)
    )
    assert command.main([str(runs), "--evaluation", other, "--metric", "best"]) == 0
    assert "| 50.00 ± 0.00 |" in unpadded(capsys.readouterr().out)


def detections(path, *networks):
    """A file as `eval_detection --json` writes it, of weights with a box AP and precisions each."""
    found = [
        {
            "weights": str(weights),
            "numbers": {"bbox/AP": ap},
            "curves": {"bbox": {"precision50": curve, "classes": {"<b>": {"precision50": curve}}}},
        }
        for weights, ap, curve in networks
    ]
    path.write_text(json.dumps({"annotations": "val.json", "networks": found}))
    return str(path)


def test_precision_is_drawn_by_recall(runs, tmp_path, capsys):
    """Of each class and their mean, over the seeds of a group; best epochs, as is asked for."""
    curves = [[1.0] * 51 + [level] * 50 for level in (0.0, 0.25, 0.5)]
    plain = [runs / f"plain,seed:{seed}" / "student_best" for seed in (0, 1, 2)]
    found = [(file, 70.1 + seed, curves[seed]) for seed, file in enumerate(plain)]
    file = detections(tmp_path / "d.json", *found)
    report = build_report([runs], which="best", evaluations=[Path(file)])
    (section,) = [one for one in report.sections if one.title == "Precision and recall"]
    assert [chart.title for chart in section.charts] == [
        "Precision, mean over classes",
        "Precision, class <b>",
    ]
    for chart in section.charts:
        (line,) = chart.lines
        assert (line.name, chart.start, len(line.mean)) == ("plain", 0, 101)
        assert (line.mean[50], line.mean[51]) == (100.0, 25.0)
        assert (line.low[100], line.high[100]) == (0.0, 50.0)
    page = tmp_path / "r.html"
    words = [str(runs), "--evaluation", file, "--metric", "best", "--html", str(page)]
    assert command.main(words) == 0
    drawn = page.read_text()
    assert drawn.count(">recall %</text>") == 2
    assert "Precision, class &lt;b&gt;" in drawn
    last = build_report([runs], which="last", evaluations=[Path(file)])
    assert "Precision and recall" not in [section.title for section in last.sections]


def test_bad_input_is_one_line(runs, tmp_path, capsys):
    (tmp_path / "file").touch()
    (tmp_path / "bad.json").write_text("[1]")
    strange = evaluation(tmp_path / "strange.json", (tmp_path / "student_best", 1.0, 1.0))
    retrained = (runs / "plain,seed:0" / "student_best", 71.0, 1.0)
    old = evaluation(tmp_path / "old.json", retrained)
    cut = detections(tmp_path / "cut.json", (runs / "plain,seed:0" / "student_best", 70.0, None))
    for words, message in {
        ("none",): "none is not a folder",
        (tmp_path,): "no runs found in or below",
        (runs, "--baseline", "plane"): "--baseline 'plane'; did you mean 'plain'?",
        (runs, "--reach", "0"): "--reach must be above 0 and at most 100, got 0",
        (runs, "--csv", tmp_path / "file" / "r.csv"): "r.csv cannot be written",
        (runs, "--evaluation", tmp_path / "none"): "none cannot be read: No such file",
        (runs, "--evaluation", tmp_path / "bad.json"): "bad.json is not a JSON file of eval",
        (runs, "--evaluation", cut): "cut.json is not a JSON file of eval",
        (runs, "--evaluation", strange): "strange.json has results for other runs only",
        (runs, "--evaluation", old): "student_best, the run recorded 70.00 %: the data differ",
    }.items():
        assert command.main([str(word) for word in words]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def test_text_from_a_config_is_no_markup(runs, html, capsys):
    page = html.read_text()
    assert "<script" not in page
    assert "<img" not in page
    assert "&lt;script&gt;" in page
    assert command.main([str(runs)]) == 0
    printed = capsys.readouterr().out
    assert "<script" not in printed
    assert "<img" not in printed
    (line,) = [
        line for line in printed.splitlines() if line.startswith("| &lt;script&gt;alert(1)")
    ][:1]
    assert r"\|\`x\` | 3 | 75.0 ± 2.5 |" in unpadded(line)


class Outline(HTMLParser):
    """Every tag with its attributes; ends match their starts."""

    VOID = ("meta", "wbr", "line", "path", "circle", "br")

    def __init__(self):
        super().__init__()
        self.tags, self.open = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_and_fetches_nothing(html):
    text = html.read_text()
    outline = Outline()
    outline.feed(text)
    assert outline.open == []
    sources = [a[k] for _, a in outline.tags for k in ("src", "href", "xlink:href") if k in a]
    assert sources
    assert all(source.startswith("#") for source in sources)
    assert not re.search(r"url\(|@import|https?:", text)
    ids = [a["id"] for _, a in outline.tags if "id" in a]
    assert len(set(ids)) == len(ids)
    assert {source[1:] for source in sources} <= set(ids)
    assert all(a.get("aria-label") for tag, a in outline.tags if a.get("role") == "img")


def browser_path():
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    return next((path for path in map(shutil.which, names) if path), None)


LAYOUT = """() => {
  const wide = [...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll, svg'))
    .filter(e => e.getBoundingClientRect().right > innerWidth + 1)
    .map(e => e.outerHTML.slice(0, 80));
  const texts = [...document.querySelectorAll('figure > svg text')];
  const sizes = texts.map(e => e.getBoundingClientRect()).map(r => r.height);
  const out = texts.filter(e => {
    const inner = e.getBoundingClientRect(), outer = e.ownerSVGElement.getBoundingClientRect();
    return inner.left < outer.left - 1 || inner.right > outer.right + 1;
  }).map(e => e.textContent);
  return {page: document.documentElement.scrollWidth, wide, smallest: Math.min(...sizes), out,
          paper: getComputedStyle(document.body).backgroundColor,
          ink: getComputedStyle(document.body).color,
          scrolls: [...document.querySelectorAll('.scroll')]
            .some(e => e.scrollWidth > e.clientWidth)};
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_fits_a_phone_and_a_desktop(html, width, scheme):
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright (extra dev)")
    path = browser_path()
    if path is None:
        pytest.skip("needs Chromium on the PATH (apt-get install chromium)")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        view = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        said, asked = [], []
        view.on("dialog", lambda dialog: (said.append(dialog.message), dialog.dismiss()))
        view.on("console", lambda message: said.append(message.text))
        view.on("pageerror", lambda error: said.append(str(error)))
        view.on("request", lambda request: asked.append(request.url))
        view.goto(html.as_uri())
        found = view.evaluate(LAYOUT)
        browser.close()
    assert (said, asked) == ([], [html.as_uri()])
    assert found["page"] <= width
    assert found["wide"] == []
    assert found["out"] == []  # no label leaves its chart
    assert found["smallest"] >= 10  # pixels of a label's line
    assert found["scrolls"] or width > 360  # the wide tables, in themselves
    bright, dim = ("paper", "ink") if scheme == "light" else ("ink", "paper")
    levels = {k: int(re.findall(r"\d+", found[k])[0]) for k in ("paper", "ink")}
    assert levels[bright] > 200 > 60 > levels[dim]
