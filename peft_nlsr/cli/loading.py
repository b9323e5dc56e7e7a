"""Models, adapters, tokenizers and rows from what a user names on the command line.

Weights come from safetensors only and code from nowhere, unless the user asks for it; the network is used only for Hub
ids that the user typed. Adapters keep the dtype they are stored in, so that their fingerprints are those of the files.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CorruptFileError, IncompatibleError, PeftNLSRError, UnsupportedAdapterError
from ..prompt_sets import FILE_ENDINGS, file_rows, hub_rows
from .options import usage_error

_SPREAD = "balanced"
_DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class ModelOptions:
    """How a base model is loaded; see the options of the same names."""

    base: str
    device: str = "auto"
    dtype: str = "auto"
    trust_remote_code: bool = False
    tokenizer: str | None = None

    def __post_init__(self) -> None:
        import torch

        if self.dtype not in _DTYPES:
            usage_error(f"--dtype {self.dtype} is not one of {', '.join(_DTYPES)}")
        if self.device == _SPREAD:
            return
        try:
            torch.device(self.one_device())
        except RuntimeError:
            usage_error(f"--device {self.device} is no device; give auto, cpu, cuda, cuda:1, mps or {_SPREAD}")

    def one_device(self) -> str:
        """The device that holds the whole model, where it is not spread."""
        return _device() if self.device == "auto" else self.device


@dataclass(frozen=True)
class Loaded:
    """A model with its tokenizer, and the files of its adapter when it has one."""

    model: Any
    tokenizer: Any
    source: Any


def load(options: ModelOptions, adapter: str | None = None) -> Loaded:
    """The base model, with a saved adapter on it.

    Raises:
        PeftNLSRError: base, adapter or tokenizer cannot be read, or do not fit; the text says which and why.
    """
    from ..adapter_folder import open_adapter

    source: Any = None if adapter is None else open_adapter(adapter)
    _quiet()
    config = _base_config(options)
    tokenizer = _load_tokenizer(options, source)
    model = _load_base(options, config)
    if source is not None:
        model = _with_adapter(model, source)
    return Loaded(model.eval(), tokenizer, source)


def _quiet() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def _base_config(options: ModelOptions) -> Any:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(options.base, trust_remote_code=options.trust_remote_code)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise PeftNLSRError(f"the base model {options.base!r} cannot be loaded: {_first_line(error)}") from error
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedAdapterError(
            f"{options.base} is an encoder-decoder model ({config.model_type}); give a causal language model"
        )
    return config


def _load_base(options: ModelOptions, config: Any) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    remote = {"trust_remote_code": options.trust_remote_code}
    spread = options.device == _SPREAD
    placed = spread or getattr(config, "quantization_config", None) is not None  # such a model cannot be moved later
    try:
        dtype = "auto" if options.dtype == "auto" else getattr(torch, options.dtype)
        model: Any = AutoModelForCausalLM.from_pretrained(
            options.base,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            device_map=(_SPREAD if spread else {"": options.one_device()}) if placed else None,
            **remote,
        )
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise PeftNLSRError(f"the base model {options.base!r} cannot be loaded: {_first_line(error)}") from error
    if "disk" in getattr(model, "hf_device_map", {}).values():
        raise PeftNLSRError(
            f"the base model {options.base!r} does not fit into the memory of GPUs and CPU together; try --dtype "
            "bfloat16, or give a 4-bit checkpoint of it"
        )
    return model if placed else _moved(model, options.one_device())


def _moved(model: Any, device: str) -> Any:
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:  # torch built without the device says it with an assertion
        raise PeftNLSRError(
            f"the base model does not go to the device {device}: {_first_line(error)}; try --dtype bfloat16, "
            f"--device {_SPREAD} or --device cpu"
        ) from error


def _device() -> str:
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _load_tokenizer(options: ModelOptions, source: Any) -> Any:
    from transformers import AutoTokenizer

    own = source is not None and (source.path / "tokenizer_config.json").is_file()
    name = options.tokenizer or (str(source.path) if own else options.base)
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=options.trust_remote_code)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise PeftNLSRError(
            f"no tokenizer can be loaded from {name!r}: {_first_line(error)}; name one with --tokenizer"
        ) from error


def _with_adapter(model: Any, source: Any) -> Any:
    """The adapter on its base, every factor with the bits of the file: PEFT loads 16-bit ones as 32-bit."""
    from peft import PeftModel

    from ..live_adapter import LiveAdapter

    named = f"; it was trained on {source.info.base_model}" if source.info.base_model else ""
    try:
        loaded = PeftModel.from_pretrained(model, str(source.path))
    except (RuntimeError, ValueError) as error:
        raise IncompatibleError(f"the adapter does not fit the base model: {_first_line(error)}{named}") from error
    live = LiveAdapter(loaded)
    differ = sorted(set(live) ^ set(source))
    if differ:
        raise IncompatibleError(
            f"adapter and base model have different modules, {len(differ)} in all, first {differ[0]}; give the base "
            f"that the adapter was trained on{named}"
        )
    for name, update in source.items():
        layer = live.layers[name]
        for factors, tensor in ((layer.lora_A, update.A), (layer.lora_B, update.B)):
            weight = factors[live.info.adapter_name].weight
            weight.data = tensor.to(weight.device)
    return loaded


def _first_line(error: BaseException) -> str:
    """The first sentence of another library's error; the lists and links that follow are left out."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:400].rstrip(".")


def read_rows(source: str | None) -> Any:
    """Rows of data from a file, or a split of a data set on the Hub (``HUB_ID:SPLIT``); None stays None.

    Raises:
        CorruptFileError: a line that cannot be read; PeftNLSRError: no such file or data set.
    """
    if source is None:
        return None
    path = Path(source)
    if path.is_file():
        return _file_rows(path)
    if path.exists() or path.suffix in FILE_ENDINGS or source.startswith((".", "/", "~")):
        raise PeftNLSRError(f"the data file {source!r} does not exist; give {_FORMS}")
    return _hub_rows(source)


_FORMS = f"a file ({', '.join(FILE_ENDINGS)}) or HUB_ID:SPLIT"


def _file_rows(path: Path) -> list[Any]:
    if path.suffix not in FILE_ENDINGS:
        raise PeftNLSRError(f"the data file {path} has no known ending; give {_FORMS}")
    text = path.suffix == ".txt"
    rows = [(where, {"prompt": row} if text else row) for where, row in file_rows(path)]
    odd = [where for where, row in rows if not isinstance(row, dict)]
    if odd:
        raise CorruptFileError(
            f"{path} is no list of rows: {odd[0]} is no object such as {{prompt, response}} ({len(odd)} in all)"
        )
    return [row for _, row in rows]


def _hub_rows(source: str) -> Any:
    name, _, split = source.partition(":")
    try:
        return hub_rows(name, split=split or "train")
    except PeftNLSRError as error:
        raise PeftNLSRError(f"{source!r} is not an existing file, and no data set from the Hub: {error}") from error
