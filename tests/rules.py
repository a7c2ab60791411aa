"""Rules that tests put between q kT and the softmax, as `reference.Rule` takes them."""

import numpy as np

BATCH, HEADS, Q_LEN, KV_LEN = 4, 4, 77, 77
random = np.random.RandomState(0)


def documents(batch, length):
    """int32 [batch, length]: runs of equal ids, and padding at the ends of some."""
    ids = np.sort(np.random.RandomState(1).randint(0, 4, [batch, length]), axis=1)
    ids[1::2, -length // 5 :] = -1
    return ids.astype(np.int32)


def random_mask(*shape):
    return np.random.RandomState(2).rand(*shape) < 0.7


RULES = {
    "logit_softcap": {"logit_softcap": 1.5},
    "alibi_slopes": {"alibi_slopes": 0.5 ** np.arange(1.0, HEADS + 1)},
    "relative_bias": {"relative_bias": 0.25 * random.randn(HEADS, 2 * 20 - 1)},
    "segment_ids": {"segment_ids": (documents(BATCH, Q_LEN), documents(BATCH, KV_LEN))},
    "mask": {"mask": random_mask(BATCH, HEADS, Q_LEN, KV_LEN)},
    "dropout": {"dropout_rate": 0.3, "dropout_seed": [11, -5]},
}
