"""URL lists → raw shards."""
