"""A trained adapter on its backbone, to be used as other models of Hugging Face's are: load, generate, save, push.

    model = MopsModel.from_pretrained("runs/dolly-mops-...")
    inputs = model.encode(["Summarise the text."], ["The text ..."])
    output = model.generate(**inputs, max_new_tokens=64)

`generate` is transformers' own, with all it offers; the forward pass below is what it calls.

Letters: `B` rows, `n` tokens, `E` experts, `V` vocabulary.
"""

import copy
import functools
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.constants import is_offline_mode
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import Tensor
from transformers import BatchEncoding, Cache, DynamicCache, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from mops_fl.adapter_folder import CARD, CONFIG, RUN_ADAPTER, TENSORS, SavedAdapter, load_adapter, save_adapter
from mops_fl.backbone import Backbone
from mops_fl.compressed import backbone_sha256, prefer_with_weights, resolve_model
from mops_fl.config import OWN_EMBEDDING, BackboneConfig, to_key
from mops_fl.encoding import Turn, prompt_tokens
from mops_fl.errors import InputError
from mops_fl.methods import FROZEN_ARRAYS, METHOD_OF
from mops_fl.state_cache import StateCache


class MopsModel(PreTrainedModel, GenerationMixin):
    """A frozen backbone with one trained adapter: mixture of prompts, plain prompts, LoRA or IA3.

    Several can share one backbone: nothing is left on it between calls.

    Attributes:
        backbone: the frozen model and its tokenizer.
        description: what the adapter is and what it was trained on.
        adaptable: runs the backbone under an adapter; for losses, see `mops_fl.model.AdaptableModel`.
        adapter: the trained arrays, as `adaptable` takes them.
    """

    main_input_name = "input_ids"

    def __init__(self, backbone: Backbone, saved: SavedAdapter) -> None:
        """Put an adapter on a backbone, unchecked; see `from_pretrained`."""
        super().__init__(copy.deepcopy(backbone.model.config))
        self.backbone = backbone
        self.description = saved.description
        self._saved = saved
        arrays = {name: torch.tensor(array) for name, array in saved.arrays.items()}
        frozen = {name: arrays.pop(name) for name in FROZEN_ARRAYS if name in arrays}
        method = METHOD_OF[saved.description.adapter.method]
        # No state is kept: rows of two files may have the same ids.
        self.adaptable = method.model(backbone, saved.description.adapter, frozen, StateCache(0))
        self.adapter = self.adaptable.adapter([arrays]).requires_grad_(False)
        self.generation_config = _generation_config(backbone)
        self.train(False)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        name: str | Path,
        backbone: str | Path | Backbone | None = None,
        device: str = "auto",
        dtype: str = "auto",
        *,
        revision: str | None = None,
        token: str | None = None,
    ) -> Self:
        """Load an adapter and the backbone it was trained on.

        Args:
            name: a folder that a run or `save_pretrained` left, or a repository on the hub (with HF_HUB_OFFLINE=1, in
                the hub's cache on this machine).
            backbone: where the backbone is, if not where the adapter says: hub id, folder, or one that is loaded.
            device: as torch names it; `auto` is the GPU if there is one, else the CPU.
            dtype: `float32`, `bfloat16`, or `auto`: as in training.
            revision: of the repository on the hub.
            token: for a private one.

        Raises:
            InputError: there is no such adapter, it was edited, or the backbone is missing or another one.
        """
        saved = load_adapter(_find_adapter(name, revision, token))
        if not isinstance(backbone, Backbone):
            config = saved.description.backbone
            config = replace(config, backbone=str(backbone or config.backbone))
            config = prefer_with_weights(saved.description.backbone_sha256, config)
            _check_weights(name, saved, config)
            return cls(Backbone.load(config if dtype == "auto" else replace(config, dtype=dtype), device), saved)
        if backbone.source is None:
            raise InputError("The backbone was made in memory and cannot be compared; give one that was loaded.")
        for key in ("quantization", "gate_embedding"):
            trained_on, given = getattr(saved.description.backbone, key), getattr(backbone.source, key)
            if given != trained_on:
                raise InputError(
                    f"{name} was trained with {to_key(key)} {trained_on}, the backbone has {given}; "
                    "give the backbone it was trained on."
                )
        _check_weights(name, saved, backbone.source)
        return cls(backbone, saved)

    def save_pretrained(self, save_directory: str | Path) -> None:  # type: ignore[override]
        """Write the adapter with its config and card, without the backbone."""
        save_adapter(Path(save_directory), self._saved)

    def push_to_hub(  # type: ignore[override]
        self, repo_id: str, *, private: bool | None = None, token: str | None = None, commit_message: str | None = None
    ) -> str:
        """Upload what `save_pretrained` writes, into a repository that is made if it is not there.

        Returns:
            The address of the commit.
        """
        api = HfApi(token=token)
        repository = api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            message = commit_message or f"Upload {self.description.adapter.method} adapter"
            commit = api.upload_folder(repo_id=repository.repo_id, folder_path=folder, commit_message=message)
        return str(commit.commit_url)

    @property
    def device(self) -> torch.device:
        """Where the backbone lives."""
        return self.backbone.device

    @property
    def dtype(self) -> torch.dtype:
        """The backbone's; the adapter itself is float32."""
        return self.backbone.dtype

    @property
    def tokenizer(self) -> Any:  # noqa: ANN401
        """The backbone's."""
        return self.backbone.tokenizer

    def encode(self, instructions: Sequence[str], contexts: Sequence[str] | None = None) -> BatchEncoding:
        """Questions as `generate` takes them: in the template of training, padded on the left.

        Args:
            instructions: one a row.
            contexts: the passage that each is about, empty for none; None if there are none at all.
        """
        contexts = contexts or [""] * len(instructions)
        return self.encode_turns([[Turn(*row)] for row in zip(instructions, contexts, strict=True)])

    def encode_turns(self, conversations: Sequence[Sequence[Turn]]) -> BatchEncoding:
        """Conversations, the last turn of each yet to be answered, likewise."""
        return self.pad([torch.tensor(prompt_tokens(self.tokenizer, turns)) for turns in conversations])

    def pad(self, rows: list[Tensor]) -> BatchEncoding:
        """Token ids, `(n,)` int64 a row, padded on the left, where the backbone is."""
        pad_left = functools.partial(torch.nn.utils.rnn.pad_sequence, batch_first=True, padding_side="left")
        input_ids = pad_left(rows, padding_value=self.generation_config.pad_token_id)
        attention_mask = pad_left([torch.ones_like(row) for row in rows])
        return BatchEncoding({"input_ids": input_ids, "attention_mask": attention_mask}).to(self.device)

    def answer(self, instructions: Sequence[str], contexts: Sequence[str] | None = None, **options: Any) -> list[str]:  # noqa: ANN401
        """The answer to each question as text; `options` are those of `generate`."""
        inputs = self.encode(instructions, contexts)
        output = self.generate(**inputs, **options)
        new_tokens = output[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in self.tokenizer.batch_decode(new_tokens, skip_special_tokens=True)]

    def gate(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor | None:
        """The gate's scores `(B, E)` of questions with their contexts `(B, n)`; None without a gate."""
        kept = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return self.adaptable.gate_scores(self.adapter, input_ids, kept.bool())

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        prompt_length: int | None = None,
        logits_to_keep: int = 0,
        use_cache: bool = True,
        **_: Any,  # noqa: ANN401
    ) -> CausalLMOutputWithPast:
        """Logits of the next token.

        Args:
            input_ids: `(B, n)`; behind a cache that is not empty, the new tokens.
            attention_mask: `(B, N)` of all tokens so far, zero at padding; None for no padding.
            past_key_values: the sequence's cache; what the gate decided is in it.
            prompt_length: so many first tokens are question and context, by which the gate decides; None: all.
            logits_to_keep: of so many last tokens; 0: of all.
            use_cache: whether to hand back the cache.
            **_: what transformers' `generate` hands to every model beside.

        Returns:
            `logits` `(B, n or logits_to_keep, V)` and `past_key_values`.
        """
        cache = DynamicCache() if past_key_values is None else past_key_values
        num_tokens = input_ids.shape[1]
        if attention_mask is None:
            past = cache.get_seq_length(self.backbone.num_layers - 1)
            past -= self.adaptable.num_prompts if past else 0
            attention_mask = input_ids.new_ones(len(input_ids), past + num_tokens)
        length = num_tokens if prompt_length is None else prompt_length
        hidden = self.adaptable.run_cached(self.adapter, input_ids, attention_mask.bool(), cache, length)
        logits: Any = self.backbone.logits(hidden[:, -logits_to_keep:])
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache if use_cache else None)

    def generate(  # type: ignore[override]
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        **options: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        """As transformers' `generate`; batches are padded on the left.

        The gate decides once, by all of the input, and its decision is kept for the sequence.

        Raises:
            InputError: a cache is given, or the input is to be read in chunks: the gate has to see it whole.
        """
        given = {**(generation_config.to_diff_dict() if generation_config else {}), **options}
        if given.get("past_key_values") is not None or given.get("cache_implementation") is not None:
            raise InputError("MopsModel makes its own cache; leave out past_key_values and cache_implementation.")
        if given.get("prefill_chunk_size"):
            raise InputError("The gate has to see the input whole; leave out prefill_chunk_size.")
        input_ids = options["input_ids"] if inputs is None else inputs
        if given.get("use_cache") is not False:
            options["past_key_values"] = DynamicCache()
        options = {"tokenizer": self.tokenizer, **options, "prompt_length": input_ids.shape[1]}
        return super().generate(inputs, generation_config, **options)  # type: ignore[misc]


def _generation_config(backbone: Backbone) -> Any:  # noqa: ANN401
    """The backbone's own; generation ends where the training rows did."""
    config = copy.deepcopy(backbone.model.generation_config)
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    config.eos_token_id = [end for end in dict.fromkeys([backbone.tokenizer.eos_token_id, *ends]) if end is not None]
    config.pad_token_id = backbone.tokenizer.pad_token_id
    if config.pad_token_id is None:
        config.pad_token_id = backbone.tokenizer.eos_token_id
    return config


def _find_adapter(name: str | Path, revision: str | None, token: str | None) -> Path:
    """The folder of an adapter, a run or a repository on the hub.

    Raises:
        InputError: there is none.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        if (folder / CONFIG).is_file():
            return folder
        if (folder / RUN_ADAPTER / CONFIG).is_file():
            return folder / RUN_ADAPTER
        raise InputError(f"{folder} holds no adapter; name an adapter's folder, or a run's that has ended.")
    try:
        files = [TENSORS, CONFIG, CARD]
        offline = is_offline_mode()  # else a revision given as a commit is looked up on the hub all the same
        return Path(
            snapshot_download(str(name), revision=revision, token=token, allow_patterns=files, local_files_only=offline)
        )
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(
            f"{str(name)!r} is neither a folder nor an adapter that the hub or its cache on this machine has "
            f"({type(error).__name__}); correct it."
        ) from error


def _check_weights(name: str | Path, saved: SavedAdapter, config: BackboneConfig) -> None:
    """Refuse a backbone whose weights are others than those the adapter was trained on."""
    description = saved.description
    found = backbone_sha256(config)
    if found != description.backbone_sha256:
        trained_on = description.backbone
        pruned = "" if trained_on.compression == "none" else f" pruned by {trained_on.compression}"
        embedding = "" if config.gate_embedding == OWN_EMBEDDING else f" and, for the gate, {config.gate_embedding}"
        raise InputError(
            f"{name} was trained on {trained_on.backbone}{pruned}{embedding} with weights of SHA-256 "
            f"{description.backbone_sha256[:12]}, but those in {resolve_model(config)}{embedding} have {found[:12]}; "
            "give the backbone it was trained on."
        )
