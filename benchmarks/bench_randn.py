"""randn: standard normal noise alone."""

CASES = "randn"


def test_randn(benchmark, contender):
    contender(benchmark)
