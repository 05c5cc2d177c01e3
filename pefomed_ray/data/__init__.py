"""From a publisher's folder to shards, and from shards to the rows of a training step.

    corpora/ (one reader a layout) -> intake -> shards (Ray Data writes Parquet) -> plan (which row when)

A row that cannot be used is quarantined with a reason and counted; nothing is dropped silently.
"""
