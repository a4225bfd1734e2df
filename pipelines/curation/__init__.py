"""Raw image-caption shards → curated Arrow shards, with a ledger of every sample."""
