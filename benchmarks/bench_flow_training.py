"""A flow-matching training step, everything around the network."""

CASES = "flow matching"


def test_flow_training(benchmark, contender):
    contender(benchmark)
