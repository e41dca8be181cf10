"""MoPs: expert prompts and gate are averaged together, and each client says how much its gate used each expert."""

from flwr.app import ArrayRecord, RecordDict

from mops_fl.errors import InputError
from mops_fl.payload import METRICS
from strategies.fedprompt import FedPrompt


class MoPs(FedPrompt):
    """Federated MoPs (paper, Section 4): FedAvg of everything trainable, experts and gate.

    The round's `gate-mass`, summed over clients, shows which experts their rows went to.
    """

    def check_reply(self, content: RecordDict, expected: ArrayRecord) -> None:
        """Refuse, beside what FedPrompt refuses, a reply without a gate mass for each expert."""
        super().check_reply(content, expected)
        mass = content.metric_records[METRICS]["gate-mass"]
        (num_experts,) = expected["gate.b2"].shape
        if not isinstance(mass, list) or len(mass) != num_experts or min(mass) < 0:
            raise InputError(f"Metric gate-mass is {mass}; it must be {num_experts} numbers of at least 0.")
