"""A collection's way to disk; every stage is a generator over the one before it.

    sources.py    files, folders (walk.py), lists, tar shards (tar.py), tables (parquet.py, arrow.py)  ->  Input
                  kept.py: columns that go along; samples.py: what lies beside the images of a tar
    decode.py     Input  ->  DecodedImage  ->  Pack, in threads or processes that run ahead of the model
                  shelf.py: memory that its workers share with us
    cut.py        pixels and files  ->  patches on the card, between the two, where there is one
    features.py   Pack  ->  EncodedImage: a forward, and the copies beside it
    shards.py     EncodedImage  ->  numbered shards; parts.py: what is known of each
    run.py        which shards a process writes, and what the files of a run vouch for: the rule is there
                  plan.py: what is there and what is missing; identity.py: what a row depends on
                  lock.py: one run a folder; ranks.py: the processes of one run; shares.py: several runs as one
    load.py       the folder of a finished run  ->  names, vectors, the patches of an image

`encode.py` is the command; `ray_data.py` takes decode and features to a cluster. Nothing here imports either.
"""

FORMATS = ("safetensors", "parquet", "arrow", "npy")
"""What a shard may be."""
DECODE_IN = ("threads", "processes")
