"""Batch sizes of models, shared by the runtimes and the estimates."""

LONGEST_PASS = 2048
"""Tokens that transformers runs at once; longer windows go through its cache."""
MAX_BATCH, MAX_LOGIT_BYTES = 512, 256 * 2**20
"""Tokens of llama.cpp's batch, and bytes of the logits of one."""
MAX_LAYER_WINDOWS = 8
"""Windows on which drift by block is followed: 2,040 scored tokens as usual; each costs 2 · d bytes a block on disk."""
ATTRIBUTED_LOGITS, MOST_ATTRIBUTED_LOGITS = 2**24, 2**29
"""Tokens × vocabulary that an attribution begins with, and takes at most: a second and half a minute on two cores."""
TRIED_ROWS = 384
"""Rows of each matrix that smoothing tries scales on; those that count most are the likeliest to be among them."""
BLOCK_TOKENS = 1024
"""Tokens that a block computes together with gradients."""
STREAMS_OF_A_PASS = 5
"""Streams at a time of all windows of a pass: before and after a block, and what the final norm makes of the last."""
WIDENED_BYTES = 2**31
"""Blocks up to this size in float32 are widened once, larger ones at each product: few of their experts see a token."""
STREAMS_SHARE = 8
"""Part of the memory, one in so many, that the streams between blocks may take; what is kept beyond it goes to disk."""
SAMPLED_ROWS, LEAST_ROWS, VOCAB_ROWS = 256, 32, 1024
"""Rows of each matrix whose gradients are kept; of each expert at least; of the head, and of an embedding."""
FIRST_ROWS = 128
"""Rows of a tensor, of all experts together, that are quantized in every type; most need no more."""
SAMPLED_TOKENS = 64
"""Tokens at each matrix whose inputs are kept, to price the rounding of activations."""
_TALL = 5  # rows to a column: only vocabularies


def sampled_rows_of(matrices: int, rows: int, width: int) -> int:
    """Rows of each matrix of a tensor whose gradients are kept; a head has many more rows than columns."""
    if matrices == 1 and rows > _TALL * width:
        return min(rows, VOCAB_ROWS)
    return min(rows, max(LEAST_ROWS, SAMPLED_ROWS // matrices))
