"""A run's curves: read from complete and damaged files, drawn correctly, with the same bytes every time."""

from __future__ import annotations

import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runs import training, write_events

from nanoft import UserError
from nanoft.tracking import plots
from nanoft.tracking.plots import Events, read_events

SVG = "{http://www.w3.org/2000/svg}"


def test_what_is_not_a_whole_event_is_counted_and_left_out(tmp_path: Path) -> None:
    bad = [b"{", b"[1]", b"null", b'{"event": 3, "step": 1}', b'{"event": "train", "step": "1"}', b"\xff\xfe"]
    bad += [b'{"event": "train", "step": NaN}', b"[" * 100_000, b'{"event": "train", "step": true}']
    directory = write_events(tmp_path, training(20), b"\n".join([*bad, b'{"event": "train", "step": 22, "lo']))
    events = read_events(directory)
    assert events.lines == training(20)
    assert events.damaged == len(bad) + 1
    assert read_events(tmp_path / "nowhere") == Events()


def test_a_series_has_gaps_where_a_value_is_missing_or_not_finite(tmp_path: Path) -> None:
    values: list[Any] = [1.5, None, "x", True, 10**400, 2]
    lines = [{"event": "train", "step": n, "loss": value} for n, value in enumerate(values)]
    steps, losses = read_events(write_events(tmp_path, [*lines, {"event": "train", "step": 6}])).series("train", "loss")
    assert steps == [0, 1, 2, 3, 4, 5, 6]
    assert [None if np.isnan(loss) else loss for loss in losses] == [1.5, None, None, None, None, 2.0, None]


def test_the_best_evaluation_is_the_first_with_the_least_loss() -> None:
    lines = [{"event": "eval", "step": n, "loss": loss} for n, loss in enumerate([3.0, None, 1.0, 1.0, 2.0])]
    events = Events(lines)
    assert events.best() == lines[2]
    assert events.last("eval", "loss") == 2.0
    assert Events().best() is None


def points(svg: Path, gid: str) -> np.ndarray[Any, Any]:
    """The corners of a line in an SVG, in its own units."""
    (group,) = [g for g in ElementTree.parse(svg).iter(f"{SVG}g") if g.get("id") == gid]
    path = group.find(f"{SVG}path")
    assert path is not None
    return np.array(re.findall(r"[ML] (\S+) (\S+)", path.get("d", "")), dtype=float)


def test_the_lines_of_the_svg_are_the_data_but_for_scale(tmp_path: Path) -> None:
    """An axis maps data to the page by x -> a x + b, a logarithmic one log(x): what fits two points must fit all."""
    pytest.importorskip("matplotlib", reason="needs the extra plot")
    png, svg = plots.draw(write_events(tmp_path / "run", training(60)))
    assert png.read_bytes().startswith(b"\x89PNG")
    for event, key in (("train", "loss"), ("eval", "loss"), ("train", "grad_norm"), ("train", "learning_rate")):
        data = np.array(read_events(tmp_path / "run").series(event, key)).T
        drawn = points(svg, f"{event}.{key}")
        data[:, 1] = np.log(data[:, 1]) if key == "loss" else data[:, 1]
        assert len(drawn) == len(data)
        for axis in (0, 1):
            scale, shift = np.polyfit(data[:, axis], drawn[:, axis], 1)
            np.testing.assert_allclose(scale * data[:, axis] + shift, drawn[:, axis], atol=1e-3)
            assert scale > 0 if axis == 0 else scale < 0  # an SVG counts downwards


def test_the_figure_holds_the_series(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra plot")
    events = read_events(write_events(tmp_path, training(200)))
    drawn = [line for axes in plots.figure(events, "a").axes for line in axes.get_lines()]
    (best,) = [line for line in drawn if line.get_gid() is None]
    assert (best.get_label(), list(best.get_xdata())) == ("best: step 200", [200, 200])
    for line in [line for line in drawn if line is not best]:
        steps, values = events.series(*line.get_gid().split("."))
        np.testing.assert_array_equal(line.get_xdata(), steps)
        np.testing.assert_array_equal(line.get_ydata(), values)
    for axes in plots.figure(events, "a").axes:
        looks = [(line.get_linestyle(), line.get_marker()) for line in axes.get_lines()]
        assert len(set(looks)) == len(looks)  # told apart without color


def test_the_panels_are_those_with_data_and_no_legend_covers_a_curve() -> None:
    pytest.importorskip("matplotlib", reason="needs the extra plot")

    def panels(losses: list[float], **values: float) -> dict[str, Any]:
        lines = [{"event": "train", "step": step, "loss": loss, **values} for step, loss in enumerate(losses)]
        picture = plots.figure(Events([*lines, {"event": "eval", "step": 2, "loss": -0.5, **values}]), "a")
        picture.draw_without_rendering()
        for axes in picture.axes:
            if legend := axes.get_legend():
                assert legend.get_window_extent().y0 >= axes.get_window_extent().y1 - 1
        return {axes.get_title(loc="left"): axes for axes in picture.axes}

    assert panels([3.0, 2.0])["loss"].get_yscale() == "linear"
    assert panels([3.0, 0.1])["loss"].get_yscale() == "linear"  # an evaluation is negative
    assert [*panels([3.0], **{"rewards/chosen": 1.0, "rewards/rejected": 0.5})] == ["loss", "reward of answers"]
    rewarded = panels([0.1, 0.2], reward=0.5)
    assert [line.get_label() for line in rewarded["loss"].get_lines()] == ["training"]  # the other is -reward
    assert rewarded["reward"].get_lines()[-1].get_label() == "best: step 2"


CHART = """\
loss: training (blocks), evaluation (o), by optimizer step
      2.5 |█▆▄▂
          |████▇▄▃▁
          |█████████▆▅▄▃▂▁
          |████████████████▇▆▅o▄▃▂▂▁▁
          |███████████████████████████▇▇▆▆▅▅▄▄▄▃▃▂▂▁▁▁ o
   0.1667 |██████████████████████████████████████████████▇▇▇▆▆▆▅▅▅▄▄▄▄▃▃▃▃▂▂▂▂▁o
          +2                                                                  30"""


def test_the_loss_as_text() -> None:
    assert plots.loss_chart(Events(training(30)), 80) == CHART.splitlines()
    for width in (80, 120):
        assert max(map(len, plots.loss_chart(Events(training(300)), width))) == width
    few = [{"event": "train", "step": 3, "loss": 2.0}, {"event": "train", "step": 4, "loss": None}]
    assert plots.loss_chart(Events(few))[1:] == plots.chart(([3.0], [2.0]))
    assert plots.chart(([], [])) == ["  (no data yet)"]
    assert plots.loss_chart(Events([{"event": "train", "step": 1, "reward": 0.5}]))[0].startswith("reward: ")


def test_the_chart_puts_the_extremes_at_the_edges() -> None:
    assert plots.chart(([0.0, 5.0, 10.0], [4.0, 2.0, 0.0]), ([10.0], [4.0]), width=22, height=3) == [
        "        4 |█▆▃▁      o",
        "          |████▇▅▂",
        "        0 |████████▆▃▁",
        "          +0        10",
    ]
    assert plots.chart(([], []), ([1.0], [2.0]), width=22, height=2)[1].endswith("|o")


def test_the_same_events_give_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra plot")
    write_events(tmp_path / "run", training(40))
    first = [path.read_bytes() for path in plots.draw(tmp_path / "run")]
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "12345")
    assert [path.read_bytes() for path in plots.draw(tmp_path / "run")] == first
    assert b"dc:date" not in first[1]
    assert sorted(path.name for path in (tmp_path / "run" / "plots").iterdir()) == ["curves.png", "curves.svg"]


def test_a_run_without_a_step_and_one_with_an_odd_name_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra plot")
    plots.draw(write_events(tmp_path / "_a$b_{c}$", []))
    runs = {name: read_events(write_events(tmp_path / "x", training(20))) for name in ("_a", "$\\frac$", "c")}
    plots.save(plots.comparison(runs), tmp_path / "all.svg")
    assert "$\\frac$" in "".join(ElementTree.parse(tmp_path / "all.svg").getroot().itertext())
    with pytest.raises(UserError, match=r"unknown plot format: use one of \.png, \.svg, \.pdf"):
        plots.save(plots.comparison(runs), tmp_path / "all.txt")


def test_without_matplotlib_the_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.style", None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[plot\]'"):
        plots.draw(write_events(tmp_path, training(4)))


def test_drawing_needs_no_torch_and_a_mistake_is_one_line(tmp_path: Path) -> None:
    code = "import sys, nanoft.tracking.plots; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    done = subprocess.run(
        [sys.executable, "-m", "nanoft", "plot", str(tmp_path / "no")], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (2, f"error: {tmp_path / 'no'}: no such run directory\n")
