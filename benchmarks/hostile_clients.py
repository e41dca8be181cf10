"""What two hostile clients of ten do to the test perplexity, by aggregation.

    python -m benchmarks.hostile_clients [--repeats SEEDS] [--json FILE]

SmolLM2-135M on Dolly (MOPS_DOLLY, the fetched copy or the sample), ten clients, all asked in each of two rounds of
four local steps. The hostile two train as the others do and then send, instead of their update, ten or a thousand times
its opposite.
"""

import logging

from benchmarks.federation import Federation, hostile_app
from benchmarks.harness import Figure, arguments, report
from strategies.aggregation import AggregationConfig, build_aggregate

NUM_CLIENTS, NUM_HOSTILE = 10, 2
MAX_NORM_RATIO = 100.0
RULES = {
    "mean": AggregationConfig("mean", 0.2, NUM_HOSTILE, 1, MAX_NORM_RATIO, 1),
    "median": AggregationConfig("median", 0.2, NUM_HOSTILE, 1, MAX_NORM_RATIO, 1),
    "trimmed mean, 0.2": AggregationConfig("trimmed-mean", 0.2, NUM_HOSTILE, 1, MAX_NORM_RATIO, 1),
    "Krum": AggregationConfig("krum", 0.2, NUM_HOSTILE, 1, MAX_NORM_RATIO, 1),
    "Multi-Krum, 5 of 10": AggregationConfig("krum", 0.2, NUM_HOSTILE, 5, MAX_NORM_RATIO, 1),
}

CASES = [
    *(("none", 1.0, rule) for rule in RULES),
    *(("10 times the opposite", -10.0, rule) for rule in RULES),
    ("1000 times the opposite", -1000.0, "mean"),
]


def main() -> None:
    """Measure and report; the file is written anew after each case, since all of them take long."""
    options = arguments(__doc__, repeats=1)
    logging.getLogger("flwr").setLevel(logging.ERROR)
    perplexities: dict[str, list[float]] = {}
    refused: dict[str, int] = {}
    for seed in range(options.repeats):
        federation = Federation(num_clients=NUM_CLIENTS, clients_per_round=NUM_CLIENTS, seed=seed)
        perplexities.setdefault("before the first round", []).append(federation.start_perplexity())
        for attack, factor, rule_name in CASES:
            rule, case = RULES[rule_name], f"attack: {attack}; {rule_name}"
            outcome = federation.run(build_aggregate(rule), rule.max_norm_ratio, hostile_app(NUM_HOSTILE, factor))
            perplexities.setdefault(case, []).append(outcome.perplexity)
            refused[case] = refused.get(case, 0) + outcome.refused
            figures = [
                Figure(case, "perplexity", values, f"{refused.get(case, 0)} replies refused")
                for case, values in perplexities.items()
            ]
            report("Two hostile clients of ten", figures, options.json)


if __name__ == "__main__":
    main()
