"""euler_step: x + dt v."""

CASES = "euler_step"


def test_euler_step(benchmark, contender):
    contender(benchmark)
