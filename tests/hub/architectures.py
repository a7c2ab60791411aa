"""Tiny models of KerasHub, with random weights, and what they read."""

from typing import Any, NamedTuple

import keras_hub
import numpy as np

models = keras_hub.models

WIDTHS = {"num_layers": 2, "hidden_dim": 32, "intermediate_dim": 48}
BOTH = {"vocabulary_size": 60, "num_heads": 4, **WIDTHS}
ENCODER = {**BOTH, "max_sequence_length": 32}
WHISPER = {
    **BOTH,
    "max_encoder_sequence_length": 40,
    "max_decoder_sequence_length": 32,
}
VIT = {
    "image_shape": (16, 16, 3),
    "patch_size": 4,
    "num_layers": 2,
    "num_heads": 4,
    "hidden_dim": 32,
    "mlp_dim": 48,
}
GROUPED = {
    "vocabulary_size": 60,
    "num_query_heads": 4,
    "num_key_value_heads": 2,
    **WIDTHS,
}
LENGTH, END = 24, 17


def tokens(length=LENGTH, end=END):
    """Two sequences, the second with padding on its right."""
    return {
        "token_ids": np.random.RandomState(0).randint(1, 60, [2, length]),
        "padding_mask": np.int32(np.arange(length) < [[length], [end]]),
    }


def segments():
    return {**tokens(), "segment_ids": np.zeros([2, LENGTH], np.int32)}


def two_sides(**encoder):
    encoder = encoder or tokens(20, 11)
    names = "token_ids", "padding_mask"
    return {
        **{
            f"encoder_{name}" if name in names else name: encoder[name]
            for name in encoder
        },
        **{f"decoder_{name}": array for name, array in tokens().items()},
    }


def normal(*shape):
    return np.random.RandomState(0).normal(size=shape).astype(np.float32)


class Architecture(NamedTuple):
    """A class of KerasHub, its configuration and its inputs."""

    backbone: Any
    config: dict
    inputs: Any
    fused: int = (
        0  # attention calls of the fused op in a forward pass, where there is no GPU
    )
    causal_lm: Any = None


# T5 adds a bias to its scores and writes its attention out. Gemma asks for the fused op on a
# GPU alone.
ARCHITECTURES = {
    "bert": Architecture(models.BertBackbone, ENCODER, segments(), fused=2),
    "roberta": Architecture(models.RobertaBackbone, ENCODER, tokens(), fused=2),
    "gpt2": Architecture(
        models.GPT2Backbone, ENCODER, tokens(), fused=2, causal_lm=models.GPT2CausalLM
    ),
    "llama": Architecture(
        models.LlamaBackbone, GROUPED, tokens(), fused=2, causal_lm=models.LlamaCausalLM
    ),
    "mistral": Architecture(
        models.MistralBackbone,
        {**GROUPED, "sliding_window": 8},
        tokens(),
        fused=2,
        causal_lm=models.MistralCausalLM,
    ),
    "gemma": Architecture(
        models.GemmaBackbone,
        {**GROUPED, "head_dim": 8},
        tokens(),
        causal_lm=models.GemmaCausalLM,
    ),
    "t5": Architecture(models.T5Backbone, {**BOTH, "num_layers": 1}, two_sides()),
    "bart": Architecture(models.BartBackbone, ENCODER, two_sides(), fused=6),
    "vit": Architecture(models.ViTBackbone, VIT, normal(2, 16, 16, 3), fused=2),
    "whisper": Architecture(
        models.WhisperBackbone,
        WHISPER,
        two_sides(encoder_features=normal(2, 40, 80)),
        fused=6,
    ),
}
