"""A collection's way to disk; every stage is a generator over the one before it.

    sources.py    files, folders, lists, tar shards (Parquet: parquet.py)  ->  Input
    decode.py     Input  ->  DecodedImage  ->  Pack, in threads or processes that run ahead of the model
    features.py   Pack  ->  EncodedImage: a forward, and the copies beside it
    shards.py     EncodedImage  ->  numbered shards, and the tables that say what lies where

`encode.py` is its command line, `ray_data.py` takes the middle of it to a cluster. Imports go the other way round: here
nothing knows a command or its flags.
"""
