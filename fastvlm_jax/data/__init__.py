"""Data sets: records, their readers and writers, and the input pipeline that turns shards into batches."""
