"""path_loss: mean (F - (x - z))^2, and its gradient."""

CASES = "path_loss"


def test_path_loss(benchmark, contender):
    contender(benchmark)
