"""heun_step: x + dt/2 (v + v')."""

CASES = "heun_step"


def test_heun_step(benchmark, contender):
    contender(benchmark)
