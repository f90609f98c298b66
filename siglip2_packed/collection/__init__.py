"""A collection's way to disk; every stage is a generator over the one before it.

    sources.py    files, folders, lists, tar shards (Parquet: parquet.py)  ->  Input
    decode.py     Input  ->  DecodedImage  ->  Pack, in threads or processes that run ahead of the model
    features.py   Pack  ->  EncodedImage: a forward, and the copies beside it
    shards.py     EncodedImage  ->  numbered shards, and the tables that say what lies where
    run.py        which of the shards a process writes: its share, less what an earlier run has left there

`encode.py` is the command; `ray_data.py` takes decode and features to a cluster. Nothing here imports either.
"""
