"""The page of a run: what is in it, and how a browser shows it."""

import json
import re
import shutil
import subprocess
import threading

import filelock
import pytest
from PIL import Image

from pipelines import report as reporting
from rewriter import Session, SubspanError
from rewriter.folder import LOCK, spec_of
from rewriter.report.curves import curves
from rewriter.report.page import page
from tests import tiny

pytestmark = pytest.mark.xdist_group("page")  # Its run is tuned once.
CHROMIUM = shutil.which("chromium")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    spec, out = tiny.project(folder), folder / "run"
    Session(spec, "train.log_steps=1", "train.evaluate_steps=3").tune(out)
    Session(out / "spec.yaml").export(out)
    reporting.report(out)
    return out


def parts(text):
    return re.findall(r'<section id="(\w+)">', text)


def test_a_finished_run_s_page_has_everything(run):
    text = (run / "report.html").read_text()
    assert parts(text) == ["curves", "plan", "rewrite", "spans", "compared", "files"]
    assert "finished" in text and 'http-equiv="refresh"' not in text
    metrics = json.loads((run / "metrics.json").read_text())["validation"]
    assert f"<dd>{metrics['accuracy']:.4f}</dd>" in text
    assert re.findall(r"<h3>(\w+)</h3>", text)[:2] == ["loss", "accuracy"]
    for name in ("query", "value"):  # lora of rank 4, on the first layer
        row = re.search(rf"<tr><td>bert\.encoder\.layer\.0\.attention\.self\.{name}\.weight</td>(.*?)</tr>", text)[1]
        cells = re.findall(r">([^<]*)</td>", row)
        assert cells[0] == "16 x 16" and cells[4] == "4" and 0 < float(cells[5].rstrip("%")) <= 100


def test_a_page_asks_for_nothing_from_anywhere(run):
    text = (run / "report.html").read_text()
    assert "default-src 'none'" in text and "<script" not in text and "<img" not in text and "<link" not in text
    assert all(link.startswith("#") for link in re.findall(r'(?:href|src)="([^"]*)"', text))


def test_a_run_in_work_is_followed_until_it_ends(run, tmp_path, monkeypatch):
    out = tmp_path / "run"
    shutil.copytree(run, out)
    for name in ("metrics.json", "export.json", "verify.json", "report.html"):
        (out / name).unlink()
    with (out / "log.jsonl").open("a") as log:
        log.write('{"loss": 0.1, "st')  # the line that is being written
    lock, seen = filelock.FileLock(out / LOCK), []
    lock.acquire()
    monkeypatch.setattr(reporting, "_AGAIN", 0.05)
    thread = threading.Thread(target=reporting.report, args=(out,))
    thread.start()
    while not (out / "report.html").exists():
        thread.join(0.05)
    seen.append((out / "report.html").read_text())
    lock.release()
    thread.join()
    seen.append((out / "report.html").read_text())
    assert 'http-equiv="refresh"' in seen[0] and "in work: step 12, epoch 2.00" in seen[0]
    assert parts(seen[0]) == ["curves", "plan"]
    assert "stopped at step 12, epoch 2.00; train --resume goes on" in seen[1] and "spans" in parts(seen[1])


@pytest.mark.parametrize(
    ("line", "said"),
    [(b'{"step": 1, "lo', "1: no entry"), (b"{}", "no step"), (b"3", "no step"), (b"\xff", "1: no entry")],
)
def test_a_damaged_log_is_named_and_a_run_that_died_early_is_not_finished(run, tmp_path, line, said):
    out = tmp_path / "run"
    shutil.copytree(run, out)
    log = (out / "log.jsonl").read_bytes()
    (out / "log.jsonl").write_bytes(line + b"\n" + log)
    with pytest.raises(SubspanError, match=said):
        page(spec_of(out), out)
    (out / "log.jsonl").write_bytes(log + line)
    assert "finished" in page(spec_of(out), out)
    for name in ("log.jsonl", "metrics.json", "adapter/adapter.json"):
        (out / name).unlink()
    shutil.rmtree(out / "adapter")
    assert "stopped at no step yet" in page(spec_of(out), out)


def test_what_is_written_is_text_and_no_page(run, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(run, out)
    said = {"prompt": "<script>alert(1)</script>", "expected": "&", "answer": "<b>", "stopped": True}
    with (out / "log.jsonl").open("a") as log:
        log.write(json.dumps({"step": 13, "epoch": 2.1, "eval_loss": None, "samples": [said]}) + "\n")
    text = page(spec_of(out), out)
    assert "<script" not in text and "&lt;script&gt;alert(1)" in text and "Written at step 13" in text


def test_tables_of_fitted_and_combined_runs(run, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(run, out)
    methods = [
        {"method": "lora", "options": {"rank": rank}, "parameters": 10 * rank, "error": 1 / rank} for rank in (2, 4)
    ]
    (out / "fit.json").write_text(json.dumps({"methods": methods}))
    runs = [{"run": "a", "weight": -0.5, "metric": "f1", "alone": 0.25, "combined": None}, {"run": "b", "weight": 1.0}]
    (out / "combine.json").write_text(json.dumps({"how": "ties", "runs": runs}))
    text = page(spec_of(out), out, notes={"drawing": "not drawn: no base", "spanned": "no adapter yet"})
    assert parts(text)[1:5] == ["plan", "fitted", "combined", "rewrite"]
    assert text.index("rank=4") < text.index("rank=2") and "no number" in text and "not drawn: no base" in text


def test_a_figure_of_numbers_and_gaps():
    log = [{"step": 1, "epoch": 0.1, "loss": 1.0}, {"step": 2, "epoch": 0.2, "loss": None}]
    log += [{"step": 2, "epoch": 0.2, "eval_loss": 0.5, "eval_f1": 0.25, "samples": []}]
    found = curves(log)
    assert list(found) == ["loss", "f1"] and all(svg.startswith("<svg") for svg in found.values())
    assert found == curves(log)  # The same bytes each time.


def chromium(folder, *options):
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --hide-scrollbars"
    )
    command = [CHROMIUM, *flags.split(), f"--user-data-dir={folder}", *options]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


MEASURE = """<script>addEventListener("load", () => {
  const far = [...document.querySelectorAll("body *")].filter(e => e.getBoundingClientRect().right > WIDTH + 1)
    .filter(e => !e.closest(".scroll") || e.matches(".scroll")).map(e => e.tagName);
  const flat = [...document.querySelectorAll("svg")].filter(e => e.getBoundingClientRect().height < 60).length;
  document.title = JSON.stringify({far, flat, drawn: document.querySelectorAll("svg").length});
})</script>"""


@needs_chromium
@pytest.mark.parametrize("width", [360, 1100])
def test_a_browser_shows_it_on_a_phone_and_on_a_screen(run, tmp_path, width):
    """Nothing but what scrolls by itself is wider than the screen, and every figure has a height."""
    text = (run / "report.html").read_text()
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)  # So that it can be measured.
    measured = f"<style>html {{ width: {width}px }}</style>" + MEASURE.replace("WIDTH", str(width))
    (tmp_path / "page.html").write_text(text.replace("</head>", f"{measured}</head>"))
    shown = chromium(tmp_path / "profile", "--dump-dom", f"file://{tmp_path / 'page.html'}")
    found = json.loads(re.search(r"<title>(.*?)</title>", shown)[1].replace("&quot;", '"'))
    assert found["far"] == [] and found["flat"] == 0 and found["drawn"] == text.count("<svg")


@needs_chromium
def test_a_browser_draws_it(run, tmp_path):
    """The colours of the curves and of what was inserted are in the picture, under the page's own policy."""
    shot = tmp_path / "shot.png"
    options = ("--window-size=1100,2400", f"--screenshot={shot}")
    chromium(tmp_path / "profile", *options, f"file://{(run / 'report.html').resolve()}")
    colours = {rgb for count, rgb in Image.open(shot).convert("RGB").getcolors(1 << 24) if count > 50}
    assert {(0x1F, 0x77, 0xB4), (0xFF, 0x7F, 0x0E), (0xA1, 0xD9, 0x9B), (0xD9, 0xD9, 0xD9)} <= colours
