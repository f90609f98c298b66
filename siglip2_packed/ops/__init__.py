"""The operations of the encoder, a folder each; arrows go down only.

    attention/    varlen self-attention             eager, sdpa, flash_attn, ...; own: triton, hopper
    pool/         the head's query over an image    eager, triton
    norm/         LayerNorm, residual sums          eager, triton
    linear/       rows times a weight               eager, triton and Hopper (sums in one order, for batch_invariant)
    mlp/          the wide product and GELU         eager, triton (backward), hopper
    columns/      sums and products over rows       eager, triton
    positions/    the position table, resized       eager, triton
    float8/       rows in float8 with scales        eager, triton
    patches/      decoded images, resized and cut   eager, triton
    layer         the functions a layer is made of, chosen at once
    segments      which rows belong together
    survey        what there is, what is right, what would run: for `doctor`
    runtime/      what all share: choice (which implementation runs here), check (was it found right), launch, ...

    the model -> a folder's own name, layer, segments -> its implementations -> runtime -> torch, triton

A folder's `__init__` is what others import. `eager` in it is the contract: the plain computation, which runs anywhere
and which the others are compared with in float64. Implementations never import each other. They are loaded by name, the
first time that `runtime.choice` takes them. Only `choice` compares cards and sizes, only `check` states bounds.
"""
