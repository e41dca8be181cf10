"""MoPs in PyTorch: a mixture of soft prompts with a gate, on a frozen language model (arXiv 2310.02842)."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mops_fl.mops_model import MopsModel

__all__ = ["MopsModel"]


def __getattr__(name: str) -> Any:  # noqa: ANN401
    """`mops_fl.MopsModel`, imported when it is asked for: torch and transformers take seconds."""
    if name == "MopsModel":
        from mops_fl.mops_model import MopsModel

        return MopsModel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
