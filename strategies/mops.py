"""MoPs: expert prompts and gate are averaged together, and each client says how much its gate used each expert."""

from flwr.app import ArrayRecord

from strategies.fedprompt import FedPrompt


class MoPs(FedPrompt):
    """Federated MoPs (paper, Section 4): FedAvg of everything trainable, experts and gate.

    The round's `gate-mass`, summed over clients, shows which experts their rows went to.
    """

    def num_experts(self, arrays: ArrayRecord) -> int:
        """One mass for each expert of the gate."""
        return int(arrays["gate.b2"].shape[0])
