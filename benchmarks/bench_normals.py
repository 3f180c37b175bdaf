"""Normals by instruction set and threads."""

CASES = "normals"


def test_normals(benchmark, contender):
    contender(benchmark)
