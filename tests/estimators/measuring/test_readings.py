"""Measurements kept in memory where there is no journal."""

from bitknap.estimators.measuring.readings import Readings


def test_readings_without_a_journal_are_kept_only_where_asked_for():
    forgetful, kept = Readings(), Readings(in_memory=True)
    for readings in (forgetful, kept):
        readings.keep("one", [1.0, 2.0])
        readings.keep("not finite", float("nan"))
    assert forgetful.known("one", 2) is None
    known = kept.known("one", 2)
    assert known is not None
    assert known.tolist() == [1, 2]
    assert kept.known("not finite") is None
