"""Plan a collection on rented GPUs before it runs: shards, time and cost."""
