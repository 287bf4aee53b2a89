"""Which calls are made, and which are timed; no seconds are compared."""

import pytest

from iared2_jax import timing


@pytest.fixture
def calls(monkeypatch):
    """Two variants on a clock of our own: a second per call of "a", two per call of "b"."""
    now, made = [0.0], []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def variant(name, seconds):
        def call():
            made.append(name)
            # The first call of all takes longer, like one that still has to compile.
            now[0] += seconds + (100 if len(made) == 1 else 0)

        return call

    return {"a": variant("a", 1.0), "b": variant("b", 2.0)}, made


def test_rounds_alternate_and_the_first_does_not_count(calls):
    variants, made = calls
    timings = timing.interleaved(variants, 3)
    assert made == list("baabbaab")
    assert timings == {"a": (1.0,) * 4, "b": (2.0,) * 4}


@pytest.mark.parametrize(
    ("rounds", "seconds", "expected"),
    [((2, 9), 0.0, 2), ((2, 9), 100.0, 9), ((2, 9), 10.0, 4), ((5, 9), 10.0, 5)],
)
def test_as_many_rounds_as_begin_in_time(calls, rounds, seconds, expected):
    variants, made = calls  # a round takes 3 s
    timing.interleaved(variants, rounds, seconds)
    assert len(made) == 2 * (1 + expected)


def test_short_calls_follow_one_that_is_not_timed(calls):
    variants, made = calls
    timings = timing.interleaved(variants, 2, primed=1.5)
    assert made == list("baaabbaa")
    assert timings == {"a": (1.0,) * 4, "b": (2.0,) * 4}
