"""Euler's and Heun's method over small networks, whole loops."""

CASES = "flow, "


def test_flow_sampling(benchmark, contender):
    contender(benchmark)
