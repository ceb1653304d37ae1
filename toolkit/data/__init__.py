"""From documents to the exact batch.

    prepare/    from documents to token files (a tool: training opens what it finds)
    tokens/     token files: what they hold, who uses them
    instances/  token files as rows: cut, packed, padded, variable, custom
    order/      which rows make up batch n: shuffles and mixtures, computed, never stored

`corpus.py` puts the last three together, `loader.py` gives each rank its slice as tensors.
"""
