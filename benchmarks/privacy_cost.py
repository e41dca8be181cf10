"""What central differential privacy costs in test perplexity, by noise.

    python -m benchmarks.privacy_cost [--repeats SEEDS] [--json FILE]

SmolLM2-135M on Dolly (MOPS_DOLLY, the fetched copy or the sample), 100 clients, ten asked in each of two rounds of
four local steps. The note of a case says the epsilon at delta 0.00001 of the client that was asked most often.
"""

import logging

from benchmarks.federation import Federation
from benchmarks.harness import Figure, arguments, report
from strategies.aggregation import AggregationConfig, build_aggregate
from strategies.privacy import NoiseConfig, private_mean, spent_epsilon

DELTA = 0.00001
# (most length of an update, noise multiplier); an update of this federation is about 10 long.
CASES = ((1.0, 0.0), (1.0, 1.0), (1.0, 0.1), (10.0, 0.01), (0.1, 1.0))


def main() -> None:
    """Measure and report; the file is written anew after each case, since all of them take long."""
    options = arguments(__doc__, repeats=1)
    logging.getLogger("flwr").setLevel(logging.ERROR)
    perplexities: dict[str, list[float]] = {}
    notes: dict[str, str] = {}

    def measured(case: str, perplexity: float, note: str) -> None:
        perplexities.setdefault(case, []).append(perplexity)
        notes[case] = note
        figures = [Figure(case, "perplexity", values, notes[case]) for case, values in perplexities.items()]
        report("The cost of differential privacy", figures, options.json)

    for seed in range(options.repeats):
        federation = Federation(seed=seed)
        measured("before the first round", federation.start_perplexity(), "")
        plain = build_aggregate(AggregationConfig("mean", 0.2, 2, 1, 0.0, 1))
        measured("mean", federation.run(plain, 0.0).perplexity, "no privacy")
        for clip_norm, noise_multiplier in CASES:
            config = NoiseConfig(clip_norm, noise_multiplier, DELTA)
            aggregate = private_mean(config, federation.config.federation.clients_per_round)
            case = f"clip-norm {clip_norm:g}, noise-multiplier {noise_multiplier:g}"
            measured(case, federation.run(aggregate, 0.0).perplexity, _note(config, federation))


def _note(config: NoiseConfig, federation: Federation) -> str:
    if not config.noise_multiplier:
        return "clipping only, epsilon is infinite"
    rounds = federation.sampler().most_participations(federation.config.federation.num_server_rounds)
    epsilon = spent_epsilon(
        config,
        num_clients=federation.config.client.partition.num_clients,
        clients_per_round=federation.config.federation.clients_per_round,
        participations=rounds,
    )
    return f"epsilon {epsilon:.3g} after {rounds} rounds"


if __name__ == "__main__":
    main()
