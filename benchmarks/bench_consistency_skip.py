"""consistency_skip (13.29): c_skip x + c_out F."""

CASES = "consistency_skip"


def test_consistency_skip(benchmark, contender):
    contender(benchmark)
