import json
import re
import xml.etree.ElementTree as ElementTree
from base64 import b64decode
from html.parser import HTMLParser
from pathlib import Path

import pytest
import tensorflow as tf

from t5x_like.errors import UserError
from t5x_like.training.heatmap import EVEN, palette
from t5x_like.training.report import POINTS_PER_CURVE, _curve_svg, _thinned, _ticks, write_report
from t5x_like.training.run_log import JsonlWriter, RunLog

HOSTILE = "<script>alert('1')</script> & \"quotes\""


class Page(HTMLParser):
    """The page as a browser reads it: every tag that opens, and the text of every table cell."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self._in_cell = False
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self._in_cell = True

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._in_cell = False

    def handle_data(self, data: str) -> None:
        if self._in_cell:
            self.rows[-1][-1] += data


def a_run(folder: Path) -> Path:
    with RunLog(folder, total_steps=3) as log:
        for step, loss in ((1, 8.0), (2, 6.0), (3, 4.0)):
            log.step(step, {"loss": loss, "learning_rate": 0.01, "tokens_per_second": 100.0 * step, "z_loss": 0.5})
            log.evaluation(step, "bible", {"bleu": 2.5 * step, "chrf": 20.0})
    sample = {"inputs": HOSTILE, "targets": "hola", "predictions": ["adiós", "hola"], "score": -1.25}
    for step, text in ((9, "too old"), (10, HOSTILE)):
        path = folder / "eval" / "bible" / f"{step}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(sample | {"inputs": text}) + "\n" + json.dumps(sample | {"score": None}) + "\n")
    (folder / "config.gin").write_text(f"# {HOSTILE}\nTRAIN_STEPS = 3\n")
    facts = {
        "parameters": 1234567,
        "devices": {"kind": "cpu", "count": 8},
        "versions": {"jax": "0.10.2"},
    }
    (folder / "run.json").write_text(json.dumps({**facts, "command": HOSTILE, "sessions": [facts, facts]}))
    return write_report(folder)


def test_the_page_holds_metrics_samples_config_and_versions(tmp_path: Path) -> None:
    path = a_run(tmp_path / "my run")
    assert path == (tmp_path / "my run" / "report.html").resolve()
    page = Page(path)
    assert ["bible", "bleu", "7.5", "3"] in page.rows
    assert ["bible", "chrf", "20", "3"] in page.rows
    assert [HOSTILE, "hola", '["adiós", "hola"]', "-1.25"] in page.rows  # step 10, the latest as a number
    assert [HOSTILE, "hola", '["adiós", "hola"]', ""] in page.rows
    assert ["command", HOSTILE] in page.rows
    assert ["sessions", "2"] in page.rows
    assert ["jax", "0.10.2"] in page.rows
    assert "too old" not in page.source
    assert "TRAIN_STEPS = 3" in page.source
    tiles = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", page.source))
    assert tiles == {
        "steps": "3",
        "final loss": "4",
        "tokens/s (median)": "200",
        "parameters": "1,234,567",
        "devices": "8 cpu",
    }


def test_every_scalar_has_a_curve_whose_points_tell_their_values(tmp_path: Path) -> None:
    source = a_run(tmp_path).read_text(encoding="utf-8")
    labels = re.findall(r'aria-label="(.*?)"', source)
    assert labels == ["loss", "learning_rate", "tokens_per_second", "z_loss", "bible/bleu", "bible/chrf"]
    for title in ("step 1: 8", "step 2: 6", "step 3: 4", "step 3: 7.5"):
        assert f"<title>{title}</title>" in source


def test_experts_have_a_heatmap_over_training(tmp_path: Path) -> None:
    with RunLog(tmp_path, total_steps=2) as log:
        for step in (1, 2):
            numbers = {"loss": 1.0, "tokens_per_second": 1.0, "router/dropped": 0.125 * step}
            log.step(step, numbers, {"router/encoder/layers_1/load": [0.0, 0.5, 1.0]})
    page = Page(write_report(tmp_path))
    assert "<h2>Experts</h2>" in page.source
    (scale, heatmap) = [tag["href"] for name, tag in page.tags if name == "image"]
    assert scale != heatmap
    cells = tf.io.decode_png(b64decode(heatmap.partition(",")[2]), channels=3).numpy()
    nothing, even, twice = palette()[[0, EVEN, EVEN + EVEN // 2]].tolist()
    assert cells.tolist() == [[nothing] * 2, [even] * 2, [twice] * 2]
    assert "expert 2: 2.00x at first, 2.00x at last (100.00% of the tokens)" in page.source
    assert "step 2: 0.25" in page.source


def test_text_is_escaped_and_nothing_is_fetched(tmp_path: Path) -> None:
    page = Page(a_run(tmp_path))
    assert "script" not in [tag for tag, _ in page.tags]
    assert not [tag for tag, _ in page.tags if tag in ("link", "img", "iframe", "object", "embed")]
    assert not [
        name for _, attributes in page.tags for name in attributes if name in ("src", "href") or name[:2] == "on"
    ]
    assert "url(" not in page.source
    assert "@import" not in page.source


def test_a_curve_is_drawn_to_scale() -> None:
    """In a plot from x = 52 to 460 and y = 184 (bottom) to 12 (top), over ticks 4..8."""
    svg = ElementTree.fromstring(_curve_svg("loss", [(0, 8.0), (50, 4.0), (100, 6.0)]))
    line = next(path for path in svg.iter("path") if path.get("class") == "line")
    assert line.get("d") == "M52.0 12.0L256.0 184.0L460.0 98.0"
    assert [(spot.get("cx"), spot.get("cy")) for spot in svg.iter("circle")] == [
        ("52.0", "12.0"),
        ("256.0", "184.0"),
        ("460.0", "98.0"),
    ]
    assert [text.text for text in svg.iter("text")] == [
        "4",
        "5",
        "6",
        "7",
        "8",
        "0",
        "20",
        "40",
        "60",
        "80",
        "100",
    ]


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.0, 10.0, [0, 5, 10]),
        (1.0, 7.3, [0, 2, 4, 6, 8]),
        (0.021, 0.1, [0.02, 0.04, 0.06, 0.08, 0.1]),
        (-3.0, 4.0, [-4, -2, 0, 2, 4]),
        (5.0, 5.0, [2, 4, 6, 8]),  # a flat line lies in the middle
        (0.0, 0.0, [-0.5, 0, 0.5]),
    ],
)
def test_ticks_are_round_and_cover_the_values(low: float, high: float, ticks: list[float]) -> None:
    assert _ticks(low, high, 4) == pytest.approx(ticks, rel=1e-12)


def test_thinning_keeps_the_ends_and_the_spikes() -> None:
    points = [(step, 1.0) for step in range(10_000)]
    points[7_777] = (7_777, 50.0)
    points[3_333] = (3_333, -50.0)
    kept = _thinned(points)
    assert {points[0], points[-1], (7_777, 50.0), (3_333, -50.0)} <= set(kept)
    assert kept == sorted(kept)
    assert len(kept) <= POINTS_PER_CURVE + 2
    assert _thinned(points[:100]) == points[:100]


def test_values_that_were_not_finite_are_counted_and_left_out(tmp_path: Path) -> None:
    writer = JsonlWriter(tmp_path / "metrics" / "metrics.jsonl")
    for step, loss in ((1, 2.0), (2, float("nan")), (3, 1.0)):
        writer.write(step, {"loss": loss})
    writer.close()
    source = write_report(tmp_path).read_text(encoding="utf-8")
    assert "loss (not finite: 1)" in source
    assert source.count("<circle") == 2


def test_the_last_report_of_a_step_counts(tmp_path: Path) -> None:
    for bleu in (1.0, 9.0):
        with RunLog(tmp_path, total_steps=1, resumed_step=None) as log:
            log.evaluation(1, "bible", {"bleu": bleu})
    assert ["bible", "bleu", "9", "1"] in Page(write_report(tmp_path)).rows


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{tmp_path.name} is no run's folder"):
        write_report(tmp_path)
    assert not list(tmp_path.iterdir())
