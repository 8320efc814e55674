"""Teacher and student, loaded or made from local folders.

Trains nothing, and runs no code that comes with a model.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from longshore.errors import ConfigError, UnsupportedModelError
from longshore_export.distill.losses import layer_map
from longshore_export.distill.settings import DistillSettings
from longshore_export.student import FAMILIES

_WIDTHS = (
    "model_type", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads",
    "vocab_size", "tie_word_embeddings",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Pair:
    """`tokenizer_folder` is the student's own where it has a tokenizer, else the teacher's."""

    teacher: PreTrainedModel
    student: PreTrainedModel
    tokenizer_folder: Path


def load_pair(settings: DistillSettings, teacher_dtype: torch.dtype) -> Pair:
    """Raises ConfigError or UnsupportedModelError, each in one line."""
    teacher = _load(settings.teacher, teacher_dtype)
    folder = settings.student if settings.student.is_dir() else settings.student.parent
    config = _config(settings.student)
    for one in (teacher.config, config):
        _check_family(one)
    student = _student(settings, folder, config, teacher)
    has_tokenizer = (folder / "tokenizer.json").is_file()
    return Pair(teacher, student.float().train(), folder if has_tokenizer else settings.teacher)


def _student(
    settings: DistillSettings, folder: Path, config: PretrainedConfig, teacher: PreTrainedModel
) -> PreTrainedModel:
    if settings.start == "weights":
        return _load(folder, torch.float32)
    torch.manual_seed(settings.seed)
    student: PreTrainedModel = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="sdpa", trust_remote_code=False
    )
    if settings.start == "layer-drop":
        drop_layers(student, teacher)
    return student


@torch.no_grad()
def drop_layers(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Start the student as the teacher with evenly spaced layers left out (DistilBERT, Sanh et al. 2019).

    Raises ConfigError where a width differs, since a layer fits as a whole or not at all.
    """
    for name in _WIDTHS:
        ours, theirs = getattr(student.config, name, None), getattr(teacher.config, name, None)
        if ours != theirs:
            raise ConfigError(
                f"layer-drop needs the teacher's {name} ({theirs}), and the student's is {ours}"
            )
    state = teacher.state_dict()
    pairs = layer_map(student.config.num_hidden_layers, teacher.config.num_hidden_layers)
    source = {f"model.layers.{ours - 1}.": f"model.layers.{theirs - 1}." for ours, theirs in pairs}
    taken = {}
    for name in student.state_dict():
        prefix = next((prefix for prefix in source if name.startswith(prefix)), None)
        taken[name] = state[name if prefix is None else source[prefix] + name.removeprefix(prefix)]
    student.load_state_dict(taken)


def _load(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    if not (folder / "config.json").is_file():
        raise ConfigError(f"no model: {folder / 'config.json'} does not exist")
    if not any(folder.glob("*.safetensors")):
        raise ConfigError(f"{folder} has no .safetensors weights")
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation="sdpa", local_files_only=True, use_safetensors=True,
            trust_remote_code=False,
        )  # fmt: skip
    except Exception as error:  # transformers and safetensors raise many types for a damaged folder
        raise ConfigError(f"{folder} can't be loaded: {str(error).splitlines()[0][:300]}") from None
    return model


def _config(path: Path) -> PretrainedConfig:
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise ConfigError(f"no configuration of the student: {file} does not exist")
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(
            file, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # as above
        raise ConfigError(f"{file} can't be read: {str(error).splitlines()[0][:300]}") from None
    return config


def _check_family(config: PretrainedConfig) -> None:
    if config.model_type not in FAMILIES:
        raise UnsupportedModelError(
            f"distillation knows {', '.join(FAMILIES)}; this model is {config.model_type!r}"
        )
    if any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or ()):
        raise UnsupportedModelError("distillation knows no sliding-window layers")
