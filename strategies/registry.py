"""The strategy of each method in `mops_fl.config.METHODS`."""

from strategies.fedprompt import FedPrompt
from strategies.mops import MoPs

STRATEGIES: dict[str, type[FedPrompt]] = {"mops": MoPs, "fedprompt": FedPrompt, "lora": FedPrompt, "ia3": FedPrompt}
