"""Images read from files or shards by worker processes: loaders and transforms."""
