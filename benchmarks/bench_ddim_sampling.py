"""DDIM over a small network, the whole loop."""

CASES = "DDIM"


def test_ddim_sampling(benchmark, contender):
    contender(benchmark)
