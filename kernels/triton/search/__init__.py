"""What compilation runs on a GPU: the search for scales, packing, statistics of activations."""
