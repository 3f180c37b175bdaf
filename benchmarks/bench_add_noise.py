"""add_noise: alpha x + sigma z, by call, by sample, with the noise written, channels_last."""

CASES = "add_noise"


def test_add_noise(benchmark, contender):
    contender(benchmark)
