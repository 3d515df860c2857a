"""`ldmkit report`: curves, what is read, what is said, and a page that stands alone."""

import json
import re
import shutil
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import ldmkit
from ldmkit.errors import DataError
from ldmkit.metrics import curves
from ldmkit.metrics.curves import Axes, Curve
from ldmkit.pages import pictures as page_pictures
from ldmkit.pages.findings import findings_of
from ldmkit.pages.handoffs import handoffs
from ldmkit.pages.pictures import as_image, chosen
from ldmkit.pages.reading import read_subject
from ldmkit.report_configs import ReportConfig

PLANTED = "<script>alert('x')</script>\x00&\"'"
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """What is on a page; fails where tags do not close in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.ids, self.links, self.words = [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.ids += [value for name, value in attrs if name == "id"]
        self.links += [(tag, value) for name, value in attrs if name in ("src", "href", "data")]
        assert not [name for name, _ in attrs if name.startswith("on")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def page_of(*runs, out):
    text = ldmkit.report(ReportConfig(run=runs, out=out)).read_text(encoding="utf-8")
    page = Page(text)
    assert len(set(page.ids)) == len(page.ids)
    assert not set(page.tags) & {"script", "iframe", "object", "link", "embed"}
    for _, target in page.links:
        assert target.startswith("data:image/png;base64,") or target.lstrip("#") in page.ids
    assert "url(" not in text
    assert "@import" not in text
    for drawing in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        ET.fromstring(drawing)
    assert not re.search(r"[\x00-\x08\x0b-\x1f]", text)
    return page


def a_run(path, lines=(), steps=1000, batch_size=4, kind="diffusion"):
    path.mkdir(parents=True)
    stage = 'latents = "somewhere"' if kind == "diffusion" else "[autoencoder]\nchannels = 8"
    (path / "config.toml").write_text(f"steps = {steps}\nbatch_size = {batch_size}\n{stage}\n")
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def said(path):
    return {one.head: one for one in findings_of(read_subject(path))}


# -- curves


def test_smoothing_keeps_a_straight_line_and_evens_out_noise():
    line = [(float(x), 3.0 * x - 1.0) for x in range(40)]
    assert np.array(curves.smoothed(line, 7)) == pytest.approx(np.array(line[1:-1]))
    wild = [(float(x), float((-1) ** x)) for x in range(41)]
    assert max(abs(y) for _, y in curves.smoothed(wild, 9)[8:-8]) <= 1 / 9 + 1e-12
    assert curves.smoothed([], 5) == []
    spike = [(float(x), 1e30 if x == 3 else 0.5) for x in range(2_000)]
    smooth = curves.smoothed(spike, 9)
    assert len(smooth) <= 2 * curves.MOST_POINTS
    assert {y for x, y in smooth if x > 10} == {0.5}


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=900), st.sampled_from([4, 20, 300]))
def test_thinning_keeps_order_ends_of_the_range_and_at_most_so_many(values, most):
    points = [(float(place), value) for place, value in enumerate(values)]
    kept = curves.thinned(points, most)
    assert kept == sorted(kept)
    assert len(kept) <= max(most, 1)
    assert set(kept) <= set(points)
    assert min(y for _, y in kept) == min(values)
    assert max(y for _, y in kept) == max(values)


@given(st.floats(-1e5, 1e5), st.floats(1e-4, 1e6))
def test_ticks_are_few_even_and_within(low, width):
    found = curves.ticks(low, low + width)
    assert 2 <= len(found) <= 7
    steps = np.diff(found)
    assert steps == pytest.approx(steps[0], rel=1e-3)
    edge = 1e-8 * steps[0] + 1e-9 * (abs(low) + width)
    assert low - edge <= found[0]
    assert found[-1] <= low + width + edge


@given(st.floats(1e-8, 1e5), st.floats(10, 1e6))
def test_log_ticks_lie_within(low, ratio):
    found = curves.log_ticks(low, low * ratio)
    assert found
    assert found == sorted(found)
    assert low * 0.99 <= found[0] <= found[-1] <= low * ratio * 1.01


def places(svg):
    drawn = re.search(r'<path class="line c0" d="M([^"]*)"', svg)
    assert drawn is not None
    return [tuple(map(float, pair.split())) for pair in drawn[1].split("L")]


def test_points_land_where_the_axes_say():
    line = [(float(x), 2.0 * x + 5.0) for x in range(5)]
    across, up = zip(*places(curves.line_plot("t", [Curve("", line, "line", "c0")], Axes("x", "y"))), strict=True)  # fmt: skip
    assert np.diff(across) == pytest.approx(np.diff(across)[0], abs=0.11)
    assert np.diff(up) == pytest.approx(np.diff(up)[0], abs=0.11)
    assert np.diff(up)[0] < 0  # larger is higher
    decades = [(float(x), 10.0**x) for x in range(-3, 3)]
    svg = curves.line_plot("t", [Curve("", decades, "line", "c0")], Axes("x", "y", log=True))
    up = [y for _, y in places(svg)]
    assert np.diff(up) == pytest.approx(np.diff(up)[0], abs=0.11)
    assert "y (log)" in svg


def test_a_plot_leaves_out_what_it_cannot_show_and_escapes_words():
    points = [(0.0, 1.0), (1.0, float("nan")), (2.0, -1.0), (3.0, float("inf")), (4.0, 3.0)]
    curve = Curve("a<b>", points, "line", "c0")
    assert len(places(curves.line_plot("t", [curve], Axes("x", "y")))) == 3
    svg = curves.line_plot("<t>", [curve, curve], Axes("<x>", "<y>", log=True))
    assert len(places(svg)) == 2
    words = "".join(ET.fromstring(svg).itertext())
    assert all(word in words for word in ("<t>", "<x>", "<y> (log)", "a<b>"))
    assert (
        curves.line_plot("t", [curve._replace(points=[(0.0, float("nan"))])], Axes("x", "y")) == ""
    )
    assert curves.bar_plot("t", [("mean", [])], Axes("x", "y")) == ""


def test_bars_stand_on_zero():
    svg = curves.bar_plot("t", [("mean", [-1.0, 2.0]), ("std", [1.0, 1.0])], Axes("x", "y"))
    bars = [bar.attrib for bar in ET.fromstring(svg).iter("rect")]
    tops = [(float(bar["y"]), float(bar["y"]) + float(bar["height"])) for bar in bars]
    zero = tops[0][0]  # of the bar that hangs
    assert [bottom for _, bottom in tops[1:]] == pytest.approx([zero] * 3, abs=0.11)
    heights = [bottom - top for top, bottom in tops]
    assert heights[1] == pytest.approx(2 * heights[0], abs=0.2)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (1500.0, "1.5k"), (2e6, "2M"), (0.25, "0.25"), (5e-4, "5e-4"), (1.5e-7, "1.5e-7")],
)
def test_short_numbers(value, text):
    assert curves.short_number(value) == text


# -- the page


def test_the_stages_of_a_pipeline_on_one_page(pipeline, tmp_path, run):
    runs = [pipeline.ae.parent, pipeline.latents, pipeline.ldm.parent]
    done = run("report", *runs, "-o", tmp_path / "page.html")
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'page.html'}\n".encode())
    page = page_of(*runs, out=tmp_path / "page.html")
    for words in (
        "Autoencoder (train-ae)",
        "Latent set (encode)",
        "Diffusion model (train-diffusion)",
        "finished: after 4 steps",
        f"{pipeline.ldm.parent} was made from {pipeline.ae.parent}",
        f"{pipeline.ldm.parent} whitens by the means and stds of {pipeline.latents}",
        "12 latents in 3 shard(s)",
        "2: circle, square",
        "reconstructions, step 4",
        "samples, step 2",
        "Loss by noise level",
        "Learning rate",
        "Logits of the discriminator",
        "residual_blocks = 1",
    ):
        assert words in page.text, words
    assert "does not agree" not in page.text
    assert page.tags.count("img") == 4
    assert page.tags.count("svg") > 12


def test_nothing_of_the_directories_is_changed(pipeline, tmp_path):
    runs = [pipeline.ae.parent, pipeline.latents, pipeline.ldm.parent]

    def state():
        return [
            (f, f.stat().st_mtime_ns, f.stat().st_size) for r in runs for f in sorted(r.rglob("*"))
        ]

    before = state()
    first = ldmkit.report(ReportConfig(run=tuple(runs), out=tmp_path / "a.html")).read_bytes()
    second = ldmkit.report(ReportConfig(run=tuple(runs), out=tmp_path / "b.html")).read_bytes()
    assert before == state()
    assert first == second


def test_hand_offs_that_do_not_agree_are_named(pipeline, tmp_path):
    other = tmp_path / "latents"
    shutil.copytree(pipeline.latents, other)
    manifest = json.loads((other / "manifest.json").read_text())
    del manifest["digest"]  # which would not hold after the change
    manifest["recipe"]["autoencoder"] = "0" * 64
    manifest["whitening"]["mean"][0] += 0.5
    (other / "manifest.json").write_text(json.dumps(manifest))
    subjects = [read_subject(path) for path in (pipeline.ae.parent, other, pipeline.ldm.parent)]
    found = [(one.head, one.text) for one in handoffs(subjects)]
    assert [head for head, _ in found] == ["does not agree", "agrees", "does not agree"]
    assert "000000000000" in found[0][1]
    assert "other means and stds" in found[2][1]
    (alone,) = handoffs([subjects[1], a_subject := subjects[1]._replace(path=tmp_path)])[:1]
    assert alone.head == "not checked"
    assert a_subject.manifest is not None


def test_what_comes_from_data_is_never_markup(pipeline, tmp_path):
    latents = tmp_path / "latents"
    shutil.copytree(pipeline.latents, latents)
    manifest = json.loads((latents / "manifest.json").read_text())
    del manifest["digest"]  # which would not hold after the change
    manifest["class_names"] = [PLANTED, "square"]
    manifest["skipped"] = [[PLANTED, PLANTED]]
    manifest["converted"] = {PLANTED: [3, [PLANTED]]}
    manifest["versions"] = {PLANTED: PLANTED}
    manifest["recipe"]["autoencoder"] = PLANTED
    (latents / "manifest.json").write_text(json.dumps(manifest))
    lines = [{"step": n, "loss": 1.0 / n, PLANTED: float(n)} for n in range(1, 9)]
    ldm = a_run(tmp_path / "ldm", lines)
    with (ldm / "config.toml").open("a") as file:
        file.write(f'"{"<script>key"}" = "</pre><script>"\n')
    (ldm / "setback.json").write_text(json.dumps({"step": 1, "failed": 2, "reason": PLANTED}))
    report = {
        "schema_version": 1,
        "kind": PLANTED,
        "findings": [PLANTED, {"kind": PLANTED, "severity": PLANTED, "count": 1}],
        "thresholds": [{"sentence": PLANTED, "met": False}],
        "files": ["../secret.png", "<script>.png", 3],
        "reconstruction": {PLANTED: {PLANTED: 1.0}},
        PLANTED: {PLANTED: PLANTED},
        "units": {PLANTED: PLANTED},
    }
    (ldm / "report.json").write_text(json.dumps(report))
    page = page_of(latents, ldm, out=tmp_path / "page.html")
    assert page.text.count("alert('x')") >= 15
    assert "\\x00&\"'" in page.text
    assert "secret" not in page.text


# -- unfinished and damaged runs


def test_an_unfinished_run_says_where_it_stands_and_how_long_it_takes(tmp_path):
    lines = [{"step": n, "loss": 1.0, "images_per_second": 8.0} for n in range(50, 301, 50)]
    path = a_run(tmp_path / "run", lines)
    text = said(path)["unfinished"].text
    # batches of 4 at 8 samples per second: half a second for each of the 700 steps that are left
    assert "at step 300 of 1000 (30 %)" in text
    assert "0.5 s for each step, so about 5m50s more" in text
    assert "there is no checkpoint" in text
    (path / "checkpoints/step-000000250").mkdir(parents=True)
    assert "newest checkpoint is of step 250" in said(path)["unfinished"].text
    assert "unfinished" in page_of(path, out=tmp_path / "page.html").text


def test_damaged_runs_are_shown_with_what_is_left(tmp_path):
    path = a_run(tmp_path / "run", [{"step": n, "loss": 1.0 + n} for n in (10, 20, 30)])
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{]\n[3]\n{"step": 40, "loss": NaN, "word": "x", "huge": 1e999}\n')
        file.write('{"step": 50, "lo')
    (path / "samples").mkdir()
    (path / "samples/samples-000000010.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    (path / "diffusion.safetensors").write_bytes(b"\x10")
    (path / "config.toml").write_text("steps = = 3")
    (path / "setback.json").write_text("{")
    subject = read_subject(path)
    assert subject.kind == "diffusion"
    assert subject.log.series["loss"] == [(10.0, 11.0), (20.0, 21.0), (30.0, 31.0)]
    assert (subject.log.unreadable, subject.log.cut) == (2, True)
    assert subject.log.not_finite == {"loss": 40.0, "huge": 40.0}
    page = page_of(path, out=tmp_path / "page.html")
    for words in (
        "2 line(s) of metrics.jsonl are damaged",
        "the last line of metrics.jsonl is cut off",
        "its settings cannot be read",
        "diffusion.safetensors",
        "setback.json cannot be read",
        "samples-000000010.png cannot be shown",
        "loss is no finite number in the line of step 40",
    ):
        assert words in page.text, words


def test_a_run_that_has_just_begun_and_an_unfinished_latent_set(pipeline, tmp_path):
    begun = a_run(tmp_path / "run")
    (begun / "metrics.jsonl").unlink()
    cut = tmp_path / "latents"
    shutil.copytree(pipeline.latents, cut)
    (cut / "manifest.json").unlink()
    text = page_of(begun, cut, out=tmp_path / "page.html").text
    assert "at step 0 of 1000" in text
    assert "The log has no numbers yet" in text
    assert "no readable manifest, and 3 shard(s) lie there" in text


def test_a_shard_that_is_missing_or_short_is_named(pipeline, tmp_path):
    path = tmp_path / "latents"
    shutil.copytree(pipeline.latents, path)
    (path / "00000.safetensors").unlink()
    (path / "00001.safetensors").write_bytes(b"short")
    found = [one.text for one in findings_of(read_subject(path)) if one.mood == "bad"]
    assert "00000.safetensors is missing" in found[0]
    assert "00001.safetensors has 5 bytes" in found[1]


@pytest.mark.parametrize("what", ["absent", "empty", "foreign"])
def test_a_directory_of_something_else_is_one_sentence(tmp_path, run, what):
    path = tmp_path / what
    if what != "absent":
        path.mkdir()
    if what == "foreign":
        (path / "notes.txt").write_text("mine")
    done = run("report", path, "-o", tmp_path / "page.html")
    assert done.returncode == DataError.exit_code
    assert done.stderr.decode().count("\n") == 1
    assert str(path) in done.stderr.decode()
    assert not (tmp_path / "page.html").exists()


def test_no_directory_at_all_is_a_usage_error(run):
    done = run("report")
    assert done.returncode == 2
    assert b"RUN is missing" in done.stderr


# -- sentences


def validated(*losses, linear=1.0):
    return [
        {
            "step": 100 * n,
            "validation_loss": loss,
            "validation_linear": linear,
            "validation_zero": 2.0,
        }
        for n, loss in enumerate(losses, 1)
    ]


def test_learning_is_judged_by_the_linear_predictor(tmp_path):
    good = said(a_run(tmp_path / "good", validated(0.9, 0.75)))
    assert good["learning"].mood == "good"
    assert "25 % below" in good["learning"].text
    bad = said(a_run(tmp_path / "bad", validated(1.3, 1.1)))
    assert bad["not learning yet"].mood == "bad"
    rising = said(a_run(tmp_path / "rising", validated(0.9, 0.5, 0.6)))
    assert "lowest (0.5) at step 200 and has risen by 20 %" in rising["rising"].text
    assert "rising" not in good
    none = said(a_run(tmp_path / "none", [{"step": n, "loss": 2.0 - n / 10} for n in range(10)]))
    assert "no validation loss" in none["learning?"].text
    assert "below that of the fifth before" in none["learning?"].text


def test_troubles_are_told(tmp_path):
    lines = [{"step": n, "gradient_norm": 1.0, "skipped_updates": float(n > 5)} for n in range(20)]
    lines[7]["gradient_norm"] = 50.0
    path = a_run(tmp_path / "run", lines)
    (path / "setback.json").write_text('{"step": 5, "failed": 9, "reason": "too strong"}')
    found = said(path)
    assert "1 update(s)" in found["skipped"].text
    assert "reached 50 before step 7, 50 times" in found["spike"].text
    assert "from step 9 to step 5: too strong" in found["set back"].text


def test_an_autoencoder_whose_discriminator_has_won(tmp_path):
    lines = [{"step": n, "pixel": 0.1, "accuracy": 1.0} for n in range(1, 8)]
    found = said(a_run(tmp_path / "ae", lines, kind="autoencoder"))
    assert found["discriminator"].mood == "bad"
    assert "100 %" in found["discriminator"].text


def test_linear_and_zero_predictor_are_one_line_where_they_are_the_same(tmp_path):
    same = [line | {"validation_zero": 1.0} for line in validated(0.9, 0.8, 0.7)]
    one = page_of(a_run(tmp_path / "one", same), out=tmp_path / "1.html").text
    two = page_of(a_run(tmp_path / "two", validated(0.9, 0.8)), out=tmp_path / "2.html").text
    assert "zero predictor is the linear one" in one
    assert "zero predictor is the linear one" not in two
    assert "linear predictor zero predictor" in two


# -- pictures and evaluations


def test_the_first_middle_and_newest_pictures_are_chosen(tmp_path):
    files = [tmp_path / f"samples-{step:09d}.png" for step in range(100, 1100, 100)]
    kept = [int(file.stem[-9:]) for file in chosen([*reversed(files)])]
    assert kept == [100, 600, 800, 900, 1000]
    assert chosen(files[:2]) == files[:2]
    assert chosen([tmp_path / "odd.png", *files[:1]]) == [tmp_path / "odd.png", files[0]]


def test_pictures_are_made_to_fit(tmp_path, monkeypatch):
    monkeypatch.setattr(page_pictures, "ALL_BYTES", 60_000)
    path = a_run(tmp_path / "run")
    (path / "samples").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (200, 300, 3), np.uint8)
    for step in range(8):
        Image.fromarray(noise).save(path / f"samples/samples-{step:09d}.png")
    page = page_of(path, out=tmp_path / "page.html")
    sizes = [len(target) for tag, target in page.links if tag == "img"]
    assert len(sizes) == 5
    assert sum(sizes) <= 60_000 * 4 / 3 + 5 * 40
    assert max(sizes) > 1_000  # smaller, not gone


def test_a_huge_picture_is_not_opened(tmp_path, monkeypatch):
    file = tmp_path / "samples-1.png"
    Image.new("1", (400, 300)).save(file)
    assert as_image(file, 10_000).startswith("<img")
    monkeypatch.setattr(page_pictures, "MOST_PIXELS", 1_000)
    assert "400 x 300 pixels are too many" in as_image(file, 10_000)


def test_evaluations_are_shown_where_they_lie(pipeline, tmp_path):
    subject = read_subject(pipeline.ae.parent)
    path = tmp_path / "eval"
    path.mkdir()
    report = {
        "schema_version": 1,
        "kind": "eval-ae",
        "autoencoder": subject.facts,
        "pictures": 267,
        "reconstruction": {"psnr_db": {"mean": 25.29, "max": 39.3}, "ssim": {"mean": 0.809}},
        "findings": ["latents are smooth like pictures"],
        "thresholds": [{"sentence": "ssim is 0.8, which misses --min-ssim 0.9", "met": False}],
        "files": ["worst.png"],
    }
    (path / "report.json").write_text(json.dumps(report))
    Image.new("RGB", (20, 10), "red").save(path / "worst.png")
    page = page_of(pipeline.ae.parent, path, out=tmp_path / "page.html")
    for words in (
        "Measured by eval-ae",
        "267",
        "25.29",
        "0.809",
        "misses --min-ssim",
        "smooth like",
    ):
        assert words in page.text, words
    assert f"{path}/report.json measures {pipeline.ae.parent}" in page.text
    assert "worst.png in" in page.text
