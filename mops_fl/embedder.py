"""A second frozen network that only embeds questions for the gate (the paper's footnote: gate and model may differ)."""

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from mops_fl.errors import InputError
from mops_fl.sources import resolve_backbone


class TextEmbedder:
    """Mean of a model's last hidden states over a text's tokens.

    Attributes:
        size: `D'`, numbers of an embedding.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> None:
        """Freeze `model`; of a longer text the first `max_tokens` count."""
        self._model = model.requires_grad_(False).eval()
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens
        self._device = next(model.parameters()).device
        self.size: int = model.config.hidden_size

    @classmethod
    def load(cls, name: str, device: torch.device) -> "TextEmbedder":
        """Load the model `name`, a local folder or a fetched hub id: an encoder as BERT, or a decoder; in float32.

        Raises:
            InputError: it is not on this machine, or cannot be read.
        """
        folder = resolve_backbone(name)
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            model = AutoModel.from_pretrained(folder, dtype=torch.float32, device_map=device, local_files_only=True)
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise InputError(
                f"The gate's embedding model in {folder} cannot be loaded ({error}); fetch or copy it again."
            ) from error
        # Encoders have a table of positions; it ends before what their tokenizer would let through.
        return cls(model, tokenizer, max_tokens=min(512, model.config.max_position_embeddings))

    @torch.no_grad()
    def __call__(self, text: str) -> Tensor:
        """The embedding `(D',)` float32 of one text."""
        tokens = self._tokenizer(text, truncation=True, max_length=self._max_tokens, return_tensors="pt")
        hidden: Tensor = self._model(**tokens.to(self._device)).last_hidden_state
        return hidden[0].float().mean(0)
