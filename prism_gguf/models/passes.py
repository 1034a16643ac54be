"""Batch sizes of models, shared by the runtimes and the estimates."""

LONGEST_PASS = 2048
"""Tokens that transformers runs at once; longer windows go through its cache."""
MAX_BATCH, MAX_LOGIT_BYTES = 512, 256 * 2**20
"""Tokens of llama.cpp's batch, and bytes of the logits of one."""
MAX_LAYER_WINDOWS = 8
"""Windows on which drift by block is followed: 2,040 scored tokens as usual; each costs 2 · d bytes a block on disk."""
ATTRIBUTED_LOGITS = 2**29
"""Tokens × vocabulary of an attribution: about a minute of products for d = 1000 on two cores."""
TRIED_ROWS = 384
"""Rows of each matrix that smoothing tries scales on; those that count most are the likeliest to be among them."""
