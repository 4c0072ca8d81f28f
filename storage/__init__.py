"""Everything on disk or in a bucket: atomic objects, artifacts, shards. Knows neither torch nor Prefect."""
