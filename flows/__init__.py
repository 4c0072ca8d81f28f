"""What people schedule and type: the experiment, its loop as a Prefect flow, the `nst` command."""
