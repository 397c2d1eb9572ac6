"""The benchmark of forecasts: which part of an estimate a second belongs to."""

from bitknap.benchmarks.forecast import Clock, markdown


def test_parts_end_where_the_next_begins(monkeypatch):
    times = iter([3.0, 7.0, 20.0])
    monkeypatch.setattr("bitknap.benchmarks.forecast.time.perf_counter", lambda: next(times))
    clock = Clock(rows=4.0)
    for what in ("calibrate", "calibrate", "gains", "solve", "measure groups"):
        clock(what, 0, 1) if what not in clock.marks else None
    assert clock.seconds(1.0, 50.0) == {
        "load": 2.0,
        "calibrate": 4.0,
        "gains": 9.0,
        "group readings": 30.0,
        "round rows": 4.0,
    }


def test_the_report_compares_sums():
    rows = [
        {"step": "load", "residency": way, "forecast": 2.0, "real": 1.0}
        for way in ("whole", "by layer")
    ]
    page = markdown(
        {"bytes": 1, "units": 2, "tokens": 3, "rows": 0.1, "probe_seconds": 20, "load": 1.0}
        | {"steps": rows}
    )
    assert "| all | by layer | 2.0 s | 1.0 s | 2.00 |" in page
