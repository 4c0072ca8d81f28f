"""One file a stage: its config and its plain function. `stage` is the one Prefect task that every stage goes through."""
