"""ddim_step (13.13): plain, clipped, guided, with eta = 1, from predicted data."""

CASES = "ddim_step"


def test_ddim_step(benchmark, contender):
    contender(benchmark)
