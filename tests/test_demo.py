"""The demo: its data, its judge, its training loop, and a quick run from the command line to the files."""

import json
import math

import pytest
import torch

pytest.importorskip("sklearn", reason="the demo's extras are not installed: pip install 'genkern[demo]'")
pytest.importorskip("matplotlib", reason="the demo's extras are not installed: pip install 'genkern[demo]'")

import matplotlib.image
from typer.testing import CliRunner

from genkern import cli
from genkern.demo import criteria, data, families, networks, plots, quality, setup
from genkern.training import trainer

CPU = torch.device("cpu")
TINY = setup.Budget(judge=5, train=3, reflow=3, distill=3, pairs=16, samples=8, batch=16)


@pytest.fixture(scope="module")
def digits():
    return data.load(0, CPU)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """One quick run: what was printed, the folder, the report."""
    out = tmp_path_factory.mktemp("demo") / "new" / "folder"
    result = CliRunner().invoke(cli.app, ["demo", "--quick", "--device", "cpu", "--seed", "7", "--out", str(out)])
    assert result.exit_code == 0, result.output
    return result.output, out, json.loads((out / "report.json").read_text())


# Data


def test_digits_are_all_there_in_range_and_every_class_is_held_out(digits):
    assert digits.images.shape == (1797, 1, 8, 8) and digits.labels.shape == (1797,)
    assert digits.images.min() == -1.0 and digits.images.max() == 1.0
    assert set(digits.labels[digits.held_out :].tolist()) == set(range(10))
    assert len(digits.labels) - digits.held_out == 1797 // 5


def test_the_seed_orders_the_digits(digits):
    again, other = data.load(0, CPU), data.load(1, CPU)
    assert torch.equal(digits.images, again.images)
    assert not torch.equal(digits.images, other.images)
    assert torch.equal(digits.images.sum(0).round(), other.images.sum(0).round())


def test_batches_visit_every_sample_once_an_epoch():
    source = data.batches(10, 4, seed=3, device=CPU)
    seen = torch.cat([next(source) for _ in range(5)]).tolist()
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))


# Judge


def test_frechet_distance_of_equal_features_is_zero():
    features = torch.randn(500, 6, dtype=torch.float64)
    assert quality.frechet(features, features) == pytest.approx(0.0, abs=1e-12)


def test_frechet_distance_has_its_closed_form_for_a_shift_and_a_scale():
    """x' = s x + d: C' = s^2 C, and the distance is (|mu' - mu|^2 + (s - 1)^2 tr C) / tr C."""
    features = torch.randn(400, 5, dtype=torch.float64) * torch.arange(1.0, 6.0)
    other = 3.0 * features + 2.0
    shift = (other.mean(0) - features.mean(0)).square().sum()
    trace = torch.cov(features.T).trace()
    assert quality.frechet(features, other) == pytest.approx(float((shift + 4.0 * trace) / trace), rel=1e-9)


def test_frechet_distance_agrees_with_the_matrix_square_root():
    from scipy.linalg import sqrtm

    a = torch.randn(300, 4, dtype=torch.float64)
    b = torch.randn(200, 4, dtype=torch.float64) @ torch.randn(4, 4, dtype=torch.float64)
    ca, cb = torch.cov(a.T), torch.cov(b.T)
    cross = sqrtm((ca @ cb).numpy()).real.trace()
    expected = ((a.mean(0) - b.mean(0)).square().sum() + ca.trace() + cb.trace() - 2.0 * cross) / ca.trace()
    assert quality.frechet(a, b) == pytest.approx(float(expected), rel=1e-9)


def test_the_judge_knows_digits_and_is_unsure_of_noise(digits):
    judge = quality.train_judge(digits, steps=400, seed=0)
    noise = judge.assess(torch.randn(500, *data.SHAPE, generator=torch.Generator().manual_seed(0)))
    real = judge.assess(digits.images)
    assert judge.accuracy >= criteria.ACCURACY
    assert real.confidence > 0.95 and real.smallest_share > 0.08
    assert math.isclose(sum(real.class_shares), 1.0, rel_tol=1e-5)
    assert noise.confidence < 0.5
    assert real.frechet < 1e-9 < judge.floor(0) < 0.1 * noise.frechet


def test_criteria_are_met_at_their_threshold_and_missed_below():
    at = quality.Quality(criteria.CONFIDENCE, [criteria.SHARE] * 10, 0.0)
    below = quality.Quality(criteria.CONFIDENCE - 1e-6, [criteria.SHARE - 1e-6] * 10, 0.0)
    for given, met in ((at, True), (below, False)):
        verdicts = criteria.judge(1.0, dict.fromkeys(criteria.POINTS, given))
        assert len(verdicts) == 1 + 2 * len(criteria.POINTS)
        assert [c.met for c in verdicts] == [True] + [met] * (2 * len(criteria.POINTS))


# Training


def test_learning_rate_rises_linearly_and_falls_as_a_cosine():
    rates = [trainer.learning_rate(k, 100, 2.0, 10) for k in range(100)]
    assert rates[0] == pytest.approx(0.2) and rates[50] == pytest.approx(1.0)
    assert max(rates) <= 2.0 and rates[-1] == pytest.approx(1.0 + math.cos(0.99 * math.pi))


def test_fit_finds_the_minimum_of_a_quadratic_and_reports_every_loss():
    goal, point = torch.tensor([1.0, -2.0]), torch.nn.Parameter(torch.zeros(2))
    steps_seen, done = [], []
    losses = trainer.fit(
        [point], lambda batch, step: (point - goal).square().sum() * batch, [1.0] * 300, steps=300, lr=0.1, warmup=0,
        after_step=steps_seen.append, progress=done.append,
    )  # fmt: skip
    assert torch.allclose(point, goal, atol=1e-2)
    assert len(losses) == 300 and losses[0] == pytest.approx(5.0) and losses[-1] < 1e-3
    assert steps_seen == list(range(300)) and done == list(range(1, 301))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"steps": 0}, "steps"),
        ({"lr": -1.0}, "lr"),
        ({"warmup": -1}, "warmup"),
        ({"params": []}, "params: expected at least one"),
        ({"batches": [1.0, 1.0]}, "batches: expected at least 3 .one a step., got 2"),
    ],
)
def test_fit_says_which_argument_is_wrong(change, message):
    p = torch.nn.Parameter(torch.ones(1))
    given = {"params": [p], "loss_fn": lambda b, k: (p * b).sum(), "batches": [1.0] * 3, "steps": 3, **change}
    with pytest.raises(ValueError, match=message):
        trainer.fit(given.pop("params"), given.pop("loss_fn"), given.pop("batches"), **given)


def test_fit_stops_at_a_loss_that_is_not_finite():
    p = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(FloatingPointError, match="step 1 of 3"):
        trainer.fit([p], lambda b, k: (p * b).sum(), [1.0, math.nan, 1.0], steps=3)


def test_network_gives_the_shape_it_was_given_and_reads_the_time():
    torch.manual_seed(0)
    network, x = networks.DigitNetwork(), torch.randn(3, 1, 8, 8)
    one, two = network(x, torch.zeros(3)), network(x, torch.full((3,), 0.5))
    assert one.shape == x.shape and not torch.allclose(one, two)
    scaled = networks.DigitNetwork(time_scale=1e-3)
    scaled.load_state_dict({k: v for k, v in network.state_dict().items() if k != "frequencies"}, strict=False)
    assert torch.allclose(scaled(x, torch.full((3,), 500)), two, atol=1e-5)


def test_training_is_a_function_of_the_seed_and_every_family_has_its_own_noise(digits, tmp_path):
    def losses(seed):
        trained = families.Families(digits, setup.Setup(tmp_path, CPU, seed, TINY, quick=True))
        for stage in trained.stages():
            stage.train(lambda done: None)
        return {key: found.losses for key, found in trained.trained.items()}

    first, again, other = losses(1), losses(1), losses(2)
    assert first == again
    assert len(first) == 6 and all(first[key] != other[key] for key in first)
    assert first["flow_matching"] != first["rectified_flow"]


# A run


def test_a_run_writes_pictures_of_some_size(quick):
    _, out, _ = quick
    for name in ("samples.png", "quality.png"):
        image = matplotlib.image.imread(out / name)
        assert image.shape[0] > 700 and image.shape[1] > 1200
        assert image[..., :3].std() > 0.05


def test_the_report_has_every_sampler_stage_and_loss(quick):
    _, _, report = quick
    points = {(row["sampler"], row["calls"]) for row in report["samplers"]}
    assert {name for name, _ in points} == set(plots.STYLES)
    assert set(criteria.POINTS) <= points
    assert report["seed"] == 7 and report["quick"] is True and report["device"].startswith("cpu")
    stages = report["seconds"]
    assert sum(v for k, v in stages.items() if k != "total") <= stages["total"]
    assert set(report["losses"]) < set(stages)
    assert all(math.isfinite(value) for curve in report["losses"].values() for value in curve)
    assert 0.0 < report["frechet_floor"] < report["ceiling"]["frechet"]
    assert report["versions"]["torch"] == torch.__version__


def test_the_report_says_met_exactly_where_a_value_reaches_its_threshold(quick):
    _, _, report = quick
    found = {(row["sampler"], row["calls"]): row for row in report["samplers"]}
    assert all(c["met"] == (c["value"] >= c["at_least"]) for c in report["criteria"])
    assert report["all_met"] == all(c["met"] for c in report["criteria"])
    confidences = [found[point]["confidence"] for point in criteria.POINTS]
    assert [c["value"] for c in report["criteria"][1::2]] == confidences


def test_a_run_ends_with_the_tables_and_where_the_files_are(quick):
    text, out, _ = quick
    assert "sampling and judging" in text and "Fréchet distance" in text
    assert "What the demo promises" in text and "missed" in text
    tail = text[text.index("Look at:") :]
    assert all(str(out / name) in tail for name in ("samples.png", "quality.png", "report.json"))
