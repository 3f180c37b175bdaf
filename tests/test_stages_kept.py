"""Stages of a sampler are kept for a path only where nothing that they depend on can change unseen."""

from __future__ import annotations

import dataclasses

import numpy as np

import genkern as gk
from genkern import paths
from genkern.samplers import DDIM, Euler, OnPath
from genkern.samplers.table import stages_of

GRID = np.linspace(0.1, 0.9, 5)


def stages(path):
    return tuple(stages_of(Euler(), OnPath(path, "epsilon"), GRID))


def made(path):
    return tuple(Euler().stages(OnPath(path, "epsilon"), GRID))


def test_functions_that_have_changed_are_asked_again():
    power = [1.0]
    path = paths.Custom(lambda t: t ** power[0], lambda t: 1.0 - t)
    before = stages(path)
    power[0] = 2.0
    assert stages(path) == made(path) != before


def test_a_path_of_the_users_own_is_asked_again_and_need_not_be_hashable():
    @dataclasses.dataclass
    class Mine(paths.CondOT):
        sigma_min: float = 0.0
        lift: dict = dataclasses.field(default_factory=lambda: {"by": 1.0})

        def d_alpha(self, t):
            return self.lift["by"]

    path = Mine()
    before = stages(path)
    path.lift["by"] = 2.0
    assert stages(path) == made(path) != before


def test_attributes_set_anew_are_another_path():
    path = paths.Polynomial(1.0)
    before = stages(path)
    path.n = 3.0
    assert stages(path) == made(path) != before


def test_the_packages_own_paths_keep_theirs():
    for sampler, path, grid in (
        (Euler(), paths.CondOT(), GRID),
        (Euler(), paths.Reversed(paths.Cosine()), GRID),
        (DDIM(), gk.Diffusion().path, 900.0 * GRID[::-1]),
    ):
        network = OnPath(path, "epsilon")
        assert stages_of(sampler, network, grid) is stages_of(sampler, network, grid)
