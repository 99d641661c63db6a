"""What the load generator sends when: arrivals and sizes have the distributions that their names promise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.stats import kstest, lognorm

from sidepool.__main__ import main
from sidepool.bench.load import arrivals, make_schedule, run_load, sizes
from sidepool.bench.load.arrivals import bursty, constant, diurnal, poisson, replay
from sidepool.bench.load.calls import CallTarget
from sidepool.wire.errors import ConfigError, Overloaded

# A fixed seed: a right generator fails one time in a thousand of them, and this one always or never.
LEAST_P = 1e-3


def test_gaps_of_poisson_arrivals_pass_kolmogorov_smirnov_against_the_exponential() -> None:
    for seed in range(5):
        gaps_s = np.diff(poisson(2000.0, 30.0, seed)) / 1e9
        assert kstest(gaps_s * 2000.0, "expon").pvalue > LEAST_P


def test_that_test_refuses_arrivals_at_constant_gaps_and_gaps_with_a_cut_tail() -> None:
    gaps = np.random.default_rng(0).exponential(1.0, 60_000)
    assert kstest(np.minimum(gaps, 3.0) / np.minimum(gaps, 3.0).mean(), "expon").pvalue < LEAST_P
    assert kstest(np.diff(constant(2000.0, 30.0, 0)) / 1e9 * 2000.0, "expon").pvalue < LEAST_P


def test_every_kind_of_arrivals_has_its_mean_rate_and_is_the_same_for_the_same_seed() -> None:
    for name, make in arrivals.ARRIVALS.items():
        due_ns = make(500.0, 600.0, 3)
        np.testing.assert_array_equal(due_ns, make(500.0, 600.0, 3))
        assert (np.diff(due_ns) >= 0).all()
        assert due_ns[0] >= 0
        assert due_ns[-1] <= 600e9
        # Bursts of a second in ten minutes leave the mean 4 % (one standard deviation) of luck; the others next to none.
        assert due_ns.size == pytest.approx(500 * 600, rel=0.16 if name == "bursty" else 0.01)


def test_a_compressed_day_swings_between_trough_and_peak() -> None:
    due_s = diurnal(1000.0, 100.0, 1) / 1e9
    trough, noon = (((due_s >= at - 2.5) & (due_s < at + 2.5)).sum() / 5 for at in (2.5, 50.0))
    assert trough == pytest.approx(1000 * (1 - arrivals.DIURNAL_SWING), rel=0.06)
    assert noon == pytest.approx(1000 * (1 + arrivals.DIURNAL_SWING), rel=0.06)


def test_bursty_arrivals_have_two_rates_and_the_burst_its_share_of_time() -> None:
    seconds, rate = 4000, 200.0
    per_s = np.bincount((bursty(rate, seconds, 5) / 1e9).astype(int), minlength=seconds)
    quiet = rate / (1 + arrivals.BURST_SHARE * (arrivals.BURST_RATIO - 1))
    # Most seconds lie within one state: counts gather around two values with a gap between them.
    assert np.median(per_s) == pytest.approx(quiet, rel=0.05)
    assert (per_s > 0.9 * quiet * arrivals.BURST_RATIO).sum() > 0.01 * seconds
    share = (per_s.sum() / (quiet * seconds) - 1) / (arrivals.BURST_RATIO - 1)
    assert share == pytest.approx(arrivals.BURST_SHARE, rel=0.25)
    assert per_s.var() > 10 * per_s.mean()


def test_a_file_of_timestamps_is_replayed_from_its_first(tmp_path: Path) -> None:
    file = tmp_path / "times.txt"
    file.write_text("1700000002.5\n1700000000.0\n1700000000.25\n")
    assert replay(file).tolist() == [0, 250_000_000, 2_500_000_000]
    for text in ("", "soon\n", "-1\n", "nan\n"):
        file.write_text(text)
        with pytest.raises(ConfigError, match=r"times\.txt"):
            replay(file)
    with pytest.raises(ConfigError, match=r"absent\.txt"):
        replay(tmp_path / "absent.txt")


def test_mlperf_sizes_have_the_published_shares() -> None:
    found, counts = np.unique(sizes.mlperf(1000, 2), return_counts=True)
    shares = dict(zip(found.tolist(), (counts / 1000).tolist(), strict=True))
    assert shares == {100: 0.1, 200: 0.6, 300: 0.1, 400: 0.05, 500: 0.05, 600: 0.05, 700: 0.05}


def test_lognormal_sizes_are_lognormal_below_and_heavier_above() -> None:
    found = sizes.lognormal(20_000, 4)
    body = lognorm(sizes.LOGNORMAL_SIGMA, scale=np.exp(sizes.LOGNORMAL_MEAN))
    assert (found < body.ppf(0.9)).mean() == pytest.approx(0.9 * (1 - sizes.TAIL_SHARE), abs=0.01)
    assert (found > body.ppf(0.9999)).mean() > 0.1
    assert found.max() == pytest.approx(sizes.LARGEST, rel=0.01)


def test_sizes_may_be_a_number_or_a_file_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "sizes.txt"
    file.write_text("3\n9\n")
    assert sizes.parse_sizes(str(file))(5, 0).tolist() == [3, 9, 3, 9, 3]
    assert sizes.parse_sizes("64")(2, 0).tolist() == [64, 64]
    for wrong in ("-1", "0", "many"):
        with pytest.raises(ConfigError, match="sizes"):
            sizes.parse_sizes(wrong)
    file.write_text("3\n0\n")
    with pytest.raises(ConfigError, match=r"sizes\.txt"):
        sizes.parse_sizes(str(file))


def test_a_schedule_asks_every_request_equally_often_and_refuses_an_empty_one() -> None:
    schedule = make_schedule(constant(100.0, 1.0, 0), 7, 1, seconds=1.0)
    assert len(schedule) == 100
    assert set(np.bincount(schedule.request, minlength=7).tolist()) == {14, 15}
    with pytest.raises(ConfigError, match="arrivals"):
        make_schedule(constant(0.5, 1.0, 0), 7, 1)


def test_options_that_make_no_load_are_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, named in (("", "--triton"), ("--target sidecars --rate 0", "--rate"), ("--target sidecars", "model.yaml")):
        assert main(["load", "--artifact", str(tmp_path), *options.split()]) == 2
        assert named in capsys.readouterr().err
    for calls in ([], [id] * 2000):
        with pytest.raises(ConfigError, match="callers: found"):
            CallTarget(calls, 1)


def test_calls_in_this_process_are_counted_by_what_they_raise() -> None:
    def answer(request: int) -> None:
        if request:
            raise (Overloaded("full"), KeyError("odd"))[request - 1]

    result = run_load(CallTarget([answer] * 2, 3), make_schedule(constant(300.0, 0.3, 0), 3, 0), slo_ms=1000)
    assert result.errors == {"OVERLOADED": 30, "KeyError": 30}
    assert result.examples == {"OVERLOADED": "full", "KeyError": "'odd'"}
    assert (result.latency_ns.size, result.attainment) == (30, 1 / 3)
    assert (result.sent_ns >= result.schedule.due_ns).all()
