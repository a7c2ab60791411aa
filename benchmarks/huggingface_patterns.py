"""Compares `bigbird_layout` and `longformer_mask` with Hugging Face's own modules.

    python -m venv hf && hf/bin/pip install torch==2.13.0 transformers numpy
    PYTHONPATH=. hf/bin/python benchmarks/huggingface_patterns.py

runs `BigBirdModel` and `LongformerModel` with random weights, in float64, and takes the
inputs and outputs of each layer's attention. What the float64 reference computes under our
plan from the same queries, keys and values must be the same. Needs no TensorFlow; prints
one line for each case, and exits with 1 where one differs.
"""

import platform
import sys

import numpy as np
import torch
import transformers
from torch.nn.modules.module import register_module_forward_hook
from transformers import BigBirdConfig, BigBirdModel, LongformerConfig, LongformerModel

import sparse_attention as sa

HEADS, HEAD_DIM, LAYERS = 4, 8, 2
# The largest differences allowed, of outputs of about 1. Longformer's softmax is float32.
BIGBIRD, LONGFORMER = 1e-12, 1e-5
SIZES = dict(
    vocab_size=50,
    hidden_size=HEADS * HEAD_DIM,
    num_attention_heads=HEADS,
    num_hidden_layers=LAYERS,
    intermediate_size=32,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)


def attention_calls(model, kind, **inputs):
    """Runs a model; the inputs and outputs of its attention, layer by layer."""
    calls = []

    def record(module, args, options, output):
        if type(module).__name__ == kind:
            hidden = args[0] if args else options["hidden_states"]
            calls.append((module, hidden, output[0]))

    # Of all modules, because a model exchanges its own where a sequence is short.
    hook = register_module_forward_hook(record, with_kwargs=True)
    with torch.no_grad():
        model(**inputs)
    hook.remove()
    if len(calls) != LAYERS:
        raise ValueError(f"{kind} ran {len(calls)} times, where {LAYERS} were expected")
    return calls


def spread_weights(model):
    """Weights large enough that attention is far from uniform."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model.double()


def ours(module, hidden, mask):
    """The reference's outputs of a layer, [batch, time, width]."""
    with torch.no_grad():
        q, k, v = (f(hidden) for f in (module.query, module.key, module.value))
    q, k, v = (x.reshape(*x.shape[:2], HEADS, HEAD_DIM).numpy() for x in (q, k, v))
    o, _ = sa.reference.attention_fwd(q, k, v, mask)
    return o.reshape(*o.shape[:2], -1)


def bigbird(q_len, block_size, random_blocks, max_len=4096):
    """The largest difference, that with another seed, and rows that count a block twice."""
    config = BigBirdConfig(
        **SIZES,
        attention_type="block_sparse",
        block_size=block_size,
        num_random_blocks=random_blocks,
        max_position_embeddings=max_len,
    )
    model = spread_weights(BigBirdModel(config)).train()
    tokens = torch.arange(q_len)[None] % 50
    full = q_len <= (5 + 2 * random_blocks) * block_size
    kind = "BigBirdSelfAttention" if full else "BigBirdBlockSparseAttention"
    calls = attention_calls(model, kind, input_ids=tokens)
    difference, other, twice = 0.0, 0.0, 0
    for seed, (module, hidden, output) in enumerate(calls):
        want = output.numpy().reshape(q_len, HEADS, HEAD_DIM)

        def differences(seed, module=module, hidden=hidden, want=want):
            layout = sa.bigbird_layout(
                q_len, block_size, random_blocks, HEADS, seed, max_len
            )
            dense = sa.BlockMask(layout, None, block_size, q_len, q_len).to_dense()
            return layout, abs(ours(module, hidden, dense).reshape(want.shape) - want)

        layout, found = differences(seed)
        # A row of blocks has fewer than all of its blocks where one of them counts twice.
        n = layout.shape[1]
        own = np.array([len({0, i - 1, i, i + 1, n - 1}) for i in range(1, n - 1)])
        once = np.ones((HEADS, n), bool)
        if not full:
            once[:, 1:-1] = layout[:, 1:-1].sum(axis=2) == own + random_blocks
        twice += int((~once).sum())
        difference = max(difference, found[once.T.repeat(block_size, 0)[:q_len]].max())
        other = max(other, differences(seed + 99)[1].max())
    return difference, other, twice


def longformer(q_len, window, chosen):
    config = LongformerConfig(
        **SIZES, attention_window=window, max_position_embeddings=4098, pad_token_id=1
    )
    model = spread_weights(LongformerModel(config)).eval()
    for layer in model.encoder.layer:  # global tokens have other weights there
        attention = layer.attention.self
        for name in ("query", "key", "value"):
            weights = getattr(attention, name).state_dict()
            getattr(attention, name + "_global").load_state_dict(weights)
    is_global = torch.zeros(1, q_len, dtype=torch.long)
    is_global[0, chosen] = 1
    calls = attention_calls(
        model,
        "LongformerSelfAttention",
        input_ids=2 + torch.arange(q_len)[None] % 48,
        global_attention_mask=is_global,
    )

    def difference(window):
        layout = sa.longformer_layout(q_len, 16, window, chosen)
        mask = sa.longformer_mask(window, chosen)
        dense = sa.BlockMask(layout, mask, 16, q_len, q_len).to_dense()
        return max(
            np.abs(ours(module, hidden, dense) - output.numpy()).max()
            for module, hidden, output in calls
        )

    return difference(window), difference(window + 2)


def main():
    transformers.logging.set_verbosity_error()
    print(
        f"Python {platform.python_version()}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, NumPy {np.__version__}, sparse_attention "
        f"{sa.__version__}; {LAYERS} layers, {HEADS} heads, float64\n"
    )
    same = []
    print("BigBirdModel: length, block_size, random_blocks, and max_len unless 4096:")
    print("largest difference (with another seed)")
    for case in [
        (112, 16, 1),
        (128, 16, 1),
        (176, 16, 3),
        (192, 16, 3),
        (640, 16, 3),
        (832, 64, 3),
        (1024, 64, 3),
        (1024, 64, 3, 1024),
        (2048, 64, 3),
        (2048, 64, 2),
        (3072, 64, 3),
        (4096, 64, 3),
        (4096, 32, 3),
    ]:
        difference, other, twice = bigbird(*case)
        note = f", without {twice} rows of blocks with one counted twice" * bool(twice)
        print(f"  {case}: {difference:.1e}{note} ({other:.1e})", flush=True)
        same.append(difference < BIGBIRD)
    print(
        "LongformerModel: length, attention_window, global tokens: largest difference"
    )
    for case in [
        (64, 16, []),
        (64, 16, [0]),
        (160, 32, [0, 1, 77, 159]),
        (512, 64, [5]),
        (1024, 256, [0, 500]),
    ]:
        difference, other = longformer(*case)
        print(f"  {case}: {difference:.1e} ({other:.1e})", flush=True)
        same.append(difference < LONGFORMER)
    print(f"{sum(same)} of {len(same)} are the same")
    return 0 if all(same) else 1


if __name__ == "__main__":
    sys.exit(main())
