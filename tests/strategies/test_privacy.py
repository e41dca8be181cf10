import math

import numpy as np
import pytest

from mops_fl.errors import InputError
from mops_fl.payload import TrainResult
from strategies.fedprompt import FedPrompt
from strategies.privacy import NoiseConfig, private_mean, spent_epsilon

START = {"prompts": np.full((100, 100), 2.0, np.float32), "bias": np.zeros(1, np.float32)}


def result(shift):
    """Every one of 10,000 prompts' numbers moves by `shift`: an update of length `100 * shift`."""
    adapter = {"prompts": START["prompts"] + np.float32(shift), "bias": START["bias"]}
    return TrainResult(adapter, 3, 2, 10, 5.0, 0.25, ())


def average(ask, shifts, clip_norm, noise_multiplier, num_clients=4):
    aggregate = private_mean(NoiseConfig(clip_norm, noise_multiplier, 1e-5), num_clients)
    asked = ask(FedPrompt, START, num_clients=num_clients, aggregate=aggregate)
    arrays, _ = asked.strategy.aggregate_train(1, [asked.reply(i, result(shift)) for i, shift in enumerate(shifts)])
    return arrays["prompts"].numpy().astype(np.float64) - 2


def test_long_updates_are_clipped_and_short_ones_left(ask):
    # Lengths 100, 10 (clipped to 20 and left), 0 and 20.
    moved = average(ask, [1.0, 0.1, 0.0, -0.2], 20.0, 0.0)
    np.testing.assert_allclose(moved, (0.2 + 0.1 + 0.0 - 0.2) / 4, atol=1e-6)


def test_client_that_does_not_answer_counts_as_one_that_changed_nothing(ask):
    moved = average(ask, [0.1, 0.1], 20.0, 0.0)
    np.testing.assert_allclose(moved, 0.2 / 4, atol=1e-6)


def test_noise_has_the_promised_size_however_many_answer_and_is_not_seeded(ask):
    drawn = []
    for shifts in ([0.1] * 4, [0.1]):
        np.random.seed(0)
        moved = average(ask, shifts, 20.0, 0.5)
        assert moved.std() == pytest.approx(0.5 * 20 / 4, rel=0.05)
        assert moved.mean() == pytest.approx(0.1 * len(shifts) / 4, abs=0.15)
        drawn.append(moved - moved.mean())
    assert np.abs(np.corrcoef(drawn[0].ravel(), drawn[1].ravel())[0, 1]) < 0.1


@pytest.mark.parametrize(("noise_multiplier", "participations"), [(1.0, 1), (1.0, 20), (4.0, 3)])
def test_epsilon_is_that_of_composed_gaussians(noise_multiplier, participations):
    """Mironov 2017: order a costs a * rounds / (2 z^2); to epsilon by Canonne, Kamath and Steinke 2020."""
    epsilon = spent_epsilon(
        NoiseConfig(1.0, noise_multiplier, 1e-5), num_clients=100, clients_per_round=10, participations=participations
    )
    orders = np.linspace(1.01, 200, 200_000)
    renyi = orders * participations / (2 * noise_multiplier**2)
    bound = renyi + np.log1p(-1 / orders) - (math.log(1e-5) + np.log(orders)) / (orders - 1)
    assert epsilon == pytest.approx(bound.min(), rel=0.02)


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ((-1.0, 0.0, 1e-5), "`clip-norm` is -1.0"),
        ((1.0, -1.0, 1e-5), "`noise-multiplier` is -1.0"),
        ((0.0, 1.0, 1e-5), "`noise-multiplier` is set, but `clip-norm` is 0"),
        ((1.0, 1.0, 0.0), "`privacy-delta` is 0.0"),
        ((1.0, 1.0, 1.0), "`privacy-delta` is 1.0"),
    ],
)
def test_bad_values_are_refused(values, complaint):
    with pytest.raises(InputError, match=complaint):
        NoiseConfig(*values)
