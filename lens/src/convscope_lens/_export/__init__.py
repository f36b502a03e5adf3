"""Data sets: features and scores of any number of pictures as Parquet, as .npy shards, or as Zarr."""
