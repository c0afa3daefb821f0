"""A check that is off by more than 1 % warns everywhere; ``--fail-over`` makes it an exit code."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import groupsearch as gs
from groupsearch.documents import Profile
from groupsearch.errors import ToleranceError
from groupsearch.report import render_page
from tests.cli.running import run

SMALL = ("digits-vit", "--setting", "width=8", "--setting", "blocks=1", "--batch-size", 8)
CHECKED = ("profile", *SMALL, "--grouping", "all-layer", "--verify", "simulate")


def headline(found: Profile) -> str:
    return render_page(found.to_json()).partition("<h1>")[2].partition("</h1>")[0]


def test_profile_is_written_and_its_exit_code_says_so(tmp_path: Path) -> None:
    """The estimate of this small step is 0.02 % short."""
    within = run(*CHECKED, "-o", tmp_path / "within.json", "--fail-over", "1%")
    assert within.exit_code == 0, within.output
    place = tmp_path / "over.json"
    over = run(*CHECKED, "-o", place, "--fail-over", "0.001%")
    assert over.exit_code == 1
    assert "Expected every estimate within 0.001 % of its check, found that of all-layer -0.02 % off" in over.stderr
    assert Profile.load(place).simulations[0].relative_error == pytest.approx(-2.2e-4, rel=0.1)


def test_a_search_stops_before_anything_is_trained(tmp_path: Path) -> None:
    place = tmp_path / "search.json"
    asked = ("optimize", *SMALL, "--verify", "simulate", "--fail-over", "0.001%", "-o", place)
    result = run(*asked, "--report", tmp_path / "page.html")
    assert result.exit_code == 1, result.output
    assert "Expected every estimate within" in result.stderr
    assert not place.exists()
    assert not place.with_suffix(".journal").exists()


def test_more_than_one_percent_warns_in_the_terminal_and_in_the_headline(tmp_path: Path) -> None:
    assert run(*CHECKED, "-o", tmp_path / "found.json").exit_code == 0
    found = Profile.load(tmp_path / "found.json")
    assert not found.doubt
    assert "Warning" not in headline(found)
    (row,) = found.simulations
    for error in (0.011, -0.25):
        off = replace(found, simulations=(row, replace(row, grouping="layer-wise", relative_error=error)))
        assert off.doubt.startswith(
            f"1 of 2 checks are more than 1 % off: the estimate of layer-wise is {error:+.2%}"[:-1]
        )
        assert "Warning: 1 of 2 checks" in headline(off)
        with pytest.raises(ToleranceError, match=r"found that of layer-wise"):
            off.check(0.01)
        off.check(0.3)
        off.check(None)


def test_the_terminal_warns_of_the_same(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from groupsearch.cli.terminal import show_peaks

    monkeypatch.setenv("COLUMNS", "400")
    found = gs.profile(
        "digits-vit", setting={"width": 8, "blocks": 1}, batch_size=8, grouping="all-layer", verify="simulate"
    )
    show_peaks(found)
    assert "Warning" not in capsys.readouterr().err
    off = replace(found, simulations=tuple(replace(row, relative_error=0.02) for row in found.simulations))
    show_peaks(off)
    assert f"Warning: {off.doubt}" in capsys.readouterr().err
