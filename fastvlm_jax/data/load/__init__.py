"""The input pipeline: from the shards of data sets to global batches on the devices."""
